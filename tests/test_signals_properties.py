"""The step under any candles and any replies: no state that breaks an invariant, and no chance."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from rule_kit import CONTEXT, T0, Walk, spec

from holdfast.rows import Levels
from holdfast.rules.candles import MINUTE_MS, Candle
from holdfast.rules.signals import MAX_CLOSED_IDS, InvalidSignalError, State

PRICES = st.floats(90.0, 110.0)


@st.composite
def _moves(draw: st.DrawFn) -> list[tuple[Candle, Any, bool, str | None]]:
    """Return what each minute brings: a candle, what the strategy would say, whether it may, what risk would say."""
    moves = []
    minute = 0
    for _ in range(draw(st.integers(1, 60))):
        minute += draw(st.sampled_from([1, 1, 1, 1, 1, 2, 7]))
        first, last = draw(PRICES), draw(PRICES)
        high, low = max(first, last) + draw(st.floats(0, 3)), min(first, last) - draw(st.floats(0, 3))
        candle = Candle(T0 + minute * MINUTE_MS, first, high, low, last, draw(st.floats(0, 5)))
        moves.append(
            (
                candle,
                draw(_replies()),
                draw(st.sampled_from([True] * 5 + [False])),
                draw(st.sampled_from([None] * 4 + ["no"])),
            )
        )
    return moves


@st.composite
def _replies(draw: st.DrawFn) -> dict[str, Any] | None:
    if draw(st.integers(0, 4)) == 0:
        return None
    middle, away = draw(PRICES), draw(st.floats(0.6, 6.0))
    side = 1 if draw(st.booleans()) else -1
    return {
        "position": "long" if side == 1 else "short",
        "priceOpen": draw(st.sampled_from([None, middle])),
        "priceTakeProfit": middle + side * away,
        "priceStopLoss": middle - side * away,
        "minuteEstimatedTime": draw(st.integers(1, 30)),
        "id": draw(st.sampled_from([None, "a", "b", "c"])),
    }


def _walk(moves: list[tuple[Candle, Any, bool, str | None]], both_hit: str, risks: tuple[str, ...]) -> Walk:
    walk = Walk(spec(MINUTE_MS * 3, both_hit=both_hit, risk_names=risks, schedule_await_minutes=10))
    for candle, reply, entries, risk in moves:
        before = walk.state
        try:
            events = walk.step(candle, reply, entries=entries, risk=risk)
        except InvalidSignalError:
            assert walk.state is before
            continue
        _check(before, walk.state, events, candle)
    return walk


def _check(before: State, after: State, events: tuple[Any, ...], candle: Candle) -> None:
    assert after.signal is None or after.scheduled is None
    assert (after is before) == (events == ())
    assert [event.number for event in events] == list(range(before.last_event + 1, after.last_event + 1))
    assert all(event.id == f"{CONTEXT}#{event.number}" for event in events)
    if events:
        assert after.last_candle_ms == candle.open_time_ms
    for told in (after.levels.profit_levels, after.levels.loss_levels):
        assert list(told) == sorted(set(told))
        assert all(level % 10 == 0 and 10 <= level <= 100 for level in told)
    assert after.signal is not None or after.levels == Levels()
    for signal in (after.signal, after.scheduled):
        if signal is not None:
            assert signal.id not in after.closed_ids
            assert signal.pending_at <= candle.open_time_ms + MINUTE_MS
    assert len(after.closed_ids) <= MAX_CLOSED_IDS
    assert after.closed_ids[: len(before.closed_ids)] == before.closed_ids


_BOTH = st.sampled_from(["take_profit", "stop_loss"])
_RISKS = st.sampled_from([(), ("limit",)])


@settings(max_examples=150, deadline=None)
@given(_moves(), _BOTH, _RISKS)
def test_no_candles_and_no_replies_make_a_state_that_breaks_an_invariant(
    moves: list[tuple[Candle, Any, bool, str | None]], both_hit: str, risks: tuple[str, ...]
) -> None:
    walk = _walk(moves, both_hit, risks)
    opened, ended = set[str](), set[str]()
    for event in walk.events:
        if event.kind in ("opened", "scheduled") and not event.activated:
            assert event.signal.id not in opened
            opened.add(event.signal.id)
        if event.kind in ("closed", "cancelled"):
            assert event.signal.id in opened - ended
            ended.add(event.signal.id)


@settings(max_examples=60, deadline=None)
@given(_moves(), _BOTH, _RISKS)
def test_stepping_the_same_again_decides_the_same(
    moves: list[tuple[Candle, Any, bool, str | None]], both_hit: str, risks: tuple[str, ...]
) -> None:
    first, second = _walk(moves, both_hit, risks), _walk(moves, both_hit, risks)
    assert first.events == second.events
    assert first.state == second.state


@settings(max_examples=100, deadline=None)
@given(_moves(), _BOTH, st.data())
def test_a_restart_anywhere_from_the_last_commit_decides_what_an_uninterrupted_run_decides(
    moves: list[tuple[Candle, Any, bool, str | None]], both_hit: str, data: st.DataObject
) -> None:
    whole = _walk(moves, both_hit, ())
    cut = data.draw(st.integers(0, len(moves)))
    before = _walk(moves[:cut], both_hit, ())
    again = Walk(before.spec, before.state)
    # What a restarted driver does: the candles before are pushed, those since the last commit are stepped again.
    for candle, _, _, _ in moves[:cut]:
        again.step(candle, None, entries=False)
    assert again.state == before.state, "what was decided is not decided again"
    for candle, reply, entries, risk in moves[cut:]:
        try:
            again.step(candle, reply, entries=entries, risk=risk)
        except InvalidSignalError:
            continue
    assert before.events + again.events == whole.events
