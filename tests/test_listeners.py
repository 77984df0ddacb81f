"""Listeners: who is told, in which order, and what happens to their mistakes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from rule_kit import CONTEXT, LONG, Walk, at

from holdfast.engine import listeners as module
from holdfast.engine.listeners import Failure, Listeners, Tick
from holdfast.engine.registry import Callbacks
from holdfast.errors import InvalidInputError
from holdfast.rows import Event


@pytest.fixture
def listeners() -> Listeners:
    return Listeners()


def lifecycle() -> list[Event]:
    """Return the events of a signal that opens, reaches levels on both sides and closes."""
    walk = Walk()
    walk.step(at(0), LONG)
    for minute, price in enumerate((43_700.0, 42_300.0), 1):
        walk.step(at(minute, price))
    for minute in range(3, 6):
        walk.step(at(minute, 42_300.0))
    walk.step(at(6, high=44_000.0))
    return walk.events


async def test_everybody_is_told_in_the_order_of_subscription(listeners: Listeners) -> None:
    told: list[str] = []

    async def second(value: str) -> None:
        await asyncio.sleep(0)
        told.append(f"second {value}")

    listeners.listen("signal", lambda value: told.append(f"first {value}"))
    listeners.listen("signal", second)
    await listeners.emit("signal", "a")
    assert told == ["first a", "second a"]


async def test_unsubscribing_ends_it_and_can_be_repeated(listeners: Listeners) -> None:
    told: list[str] = []
    stop = listeners.listen("signal", told.append)
    assert listeners.has("signal")
    await listeners.emit("signal", "a")
    stop()
    stop()
    await listeners.emit("signal", "b")
    assert told == ["a"]
    assert not listeners.has("signal")


async def test_once_takes_the_first_that_its_filter_lets_through(listeners: Listeners) -> None:
    told: list[int] = []
    listeners.listen("signal", told.append, once=True, filter=lambda value: value > 1)
    for value in (1, 2, 3):
        await listeners.emit("signal", value)
    assert told == [2]
    assert not listeners.has("signal")


async def test_news_during_once_does_not_come_too(listeners: Listeners) -> None:
    told: list[int] = []

    async def again(value: int) -> None:
        told.append(value)
        await listeners.emit("signal", value + 1)

    listeners.listen("signal", again, once=True)
    await listeners.emit("signal", 1)
    assert told == [1]


async def test_one_subscription_is_called_one_at_a_time_in_order(listeners: Listeners) -> None:
    running, most, told = 0, 0, []

    async def slow(value: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(3 - value % 3):
            await asyncio.sleep(0)
        told.append(value)
        running -= 1

    listeners.listen("signal", slow)
    await asyncio.gather(*(listeners.emit("signal", value) for value in range(10)))
    assert told == list(range(10))
    assert most == 1


async def test_emit_returns_when_every_listener_has(listeners: Listeners) -> None:
    gate, told = asyncio.Event(), []

    async def waits(value: str) -> None:
        await gate.wait()
        told.append(value)

    listeners.listen("signal", waits)
    telling = asyncio.create_task(listeners.emit("signal", "a"))
    await asyncio.sleep(0)
    assert not telling.done()
    gate.set()
    await telling
    assert told == ["a"]


async def test_a_listener_that_causes_news_of_its_own_topic_gets_it_after(listeners: Listeners) -> None:
    told = []

    async def chain(value: int) -> None:
        if value < 3:
            await listeners.emit("signal", value + 1)
        told.append(value)

    listeners.listen("signal", chain)
    async with asyncio.timeout(5):
        await listeners.emit("signal", 1)
    assert told == [1, 2, 3]


async def test_news_caused_by_a_listener_that_then_fails_still_comes(listeners: Listeners) -> None:
    told, failures = list[int](), list[Failure]()

    async def chain(value: int) -> None:
        told.append(value)
        if value < 3:
            await listeners.emit("signal", value + 1)
        raise RuntimeError(str(value))

    listeners.listen("signal", chain)
    listeners.listen("error", failures.append)
    await listeners.emit("signal", 1)
    assert told == [1, 2, 3]
    assert [str(failure.error) for failure in failures] == ["1", "2", "3"]


async def test_cancelling_one_emit_does_not_block_the_next(listeners: Listeners) -> None:
    told: list[str] = []
    gate = asyncio.Event()

    async def waits(value: str) -> None:
        if value == "a":
            await gate.wait()
        told.append(value)

    listeners.listen("signal", waits)
    first = asyncio.create_task(listeners.emit("signal", "a"))
    second = asyncio.create_task(listeners.emit("signal", "b"))
    await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(5):
        await second
    assert told == ["b"]


async def test_what_a_listener_raises_goes_to_the_error_listeners_and_stops_nobody(listeners: Listeners) -> None:
    told: list[Any] = []
    failures: list[Failure] = []

    def bad(value: Any) -> None:
        raise RuntimeError("my own bug")

    listeners.listen("signal", bad)
    listeners.listen("signal", told.append)
    listeners.listen("error", failures.append)
    event = lifecycle()[0]
    await listeners.emit("signal", event)
    assert told == [event]
    assert (failures[0].where, str(failures[0].error), failures[0].context) == (
        "listener signal",
        "my own bug",
        CONTEXT,
    )


async def test_without_an_error_listener_the_log_has_it(listeners: Listeners, caplog: pytest.LogCaptureFixture) -> None:
    listeners.listen("signal", lambda value: 1 / 0)
    await listeners.emit("signal", "a")
    assert "division by zero" in caplog.text


async def test_an_error_listener_that_fails_is_logged_and_not_told_of_itself(
    listeners: Listeners, caplog: pytest.LogCaptureFixture
) -> None:
    listeners.listen("error", lambda failure: 1 / 0)
    await listeners.report(Failure(where="here", error=ValueError("first")))
    assert "division by zero" in caplog.text
    assert "first" in caplog.text


def test_an_unknown_topic_and_what_cannot_be_called_are_refused(listeners: Listeners) -> None:
    with pytest.raises(InvalidInputError, match="partial_profit"):
        listeners.listen("signals", print)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="callable"):
        listeners.listen("signal", 7)  # type: ignore[arg-type]


async def test_the_callbacks_of_an_event_come_in_their_order_before_the_listeners(listeners: Listeners) -> None:
    told: list[str] = []

    def keep(name: str) -> Callable[[Any], None]:
        return lambda value: told.append(name)

    names = ("on_open", "on_close", "on_tick", "on_partial_profit", "on_partial_loss")
    kept: dict[str, Any] = {name: keep(name) for name in names}
    callbacks = Callbacks(
        **kept,
        on_write=lambda symbol, signal: told.append(f"on_write {symbol} {signal and signal.id[:7]}"),
    )
    for topic in ("signal", "signal_live", "signal_backtest", "partial_profit", "partial_loss"):
        listeners.listen(topic, keep(topic))
    events = lifecycle()
    assert [event.kind for event in events[:2]] == ["opened", "partial_profit"]
    await listeners.tell(events[0], callbacks, "live")
    await listeners.tell(events[1], callbacks, "live")
    await listeners.tell(next(event for event in events if event.kind == "partial_loss"), callbacks, "backtest")
    await listeners.tell(events[-1], callbacks, "live")
    assert told == [
        "on_write BTCUSDT binance", "on_open", "on_tick", "signal_live", "signal",
        "on_partial_profit", "on_tick", "partial_profit", "signal_live", "signal",
        "on_partial_loss", "on_tick", "partial_loss", "signal_backtest", "signal",
        "on_close", "on_write BTCUSDT None", "on_tick", "signal_live", "signal",
    ]  # fmt: skip


async def test_a_callback_that_raises_is_reported_and_the_next_is_called(listeners: Listeners) -> None:
    failures: list[Failure] = []
    told: list[Any] = []

    async def bad(event: Event) -> None:
        raise RuntimeError("broker gone")

    listeners.listen("error", failures.append)
    await listeners.tell(lifecycle()[-1], Callbacks(on_close=bad, on_tick=told.append), "live")
    assert failures[0].where == "callback bad"
    assert failures[0].context == CONTEXT
    assert [event.kind for event in told] == ["closed"]


@pytest.mark.parametrize(("kind", "own"), [("idle", "on_idle"), ("active", "on_active"), ("waiting", None)])
async def test_a_tick_goes_to_its_callback_and_the_listeners_of_signals(
    listeners: Listeners, kind: Any, own: str | None
) -> None:
    told: list[str] = []

    def keep(name: str) -> Callable[[Any], None]:
        return lambda value: told.append(name)

    kept: dict[str, Any] = {name: keep(name) for name in ("on_idle", "on_active", "on_tick")}
    callbacks = Callbacks(**kept)
    listeners.listen("signal", lambda tick: told.append(tick.kind))
    listeners.listen("signal_live", keep("live"))
    listeners.listen("signal_backtest", keep("backtest"))
    tick = Tick(kind=kind, context=CONTEXT, price=1.0, at_ms=1)
    await listeners.tell_tick(tick, callbacks, "live")
    await listeners.tell_tick(tick, Callbacks(), "backtest")
    assert told == [*([own] if own else []), "on_tick", "live", kind, "backtest", kind]


def test_ticks_are_wanted_only_where_somebody_listens(listeners: Listeners) -> None:
    assert not listeners.wants_ticks(Callbacks(on_open=print), "live")
    assert listeners.wants_ticks(Callbacks(on_idle=print), "live")
    listeners.listen("signal_backtest", print)
    assert listeners.wants_ticks(Callbacks(), "backtest")
    assert not listeners.wants_ticks(Callbacks(), "live")
    listeners.clear()
    assert not listeners.wants_ticks(Callbacks(), "backtest")


async def test_every_documented_listen_function_subscribes_to_its_topic() -> None:
    module.default_listeners.clear()
    told: list[str] = []
    try:
        for topic in module.TOPICS:
            stop = getattr(module, f"listen_{topic}")(told.append)
            await module.default_listeners.emit(topic, topic)
            stop()
            assert not module.default_listeners.has(topic)
        for topic in ("signal", "signal_live", "signal_backtest", "risk", "done_live", "done_backtest"):
            getattr(module, f"listen_{topic}_once")(lambda value: True, told.append)
            await module.default_listeners.emit(topic, topic)
            assert not module.default_listeners.has(topic)
    finally:
        module.default_listeners.clear()
    assert told[: len(module.TOPICS)] == list(module.TOPICS)


def test_one_set_of_listeners_serves_several_event_loops(listeners: Listeners) -> None:
    told: list[int] = []

    async def slow(value: int) -> None:
        await asyncio.sleep(0)
        told.append(value)

    async def both() -> None:
        await asyncio.gather(listeners.emit("signal", 1), listeners.emit("signal", 2))

    listeners.listen("signal", slow)
    asyncio.run(both())
    asyncio.run(both())
    assert told == [1, 2, 1, 2]
