"""Drafts: how a strategy's reply becomes a signal, or is refused with every reason at once."""

from __future__ import annotations

import decimal
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rule_kit import CONTEXT, LONG, SHORT

from holdfast.rows import ScheduledSignal, Signal
from holdfast.rules.drafts import InvalidSignalError, SignalDto, draft_signal, plain_note, stored_failures
from holdfast.rules.params import Params

NOW = 1_700_000_100_000


def draft(reply: Any, price: float = 43_000.0, **more: Any) -> Signal:
    """Draft at a price of 43,000."""
    return draft_signal(reply, CONTEXT, now_ms=NOW, price=price, params=Params(**more))


def refused(reply: Any, price: float = 43_000.0, **more: Any) -> str:
    """Return why it is refused."""
    with pytest.raises(InvalidSignalError) as raised:
        draft(reply, price, **more)
    return str(raised.value)


def test_a_mapping_with_either_spelling_and_a_dto_give_the_same_signal() -> None:
    snake = {
        "position": "long",
        "price_take_profit": 44_000,
        "price_stop_loss": 42_000,
        "minute_estimated_time": 60.0,
    }
    assert draft(LONG) == draft(snake) == draft(SignalDto(**snake))  # type: ignore[arg-type]
    signal = draft(snake)
    assert type(signal.price_take_profit) is float
    assert type(signal.minute_estimated_time) is int


def test_an_explicit_none_does_not_clobber_a_default() -> None:
    bare = {**LONG, "id": None, "priceOpen": None, "note": None, "extra": None, "symbol": None}
    assert draft(bare) == draft(LONG)
    assert draft(LONG).note == ""


def test_members_of_your_own_are_kept_for_market_and_limit_entries_alike() -> None:
    for entry in ({}, {"priceOpen": 42_500.0}):
        signal = draft({**LONG, **entry, "my_tag": [1, "x"], "extra": {"deep": {"y": None}}})
        assert signal.extra == {"my_tag": [1, "x"], "deep": {"y": None}}
    assert type(draft({**LONG, "priceOpen": 42_500.0})) is ScheduledSignal


def test_times_and_flags_are_ours_to_set() -> None:
    signal = draft({**LONG, "scheduledAt": 1, "pendingAt": 2, "_isScheduled": True})
    assert (signal.scheduled_at, signal.pending_at, signal.is_scheduled) == (NOW, NOW, False)


def test_all_failures_are_told_at_once() -> None:
    with pytest.raises(InvalidSignalError) as raised:
        draft({"position": "up", "priceTakeProfit": -1, "priceStopLoss": math.nan, "id": "", "note": 7, "my": {1}})
    told = " | ".join(raised.value.failures)
    for part in ("position", "price_take_profit", "price_stop_loss", "minute_estimated_time", "id is", "note", "my"):
        assert part in told
    assert len(raised.value.failures) == 7


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"position": None}, "position is missing"),
        ({"priceTakeProfit": None}, "price_take_profit is missing"),
        ({"priceTakeProfit": "44000"}, "price_take_profit"),
        ({"priceTakeProfit": True}, "price_take_profit"),
        ({"priceTakeProfit": decimal.Decimal(44_000)}, "price_take_profit"),
        ({"priceTakeProfit": math.inf}, "price_take_profit"),
        ({"priceStopLoss": 0}, "price_stop_loss"),
        ({"priceOpen": -0.0}, "price_open"),
        ({"priceOpen": 10**400}, "price_open"),
        ({"minuteEstimatedTime": 0}, "minute_estimated_time"),
        ({"minuteEstimatedTime": 1.5}, "minute_estimated_time"),
        ({"minuteEstimatedTime": math.inf}, "minute_estimated_time"),
        ({"minuteEstimatedTime": math.nan}, "minute_estimated_time"),
        ({"minuteEstimatedTime": 1441}, "max_signal_lifetime_minutes"),
        ({"id": 7}, "id is 7"),
        ({"id": "\ud800"}, "surrogate"),
        ({"note": "\ud800"}, "surrogate"),
        ({"symbol": "ETHUSDT"}, "symbol"),
        ({"exchangeName": "bybit"}, "exchange_name"),
        ({"strategy_name": "other"}, "strategy_name"),
        ({"price_take_profit": 44_001.0}, "given twice"),
        ({"extra": 7}, "extra must be a mapping"),
        ({"extra": {"position": "short"}}, "rename"),
        ({"_sum": "x"}, "rename"),
        ({7: "x"}, "not text"),
        ({"mine": math.nan}, "finite"),
        ({"mine": object()}, "object"),
        ({"mine": "x" * 1_100_000}, "bytes"),
        ({"note": "x" * 1_100_000}, "bytes"),
    ],
)
def test_each_fault_is_named(change: dict[Any, Any], told: str) -> None:
    assert told in refused({**LONG, **change})


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ({**LONG, "priceTakeProfit": 42_900.0}, "a long needs"),
        ({**LONG, "priceStopLoss": 43_100.0}, "a long needs"),
        ({**SHORT, "priceTakeProfit": 43_100.0}, "a short needs"),
        ({**SHORT, "priceStopLoss": 42_900.0}, "a short needs"),
        ({**LONG, "priceTakeProfit": 43_200.0}, "price_take_profit is 0.4651 %"),
        ({**LONG, "priceStopLoss": 42_800.0}, "price_stop_loss is 0.4651 %"),
        ({**LONG, "priceStopLoss": 30_000.0}, "at most 20.0 %"),
        ({**LONG, "priceOpen": 42_000.0}, "a long needs"),
        ({**LONG, "priceOpen": 44_000.0}, "a long needs"),
    ],
)
def test_prices_must_be_in_order_and_far_enough_apart(reply: dict[str, Any], told: str) -> None:
    assert told in refused(reply)


