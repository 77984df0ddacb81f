"""SQLite and PostgreSQL beside their bare drivers doing the same durable thing: ``python -m bench.sql [--json]``.

Each figure is a ratio of two medians taken in turn in one run, so that the machine's moods cancel out. The bare
driver upserts the same 600-byte row, in SQLite on WAL + FULL, in PostgreSQL with its defaults.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psycopg

from holdfast.backends.postgres import PostgresBackend
from holdfast.backends.sqlite import SqliteBackend
from holdfast.contract import Backend, Key, Op

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from servers import kind

ROW = json.dumps({"id": "BTCUSDT", "note": "x" * 560, "priceOpen": 42_000.5}).encode()
SINGLE = 60
TASKS = 64
ROUNDS = 6
ROWS = 10_000
TURNS = 15
_ON_CONFLICT = "ON CONFLICT (domain, entity_name, entity_id) DO UPDATE SET row = excluded.row, v = excluded.v"
_UPSERT_SQLITE = f"INSERT INTO bare VALUES (?, ?, ?, ?, ?) {_ON_CONFLICT}"
_UPSERT = f"INSERT INTO bare VALUES ($1, $2, $3, $4, $5) {_ON_CONFLICT}"
_TABLE = (
    "CREATE TABLE bare (domain text, entity_name text, entity_id text, row {} NOT NULL, v bigint NOT NULL, "
    "PRIMARY KEY (domain, entity_name, entity_id))"
)


def _key(number: int) -> Key:
    return Key("signal", f"SYM{number}_strategy_exchange", f"SYM{number}")


_Row = tuple[str, str, str, str, int]


class Side:
    """One backend under test, its writers and versions."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._n = 0
        self._versions: dict[Key, int] = {}

    async def one(self, number: int = 0) -> None:
        """Commit one row with its version expected, as the engine does."""
        key = _key(number)
        self._n += 1
        self._versions[key] = await self.backend.commit(
            "bench", {key: ROW}, {key: self._versions.get(key, 0)}, op=Op(f"writer-{number}", self._n)
        )

    async def single(self) -> float:
        """Return the median seconds of a commit."""
        times = []
        for _ in range(SINGLE):
            begun = time.perf_counter()
            await self.one()
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    async def many(self) -> float:
        """Return commits a second, with 64 tasks that each commit their own row again and again."""

        async def again(number: int) -> None:
            for _ in range(ROUNDS):
                await self.one(number)

        begun = time.perf_counter()
        await asyncio.gather(*(again(number) for number in range(TASKS)))
        return TASKS * ROUNDS / (time.perf_counter() - begun)

    async def fill(self) -> None:
        """Store 10,000 rows."""
        for start in range(0, ROWS, 500):
            changes = {_key(number): ROW for number in range(1000 + start, 1500 + start)}
            await self.backend.commit("read", dict(changes), {}, op=Op("fill", start + 1))

    async def read(self) -> float:
        """Return the seconds that reading them takes."""
        keys = [_key(number) for number in range(1000, 1000 + ROWS)]
        begun = time.perf_counter()
        found = await self.backend.read("read", keys)
        took = time.perf_counter() - begun
        assert len(found) == ROWS
        return took


async def _in_turn(
    ours: Callable[[], Awaitable[float]], bare: Callable[[], Awaitable[float]]
) -> tuple[float, float, float]:
    """Return both medians, and the median of the ratios of neighbours in time: disks have moods."""
    await ours(), await bare()  # to warm up
    pairs = [(await ours(), await bare()) for _ in range(TURNS)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        round(statistics.median(a / b for a, b in pairs), 2),
    )


async def _figures(name: str, side: Side, bare: Any) -> dict[str, Any]:
    single, single_bare, single_ratio = await _in_turn(side.single, bare.single)
    many, many_bare, many_ratio = await _in_turn(side.many, bare.many)
    await side.fill()
    await bare.fill()
    read, read_bare, read_ratio = await _in_turn(side.read, bare.read)
    return {
        "backend": name,
        "commit_us": round(single * 1e6),
        "bare_commit_us": round(single_bare * 1e6),
        "commit_ratio": single_ratio,
        "grouped_per_second": round(many),
        "bare_grouped_per_second": round(many_bare),
        "grouped_ratio": many_ratio,
        "read_ms": round(read * 1e3, 1),
        "bare_read_ms": round(read_bare * 1e3, 1),
        "read_ratio": read_ratio,
    }


async def _grouped(write: Callable[[list[_Row]], Awaitable[None]]) -> float:
    """Return upserts a second of 64 tasks that each wait for the transaction that they share."""
    waiting: list[tuple[_Row, asyncio.Future[None]]] = []

    async def flush() -> None:
        group = waiting.copy()
        waiting.clear()
        await write([row for row, _ in group])
        for _, future in group:
            future.set_result(None)

    async def again(number: int) -> None:
        for turn in range(ROUNDS):
            future = asyncio.get_running_loop().create_future()
            waiting.append(((*_key(number), ROW.decode(), turn), future))
            if len(waiting) == TASKS:
                await flush()
            await future

    begun = time.perf_counter()
    await asyncio.gather(*(again(number) for number in range(TASKS)))
    return TASKS * ROUNDS / (time.perf_counter() - begun)


