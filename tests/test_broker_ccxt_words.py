"""The broker over ccxt, without a venue: what ccxt's errors and orders mean to it, and what it needs."""

from __future__ import annotations

import sys
from typing import Any

import ccxt.async_support as ccxt
import pytest
from venue_kit import client_of

from holdfast.brokers.ccxt import CcxtBroker
from holdfast.brokers.ccxt_words import meaning_of, report_of
from holdfast.engine.broker import Features, OrderReport
from holdfast.errors import InvalidInputError


async def test_positions_of_a_futures_account_have_a_side() -> None:
    client = client_of(1, options={"defaultType": "swap"})
    rows = [
        {"symbol": "BTC/USDT:USDT", "contracts": 2, "contractSize": 0.1, "side": "short", "entryPrice": 50_000.0},
        {"symbol": "ETH/USDT:USDT", "contracts": 3, "contractSize": None, "side": "long", "entryPrice": None},
        {"symbol": "XRP/USDT:USDT", "contracts": 0, "side": None},
    ]

    async def nothing() -> None: ...

    async def fetch_positions() -> list[dict[str, Any]]:
        return rows

    client.load_time_difference = client.load_markets = nothing
    client.fetch_positions = fetch_positions
    broker = CcxtBroker(client)
    assert broker.features == Features(refuses_repeated_ids="while_open", refuses_expired=True, reduce_only=True)
    short, long = await broker.positions()
    assert (short.symbol, short.side, short.quantity, short.entry_price) == ("BTC/USDT:USDT", "short", 0.2, 50_000.0)
    assert (long.side, long.quantity, long.entry_price) == ("long", 3.0, None)
    await broker.close()


async def test_the_difference_of_the_clocks_is_measured_each_hour_and_when_the_clock_went_back() -> None:
    client, clock_s, measured = client_of(1), [1_000_000.0], []

    async def nothing(*_: Any) -> list[Any]:
        return []

    async def load_time_difference() -> None:
        measured.append(clock_s[0])

    client.load_time_difference, client.load_markets, client.fetch_open_orders = load_time_difference, nothing, nothing
    broker = CcxtBroker(client, now=lambda: clock_s[0])
    for clock_s[0] in (1_000_000.0, 1_003_000.0, 1_003_601.0, 1_003_602.0, 1_000_500.0, 1_000_501.0):
        await broker.open_orders()
    assert measured == [1_000_000.0, 1_003_601.0, 1_000_500.0]
    await broker.close()


def test_client_order_ids_are_as_short_as_the_exchange_needs_them_and_never_longer_than_it_takes() -> None:
    stated = Features(refuses_repeated_ids="never", refuses_expired=False, reduce_only=True)
    lengths = {
        (name, given is not None): CcxtBroker.named(name, api_key="k", secret="s", features=given).features.id_length
        for name in ("binance", "kraken", "gate", "okx", "bybit")
        for given in (None, stated)
    }
    assert lengths == {
        ("binance", False): 32, ("kraken", False): 18, ("gate", False): 18, ("okx", False): 18, ("bybit", False): 18,
        ("binance", True): 32, ("kraken", True): 18, ("gate", True): 28, ("okx", True): 32, ("bybit", True): 32,
    }  # fmt: skip
    for name, options in (("hyperliquid", {}), ("bitfinex", {}), ("htx", {"defaultType": "swap"})):
        with pytest.raises(InvalidInputError, match="ids are numbers"):
            CcxtBroker.named(name, api_key="k", secret="s", options=options)
    for length in (15, 33):
        with pytest.raises(InvalidInputError, match="use 16 to 32"):
            Features(refuses_repeated_ids="never", refuses_expired=False, reduce_only=True, id_length=length)


def test_an_id_that_the_exchange_marks_as_a_users_is_ours() -> None:
    assert report_of({"clientOrderId": "t-habc", "id": "1"}, "X").client_order_id == "habc"


def test_another_key_is_another_account() -> None:
    one, same, other = (CcxtBroker(client_of(1, api_key=key)) for key in ("one", "one", "other"))
    assert one.account == same.account != other.account


