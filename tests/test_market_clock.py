"""The clocks of markets, and the adapter for ccxt: all without a real second of waiting."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable

import pytest

from holdfast.errors import InvalidInputError, UnavailableError
from holdfast.market.ccxt import CcxtExchange
from holdfast.market.clock import WallClock
from holdfast.market.pace import RunningPace, WaitingPace
from holdfast.market.protocol import Exchange, MarketEnded, WaitingExchange
from holdfast.market.replay import LocalMarket
from holdfast.market.synthetic import SyntheticMarket

M = 60_000
T0 = 1_704_067_200_000


class Hands:
    """A clock that goes only when somebody sleeps."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.slept: list[float] = []

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> Awaitable[object]:
        self.slept.append(seconds)
        self.seconds += seconds
        return asyncio.sleep(0)


async def test_the_wall_clock_waits_for_the_minute_and_the_grace() -> None:
    hands = Hands(T0 / 1000 + 61)
    clock = WallClock(grace_seconds=2, now=hands.now, sleep=hands.sleep)
    assert await clock.wait_closed("a", None) == T0 - M  # the minute has ended, its grace has not
    assert await clock.wait_closed("a", T0 - M) == T0
    assert hands.seconds == pytest.approx(T0 / 1000 + 62)
    assert await clock.wait_closed("a", T0) == T0 + M
    assert hands.seconds == pytest.approx(T0 / 1000 + 122)
    assert max(hands.slept) <= 5


async def test_the_wall_clock_survives_steps_of_the_clock_and_can_be_interrupted() -> None:
    hands = Hands(T0 / 1000 + 62)
    clock = WallClock(now=hands.now, sleep=hands.sleep)
    hands.seconds -= 300  # stepped back: it must still not return what was seen
    assert await clock.wait_closed("a", T0) == T0 + M
    hands.seconds += 3600  # slept through an hour
    assert await clock.wait_closed("a", T0 + M) == T0 + 61 * M
    real = asyncio.create_task(WallClock().wait_closed("a", 2**52))
    await asyncio.sleep(0)
    real.cancel()
    with pytest.raises(asyncio.CancelledError):
        await real
    with pytest.raises(InvalidInputError, match="choose 0 to 30"):
        WallClock(grace_seconds=31)


async def test_a_running_clock_starts_at_the_first_look_and_cannot_be_stopped() -> None:
    hands = Hands(1000)
    pace = RunningPace(T0, T0 + 5 * M, speed=60, now=hands.now, sleep=hands.sleep)
    hands.seconds += 50
    assert await pace.wait_closed("a", None) == T0
    assert await pace.wait_closed("a", T0) == T0 + M
    hands.seconds += 3.5
    assert pace.present_ms == T0 + 4 * M
    assert await pace.wait_closed("late", T0) == T0 + 4 * M  # what passed meanwhile is past
    pace.leave("late")
    assert await pace.wait_closed("a", T0 + 4 * M) == T0 + 5 * M
    with pytest.raises(MarketEnded):
        await pace.wait_closed("a", T0 + 5 * M)
    assert hands.seconds == pytest.approx(1055)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_waiting_clock_advances_only_when_every_participant_waits_for_a_newer_minute() -> None:
    pace = WaitingPace(T0, T0 + 2 * M, participants=2)
    assert await pace.wait_closed("a", None) == T0
    assert await pace.wait_closed("b", T0 - M) == T0
    a = asyncio.create_task(pace.wait_closed("a", T0))
    again = asyncio.create_task(pace.wait_closed("a", T0))
    await settle()
    assert pace.present_ms == T0  # one participant that waits twice is still one
    b = asyncio.create_task(pace.wait_closed("b", T0))
    assert {await a, await again, await b} == {T0 + M}
    await settle()
    assert pace.present_ms == T0 + M


async def test_a_waiting_clock_forgets_a_wait_that_was_cancelled() -> None:
    pace = WaitingPace(T0, T0 + 2 * M, participants=2)
    a = asyncio.create_task(pace.wait_closed("a", T0))
    await settle()
    a.cancel()
    b = asyncio.create_task(pace.wait_closed("b", T0))
    await settle()
    assert pace.present_ms == T0
    assert not b.done()
    assert await pace.wait_closed("a", T0) == T0 + M
    assert await b == T0 + M


async def test_a_waiting_clock_does_not_wait_for_those_who_left_and_ends_for_all() -> None:
    pace = WaitingPace(T0, T0 + M, participants=2)
    a = asyncio.create_task(pace.wait_closed("a", T0))
    await settle()
    pace.leave("b")
    assert await a == T0 + M
    with pytest.raises(MarketEnded):
        await pace.wait_closed("a", T0 + M)
    ahead = asyncio.create_task(pace.wait_closed("b", T0 + 9 * M))  # it knows more than this market: it came back
    a = asyncio.create_task(pace.wait_closed("a", T0 + M))
    for task in (ahead, a):
        with pytest.raises(MarketEnded):
            await task


