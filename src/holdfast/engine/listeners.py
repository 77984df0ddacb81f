"""Listeners: who is told, and in which order.

Two kinds of news. *Events* (:class:`~holdfast.rows.Event`) were committed with the
state that they tell of; they have an id and come at least once. *Ticks* tell of a
candle that changed nothing; they are made only while somebody listens, and are
forgotten with the process.

A listener, sync or async, is called with one value. Listeners of one
subscription run one at a time, in the order of the news. What a listener raises
goes to ``listen_error``, or to the log while nobody listens there; it never
stops the bot, and the news counts as delivered.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec

from ..cancellation import no_stray_cancellation
from ..errors import InvalidInputError
from ..names import Context
from ..rows import Event, Signal
from .registry import Callbacks

Listener = Callable[[Any], Any]
Unsubscribe = Callable[[], None]
Mode = Literal["live", "backtest"]
Topic = Literal[
    "signal", "signal_live", "signal_backtest", "error", "exit", "done_live", "done_backtest", "progress",
    "performance", "validation", "risk", "partial_profit", "partial_loss", "mode", "trouble",
]  # fmt: skip
TOPICS: tuple[Topic, ...] = Topic.__args__  # type: ignore[attr-defined]

_log = logging.getLogger("holdfast")


class Tick(msgspec.Struct, frozen=True, kw_only=True):
    """A candle that changed nothing."""

    kind: Literal["idle", "active", "waiting"]
    """Nothing is open; a signal is open; a scheduled signal waits."""
    context: Context
    price: float
    at_ms: int
    signal: Signal | None = None
    percent: float = 0.0
    """Progress of the open signal: above 0 towards its target, below 0 towards its stop."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """What ``listen_error``, ``listen_validation`` and ``listen_exit`` are told."""

    where: str
    """What failed, such as ``strategy`` or ``listener signal``."""
    error: Exception
    context: Context | None = None
    at_ms: int = 0
    """Close time of the candle concerned; 0 where there is none."""


class ModeChange(msgspec.Struct, frozen=True, kw_only=True):
    """What ``listen_mode`` is told: a store is slow, full, lost or well again; see :mod:`holdfast.engine.modes`."""

    before: str
    """Name of a :class:`~holdfast.engine.modes.Mode`, such as ``NORMAL``."""
    after: str
    why: str = ""
    """In plain words; empty in ``NORMAL``."""


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """What ``listen_trouble`` is told: somebody should look at a context."""

    kind: Literal["fenced", "quarantine", "emergency"]
    """Another owner has it; something of it is in quarantine, so nothing opens; an exit went to the emergency journal,
    or what lies there cannot be merged."""
    context: Context | None
    why: str


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """A run has ended."""

    context: Context
    mode: Mode
    frame_name: str = ""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a backtest is."""

    context: Context
    frame_name: str
    done: int
    """Minutes of the frame behind it."""
    total: int
    """Minutes of the frame."""

    @property
    def percent(self) -> float:
        """How much of the frame is done, 0 to 100."""
        return 100.0 * self.done / self.total if self.total else 100.0


class Performance(msgspec.Struct, frozen=True, kw_only=True):
    """Where time went. Durations are seconds."""

    context: Context
    mode: Mode
    metric: str
    """What was measured, such as ``tick`` or ``backtest``."""
    seconds: float
    candles: int = 1
    parts: dict[str, float] = msgspec.field(default_factory=dict)
    """Seconds by part, such as ``fetch`` and ``strategy``."""


class _Subscription:
    """One listener, called one value at a time in order of arrival."""

    __slots__ = ("_busy", "_inside", "_later", "_turn", "active", "filter", "listener", "once")

    def __init__(self, listener: Listener, once: bool, filter: Callable[[Any], Any] | None) -> None:
        self.listener, self.once, self.filter = listener, once, filter
        self.active = True
        self._busy = 0
        self._turn = asyncio.Lock()
        self._inside: asyncio.Task[Any] | None = None
        self._later: deque[Any] = deque()

    async def deliver(self, value: Any, failed: Callable[[Any, Exception], Awaitable[None]]) -> None:
        task = asyncio.current_task()
        if task is not None and self._inside is task:
            self._later.append(value)  # told from inside itself: waiting for its own turn would never end
            return
        if not self._busy:
            self._turn = asyncio.Lock()  # a fresh one: the last loop may be another
        self._busy += 1
        try:
            async with self._turn:
                self._inside = task
                self._later.append(value)
                try:
                    while self._later:
                        next_value = self._later.popleft()
                        try:
                            await self._call(next_value)
                        except Exception as error:
                            await failed(next_value, error)
                finally:
                    self._inside = None
        finally:
            self._busy -= 1

    async def _call(self, value: Any) -> None:
        if not self.active or (self.filter is not None and not self.filter(value)):
            return
        if self.once:
            self.active = False  # before the call, so that news during it does not come too
        with no_stray_cancellation:
            result = self.listener(value)
            if inspect.isawaitable(result):
                await result