class BareSqlite:
    """The driver alone: single commits on the calling thread, groups on another one, as 64 tasks need it."""

    def __init__(self, path: Path) -> None:
        self._sql = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._sql.execute("PRAGMA journal_mode = WAL")
        self._sql.execute("PRAGMA synchronous = FULL")
        self._sql.execute(_TABLE.format("text"))

    async def single(self) -> float:
        """Return the median seconds of a transaction of one upsert."""
        times = []
        for number in range(SINGLE):
            begun = time.perf_counter()
            self._sql.execute("BEGIN IMMEDIATE")
            self._sql.execute(_UPSERT_SQLITE, (*_key(0), ROW.decode(), number))
            self._sql.execute("COMMIT")
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    async def many(self) -> float:
        """Return upserts a second, 64 in each transaction."""
        return await _grouped(lambda rows: asyncio.get_running_loop().run_in_executor(None, self._write, rows))

    def _write(self, rows: list[_Row]) -> None:
        self._sql.execute("BEGIN IMMEDIATE")
        for row in rows:
            self._sql.execute(_UPSERT_SQLITE, row)
        self._sql.execute("COMMIT")

    async def fill(self) -> None:
        """Store 10,000 rows."""
        self._sql.execute("DELETE FROM bare")
        self._sql.execute("BEGIN")
        rows = [(*_key(number), ROW.decode(), 1) for number in range(1000, 1000 + ROWS)]
        self._sql.executemany(_UPSERT_SQLITE, rows)
        self._sql.execute("COMMIT")

    async def read(self) -> float:
        """Return the seconds that it takes to have them all in a dict by key."""
        begun = time.perf_counter()
        lines = self._sql.execute("SELECT domain, entity_name, entity_id, row, v FROM bare")
        found = {(domain, name, id): (row, v) for domain, name, id, row, v in lines}
        took = time.perf_counter() - begun
        assert len(found) == ROWS
        return took

    def close(self) -> None:
        """Close it."""
        self._sql.close()


class BarePostgres:
    """psycopg alone; a group is one transaction, its upserts sent together (pipeline mode)."""

    def __init__(self, sql: psycopg.AsyncConnection[Any]) -> None:
        self._sql = sql

    @classmethod
    async def connect(cls, url: str) -> BarePostgres:
        """Connect and make the table."""
        sql = await psycopg.AsyncConnection.connect(url, autocommit=True, cursor_factory=psycopg.AsyncRawCursor)
        await sql.execute(_TABLE.format("json"))
        return cls(sql)

    async def single(self) -> float:
        """Return the median seconds of one upsert, committed by itself."""
        times = []
        for number in range(SINGLE):
            begun = time.perf_counter()
            await self._sql.execute(_UPSERT, (*_key(0), ROW.decode(), number), prepare=True)
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    async def many(self) -> float:
        """Return upserts a second, 64 in each transaction."""
        return await _grouped(self._write)

    async def _write(self, rows: list[_Row]) -> None:
        async with self._sql.pipeline(), self._sql.transaction():
            for row in rows:
                await self._sql.execute(_UPSERT, row, prepare=True)

    async def fill(self) -> None:
        """Store 10,000 rows."""
        await self._sql.execute("DELETE FROM bare")
        async with self._sql.pipeline(), self._sql.transaction():
            for number in range(1000, 1000 + ROWS):
                await self._sql.execute(_UPSERT, (*_key(number), ROW.decode(), 1), prepare=True)

    async def read(self) -> float:
        """Return the seconds that it takes to have them all in a dict by key."""
        begun = time.perf_counter()
        statement = "SELECT domain, entity_name, entity_id, row::text, v FROM bare"
        lines = await (await self._sql.execute(statement, prepare=True)).fetchall()
        found = {(domain, name, id): (row, v) for domain, name, id, row, v in lines}
        took = time.perf_counter() - begun
        assert len(found) == ROWS
        return took

    async def close(self) -> None:
        """Close it."""
        await self._sql.close()


async def _sqlite(place: Path) -> dict[str, Any]:
    backend = SqliteBackend(place / "ours.db")
    await backend.open()
    bare = BareSqlite(place / "bare.db")
    try:
        return await _figures("sqlite", Side(backend), bare)
    finally:
        bare.close()
        await backend.close()


async def _postgres(url: str) -> dict[str, Any]:
    backend = PostgresBackend(f"{url}?schema=bench_ours")
    await backend.open()
    bare = await BarePostgres.connect(url)
    try:
        return await _figures("postgres", Side(backend), bare)
    finally:
        await bare.close()
        await backend.close()


def main() -> int:
    """Print the figures; the limits are those of the issue."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as place:
        server = kind("postgres").start(Path(place) / "server")
        try:
            for figures in (asyncio.run(_sqlite(Path(place))), asyncio.run(_postgres(server.url))):
                ok = figures["commit_ratio"] <= 1.3 and figures["grouped_ratio"] >= 0.6 and figures["read_ratio"] <= 1.5
                failed = failed or not ok
                _show(figures, as_json=arguments.json)
        finally:
            server.stop()
    return int(failed)


def _show(figures: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures))
        return
    print(
        f"{figures['backend']}\n"
        f"  one row, committed   {figures['commit_us']} µs, bare {figures['bare_commit_us']} µs: "
        f"{figures['commit_ratio']}x (at most 1.3)\n"
        f"  64 at once           {figures['grouped_per_second']}/s, bare {figures['bare_grouped_per_second']}/s: "
        f"{figures['grouped_ratio']}x (at least 0.6)\n"
        f"  10,000 rows read     {figures['read_ms']} ms, bare {figures['bare_read_ms']} ms: "
        f"{figures['read_ratio']}x (at most 1.5)"
    )


if __name__ == "__main__":
    sys.exit(main())
