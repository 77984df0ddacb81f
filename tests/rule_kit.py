"""What the tests of the rules share: candles that say what they touch, and a market made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from holdfast.engine.backtest import Backtest
from holdfast.engine.listeners import Listeners
from holdfast.engine.registry import Registry
from holdfast.names import Context
from holdfast.rows import Event
from holdfast.rules.candles import MINUTE_MS, Candle, Window
from holdfast.rules.params import Params
from holdfast.rules.signals import AskRisk, AskStrategy, Question, Spec, State, Transition, answer, step

T0 = 1_700_000_100_000 - MINUTE_MS
"""Open time of the first candle; it closes on a whole five minutes, so that a strategy is asked on it."""

CONTEXT = Context("binance", "BTCUSDT", "trend")
LONG: dict[str, Any] = {
    "position": "long",
    "priceTakeProfit": 44_000.0,
    "priceStopLoss": 42_000.0,
    "minuteEstimatedTime": 60,
}
SHORT: dict[str, Any] = {**LONG, "position": "short", "priceTakeProfit": 42_000.0, "priceStopLoss": 44_000.0}


def at(minute: int, price: float = 43_000.0, *, high: float | None = None, low: float | None = None) -> Candle:
    """Return the candle of a minute: flat at ``price``, with the wicks given."""
    return Candle(T0 + minute * MINUTE_MS, price, max(price, high or price), min(price, low or price), price, 1.0)


def flat(minutes: Iterable[int], price: float = 43_000.0) -> list[Candle]:
    """Return flat candles for these minutes."""
    return [at(minute, price) for minute in minutes]


def spec(interval_ms: int = 5 * MINUTE_MS, *, risk_names: tuple[str, ...] = (), **params: Any) -> Spec:
    """Return the spec of :data:`CONTEXT`."""
    return Spec(CONTEXT, interval_ms, Params(**params), risk_names)


class Walk:
    """Steps one context by hand, and keeps what happened."""

    def __init__(self, given: Spec | None = None, state: State | None = None) -> None:
        self.spec = given or spec()
        self.state = state or State()
        self.window = Window(self.spec.params.avg_price_candles_count)
        self.events: list[Event] = []
        self.asked: list[int] = []

    def step(
        self, candle: Candle, reply: Any = None, *, entries: bool = True, risk: str | None = None
    ) -> tuple[Event, ...]:
        """Step one candle; ``reply`` goes to the strategy's question, ``risk`` to the profiles'."""
        self.window.push(candle)
        outcome = step(self.state, candle, self.window, self.spec, entries=entries)
        while isinstance(outcome, Question):
            if isinstance(outcome, AskStrategy):
                self.asked.append((candle.open_time_ms - T0) // MINUTE_MS)
                outcome = answer(outcome, reply)
            elif isinstance(outcome, AskRisk):
                outcome = answer(outcome, risk)
            else:
                outcome = answer(outcome, reply)
        if outcome is None:
            return ()
        assert isinstance(outcome, Transition)
        self.state = outcome.state
        self.events += outcome.events
        return outcome.events

    def kinds(self) -> list[str]:
        """Return what happened, such as ``closed take_profit``."""
        return [event.kind if event.reason is None else f"{event.kind} {event.reason}" for event in self.events]


def market(candles: Sequence[Candle]) -> Callable[[str, str, int, int], Sequence[Candle]]:
    """Return a ``get_candles`` over one-minute ``candles``."""

    def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> Sequence[Candle]:
        assert interval == "1m"
        return [candle for candle in candles if candle.open_time_ms >= since_ms][:limit]

    return get_candles


class History:
    """One strategy, one exchange and one frame in a registry of their own; ``log`` keeps every callback in order."""

    def __init__(
        self,
        candles: Sequence[Candle],
        get_signal: Callable[[str, int], Any],
        *,
        interval: str = "5m",
        frame: tuple[int, int] | None = None,
        risks: dict[str, Any] | None = None,
    ) -> None:
        self.registry, self.listeners = Registry(), Listeners()
        self.log: list[tuple[str, Any]] = []
        first, last = frame or (candles[0].open_time_ms, candles[-1].open_time_ms)
        self.registry.add_exchange(exchange_name="binance", get_candles=market(candles))
        self.registry.add_frame(frame_name="frame", interval="1m", start=first, end=last)
        for name, validations in (risks or {}).items():
            self.registry.add_risk(risk_name=name, validations=validations)
        names = ("on_open", "on_close", "on_schedule", "on_cancel", "on_partial_profit", "on_partial_loss")
        callbacks: dict[str, Any] = {name: self._keeper(name) for name in names}
        callbacks["on_write"] = lambda symbol, signal: self.log.append(("on_write", signal))
        self.registry.add_strategy(
            get_signal, strategy_name="trend", interval=interval, risk_list=tuple(risks or ()), callbacks=callbacks
        )

    def _keeper(self, name: str) -> Callable[[Event], None]:
        return lambda event: self.log.append((name, event))

    async def run(self) -> list[Event]:
        """Run the backtest and return what it yielded."""
        found = Backtest.run(
            "BTCUSDT", strategy_name="trend", exchange_name="binance", frame_name="frame",
            registry=self.registry, listeners=self.listeners,
        )  # fmt: skip
        return [event async for event in found]

    def written(self) -> list[Any]:
        """Return what ``on_write`` was given, in order."""
        return [value for name, value in self.log if name == "on_write"]

    def names(self) -> list[str]:
        """Return the names of the callbacks, in order."""
        return [name for name, _ in self.log]

    def told(self, name: str) -> list[Event]:
        """Return the events that one callback was given."""
        return [cast("Event", value) for called, value in self.log if called == name]


def once(reply: dict[str, Any]) -> Callable[[str, int], Any]:
    """Return a strategy that proposes ``reply`` the first time it is asked, and then nothing."""
    return turns(reply)


def turns(*replies: dict[str, Any] | None) -> Callable[[str, int], Any]:
    """Return a strategy that proposes these, one each time it is asked, and then nothing."""
    left = list(replies)
    return lambda symbol, when_ms: left.pop(0) if left else None
