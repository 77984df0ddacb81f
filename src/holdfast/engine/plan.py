"""What the missed candles do to a restored signal, told before any of it is done; plain functions, no I/O.

The outlook is found by the very step that recovery then takes, over the same candles: what it says is what will be
committed, event for event. What only the driver can settle (a risk profile, ``on_both_hit``) is asked in between.

Invariants:

* Nothing is entered on a candle of the past, so an outlook enters nothing either, but where it is told that the newest
  candles may.
* ``verdict`` follows from the events alone, and the events from the candles alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Literal, get_args

import msgspec

from ..names import Context
from ..rows import CloseReason, Event, Foreseen, GapPlan, Levels, ScheduledSignal, Signal
from ..rules.candles import MINUTE_MS, Candle, Window
from ..rules.signals import Question, Spec, State, Transition, close_now, step, stop_scheduled

RecoveryPolicy = Literal["step", "ask", "close_at_market"]
"""What a strategy wants done about candles that were missed while something of it was open or waiting."""
RECOVERY_POLICIES: tuple[RecoveryPolicy, ...] = get_args(RecoveryPolicy)

What = Literal["step", "close"]
"""What was decided; see :class:`~holdfast.rows.Decision`."""

Verdict = Literal[
    "still_valid", "hit_stop", "hit_target", "partial", "expired", "closed",
    "still_waiting", "activated", "timed_out", "cancelled", "rejected",
    "no_candles",
]  # fmt: skip
"""Of an open signal: still valid, its stop or target hit, levels reached (and still open), past its time, or closed by
policy or hand. Of a waiting one: waits on, entered, too old, its stop came before its entry (or it was stopped),
refused by a risk profile. ``no_candles``: the exchange gave none since the last decision, so nothing can be said."""

_CLOSED: dict[str, Verdict] = {"take_profit": "hit_target", "stop_loss": "hit_stop", "time_expired": "expired"}
_CANCELLED: dict[str, Verdict] = {"timeout": "timed_out", "risk": "rejected"}


class Outlook(msgspec.Struct, frozen=True, kw_only=True):
    """What the missed candles do to one restored signal."""

    context: Context
    signal: Signal
    """As it was restored."""
    verdict: Verdict
    from_ms: int
    """Open time of the first missed minute."""
    until_ms: int
    """Open time of the last candle that was looked at; before ``from_ms`` when there was none."""
    candles: int
    missing_minutes: int
    """Minutes up to ``until_ms`` for which the exchange has no candle."""
    events: tuple[Event, ...]
    """Exactly those that stepping the candles commits."""
    state: State
    """Where the context will stand."""
    price: float | None
    """At the last candle."""
    newest: Candle | None = None
    """The last candle, for what is decided at its price."""
    entry_passed_ms: int | None = None
    """Close time of the first past candle at which a waiting signal could have been entered, had the bot been there."""

    @property
    def waited(self) -> bool:
        """Whether the restored signal was a waiting one."""
        return isinstance(self.signal, ScheduledSignal)

    @property
    def at_ms(self) -> int | None:
        """Close time of the candle that ended or entered the signal; None while neither is done."""
        last = self.events[-1] if self.events else None
        return last.at_ms if last is not None and last.kind in ("closed", "cancelled", "opened") else None

    @property
    def both_hit(self) -> bool:
        """Whether stop and target lay in one candle, so that ``both_hit`` decided."""
        return any(event.both_hit for event in self.events)

    @property
    def levels(self) -> Levels:
        """The milestones that the missed candles reach."""
        told = [event for event in self.events if event.level is not None]
        return Levels(
            profit_levels=tuple(event.level or 0 for event in told if event.kind == "partial_profit"),
            loss_levels=tuple(event.level or 0 for event in told if event.kind == "partial_loss"),
        )


def foresee(
    state: State, candles: Sequence[Candle], window: Window, spec: Spec, *, entries_from_ms: int | None = None
) -> Generator[Question, Transition | None, Outlook | None]:
    """Work out what ``candles`` do to what is open or waits in ``state``.

    Args:
        state: Where the context stands; not changed.
        candles: The closed candles since its last decision, oldest first; older ones only fill the window.
        window: As it is before ``candles``; it is pushed forward, so give a copy.
        entries_from_ms: Open time from which on a candle may enter something; None: none may.

    Yields:
        Each question that the rules cannot answer; send back the transition that came of it.

    Returns:
        None when nothing is open and nothing waits.
    """
    restored = state.signal or state.scheduled
    if restored is None:
        return None
    before, events, entry_passed_ms = state, list[Event](), None
    count, newest = 0, None
    for candle in candles:
        window.push(candle)
        if candle[0] <= before.last_candle_ms:
            continue
        count, newest = count + 1, candle
        entries = entries_from_ms is not None and candle[0] >= entries_from_ms
        if state.signal is None and state.scheduled is None:
            continue  # it has ended; the strategy is no part of a recovery
        if not entries and entry_passed_ms is None and state.scheduled is not None:
            entry_passed_ms = _entry_passed(state, candle, window, spec)
        outcome = step(state, candle, window, spec, entries=entries)
        if isinstance(outcome, Question):
            outcome = yield outcome
        if outcome is not None:
            state = outcome.state
            events += outcome.events
    from_ms = before.last_candle_ms + MINUTE_MS
    until_ms = before.last_candle_ms if newest is None else newest[0]
    return Outlook(
        context=spec.context,
        signal=restored,
        verdict=_verdict(before, events, count),
        from_ms=from_ms,
        until_ms=until_ms,
        candles=count,
        missing_minutes=max(0, (until_ms - from_ms) // MINUTE_MS + 1 - count),
        events=tuple(events),
        state=state,
        price=None if newest is None else window.price(),
        newest=newest,
        entry_passed_ms=entry_passed_ms,
    )


def ended(state: State, spec: Spec, candle: Candle, price: float, reason: CloseReason) -> Transition | None:
    """Close what is open at ``price``, or cancel what waits; None when there is neither."""
    return close_now(state, spec, candle, price, reason) or stop_scheduled(state, spec, candle, price)


def closing(outlook: Outlook, spec: Spec, reason: CloseReason) -> Outlook:
    """Return the outlook when what is still open at its end is closed at the newest price; what waits is cancelled."""
    if outlook.newest is None or outlook.price is None:
        return outlook
    transition = ended(outlook.state, spec, outlook.newest, outlook.price, reason)
    if transition is None:
        return outlook
    verdict: Verdict = "cancelled" if outlook.state.signal is None else "closed"
    return msgspec.structs.replace(
        outlook, verdict=verdict, events=outlook.events + transition.events, state=transition.state
    )


def recorded(outlook: Outlook, *, by: str, at_ms: int) -> GapPlan:
    """Return the row that keeps an outlook."""
    return GapPlan(
        context=(outlook.context.exchange_name, outlook.context.symbol, outlook.context.strategy_name),
        signal_id=outlook.signal.id,
        verdict=outlook.verdict,
        from_ms=outlook.from_ms,
        until_ms=outlook.until_ms,
        candles=outlook.candles,
        missing_minutes=outlook.missing_minutes,
        events=tuple(foreseen(event) for event in outlook.events),
        made_by=by,
        made_at_ms=at_ms,
    )


def foreseen(event: Event) -> Foreseen:
    """Return what a plan keeps of an event."""
    return Foreseen(
        number=event.number,
        kind=event.kind,
        at_ms=event.at_ms,
        price=event.price if event.price_close is None else event.price_close,
        reason=event.reason,
        level=event.level,
        both_hit=event.both_hit,
    )


def covers(row: GapPlan, outlook: Outlook, done: int) -> bool:
    """Tell whether a recorded plan said what is still to come of ``outlook``, after event ``done`` was committed."""
    said = tuple(one for one in row.events if one.number > done)
    return bool(said) and said == tuple(foreseen(event) for event in outlook.events)


def replies(rows: Iterable[GapPlan]) -> dict[tuple[str, int], str]:
    """Return what was answered, in recorded plans, about candles that held both: (signal id, open time) → reason."""
    return {
        (row.signal_id, one.at_ms - MINUTE_MS): one.reason
        for row in rows
        for one in row.events
        if one.both_hit and one.reason is not None
    }


def _entry_passed(state: State, candle: Candle, window: Window, spec: Spec) -> int | None:
    """Return the candle's close time if the same step would have entered, had it been allowed to."""
    outcome = step(state, candle, window, spec, entries=True)
    opens = isinstance(outcome, Question) or (outcome is not None and outcome.state.signal is not None)
    return candle[0] + MINUTE_MS if opens else None


def _verdict(before: State, events: Sequence[Event], candles: int) -> Verdict:
    last = events[-1] if events else None
    if last is not None and last.kind == "closed":
        return _CLOSED.get(last.reason or "", "closed")
    if last is not None and last.kind == "cancelled":
        return _CANCELLED.get(last.reason or "", "cancelled")
    if any(event.kind == "opened" for event in events):
        return "activated"
    if not candles:
        return "no_candles"
    if before.signal is None:
        return "still_waiting"
    return "partial" if last is not None else "still_valid"
