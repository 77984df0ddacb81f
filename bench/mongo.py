"""Speed of the MongoDB store beside pymongo doing the same durable thing: ``python -m bench.mongo [--json]``.

The floor is one ``update_one`` of one document, with a filter on its number, confirmed by a majority's journals, on a
server of its own in the same run; what it leaves out is the writers' ops, sizes, typing and checksum. The server is
SecantusDB, not MongoDB's own: only the ratios say something, and they say it of this server.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pymongo import AsyncMongoClient
from pymongo.write_concern import WriteConcern

from holdfast.backends.mongo import MongoBackend
from holdfast.contract import Key, Op
from holdfast.domains import decode, encode
from holdfast.store import Store

from .parts import line, make_key, make_signal, timed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from servers.mongo import MongoServer  # noqa: E402  (it lies beside the tests)

SEQUENTIAL_ROUNDS, SEQUENTIAL_COMMITS = 600, 1  # turn by turn: a neighbour burdens all of them alike
GROUP_ROUNDS, COMMITTERS, COMMITS_EACH = 9, 64, 8
READ_ROUNDS, ROWS, ROWS_PER_COMMIT = 7, 10_000, 1000


class Bare:
    """pymongo and one document, nothing else."""

    def __init__(self, port: int) -> None:
        self.client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient("127.0.0.1", port, retryWrites=False)
        concern = WriteConcern("majority", wtimeout=5000, j=True)
        self.rows = self.client["bare"].get_collection("rows", write_concern=concern)
        self.number = 0

    async def load(self) -> None:
        """Make the document."""
        await self.rows.insert_one({"_id": "main", "number": 0, "rows": {}})

    async def commit(self, rows: list[tuple[Key, bytes]]) -> int:
        """Write rows in one update that expects the number of the one before, as a majority's journals confirm it."""
        number = self.number + 1
        values = {f"rows.{key}": {"version": number, "row": payload.decode()} for key, payload in rows}
        done = await self.rows.update_one(
            {"_id": "main", "number": self.number}, {"$set": {**values, "number": number}}
        )
        assert done.matched_count == 1
        self.number = number
        return number

    async def read(self, keys: list[Key]) -> dict[Key, tuple[bytes, int]]:
        """Read rows and versions as of one moment."""
        found = await self.rows.find_one({"_id": "main"}, {"rows": 1})
        assert found is not None
        rows = found["rows"]
        return {key: (rows[str(key)]["row"].encode(), rows[str(key)]["version"]) for key in keys}


async def measure_sequence(server: MongoServer, bare: Bare) -> dict[str, float]:
    """One commit after another, each awaited."""
    store = Store(MongoBackend(f"{server.url}?collection=one"))
    await store.open()
    backend = MongoBackend(f"{server.url}?collection=onebackend")
    await backend.open()
    lane, key = store.writer("bench"), make_key(0)
    payload, versions = encode(key, make_signal(0)), {"store": 0, "backend": 0}
    ops = iter(range(1, 1 << 30))

    async def by_store(at: int) -> None:
        versions["store"] = await lane.commit({key: make_signal(at)}, {key: versions["store"]})

    async def by_backend(_: int) -> None:
        op = Op("bench", next(ops))
        versions["backend"] = await backend.commit("main", {key: payload}, {key: versions["backend"]}, op=op)

    async def by_hand(_: int) -> None:
        await bare.commit([(key, payload)])

    times: dict[str, list[float]] = {"floor": [], "store": [], "backend": []}
    for _ in range(SEQUENTIAL_ROUNDS):
        for name, call in (("floor", by_hand), ("store", by_store), ("backend", by_backend)):
            times[name] += await timed(SEQUENTIAL_COMMITS, call)
    await backend.close()
    await store.close()
    return {name: statistics.median(found) for name, found in times.items()}