def test_a_broker_needs_ccxt_a_known_exchange_and_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="knows no exchange 'nowhere'"):
        CcxtBroker.named("nowhere", api_key="k", secret="s")
    with pytest.raises(InvalidInputError, match="no apiKey"):
        CcxtBroker.named("binance", api_key="", secret="s")
    made = CcxtBroker.named("binance", api_key="k", secret="s", timeout=1234, quote="USDC")
    assert (made.client.apiKey, made.client.timeout, made.client.enableRateLimit) == ("k", 1234, True)
    monkeypatch.setitem(sys.modules, "ccxt.async_support", None)
    with pytest.raises(InvalidInputError, match=r"pip install 'holdfast\[ccxt\]'"):
        CcxtBroker.named("binance", api_key="k", secret="s")


def test_every_error_of_ccxt_has_one_meaning_and_the_doubtful_ones_are_unknown() -> None:
    certain = {
        "repeated": {"DuplicateOrderId"},
        "missing": {"OrderNotFound"},
        "wrong": {
            "AuthenticationError", "PermissionDenied", "AccountNotEnabled", "AccountSuspended", "ArgumentsRequired",
            "BadSymbol", "NotSupported", "InvalidProxySettings",
        },
        "late": {"InvalidNonce", "ChecksumError"},
        "unsent": {"DDoSProtection", "RateLimitExceeded"},
        "rejected": {
            "BadRequest", "InsufficientFunds", "InvalidOrder", "OrderNotCached", "OrderImmediatelyFillable",
            "OrderNotFillable", "ContractUnavailable", "OperationRejected", "NoChange", "MarginModeAlreadySet",
            "MarketClosed", "ManualInteractionNeeded", "RestrictedLocation",
        },
    }  # fmt: skip
    expected = {name: meaning for meaning, names in certain.items() for name in names}
    kinds = {
        kind.__name__: kind
        for kind in vars(ccxt).values()
        if isinstance(kind, type) and issubclass(kind, ccxt.BaseError)
    }
    assert expected.keys() <= kinds.keys()
    assert {name: meaning_of(kind("said")) for name, kind in kinds.items()} == {
        name: expected.get(name, "unknown") for name in kinds
    }
    assert meaning_of(ValueError("an answer that makes no sense")) == "unknown"
    assert meaning_of(ccxt.InvalidOrder('{"code":-2010,"msg":"Duplicate order sent."}')) == "repeated"
    assert meaning_of(ccxt.ExchangeError('{"code":-4116,"msg":"ClientOrderId is duplicated."}')) == "repeated"
    assert meaning_of(ccxt.ExchangeNotAvailable("no duplicate was seen")) == "unknown"


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ({"status": "open", "amount": 1, "filled": 0}, ("open", 0.0, None)),
        ({"status": "open", "amount": 1, "filled": 0.5, "average": 7}, ("partial", 0.5, 7.0)),
        ({"status": "closed", "amount": 1, "filled": 1, "average": "7.5"}, ("filled", 1.0, 7.5)),
        ({"status": "closed", "amount": 1, "filled": 0.5, "average": 7}, ("cancelled", 0.5, 7.0)),
        ({"status": "closed", "amount": None, "filled": 0.5}, ("filled", 0.5, None)),
        ({"status": "canceled", "amount": 1, "filled": 0}, ("cancelled", 0.0, None)),
        ({"status": "expired", "amount": 1, "filled": 0.5, "average": 7}, ("cancelled", 0.5, 7.0)),
        ({"status": "rejected", "amount": 1, "filled": None}, ("rejected", 0.0, None)),
        ({"status": None}, ("sent", 0.0, None)),
        ({"status": "canceling", "amount": 1, "filled": 0}, ("sent", 0.0, None)),
        ({}, ("sent", 0.0, None)),
    ],
)
def test_an_order_of_ccxt_is_told_in_our_words(
    order: dict[str, Any], expected: tuple[str, float, float | None]
) -> None:
    report: OrderReport = report_of(order, "X", "id")
    assert (report.state, report.filled_quantity, report.average_price) == expected
