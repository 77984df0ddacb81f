"""The broker over ccxt where contracts are traded: how many are sent, and what holds an exit to what is open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import ccxt.async_support as ccxt
import pytest
from fakes import Bot, FakeMarket, candle, flat, memory_store, proposal
from order_kit import orders_in
from swap_venue import DOGE, SwapVenue, market
from venue_kit import request

from holdfast.brokers.ccxt import CcxtBroker
from holdfast.engine.broker import Features, Holds, Numbered
from holdfast.engine.live import Live
from holdfast.errors import InvalidInputError
from holdfast.market.ccxt import CcxtExchange
from holdfast.names import Context
from holdfast.rules.params import reset_config, set_config

STATED = Features(refuses_repeated_ids="never", refuses_expired=False, reduce_only=False)


@pytest.fixture
def brief() -> Iterator[None]:
    """Orders are over soon."""
    set_config(entry_validity_seconds=2, exit_validity_seconds=1, order_grace_seconds=0.2)
    yield
    reset_config()


async def test_a_quantity_is_sent_as_so_many_contracts_and_told_as_a_quantity_again() -> None:
    venue = SwapVenue()
    broker = venue.broker()
    asked = request(symbol=DOGE, quantity=2000.0)
    await broker.submit(asked)
    assert venue.sent[0]["sz"] == "2", "a contract is 1000"
    assert venue.sent[0].keys() == {"instId", "side", "ordType", "sz", "tdMode", "clOrdId"}, "nothing of ccxt's own"
    found = await broker.find(DOGE, asked.client_order_id)
    assert found is not None
    assert (found.state, found.filled_quantity, found.quantity, found.average_price) == ("filled", 2000.0, 2000.0, 0.2)
    assert [one.quantity for one in await broker.history(DOGE, 0)] == [2000.0]
    [held] = await broker.positions()
    assert (held.symbol, held.side, held.quantity) == (DOGE, "long", 2000.0)
    await broker.close()


@pytest.mark.parametrize(
    ("size", "step", "quantity", "sent"),
    [(1000.0, 1.0, 2999.9, "2"), (0.1, 1.0, 0.7, "7"), (0.01, 0.01, 0.1234, "12.34"), (1e-05, 1.0, 0.00029, "29")],
)
async def test_the_number_of_contracts_is_cut_to_the_step_and_loses_nothing_before(
    size: float, step: float, quantity: float, sent: str
) -> None:
    venue = SwapVenue((DOGE, size), step=step)
    broker = venue.broker()
    await broker.submit(request(symbol=DOGE, quantity=quantity))
    assert venue.sent[0]["sz"] == sent
    await broker.close()


async def test_less_than_one_contract_is_refused() -> None:
    venue = SwapVenue()
    broker = venue.broker()
    assert (await broker.submit(request(symbol=DOGE, quantity=999.0))).state == "rejected"
    assert venue.sent == []
    await broker.close()


@pytest.mark.parametrize(
    ("more", "size", "said"),
    [({"linear": False, "inverse": True}, 100.0, "no linear one"), ({}, None, "how large a contract")],
)
async def test_a_market_whose_contracts_are_no_quantities_is_refused(
    more: dict[str, bool], size: float | None, said: str
) -> None:
    venue = SwapVenue()
    venue.client.set_markets([market(venue.client, DOGE, size, **more)])
    broker = CcxtBroker(venue.client)
    with pytest.raises(InvalidInputError, match=said):
        await broker.submit(request(symbol=DOGE, quantity=2000.0))
    assert venue.sent == []
    await broker.close()


@pytest.mark.parametrize(
    ("size", "step", "quantity", "text"),
    [(1000.0, 1.0, 2999.9, "2000"), (0.01, 0.01, 0.12345, "0.1234"), (0.1, 1.0, 0.7, "0.7")],
)
async def test_the_exchange_writes_a_quantity_of_contracts_in_units_of_the_base_currency(
    size: float, step: float, quantity: float, text: str
) -> None:
    client = ccxt.okx()
    client.set_markets([market(client, DOGE, size, step=step)])
    exchange = CcxtExchange(client)
    assert exchange.format_quantity(DOGE, quantity) == text
    await exchange.close()


async def test_an_order_is_found_by_the_venues_number_where_its_listings_do_not_name_it() -> None:
    venue = SwapVenue()
    venue.names_orders = False
    broker = venue.broker()
    assert isinstance(broker, Numbered)
    asked = request(symbol=DOGE, quantity=2000.0)
    report = await broker.submit(asked)
    assert (report.state, report.venue_id) == ("sent", "100")
    assert await broker.find(DOGE, asked.client_order_id) is None
    found = await broker.find_numbered(DOGE, report.venue_id, asked.client_order_id)
    assert found is not None
    assert (found.client_order_id, found.filled_quantity) == (asked.client_order_id, 2000.0)
    assert await broker.find_numbered(DOGE, "999", asked.client_order_id) is None
    assert await broker.cancel_numbered(DOGE, report.venue_id, asked.client_order_id) == found
    await broker.close()


@pytest.mark.parametrize("kind", ["swap", "spot"])
async def test_what_is_held_of_a_market_is_told_whatever_account_the_client_is_set_to(kind: str) -> None:
    venue = SwapVenue()
    venue.client.options["defaultType"] = kind
    broker = venue.broker()
    assert isinstance(broker, Holds)
    assert await broker.holding(DOGE) == []
    await broker.submit(request(symbol=DOGE, quantity=2000.0, side="sell"))
    for name in (DOGE, "DOGE-USDT-SWAP"):
        held = await broker.holding(name)
        assert held is not None
        assert [(one.symbol, one.side, one.quantity) for one in held] == [(name, "short", 2000.0)]
    venue.client.has["fetchPositions"] = False
    assert await broker.holding(DOGE) is None, "not nothing: it cannot be told"
    await broker.close()


# ---------------------------------------------------------------------- what an exit may do


@pytest.mark.parametrize("stated", [None, STATED])
async def test_an_exit_of_contracts_is_reduce_only_and_an_entry_is_not(stated: Features | None) -> None:
    venue = SwapVenue()
    broker = venue.broker(features=stated)
    assert broker.features.reduce_only
    await broker.submit(request(symbol=DOGE, quantity=2000.0))
    await broker.submit(request(symbol=DOGE, quantity=2000.0, side="sell", closes=True))
    assert [one.get("reduceOnly") for one in venue.sent] == [None, True]
    late = await broker.submit(request(symbol=DOGE, quantity=2000.0, side="sell", closes=True))
    assert late.state == "rejected", "the venue's words, though ccxt has no class for them"
    assert venue.held == 0
    await broker.close()


async def test_where_nobody_knows_of_reduce_only_contracts_are_traded_only_if_somebody_vouches_for_the_venue() -> None:
    venue = SwapVenue()
    venue.client.has["createReduceOnlyOrder"] = None
    broker = venue.broker()
    with pytest.raises(InvalidInputError, match="features="):
        await broker.submit(request(symbol=DOGE, quantity=2000.0))
    assert venue.sent == []
    vouched = venue.broker(features=STATED)
    assert (await vouched.submit(request(symbol=DOGE, quantity=2000.0))).state == "sent"
    await vouched.close()


@pytest.mark.usefixtures("brief")
async def test_an_exit_of_a_position_that_the_venue_has_taken_away_opens_nothing() -> None:
    venue = SwapVenue()
    market = FakeMarket({DOGE: [*flat(43000, -10, 4), candle(5, 43000, low=41000), *flat(43000, 6, 9)]})
    market.broker = venue.broker()  # type: ignore[attr-defined]
    bot = Bot(market, {1: proposal(quantity=2000.0)})
    store = await memory_store()
    run: Any = Live.run(
        DOGE, strategy_name=bot.strategy, exchange_name=bot.exchange, store=store, registry=bot.registry,
        listeners=bot.listeners, sleep=lambda seconds: asyncio.sleep(min(seconds, 0.02)),
        clock=lambda: int(time.time() * 1000),
    )  # fmt: skip
    events = []
    async with asyncio.timeout(20):
        async for event in run:
            events.append((event.kind, event.reason))
            if event.kind == "opened":
                await venue.traded.wait()
                venue.liquidate()
    book = await orders_in(store, Context(bot.exchange, DOGE, bot.strategy))
    assert events == [("opened", None), ("closed", "stop_loss")]
    assert venue.held == 0
    assert [one.get("reduceOnly") for one in venue.sent[:2]] == [None, True]
    assert all(map(book.is_settled, book.signal_ids()))
    assert [one.missing_quantity for one in book.orders.values() if one.missing_quantity] == [2000.0]
    await store.close()
    await market.broker.close()  # type: ignore[attr-defined]