class Listeners:
    """The subscriptions of one process (or of one test)."""

    def __init__(self) -> None:
        self._topics: dict[str, tuple[_Subscription, ...]] = dict.fromkeys(TOPICS, ())

    def listen(
        self, topic: Topic, listener: Listener, *, once: bool = False, filter: Callable[[Any], Any] | None = None
    ) -> Unsubscribe:
        """Call ``listener`` with each value of ``topic``, or once with the first that ``filter`` lets through.

        Returns:
            A function that ends the subscription; calling it again does nothing.
        """
        if topic not in self._topics:
            raise InvalidInputError(f"there is no topic {topic!r}: use one of {', '.join(TOPICS)}")
        if not callable(listener):
            raise InvalidInputError(f"a listener must be callable, not {listener!r:.80}")
        subscription = _Subscription(listener, once, filter)
        self._topics[topic] = (*self._topics[topic], subscription)

        def unsubscribe() -> None:
            subscription.active = False
            self._drop(topic, subscription)

        return unsubscribe

    def has(self, *topics: Topic) -> bool:
        """Tell whether anybody listens to one of ``topics``, so that a hot path can make nothing."""
        return any(self._topics[topic] for topic in topics)

    async def emit(self, topic: Topic, value: Any) -> None:
        """Tell everybody who listens to ``topic``, in the order in which they subscribed; returns when all have.

        Raises nothing but cancellation: what a listener raises goes to the error listeners.
        """
        for subscription in self._topics[topic]:
            if not subscription.active:
                continue
            await subscription.deliver(value, lambda told, error: self._failed(topic, told, error))
            if not subscription.active:
                self._drop(topic, subscription)

    def clear(self) -> None:
        """End every subscription."""
        for topic, subscriptions in self._topics.items():
            for subscription in subscriptions:
                subscription.active = False
            self._topics[topic] = ()

    def _drop(self, topic: str, subscription: _Subscription) -> None:
        self._topics[topic] = tuple(one for one in self._topics[topic] if one is not subscription)

    async def _failed(self, topic: Topic, value: Any, error: Exception) -> None:
        if topic == "error":  # an error listener that fails must not call itself for ever
            _log.error("an error listener raised %r while told of %r", error, value, exc_info=error)
            return
        context = value.signal.context if isinstance(value, Event) else getattr(value, "context", None)
        await self.report(Failure(where=f"listener {topic}", error=error, context=context))

    async def report(self, failure: Failure) -> None:
        """Tell the error listeners; without any, the log."""
        if self.has("error"):
            await self.emit("error", failure)
        else:
            _log.error("%s: %s: %s", failure.where, failure.context, failure.error, exc_info=failure.error)

    async def tell(self, event: Event, callbacks: Callbacks, mode: Mode) -> None:
        """Tell a strategy's callbacks and all listeners of one committed event, the same way in every mode.

        Order: ``on_write(row)`` before ``on_open``; ``on_close`` before ``on_write(None)``; then ``on_tick``;
        then the listeners of levels, of the mode, of all signals. Raises nothing but cancellation.
        """
        for callback, arguments in _calls(event, callbacks):
            await self.call(callback, *arguments, where="callback", context=event.signal.context, at_ms=event.at_ms)
        if event.kind == "partial_profit":
            await self.emit("partial_profit", event)
        elif event.kind == "partial_loss":
            await self.emit("partial_loss", event)
        await self.emit("signal_live" if mode == "live" else "signal_backtest", event)
        await self.emit("signal", event)

    def wants_ticks(self, callbacks: Callbacks, mode: Mode) -> bool:
        """Tell whether a quiet candle interests anybody."""
        return (
            callbacks.on_tick is not None
            or callbacks.on_active is not None
            or callbacks.on_idle is not None
            or self.has("signal", "signal_live" if mode == "live" else "signal_backtest")
        )

    async def tell_tick(self, tick: Tick, callbacks: Callbacks, mode: Mode) -> None:
        """Tell of a quiet candle: ``on_active`` or ``on_idle``, ``on_tick``, then the listeners."""
        own = {"active": callbacks.on_active, "idle": callbacks.on_idle}.get(tick.kind)
        for callback in (own, callbacks.on_tick):
            if callback is not None:
                await self.call(callback, tick, where="callback", context=tick.context, at_ms=tick.at_ms)
        await self.emit("signal_live" if mode == "live" else "signal_backtest", tick)
        await self.emit("signal", tick)

    async def call(
        self, callback: Callable[..., Any], *arguments: Any, where: str, context: Context, at_ms: int = 0
    ) -> None:
        """Call a user's function, sync or async; what it raises is reported, not lost, and stops nothing."""
        try:
            with no_stray_cancellation:
                result = callback(*arguments)
                if inspect.isawaitable(result):
                    await result
        except Exception as error:
            name = getattr(callback, "__name__", type(callback).__name__)
            await self.report(Failure(where=f"{where} {name}", error=error, context=context, at_ms=at_ms))


