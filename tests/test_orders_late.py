"""What comes late from a venue, or never: entries that it forbids, listeners and leavings that it must not hold up."""

from __future__ import annotations

from fakes import candle, memory_store, proposal
from order_kit import Desk

from holdfast.engine.session import Session
from holdfast.rows import Signal


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
