"""What comes late from a venue, or never: entries that it forbids, listeners and leavings that it must not hold up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes import candle, memory_store, proposal
from order_kit import Desk, orders_in

from holdfast.engine.broker import Features
from holdfast.engine.orders import Book, Terms, Wait, next_step
from holdfast.engine.session import Session
from holdfast.rows import Order, Signal


async def test_nothing_begins_while_a_late_fill_of_an_earlier_signal_waits_to_be_closed() -> None:
    desk = Desk({minute: proposal(quantity=2) for minute in (1, 63)})
    store = await memory_store()
    session = await desk.session(store)
    desk.broker.faults = ["resting"]
    first = await opened(session, minute=0)
    executor = session.executor
    assert executor is not None
    await desk_sleeps(desk, 400, until=lambda: executor.book.of(first.id)[0].state == "cancelled")
    await session.settle_orders(candle(1, 43000))
    assert session.state.signal is None and session.state.scheduled is None
    quiet = session.step(candle(61, 43000))  # the strategy is asked, and proposes nothing: nothing stands in the way
    assert quiet is None or await quiet is None
    desk.broker.faults = ["reject"] * 50  # its exit does not come at once
    entry = executor.book.entry(first.id)
    assert entry is not None
    desk.broker.book.fill(entry.client_order_id)  # it crossed its cancellation
    await desk_sleeps(desk, 80, until=lambda: executor.book.position(first.id) == 2)
    assert executor.blocks_entries

    again = session.step(candle(62, 43000))

    assert again is None or await again is None
    assert session.state.signal is None
    assert executor.book.position(first.id) == 2
    await session.close()
    await store.close()


async def opened(session: Session, *, minute: int) -> Signal:
    again = session.step(candle(minute, 43000))
    assert again is not None
    await again
    assert session.state.signal is not None
    return session.state.signal


async def desk_sleeps(desk: Desk, seconds: int, *, until: object) -> None:
    assert callable(until)
    for _ in range(seconds):
        await desk.time.sleep(1)
        if until():
            return
    raise AssertionError("it never came to that")


async def test_a_listener_that_never_returns_keeps_no_exit_from_being_sent() -> None:
    desk = Desk()
    store = await memory_store()
    session = await desk.session(store)
    heard: list[object] = []
    enough = asyncio.Event()

    async def hang(failure: object) -> None:
        heard.append(failure)
        await enough.wait()

    desk.bot.listeners.listen("error", hang)
    signal = await opened(session, minute=0)
    executor = session.executor
    assert executor is not None
    await desk_sleeps(desk, 60, until=lambda: executor.book.position(signal.id) == 2)
    desk.broker.faults = ["reject"]
    again = session.step(candle(1, 41900, low=41000))
    assert again is not None
    await again
    await desk_sleeps(desk, 600, until=lambda: desk.broker.held_quantity == 0)
    assert heard, "the refusal was told"
    enough.set()
    await session.close()
    await store.close()


async def test_a_run_that_is_to_leave_does_not_wait_for_a_venue_that_cannot_be_asked() -> None:
    desk = Desk()
    store = await memory_store()
    desk.broker.faults, desk.broker.read_faults = ["lost request"], 10**9
    run = desk.run(store)

    async def watch() -> list[str]:
        return [event.kind async for event in run]

    watching = asyncio.ensure_future(watch())
    await desk_sleeps(desk, 300, until=lambda: desk.broker.sent)
    run.leave()
    await desk_sleeps(desk, 300, until=watching.done)
    assert await watching == ["opened"]
    (entry,) = (await orders_in(store)).orders.values()
    assert entry.state in ("intended", "unknown"), "whoever goes on asks"
    await store.close()


@pytest.mark.parametrize("state", ["unknown", "rejected"])
def test_a_clock_that_is_set_back_an_hour_delays_no_exit(state: Any) -> None:
    now_ms, hour_ms = 10_000_000_000, 3_600_000
    promised = Features(refuses_repeated_ids="always", refuses_expired=True, reduce_only=True)
    terms = Terms(
        account="a", features=promised, entry_validity_ms=30_000, exit_validity_ms=10_000, grace_ms=25_000, poll_ms=1000
    )  # fmt: skip
    common: dict[str, Any] = {
        "context": ("x", "B", "s"), "account": "a", "signal_id": "s1", "quantity": 2.0, "epoch": 1,
        "intended_at_ms": now_ms, "expires_at_ms": now_ms + 10_000,
    }  # fmt: skip
    entry = Order(client_order_id="o", action="open", side="buy", state="filled", filled_quantity=2.0, **common)
    leaving = Order(client_order_id="c", action="close", side="sell", state=state, **common)
    book = Book([entry, leaving])
    for at_ms in (now_ms + 100, now_ms - hour_ms):
        due = next_step(book, None, terms, now_ms=at_ms, epoch=1, asked={"c": now_ms})
        assert isinstance(due, Wait) is (at_ms > now_ms)
