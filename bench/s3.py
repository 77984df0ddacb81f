"""Speed of the S3 store beside obstore doing the same: ``python -m bench.s3 [--json]``.

The floor replaces one object under ``If-Match`` by obstore's own asynchronous call, retries off, on the same Ceph
gateway in the same run: what it leaves out is writers' ops, typing and checksum, and that it decides nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import obstore
from obstore.store import S3Store

from holdfast.backends.s3 import S3Backend
from holdfast.contract import Key, Op, Survives
from holdfast.domains import encode
from holdfast.store import Store

from .parts import line, make_key, make_signal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from servers.s3 import BUCKET, KEY, REGION, SECRET, CephServer, credentials  # noqa: E402  (it lies beside the tests)

SEQUENTIAL_ROUNDS = 300  # turn by turn: a neighbour burdens all of them alike
GROUP_ROUNDS, COMMITTERS, COMMITS_EACH = 5, 64, 10
READ_ROUNDS, ROWS, ROWS_PER_COMMIT = 7, 10_000, 2_500


class _Row(msgspec.Struct):
    version: int
    row: msgspec.Raw


_ROWS = msgspec.json.Decoder(dict[str, _Row])


class Bare:
    """obstore and one object, nothing else."""

    def __init__(self, port: int, name: str) -> None:
        self.name = name
        self.etag = ""
        self.store = S3Store(
            BUCKET,
            endpoint=f"http://127.0.0.1:{port}",
            region=REGION,
            access_key_id=KEY,
            secret_access_key=SECRET,
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )

    async def commit(self, rows: dict[Key, bytes], number: int) -> None:
        """Replace the object, if it is as it was left."""
        body = b"{%b}" % b",".join(
            b'"%b":{"version":%d,"row":%b}' % (str(key).encode(), number, row) for key, row in rows.items()
        )
        mode: Any = {"e_tag": self.etag.strip('"')} if self.etag else "create"
        self.etag = (await obstore.put_async(self.store, self.name, body, mode=mode))["e_tag"] or ""

    async def read(self) -> dict[Key, tuple[bytes, int]]:
        """Read the object's rows and versions."""
        body = (await (await obstore.get_async(self.store, self.name)).bytes_async()).to_bytes()
        return {Key(*text.split("/")): (bytes(one.row), one.version) for text, one in _ROWS.decode(body).items()}


async def measure_sequence(server: CephServer) -> dict[str, float]:
    """One commit after another, each awaited."""
    store = Store(S3Backend(server.store("one")), require=Survives.PROCESS)
    await store.open()
    backend, bare = S3Backend(server.store("onebackend")), Bare(server.port, "bare/one.json")
    await backend.open()
    lane, key = store.writer("bench"), make_key(0)
    payload, versions = encode(key, make_signal(0)), {"store": 0, "backend": 0}
    ops = iter(range(1, 1 << 30))

    async def by_store(at: int) -> None:
        versions["store"] = await lane.commit({key: make_signal(at)}, {key: versions["store"]})

    async def by_backend(_: int) -> None:
        op = Op("bench", next(ops))
        versions["backend"] = await backend.commit("main", {key: payload}, {key: versions["backend"]}, op=op)

    async def by_hand(at: int) -> None:
        await bare.commit({key: payload}, at)

    times: dict[str, list[float]] = {"floor": [], "store": [], "backend": []}
    for at in range(SEQUENTIAL_ROUNDS):
        for name, call in (("floor", by_hand), ("store", by_store), ("backend", by_backend)):
            times[name].append(await _timed(partial(call, at)))
    await backend.close()
    await store.close()
    return {name: statistics.median(found) for name, found in times.items()}


