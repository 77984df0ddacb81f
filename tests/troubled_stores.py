"""Real stores that can be put into trouble and out of it again, each in the way its kind knows."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from proxy import Proxy
from servers import require
from servers.mongo import sweep_sockets
from servers.postgres import PostgresServer
from servers.s3 import S3Server, credentials
from servers.shared import own_name, shared
from servers.valkey import RedisServer, valkey_binary


class Troubled(NamedTuple):
    """A store, and what brings it into trouble and out of it."""

    url: str
    begin: Callable[[], Awaitable[None]]
    end: Callable[[], Awaitable[None]]
    is_full: bool = False
    """The trouble is that there is no room, and the store says so."""
    refuses_exits: bool = True
    """So that they go to the journal; else it takes the first commit of all, or what makes room."""
    journal: Path | None = None
    """Where the journal is to lie; None: anywhere."""
    beside: str = ""
    """The same store, for a process that has no trouble; empty where it concerns all."""


class SmallDisk:
    """A file system of its own, which can be filled."""

    def __init__(self, where: Path) -> None:
        self.where, self._ballast = where, where / "ballast"

    def fill(self) -> None:
        """Take the last byte."""
        with self._ballast.open("ab", buffering=0) as file:
            for size in (1 << 16, 4096, 512, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    continue

    def free(self) -> None:
        """Make room again."""
        self._ballast.unlink()


@contextmanager
def small_disk(where: Path, megabytes: int, owner: str = "") -> Iterator[SmallDisk]:
    """Mount a file system in memory.

    Args:
        where: Becomes its directory.
        owner: User to whom it belongs; "" for our own.
    """
    where.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(where)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes rights that this user lacks")
    try:
        if owner and not os.getuid():
            os.chown(where, pwd.getpwnam(owner).pw_uid, pwd.getpwnam(owner).pw_gid)
        yield SmallDisk(where)
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def _soon(work: Callable[[], object]) -> Callable[[], Awaitable[None]]:
    async def done() -> None:
        await asyncio.to_thread(work)

    return done


# ---------------------------------------------------------------------- no room


@asynccontextmanager
async def sqlite_full(place: Path) -> AsyncIterator[Troubled]:
    """SQLite's own disk is full, on which the journal lies too."""
    with small_disk(place / "small", 1) as disk:
        url = f"sqlite:{disk.where / 'store.db'}"
        yield Troubled(url, _soon(disk.fill), _soon(disk.free), is_full=True, journal=disk.where)


@asynccontextmanager
async def postgres_full(place: Path) -> AsyncIterator[Troubled]:
    """The tablespace of the store's tables is full; the server itself has room, for its log among others."""
    server, name = _postgres(), own_name(place)
    where = Path(tempfile.mkdtemp(prefix="holdfast-tablespace-"))
    os.chmod(where, 0o711)  # noqa: PTH101 -- the server's user must get through
    try:
        with small_disk(where / "small", 1, "postgres") as disk:
            server.psql(f"CREATE TABLESPACE {name} LOCATION '{disk.where}'")
            try:
                url = f"{server.url}?schema={name}&options=-c%20default_tablespace%3D{name}"
                yield Troubled(url, _soon(lambda: _fill_table(server, name, disk)), _soon(disk.free), is_full=True)
            finally:
                server.psql(f"DROP SCHEMA IF EXISTS {name} CASCADE")
                server.psql(f"DROP TABLESPACE {name}")
    finally:
        shutil.rmtree(where)


def _fill_table(server: PostgresServer, name: str, disk: SmallDisk) -> None:
    disk.fill()
    # The pages that the table has already may have room for a row or two.
    with pytest.raises(RuntimeError, match="No space left"):
        server.psql(
            f"INSERT INTO {name}.rows SELECT 'filler', 'filler', 'filler', n::text, '1', 1, 'filler', 1 "
            "FROM generate_series(1, 100000) AS n"
        )


@asynccontextmanager
async def redis_out_of_memory(place: Path) -> AsyncIterator[Troubled]:
    """Redis has reached its ``maxmemory``: it takes the exit's commit all the same, and refuses the trade's row."""
    with _valkey(place) as server:

        def limit(size: str) -> Callable[[], Awaitable[None]]:
            return _soon(lambda: server.call("CONFIG", "SET", "maxmemory", size))

        yield Troubled(f"{server.url}/?prefix=t", limit("1"), limit("0"), is_full=True, refuses_exits=False)


@asynccontextmanager
async def redis_log_full(place: Path) -> AsyncIterator[Troubled]:
    """The disk of its log is full, which is synced every second: Redis says so, from the second commit on."""
    with small_disk(place / "small", 4) as disk, _valkey(disk.where / "data", appendfsync="everysec") as server:
        yield Troubled(f"{server.url}/?prefix=t", _soon(disk.fill), _soon(disk.free), True, refuses_exits=False)


