"""Rows that somebody wrote again as they were, as `holdfast rekey` does: nothing has happened, whatever number."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from fakes import Bot, FakeMarket, candle, flat, memory_store, put, session_of, signal_row, stepped
from test_ownership import Process, Time, two  # noqa: F401 -- a fixture

from holdfast.domains import context_key, worker_key
from holdfast.engine.session import Session
from holdfast.engine.worker import Life, Watch
from holdfast.errors import FencedError
from holdfast.names import Context
from holdfast.rows import ScheduledSignal, Worker
from holdfast.store import Store

CONTEXT = Context("binance", "BTCUSDT", "my-strategy")
SCHEDULE_KEY = context_key("schedule", CONTEXT)
OPENS = {1: {"position": "long", "priceTakeProfit": 44000, "priceStopLoss": 42000, "minuteEstimatedTime": 60}}


def not_waiting(**more: Any) -> ScheduledSignal:
    """A row in the schedule domain that waits for nothing, as a class that keeps both domains in one place has it."""
    row = msgspec.structs.replace(signal_row(), **more)
    return ScheduledSignal(**{name: getattr(row, name) for name in type(row).__struct_fields__})


@pytest.fixture
async def beside() -> AsyncIterator[tuple[Session, Store]]:
    """A session that ignored such a row when it recovered."""
    store = await memory_store()
    await put(store, {SCHEDULE_KEY: not_waiting()})
    bot = Bot(FakeMarket({"BTCUSDT": flat(43000, -10, 9)}), OPENS)
    session = await session_of(bot, store)
    yield session, store
    await session.close()


async def test_an_entry_beside_a_row_that_was_ignored_and_re_keyed_is_made(beside: tuple[Session, Store]) -> None:
    session, store = beside
    for _ in range(2):
        await put(store, {SCHEDULE_KEY: not_waiting()})
    events = await stepped(session, candle(0, 43000), candle(1, 43000))
    assert [event.kind for event in events] == ["opened"]


async def test_an_entry_beside_a_row_that_is_another_by_now_is_refused(beside: tuple[Session, Store]) -> None:
    session, store = beside
    await put(store, {SCHEDULE_KEY: not_waiting(id="another")})
    with pytest.raises(FencedError, match="where a signal was about to go"):
        await stepped(session, candle(0, 43000), candle(1, 43000))


async def test_a_worker_whose_row_is_re_keyed_again_and_again_is_dead_after_its_lease(
    two: tuple[Process, Process, Time],  # noqa: F811
) -> None:
    first, second, time = two
    session = await first.session()
    await first.die()
    assert session.owner is not None
    key = worker_key(session.owner.holder)
    found = await second.store.get(key)
    assert found is not None and isinstance(found.row, Worker)
    watch, seen = Watch(second.store, boot_clock=time), []
    for _ in range(8):
        life, _row = (await watch.look(found.row.holder))[found.row.holder]
        seen.append(life)
        await put(second.store, {key: found.row})  # as it was, under another number
        time.now += found.row.lease_seconds / 4
    assert Life.ALIVE not in seen
    assert seen[-1] is Life.DEAD
    stored = await second.store.get(key)
    assert stored is not None
    assert watch.version(found.row.holder) == stored.version - 1, "a commit that expects the newest row that was seen"
