"""Speed of the file store beside the barest code that is as durable: ``python -m bench.storage [--json]``.

Floor and store take turns on the same disk in one run, and medians are compared, so that a slow moment of the disk
burdens both; for opening, which is work of the processor, the best round of each, as other programs only ever slow
it down. What a floor leaves out: keys, versions, ``expect``, recovery.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from holdfast.backends.file import FileBackend
from holdfast.contract import Key, Op
from holdfast.domains import decode, encode
from holdfast.rows import Signal
from holdfast.store import Store
from holdfast.writer import Writer

from .parts import line, make_key, make_signal, timed

BUILD = Path(__file__).resolve().parent.parent / "build"
SEQUENTIAL_ROUNDS, SEQUENTIAL_COMMITS = 80, 15
GROUP_ROUNDS, COMMITTERS, COMMITS_EACH = 25, 64, 12
OPEN_ROUNDS, ROWS, ROWS_PER_COMMIT = 15, 10_000, 100


class BareLog:
    """Appends bytes to a file, one write and one fdatasync for all that wait: no more than durability needs.

    Args:
        path: The file.
        at_once: Wake all waiters by one call into the event loop, as the store does; else each by its own.
    """

    def __init__(self, path: Path, *, at_once: bool = False) -> None:
        self._at_once = at_once
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._queue: queue.SimpleQueue[tuple[bytes, asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    async def append(self, data: bytes) -> None:
        """Return when ``data`` is durable."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._queue.put((data, future))
        await future

    def close(self) -> None:
        """End the thread."""
        self._queue.put(None)
        self._thread.join()
        os.close(self._fd)

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            group = [first]
            while not self._queue.empty():
                more = self._queue.get()
                if more is None:
                    self._queue.put(None)
                    break
                group.append(more)
            os.write(self._fd, b"".join([data for data, _ in group]))
            os.fdatasync(self._fd)
            if self._at_once:
                self._loop.call_soon_threadsafe(_settle, [future for _, future in group])
            else:
                for _, future in group:
                    self._loop.call_soon_threadsafe(future.set_result, None)


