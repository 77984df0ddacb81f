"""Opening the store that a command names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ..contract import Survives
from ..errors import InvalidInputError
from ..store import Store
from ..urls import open_backend, parse_store

DEFAULT_STORE = "./dump/data"


@asynccontextmanager
async def reading(where: str | None) -> AsyncIterator[Store]:
    """Open a store read-only: no lock is taken and nothing is changed, so it works beside a running bot.

    Raises:
        InvalidInputError: There is no store there.
    """
    where = DEFAULT_STORE if where is None else where
    if not where:
        raise InvalidInputError("the store's name is empty: name the folder that the bot writes to")
    folders = parse_store(where).folders
    if None not in folders and not any((Path(str(folder)) / ".holdfast").is_dir() for folder in folders):
        named = " or ".join(map(str, folders))
        raise InvalidInputError(f"there is no store at {named}: name the folder that the bot writes to")
    store = Store(open_backend(where), require=Survives.NOTHING)
    await store.open(read_only=True)
    try:
        yield store
    finally:
        await store.close()
