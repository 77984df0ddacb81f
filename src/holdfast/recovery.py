"""Recovery: own, load, check, reconcile. (The gap is stepped over by whoever feeds the session candles.)

Every part can be killed and run again, because each is either a read or one commit that is worked out
from what was read and guarded by it: recovering twice gives what recovering once gives.

Reconciling works towards the signal row, the source of truth. A store that commits all or nothing never
needs it; a user's four-method class, or domains on different backends, may.

Which candles are forbidden to entries. A candle that changes nothing is not stored, so the store alone
cannot tell which candles after ``last_candle_ms`` the last process still saw. It does not have to: on those
that it saw, it declined (an entry would have been stored), and the pure step declines again. So all
candles after ``last_candle_ms`` but the newest are stepped with entries forbidden, and exactly those are
recorded as an :class:`~holdfast.rows.Outage`: the pure step over the same candles, with entries forbidden
in the recorded outages, gives the same trades, whether or not the last process saw them.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, cast

import msgspec

from .candles import MINUTE_MS
from .contract import Key
from .domains import context_key, guard_key, risk_key
from .drafts import stored_failures
from .errors import ConflictError, CorruptedError, NotFoundError, UnavailableError
from .lanes import Sleep, commit_surely
from .names import Context
from .rows import (
    Event,
    Guard,
    Levels,
    Owner,
    PartialLevels,
    RiskPosition,
    Row,
    ScheduledSignal,
    SessionRow,
    Signal,
    Trade,
)
from .signals import MAX_CLOSED_IDS, State
from .store import Loaded, Store, Writer

_log = logging.getLogger("holdfast")

MAX_ATTEMPTS = 20
"""How often recovery reads again when other contexts change a shared profile meanwhile."""

_STOPPING_DOMAINS = ("signal", "schedule", "partial", "session", "outbox")


class Repair(NamedTuple):
    """One thing that reconciling mended."""

    what: str
    """A short fixed name, such as ``slot-restored``."""
    key: Key
    message: str


class RecoveryReport(msgspec.Struct, frozen=True, kw_only=True):
    """What recovery found and did."""

    context: Context
    epoch: int
    signal_id: str | None = None
    scheduled_id: str | None = None
    events_waiting: int = 0
    repairs: tuple[Repair, ...] = ()
    stopped: tuple[str, ...] = ()
    """What is in quarantine, and why; while anything is, nothing opens for this context."""


class Recovered(NamedTuple):
    """What a session goes on from."""

    state: State
    risk_names: tuple[str, ...]
    """Profiles in which the open signal holds a slot."""
    owner: Loaded[Owner]
    session: Loaded[SessionRow] | None
    events: tuple[Event, ...]
    report: RecoveryReport


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


class Plan(NamedTuple):
    """What reconciling wants written, and what will then be true."""

    state: State
    risk_names: tuple[str, ...]
    changes: dict[Key, Row | None]
    profiles: tuple[str, ...]
    """Entity names of the profiles whose guard must be rewritten."""
    repairs: tuple[Repair, ...]


def stopped_reasons(store: Store, context: Context) -> tuple[str, ...]:
    """Return why nothing may open for ``context``; empty when nothing of it is in quarantine."""
    if not store.damaged:
        return ()
    name = context_key("signal", context).entity_name
    return tuple(
        reason for key, reason in store.damaged.items() if key.entity_name == name and key.domain in _STOPPING_DOMAINS
    )


async def own(
    store: Store, writer: Writer, context: Context, *, holder: str, now_ms: int, sleep: Sleep
) -> Loaded[Owner]:
    """Take the context over: the owner row's epoch is raised by compare-and-set, which fences whoever had it.

    Crash: The old owner still has it, or the new one does; owning again raises the epoch once more.
    """
    key = context_key("owner", context)
    for _ in range(MAX_ATTEMPTS):
        found, damaged = await store.salvage(key)  # a damaged one is replaced: it says nothing about the trade
        _refuse_newer(store, damaged)
        old = cast("Loaded[Owner] | None", found.get(key))
        row = Owner(
            holder=holder,
            epoch=1 if old is None else old.row.epoch + 1,
            host=socket.gethostname(),
            pid=os.getpid(),
            since_ms=now_ms,
        )
        try:
            version = await commit_surely(writer, {key: row}, {key: 0 if old is None else old.version}, sleep=sleep)
        except ConflictError:
            continue
        return Loaded(row, version)
    raise UnavailableError(f"{context}: others keep taking it over: run it once only", key=key)


async def recover(
    store: Store,
    writer: Writer,
    context: Context,
    *,
    holder: str,
    risk_names: tuple[str, ...],
    lifetime_ms: int,
    clock: Callable[[], int],
    sleep: Sleep,
) -> Recovered:
    """Own, load, check and reconcile one context.

    Args:
        risk_names: The profiles that its strategy has now.
        lifetime_ms: Longest life of a signal; older slots of others without a signal are pruned.
        clock: Tells the time in epoch milliseconds.

    Raises:
        UnavailableError: The store cannot be used now; call again.

    Crash: Any part may be done or not; recovering again does the rest.
    """
    owner = await own(store, writer, context, holder=holder, now_ms=clock(), sleep=sleep)
    for _ in range(MAX_ATTEMPTS):
        found, versions = await _load(store, context, risk_names, now_ms=clock(), lifetime_ms=lifetime_ms)
        plan = reconcile(context, found, risk_names)
        session = found.session
        session_key = context_key("session", context)
        session_version = versions.get(session_key, 0)
        if plan.changes:
            guards = {Key("guard", name, "guard") for name in plan.profiles}
            changes = plan.changes | {key: _next_guard(versions_row) for key, versions_row in _rows(versions, guards)}
            expect = {context_key("owner", context): owner.version, session_key: session_version}
            expect |= {key: versions.get(key, 0) for key in guards}
            try:
                number = await commit_surely(writer, changes, expect, sleep=sleep)
            except ConflictError:
                continue  # another context changed a shared profile meanwhile: look again
            if session_key in plan.changes:
                session, session_version = cast("SessionRow", plan.changes[session_key]), number
        for repair in plan.repairs:
            _log.warning("%s: recovery: %s: %s", context, repair.what, repair.message)
        report = RecoveryReport(
            context=context,
            epoch=owner.row.epoch,
            signal_id=None if plan.state.signal is None else plan.state.signal.id,
            scheduled_id=None if plan.state.scheduled is None else plan.state.scheduled.id,
            events_waiting=len(found.events),
            repairs=plan.repairs,
            stopped=stopped_reasons(store, context),
        )
        loaded = None if session is None else Loaded(session, session_version)
        return Recovered(plan.state, plan.risk_names, owner, loaded, found.events, report)
    raise UnavailableError(f"{context}: its risk profiles change too often to be reconciled: start it again")


def _refuse_newer(store: Store, damaged: Mapping[Key, str]) -> None:
    """A row that a newer version wrote is whole and stays where it is: only that version may go on."""
    for key, reason in damaged.items():
        if not store.is_stopped(key):
            raise CorruptedError(reason, key=key)


class _Versions(dict[Key, int]):
    """Versions of what was read, and the guard rows beside them."""

    guards: dict[Key, Guard]


def _rows(versions: _Versions, guards: Iterable[Key]) -> list[tuple[Key, Guard | None]]:
    return [(key, versions.guards.get(key)) for key in sorted(guards)]


def _next_guard(row: Guard | None) -> Guard:
    return Guard(changes=1 if row is None else row.changes + 1)


async def _load(
    store: Store, context: Context, risk_names: tuple[str, ...], *, now_ms: int, lifetime_ms: int
) -> tuple[Found, _Versions]:
    """Read what belongs to the context; a row that contradicts its key goes to quarantine."""
    keys = {domain: context_key(domain, context) for domain in ("signal", "schedule", "partial", "session")}
    found, damaged = await store.salvage(*keys.values())
    _refuse_newer(store, damaged)
    for domain, key in keys.items():
        if key in found and (reason := _contradiction(domain, found[key].row, context)):
            try:
                await store.quarantine(key, reason)
            except NotFoundError:
                pass  # cleared meanwhile
            _log.error("%s: %s: %s: moved to quarantine: nothing opens until it is released", context, key, reason)
            del found[key]
    session = cast("SessionRow | None", found[keys["session"]].row if keys["session"] in found else None)
    events = cast("dict[Key, Loaded[Event]]", await store.scan("outbox", keys["session"].entity_name))
    trades: Mapping[Key, Loaded[Trade]] = {}
    if session is None:
        trades = cast("dict[Key, Loaded[Trade]]", await store.scan("ledger", keys["session"].entity_name))
    names = tuple(dict.fromkeys((*risk_names, *(session.risk_names if session else ()))))
    guards, _ = await store.salvage(*(guard_key(name) for name in names))  # before the slots, which they guard
    slots = await _slots(store, context, names, oldest_ms=now_ms - lifetime_ms)
    versions = _Versions({key: loaded.version for key, loaded in (found | guards).items()})
    versions.guards = {key: cast("Guard", loaded.row) for key, loaded in guards.items()}
    rows = {domain: found[key].row if key in found else None for domain, key in keys.items()}
    return (
        Found(
            signal=cast("Signal | None", rows["signal"]),
            scheduled=cast("ScheduledSignal | None", rows["schedule"]),
            partial=cast("PartialLevels | None", rows["partial"]),
            session=session,
            events=tuple(loaded.row for loaded in events.values()),
            trades=tuple(loaded.row for loaded in trades.values()),
            slots=slots,
            signal_stopped=store.is_stopped(keys["signal"]) and rows["signal"] is None,
        ),
        versions,
    )


async def _slots(store: Store, context: Context, names: Iterable[str], *, oldest_ms: int) -> dict[Key, RiskPosition]:
    """Return the own slots in ``names``, and those of others that outlived every signal and have none."""
    slots: dict[Key, RiskPosition] = {}
    for name in names:
        mine = risk_key(name, context)
        for key, loaded in (await store.scan("risk", mine.entity_name)).items():
            row = cast("RiskPosition", loaded.row)
            if key == mine:
                slots[key] = row
            elif row.open_timestamp <= oldest_ms:
                signal_key = context_key("signal", Context(row.exchange_name or "-", row.symbol, row.strategy_name))
                signal_key = signal_key._replace(entity_name=key.entity_id)
                found, damaged = await store.salvage(signal_key)
                if not found and not damaged:
                    slots[key] = row
    return slots


def _contradiction(domain: str, row: Row, context: Context) -> str | None:
    """Return how a row contradicts the key it was found under, or what makes it impossible; None when it is sound."""
    if isinstance(row, Signal):
        if row.context != context:
            return f"it says that it belongs to {row.context}, not to {context}"
        failures = stored_failures(row)
        if failures:
            return "it cannot be watched: " + "; ".join(failures)
    elif isinstance(row, SessionRow) and Context(*row.context) != context:
        return f"it says that it belongs to {Context(*row.context)}, not to {context}"
    return None


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
            if not mine:
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
        return max([self.found.session.last_event if self.found.session else 0, *numbers])

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