def test_a_distance_of_zero_switches_its_check_off() -> None:
    off = {"min_takeprofit_distance_percent": 0.0, "min_stoploss_distance_percent": 0.0}
    off["max_stoploss_distance_percent"] = 0.0
    draft({**LONG, "priceTakeProfit": 43_000.1, "priceStopLoss": 42_999.9}, **off)
    draft({**LONG, "priceStopLoss": 1.0}, **off)


def test_a_limit_that_opens_at_once_must_not_be_past_its_target_or_stop() -> None:
    assert "as soon as it opened" in refused({**LONG, "priceOpen": 43_000.0}, price=41_900.0)
    assert "as soon as it opened" in refused({**SHORT, "priceOpen": 43_000.0}, price=44_100.0)
    assert draft({**LONG, "priceOpen": 43_000.0}, price=42_100.0).price_open == 43_000.0


@pytest.mark.parametrize("reply", [7, "long", [("position", "long")], object()])
def test_what_is_no_mapping_is_refused(reply: Any) -> None:
    assert "a mapping or a SignalDto" in refused(reply)


def test_an_id_that_was_used_is_refused() -> None:
    with pytest.raises(InvalidSignalError, match="never opens again"):
        draft_signal({**LONG, "id": "x"}, CONTEXT, now_ms=NOW, price=43_000.0, params=Params(), closed_ids=("x",))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("", ""),
        ("plain", "plain"),
        ("my_snake_case and __init__ stay, x_1 too", "my_snake_case and init stay, x_1 too"),
        ("**bold** and *thin* and _thin_ and __bold__", "bold and thin and thin and bold"),
        ("# Title\n\n- one\n- two\n1. three", "Title one two three"),
        ("see [the page](https://x.y/z_a) and ![pic](a.png)", "see the page and pic"),
        ("`code_here` and ~~gone~~", "code_here and gone"),
        ("```python\nx = 1\n```", "x = 1"),
        ("> quoted\n---\nafter", "quoted after"),
        ("2 * 3 * 4 = 24", "2 * 3 * 4 = 24"),
        ("a\t b\r\n c\u2028d", "a b c d"),
        ("price_open > price_stop_loss", "price_open > price_stop_loss"),
    ],
)
def test_a_note_loses_its_markdown_but_not_its_words(text: str, plain: str) -> None:
    assert plain_note(text) == plain


@given(st.text(max_size=200))
def test_any_note_becomes_one_line(text: str) -> None:
    assert len(plain_note(text).splitlines()) <= 1


@given(st.lists(st.from_regex(r"[a-z]{1,5}(_[a-z0-9]{1,5}){1,3}", fullmatch=True), min_size=1, max_size=5))
def test_snake_case_words_survive_in_any_company(words: list[str]) -> None:
    assert plain_note(" ".join(words)) == " ".join(words)


def test_a_stored_signal_that_cannot_be_watched_is_told() -> None:
    good = draft(LONG)
    assert stored_failures(good) == []
    bad = msgspec.structs.replace(good, price_take_profit=math.nan, pending_at=0, symbol="", minute_estimated_time=0)
    assert len(stored_failures(bad)) == 5


@given(
    st.dictionaries(
        st.sampled_from(sorted(LONG)) | st.sampled_from(["id", "note", "priceOpen", "extra", "mine", "symbol"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers()),
    )
)
def test_whatever_a_strategy_returns_gives_a_signal_or_one_clear_refusal(change: dict[str, Any]) -> None:
    try:
        signal = draft({**LONG, **change})
    except InvalidSignalError as error:
        assert error.failures
    else:
        assert stored_failures(signal) == []
