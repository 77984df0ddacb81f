"""Speed of the Redis store beside redis-py doing the same durable thing: ``python -m bench.redis [--json]``.

The floor sends a script that compares a version and writes a row, then waits for its fsync (``WAITAOF``), on a server
of its own in the same run: the same flush, and what it leaves out is the writers' ops, the index, typing and checksum.
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

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from holdfast.backends.redis import RedisBackend
from holdfast.contract import Key, Op
from holdfast.domains import decode, encode
from holdfast.store import Store

from .parts import line, make_key, make_signal, timed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from servers.valkey import RedisServer, valkey_binary  # noqa: E402  (it lies beside the tests)

SEQUENTIAL_ROUNDS, SEQUENTIAL_COMMITS = 1000, 1  # turn by turn: a neighbour burdens all of them alike
GROUP_ROUNDS, COMMITTERS, COMMITS_EACH = 9, 64, 12
READ_ROUNDS, ROWS, ROWS_PER_COMMIT = 9, 10_000, 100
FLOOR = """
local found = redis.call('HGET', KEYS[2], ARGV[1]) or '0'
if found ~= ARGV[2] then return redis.error_reply('CLASH') end
local number = redis.call('INCR', KEYS[3])
redis.call('SET', KEYS[1], ARGV[3])
redis.call('HSET', KEYS[2], ARGV[1], number)
return number
"""


class Bare:
    """redis-py and a script, nothing else."""

    def __init__(self, port: int) -> None:
        self.client = Redis(port=port, protocol=2, retry=Retry(NoBackoff(), 0))
        self.sha: Any = None

    async def load(self) -> None:
        """Give the server the script."""
        self.sha = await self.client.script_load(FLOOR)

    async def commit(self, rows: list[tuple[Key, bytes, int]]) -> list[int]:
        """Write rows, each by its own call of the script, in one round trip with one wait for the disk."""
        trip = self.client.pipeline(transaction=False)
        for key, payload, version in rows:
            name = str(key)
            trip.evalsha(self.sha, 3, f"bare:{{main}}:{name}", "bare:{main}:v", "bare:{main}:n", name, version, payload)
        trip.execute_command("WAITAOF", 1, 0, 5000)
        *numbers, (local, _) = await trip.execute()
        assert local == 1
        return numbers

    async def read(self, keys: list[Key]) -> dict[Key, tuple[bytes, int]]:
        """Read rows and versions as of one moment."""
        names = [str(key) for key in keys]
        trip = self.client.pipeline(transaction=True)
        trip.hmget("bare:{main}:v", names)
        trip.mget([f"bare:{{main}}:{name}" for name in names])
        versions, payloads = await trip.execute()
        return {key: (payload, int(v)) for key, payload, v in zip(keys, payloads, versions, strict=True)}


async def measure_sequence(server: RedisServer, bare: Bare) -> dict[str, float]:
    """One commit after another, each awaited."""
    store = Store(RedisBackend(f"{server.url}/?prefix=one"))
    await store.open()
    backend = RedisBackend(f"{server.url}/?prefix=onebackend")
    await backend.open()
    lane, key = store.writer("bench"), make_key(0)
    payload, versions = encode(key, make_signal(0)), {"store": 0, "backend": 0, "floor": 0}
    ops = iter(range(1, 1 << 30))

    async def by_store(at: int) -> None:
        versions["store"] = await lane.commit({key: make_signal(at)}, {key: versions["store"]})

    async def by_backend(_: int) -> None:
        op = Op("bench", next(ops))
        versions["backend"] = await backend.commit("main", {key: payload}, {key: versions["backend"]}, op=op)

    async def by_hand(_: int) -> None:
        (versions["floor"],) = await bare.commit([(key, payload, versions["floor"])])

    times: dict[str, list[float]] = {"floor": [], "store": [], "backend": []}
    for _ in range(SEQUENTIAL_ROUNDS):
        for name, call in (("floor", by_hand), ("store", by_store), ("backend", by_backend)):
            times[name] += await timed(SEQUENTIAL_COMMITS, call)
    await backend.close()
    await store.close()
    return {name: statistics.median(found) for name, found in times.items()}


async def measure_group(server: RedisServer, bare: Bare) -> dict[str, float]:
    """Many committers at once: commits a second; the floor sends as many in each round trip."""
    store = Store(RedisBackend(f"{server.url}/?prefix=many"))
    await store.open()
    lanes = [store.writer(f"lane {number}") for number in range(COMMITTERS)]
    signals = [make_signal(number) for number in range(COMMITTERS)]
    keys = [make_key(number + 1) for number in range(COMMITTERS)]
    payloads = [encode(key, signal) for key, signal in zip(keys, signals, strict=True)]
    versions = {"store": [0] * COMMITTERS, "floor": [0] * COMMITTERS}

    async def one(number: int) -> None:
        lane, key, signal, mine = lanes[number], keys[number], signals[number], versions["store"]
        for _ in range(COMMITS_EACH):
            mine[number] = await lane.commit({key: signal}, {key: mine[number]})

    async def by_store() -> None:
        await asyncio.gather(*(one(number) for number in range(COMMITTERS)))

    async def by_hand() -> None:
        for _ in range(COMMITS_EACH):
            versions["floor"] = await bare.commit(list(zip(keys, payloads, versions["floor"], strict=True)))

    rates: dict[str, list[float]] = {"floor": [], "store": []}
    for _ in range(GROUP_ROUNDS):
        for name, call in (("floor", by_hand), ("store", by_store)):
            began = time.perf_counter()
            await call()
            rates[name].append(COMMITTERS * COMMITS_EACH / (time.perf_counter() - began))
    await store.close()
    return {name: statistics.median(found) for name, found in rates.items()}


async def measure_read(server: RedisServer, bare: Bare) -> dict[str, float]:
    """Read 10,000 rows: as bytes beside bytes, and typed beside typed."""
    store = Store(RedisBackend(f"{server.url}/?prefix=read"))
    await store.open()
    backend = RedisBackend(f"{server.url}/?prefix=read")
    await backend.open()
    lane = store.writer("bench")
    keys = [make_key(1000 + number) for number in range(ROWS)]
    for at in range(0, ROWS, ROWS_PER_COMMIT):
        some = keys[at : at + ROWS_PER_COMMIT]
        await lane.commit({key: make_signal(at) for key in some})
        await bare.commit([(key, encode(key, make_signal(at)), 0) for key in some])

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


async def _all(server: RedisServer) -> list[dict[str, float]]:
    bare = Bare(server.port)
    await bare.load()
    try:
        return [await part(server, bare) for part in (measure_sequence, measure_group, measure_read)]
    finally:
        await bare.client.aclose()


def measure() -> list[dict[str, Any]]:
    """Measure everything on a server with ``appendfsync always`` whose data lie on the repository's own disk."""
    (ROOT / "build").mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="bench-redis-", dir=ROOT / "build"))
    server = RedisServer(valkey_binary(), place)
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
              group["store"] / group["floor"], 0.6, most=False, unit="/s"),
        line(f"read {ROWS:,} rows (backend)", reading["floor"] * ms, reading["backend"] * ms,
              reading["backend"] / reading["floor"], 1.5, most=True, unit="ms"),
        line(f"read {ROWS:,} rows, typed (store)", reading["typed floor"] * ms, reading["store"] * ms,
              reading["store"] / reading["typed floor"], 1.5, most=True, unit="ms"),
    ]  # fmt: skip


def main() -> int:
    """Print the table; exit code 1 when a target is missed."""
    lines = measure()
    if "--json" in sys.argv[1:]:
        print(json.dumps({"redis": lines}))
    else:
        print(f"{'redis':42} {'floor':>12} {'ours':>12} {'ratio':>7}  target")
        for line in lines:
            unit = line["unit"]
            print(
                f"{line['name']:42} {line['floor']:>9,.2f} {unit:2} {line['ours']:>9,.2f} {unit:2} "
                f"{line['ratio']:>7.2f}  {line['direction']} {line['target']}{'' if line['met'] else '   MISSED'}"
            )
    return 0 if all(line["met"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
