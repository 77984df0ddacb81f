"""Reconciling: what must be written so that every invariant holds again; plain functions over rows, no I/O.

Always towards the signal row, the source of truth. A store that commits all or nothing never needs it; a
user's four-method class, or domains on different backends, may leave a transition half done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from ..contract import Key
from ..domains import context_key, risk_key
from ..names import Context, entity_name
from ..rows import Event, Levels, PartialLevels, RiskPosition, Row, ScheduledSignal, SessionRow, Signal, Trade
from ..rules.candles import MINUTE_MS
from ..rules.signals import MAX_CLOSED_IDS, State

LOST_NUMBERS = 1_000_000
"""How many event numbers are skipped when it cannot be known which were used."""


class Repair(NamedTuple):
    """One thing that reconciling mended."""

    what: str
    """A short fixed name, such as ``slot-restored``."""
    key: Key
    message: str


class Found(NamedTuple):
    """The rows of one context as they were read, those that contradict their key already taken out."""

    signal: Signal | None
    scheduled: ScheduledSignal | None
    partial: PartialLevels | None
    session: SessionRow | None
    events: tuple[Event, ...]
    trades: tuple[Trade, ...]
    """Read only where the session row is missing."""
    slots: Mapping[Key, RiskPosition]
    """Own slots, and those of others that are past their lifetime and have no signal."""
    signal_stopped: bool
    """The signal row is in quarantine: its slots and levels are kept for it."""
    session_lost: bool = False
    """The session row is in quarantine: how many events there were is not known."""


class Plan(NamedTuple):
    """What reconciling wants written, and what will then be true."""

    state: State
    risk_names: tuple[str, ...]
    changes: dict[Key, Row | None]
    profiles: tuple[str, ...]
    """Entity names of the profiles whose guard must be rewritten."""
    repairs: tuple[Repair, ...]


def reconcile(context: Context, found: Found, risk_names: tuple[str, ...]) -> Plan:
    """Work out what must be written so that every invariant holds; pure, and a second time there is nothing to do."""
    return _Reconciling(context, found, risk_names).plan()


class _Reconciling:
    def __init__(self, context: Context, found: Found, risk_names: tuple[str, ...]) -> None:
        self.context, self.found, self.risk_names = context, found, risk_names
        self.changes: dict[Key, Row | None] = {}
        self.repairs: list[Repair] = []
        self.profiles: set[str] = set()

    def plan(self) -> Plan:
        closed_ids = self._closed_ids()
        signal, scheduled = self._signals(closed_ids)
        held = self.found.session.risk_names if self.found.session and self.found.signal_stopped else ()
        if signal is not None:
            held = self.risk_names
        self._slots(signal)
        levels = self._levels(signal)
        state = State(
            signal=signal,
            scheduled=scheduled,
            levels=levels,
            last_candle_ms=self._last_candle_ms(signal, scheduled),
            last_event=self._last_event(),
            closed_ids=closed_ids,
        )
        self._session(state, held)
        return Plan(state, held, self.changes, tuple(sorted(self.profiles)), tuple(self.repairs))

    def _mend(self, what: str, key: Key, row: Row | None, message: str) -> None:
        self.changes[key] = row
        self.repairs.append(Repair(what, key, message))

    def _closed_ids(self) -> tuple[str, ...]:
        session, events = self.found.session, self.found.events
        if session is not None:
            known = session.closed_ids
        else:
            known = tuple(trade.id for trade in sorted(self.found.trades, key=lambda trade: trade.closed_at))
        told = tuple(event.signal.id for event in events if event.kind in ("closed", "cancelled"))
        return (known + tuple(signal_id for signal_id in told if signal_id not in known))[-MAX_CLOSED_IDS:]

    def _signals(self, closed_ids: tuple[str, ...]) -> tuple[Signal | None, ScheduledSignal | None]:
        signal, scheduled = self.found.signal, self.found.scheduled
        signal_key, schedule_key = context_key("signal", self.context), context_key("schedule", self.context)
        if scheduled is not None and not scheduled.is_scheduled:
            # A class that keeps both domains in one place shows the open position here too: deleting it
            # as a schedule would delete the position.
            self.repairs.append(Repair("schedule-ignored", schedule_key, f"signal {scheduled.id!r} does not wait"))
            scheduled = None
        if signal is not None and signal.is_scheduled:
            self._mend("scheduled-not-open", signal_key, None, f"signal {signal.id!r} waits: it is no open position")
            if scheduled is None:
                scheduled = ScheduledSignal(**{name: getattr(signal, name) for name in Signal.__struct_fields__})
            self.changes[schedule_key] = scheduled  # after the deletion, for the sake of such a class
            signal = None
        if signal is not None and signal.id in closed_ids:
            self._mend("closed-signal-removed", signal_key, None, f"signal {signal.id!r} was closed before")
            signal = None
        if scheduled is not None and (scheduled.id in closed_ids or (signal is not None and signal.id == scheduled.id)):
            why = "was closed or cancelled before" if scheduled.id in closed_ids else "is open already"
            self._mend("schedule-removed", schedule_key, None, f"signal {scheduled.id!r} {why}")
            scheduled = None
        if signal is not None and scheduled is not None:
            self._mend("schedule-removed", schedule_key, None, f"{scheduled.id!r} waits while {signal.id!r} is open")
            scheduled = None
        return signal, scheduled

    def _slots(self, signal: Signal | None) -> None:
        wanted = {} if signal is None else {risk_key(name, self.context): name for name in self.risk_names}
        for key, row in self.found.slots.items():
            mine = key.entity_id == risk_key("-", self.context).entity_id
            if signal is not None and key == nameless_slot(key, self.context):
                self._mend("slot-adopted", key, None, f"it named no exchange; it is the slot of signal {signal.id!r}")
                self.profiles.add(key.entity_name)
            elif not mine:
                self._mend("slot-pruned", key, None, f"the slot of {key.entity_id} outlived every signal")
                self.profiles.add(key.entity_name)
            elif key not in wanted and not self.found.signal_stopped:
                self._mend("slot-removed", key, None, "nothing is open that holds it")
                self.profiles.add(key.entity_name)
            elif signal is not None and key in wanted and row.signal_id != signal.id:
                self._mend("slot-renamed", key, slot_of(signal), f"it named {row.signal_id!r}, not {signal.id!r}")
                self.profiles.add(key.entity_name)
        for key in wanted:
            if key not in self.found.slots:
                assert signal is not None
                self._mend("slot-restored", key, slot_of(signal), f"signal {signal.id!r} had lost it")
                self.profiles.add(key.entity_name)

    def _levels(self, signal: Signal | None) -> Levels:
        partial, key = self.found.partial, context_key("partial", self.context)
        if partial is None or self.found.signal_stopped:
            return Levels()
        kept = partial.levels.get(signal.id) if signal is not None else None
        others = [signal_id for signal_id in partial.levels if signal is None or signal_id != signal.id]
        if others or kept is None:
            row = None if kept is None or signal is None else PartialLevels(levels={signal.id: kept})
            self._mend(
                "levels-dropped", key, row, f"levels of signals that are not open: {', '.join(others) or 'none'}"
            )
        return kept or Levels()

    def _last_event(self) -> int:
        numbers = [event.number for event in self.found.events]
        numbers += [int(trade.event_id.rpartition("#")[2]) for trade in self.found.trades]
        known = max([self.found.session.last_event if self.found.session else 0, *numbers])
        if self.found.session_lost and not self.found.events:
            # An id told twice for different events would make a consumer drop the news of an exit: leave a hole.
            return known + LOST_NUMBERS
        return known

    def _last_candle_ms(self, signal: Signal | None, scheduled: ScheduledSignal | None) -> int:
        known = [self.found.session.last_candle_ms if self.found.session else 0]
        known += [event.candle_ms for event in self.found.events]
        known += [trade.closed_at - MINUTE_MS for trade in self.found.trades]
        # Rows that come without a session row (written by hand, or by a four-method class alone) say when they
        # began; the candle during which they did is not theirs.
        if signal is not None:
            known.append(signal.pending_at - signal.pending_at % MINUTE_MS - MINUTE_MS)
        elif scheduled is not None:
            known.append(scheduled.scheduled_at - scheduled.scheduled_at % MINUTE_MS - MINUTE_MS)
        return max(known)

    def _session(self, state: State, held: tuple[str, ...]) -> None:
        row = session_row(self.context, state, held)
        old = self.found.session
        if old is not None and msgspec.structs.replace(old, extra=msgspec.UNSET) == row:
            return
        if old is None and state == State():
            return  # it has never run: its first candle writes the row
        what = "session-made" if old is None else "session-repaired"
        self._mend(
            what, context_key("session", self.context), row, f"event {row.last_event}, candle {row.last_candle_ms}"
        )


def nameless_slot(slot: Key, context: Context) -> Key:
    """Return the key that the slot of ``context`` beside ``slot`` has in the documents, which name no exchange."""
    return slot._replace(entity_id=entity_name(context.symbol, context.strategy_name))


def slot_of(signal: Signal) -> RiskPosition:
    """Return the slot that an open signal holds in each of its profiles."""
    return RiskPosition(
        strategy_name=signal.strategy_name,
        exchange_name=signal.exchange_name,
        symbol=signal.symbol,
        open_timestamp=signal.pending_at,
        signal_id=signal.id,
        position=signal.position,
    )


def session_row(context: Context, state: State, risk_names: tuple[str, ...]) -> SessionRow:
    """Return the session row that says where ``state`` stands."""
    return SessionRow(
        context=(context.exchange_name, context.symbol, context.strategy_name),
        last_candle_ms=state.last_candle_ms,
        last_event=state.last_event,
        closed_ids=state.closed_ids,
        risk_names=risk_names,
    )
