"""Every backend, by name: a new backend is one line here. A factory takes a directory of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from servers.s3 import S3Server
from servers.shared import own_name, shared

from holdfast.backends.file import FileBackend
from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Backend
from holdfast.testing.conformance import Factory


def _memory(place: Path) -> MemoryBackend:
    return MemoryBackend()


def _file(place: Path) -> FileBackend:
    return FileBackend(place / "data")


def _redis(place: Path) -> Backend:
    from holdfast.backends.redis import RedisBackend

    return RedisBackend(f"{shared('valkey').url}/0?prefix={own_name(place)}")


def _sqlite(place: Path) -> Backend:
    from holdfast.backends.sqlite import SqliteBackend

    return SqliteBackend(place / "store.db")


def _postgres(place: Path) -> Backend:
    from holdfast.backends.postgres import PostgresBackend

    return PostgresBackend(f"{shared('postgres').url}?schema={own_name(place)}")


def _mongo(place: Path) -> Backend:
    from holdfast.backends.mongo import MongoBackend

    return MongoBackend(f"{shared('mongo').url}?collection={own_name(place)}")


def _s3(place: Path) -> Backend:
    from holdfast.backends.s3 import S3Backend

    return S3Backend(s3_url(place))


def s3_url(place: Path) -> str:
    """Return a store on moto, the quick one; what needs a durable service is in ``test_s3_ceph.py``."""
    server = shared("moto")
    assert isinstance(server, S3Server)
    return server.store(own_name(place))


BACKENDS: dict[str, Factory] = {
    "memory": _memory,
    "file": _file,
    "redis": _redis,
    "sqlite": _sqlite,
    "postgres": _postgres,
    "mongo": _mongo,
    "s3": _s3,
}

URLS: dict[str, Callable[[Path], str]] = {
    "memory": lambda place: "memory:",
    "file": lambda place: f"file:{place / 'data'}",
    "redis": lambda place: f"{shared('valkey').url}/0?prefix={own_name(place)}",
    "sqlite": lambda place: f"sqlite:{place / 'store.db'}",
    "postgres": lambda place: f"{shared('postgres').url}?schema={own_name(place)}",
    "mongo": lambda place: f"{shared('mongo').url}?collection={own_name(place)}",
    "s3": s3_url,
}
"""The same by URL, for tests whose stores are opened by processes of their own (races, kills, the command line)."""
