"""Turns: contexts that share a risk profile decide in the order of their names at each candle.

A check of "fewer than three open" depends on who asks first. Without an order, a run that was
killed and one that was not could open different positions from the same candles. The order is
lexicographic in (candle time, context): every member finishes a candle before any begins the next.

Invariants:

* A member is never waited for longer than ``limit_seconds``: whoever is late loses its place
  until it asks again, so that one stuck strategy cannot hold the exits of others for ever.
* Joining is synchronous, when a run is set up, so that the order does not depend on who starts first.
* A context without risk profiles joins nothing and never waits.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Iterable

from ..names import Context

_log = logging.getLogger("holdfast")
_MINUTE_MS = 60_000

LIMIT_SECONDS = 30.0
"""How long a member waits for an earlier one, by default."""


class Turn:
    """The place of one context among those that share a risk profile with it."""

    __slots__ = ("_due_ms", "_freed", "_group", "_left", "context")

    def __init__(self, context: Context, group: _Group | None) -> None:
        self.context = context
        self._group = group
        self._due_ms = 0
        """The candle that this member does next; 0 until it has asked for the first time."""
        self._freed: asyncio.Event | None = None
        self._left = False

    def free(self, candle_ms: int) -> bool:
        """Tell whether it may decide the candle that opens at ``candle_ms`` now, without waiting."""
        group = self._group
        if group is None or self._left:
            return True
        if self._due_ms != candle_ms:
            group.place(self, candle_ms)
        return group.first() is self

    async def wait(self, candle_ms: int) -> None:
        """Wait for the turn of ``candle_ms``; members that are late for too long lose their place."""
        while not self.free(candle_ms):
            assert self._group is not None
            self._freed = asyncio.Event()
            try:
                async with asyncio.timeout(self._group.limit_seconds):
                    await self._freed.wait()
            except TimeoutError:
                self._group.drop_first(self)
            finally:
                self._freed = None

    def stand_aside(self) -> None:
        """Nobody waits for this member until it asks for its first turn."""
        if self._group is not None and not self._left:
            self._group.set_aside(self)

    def done(self, candle_ms: int) -> None:
        """Tell the others that this member has decided ``candle_ms``, or gives it up."""
        if self._group is not None and not self._left:
            self._group.place(self, candle_ms + _MINUTE_MS)

    def leave(self) -> None:
        """Nobody waits for this member any more. Repeatable."""
        if self._group is not None and not self._left:
            self._left = True
            self._group.remove(self)


class _Group:
    """Members that are linked by shared profiles, ordered by (next candle, context)."""

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self.members: set[Turn] = set()
        self.risk_names: set[str] = set()
        self._heap: list[tuple[int, Context, int, Turn]] = []
        self._serial = 0
        self._current: dict[Turn, int] = {}

    def place(self, turn: Turn, due_ms: int) -> None:
        turn._due_ms = due_ms
        self.members.add(turn)
        self._serial += 1
        self._current[turn] = self._serial
        heapq.heappush(self._heap, (due_ms, turn.context, self._serial, turn))
        self._wake()

    def remove(self, turn: Turn) -> None:
        self.members.discard(turn)
        self._current.pop(turn, None)
        self._wake()

    def set_aside(self, turn: Turn) -> None:
        self._current.pop(turn, None)
        turn._due_ms = 0
        self._wake()

    def first(self) -> Turn | None:
        heap = self._heap
        while heap and self._current.get(heap[0][3]) != heap[0][2]:
            heapq.heappop(heap)  # that member has moved on or left
        return heap[0][3] if heap else None

    def drop_first(self, asking: Turn) -> None:
        late = self.first()
        if late is None or late is asking:
            return
        _log.warning("%s waited %.0f s for %s and goes on without it", asking.context, self.limit_seconds, late.context)
        self.set_aside(late)  # it is placed anew as soon as it asks

    def take_over(self, other: _Group) -> None:
        self.risk_names |= other.risk_names
        for turn in other.members:
            turn._group = self
            self.members.add(turn)
            if turn in other._current:
                self.place(turn, turn._due_ms)

    def _wake(self) -> None:
        first = self.first()
        if first is not None and first._freed is not None:
            first._freed.set()


class Turns:
    """Who shares what. One object for all live runs of a process.

    Args:
        limit_seconds: How long a member waits for an earlier one.
    """

    def __init__(self, *, limit_seconds: float = LIMIT_SECONDS) -> None:
        self._limit_seconds = limit_seconds
        self._groups: dict[str, _Group] = {}

    def join(self, context: Context, risk_names: Iterable[str]) -> Turn:
        """Take a place for ``context``; call it when the run is set up, before anything is awaited."""
        names = tuple(risk_names)
        if not names:
            return Turn(context, None)
        group: _Group | None = None
        for name in names:
            found = self._groups.get(name)
            if found is None or found is group:
                continue
            if group is None:
                group = found
            else:
                group.take_over(found)
                for risk_name in found.risk_names:
                    self._groups[risk_name] = group
        if group is None or not group.members:
            group = _Group(self._limit_seconds)
        group.risk_names |= set(names)
        for name in group.risk_names:
            self._groups[name] = group
        turn = Turn(context, group)
        group.place(turn, 0)
        return turn
