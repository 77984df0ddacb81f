"""A place of its own for each run of the proof kit, derived from the store that the user named, and its removal.

Invariants:

* What the user named is never written to: each run gets a directory, file, prefix or schema whose name is the user's
  and a random word.
* What is removed is what lies under that derived name, and nothing else; nothing is ever flushed.
* No text that leaves this module holds the store's URL, which may hold a password.

A kind of store is one line in :data:`_KINDS`: how its name is derived, and how it is removed.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from ..contract import Backend
from ..errors import InvalidInputError
from ..urls import WRAPPERS, StoreName, open_backend, parse_store

_REMOVAL_SECONDS = 60.0


class Place(NamedTuple):
    """One store that is ours: a run's own."""

    store: str
    """What ``--store`` is given; never to be shown."""

    def backend(self) -> Backend:
        """Return a backend of it, wrappers included, that is not open."""
        return open_backend(self.store)

    def remove(self) -> None:
        """Remove what was made there, if anything was.

        Raises:
            Exception: What the driver raises; the place is then still there, or in part.
        """

        async def each() -> None:
            async with asyncio.timeout(_REMOVAL_SECONDS):
                for url in parse_store(self.store).places:
                    await _kind(url).remove(url)

        asyncio.run(each())


def derived(store: str, word: str) -> Place:
    """Return the place beside ``store`` that ``word`` (``a-z 0-9 _``) names.

    Args:
        store: A path or URL, wrappers and several copies included; see :func:`holdfast.urls.open_backend`.

    Raises:
        InvalidInputError: It names nothing that a killed process could leave behind, or nothing at all.
    """
    name = parse_store(store)
    return Place(_written(name._replace(places=tuple(_kind(url).derive(url, word) for url in name.places))))


def retrying(store: str) -> str:
    """Return ``store`` with the wrapper that bridges an outage, if it has not got it."""
    name = parse_store(store)
    return _written(name._replace(wrappers=name.wrappers | {"retrying"}))


def file_path(store: str) -> str | None:
    """Return the directory of a store that is a bare file store; None for any other."""
    name = parse_store(store)
    return name.folders[0] if len(name.places) == 1 and not name.wrappers else None


def _written(name: StoreName) -> str:
    wrappers = "".join(f"{wrapper}+" for wrapper in WRAPPERS if wrapper in name.wrappers)
    quorum = () if name.quorum is None else (f"quorum={name.quorum}",)
    return wrappers + " ".join((*name.places, *quorum))


class _Kind(NamedTuple):
    derive: Callable[[str, str], str]
    remove: Callable[[str], Awaitable[None]]


def _kind(url: str) -> _Kind:
    scheme = url.partition(":")[0].partition("+")[0].lower() if file_path(url) is None else "file"
    if scheme not in _KINDS:
        raise InvalidInputError(
            f"a store of the kind {scheme!r} cannot be tortured: give a path, or a URL of one of {', '.join(_KINDS)}"
        )
    return _KINDS[scheme]


def _beside(url: str, word: str) -> str:
    return f"{url.rstrip('/')}-{word}"


def _option(name: str, default: str, most: int) -> Callable[[str, str], str]:
    """Return what changes one option of a URL's query, so that at most ``most`` characters remain."""

    def derive(url: str, word: str) -> str:
        base, _, query = url.partition("?")
        options = [option for option in query.split("&") if option]
        given = [unquote(option.partition("=")[2]) for option in options if option.startswith(f"{name}=")]
        kept = [option for option in options if not option.startswith(f"{name}=")]
        own = f"{(given or [default])[-1][: most - len(word) - 1]}_{word}"
        return f"{base}?{'&'.join([*kept, f'{name}={own}'])}"

    return derive


async def _remove_directory(url: str) -> None:
    path = file_path(url)
    assert path is not None
    shutil.rmtree(path, ignore_errors=True)


async def _remove_sqlite(url: str) -> None:
    path = Path(file_path(f"file:{url.partition(':')[2]}") or "")
    for ending in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + ending).unlink(missing_ok=True)


async def _remove_redis(url: str) -> None:
    from ..backends.redis.address import parse
    from ..backends.redis.link import Link, packed
    from ..backends.redis.topology import topology

    address = parse(url)
    deadline = asyncio.get_running_loop().time() + _REMOVAL_SECONDS
    for host, port in await topology(address).primaries(deadline):
        link = Link(address, host, port)
        await link.connect(deadline)
        try:
            cursor = b"0"
            while True:
                scan = packed("SCAN", cursor, "MATCH", f"{address.prefix}:*", "COUNT", 1000)
                (answer,) = await link.ask(scan, deadline=deadline)
                cursor, keys = answer
                if keys:  # one by one: in a cluster a command's keys must lie in one slot
                    await link.ask(*(packed("UNLINK", key) for key in keys), deadline=deadline)
                if cursor == b"0":
                    break
        finally:
            await link.close()


async def _remove_postgres(url: str) -> None:
    from ..backends.postgres.connections import Connections
    from ..backends.postgres.place import Place as Schema

    schema = Schema(url, 60.0)
    connections = Connections(schema.conninfo(read_only=False), schema.name, limit=1, deadline_seconds=60.0)
    try:
        await connections.use(lambda one: one.execute(f'DROP SCHEMA IF EXISTS "{schema.schema}" CASCADE'.encode()))
    finally:
        await connections.close()


async def _remove_mongo(url: str) -> None:
    from ..backends.mongo.address import parse
    from ..backends.mongo.link import Link, RefusedError

    link = Link(parse(url))
    try:
        await link.ask({"drop": link.collection}, asyncio.get_running_loop().time() + _REMOVAL_SECONDS)
    except RefusedError as refused:
        if refused.name != "NamespaceNotFound":
            raise
    finally:
        await link.close()


def _under(url: str, word: str) -> str:
    """Return an S3 URL with a prefix beside its own."""
    place, question, query = url.partition("?")
    bucket, _, prefix = place.partition("://")[2].partition("/")
    return f"s3://{bucket}/{prefix.strip('/') or 'holdfast'}_{word}{question}{query}"


async def _remove_s3(url: str) -> None:
    from ..backends.s3.address import parse
    from ..backends.s3.attest import FOLDER
    from ..backends.s3.service import Kind, Service

    service = Service(parse(url))
    deadline = asyncio.get_running_loop().time() + _REMOVAL_SECONDS
    try:
        for folder in ("", FOLDER):
            for found in await service.list(folder, deadline=deadline):
                answer = await service.delete(found.path, deadline=deadline)
                if answer.kind is not Kind.DONE:
                    raise service.mapped(answer)
    finally:
        await service.close()


_KINDS = {
    "file": _Kind(_beside, _remove_directory),
    "sqlite": _Kind(_beside, _remove_sqlite),
    "redis": _Kind(_option("prefix", "holdfast", 64), _remove_redis),
    "rediss": _Kind(_option("prefix", "holdfast", 64), _remove_redis),
    "postgresql": _Kind(_option("schema", "holdfast", 63), _remove_postgres),
    "postgres": _Kind(_option("schema", "holdfast", 63), _remove_postgres),
    "mongodb": _Kind(_option("collection", "holdfast", 100), _remove_mongo),
    "s3": _Kind(_under, _remove_s3),
}
