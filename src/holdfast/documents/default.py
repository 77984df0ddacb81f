"""The process's default store, and which user's classes hold its domains.

Invariants:

* ``./dump/data`` is resolved once, at its first use.
* A registration is seen by the next storage call, also of a store that is open already; what the class before had made
  is closed before the next call of an adapter does anything.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ..contract import Backend
from ..errors import InvalidInputError
from ..store import Store
from .custom import CustomBackend
from .shapes import DOCUMENT_DOMAINS
from .shared import SharedStore, close_shared_stores, store_at, store_of

DIRECTORY = "./dump/data"

_location: Path | None = None
_chosen: SharedStore | None = None
_routes: dict[str, CustomBackend] = {}
_retired: list[CustomBackend] = []


def location() -> Path:
    """Return the default store's directory, resolved at the first call."""
    global _location
    if _location is None:
        _location = Path(DIRECTORY).resolve()
    return _location


def is_default(path: Path) -> bool:
    """Whether ``path`` is the default store's directory, or the documents' ``./dump/data`` that stands for it."""
    return os.path.normpath(path) == os.path.normpath(DIRECTORY) or path.resolve() == location()


def base_dir(domain: str) -> str:
    """Return what a class for ``domain`` is given as its second argument, as in the documents."""
    named = _location is not None and _location != Path(DIRECTORY).resolve()
    return f"{_location if named else DIRECTORY}/{domain}/"


def use_store(store: Store | str | Path | None) -> None:
    """Change the process's default store: a store, a directory, a URL; None for ``./dump/data`` again.

    A store that is passed in is opened if need be, and not closed here. It keeps its own routes until a class is
    registered.
    """
    global _chosen, _location
    if _chosen is not None:
        _chosen.forget()
    _chosen = None
    if isinstance(store, Store):
        _chosen = SharedStore("the store passed to use_store()", lambda: store, own=False)
    elif isinstance(store, Path) or (isinstance(store, str) and store and "\0" not in store):
        if isinstance(store, Path) or _is_path(store):
            _location = Path(store).resolve()
        else:
            _chosen = store_of(store)
    elif store is None:
        _location = None
    else:
        raise InvalidInputError(f"use_store() takes a Store, a path, a URL or None, not {store!r:.80}")


def _is_path(name: str) -> bool:
    from ..urls import parse_store

    parsed = parse_store(name)
    return not parsed.wrappers and parsed.places == (name,) and ":" not in name


def shared() -> SharedStore:
    """Return the holder of the default store."""
    found = _chosen if _chosen is not None else store_at(location())
    found.routes = current_routes
    return found


async def ready() -> SharedStore:
    """Return the holder of the default store, after everything that was replaced has been closed."""
    while _retired:
        await _retired.pop().close()
    found = shared()
    await found.close_if_stale()
    return found


async def default_store() -> Store:
    """Return the process's default store, open, with the registered classes in their places."""
    return await (await ready()).store()


@asynccontextmanager
async def lent_store() -> AsyncIterator[Store]:
    """Lend the default store to a run: until the block ends, ``clear()`` does not close it."""
    holder = await ready()
    store = await holder.store()
    holder.lent += 1
    try:
        yield store
    finally:
        holder.lent -= 1


def current_routes() -> dict[str, Backend]:
    """Return the backend of each domain for which a user's class is registered."""
    return dict(_routes)


def registered(domain: str) -> CustomBackend | None:
    """Return the backend of the user's class that holds ``domain``, or None."""
    return _routes.get(domain)


def register(domain: str, cls: Callable[[str, str], Any] | None) -> None:
    """Have ``cls`` hold ``domain`` from now on (None: the default store itself does)."""
    assert domain in DOCUMENT_DOMAINS
    backend = None if cls is None else CustomBackend(cls, base_dir(domain), domain)
    old = _routes.pop(domain, None)
    if old is not None:
        _retired.append(old)
    if backend is not None:
        _routes[domain] = backend
    holder = _chosen if _chosen is not None else (store_at(_location) if _location is not None else None)
    if holder is not None and holder.current is not None:
        holder.current.route(domain, backend, None if backend is None else backend.guarantees)


def forget(domain: str) -> None:
    """Close and forget what was memoised for ``domain``; the default store too, unless it is lent."""
    held = _routes.get(domain)
    if held is not None:
        register(domain, held.cls)
    if _chosen is not None or _location is not None:
        shared().forget()


async def close_stores() -> None:
    """Close every store of this process and every instance of a registered class; the next use makes them again.

    Crash: As before the call: nothing acknowledged depends on it.
    """
    while _retired:
        await _retired.pop().close()
    for backend in list(_routes.values()):
        await backend.close()
    await close_shared_stores()


def reset() -> None:
    """Forget the registered classes and the chosen store (for tests); await :func:`close_stores` first."""
    for domain in list(_routes):
        register(domain, None)
    use_store(None)
