"""Opening the store that a command names."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from ..contract import Backend, KeyPrefix, Survives
from ..engine.worker import Life, Watch, describe
from ..errors import HeldError, InvalidInputError
from ..store import Store
from ..urls import open_backend, parse_store

DEFAULT_STORE = "./dump/data"


def add_route_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--route`` to a command that opens a store."""
    parser.add_argument(
        "--route",
        action="append",
        default=[],
        metavar="DOMAIN=STORE",
        help="keep this domain (signal, schedule, risk, partial, ledger) in another store; repeatable",
    )


def routes_of(given: Sequence[str]) -> dict[str, Backend]:
    """Return the backend of each domain that ``--route`` names, not open yet.

    Raises:
        InvalidInputError: One cannot be read, or a domain is named twice.
    """
    routes: dict[str, Backend] = {}
    opened: dict[str, Backend] = {}  # two domains in one store share its connection, and its lock
    for text in given:
        domain, equals, where = text.partition("=")
        if not (domain and equals and where):
            raise InvalidInputError(f"--route {domain!r:.60}: write DOMAIN=STORE, such as partial=sqlite:levels.db")
        if domain in routes:
            raise InvalidInputError(f"--route names the domain {domain!r:.60} twice: once is enough")
        routes[domain] = opened[where] = opened.get(where) or open_backend(where)
    return routes


def require_store(where: str) -> None:
    """Refuse a folder in which there is no store, so that looking at it makes none.

    Raises:
        InvalidInputError: There is none there.
    """
    folders = parse_store(where).folders
    if None not in folders and not any((Path(str(folder)) / ".holdfast").is_dir() for folder in folders):
        named = " or ".join(map(str, folders))
        raise InvalidInputError(f"there is no store at {named}: name the folder that the bot writes to")


async def require_no_bot(backend: Backend) -> None:
    """Refuse while a process gives signs of life on a store that several may share; takes up to a lease to tell.

    Raises:
        HeldError: Names the process.
    """
    suffix = ".beats"
    for scope in [scope async for scope in backend.scopes() if scope.endswith(suffix)]:
        view = Store(backend, scope=scope.removesuffix(suffix))
        view.read_only = True
        holders = [key.entity_name for key in await view.keys(KeyPrefix("worker"))]
        watch = Watch(view)
        while holders:
            seen = await watch.look(*holders)
            for life, row in seen.values():
                if row is not None and life is Life.ALIVE:
                    raise HeldError(f"{describe(row)} works on this store: end it first")
            holders = [holder for holder, (life, _) in seen.items() if life is Life.UNKNOWN]
            if holders:
                leases = [row.lease_seconds for _, row in seen.values() if row is not None]
                await asyncio.sleep(min(min(leases) / 20, 1.0))


@asynccontextmanager
async def reading(where: str | None, routes: Sequence[str] = ()) -> AsyncIterator[Store]:
    """Open a store read-only: no lock is taken and nothing is changed, so it works beside a running bot.

    Raises:
        InvalidInputError: There is no store there.
    """
    where = DEFAULT_STORE if where is None else where
    if not where:
        raise InvalidInputError("the store's name is empty: name the folder that the bot writes to")
    require_store(where)
    store = Store(open_backend(where), routes=routes_of(routes), require=Survives.NOTHING)
    await store.open(read_only=True)
    try:
        yield store
    finally:
        await store.close()
