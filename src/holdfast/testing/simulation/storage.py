"""The simulated storage: the contract's semantics over rows in memory, shared by any number of processes.

:class:`SharedMemory` keeps the rows and decides each commit in one step. :class:`SimulatedBackend` is one process's
way to it, and everything that can go wrong on that way is up to its :class:`Line`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from ...backends.state import State
from ...contract import Guarantees, Head, How, Key, KeyPrefix, Op, Record, Survives, WriterOp
from ...errors import FailedError

Accepted = Callable[[str, int, Op, Mapping[Key, Record | None], Any], None]


class SharedMemory:
    """Rows that outlive every process of a history.

    Args:
        accepted: Called with (scope, number, op, changes, who sent it) after each commit that was applied, repeated
            ops left out.
    """

    def __init__(self, accepted: Accepted | None = None) -> None:
        self.state = State()
        self._accepted = accepted

    def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], op: Op, sender: Any = None
    ) -> int:
        """Apply a commit; see :meth:`holdfast.contract.Backend.commit`.

        Crash: It is applied or not.
        """
        number, repeated = self.state.decide(scope, changes, expect, op)
        if not repeated:
            op = Op(*op)
            records = {key: None if p is None else Record(p, number, op) for key, p in changes.items()}
            if self._accepted is not None:
                self._accepted(scope, number, op, records, sender)
            self.state.scope(scope).apply(number, op.writer, WriterOp(op.n, number), records)
        return number

    def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys``; absent keys are absent."""
        found = self.state.scopes.get(scope)
        if found is None:
            return {}
        rows = found.rows
        return {key: rows[key] for key in keys if key in rows}


class Line(Protocol):
    """How the calls of one process come to the storage, and their answers back."""

    def call(self, kind: str, act: Callable[[], Any], told: str = "") -> Awaitable[Any]:
        """Have ``act`` done at the storage and return what it returned, unless something goes wrong on the way."""
        ...


class Straight:
    """A line on which nothing goes wrong, and nothing takes time."""

    async def call(self, kind: str, act: Callable[[], Any], told: str = "") -> Any:
        """Act."""
        return act()


class SimulatedBackend:
    """One process's backend over a :class:`SharedMemory`.

    Args:
        memory: What is stored.
        line: What may go wrong.
        sender: Told to whoever watches what is accepted.
    """

    def __init__(self, memory: SharedMemory, line: Line | None = None, *, sender: Any = None) -> None:
        self._memory, self._line, self._sender = memory, line or Straight(), sender
        self._open = self._read_only = False

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Open it; see :meth:`holdfast.contract.Backend.open`.

        Crash: As before.
        """
        if self._open:
            raise FailedError("simulated: is open already: close it first", backend="simulated")
        await self._line.call("open", lambda: None)
        self._open, self._read_only = True, read_only
        return Guarantees(
            backend="simulated", survives=Survives.NOTHING, survives_how=How.ATTESTED, atomic=True,
            atomic_how=How.ATTESTED, fenced=True, fenced_how=How.ATTESTED, shared=True,
            warnings=("a simulated store keeps nothing when the simulation ends: use a file store to trade",),
        )  # fmt: skip

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys`` as of one moment."""
        self._require_open()
        memory = self._memory
        found: dict[Key, Record] = await self._line.call("read", lambda: memory.read(scope, keys), scope)
        return found

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:
        """Apply ``changes`` if ``expect`` holds; see :meth:`holdfast.contract.Backend.commit`.

        Crash: It is applied or not.
        """
        self._require_open()
        if self._read_only:
            raise FailedError("simulated: was opened read-only: nothing was written", backend="simulated")
        memory, sender = self._memory, self._sender
        changes, expect = dict(changes), dict(expect)  # it may land when its sender thinks of other things
        number: int = await self._line.call(
            "commit", lambda: memory.commit(scope, changes, expect, op, sender), f"{scope} {op.writer}#{op.n}"
        )
        return number

    async def head(self, scope: str) -> Head:
        """Return the scope's commit number and its writers' last ops."""
        self._require_open()
        state = self._memory.state
        head: Head = await self._line.call("read", lambda: state.head(scope), scope)
        return head

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """Yield the keys under ``prefix`` as of one moment, in byte order."""
        self._require_open()
        state = self._memory.state
        for key in await self._line.call("read", lambda: state.keys(scope, prefix), scope):
            yield key

    async def scopes(self) -> AsyncIterator[str]:
        """Yield the names of the scopes that have had a commit, in byte order."""
        self._require_open()
        state = self._memory.state
        for name in await self._line.call("read", lambda: state.names()):
            yield name

    async def close(self) -> None:
        """Refuse further calls until it is opened again."""
        self._open = False

    def _require_open(self) -> None:
        if not self._open:
            raise FailedError("simulated: is not open: open it first", backend="simulated")
