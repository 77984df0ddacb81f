"""The contract's simplest complete implementation: rows in this object, gone with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from ..contract import Guarantees, Head, How, Key, KeyPrefix, Op, Record, Survives, WriterOp
from ..errors import FailedError
from .state import State


class MemoryBackend:
    """Keeps rows in memory, for tests and dry runs: they outlive ``close``, not the process.

    Every method runs without waiting, so each is atomic on its event loop.
    """

    def __init__(self) -> None:
        self._state = State()
        self._open = False
        self._read_only = False

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Open it; see :meth:`holdfast.contract.Backend.open`.

        Crash: Everything is gone.
        """
        if self._open:
            raise FailedError("memory: is open already: close it first", backend="memory")
        self._open, self._read_only = True, read_only
        return Guarantees(
            backend="memory",
            survives=Survives.NOTHING,
            survives_how=How.ATTESTED,
            atomic=True,
            atomic_how=How.ATTESTED,
            fenced=True,
            fenced_how=How.ATTESTED,
            shared=False,
            warnings=("memory keeps nothing when the process ends: use a file store to trade",),
        )

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys``; absent keys are absent."""
        self._require_open()
        found = self._state.scopes.get(scope)
        if found is None:
            return {}
        rows = found.rows
        return {key: rows[key] for key in keys if key in rows}

    async def commit(
        self,
        scope: str,
        changes: Mapping[Key, bytes | None],
        expect: Mapping[Key, int],
        *,
        op: Op,
    ) -> int:
        """Apply ``changes`` if ``expect`` holds; see :meth:`holdfast.contract.Backend.commit`.

        Crash: Everything is gone.
        """
        self._require_open()
        if self._read_only:
            raise FailedError("memory: was opened read-only: nothing was written", backend="memory")
        number, repeated = self._state.decide(scope, changes, expect, op)
        if not repeated:
            op = Op(*op)
            records = {key: None if p is None else Record(p, number, op) for key, p in changes.items()}
            self._state.scope(scope).apply(number, op.writer, WriterOp(op.n, number), records)
        return number

    async def head(self, scope: str) -> Head:
        """Return the scope's commit number and its writers' last ops."""
        self._require_open()
        return self._state.head(scope)

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """Yield the keys under ``prefix`` as of the first step, in byte order."""
        self._require_open()
        for key in self._state.keys(scope, prefix):
            yield key

    async def scopes(self) -> AsyncIterator[str]:
        """Yield the names of the scopes that have had a commit, in byte order."""
        self._require_open()
        for name in self._state.names():
            yield name

    async def close(self) -> None:
        """Refuse further calls until it is opened again; the rows stay in this object."""
        self._open = False

    def _require_open(self) -> None:
        if not self._open:
            raise FailedError("memory: is not open: open it first", backend="memory")
