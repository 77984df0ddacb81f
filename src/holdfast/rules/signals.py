"""The rules as plain functions: what one closed candle does to one context.

``step`` takes the state, the candle and the window that ends with it, and says
what to do: nothing (None), a :class:`Transition`, or a :class:`Question` that
only the driver can settle, whose reply goes to ``answer``. No I/O, no clock, no
chance: live, backtest and recovery run the same functions over the same candles.

Invariants, for every state that comes out:

* a signal is open, or one waits, or neither; never both;
* levels exist only for the open signal, are ascending, and were each told once;
* events are numbered without holes, and an id that closed never opens again;
* ``last_candle_ms`` is the candle that decided, so deciding it again does nothing.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import msgspec

from ..errors import InvalidInputError
from ..names import Context
from ..rows import CancelReason, CloseReason, Event, EventKind, Levels, Position, ScheduledSignal, Signal
from .candles import MINUTE_MS, Candle, Window
from .drafts import InvalidSignalError, SignalDto, draft_signal, plain_note, stored_failures
from .params import Params

__all__ = [
    "MAX_CLOSED_IDS",
    "AskBothHit",
    "AskRisk",
    "AskStrategy",
    "InvalidSignalError",
    "Question",
    "SignalDto",
    "Spec",
    "State",
    "Transition",
    "answer",
    "close_now",
    "draft_signal",
    "expire",
    "plain_note",
    "pnl_percent",
    "progress_percent",
    "step",
    "stop_scheduled",
    "stored_failures",
    "take_over",
    "withdraw",
]

MAX_CLOSED_IDS = 100
"""How many ids that closed or were cancelled a context remembers; the oldest goes first."""

NO_LEVELS = Levels()


class State(msgspec.Struct, frozen=True):
    """Where one context stands. A value: a transition makes a new one."""

    signal: Signal | None = None
    scheduled: ScheduledSignal | None = None
    levels: Levels = NO_LEVELS
    last_candle_ms: int = 0
    last_event: int = 0
    closed_ids: tuple[str, ...] = ()
    """Ids that closed or were cancelled, newest last; at most :data:`MAX_CLOSED_IDS`."""


class Spec(msgspec.Struct, frozen=True):
    """What does not change while a context runs."""

    context: Context
    interval_ms: int
    """Length of the strategy's slots."""
    params: Params
    risk_names: tuple[str, ...] = ()


class Transition(NamedTuple):
    """What was decided: the new state, and the events that tell of it, in order."""

    state: State
    events: tuple[Event, ...]


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """Something that the rules cannot know. Settle it and call :func:`answer`."""

    state: State
    candle: Candle
    spec: Spec
    price: float
    """The price (VWAP) at the candle."""

    @property
    def now_ms(self) -> int:
        """Close time of the candle."""
        return self.candle[0] + MINUTE_MS

    @property
    def symbol(self) -> str:
        """The context's symbol."""
        return self.spec.context.symbol


class AskStrategy(Question, frozen=True, kw_only=True):
    """Ask the strategy. Reply: a mapping, a SignalDto or None."""


class AskRisk(Question, frozen=True, kw_only=True):
    """Ask every risk profile of ``spec.risk_names``, in order. Reply: None (allowed) or the note of the rejection."""

    signal: Signal
    """What would open, or be scheduled (a ScheduledSignal); in an activation, as it would open."""
    activation: bool = False


class AskBothHit(Question, frozen=True, kw_only=True):
    """Ask which was hit first, in a candle that holds both. Reply: ``take_profit`` or ``stop_loss``."""

    signal: Signal


def pnl_percent(position: Position, price_open: float, price_close: float, params: Params) -> float:
    """Return what a trade earned in percent of its entry, slippage on both sides and both fees taken off."""
    slip = params.percent_slippage / 100
    if position == "long":
        opened, closed = price_open * (1 + slip), price_close * (1 - slip)
        moved = (closed - opened) / opened * 100
    else:
        opened, closed = price_open * (1 - slip), price_close * (1 + slip)
        moved = (opened - closed) / opened * 100
    return moved - 2 * params.percent_fee


