"""The step: what one closed candle does."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from rule_kit import CONTEXT, LONG, SHORT, T0, Walk, at, flat, spec

from holdfast.domains import decode, encode, event_key
from holdfast.errors import InvalidInputError
from holdfast.rows import Levels, ScheduledSignal, Signal
from holdfast.rules.candles import MINUTE_MS, Candle, Window
from holdfast.rules.params import Params
from holdfast.rules.signals import (
    MAX_CLOSED_IDS,
    AskBothHit,
    AskRisk,
    AskStrategy,
    InvalidSignalError,
    State,
    answer,
    expire,
    pnl_percent,
    progress_percent,
    step,
    stop_scheduled,
)

LIMIT = {**LONG, "priceOpen": 42_500.0}


def opened(reply: dict[str, Any] = LONG, **more: Any) -> Walk:
    """Return a walk with the signal open since the close of minute 0."""
    walk = Walk(spec(**more))
    walk.step(at(0), reply)
    assert walk.state.signal is not None
    return walk


def waiting(reply: dict[str, Any] = LIMIT, **more: Any) -> Walk:
    """Return a walk with the signal waiting since the close of minute 0."""
    walk = Walk(spec(**more))
    walk.step(at(0), reply)
    assert walk.state.scheduled is not None
    return walk


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("position", "entry", "leave", "percent"),
    [
        ("long", 50_000, 51_000, 1.596204),
        ("short", 50_000, 49_000, 1.603804),
        ("long", 50_000, 50_000, -0.399800),
        ("short", 50_000, 50_000, -0.400200),
    ],
)
def test_pnl_has_the_reference_values(position: Any, entry: float, leave: float, percent: float) -> None:
    assert pnl_percent(position, entry, leave, Params()) == pytest.approx(percent, abs=5e-7)


def test_progress_is_a_share_of_the_way_to_target_or_stop() -> None:
    signal = opened().state.signal
    assert signal is not None
    assert progress_percent(signal, 43_250.0) == ("profit", 25.0)
    assert progress_percent(signal, 42_500.0) == ("loss", 50.0)
    assert progress_percent(signal, 99_000.0) == ("profit", 100.0)
    assert progress_percent(signal, 43_000.0) is None
    mirrored = msgspec.structs.replace(signal, position="short", price_take_profit=42_000.0, price_stop_loss=44_000.0)
    assert progress_percent(mirrored, 42_750.0) == ("profit", 25.0)


# ---------------------------------------------------------------------- asking


def test_a_strategy_is_asked_on_the_first_candle_of_each_slot_only() -> None:
    walk = Walk()
    for candle in flat(range(23)):
        walk.step(candle)
    assert walk.asked == [0, 5, 10, 15, 20]


def test_in_a_thin_market_the_first_candle_of_a_slot_may_come_late() -> None:
    walk = Walk()
    for minute in (0, 1, 7, 8, 21, 24, 25):
        walk.step(at(minute))
    assert walk.asked == [0, 7, 21, 25]


@pytest.mark.parametrize("restart", range(1, 30))
def test_a_restarted_bot_asks_on_the_same_candles_as_an_uninterrupted_one(restart: int) -> None:
    minutes = [0, 1, 2, 4, 6, 9, 11, 13, 14, 15, 21, 22, 29, 30, 31]
    whole = Walk()
    for minute in minutes:
        whole.step(at(minute))
    again = Walk()
    for minute in minutes:
        if restart - 5 <= minute < restart:
            again.window.push(at(minute))
        elif minute >= restart:
            again.step(at(minute))
    assert again.asked == [minute for minute in whole.asked if minute >= restart]


def test_without_entries_nobody_is_asked() -> None:
    walk = Walk()
    walk.step(at(0), LONG, entries=False)
    assert (walk.asked, walk.events) == ([], [])


def test_while_something_is_open_or_waits_nobody_is_asked() -> None:
    for walk in (opened(), waiting()):
        for candle in flat(range(1, 20)):
            walk.step(candle, LONG)
        assert walk.asked == [0]


def test_a_strategy_that_wants_nothing_changes_nothing() -> None:
    walk = Walk()
    assert walk.step(at(0), None) == ()
    assert walk.state == State()


def test_an_invalid_proposal_changes_nothing_and_the_next_slot_is_asked() -> None:
    walk = Walk()
    with pytest.raises(InvalidSignalError):
        walk.step(at(0), {**LONG, "priceStopLoss": 50_000.0})
    assert walk.state == State()
    for candle in flat(range(1, 6)):
        walk.step(candle, LONG)
    assert walk.asked == [0, 5]
    assert walk.kinds() == ["opened"]


def test_a_candle_that_was_decided_is_not_decided_again() -> None:
    walk = opened()
    before = walk.state
    assert walk.step(at(0, high=99_000.0), SHORT) == ()
    assert walk.step(at(-1, high=99_000.0), SHORT) == ()
    assert walk.state is before


# ---------------------------------------------------------------------- entry


def test_a_market_entry_opens_at_the_price_of_the_candle_that_asked() -> None:
    (event,) = opened().events
    assert (event.kind, event.id, event.number) == ("opened", "binance/BTCUSDT/trend#1", 1)
    assert (event.at_ms, event.candle_ms, event.price) == (T0 + MINUTE_MS, T0, 43_000.0)
    signal = event.signal
    assert signal.price_open == 43_000.0
    assert signal.id == f"binance:BTCUSDT:trend:{T0 + MINUTE_MS}"
    assert signal.scheduled_at == signal.pending_at == T0 + MINUTE_MS
    assert not event.activated


def test_a_limit_that_is_not_reached_waits() -> None:
    walk = waiting()
    (event,) = walk.events
    assert event.kind == "scheduled"
    assert event.signal.is_scheduled
    assert isinstance(walk.state.scheduled, ScheduledSignal)
    assert walk.state.signal is None


@pytest.mark.parametrize(
    ("reply", "entry"),
    [({**LONG, "priceOpen": 43_100.0}, 43_100.0), ({**SHORT, "priceOpen": 42_900.0}, 42_900.0)],
)
def test_a_limit_that_is_reached_already_opens_at_its_own_price(reply: dict[str, Any], entry: float) -> None:
    walk = opened(reply)
    assert walk.state.signal is not None
    assert walk.state.signal.price_open == entry


# ---------------------------------------------------------------------- exits


@pytest.mark.parametrize(
    ("reply", "candle", "reason", "price"),
    [
        (LONG, at(1, high=44_000.0), "take_profit", 44_000.0),
        (LONG, at(1, high=60_000.0), "take_profit", 44_000.0),
        (LONG, at(1, low=42_000.0), "stop_loss", 42_000.0),
        (LONG, at(1, low=1_000.0), "stop_loss", 42_000.0),
        (SHORT, at(1, low=42_000.0), "take_profit", 42_000.0),
        (SHORT, at(1, high=44_000.0), "stop_loss", 44_000.0),
    ],
)
def test_target_and_stop_close_at_their_exact_price(
    reply: dict[str, Any], candle: Candle, reason: str, price: float
) -> None:
    walk = opened(reply)
    (event,) = walk.step(candle)
    assert (event.kind, event.reason, event.price_close) == ("closed", reason, price)
    assert event.pnl_percent == pnl_percent(event.signal.position, 43_000.0, price, Params())
    assert walk.state.signal is None
    assert not event.both_hit


def test_the_candle_that_opens_does_not_close() -> None:
    walk = Walk()
    walk.step(at(0, high=44_500.0, low=41_500.0), {**LONG, "priceOpen": 43_000.0})
    assert walk.kinds() in (["opened"], ["scheduled"])
    assert walk.state.signal is not None or walk.state.scheduled is not None


def test_expiry_comes_before_target_and_closes_at_the_price() -> None:
    walk = opened({**LONG, "minuteEstimatedTime": 10})
    for candle in flat(range(1, 10)):
        walk.step(candle)
    assert walk.state.signal is not None
    (event,) = walk.step(at(10, 43_100.0, high=45_000.0))
    assert event.reason == "time_expired"
    assert event.price_close == event.price == walk.window.price()
    assert event.at_ms - event.signal.pending_at == 10 * MINUTE_MS


@pytest.mark.parametrize("decided", ["take_profit", "stop_loss"])
def test_both_hit_decides_a_candle_that_holds_both_and_the_event_says_so(decided: str) -> None:
    (event,) = opened(both_hit=decided).step(at(1, high=44_000.0, low=42_000.0))
    assert (event.reason, event.both_hit) == (decided, True)


def test_undecided_asks_which_came_first() -> None:
    walk = opened(both_hit="undecided")
    walk.window.push(at(1, high=44_000.0, low=42_000.0))
    question = step(walk.state, at(1, high=44_000.0, low=42_000.0), walk.window, walk.spec)
    assert isinstance(question, AskBothHit)
    with pytest.raises(InvalidInputError, match="on_both_hit"):
        answer(question, "neither")
    (event,) = Walk(walk.spec, walk.state).step(at(1, high=44_000.0, low=42_000.0), "stop_loss")
    assert (event.reason, event.both_hit) == ("stop_loss", True)


def test_a_candle_that_began_before_the_position_cannot_close_it() -> None:
    signal = opened().state.signal
    assert signal is not None
    state = State(signal=msgspec.structs.replace(signal, pending_at=T0 + 90_000))
    walk = Walk(state=state)
    assert walk.step(at(1, high=50_000.0)) == ()
    assert walk.step(at(2, high=50_000.0))[0].reason == "take_profit"


def test_exits_are_found_without_entries_too() -> None:
    assert opened().step(at(1, high=44_000.0), entries=False)[0].kind == "closed"


def test_an_id_that_closed_never_opens_again_and_the_oldest_is_forgotten_first() -> None:
    walk = opened({**LONG, "id": "mine"})
    walk.step(at(1, high=44_000.0))
    assert walk.state.closed_ids == ("mine",)
    with pytest.raises(InvalidSignalError, match="mine"):
        walk.step(at(5), {**LONG, "id": "mine"})
    full = State(closed_ids=tuple(map(str, range(MAX_CLOSED_IDS))))
    again = Walk(state=full)
    again.step(at(0), {**LONG, "id": "new"})
    again.step(at(1, low=42_000.0))
    assert again.state.closed_ids == (*map(str, range(1, MAX_CLOSED_IDS)), "new")


# ---------------------------------------------------------------------- waiting


def test_a_waiting_signal_activates_when_its_price_is_touched() -> None:
    walk = waiting()
    assert walk.step(at(1, low=42_501.0)) == ()
    (event,) = walk.step(at(2, low=42_500.0))
    assert (event.kind, event.activated) == ("opened", True)
    signal = walk.state.signal
    assert type(signal) is Signal
    assert (signal.price_open, signal.is_scheduled) == (42_500.0, False)
    assert (signal.scheduled_at, signal.pending_at) == (T0 + MINUTE_MS, T0 + 3 * MINUTE_MS)
    assert walk.state.scheduled is None


def test_the_stop_cancels_before_the_entry_activates() -> None:
    short = waiting({**SHORT, "priceOpen": 43_500.0})
    assert short.step(at(1, high=43_499.0)) == ()
    assert short.step(at(2, high=43_500.0))[0].activated
    for reply, candle in (
        (LIMIT, at(1, low=42_000.0)),
        ({**SHORT, "priceOpen": 43_500.0}, at(1, high=44_000.0)),
    ):
        walk = waiting(reply)
        walk.step(candle)
        assert walk.kinds() == ["scheduled", "cancelled stop_loss"]
        assert (walk.state.signal, walk.state.scheduled) == (None, None)


def test_the_timeout_comes_before_stop_and_entry() -> None:
    walk = waiting(schedule_await_minutes=3)
    walk.step(at(1))
    walk.step(at(2))
    walk.step(at(3, low=42_000.0))
    assert walk.kinds() == ["scheduled", "cancelled timeout"]
    assert walk.events[-1].at_ms - walk.events[0].at_ms == 3 * MINUTE_MS


def test_without_entries_a_waiting_signal_is_cancelled_but_not_activated() -> None:
    walk = waiting()
    assert walk.step(at(1, low=42_400.0), entries=False) == ()
    assert walk.step(at(2, low=41_000.0), entries=False)[0].reason == "stop_loss"


def test_an_id_that_was_cancelled_is_used_up_too() -> None:
    walk = waiting({**LIMIT, "id": "mine"})
    walk.step(at(1, low=41_000.0))
    assert walk.state.closed_ids == ("mine",)


def test_stopping_cancels_what_waits_and_nothing_else() -> None:
    walk = waiting()
    stopped = stop_scheduled(walk.state, walk.spec, at(0), 43_000.0)
    assert stopped is not None
    assert (stopped.events[0].kind, stopped.events[0].reason) == ("cancelled", "stopped")
    assert stop_scheduled(opened().state, walk.spec, at(0), 43_000.0) is None


def test_running_out_of_candles_expires_what_is_open_and_nothing_else() -> None:
    walk = opened()
    ended = expire(walk.state, walk.spec, at(3), 43_210.0)
    assert ended is not None
    assert (ended.events[0].reason, ended.events[0].price_close) == ("time_expired", 43_210.0)
    assert expire(waiting().state, walk.spec, at(3), 43_210.0) is None


# ---------------------------------------------------------------------- risk


@pytest.mark.parametrize("reply", [LONG, LIMIT])
def test_a_rejected_proposal_is_an_event_and_the_candle_is_decided(reply: dict[str, Any]) -> None:
    walk = Walk(spec(risk_names=("limit",)))
    (event,) = walk.step(at(0), reply, risk="too many")
    assert (event.kind, event.reason) == ("rejected", "too many")
    assert event.signal.price_take_profit == 44_000.0
    assert walk.state == State(last_candle_ms=T0, last_event=1)
    assert walk.step(at(0), reply) == ()


def test_an_allowed_proposal_opens_or_waits() -> None:
    for reply, kind in ((LONG, "opened"), (LIMIT, "scheduled")):
        walk = Walk(spec(risk_names=("limit",)))
        walk.step(at(0), reply)
        assert walk.kinds() == [kind]


def test_an_activation_is_checked_again_and_its_rejection_cancels() -> None:
    walk = waiting(risk_names=("limit",))
    walk.step(at(1, low=42_400.0), risk="too many")
    assert walk.kinds() == ["scheduled", "cancelled risk"]
    assert walk.state.scheduled is None
    allowed = waiting(risk_names=("limit",))
    allowed.step(at(1, low=42_400.0))
    assert allowed.kinds() == ["scheduled", "opened"]


def test_a_risk_question_shows_the_signal_as_it_would_open() -> None:
    walk = waiting(risk_names=("limit",))
    walk.window.push(at(1, low=42_400.0))
    question = step(walk.state, at(1, low=42_400.0), walk.window, walk.spec)
    assert isinstance(question, AskRisk)
    assert question.activation
    assert (question.signal.pending_at, question.now_ms, question.symbol) == (
        question.now_ms,
        question.now_ms,
        "BTCUSDT",
    )
    with pytest.raises(InvalidInputError, match="note"):
        answer(question, True)


# ---------------------------------------------------------------------- levels


def test_a_jump_tells_every_level_that_it_skipped_in_order() -> None:
    walk = opened({**LONG}, avg_price_candles_count=1)
    events = walk.step(at(1, 43_350.0))
    assert [(event.kind, event.level) for event in events] == [("partial_profit", n) for n in (10, 20, 30)]
    assert [event.number for event in events] == [2, 3, 4]
    assert walk.state.levels == Levels(profit_levels=(10, 20, 30))
    assert walk.step(at(2, 43_350.0)) == ()


def test_levels_follow_the_price_not_the_wicks() -> None:
    assert opened(avg_price_candles_count=1).step(Candle(T0 + MINUTE_MS, 43_000, 43_900, 42_100, 43_000, 1.0)) == ()


def test_each_side_has_its_own_levels_and_tells_each_once() -> None:
    walk = opened(avg_price_candles_count=1)
    for minute, price in enumerate((43_100.0, 42_800.0, 43_150.0, 42_790.0, 43_200.0), 1):
        walk.step(at(minute, price))
    told = [(event.kind.removeprefix("partial_"), event.level) for event in walk.events[1:]]
    assert told == [("profit", 10), ("loss", 10), ("loss", 20), ("profit", 20)]


def test_levels_end_with_their_signal() -> None:
    walk = opened(avg_price_candles_count=1)
    walk.step(at(1, 43_500.0))
    walk.step(at(2, high=44_000.0))
    assert walk.state.levels == Levels()


# ---------------------------------------------------------------------- form


def test_every_event_can_be_stored_and_read_back_as_it_was() -> None:
    walk = waiting({**LIMIT, "my_tag": {"deep": [1, 2.5, None]}, "note": "why"}, avg_price_candles_count=1)
    for candle in (at(1, low=42_500.0), at(2, 43_300.0), at(3, high=44_000.0)):
        walk.step(candle)
    for event in walk.events:
        key = event_key(CONTEXT, event.number)
        assert decode(key, encode(key, event)) == event
    assert walk.events[-1].signal.extra == {"my_tag": {"deep": [1, 2.5, None]}}


def test_the_same_candles_and_replies_decide_the_same() -> None:
    def run() -> list[Any]:
        walk = waiting(avg_price_candles_count=2)
        for candle in (at(1, 42_450.0), at(2, 43_300.0), at(3, 43_400.0), at(4, high=44_000.0)):
            walk.step(candle)
        return walk.events

    assert run() == run()


def test_a_quiet_candle_computes_no_price() -> None:
    class NoPrice(Window):
        def price(self) -> float:
            raise AssertionError("a price was computed")

    window = NoPrice(5)
    window.push(at(0))
    window.push(at(1))
    assert step(State(), at(1), window, spec()) is None


def test_questions_carry_what_their_answer_needs() -> None:
    window = Window(5)
    window.push(at(0))
    question = step(State(), at(0), window, spec())
    assert isinstance(question, AskStrategy)
    assert (question.now_ms, question.symbol, question.price) == (T0 + MINUTE_MS, "BTCUSDT", 43_000.0)
    with pytest.raises(InvalidInputError, match="not a question"):
        answer("x", None)  # type: ignore[arg-type]
