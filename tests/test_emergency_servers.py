"""On every kind of store, as it really fails: positions are closed, and nothing is lost or repeated."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from emergency_kit import CONTEXT, policy_of
from fakes import candle, flat, sound
from order_kit import Desk, orders_in
from test_emergency_stores import drain, reached
from troubled_stores import TROUBLES

from holdfast.contract import Survives
from holdfast.domains import ledger_key
from holdfast.engine.listeners import ModeChange, Trouble
from holdfast.engine.live import Live, LiveRun
from holdfast.engine.session import Session
from holdfast.rows import Event
from holdfast.store import Store
from holdfast.urls import open_backend


@pytest.mark.parametrize("kind", TROUBLES)
async def test_a_position_is_closed_whatever_befalls_the_store_and_nothing_is_lost_or_repeated(
    tmp_path: Path, kind: str
) -> None:
    async with TROUBLES[kind](tmp_path) as trouble:
        store = Store(open_backend(trouble.url), require=Survives.NOTHING)
        await store.open()
        desk = Desk(candles=flat(43000, -10, 3), hold=True)
        modes: list[ModeChange] = []
        troubles: list[Trouble] = []
        desk.bot.listeners.listen("mode", modes.append)
        desk.bot.listeners.listen("trouble", troubles.append)
        told: list[Event] = []
        run = _run(desk, store, (trouble.journal or tmp_path) / "emergency")
        running = asyncio.create_task(drain(run, told))
        await reached(lambda: desk.market.waiting.is_set() and desk.broker.held_quantity == 2)
        await reached(lambda: _settled(run))
        await trouble.begin()
        desk.market.go_on([candle(4, 43000, high=44100)])
        await reached(lambda: desk.broker.held_quantity == 0)
        closing = desk.broker.sent[-1]
        assert (closing.reduce_only, closing.quantity, closing.side) == (True, 2, "sell")
        if trouble.refuses_exits:
            await reached(lambda: [event.kind for event in told] == ["opened", "closed"])
            assert [one.kind for one in troubles] == ["emergency"]
            assert _session(run).unsaved > 0
        if trouble.is_full:
            await reached(lambda: ("CLOSE_ONLY", "the store is full") in [(one.after, one.why) for one in modes])
        await trouble.end()
        desk.market.go_on(flat(43000, 5, 9))
        await reached(lambda: desk.market.waiting.is_set() and _settled(run))
        desk.market.finish()
        await running
        assert len(desk.broker.sent) == 2, "the entry and its exit, each once"
        assert [event.number for event in told] == [1, 2]
        orders = (await orders_in(store)).orders.values()
        assert [(order.action, order.state) for order in orders] == [("open", "filled"), ("close", "filled")]
        assert closing.client_order_id in {order.client_order_id for order in orders}
        await sound(store)
        assert await store.get(ledger_key(CONTEXT, told[0].signal.id)) is not None
        await store.close()


def _run(desk: Desk, store: Store, emergency: Path) -> LiveRun:
    """Set up a run whose time is the real one."""
    return Live.run(
        "BTCUSDT", strategy_name=desk.bot.strategy, exchange_name=desk.bot.exchange, store=store,
        registry=desk.bot.registry, listeners=desk.bot.listeners, clock=desk.time,
        on_trouble=policy_of(emergency, patience_seconds=0.4),
    )  # fmt: skip


def _session(run: Any) -> Session:
    session: Session = run._entry.driver.session
    return session


def _settled(run: Any) -> bool:
    """Whether the store has everything that was decided and told."""
    session = _session(run)
    return session.unsaved == 0 and len(session.outbox) == 0
