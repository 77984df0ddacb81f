"""A live run over ccxt and the venue of ours: the engine's orders, with answers that are lost on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import Bot, FakeMarket, candle, flat, memory_store, proposal
from order_kit import orders_in
from venue_kit import Remote, client_of, started

from holdfast.brokers.ccxt import CcxtBroker
from holdfast.engine.live import Live, LiveRun
from holdfast.rules.params import reset_config, set_config
from holdfast.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:enable_cleanup_closed:DeprecationWarning")


@pytest.fixture
def venue(tmp_path: Path) -> Iterator[Remote]:
    with started(tmp_path) as remote:
        yield remote


@pytest.fixture
def brief() -> Iterator[None]:
    """Orders are over soon: what ended is looked at once more when it can no longer change."""
    set_config(entry_validity_seconds=4, exit_validity_seconds=1, order_grace_seconds=0.3)
    yield
    reset_config()


def run_of(bot: Bot, store: Store, *, longest_sleep_seconds: float) -> LiveRun:
    """Set up a live run by the real clock that never sleeps long."""
    return Live.run(
        "BTCUSDT", strategy_name=bot.strategy, exchange_name=bot.exchange, store=store, registry=bot.registry,
        listeners=bot.listeners, sleep=lambda seconds: asyncio.sleep(min(seconds, longest_sleep_seconds)),
        clock=lambda: int(time.time() * 1000),
    )  # fmt: skip


@pytest.mark.usefixtures("brief")
async def test_a_trade_stands_once_at_the_venue_though_both_its_answers_were_lost(venue: Remote) -> None:
    venue("charge", fee="0.001")
    market = FakeMarket({"BTCUSDT": [*flat(43000, -10, 4), candle(5, 43000, high=44100), *flat(43000, 6, 9)]})
    broker = CcxtBroker(client_of(venue.port), symbols=["BTCUSDT"])
    market.broker = broker  # type: ignore[attr-defined]
    bot = Bot(market, {1: proposal(quantity=2)})
    store = await memory_store()
    venue.faults("429", "lose the answer", "504 applied")  # the entry twice, then the exit
    run = run_of(bot, store, longest_sleep_seconds=0.05)
    try:
        async with asyncio.timeout(20):
            events = [event.kind async for event in run]
        book = await orders_in(store)
        held = await broker.positions()
    finally:
        await store.close()
        await broker.close()
    assert events == ["opened", "closed"]
    assert venue("state")["faults"] == [], "each was used"
    taken = [(o["side"], o["origQty"], o["status"]) for o in venue.orders()]
    assert taken[:2] == [("BUY", "2", "FILLED"), ("SELL", "1.998", "FILLED")], "and nothing twice"
    assert {o["clientOrderId"] for o in venue.orders()} <= book.orders.keys()
    assert len(taken) == 2
    assert held == []
    assert all(map(book.is_settled, book.signal_ids()))


@pytest.mark.usefixtures("brief")
async def test_what_is_left_below_the_step_is_told_and_holds_nothing_up(venue: Remote) -> None:
    venue("charge", fee="0.001")
    candles = [*flat(43000, -10, 4), candle(5, 43000, high=44100), *flat(43000, 6, 9), candle(10, 43000, high=44100)]
    market = FakeMarket({"BTCUSDT": [*candles, *flat(43000, 11, 12)]})
    broker = CcxtBroker(client_of(venue.port), symbols=["BTCUSDT"])
    market.broker = broker  # type: ignore[attr-defined]
    bot = Bot(market, {1: proposal(quantity=0.00123)})
    store = await memory_store()
    run = run_of(bot, store, longest_sleep_seconds=0.02)
    try:
        async with asyncio.timeout(40):
            events = [event.kind async for event in run]
        book = await orders_in(store)
    finally:
        await store.close()
        await broker.close()
    assert events == ["opened", "closed"], "and the run ended"
    assert [(o["side"], o["origQty"]) for o in venue.orders()] == [("BUY", "0.00123"), ("SELL", "0.00122")]
    assert all(map(book.is_settled, book.signal_ids()))
    assert any("less than the venue trades" in str(told.error) for told in bot.errors)
