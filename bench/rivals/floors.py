"""The bare drivers: what each medium gives without a library above it."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

LANES = 64


class _Plain:
    """What all sides share."""

    def __init__(self, place: Path, row: dict[str, Any], url: str = "") -> None:
        self.place, self.url, self._row = place, url, row

    def row(self, turn: int) -> dict[str, Any]:
        """Return the row as it is written this time."""
        return self._row | {"priceOpen": self._row["priceOpen"] + turn}

    def text(self, turn: int) -> str:
        """Return the same as JSON."""
        return json.dumps(self.row(turn))

    async def open(self) -> None:
        """Open what lies there, or make it."""

    async def write(self, number: int, turn: int) -> None:
        """Write a row."""
        raise NotImplementedError

    async def group(self, lanes: int, each: int) -> None:
        """Let tasks of one event loop write at once."""

        async def lane(number: int) -> None:
            for turn in range(each):
                await self.write(number, turn)

        await asyncio.gather(*(lane(number) for number in range(lanes)))

    async def close(self) -> None:
        """Let go of everything."""


class _Blocking(_Plain):
    """A library without asyncio: called as it is in sequence, from 64 threads at once."""

    def put(self, number: int, turn: int) -> None:
        """Write a row on the calling thread."""
        raise NotImplementedError

    async def write(self, number: int, turn: int) -> None:
        """Write a row, blocking the loop as a script would."""
        self.put(number, turn)

    async def group(self, lanes: int, each: int) -> None:
        """Let one thread a lane write."""

        def lane(number: int) -> None:
            for turn in range(each):
                self.put(number, turn)

        with ThreadPoolExecutor(lanes) as pool:
            await asyncio.gather(*(asyncio.get_running_loop().run_in_executor(pool, lane, n) for n in range(lanes)))


class Append(_Blocking):
    """One log: append, fdatasync."""

    async def open(self) -> None:
        """Open the log."""
        self.place.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.place / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)

    def put(self, number: int, turn: int) -> None:
        """Append a line and flush it."""
        os.write(self._fd, f'{{"key": {number}, "row": {self.text(turn)}}}\n'.encode())
        os.fdatasync(self._fd)

    async def read_all(self, count: int) -> int:
        """Replay the log."""
        lines = (json.loads(line) for line in (self.place / "log").read_bytes().splitlines())
        return len({line["key"]: line["row"] for line in lines})

    async def close(self) -> None:
        """Close it."""
        os.close(self._fd)


class Sqlite(_Plain):
    """sqlite3 on WAL and FULL, a transaction each; many writers share one writing thread, one transaction each."""

    async def open(self) -> None:
        """Open the file."""
        self.place.mkdir(parents=True, exist_ok=True)
        self._sql = sqlite3.connect(self.place / "rows.db", isolation_level=None, check_same_thread=False)
        self._sql.execute("PRAGMA journal_mode = WAL")
        self._sql.execute("PRAGMA synchronous = FULL")
        self._sql.execute("CREATE TABLE IF NOT EXISTS rows (key INTEGER PRIMARY KEY, row TEXT NOT NULL)")
        self._thread = ThreadPoolExecutor(1)

    def _put(self, number: int, turn: int) -> None:
        self._sql.execute("INSERT OR REPLACE INTO rows VALUES (?, ?)", (number, self.text(turn)))

    async def write(self, number: int, turn: int) -> None:
        """Write a row on the calling thread."""
        self._put(number, turn)

    async def group(self, lanes: int, each: int) -> None:
        """Hand each write to the thread."""

        async def lane(number: int) -> None:
            for turn in range(each):
                await asyncio.get_running_loop().run_in_executor(self._thread, self._put, number, turn)

        await asyncio.gather(*(lane(number) for number in range(lanes)))

    async def read_all(self, count: int) -> int:
        """Select all."""
        return len({key: json.loads(row) for key, row in self._sql.execute("SELECT key, row FROM rows")})

    async def close(self) -> None:
        """Close it."""
        self._thread.shutdown()
        self._sql.close()


class RedisPy(_Plain):
    """redis-py's SET; the server flushes before it answers."""

    async def open(self) -> None:
        """Connect."""
        from redis.asyncio import BlockingConnectionPool, Redis

        self._redis = Redis(connection_pool=BlockingConnectionPool.from_url(self.url, max_connections=LANES))
        await self._redis.ping()

    async def write(self, number: int, turn: int) -> None:
        """Set a key."""
        await self._redis.set(f"floor:{number}", self.text(turn))

    async def read_all(self, count: int) -> int:
        """Find the keys and get them."""
        keys = [key async for key in self._redis.scan_iter("floor:*", count=500)]
        return len(dict(zip(keys, map(json.loads, await self._redis.mget(keys)), strict=True)))

    async def close(self) -> None:
        """Disconnect."""
        await self._redis.aclose()


class Psycopg(_Plain):
    """psycopg 3, one upsert each, over as many connections as write at once."""

    async def open(self) -> None:
        """Connect once."""
        self._idle = [await self._connect()]
        await self._idle[0].execute(
            "CREATE TABLE IF NOT EXISTS floor (key integer PRIMARY KEY, row json NOT NULL)"  # as Holdfast stores it
        )

    async def _connect(self) -> Any:
        import psycopg

        return await psycopg.AsyncConnection.connect(self.url, autocommit=True)

    async def write(self, number: int, turn: int) -> None:
        """Upsert a row over any connection that is free."""
        link = self._idle.pop()
        try:
            await link.execute(
                "INSERT INTO floor VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET row = excluded.row",
                (number, self.text(turn)),
                prepare=True,
            )
        finally:
            self._idle.append(link)

    async def group(self, lanes: int, each: int) -> None:
        """Connect as often as it needs, once, then write."""
        while len(self._idle) < lanes:
            self._idle.append(await self._connect())
        await super().group(lanes, each)

    async def read_all(self, count: int) -> int:
        """Select all."""
        found = await (await self._idle[0].execute("SELECT key, row FROM floor")).fetchall()
        return len(dict(found))

    async def close(self) -> None:
        """Disconnect."""
        for link in self._idle:
            await link.close()