def progress_percent(signal: Signal, price: float) -> tuple[Literal["profit", "loss"], float] | None:
    """Return how far the price is on its way from entry to target or stop, in percent (at most 100); None at entry."""
    opened = signal.price_open
    moved = price - opened if signal.position == "long" else opened - price
    if moved > 0:
        return "profit", min(100.0, moved / abs(signal.price_take_profit - opened) * 100)
    if moved < 0:
        return "loss", min(100.0, -moved / abs(signal.price_stop_loss - opened) * 100)
    return None


def step(
    state: State, candle: Candle, window: Window, spec: Spec, *, entries: bool = True
) -> Transition | Question | None:
    """Decide what one closed candle does.

    Args:
        state: Where the context stands; not changed.
        candle: A closed one-minute candle; one not newer than ``state.last_candle_ms`` does nothing.
        window: Ends with ``candle`` (the driver pushed it), and began as ``preload_from_ms`` says.
        entries: False forbids asking the strategy, activating and opening: the past is only watched.

    Returns:
        None when nothing changes, what to commit, or what to ask.
    """
    if candle[0] <= state.last_candle_ms:
        return None
    if state.signal is not None:
        return _watch(state, state.signal, candle, window, spec)
    if state.scheduled is not None:
        return _wait(state, state.scheduled, candle, window, spec, entries)
    if not entries:
        return None
    # Only the first candle of a slot asks. Its predecessor lies in another slot, however long ago: the market's
    # candles alone decide, not when a bot started. Slots align to close times. Nearly every candle ends here.
    previous_ms = window.previous_ms
    if previous_ms is not None:
        length_ms = spec.interval_ms
        if (candle[0] + MINUTE_MS) // length_ms == (previous_ms + MINUTE_MS) // length_ms:
            return None
    return AskStrategy(state=state, candle=candle, spec=spec, price=window.price())


def answer(question: Question, reply: Any) -> Transition | Question | None:
    """Go on from a question.

    Raises:
        InvalidSignalError: The strategy proposed what breaks rules; nothing changes, and it is asked again at its
            next slot.
        InvalidInputError: The reply is none that the question allows.
    """
    if isinstance(question, AskStrategy):
        return None if reply is None else _propose(question, reply)
    if isinstance(question, AskRisk):
        if reply is not None and not isinstance(reply, str):
            raise InvalidInputError(f"the reply to AskRisk is None or a note, not {reply!r:.80}")
        return _judge(question, reply)
    if isinstance(question, AskBothHit):
        if reply not in ("take_profit", "stop_loss"):
            raise InvalidInputError(f"on_both_hit must return 'take_profit' or 'stop_loss', not {reply!r:.80}")
        return _close(question, question.signal, reply, both_hit=True)
    raise InvalidInputError(f"not a question: {question!r:.80}")


def stop_scheduled(state: State, spec: Spec, candle: Candle, price: float) -> Transition | None:
    """Cancel the waiting signal because its run was stopped; None when none waits."""
    if state.scheduled is None:
        return None
    return _cancel(Question(state=state, candle=candle, spec=spec, price=price), state.scheduled, "stopped")


def expire(state: State, spec: Spec, candle: Candle, price: float) -> Transition | None:
    """Close the open signal as ``time_expired`` at ``price``, as no more candles come; None when none is open."""
    if state.signal is None:
        return None
    return _close(Question(state=state, candle=candle, spec=spec, price=price), state.signal, "time_expired")


def withdraw(state: State, spec: Spec, candle: Candle, price: float, reason: CancelReason) -> Transition | None:
    """Cancel the open signal because its entry never came to be at the venue; None when none is open."""
    if state.signal is None:
        return None
    return _cancel(Question(state=state, candle=candle, spec=spec, price=price), state.signal, reason)