async def measure_group(server: CephServer) -> dict[str, float]:
    """Many committers at once: commits a second; the floor sends as many in each object."""
    store = Store(S3Backend(server.store("many")), require=Survives.PROCESS)
    await store.open()
    bare = Bare(server.port, "bare/many.json")
    lanes = [store.writer(f"lane {number}") for number in range(COMMITTERS)]
    signals = [make_signal(number) for number in range(COMMITTERS)]
    keys = [make_key(number + 1) for number in range(COMMITTERS)]
    rows = {key: encode(key, signal) for key, signal in zip(keys, signals, strict=True)}
    versions = [0] * COMMITTERS

    async def one(number: int) -> None:
        lane, key, signal = lanes[number], keys[number], signals[number]
        for _ in range(COMMITS_EACH):
            versions[number] = await lane.commit({key: signal}, {key: versions[number]})

    async def by_store() -> None:
        await asyncio.gather(*(one(number) for number in range(COMMITTERS)))

    async def by_hand() -> None:
        for at in range(COMMITS_EACH):
            await bare.commit(rows, at + time.monotonic_ns())

    rates: dict[str, list[float]] = {"floor": [], "store": []}
    for _ in range(GROUP_ROUNDS):
        for name, call in (("floor", by_hand), ("store", by_store)):
            rates[name].append(COMMITTERS * COMMITS_EACH / await _timed(call))
    await store.close()
    return {name: statistics.median(found) for name, found in rates.items()}


async def measure_read(server: CephServer) -> dict[str, float]:
    """Read 10,000 rows by a process that has read nothing before."""
    url = server.store("read", "deadline_seconds=30")
    backend, bare = S3Backend(url), Bare(server.port, "bare/read.json")
    await backend.open()
    rows = {make_key(number): encode(make_key(number), make_signal(number)) for number in range(ROWS)}
    keys = list(rows)
    for at in range(0, ROWS, ROWS_PER_COMMIT):
        some = {key: rows[key] for key in keys[at : at + ROWS_PER_COMMIT]}
        await backend.commit("main", dict(some), {}, op=Op("bench", at + 1))
    await backend.close()
    await bare.commit(rows, 1)
    times: dict[str, list[float]] = {"floor": [], "backend": []}
    for _ in range(READ_ROUNDS):
        hand = Bare(server.port, "bare/read.json")
        await obstore.list_with_delimiter_async(hand.store, "nothing")  # connected, as an opened backend is
        times["floor"].append(await _timed(hand.read))
        fresh = S3Backend(url)
        await fresh.open(read_only=True)
        times["backend"].append(await _timed(partial(fresh.read, "main", keys)))
        await fresh.close()
    return {name: statistics.median(found) for name, found in times.items()}


async def _timed(call: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await call()
    return time.perf_counter() - began


async def _all(server: CephServer) -> list[dict[str, float]]:
    found = [await part(server) for part in (measure_sequence, measure_group, measure_read)]
    await asyncio.sleep(0.2)  # obstore's own threads let go of their last results: see backends/s3/service.py
    return found


def measure() -> list[dict[str, Any]]:
    """Measure everything on a Ceph of its own, whose data lie on the repository's own disk."""
    (ROOT / "build").mkdir(exist_ok=True)
    credentials()
    os.environ.pop("AWS_ENDPOINT_URL", None)
    place = Path(tempfile.mkdtemp(prefix="bench-s3-", dir=ROOT / "build"))
    server = CephServer(place)
    try:
        one, group, reading = asyncio.run(_all(server))
    finally:
        server.stop()
        shutil.rmtree(place)
    ms = 1000.0
    return [
        line("commit, one after another (store)", one["floor"] * ms, one["store"] * ms,
              one["store"] / one["floor"], 1.3, most=True, unit="ms"),
        line("commit, one after another (backend)", one["floor"] * ms, one["backend"] * ms,
              one["backend"] / one["floor"], 1.3, most=True, unit="ms"),
        line(f"commits of {COMMITTERS} at once (store)", group["floor"], group["store"],
              group["store"] / group["floor"], None, most=False, unit="/s"),
        line(f"read {ROWS:,} rows (backend)", reading["floor"] * ms, reading["backend"] * ms,
              reading["backend"] / reading["floor"], 1.5, most=True, unit="ms"),
    ]  # fmt: skip


def main() -> int:
    """Print the table; exit code 1 when a target is missed."""
    lines = measure()
    if "--json" in sys.argv[1:]:
        print(json.dumps({"s3": lines}))
    else:
        print(f"{'s3 (Ceph)':42} {'floor':>12} {'ours':>12} {'ratio':>7}  target")
        for line in lines:
            unit = line["unit"]
            target = "no target" if line["target"] is None else f"{line['direction']} {line['target']}"
            print(
                f"{line['name']:42} {line['floor']:>9,.2f} {unit:2} {line['ours']:>9,.2f} {unit:2} "
                f"{line['ratio']:>7.2f}  {target}{'' if line['met'] else '   MISSED'}"
            )
    return 0 if all(line["met"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
