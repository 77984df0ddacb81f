"""Stores that a whole process shares, one for each directory, whatever event loop comes along.

Invariants:

* One directory has one open store in a process: a second one would meet its own lock.
* A relative directory is resolved once; changing the working directory later forks nothing.
* A store is used by one event loop at a time: when the next loop comes, it is closed and opened anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..contract import Backend, Key, Survives
from ..errors import (
    ConflictError,
    CorruptedError,
    FailedError,
    InvalidInputError,
    UnavailableError,
    UnknownOutcomeError,
)
from ..rows import Row
from ..store import Loaded, Store, Writer

_LANES = 16
_OFTEN = 8
_RESENDS = 3


class SharedStore:
    """One store of the process, opened at its first use.

    Args:
        name: A directory or URL, for messages.
        make: Makes the store; called anew after each close.
        own: False for a store that somebody else opened: it is not closed here.
    """

    def __init__(self, name: str, make: Callable[[], Store], *, own: bool = True) -> None:
        self.name = name
        self.make = make
        self.lent = 0
        """How many runs hold the store just now; while there are any, it stays open."""
        self.routes: Callable[[], Mapping[str, Backend]] = dict
        """Asked for the user's classes at each opening."""
        self._own = own
        self._store: Store | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = asyncio.Lock()
        self._desks: dict[bool, Desk] = {}
        self._stale = False

    async def store(self) -> Store:
        """Return the store, open in the running event loop."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and self._loop.is_running() and self._store is not None:
                raise InvalidInputError(f"{self.name} is in use by another running event loop: use one loop")
            self._loop, self._lock, self._stale = loop, asyncio.Lock(), self._own and self._store is not None
            self.lent = 0
        if self._store is not None and not self._stale:
            return self._store
        async with self._lock:
            if self._stale:
                await self._close()
            if self._store is None:
                store = self.make()
                for domain, backend in self.routes().items() if self._own else ():
                    store.route(domain, backend, None)
                if not store.is_open:
                    await store.open()
                self._store = store
            return self._store

    @property
    def current(self) -> Store | None:
        """The store that a registration must reach now, if there is one."""
        return self._store if self._own else self.make()

    async def desk(self, *, routed: bool = True) -> Desk:
        """Return the desk for whole-entity writes; not ``routed``: into the home backend, whoever is registered."""
        store = await self.store()
        if routed not in self._desks:
            self._desks[routed] = Desk(store if routed else store.unrouted(), self.forget)
        return self._desks[routed]

    def forget(self) -> None:
        """Have the store closed before its next use, unless a run holds it."""
        self._stale = self._own and self._store is not None and not self.lent

    async def close(self) -> None:
        """Close the store now. The next use opens it again.

        Crash: As before the call.
        """
        if self._loop is not asyncio.get_running_loop():
            self._loop, self._lock = asyncio.get_running_loop(), asyncio.Lock()
        async with self._lock:
            await self._close()

    async def close_if_stale(self) -> None:
        """Close the store if it was told to forget."""
        if self._stale:
            await self.close()

    async def _close(self) -> None:
        store, self._store, self._stale = self._store, None, False
        self._desks.clear()
        if store is not None and self._own:
            await store.close()


class Desk:
    """Whole-entity writes where the last caller wins, in the order of the calls.

    Args:
        store: Where the rows lie.
        forget: Called when the store has failed and must be opened again.
    """

    def __init__(self, store: Store, forget: Callable[[], None]) -> None:
        self.store = store
        self._forget = forget
        self._lanes = [(asyncio.Lock(), store.writer(f"desk-{number}")) for number in range(_LANES)]

    async def read(self, key: Key) -> Row | None:
        """Return the row of ``key``, or None."""
        with self._failure_noted():
            loaded = await self.store.get(key)
        return None if loaded is None else loaded.row

    async def scan(self, domain: str, entity_name: str) -> dict[Key, Row]:
        """Return the rows of one entity.

        Raises:
            CorruptedError: One of them is damaged, or was and is not released.
        """
        with self._failure_noted():
            found = await self.store.scan(domain, entity_name)
        for key in self._damaged(domain, entity_name):
            if key not in found:
                raise CorruptedError(self.store.damaged[key], key=key)
        return {key: loaded.row for key, loaded in found.items()}

    async def put(self, key: Key, row: Row | None, *, must_exist: bool = False) -> bool:
        """Write ``row`` under ``key`` (None deletes it), whatever is there; a stopped key is released with it.

        Returns:
            Whether there had been a row, damaged ones included.

        Crash: The old row or the new one.
        """
        was_there = False

        async def change() -> _Change:
            nonlocal was_there
            found, damaged = await self.store.salvage(key)
            if key in damaged and not self.store.is_stopped(key):
                raise CorruptedError(damaged[key], key=key)  # of a newer format: not ours to replace
            loaded: Loaded[Row] | None = found.get(key)
            was_there = loaded is not None or key in damaged
            if must_exist and not was_there:
                return _Change({}, {}, [])
            return await self._with_releases({key: row}, {key: 0 if loaded is None else loaded.version}, [key])

        await self._write(key.domain, key.entity_name, change)
        return was_there

    async def replace(self, domain: str, entity_name: str, rows: Mapping[Key, Row]) -> int:
        """Make ``rows`` all that the entity holds, in one commit; its stopped keys are released with it.

        Returns:
            How many rows it had before.

        Crash: All the old rows or all the new ones.
        """
        had = 0

        async def change() -> _Change:
            nonlocal had
            found = await self.store.scan(domain, entity_name)
            had = len(found)
            changes: dict[Key, Row | None] = {key: None for key in found if key not in rows}
            expect = {key: found[key].version if key in found else 0 for key in (*rows, *found)}
            return await self._with_releases({**changes, **rows}, expect, self._damaged(domain, entity_name))

        await self._write(domain, entity_name, change)
        return had

    def _damaged(self, domain: str, entity_name: str) -> list[Key]:
        return [key for key in self.store.damaged if key.domain == domain and key.entity_name == entity_name]

    async def _with_releases(
        self, changes: dict[Key, Row | None], expect: dict[Key, int], keys: Iterable[Key]
    ) -> _Change:
        released = [key for key in keys if self.store.is_stopped(key)]
        for key in released:
            more, guards = await self.store.release_changes(key)
            changes, expect = {**changes, **more}, {**expect, **guards}
        return _Change(changes, expect, released)

    async def _write(self, domain: str, entity_name: str, change: Callable[[], Awaitable[_Change]]) -> None:
        lock, writer = self._lanes[hash((domain, entity_name)) % _LANES]
        async with lock:
            with self._failure_noted():
                for attempt in range(_OFTEN):
                    changes, expect, released = await change()
                    if changes and not await _committed(writer, changes, expect):
                        if attempt == _OFTEN - 1:
                            raise UnavailableError(f"{domain}/{entity_name} changes too often: try again")
                        continue  # somebody wrote between: the last caller wins
                    for key in released:
                        self.store.released(key)
                    return

    @contextmanager
    def _failure_noted(self) -> Iterator[None]:
        try:
            yield
        except FailedError:
            self._forget()
            raise


class _Change(NamedTuple):
    changes: dict[Key, Row | None]
    expect: dict[Key, int]
    released: list[Key]


async def _committed(writer: Writer, changes: Mapping[Key, Row | None], expect: Mapping[Key, int]) -> bool:
    """Commit, sending again a few times where the answer is lost; tell whether it was applied."""
    try:
        await writer.commit(changes, expect)
        return True
    except ConflictError:
        return False
    except UnknownOutcomeError:
        pass
    for attempt in range(_RESENDS):
        try:
            await writer.resend()
            return True
        except ConflictError:
            return False
        except UnknownOutcomeError:
            if attempt == _RESENDS - 1:
                raise
    return False


class Closing:
    """What ``clear()`` returns: await it to have the old instances closed now; the next call does it otherwise."""

    def __init__(self, close: Callable[[], Any]) -> None:
        self._close = close

    def __await__(self) -> Generator[Any, None, None]:
        yield from self._close().__await__()


_stores: dict[str, SharedStore] = {}


def store_at(directory: Path) -> SharedStore:
    """Return the process's store for the absolute path ``directory``."""
    name = str(directory)
    if name not in _stores:

        def make() -> Store:
            from ..urls import open_backend  # urls names every backend; the library's core must not

            return Store(open_backend(name))

        _stores[name] = SharedStore(name, make)
    return _stores[name]


def store_of(name: str) -> SharedStore:
    """Return the process's store for a store's name: a path or a URL, perhaps with wrappers and copies."""
    from ..urls import open_backend, parse_store

    parsed = parse_store(name)
    if not parsed.wrappers and len(parsed.places) == 1 and (folder := parsed.folders[0]) is not None:
        return store_at(Path(folder).absolute())
    if name not in _stores:

        def make() -> Store:
            weak = parsed.in_memory  # asked for by name
            return Store(open_backend(name), require=Survives.NOTHING if weak else Survives.PROCESS)

        _stores[name] = SharedStore("the store named to use_store()", make)  # its name may hold a password
    return _stores[name]


async def close_shared_stores() -> None:
    """Close every store that this process shares; the next use opens it again.

    Crash: As before the call.
    """
    for shared in list(_stores.values()):
        await shared.close()
