"""The base of every wrapper: a backend that passes each call on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from ..contract import Backend, Guarantees, Head, Key, KeyPrefix, Op, Record


class Around:
    """A backend around a backend; a wrapper overrides the calls that it changes.

    Args:
        backend: What it wraps. Opened and closed with the wrapper.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.backend!r})"

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Open what is wrapped; see :meth:`holdfast.contract.Backend.open`."""
        return await self.backend.open(read_only=read_only)

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys``; see :meth:`holdfast.contract.Backend.read`."""
        return await self.backend.read(scope, keys)

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        """Apply ``changes`` if ``expect`` holds; see :meth:`holdfast.contract.Backend.commit`.

        Crash: As what is wrapped.
        """
        return await self.backend.commit(scope, changes, expect, op=op)

    async def head(self, scope: str) -> Head:
        """Return the scope's commit number and its writers' last ops."""
        return await self.backend.head(scope)

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """Yield the scope's keys under ``prefix`` in byte order."""
        async for key in self.backend.keys(scope, prefix):
            yield key

    async def scopes(self) -> AsyncIterator[str]:
        """Yield the names of the scopes that have had a commit, in byte order."""
        async for scope in self.backend.scopes():
            yield scope

    async def close(self) -> None:
        """Close what is wrapped. Repeatable.

        Crash: As before the call: nothing acknowledged depends on close.
        """
        await self.backend.close()
