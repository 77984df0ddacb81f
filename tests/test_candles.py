"""Candles: the price, the window, and which batches are refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rule_kit import T0, at, flat

from holdfast.errors import InvalidInputError, NotFoundError, UnavailableError
from holdfast.rules.candles import (
    MINUTE_MS,
    Candle,
    CandleError,
    Window,
    average_price,
    check_candles,
    fetch_candles,
    interval_ms,
    preload_from_ms,
    sound_candles,
    to_candle,
)
from holdfast.rules.params import Params

PARAMS = Params()


def test_the_price_weighs_each_candle_by_its_volume() -> None:
    candles = [Candle(T0, 9, 12, 6, 9, 1.0), Candle(T0 + MINUTE_MS, 10, 20, 10, 15, 3.0)]
    assert average_price(candles) == pytest.approx((9 * 1 + 15 * 3) / 4)


def test_the_price_without_any_volume_is_the_mean_close() -> None:
    assert average_price([Candle(T0, 1, 9, 1, 4, 0.0), Candle(T0 + MINUTE_MS, 1, 9, 1, 8, 0.0)]) == 6.0


def test_there_is_no_price_without_candles() -> None:
    with pytest.raises(InvalidInputError, match="at least one candle"):
        Window(5).price()


def test_the_window_holds_the_last_five_minutes() -> None:
    window = Window(5)
    for candle in [at(minute, 100.0 + minute) for minute in range(9)]:
        window.push(candle)
    assert [candle.close for candle in window.candles] == [104.0, 105.0, 106.0, 107.0, 108.0]
    assert window.price() == pytest.approx(106.0)
    assert (window.newest_ms, window.previous_ms) == (T0 + 8 * MINUTE_MS, T0 + 7 * MINUTE_MS)


def test_in_a_gap_old_candles_leave_the_window_though_nothing_replaces_them() -> None:
    window = Window(5)
    for candle in (at(0, 100.0), at(1, 100.0), at(5, 200.0)):
        window.push(candle)
    assert [candle.close for candle in window.candles] == [100.0, 200.0]
    window.push(at(90, 300.0))
    assert window.price() == 300.0
    assert window.previous_ms == T0 + 5 * MINUTE_MS


def test_a_candle_that_is_not_newer_is_ignored() -> None:
    window = Window(5)
    window.push(at(3, 100.0))
    window.push(at(3, 900.0))
    window.push(at(2, 900.0))
    assert window.price() == 100.0
    assert window.previous_ms is None


@given(st.sets(st.integers(0, 60), min_size=1), st.integers(1, 8), st.data())
def test_a_window_filled_since_the_preload_equals_one_that_was_never_interrupted(
    minutes: set[int], size: int, data: st.DataObject
) -> None:
    candles = [
        Candle(T0 + minute * MINUTE_MS, 1.0, 1.3 + minute / 7, 1.0, 1.1, 0.1 + minute / 3) for minute in sorted(minutes)
    ]
    now = data.draw(st.sampled_from(candles))
    params = Params(avg_price_candles_count=size)
    whole, restarted = Window(size), Window(size)
    for candle in candles:
        if candle.open_time_ms <= now.open_time_ms:
            whole.push(candle)
            if candle.open_time_ms >= preload_from_ms(now.open_time_ms, 5 * MINUTE_MS, params):
                restarted.push(candle)
    assert whole.price() == restarted.price()  # bit for bit
    assert whole.candles == restarted.candles


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (at(2)._replace(close=math.nan), "finite"),
        (at(2)._replace(high=math.inf), "finite"),
        (at(2)._replace(low=-math.inf), "finite"),
        (at(2)._replace(volume=math.nan), "finite"),
        (at(2)._replace(volume=-1.0), "negative volume"),
        (at(2)._replace(low=0.0), "not above 0"),
        (at(2)._replace(open=0.0), "not above 0"),
        (at(2)._replace(high=0.0), "not above 0"),
        (at(2)._replace(close=0.0), "not above 0"),
        (at(2)._replace(open=-5.0), "not above 0"),
        (at(2)._replace(low=42.0), "far under"),
        (at(2)._replace(high=42_000.0, low=43_000.0), "below its low"),
        (at(1), "not newer"),
        (at(0), "not newer"),
    ],
)
def test_a_batch_that_cannot_be_true_is_refused_whole(bad: Candle, told: str) -> None:
    with pytest.raises(CandleError, match=rf"{bad.open_time_ms}.*{told}"):
        check_candles([*flat(range(2)), bad, *flat(range(3, 8))], PARAMS)


def test_the_reference_of_a_small_batch_is_the_mean_so_one_wild_price_moves_it() -> None:
    small = [at(0, 1.0), at(1, 10_000.0)]
    with pytest.raises(CandleError, match="far under"):
        check_candles(small, PARAMS)
    check_candles([*flat(range(4), 1.0), at(4, 10_000.0)], PARAMS)  # the median of five is 1


def test_one_candle_that_is_absurd_throughout_shows_beside_those_before_it() -> None:
    absurd = at(9, 0.01)
    check_candles([absurd], PARAMS)
    with pytest.raises(CandleError, match="far under"):
        check_candles([absurd], PARAMS, flat(range(4), 43_000.0))


def test_what_cannot_be_true_can_be_left_out_of_a_batch(caplog: pytest.LogCaptureFixture) -> None:
    good = flat(range(6), 43_000.0)
    bad = [None, (60_000, "x"), at(3)._replace(high=math.nan), at(0), at(9, 0.01)]
    assert sound_candles([good[0], *bad[:3], *good[1:], *bad[3:]], PARAMS) == good
    assert sound_candles([at(9, 0.01)], PARAMS, good) == sound_candles([], PARAMS) == []
    assert len(caplog.records) == 5, "each is said, but for one that was there already"


def test_true_batches_and_empty_ones_pass() -> None:
    check_candles([], PARAMS)
    check_candles(flat(range(100)), PARAMS)
    check_candles([candle._replace(volume=0.0) for candle in flat(range(9))], PARAMS)
    check_candles([*flat(range(9)), at(9)._replace(low=43.0)], PARAMS)  # exactly a thousandth is not below it


@pytest.mark.parametrize(
    "value",
    [
        (T0, "1", "2", "0.5", "1.5", "7"),
        [T0, 1, 2, 0.5, 1.5, 7, "more"],
        {"timestamp": T0, "open": 1, "high": 2, "low": 0.5, "close": 1.5, "volume": 7},
        {"open_time_ms": T0, "open": 1, "high": 2, "low": 0.5, "close": 1.5, "volume": 7},
    ],
)
def test_candles_come_in_the_common_shapes(value: Any) -> None:
    assert to_candle(value) == Candle(T0, 1.0, 2.0, 0.5, 1.5, 7.0)


@pytest.mark.parametrize("value", [None, 7, "candle", (1, 2), {"open": 1}, (T0, "x", 1, 1, 1, 1), (None,) * 6])
def test_what_is_not_a_candle_is_refused(value: Any) -> None:
    with pytest.raises(CandleError, match="not a candle"):
        to_candle(value)


def test_an_unknown_interval_is_refused_with_those_there_are() -> None:
    assert interval_ms("15m") == 900_000
    with pytest.raises(InvalidInputError, match="5m"):
        interval_ms("7m")


class Flaky:
    """Fails as told, then answers."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked, self.slept = list(answers), 0, [0.0][:0]

    async def get_candles(self, symbol: str, interval: str, since_ms: int, limit: int) -> Sequence[Any]:
        self.asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    async def fetch(self, **more: Any) -> list[Candle]:
        arguments: dict[str, Any] = {"since_ms": T0, "limit": 10, "params": PARAMS, "sleep": self.sleep, **more}
        return await fetch_candles(self.get_candles, "BTCUSDT", "1m", **arguments)