def close_now(state: State, spec: Spec, candle: Candle, price: float, reason: CloseReason) -> Transition | None:
    """Close the open signal at ``price`` because somebody wants it closed; None when none is open."""
    if state.signal is None:
        return None
    return _close(Question(state=state, candle=candle, spec=spec, price=price), state.signal, reason)


def take_over(state: State, spec: Spec, candle: Candle, signal: Signal) -> Transition:
    """Open ``signal`` as it is, at its own price: a position that came about elsewhere; nothing may be open."""
    return _open(Question(state=state, candle=candle, spec=spec, price=signal.price_open), signal, activated=False)


def _watch(state: State, signal: Signal, candle: Candle, window: Window, spec: Spec) -> Transition | Question | None:
    opened_ms, _, high, low, _, _ = candle
    if opened_ms < signal.pending_at:
        return None  # part of this candle lies before the position did: its high and low are not ours
    if opened_ms + MINUTE_MS - signal.pending_at >= signal.minute_estimated_time * MINUTE_MS:
        return _close(_at(state, candle, window, spec), signal, "time_expired")
    if signal.position == "long":
        target, stop = high >= signal.price_take_profit, low <= signal.price_stop_loss
    else:
        target, stop = low <= signal.price_take_profit, high >= signal.price_stop_loss
    if target and stop:
        decided = spec.params.both_hit
        if decided == "undecided":
            return AskBothHit(state=state, candle=candle, spec=spec, price=window.price(), signal=signal)
        return _close(_at(state, candle, window, spec), signal, decided, both_hit=True)
    if target:
        return _close(_at(state, candle, window, spec), signal, "take_profit")
    if stop:
        return _close(_at(state, candle, window, spec), signal, "stop_loss")
    return _milestones(state, signal, candle, window, spec)


