"""The simulated market: candles and proposals of chance, the same whatever the processes do."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

from ...errors import UnavailableError
from ...market.protocol import MINUTE_MS, MarketEnded
from ...names import Context
from ...rules.candles import Candle
from ...rules.params import Params
from .loop import Scheduler
from .plan import Plan

START_MS = 1_700_000_100_000
"""Open time of the first candle that a run may see as its newest."""
PARAMS = Params(schedule_await_minutes=7, entry_validity_seconds=12.0)
_BEFORE = 8
"""Minutes of candles before that."""
_PUBLISHED_SECONDS = 2.0


class _Idea(NamedTuple):
    """What a strategy would propose at a minute, around the price that it finds."""

    long: bool
    target: float
    stop: float
    minutes: int
    away: float
    """How far the entry lies from the price; 0: at once."""


def context_of(number: int) -> Context:
    """Return the context of a number in a plan."""
    return Context("simulated", f"S{number}", f"s{number}")


class SimulatedMarket:
    """All candles of a history, and what each context's strategy thinks of them."""

    def __init__(self, plan: Plan) -> None:
        self.first_ms, self.last_ms = START_MS, START_MS + (plan.minutes - 1) * MINUTE_MS
        self.end_seconds = plan.minutes * 60.0 + _PUBLISHED_SECONDS
        self.trades = plan.venue is not None
        """Whether proposals name a quantity."""
        self.candles: dict[str, list[Candle]] = {}
        self._closes: dict[tuple[str, int], float] = {}
        self._ideas: dict[str, dict[int, _Idea]] = {}
        for one in plan.contexts:
            chance = Random(f"{plan.seed}/{one.number}")
            symbol = context_of(one.number).symbol
            self.candles[symbol] = list(self._walk(chance, plan.minutes))
            together = Random(plan.seed)  # all strategies want to enter at once, which is when a limit matters
            self._ideas[symbol] = dict(self._thoughts(chance, together, plan.minutes, self.trades))
            self._closes.update(((symbol, candle[0] + MINUTE_MS), candle[4]) for candle in self.candles[symbol])

    def _walk(self, chance: Random, minutes: int) -> Any:
        price, thin = 100.0, chance.choice((0.0, 0.0, 0.08))
        for minute in range(-_BEFORE, minutes):
            first = price
            price *= 1 + chance.gauss(0, 0.0035)
            high = max(first, price) * (1 + abs(chance.gauss(0, 0.0012)))
            low = min(first, price) * (1 - abs(chance.gauss(0, 0.0012)))
            if chance.random() >= thin:
                yield Candle(START_MS + minute * MINUTE_MS, first, high, low, price, 1.0 + chance.random())

    def _thoughts(self, chance: Random, together: Random, minutes: int, trades: bool) -> Any:
        likely, longest = (0.85, 3) if trades else (0.4, 12)  # the more orders, the more that can go wrong with one
        for minute in range(minutes + 1):
            if together.random() < likely:
                away = chance.choice((0.0, 0.0, 0.0, 0.002, 0.004) if trades else (0.0, 0.0, 0.002, 0.004, 0.008))
                yield START_MS + minute * MINUTE_MS, _Idea(
                    chance.random() < 0.5, 0.006 + chance.random() * 0.01, 0.006 + chance.random() * 0.01,
                    chance.randint(1 if trades else 2, longest), away,
                )  # fmt: skip

    def proposal(self, symbol: str, when_ms: int) -> dict[str, Any] | None:
        """Return what the strategy of a symbol proposes at the close of a candle."""
        idea = self._ideas[symbol].get(when_ms)
        if idea is None:
            return None
        sign = 1 if idea.long else -1
        entry = self._closes[symbol, when_ms] * (1 - sign * idea.away)
        made: dict[str, Any] = {
            "position": "long" if idea.long else "short", "priceTakeProfit": entry * (1 + sign * idea.target),
            "priceStopLoss": entry * (1 - sign * idea.stop), "minuteEstimatedTime": idea.minutes,
        }  # fmt: skip
        if self.trades:
            made["quantity"] = 0.1 * idea.minutes
        return made | {"priceOpen": entry} if idea.away else made


class Trouble(NamedTuple):
    """A time in which a feed does not do what it should."""

    kind: str
    from_seconds: float
    to_seconds: float


class Feed:
    """What one process gets to see of the market.

    Args:
        market: The market.
        scheduler: Tells the time.
        process_sleep: Takes seconds.
    """

    def __init__(self, market: SimulatedMarket, scheduler: Scheduler, process_sleep: Any) -> None:
        self._market, self._scheduler, self._sleep = market, scheduler, process_sleep
        self.troubles: list[Trouble] = []

    def _newest_closed_ms(self) -> int:
        minutes = int((self._scheduler.now_seconds - _PUBLISHED_SECONDS) // 60)
        return min(self._market.last_ms, START_MS + (minutes - 1) * MINUTE_MS)

    async def wait_closed(self, participant: str, after_ms: int | None) -> int:
        """Wait for a newer closed minute; see :class:`holdfast.market.protocol.WaitingExchange`."""
        while True:
            newest_ms = self._newest_closed_ms()
            if after_ms is None or newest_ms > after_ms:
                return newest_ms
            if newest_ms >= self._market.last_ms:
                raise MarketEnded("the simulated market has ended")
            due = (after_ms + 2 * MINUTE_MS - START_MS) / 1000 + _PUBLISHED_SECONDS
            await self._sleep(max(due - self._scheduler.now_seconds, 0.001))

    async def get_candles(self, symbol: str, interval: str, since_ms: int, limit: int) -> Sequence[Candle]:
        """Return what has been published."""
        now = self._scheduler.now_seconds
        closed_ms = START_MS + int((now - _PUBLISHED_SECONDS) * 1000) - MINUTE_MS
        for trouble in self.troubles:
            if trouble.from_seconds <= now < trouble.to_seconds:
                if trouble.kind == "candles_refused":
                    raise UnavailableError("the simulated exchange was told to fail")
                if trouble.kind == "gap":
                    limit = 1
                else:
                    closed_ms = min(closed_ms, START_MS + int(trouble.from_seconds * 1000) - MINUTE_MS)
        found = [one for one in self._market.candles[symbol] if since_ms <= one[0] <= closed_ms]
        return found[:limit]