async def test_a_failed_fetch_is_tried_again_after_a_pause() -> None:
    flaky = Flaky(ConnectionError("gone"), [at(0), at(0)], flat(range(3)))
    assert await flaky.fetch() == flat(range(3))
    assert flaky.slept == [5.0, 5.0]


async def test_after_the_last_attempt_the_error_names_what_was_asked_for() -> None:
    flaky = Flaky(*[TimeoutError("slow")] * 3)
    with pytest.raises(UnavailableError, match=r"BTCUSDT 1m .*slow"):
        await flaky.fetch()
    assert flaky.asked == 3
    assert flaky.slept == [5.0, 5.0], "no pause after the last"


async def test_no_retries_means_one_attempt() -> None:
    flaky = Flaky(ConnectionError("gone"))
    with pytest.raises(UnavailableError):
        await flaky.fetch(params=Params(get_candles_retry_count=0))
    assert flaky.asked == 1


async def test_what_asking_again_cannot_mend_is_not_asked_again() -> None:
    flaky = Flaky(NotFoundError("no such symbol"))
    with pytest.raises(NotFoundError):
        await flaky.fetch()


async def test_candles_before_since_after_until_and_over_the_limit_are_dropped() -> None:
    flaky = Flaky(flat(range(-2, 9)), flat(range(9)))
    assert await flaky.fetch(until_ms=T0 + 4 * MINUTE_MS) == flat(range(4))
    assert await flaky.fetch(limit=2) == flat(range(2))


async def test_an_onlooker_of_candles_that_fails_costs_no_candles(caplog: pytest.LogCaptureFixture) -> None:
    def onlooker(*_: Any) -> None:
        raise RuntimeError("my own bug")

    assert await Flaky(flat(range(3))).fetch(on_candle_data=onlooker) == flat(range(3))
    assert "my own bug" in caplog.text