@pytest.mark.parametrize("speed", [0, -1, float("nan"), float("inf"), 1e9])
def test_a_wrong_speed_span_or_number_of_participants_is_refused(speed: float) -> None:
    with pytest.raises(InvalidInputError, match="speed is"):
        RunningPace(T0, T0, speed=speed)
    with pytest.raises(InvalidInputError, match="at least 1 participant"):
        WaitingPace(T0, T0, participants=0)
    with pytest.raises(InvalidInputError, match="cannot run from"):
        WaitingPace(T0, T0 - M, participants=1)


async def test_a_market_in_this_process_shows_the_present_only() -> None:
    market = LocalMarket(SyntheticMarket(1, ["A"], minutes=100), WaitingPace(T0 + 9 * M, T0 + 20 * M, participants=1))
    assert isinstance(market, WaitingExchange)
    assert (await market.get_candles("A", "1m", T0, 50))[-1].open_time_ms == T0 + 9 * M
    await market.wait_closed("x", T0 + 9 * M)
    assert (await market.get_candles("A", "1m", T0, 50))[-1].open_time_ms == T0 + 10 * M
    assert market.format_price("A", 0.1 + 0.2) == "0.3"
    assert [market.format_quantity("A", q) for q in (1e-7, 120.0, -0.0, 1e21)] == [
        "0.0000001",
        "120",
        "0",
        "1000000000000000000000",
    ]


class NetworkError(Exception):
    """As ccxt names it."""


class RequestTimeout(NetworkError):
    """As ccxt names it."""


class BadSymbol(Exception):
    """As ccxt names it."""


class FakeClient:
    """An object of ccxt's shape: pages of five, each beginning with a candle that was asked before."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.loads = 0
        self.closed = False
        self.failure: Exception | None = None

    async def load_markets(self) -> None:
        self.loads += 1
        await asyncio.sleep(0)

    async def fetch_ohlcv(self, symbol: str, timeframe: str, since: int, limit: int) -> list[list[float | None]]:
        self.asked.append((symbol, timeframe, since, limit))
        if self.failure:
            raise self.failure
        first = (since - T0) // M - 1
        return [
            [T0 + at * M, 1.0, 2.0, 0.5, 1.5 if at != 3 else None, None if at == 4 else 9]
            for at in range(max(0, first), min(first + 5, 12))
        ]

    def price_to_precision(self, symbol: str, price: float) -> str:
        return f"{price:.1f}"

    def amount_to_precision(self, symbol: str, amount: float) -> str:
        return f"{amount:.3f}"

    def market(self, symbol: str) -> dict[str, object]:
        return {"symbol": symbol, "spot": True}

    async def close(self) -> None:
        self.closed = True


async def test_ccxt_pages_are_joined_without_repeats_and_without_the_forming_candle() -> None:
    client = FakeClient()
    exchange = CcxtExchange(client, now=lambda: (T0 + 11 * M) / 1000 + 30)  # number 11 is forming
    assert isinstance(exchange, Exchange)
    first, second = await asyncio.gather(
        exchange.get_candles("BTC/USDT", "1m", T0 + M, 50), exchange.get_candles("BTC/USDT", "1m", T0 + M, 4)
    )
    assert [(c.open_time_ms - T0) // M for c in first] == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert [(c.open_time_ms - T0) // M for c in second] == [1, 2, 4, 5]
    assert first[2].volume == 0.0
    assert client.loads == 1
    assert (exchange.format_price("x", 1.26), exchange.format_quantity("x", 1)) == ("1.3", "1.000")
    await exchange.close()
    assert client.closed


async def test_errors_of_ccxt_become_ours() -> None:
    client = FakeClient()
    exchange = CcxtExchange(client)
    client.failure = RequestTimeout("late")
    with pytest.raises(UnavailableError, match="RequestTimeout: late"):
        await exchange.get_candles("A", "1m", T0, 1)
    client.failure = BadSymbol("no A")
    with pytest.raises(InvalidInputError, match="BadSymbol: no A"):
        await exchange.get_candles("A", "1m", T0, 1)
    with pytest.raises(InvalidInputError, match="unknown interval"):
        await exchange.get_candles("A", "7m", T0, 1)


def test_a_missing_ccxt_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ccxt", None)
    monkeypatch.setitem(sys.modules, "ccxt.async_support", None)
    with pytest.raises(InvalidInputError, match=r"pip install 'holdfast\[ccxt\]'"):
        CcxtExchange.named("binance")
