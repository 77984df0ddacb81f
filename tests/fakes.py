"""What the engine's tests share: hand-made candles, a market with a manual clock, stores, a bot in one object."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from holdfast.contract import Backend, Key, Survives
from holdfast.engine.listeners import Listeners
from holdfast.engine.live import Live, LiveRun
from holdfast.engine.registry import Registry
from holdfast.engine.session import Session
from holdfast.invariants import check_store
from holdfast.market.protocol import MarketEnded
from holdfast.names import Context
from holdfast.rows import Event, Row, ScheduledSignal, Signal
from holdfast.rules.candles import MINUTE_MS, Candle
from holdfast.rules.params import Params
from holdfast.store import Store

START_MS = 1_700_000_100_000
"""Open time of the candle at which the tests' markets begin; a multiple of five minutes."""
assert START_MS % (5 * MINUTE_MS) == 0


def candle(minute: int, close: float, *, high: float | None = None, low: float | None = None) -> Candle:
    """Return the candle that opens ``minute`` minutes after the start; its price is ``close`` unless told otherwise."""
    top, bottom = close if high is None else high, close if low is None else low
    return Candle(START_MS + minute * MINUTE_MS, close, top, bottom, close, 1.0)


def flat(price: float, first: int, last: int) -> list[Candle]:
    """Return candles that stand still at ``price``, for the minutes from ``first`` to ``last``."""
    return [candle(minute, price) for minute in range(first, last + 1)]


def minute_ms(minute: int) -> int:
    """Return the open time of the candle of ``minute``; also the close time of the one before."""
    return START_MS + minute * MINUTE_MS


async def no_sleep(seconds: float) -> None:
    """Stand in for ``asyncio.sleep``: gives way once."""
    await asyncio.sleep(0)


class FakeMarket:
    """Candles by hand, and a clock that goes on one minute each time its one participant waits.

    Args:
        candles: Of each symbol, ascending; those before ``start`` are history.
        start: The minute that has just closed at the beginning.
        hold: At the end, stand still until :meth:`go_on` or :meth:`finish` instead of ending.
    """

    def __init__(self, candles: Mapping[str, Sequence[Candle]], *, start: int = 0, hold: bool = False) -> None:
        self.candles = {symbol: list(those) for symbol, those in candles.items()}
        self.present_ms = minute_ms(start)
        self.ended = not hold
        self._moved = asyncio.Event()
        self.waiting = asyncio.Event()
        """Set while the participant waits at the end."""
        self.fetches: list[tuple[str, int, int]] = []
        self.left: list[str] = []
        self.failures: list[Exception] = []
        """Raised by the next fetches, first one first."""

    @property
    def end_ms(self) -> int:
        return max(those[-1][0] for those in self.candles.values() if those)

    def go_on(self, more: Iterable[Candle], symbol: str = "BTCUSDT") -> None:
        """Add candles and let the clock reach them."""
        self.candles[symbol].extend(more)
        self._moved.set()

    def finish(self) -> None:
        """End the market once its last candle has been seen."""
        self.ended = True
        self._moved.set()

    async def get_candles(self, symbol: str, interval: str, since_ms: int, limit: int) -> list[Candle]:
        assert interval == "1m"
        self.fetches.append((symbol, since_ms, limit))
        if self.failures:
            raise self.failures.pop(0)
        found = [one for one in self.candles.get(symbol, []) if since_ms <= one[0] <= self.present_ms]
        return found[:limit]

    async def wait_closed(self, participant: str, after_ms: int | None) -> int:
        while after_ms is not None and after_ms >= self.present_ms:
            if self.present_ms < self.end_ms:
                self.present_ms += MINUTE_MS
            elif self.ended:
                raise MarketEnded("the market has ended")
            else:
                self._moved.clear()
                self.waiting.set()
                await self._moved.wait()
                self.waiting.clear()
        return self.present_ms

    def leave(self, participant: str) -> None:
        self.left.append(participant)


def signal_row(
    *,
    position: str = "long",
    opened: float = 43000.0,
    target: float = 44000.0,
    stop: float = 42000.0,
    minutes: int = 60,
    scheduled: bool = False,
    at_minute: int = 0,
    scheduled_minute: int | None = None,
    symbol: str = "BTCUSDT",
    strategy: str = "my-strategy",
    exchange: str = "binance",
    signal_id: str = "stored-1",
    note: str = "",
) -> Signal:
    """Return a row as a store may hold it; times are minutes of the tests' market."""
    row: Any = ScheduledSignal if scheduled else Signal
    made: Signal = row(
        id=signal_id, position=position, note=note, price_open=opened, price_take_profit=target, price_stop_loss=stop,
        minute_estimated_time=minutes, symbol=symbol, exchange_name=exchange, strategy_name=strategy,
        scheduled_at=minute_ms(at_minute if scheduled_minute is None else scheduled_minute),
        pending_at=minute_ms(at_minute),
    )  # fmt: skip
    return made


async def memory_store(backend: Backend | None = None, routes: Mapping[str, Backend] | None = None) -> Store:
    """Return an open store in memory; tests that share ``backend`` share its rows."""
    from holdfast.backends.memory import MemoryBackend

    store = Store(backend or MemoryBackend(), routes=routes, require=Survives.NOTHING)
    await store.open()
    return store


