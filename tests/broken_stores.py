"""Stores that each break one promise, for ``holdfast.testing.histories`` to find: ``broken_stores:NAME`` opens one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence

from holdfast.contract import Backend, Key, Op, Record
from holdfast.errors import ConflictError
from holdfast.urls import open_backend
from holdfast.wrappers.around import Around

Changes = Mapping[Key, bytes | None]
Expect = Mapping[Key, int]


class _Unguarded(Around):
    """Does not look at ``expect``: the last one wins."""

    async def commit(self, scope: str, changes: Changes, expect: Expect, *, op: Op) -> int:
        return await super().commit(scope, changes, {}, op=op)


class _ReadThenWritten(Around):
    """Looks at ``expect`` itself, and then writes: another process can come between."""

    async def commit(self, scope: str, changes: Changes, expect: Expect, *, op: Op) -> int:
        last = (await self.backend.head(scope)).writers.get(op.writer)
        if last is None or last.n != op.n:
            found = await self.backend.read(scope, list(expect))
            clashes = [key for key, v in expect.items() if (found[key].version if key in found else 0) != v]
            if clashes:
                raise ConflictError("it was changed", keys=clashes)
        return await super().commit(scope, changes, {}, op=op)


class _Torn(Around):
    """Reads the rows one after another: commits come between, and are seen in part."""

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        found: dict[Key, Record] = {}
        for key in keys:
            found |= await super().read(scope, [key])
            await asyncio.sleep(0.001)
        return found


class _CachedFirst(Around):
    """Puts a row into its cache before the store has accepted it, as the documents' sample of a cache does."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.cache: dict[Key, Record] = {}

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        return {**await super().read(scope, keys), **{key: self.cache[key] for key in keys if key in self.cache}}

    async def commit(self, scope: str, changes: Changes, expect: Expect, *, op: Op) -> int:
        number = (await self.backend.head(scope)).number + 1
        for key, payload in changes.items():
            self.cache.pop(key, None)
            if payload is not None:
                self.cache[key] = Record(payload, number, op)
        return await super().commit(scope, changes, expect, op=op)


class _Remembering(Around):
    """Serves what this process read or wrote, whatever others have written since."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.cache: dict[Key, Record] = {}

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        if not all(key in self.cache for key in keys) or random.random() < 0.3:
            self.cache |= await super().read(scope, keys)
        return {key: self.cache[key] for key in keys if key in self.cache}

    async def commit(self, scope: str, changes: Changes, expect: Expect, *, op: Op) -> int:
        number = await super().commit(scope, changes, expect, op=op)
        for key in changes:
            self.cache.pop(key, None)
        return number


class _Forgetful(Around):
    """Acknowledges one commit in a hundred without applying it."""

    async def commit(self, scope: str, changes: Changes, expect: Expect, *, op: Op) -> int:
        if random.random() < 0.01:
            return (await self.backend.head(scope)).number + 1
        return await super().commit(scope, changes, expect, op=op)


def unguarded(store: str) -> Backend:
    return _Unguarded(open_backend(store))


def read_then_written(store: str) -> Backend:
    return _ReadThenWritten(open_backend(store))


def torn(store: str) -> Backend:
    return _Torn(open_backend(store))


def cached_first(store: str) -> Backend:
    return _CachedFirst(open_backend(store))


def remembering(store: str) -> Backend:
    return _Remembering(open_backend(store))


def forgetful(store: str) -> Backend:
    return _Forgetful(open_backend(store))


def no_backend(store: str) -> object:
    return store
