"""The broker over ccxt where contracts are traded: how many are sent, and what holds an exit to what is open."""

from __future__ import annotations

import ccxt.async_support as ccxt
import pytest
from swap_venue import DOGE, SwapVenue, market
from venue_kit import request

from holdfast.brokers.ccxt import CcxtBroker
from holdfast.errors import InvalidInputError
from holdfast.market.ccxt import CcxtExchange


async def test_a_quantity_is_sent_as_so_many_contracts_and_told_as_a_quantity_again() -> None:
    venue = SwapVenue()
    broker = venue.broker()
    asked = request(symbol=DOGE, quantity=2000.0)
    await broker.submit(asked)
    assert venue.sent[0]["sz"] == "2", "a contract is 1000"
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