async def put(store: Store, rows: Mapping[Key, Row | None]) -> None:
    """Write rows as they are, past every rule."""
    await store.writer("test").commit(rows)


class Bot:
    """One strategy on one exchange, with everything that it is told kept in ``told``.

    Args:
        market: Where candles come from.
        signals: What the strategy proposes: by minute of the closing candle's close, or a function.
        risk: Validations of the profile ``limit``; None for no profile.
    """

    def __init__(
        self,
        market: Any,
        signals: Mapping[int, Any] | Callable[[str, int], Any] | None = None,
        *,
        strategy: str = "my-strategy",
        exchange: str = "binance",
        interval: str = "1m",
        risk: Sequence[Callable[[Any], Any]] | None = None,
        registry: Registry | None = None,
        callbacks: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        self.market, self.strategy, self.exchange = market, strategy, exchange
        self.registry, self.listeners = registry or Registry(), Listeners()
        self.told: list[tuple[str, Any]] = []
        self.asked: list[int] = []
        self.errors: list[Any] = []
        self.listeners.listen("error", self.errors.append)
        proposals = signals or {}

        def get_signal(symbol: str, when_ms: int) -> Any:
            self.asked.append((when_ms - START_MS) // MINUTE_MS)
            if callable(proposals):
                return proposals(symbol, when_ms)
            return proposals.get((when_ms - START_MS) // MINUTE_MS)

        if exchange not in {one.exchange_name for one in self.registry.list_exchanges()}:
            self.registry.add_exchange(market, exchange_name=exchange)
        if risk is not None and "limit" not in {one.name for one in self.registry.list_risks()}:
            self.registry.add_risk(risk_name="limit", validations=list(risk))
        self.registry.add_strategy(
            get_signal, strategy_name=strategy, interval=interval, risk_name=None if risk is None else "limit",
            callbacks={**self._recorders(), **(callbacks or {})},
        )  # fmt: skip

    def _recorders(self) -> dict[str, Callable[..., Any]]:
        def record(name: str) -> Callable[..., None]:
            return lambda *arguments: self.told.append((name, arguments[-1]))

        names = ("on_open", "on_close", "on_schedule", "on_cancel", "on_active", "on_idle", "on_write")
        return {name: record(name) for name in (*names, "on_partial_profit", "on_partial_loss")}

    def heard(self, name: str) -> list[Any]:
        """Return what the callback ``name`` was told, in order."""
        return [value for told, value in self.told if told == name]

    @property
    def context(self) -> Context:
        return Context(self.exchange, "BTCUSDT", self.strategy)

    def run(self, store: Store, symbol: str = "BTCUSDT", **more: Any) -> LiveRun:
        """Set up a live run without any real waiting."""
        return Live.run(
            symbol, strategy_name=self.strategy, exchange_name=self.exchange, store=store, registry=self.registry,
            listeners=self.listeners, sleep=no_sleep, clock=lambda: minute_ms(0), **more,
        )  # fmt: skip

    async def live(self, store: Store, symbol: str = "BTCUSDT") -> list[Event]:
        """Run until the market ends; the store's invariants must hold then."""
        events = [event async for event in self.run(store, symbol)]
        await sound(store)
        return events


async def session_of(bot: Bot, store: Store, *, holder: str = "test", recover: bool = True, **more: Any) -> Session:
    """Return a session of the bot's context, recovered, its window full up to the start of the market."""
    params = more.pop("params", None) or Params()
    strategy = bot.registry.check_start(bot.strategy, params)
    session = Session(
        bot.context, strategy, bot.registry.exchange(bot.exchange), store, listeners=bot.listeners, params=params,
        risk_profiles={name: bot.registry.risk(name) for name in strategy.risk_names}, holder=holder,
        clock=lambda: minute_ms(0), sleep=no_sleep, **more,
    )  # fmt: skip
    if recover:
        await session.recover()
        for minute in range(-10, 0):
            session.window.push(candle(minute, 43000))
        if session.state.last_candle_ms == 0:
            await session.begin(minute_ms(0))
    return session


async def stepped(session: Session, *candles: Candle, entries: bool = True) -> list[Event]:
    """Step candles one by one, each as the newest, and deliver; return the events that were told."""
    told = []
    for one in candles:
        outcome = session.step(one, entries=entries)
        if outcome is not None:
            await outcome
        told += await session.deliver()
    return told


def proposal(target: float = 44000, stop: float = 42000, **more: Any) -> dict[str, Any]:
    """Return a long as a strategy proposes it, around a price of 43000."""
    return {"position": "long", "priceTakeProfit": target, "priceStopLoss": stop, "minuteEstimatedTime": 60, **more}


async def sound(store: Store) -> None:
    """Fail unless every invariant holds."""
    assert await check_store(store) == []


async def until(condition: Callable[[], Any], *, seconds: float = 60) -> None:
    """Give way until ``condition`` holds; bounded by time, since what it waits for may be a thread's or a disk's."""
    end, turns = time.monotonic() + seconds, 0
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        await asyncio.sleep(0 if turns < 10_000 else 0.001)
        turns += 1