async def measure_group(server: MongoServer, bare: Bare) -> dict[str, float]:
    """Many committers at once: commits a second; the floor writes as many in each update."""
    store = Store(MongoBackend(f"{server.url}?collection=many"))
    await store.open()
    lanes = [store.writer(f"lane {number}") for number in range(COMMITTERS)]
    signals = [make_signal(number) for number in range(COMMITTERS)]
    keys = [make_key(number + 1) for number in range(COMMITTERS)]
    payloads = [encode(key, signal) for key, signal in zip(keys, signals, strict=True)]
    versions = [0] * COMMITTERS

    async def one(number: int) -> None:
        lane, key, signal, mine = lanes[number], keys[number], signals[number], versions
        for _ in range(COMMITS_EACH):
            mine[number] = await lane.commit({key: signal}, {key: mine[number]})

    async def by_store() -> None:
        await asyncio.gather(*(one(number) for number in range(COMMITTERS)))

    async def by_hand() -> None:
        for _ in range(COMMITS_EACH):
            await bare.commit(list(zip(keys, payloads, strict=True)))

    rates: dict[str, list[float]] = {"floor": [], "store": []}
    for _ in range(GROUP_ROUNDS):
        for name, call in (("floor", by_hand), ("store", by_store)):
            began = time.perf_counter()
            await call()
            rates[name].append(COMMITTERS * COMMITS_EACH / (time.perf_counter() - began))
    await store.close()
    return {name: statistics.median(found) for name, found in rates.items()}


async def measure_read(server: MongoServer, bare: Bare) -> dict[str, float]:
    """Read 10,000 rows: as bytes beside bytes, and typed beside typed."""
    store = Store(MongoBackend(f"{server.url}?collection=read"))
    await store.open()
    backend = MongoBackend(f"{server.url}?collection=read")
    await backend.open()
    lane = store.writer("bench")
    keys = [make_key(1000 + number) for number in range(ROWS)]
    for at in range(0, ROWS, ROWS_PER_COMMIT):
        some = keys[at : at + ROWS_PER_COMMIT]
        await lane.commit({key: make_signal(at) for key in some})
        await bare.commit([(key, encode(key, make_signal(at))) for key in some])

    async def by_hand_typed(_: int) -> None:
        found = await bare.read(keys)
        assert len({key: decode(key, payload) for key, (payload, _) in found.items()}) == ROWS

    calls: dict[str, Callable[[int], Awaitable[object]]] = {
        "floor": lambda _: bare.read(keys),
        "backend": lambda _: backend.read("main", keys),
        "typed floor": by_hand_typed,
        "store": lambda _: store.load(*keys),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(READ_ROUNDS):
        for name, call in calls.items():
            times[name] += await timed(1, call)
    await backend.close()
    await store.close()
    return {name: statistics.median(found) for name, found in times.items()}


async def _all(server: MongoServer) -> list[dict[str, float]]:
    bare = Bare(server.port)
    await bare.load()
    try:
        return [await part(server, bare) for part in (measure_sequence, measure_group, measure_read)]
    finally:
        await bare.client.close()


def measure() -> list[dict[str, Any]]:
    """Measure everything on a server whose data lie on the repository's own disk."""
    (ROOT / "build").mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="bench-mongo-", dir=ROOT / "build"))
    server = MongoServer("secantus", place)
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
        line(f"read {ROWS:,} rows, typed (store)", reading["typed floor"] * ms, reading["store"] * ms,
              reading["store"] / reading["typed floor"], 1.5, most=True, unit="ms"),
    ]  # fmt: skip


def main() -> int:
    """Print the table; exit code 1 when a target is missed."""
    lines = measure()
    if "--json" in sys.argv[1:]:
        print(json.dumps({"mongo": lines}))
    else:
        print(f"{'mongo':42} {'floor':>12} {'ours':>12} {'ratio':>7}  target")
        for line in lines:
            unit = line["unit"]
            aim = "" if line["target"] is None else f"{line['direction']} {line['target']}"
            print(
                f"{line['name']:42} {line['floor']:>9,.2f} {unit:2} {line['ours']:>9,.2f} {unit:2} "
                f"{line['ratio']:>7.2f}  {aim}{'' if line['met'] else '   MISSED'}"
            )
    return 0 if all(line["met"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