@asynccontextmanager
async def redis_log_full_always(place: Path) -> AsyncIterator[Troubled]:
    """The disk of its log is full, which is synced at every commit: Redis ends, by design."""
    with small_disk(place / "small", 4) as disk, _valkey(disk.where / "data") as server:

        def end() -> None:
            disk.free()
            server.kill()
            server.restart()

        yield Troubled(f"{server.url}/?prefix=t", _soon(disk.fill), _soon(end))


# ---------------------------------------------------------------------- no answer


@asynccontextmanager
async def postgres_killed(place: Path) -> AsyncIterator[Troubled]:
    """The server is killed, and started again."""
    server = _postgres()

    async def restart() -> None:
        server.restart()  # in this thread: a child ends with the thread that started it, and other tests need it too

    yield Troubled(f"{server.url}?schema={own_name(place)}", _soon(server.kill), restart)


@asynccontextmanager
async def postgres_locked(place: Path) -> AsyncIterator[Troubled]:
    """Somebody's transaction keeps the table locked: reads are answered, each commit takes until its deadline."""
    server = _postgres()
    name = own_name(place)
    holder: list[subprocess.Popen[bytes]] = []

    def begin() -> None:
        words = [*server.psql_words(), "-c", f"BEGIN; LOCK TABLE {name}.rows IN EXCLUSIVE MODE; SELECT pg_sleep(600)"]
        holder.append(subprocess.Popen(words, env=server.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        server.wait_until(
            f"SELECT count(*) FROM pg_locks WHERE relation = '{name}.rows'::regclass AND mode = 'ExclusiveLock' "
            "AND granted", "1",
        )  # fmt: skip

    def end() -> None:
        server.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)' "
                    "AND pid <> pg_backend_pid()")  # fmt: skip
        for one in holder:
            one.communicate()

    yield Troubled(f"{server.url}?schema={name}&deadline_seconds=0.6", _soon(begin), _soon(end))


def _hole(proxy: Proxy, beside: str) -> Troubled:
    async def begin() -> None:
        proxy.silent = True

    async def end() -> None:
        proxy.silent = False

    url = beside.replace(f":{proxy.server_port}", f":{proxy.port}")
    return Troubled(url, begin, end, beside=beside)


@asynccontextmanager
async def postgres_hole(place: Path) -> AsyncIterator[Troubled]:
    """Nothing passes between the bot and the server any more, in either direction."""
    server = _postgres()
    async with Proxy(server.port) as proxy:
        beside = f"{server.url}?schema={own_name(place)}&deadline_seconds=5"
        yield _hole(proxy, beside)


@asynccontextmanager
async def redis_hole(place: Path) -> AsyncIterator[Troubled]:
    """As :func:`postgres_hole`."""
    server = shared("valkey")
    assert isinstance(server, RedisServer)
    async with Proxy(server.port) as proxy:
        yield _hole(proxy, f"{server.url}/?prefix={own_name(place)}&deadline_seconds=5")


@asynccontextmanager
async def mongo_hole(place: Path) -> AsyncIterator[Troubled]:
    """As :func:`postgres_hole`; the server speaks MongoDB's protocol and is not MongoDB."""
    port = int(shared("mongo").url.rpartition(":")[2].partition("/")[0])
    async with Proxy(port) as proxy:
        # Direct: the driver would otherwise go round the proxy to the address that the server tells of itself.
        url = f"mongodb://127.0.0.1:{port}/bots?collection={own_name(place)}&directConnection=true"
        yield _hole(proxy, f"{url}&serverMonitoringMode=poll&deadline_seconds=5")
    sweep_sockets()


@asynccontextmanager
async def s3_hole(place: Path) -> AsyncIterator[Troubled]:
    """As :func:`postgres_hole`; the service is moto."""
    credentials()
    server = shared("moto")
    assert isinstance(server, S3Server)
    async with Proxy(server.port) as proxy:
        yield _hole(proxy, server.store(own_name(place), "deadline_seconds=8"))


HOLES = {
    "postgres": postgres_hole,
    "redis": redis_hole,
    "mongo": mongo_hole,
    "s3": s3_hole,
}

TROUBLES = {
    "sqlite full": sqlite_full,
    "postgres full": postgres_full,
    "postgres killed": postgres_killed,
    "postgres locked": postgres_locked,
    "redis out of memory": redis_out_of_memory,
    "redis log full": redis_log_full,
    "redis log full, always": redis_log_full_always,
} | {f"{name} black hole": hole for name, hole in HOLES.items()}


def _postgres() -> PostgresServer:
    server = shared("postgres")
    assert isinstance(server, PostgresServer)
    return server


@contextmanager
def _valkey(directory: Path, **settings: str) -> Iterator[RedisServer]:
    require("valkey")
    server = RedisServer(valkey_binary(), directory, settings)
    try:
        yield server
    finally:
        server.stop()
