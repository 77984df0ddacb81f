"""Sizing: how much to trade. Every number of the tables was calculated by hand, as its comment says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.engine.context import Moment, at, get_position_size
from holdfast.engine.registry import Registry
from holdfast.engine.sizings import sized_quantity
from holdfast.engine.specs import ExchangeSpec, plain_number
from holdfast.errors import InvalidInputError
from holdfast.rules.candles import Candle
from holdfast.rules.params import Params
from holdfast.rules.sizing import Quote, Sizing, average_true_range, checked_sizing, position_size

MINUTE_MS = 60_000


def sizing(method: str = "fixed-percentage", **parameters: Any) -> Sizing:
    if method != "kelly-criterion":
        parameters = {"risk_percentage": 1, **parameters}
    return checked_sizing("s", method, parameters)


def quote(balance: float = 10_000, price: float = 100, **more: Any) -> Quote:
    return Quote(account_balance=balance, price_open=price, **more)


FIXED = [
    # balance, risk %, open, stop, caps → quantity; by hand: balance * risk / 100 ÷ |open - stop|, then the caps
    (10_000, 2, 50_000, 49_000, {}, 0.2),  # 200 ÷ 1,000
    (10_000, 2, 50_000, 51_000, {}, 0.2),  # short: the same distance
    (10_000, 1, 100, 95, {}, 20.0),  # 100 ÷ 5
    (500, 0.5, 0.25, 0.2, {}, 50.0),  # 2.5 ÷ 0.05
    (0, 2, 50_000, 49_000, {}, 0.0),  # nothing to risk
    (10_000, 2, 50_000, 49_000, {"max_position_percentage": 50}, 0.1),  # 5,000 ÷ 50,000 = 0.1 < 0.2
    (10_000, 2, 50_000, 49_000, {"max_position_percentage": 100}, 0.2),  # 10,000 ÷ 50,000 = 0.2, just so
    (10_000, 2, 50_000, 49_000, {"max_position_size": 0.15}, 0.15),  # 0.2 cut to 0.15
    (10_000, 2, 50_000, 49_000, {"min_position_size": 0.3}, 0.3),  # 0.2 raised to 0.3
    # percent first (0.1), then the least size raises it again (0.12): the documents' order
    (10_000, 2, 50_000, 49_000, {"max_position_percentage": 50, "min_position_size": 0.12}, 0.12),
    # percent (0.1), least (0.12), and the greatest has the last word: least may not be above it
    (10_000, 2, 50_000, 49_000, {"max_position_percentage": 50, "min_position_size": 0.12, "max_position_size": 0.12},
     0.12),
    (10_000, 20, 50_000, 49_000, {"min_position_size": 0.01, "max_position_size": 1}, 1.0),  # 2 cut to 1
]  # fmt: skip

KELLY = [
    # balance, open, win rate, win/loss, parameters → quantity; by hand: W - (1 - W) ÷ R is the fraction,
    # times the multiplier, times balance ÷ open
    (10_000, 50_000, 0.6, 2, {}, 0.02),  # 0.6 - 0.4 ÷ 2 = 0.4; * 0.25 = 0.1; 1,000 ÷ 50,000
    (10_000, 50_000, 0.5, 2, {}, 0.0125),  # 0.5 - 0.25 = 0.25; * 0.25 = 0.0625; 625 ÷ 50,000
    (10_000, 100, 0.75, 1, {"kelly_multiplier": 1}, 50.0),  # 0.75 - 0.25 = 0.5; 5,000 ÷ 100
    (10_000, 100, 0.75, 1, {"kelly_multiplier": 0.5}, 25.0),  # half of it
    (10_000, 100, 0.5, 1, {}, 0.0),  # 0.5 - 0.5: no edge
    (10_000, 100, 0.3, 1, {}, 0.0),  # 0.3 - 0.7 < 0: a losing game is not played the other way round
    (10_000, 100, 0.75, 1, {"max_position_percentage": 10}, 10.0),  # 12.5 cut to 1,000 ÷ 100
    (10_000, 100, 0.3, 1, {"min_position_size": 0.5}, 0.5),  # the least size is applied to 0 too, as documented
]

ATR = [
    # balance, risk %, range, parameters → quantity; by hand: balance * risk / 100 ÷ (range * multiplier)
    (10_000, 1, 5, {}, 10.0),  # 100 ÷ (5 * 2)
    (10_000, 1, 5, {"atr_multiplier": 1}, 20.0),  # 100 ÷ 5
    (10_000, 1, 5, {"atr_multiplier": 4}, 5.0),  # 100 ÷ 20
    (10_000, 2, 2.5, {}, 40.0),  # 200 ÷ 5
    (10_000, 2, 2.5, {"max_position_percentage": 25}, 25.0),  # 2,500 ÷ 100
    (10_000, 2, 2.5, {"max_position_size": 7.5}, 7.5),
]


@pytest.mark.parametrize(("balance", "risk", "opens", "stop", "caps", "expected"), FIXED)
def test_a_fixed_percentage_is_lost_at_the_stop(
    balance: float, risk: float, opens: float, stop: float, caps: dict[str, Any], expected: float
) -> None:
    found = position_size(sizing(risk_percentage=risk, **caps), quote(balance, opens, price_stop_loss=stop))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("balance", "opens", "rate", "ratio", "parameters", "expected"), KELLY)
def test_kelly_stakes_a_part_of_the_edge(
    balance: float, opens: float, rate: float, ratio: float, parameters: dict[str, Any], expected: float
) -> None:
    chosen = sizing("kelly-criterion", **parameters)
    found = position_size(chosen, quote(balance, opens, win_rate=rate, win_loss_ratio=ratio))
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("balance", "risk", "atr", "parameters", "expected"), ATR)
def test_a_percentage_is_lost_after_so_many_ranges(
    balance: float, risk: float, atr: float, parameters: dict[str, Any], expected: float
) -> None:
    found = position_size(sizing("atr-based", risk_percentage=risk, **parameters), quote(balance, 100, atr=atr))
    assert found == pytest.approx(expected, rel=1e-12)


def candle(minute: int, high: float, low: float, close: float) -> Candle:
    return Candle(minute * MINUTE_MS, close, high, low, close, 1.0)


CANDLES = [
    candle(0, 11, 9, 10),
    candle(1, 12, 9, 11),  # 12 - 9 = 3
    candle(2, 12, 11.5, 12),  # reaches down to the close before it, 11: 1
    candle(3, 15, 14, 14),  # opened above the close before it, 12: 15 - 12 = 3
    candle(4, 10, 9, 9.5),  # fell under the close before it, 14: 14 - 9 = 5
]


@pytest.mark.parametrize(
    ("period", "closed", "expected"),
    [
        (1, 5, 5.0),  # the last range
        (4, 5, 3.0),  # (3 + 1 + 3 + 5) ÷ 4
        (2, 5, 4.0),  # (3 + 5) ÷ 2: only the last two count
        (2, 4, 2.0),  # (1 + 3) ÷ 2: the last candle had not closed
        (3, 4, 7 / 3),  # (3 + 1 + 3) ÷ 3
    ],
)
def test_the_average_true_range_is_that_of_the_closed_candles(period: int, closed: int, expected: float) -> None:
    just_closed_ms = closed * MINUTE_MS
    for now_ms in (just_closed_ms, just_closed_ms + MINUTE_MS - 1 if closed < 5 else just_closed_ms):
        assert average_true_range(CANDLES, interval="1m", now_ms=now_ms, period=period) == pytest.approx(expected)


def test_the_average_true_range_wants_one_closed_candle_more_than_its_period() -> None:
    with pytest.raises(InvalidInputError, match="needs 5 closed 1m candles, not 4"):
        average_true_range(CANDLES, interval="1m", now_ms=5 * MINUTE_MS - 1, period=4)
    for period in (0, -1, 1.5, True):
        with pytest.raises(InvalidInputError, match="must be a whole number over 0"):
            average_true_range(CANDLES, interval="1m", now_ms=10**9, period=period)  # type: ignore[arg-type]


REFUSED = [
    # method, parameters, what the one message must name
    ("martingale", {}, ["'martingale'", "fixed-percentage", "kelly-criterion", "atr-based"]),
    (None, {}, ["None", "use one of"]),
    ("fixed-percentage", {}, ["risk_percentage is missing"]),
    ("atr-based", {"atr_multiplier": 2}, ["risk_percentage is missing"]),
    ("fixed-percentage", {"risk_percentage": 0}, ["risk_percentage is 0", "at most 100"]),
    ("fixed-percentage", {"risk_percentage": 101}, ["risk_percentage is 101", "at most 100"]),
    ("fixed-percentage", {"risk_percentage": math.nan}, ["risk_percentage is nan"]),
    ("fixed-percentage", {"risk_percentage": math.inf}, ["risk_percentage is inf"]),
    ("fixed-percentage", {"risk_percentage": True}, ["risk_percentage is True"]),
    ("fixed-percentage", {"risk_percentage": "2"}, ["risk_percentage is '2'"]),
    ("fixed-percentage", {"risk_percentage": 1, "kelly_multiplier": 0.5}, ["kelly_multiplier does not belong"]),
    ("kelly-criterion", {"risk_percentage": 1}, ["risk_percentage does not belong"]),
    ("kelly-criterion", {"kelly_multiplier": 1.5}, ["kelly_multiplier is 1.5", "at most 1"]),
    ("atr-based", {"risk_percentage": 1, "atr_multiplier": -2}, ["atr_multiplier is -2"]),
    ("kelly-criterion", {"min_position_size": 2, "max_position_size": 1}, ["at most max_position_size, 1"]),
    (
        "fixed-percentage",
        {"atr_multiplier": 1, "max_position_percentage": 0, "min_position_size": -1, "max_position_size": math.nan},
        ["risk_percentage is missing", "atr_multiplier does not belong", "max_position_percentage is 0",
         "min_position_size is -1", "max_position_size is nan"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("method", "parameters", "named"), REFUSED)
def test_a_wrong_sizing_is_refused_with_one_message_that_names_all(
    method: Any, parameters: dict[str, Any], named: list[str]
) -> None:
    registry = Registry()
    with pytest.raises(InvalidInputError) as refused:
        registry.add_sizing(sizing_name="mine", method=method, **parameters)
    assert "'mine'" in str(refused.value)
    assert all(part in str(refused.value) for part in named), str(refused.value)
    assert registry.list_sizings() == []


@pytest.mark.parametrize(
    ("method", "values", "named"),
    [
        ("fixed-percentage", {}, ["price_stop_loss is missing"]),
        ("fixed-percentage", {"price_stop_loss": 100}, ["must not be the entry"]),
        ("fixed-percentage", {"price_stop_loss": -1}, ["price_stop_loss is -1"]),
        ("fixed-percentage", {"price_stop_loss": math.nan}, ["price_stop_loss is nan"]),
        ("fixed-percentage", {"price": 0, "balance": -1, "price_stop_loss": 5}, ["price_open is 0", "balance is -1"]),
        ("kelly-criterion", {"win_rate": 1, "win_loss_ratio": 0}, ["win_rate is 1", "under 1", "win_loss_ratio is 0"]),
        ("kelly-criterion", {"win_rate": 0, "win_loss_ratio": 1}, ["win_rate is 0"]),
        ("kelly-criterion", {}, ["win_rate is missing", "win_loss_ratio is missing"]),
        ("atr-based", {}, ["atr is missing"]),
        ("atr-based", {"atr": 0.0}, ["atr is 0.0"]),
        ("atr-based", {"atr": 1.0, "balance": math.inf}, ["account_balance is inf"]),
        ("atr-based", {"atr": 5e-324, "balance": 1e300}, ["not finite"]),
    ],
)
def test_a_quote_that_cannot_be_sized_is_refused(method: str, values: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(InvalidInputError) as refused:
        position_size(sizing(method), quote(**values))
    assert all(part in str(refused.value) for part in named), str(refused.value)


# Reals that are neither absurdly large nor small, so that a quotient stays exact to about 1e-9.
MONEY = st.floats(1, 1e9)
PRICE = st.floats(1e-4, 1e6)
PART = st.floats(0.001, 0.999)


@given(MONEY, PRICE, PART, st.floats(0.01, 100), st.booleans())
def test_the_loss_at_the_stop_is_the_risk_that_was_set(
    balance: float, opens: float, part: float, risk: float, long: bool
) -> None:
    stop = opens * (1 - part) if long else opens * (1 + part)
    quantity = position_size(sizing(risk_percentage=risk), quote(balance, opens, price_stop_loss=stop))
    assert quantity * abs(opens - stop) == pytest.approx(balance * risk / 100, rel=1e-9)


@given(MONEY, PRICE, PART, st.floats(0.01, 50))
def test_kelly_never_stakes_more_than_its_part_of_the_balance(
    balance: float, opens: float, rate: float, ratio: float
) -> None:
    quantity = position_size(sizing("kelly-criterion"), quote(balance, opens, win_rate=rate, win_loss_ratio=ratio))
    assert 0 <= quantity * opens <= balance * 0.25 * (1 + 1e-9)
    assert (quantity > 0) == (rate - (1 - rate) / ratio > 0)


@given(
    st.sampled_from(["fixed-percentage", "kelly-criterion", "atr-based"]),
    MONEY, PRICE, PART, st.floats(1, 500),
    st.none() | st.floats(1e-6, 1e6), st.none() | st.floats(1e-6, 1e6), st.floats(0.01, 1e5),
)  # fmt: skip
def test_the_caps_follow_in_the_documents_order(
    method: str, balance: float, opens: float, part: float, percent: float,
    least: float | None, most: float | None, atr: float,
) -> None:  # fmt: skip
    if least is not None and most is not None and least > most:
        least, most = most, least
    known = quote(balance, opens, price_stop_loss=opens * part, win_rate=part, win_loss_ratio=1.5, atr=atr)
    free = position_size(sizing(method), known)
    capped = position_size(
        sizing(method, max_position_percentage=percent, min_position_size=least, max_position_size=most), known
    )
    affordable = balance * percent / 100 / opens
    if most is not None:
        assert capped <= most
    if least is not None:
        assert capped >= least
    if least is None:
        assert capped <= affordable
        assert capped <= free
    inside = (least or 0) <= free <= min(affordable, most or math.inf)
    if inside:
        assert capped == free


@given(MONEY, PRICE, PART, st.integers(2, 1000))
def test_a_larger_account_trades_more_in_proportion(balance: float, opens: float, part: float, times: int) -> None:
    for method in ("fixed-percentage", "kelly-criterion", "atr-based"):
        more = {"price_stop_loss": opens * part, "win_rate": 0.6, "win_loss_ratio": 2, "atr": opens * part}
        one = position_size(sizing(method), quote(balance, opens, **more))
        many = position_size(sizing(method), quote(balance * times, opens, **more))
        assert many == pytest.approx(one * times, rel=1e-9)


def test_sizings_have_names_of_their_own_and_are_forgotten_together() -> None:
    registry = Registry()
    added = registry.add_sizing(sizing_name="careful", method="fixed-percentage", risk_percentage=1, note="one percent")
    assert registry.sizing("careful") is added
    assert registry.list_sizings() == [added]
    assert registry.add_sizing(sizing_name="k", method="kelly-criterion").kelly_multiplier == 0.25
    assert registry.add_sizing(sizing_name="a", method="atr-based", risk_percentage=1).atr_multiplier == 2.0
    with pytest.raises(InvalidInputError, match="there is a sizing 'careful' already"):
        registry.add_sizing(sizing_name="careful", method="kelly-criterion")
    with pytest.raises(InvalidInputError, match="no sizing 'bold': add it first, or use one of: 'careful'"):
        registry.sizing("bold")
    with pytest.raises(InvalidInputError, match="sizing_name is ''"):
        registry.add_sizing(sizing_name="", method="kelly-criterion")
    registry.reset()
    assert registry.list_sizings() == []


async def no_candles(symbol: str, interval: str, since_ms: int, limit: int) -> Sequence[Any]:
    return []


def exchange(format_quantity: Any = plain_number, get_candles: Any = no_candles) -> ExchangeSpec:
    return ExchangeSpec(
        exchange_name="e", get_candles=get_candles, format_price=plain_number, format_quantity=format_quantity
    )


def test_a_quantity_is_written_as_the_exchange_writes_it() -> None:
    known = quote(10_000, 50_000, price_stop_loss=49_100)  # 100 ÷ 900 = 0.1111…
    assert sized_quantity(sizing(), known, exchange(), "BTCUSDT") == 0.11111111
    lots = exchange(lambda symbol, quantity: f"{math.floor(quantity * 100) / 100:.2f}")
    assert sized_quantity(sizing(), known, lots, "BTCUSDT") == 0.11
    whole = exchange(lambda symbol, quantity: str(math.floor(quantity)))
    assert sized_quantity(sizing(), known, whole, "BTCUSDT") == 0.0, "less than the least lot is nothing"


def test_nothing_to_trade_is_not_put_to_the_exchange() -> None:
    def refuses_zero(symbol: str, quantity: float) -> str:
        raise ValueError("must be greater than the minimum")

    assert sized_quantity(sizing(), quote(0, price_stop_loss=90), exchange(refuses_zero), "BTCUSDT") == 0.0


@pytest.mark.parametrize("gives", ["a lot", "1,000", "", None, "nan", "inf", "-1", "100"])
def test_an_exchange_that_writes_another_quantity_is_refused(gives: Any) -> None:
    known = quote(10_000, 100, price_stop_loss=90)  # 100 ÷ 10 = 10
    with pytest.raises(InvalidInputError, match="exchange 'e'"):
        sized_quantity(sizing(), known, exchange(lambda symbol, quantity: gives), "BTCUSDT")


async def test_a_strategy_sizes_by_the_ranges_of_what_has_closed() -> None:
    asked = []

    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> list[Candle]:
        asked.append((symbol, interval, since_ms, limit))
        return [one for one in CANDLES if one.open_time_ms >= since_ms]  # the forming one too

    registry = Registry()
    chosen = registry.add_sizing(sizing_name="by range", method="atr-based", risk_percentage=1)
    moment = Moment(exchange(get_candles=get_candles), "live", 4 * MINUTE_MS, Params())
    with at(moment):
        found = await get_position_size(chosen, "X", account_balance=10_000, price_open=12, atr_period=3)
        assert found == pytest.approx(100 / (7 / 3 * 2), abs=1e-8)  # the ranges 3, 1, 3; the multiplier 2
        assert asked == [("X", "1m", 0, 4)]
        given_atr = await get_position_size(chosen, "X", account_balance=10_000, price_open=12, atr=5)
        assert given_atr == 10.0
        with pytest.raises(InvalidInputError, match="needs 15 closed 1m candles, not 4"):
            await get_position_size(chosen, "X", account_balance=10_000, price_open=12)
        with pytest.raises(InvalidInputError, match="atr_period is 1000"):
            await get_position_size(chosen, "X", account_balance=10_000, price_open=12, atr_period=1000)
        with pytest.raises(InvalidInputError, match="no sizing 'unknown'"):
            await get_position_size("unknown", "X", account_balance=10_000)


async def test_a_strategy_sizes_at_the_price_of_the_moment_if_it_names_none() -> None:
    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> list[Candle]:
        return [candle(since_ms // MINUTE_MS + n, 50, 50, 50) for n in range(limit)]

    with at(Moment(exchange(get_candles=get_candles), "backtest", 10 * MINUTE_MS, Params())):
        found = await get_position_size(sizing(), "X", account_balance=1_000, price_stop_loss=45)
    assert found == 2.0  # 10 ÷ (50 - 45)