def _milestones(state: State, signal: Signal, candle: Candle, window: Window, spec: Spec) -> Transition | None:
    progress = progress_percent(signal, window.price())
    if progress is None or progress[1] < 10.0:
        return None
    side, percent = progress
    reached = int(percent // 10) * 10
    told = state.levels.profit_levels if side == "profit" else state.levels.loss_levels
    if told and told[-1] >= reached:
        return None
    fresh = tuple(level for level in range(10, reached + 1, 10) if level not in told)
    if not fresh:
        return None  # levels that were written by hand may stand in any order
    if side == "profit":
        levels = msgspec.structs.replace(state.levels, profit_levels=told + fresh)
    else:
        levels = msgspec.structs.replace(state.levels, loss_levels=told + fresh)
    at = _at(state, candle, window, spec)
    kind: EventKind = "partial_profit" if side == "profit" else "partial_loss"
    earned = pnl_percent(signal.position, signal.price_open, at.price, spec.params)
    events = tuple(
        _event(at, kind, signal, nth=nth, level=level, pnl_percent=earned) for nth, level in enumerate(fresh, 1)
    )
    return _transition(at, events, signal=signal, levels=levels)


def _wait(
    state: State, scheduled: ScheduledSignal, candle: Candle, window: Window, spec: Spec, entries: bool
) -> Transition | Question | None:
    opened_ms, _, high, low, _, _ = candle
    if opened_ms < scheduled.scheduled_at:
        return None
    if opened_ms + MINUTE_MS - scheduled.scheduled_at >= spec.params.schedule_await_minutes * MINUTE_MS:
        return _cancel(_at(state, candle, window, spec), scheduled, "timeout")
    if scheduled.position == "long":
        stop, entry = low <= scheduled.price_stop_loss, low <= scheduled.price_open
    else:
        stop, entry = high >= scheduled.price_stop_loss, high >= scheduled.price_open
    if stop:
        return _cancel(_at(state, candle, window, spec), scheduled, "stop_loss")
    if not (entry and entries):
        return None
    signal = _opened_from(scheduled, opened_ms + MINUTE_MS)
    if spec.risk_names:
        return AskRisk(state=state, candle=candle, spec=spec, price=window.price(), signal=signal, activation=True)
    return _open(_at(state, candle, window, spec), signal, activated=True)


def _propose(question: AskStrategy, reply: object) -> Transition | Question:
    state, spec = question.state, question.spec
    signal = draft_signal(
        reply, spec.context, now_ms=question.now_ms, price=question.price, params=spec.params,
        closed_ids=state.closed_ids,
    )  # fmt: skip
    if spec.risk_names:
        return AskRisk(state=state, candle=question.candle, spec=spec, price=question.price, signal=signal)
    return _enter(question, signal)


def _judge(question: AskRisk, note: str | None) -> Transition:
    if note is None:
        if question.activation:
            return _open(question, question.signal, activated=True)
        return _enter(question, question.signal)
    if question.activation:
        return _cancel(question, cast("ScheduledSignal", question.state.scheduled), "risk")
    return _transition(question, (_event(question, "rejected", question.signal, reason=note),))


def _enter(at: Question, signal: Signal) -> Transition:
    if isinstance(signal, ScheduledSignal):
        return _transition(at, (_event(at, "scheduled", signal),), scheduled=signal)
    return _open(at, signal, activated=False)


def _open(at: Question, signal: Signal, *, activated: bool) -> Transition:
    return _transition(at, (_event(at, "opened", signal, activated=activated),), signal=signal)


def _close(at: Question, signal: Signal, reason: CloseReason, *, both_hit: bool = False) -> Transition:
    if reason == "take_profit":
        closed = signal.price_take_profit
    elif reason == "stop_loss":
        closed = signal.price_stop_loss
    else:
        closed = at.price
    event = _event(
        at, "closed", signal, reason=reason, price_close=closed, both_hit=both_hit,
        pnl_percent=pnl_percent(signal.position, signal.price_open, closed, at.spec.params),
    )  # fmt: skip
    return _transition(at, (event,), used_id=signal.id)


def _cancel(at: Question, scheduled: Signal, reason: CancelReason) -> Transition:
    return _transition(at, (_event(at, "cancelled", scheduled, reason=reason),), used_id=scheduled.id)


def _at(state: State, candle: Candle, window: Window, spec: Spec) -> Question:
    return Question(state=state, candle=candle, spec=spec, price=window.price())


def _opened_from(scheduled: Signal, now_ms: int) -> Signal:
    plain = {name: getattr(scheduled, name) for name in Signal.__struct_fields__}
    return Signal(**{**plain, "pending_at": now_ms, "is_scheduled": False})


def _event(at: Question, kind: EventKind, signal: Signal, *, nth: int = 1, **more: Any) -> Event:
    number = at.state.last_event + nth
    if type(signal) is not Signal:  # an event read back from storage holds a plain Signal: so does a new one
        signal = Signal(**{name: getattr(signal, name) for name in Signal.__struct_fields__})
    return Event(
        id=f"{at.spec.context}#{number}", number=number, kind=kind, at_ms=at.now_ms, candle_ms=at.candle[0],
        signal=signal, price=at.price, **more,
    )  # fmt: skip


def _transition(
    at: Question,
    events: tuple[Event, ...],
    *,
    signal: Signal | None = None,
    scheduled: ScheduledSignal | None = None,
    levels: Levels = NO_LEVELS,
    used_id: str | None = None,
) -> Transition:
    before = at.state
    closed_ids = before.closed_ids if used_id is None else (*before.closed_ids, used_id)[-MAX_CLOSED_IDS:]
    state = State(
        signal, scheduled, levels,
        max(at.candle[0], before.last_candle_ms), before.last_event + len(events), closed_ids,
    )  # fmt: skip
    return Transition(state, events)