def _settle(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        future.set_result(None)


def small_signal(number: int) -> Signal:
    """Return an open signal with a short note."""
    return make_signal(number, note="breakout")


async def measure_sequence(place: Path) -> dict[str, float]:
    """One commit after another, each awaited: the store, the backend under it, and the bare append."""
    store = Store(FileBackend(place / "store"))
    await store.open()
    backend = FileBackend(place / "backend")
    await backend.open()
    bare = BareLog(place / "bare.log")
    lane, key, signal = store.writer("bench"), make_key(0), small_signal(0)
    payload, versions, ops = encode(key, signal), {"store": 0, "backend": 0}, iter(range(1, 1 << 30))

    async def by_store(at: int) -> None:
        versions["store"] = await lane.commit({key: small_signal(at)}, {key: versions["store"]})

    async def by_backend(_: int) -> None:
        op = Op("bench", next(ops))
        versions["backend"] = await backend.commit("main", {key: payload}, {key: versions["backend"]}, op=op)

    async def by_hand(_: int) -> None:
        await bare.append(payload)

    times: dict[str, list[float]] = {"floor": [], "store": [], "backend": []}
    for _ in range(SEQUENTIAL_ROUNDS):
        for name, call in (("floor", by_hand), ("store", by_store), ("backend", by_backend)):
            times[name] += await timed(SEQUENTIAL_COMMITS, call)
    bare.close()
    await backend.close()
    await store.close()
    return {name: statistics.median(found) for name, found in times.items()}


async def measure_group(place: Path) -> dict[str, float]:
    """Many committers at once, each awaiting its own: commits a second.

    A committer of the floor does what none can do without: it encodes its row, makes a future and hands both over.
    """
    store = Store(FileBackend(place / "store"))
    await store.open()
    bare, lean = BareLog(place / "bare.log"), BareLog(place / "lean.log", at_once=True)
    plain = msgspec.json.Encoder().encode
    lanes = [store.writer(f"lane {number}") for number in range(COMMITTERS)]
    signals = [small_signal(number) for number in range(COMMITTERS)]
    versions = [0] * COMMITTERS

    async def by_store(number: int) -> None:
        lane, key, signal = lanes[number], make_key(number), signals[number]
        for _ in range(COMMITS_EACH):
            versions[number] = await lane.commit({key: signal}, {key: versions[number]})

    async def by_hand(number: int) -> None:
        signal = signals[number]
        for _ in range(COMMITS_EACH):
            await bare.append(plain(signal))

    async def by_lean_hand(number: int) -> None:
        signal = signals[number]
        for _ in range(COMMITS_EACH):
            await lean.append(plain(signal))

    async def one_by_one(count: int) -> None:
        for _ in range(count):
            await bare.append(plain(signals[0]))

    rates: dict[str, list[float]] = {"floor": [], "lean": [], "store": [], "alone": []}
    for _ in range(GROUP_ROUNDS):
        for name, call in (("floor", by_hand), ("store", by_store), ("lean", by_lean_hand)):
            began = time.perf_counter()
            await asyncio.gather(*(call(number) for number in range(COMMITTERS)))
            rates[name].append(COMMITTERS * COMMITS_EACH / (time.perf_counter() - began))
        began = time.perf_counter()
        await one_by_one(64)
        rates["alone"].append(64 / (time.perf_counter() - began))
    bare.close()
    lean.close()
    await store.close()
    return {name: statistics.median(found) for name, found in rates.items()}


async def _fill(lane: Writer) -> dict[Key, Signal]:
    rows = {make_key(number): small_signal(number) for number in range(ROWS)}
    keys = list(rows)
    for at in range(0, ROWS, ROWS_PER_COMMIT):
        await lane.commit({key: rows[key] for key in keys[at : at + ROWS_PER_COMMIT]})
    return rows


async def measure_open(place: Path) -> dict[str, float]:
    """Open a directory and read every row, typed; beside reading the same file and decoding the same payloads."""
    store = Store(FileBackend(place / "store"))
    await store.open()
    rows = await _fill(store.writer("bench"))
    await store.close()
    log = place / "store" / ".holdfast" / "commit.log"
    data, spans, at = log.read_bytes(), [], 0
    for key, row in rows.items():
        payload = encode(key, row)
        at = data.index(payload, at)
        spans.append((at, at + len(payload)))
        at += len(payload)
    # The stored rows have two members more than the type, which forbids others: a twin that lets them be.
    fields = [
        (field.name, field.type) if field.required else (field.name, field.type, field.default)
        for field in msgspec.structs.fields(Signal)
    ]
    twin = msgspec.defstruct("Twin", fields, rename="camel", kw_only=True, frozen=True)
    decoder = msgspec.json.Decoder(twin)
    times: dict[str, list[float]] = {"floor": [], "unchecked": [], "store": []}
    for _ in range(OPEN_ROUNDS):
        began = time.perf_counter()
        data = log.read_bytes()
        bare = [decoder.decode(data[start:end]) for start, end in spans]
        times["unchecked"].append(time.perf_counter() - began)
        began = time.perf_counter()
        data = log.read_bytes()
        checked = {key: decode(key, data[start:end]) for key, (start, end) in zip(rows, spans, strict=True)}
        times["floor"].append(time.perf_counter() - began)
        began = time.perf_counter()
        store = Store(FileBackend(place / "store"))
        await store.open()
        found = await store.scan("signal")
        times["store"].append(time.perf_counter() - began)
        await store.close()
        assert len(found) == len(bare) == len(checked) == ROWS
    return {name: min(values) for name, values in times.items()}


def measure() -> list[dict[str, Any]]:
    """Measure everything in a temporary directory on the repository's own disk."""
    BUILD.mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="bench-", dir=BUILD))
    try:
        found = []
        for name, part in (("one", measure_sequence), ("group", measure_group), ("open", measure_open)):
            (place / name).mkdir()
            found.append(asyncio.run(part(place / name)))
    finally:
        shutil.rmtree(place)
    one, group, opening = found
    ms = 1000.0
    return [
        line("commit, one after another (store)", one["floor"] * ms, one["store"] * ms,
              one["store"] / one["floor"], 1.3, most=True, unit="ms"),
        line("commit, one after another (backend)", one["floor"] * ms, one["backend"] * ms,
              one["backend"] / one["floor"], 1.3, most=True, unit="ms"),
        line(f"commits of {COMMITTERS} at once (store)", group["floor"], group["store"],
              group["store"] / group["floor"], 0.6, most=False, unit="/s"),
        line("  beside one wake-up for a whole group", group["lean"], group["store"],
              group["store"] / group["lean"], None, most=False, unit="/s"),
        line("  beside bare commits one at a time", group["alone"], group["store"],
              group["store"] / group["alone"], None, most=False, unit="/s"),
        line(f"open and read {ROWS:,} rows", opening["floor"] * ms, opening["store"] * ms,
              opening["store"] / opening["floor"], 2.0, most=True, unit="ms"),
        line("  beside decoding without checksums", opening["unchecked"] * ms, opening["store"] * ms,
              opening["store"] / opening["unchecked"], None, most=True, unit="ms"),
    ]  # fmt: skip


def main() -> int:
    """Print the table; exit code 1 when a target is missed."""
    lines = measure()
    if "--json" in sys.argv[1:]:
        print(json.dumps({"storage": lines}))
    else:
        print(f"{'storage':42} {'floor':>12} {'ours':>12} {'ratio':>7}  target")
        for line in lines:
            unit = line["unit"]
            target = "" if line["target"] is None else f"{line['direction']} {line['target']}"
            print(
                f"{line['name']:42} {line['floor']:>9,.2f} {unit:2} {line['ours']:>9,.2f} {unit:2} "
                f"{line['ratio']:>7.2f}  {target}{'' if line['met'] else '   MISSED'}"
            )
    return 0 if all(line["met"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
