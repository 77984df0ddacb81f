"""What one transition commits, and which outages are on record: plain functions and values, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

from ..contract import Key
from ..domains import context_key, event_key, guard_key, risk_key
from ..names import Context
from ..rows import Guard, Outage, PartialLevels, Row, Signal
from ..rules.candles import MINUTE_MS
from ..rules.signals import State, Transition
from .reconcile import session_row, slot_of
from .retention import Retention


def changes(
    context: Context,
    before: State,
    transition: Transition,
    *,
    held: tuple[str, ...],
    risk_names: tuple[str, ...],
    guards: Mapping[Key, Guard],
) -> tuple[dict[Key, Row | None], tuple[str, ...]]:
    """Return all rows that a transition writes or deletes, deletions first, and the profiles it then holds slots in.

    Args:
        before: The state that was committed last.
        held: Profiles in which the open signal of ``before`` holds a slot.
        risk_names: Profiles that a signal which opens takes a slot in.
        guards: Their present guard rows, as far as there are any; each is rewritten where a slot changes.
    """
    after, events = transition
    gone: dict[Key, Row | None] = {}
    written: dict[Key, Row | None] = {}

    def put(domain: str, row: Row | None) -> None:
        (gone if row is None else written)[context_key(domain, context)] = row

    if after.signal != before.signal:
        put("signal", after.signal)
    if after.scheduled != before.scheduled:
        put("schedule", after.scheduled)
    if after.levels != before.levels:
        told = after.signal is not None and (after.levels.profit_levels or after.levels.loss_levels)
        put("partial", PartialLevels(levels={after.signal.id: after.levels}) if told and after.signal else None)
    now_held = held
    if (after.signal and after.signal.id) != (before.signal and before.signal.id):
        now_held = () if after.signal is None else risk_names
        for name in held:
            gone[risk_key(name, context)] = None
        for name in now_held:
            gone.pop(risk_key(name, context), None)
            written[risk_key(name, context)] = slot_of(cast("Signal", after.signal))
        for name in dict.fromkeys((*held, *now_held)):
            key = guard_key(name)
            written[key] = Guard(changes=guards[key].changes + 1 if key in guards else 1)
    put("session", session_row(context, after, now_held))
    for event in events:
        written[event_key(context, event.number)] = event
    return gone | written, now_held


def begins(before: State, after: State) -> bool:
    """Tell whether something opens, or waits to."""
    opens = before.signal is None and after.signal is not None
    return opens or (before.scheduled is None and after.scheduled is not None)


def vacancies(context: Context, before: State, after: State, ignored_version: int) -> dict[Key, int]:
    """Return what an entry from nothing must expect: that no hand has put a position where it goes.

    Args:
        ignored_version: Version of a schedule row that recovery ignored; 0 for none.
    """
    if before.signal is not None or before.scheduled is not None or not begins(before, after):
        return {}
    return {context_key("signal", context): 0, context_key("schedule", context): ignored_version}


class Recorded(NamedTuple):
    """The outages of a context that are on record."""

    starts: tuple[int, ...] = ()
    """Open time of the first candle of each, oldest first."""
    newest: Outage | None = None

    @property
    def to_ms(self) -> int:
        """Open time of the last candle of the newest; -1: there is none."""
        return -1 if self.newest is None else self.newest.to_ms


_UNKNOWN_MS = 1 << 62


class Outages:
    """The candles on which entries were forbidden, as ranges; those not yet on record are taken by the next commit.

    They need no commit of their own: until one is made, ``last_candle_ms`` stands before them, and a restart
    forbids and records them again. A range that touches the newest one on record goes on with it; one that covers
    others replaces them; and what is older than the retention goes with the commit that records a newer one.

    Args:
        context: Whose.
        recorded: Those that are on record.
        retention: How many stay there.
    """

    __slots__ = ("_context_name", "_ends", "_from_ms", "_open", "_retention", "_to_ms", "_unrecorded")

    def __init__(
        self, context: Context, recorded: Recorded = Recorded(), retention: Retention = Retention()
    ) -> None:  # fmt: skip
        self._context_name, self._retention = context_key("outage", context).entity_name, retention
        starts, newest = recorded.starts, recorded.newest
        ends = [start - MINUTE_MS for start in starts[1:]] + [_UNKNOWN_MS if newest is None else newest.to_ms]
        self._ends = dict(zip(starts, ends, strict=False))
        """Of those on record, by where each begins, oldest first: where it ends at the latest."""
        self._from_ms, self._to_ms = (-1, -1) if newest is None else (newest.from_ms, newest.to_ms)
        self._open = False
        self._unrecorded: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._unrecorded)

    def forbid(self, candle_ms: int, until_ms: int | None = None) -> None:
        """Note that entries were forbidden on the candle, or on all of a range; a range goes on from the one before."""
        # The time before the first start, from 0 on, stays a row of its own.
        touches = self._from_ms > 0 and self._from_ms <= candle_ms <= self._to_ms + MINUTE_MS
        if not (self._open or touches):
            self._from_ms = self._to_ms = candle_ms
        self._open = True
        self._to_ms = max(self._to_ms, candle_ms if until_ms is None else until_ms)
        self._unrecorded[self._from_ms] = self._to_ms

    def allow(self) -> None:
        """Note that entries were allowed on a candle, so that the present range has ended."""
        self._open = False

    def take(self) -> dict[Key, Row | None]:
        """Return the rows for the commit that is about to be made; :meth:`put_back` if it fails."""
        taken, self._unrecorded = self._unrecorded, {}
        if not taken:
            return {}
        gone: list[int] = []
        for start, end in taken.items():
            gone += [one for one, last_ms in self._ends.items() if start < one and last_ms <= end and one not in taken]
            self._ends[start] = end
        self._ends = {one: self._ends[one] for one in sorted(self._ends) if one not in gone}
        gone += [one for one in self._retention.surplus(self._ends, max(taken.values())) if one not in taken]
        for one in gone:
            self._ends.pop(one, None)
        rows: dict[Key, Row | None] = {outage_key(self._context_name, one): None for one in gone}
        for start, end in taken.items():
            rows[outage_key(self._context_name, start)] = Outage(from_ms=start, to_ms=end)
        return rows

    def put_back(self, rows: Mapping[Key, Row | None]) -> None:
        """The commit that should have recorded ``rows`` did not happen."""
        for key, row in rows.items():
            if isinstance(row, Outage):
                self._unrecorded.setdefault(row.from_ms, row.to_ms)
            else:
                self._ends.setdefault(int(key.entity_id), 0)  # it may go with the next one
        self._ends = dict(sorted(self._ends.items()))


def outage_key(context_name: str, from_ms: int) -> Key:
    """Return the key of the outage that begins at ``from_ms``; byte order is the order of time."""
    return Key("outage", context_name, f"{from_ms:015d}")