def _calls(event: Event, callbacks: Callbacks) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    signal = event.signal
    wanted: list[tuple[Callable[..., Any] | None, tuple[Any, ...]]] = []
    match event.kind:
        case "opened":
            wanted = [(callbacks.on_write, (signal.symbol, signal)), (callbacks.on_open, (event,))]
        case "closed":
            wanted = [(callbacks.on_close, (event,)), (callbacks.on_write, (signal.symbol, None))]
        case "scheduled":
            wanted = [(callbacks.on_schedule, (event,))]
        case "cancelled":
            wanted = [(callbacks.on_cancel, (event,))]
        case "partial_profit":
            wanted = [(callbacks.on_partial_profit, (event,))]
        case "partial_loss":
            wanted = [(callbacks.on_partial_loss, (event,))]
    wanted.append((callbacks.on_tick, (event,)))
    return [(callback, arguments) for callback, arguments in wanted if callback is not None]


default_listeners = Listeners()
"""What the module's functions subscribe to, and every run that is given no other."""


def _listening(topic: Topic) -> Callable[[Listener], Unsubscribe]:
    def listen(listener: Listener) -> Unsubscribe:
        return default_listeners.listen(topic, listener)

    listen.__name__ = listen.__qualname__ = f"listen_{topic}"
    listen.__doc__ = f"Call ``listener`` with each value of ``{topic}``; returns a function that ends it."
    return listen


def _listening_once(topic: Topic) -> Callable[[Callable[[Any], Any], Listener], Unsubscribe]:
    def listen_once(filter: Callable[[Any], Any], listener: Listener) -> Unsubscribe:
        return default_listeners.listen(topic, listener, once=True, filter=filter)

    listen_once.__name__ = listen_once.__qualname__ = f"listen_{topic}_once"
    listen_once.__doc__ = f"Call ``listener`` once, with the first value of ``{topic}`` that ``filter`` lets through."
    return listen_once


listen_signal = _listening("signal")
listen_signal_live = _listening("signal_live")
listen_signal_backtest = _listening("signal_backtest")
listen_error = _listening("error")
listen_exit = _listening("exit")
listen_done_live = _listening("done_live")
listen_done_backtest = _listening("done_backtest")
listen_progress = _listening("progress")
listen_performance = _listening("performance")
listen_validation = _listening("validation")
listen_risk = _listening("risk")
listen_partial_profit = _listening("partial_profit")
listen_partial_loss = _listening("partial_loss")
listen_mode = _listening("mode")
listen_trouble = _listening("trouble")

listen_signal_once = _listening_once("signal")
listen_signal_live_once = _listening_once("signal_live")
listen_signal_backtest_once = _listening_once("signal_backtest")
listen_done_live_once = _listening_once("done_live")
listen_done_backtest_once = _listening_once("done_backtest")
listen_risk_once = _listening_once("risk")
listen_partial_profit_once = _listening_once("partial_profit")
listen_partial_loss_once = _listening_once("partial_loss")
