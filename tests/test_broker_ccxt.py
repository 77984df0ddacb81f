"""The broker over ccxt, with the real package, against a venue of ours that speaks Binance's spot REST."""

from __future__ import annotations

import hashlib
import logging
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
from rest_venue import KEY, SECRET
from servers.process import free_port
from venue_kit import Remote, client_of, request, resting, started

from holdfast.brokers.ccxt import CcxtBroker
from holdfast.brokers.ccxt_words import UNKNOWN_VENUE
from holdfast.engine.broker import Broker, Features
from holdfast.errors import HoldfastError, InvalidInputError, UnavailableError, UnknownOutcomeError

# aiohttp says so on newer Pythons of what ccxt asks of it.
pytestmark = pytest.mark.filterwarnings("ignore:enable_cleanup_closed:DeprecationWarning")


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    with started(tmp_path_factory.mktemp("venue")) as remote:
        yield remote


@pytest.fixture
def venue(process: Remote) -> Remote:
    process("reset")
    return process


@pytest.fixture
async def broker(venue: Remote) -> AsyncIterator[CcxtBroker]:
    made = CcxtBroker(client_of(venue.port), symbols=["BTCUSDT"])
    yield made
    await made.close()


async def test_a_market_order_is_filled_under_our_id(broker: CcxtBroker, venue: Remote) -> None:
    assert isinstance(broker, Broker)
    asked = request()
    began_ms = int(time.time() * 1000)
    report = await broker.submit(asked)
    assert report.state == "filled"
    assert (report.client_order_id, report.symbol, report.side) == (asked.client_order_id, "BTCUSDT", "buy")
    assert (report.filled_quantity, report.quantity, report.average_price) == (0.5, 0.5, 50_000.0)
    assert report.venue_id == "100"
    assert began_ms <= report.at_ms <= time.time() * 1000 + 1000
    [sent] = venue.sent("POST order")
    assert sent["newClientOrderId"] == asked.client_order_id
    assert int(sent["timestamp"]) + int(sent["recvWindow"]) <= asked.expires_at_ms + 1000, "refused from then on"
    found = await broker.find("BTCUSDT", asked.client_order_id)
    assert found == report


async def test_an_order_rests_is_filled_in_part_and_is_cancelled(broker: CcxtBroker, venue: Remote) -> None:
    asked = resting()
    report = await broker.submit(asked)
    assert (report.state, report.filled_quantity, report.average_price) == ("open", 0.0, None)
    venue("fill", id=asked.client_order_id, quantity="0.2")
    found = await broker.find("BTCUSDT", asked.client_order_id)
    assert found is not None
    assert (found.state, found.filled_quantity, found.average_price) == ("partial", 0.2, 49_000.0)
    ended = await broker.cancel("BTCUSDT", asked.client_order_id)
    assert ended is not None
    assert (ended.state, ended.filled_quantity, ended.client_order_id) == ("cancelled", 0.2, asked.client_order_id)
    assert await broker.open_orders("BTCUSDT") == []


async def test_a_market_order_that_finds_too_little_is_ended_with_what_it_got(
    broker: CcxtBroker, venue: Remote
) -> None:
    venue("set", liquidity="0.1")
    report = await broker.submit(request())
    assert (report.state, report.filled_quantity, report.quantity) == ("cancelled", 0.1, 0.5)


async def test_an_exit_of_a_spot_account_sells_what_the_fee_has_left(broker: CcxtBroker, venue: Remote) -> None:
    assert broker.features.reduce_only
    venue("charge", fee="0.001")
    await broker.submit(request())
    [held] = await broker.positions()
    assert held.quantity == 0.4995
    report = await broker.submit(request(side="sell", reduce_only=True))
    assert (report.state, report.filled_quantity, report.quantity) == ("filled", 0.4995, 0.4995)
    rest = await broker.submit(request(side="sell", quantity=0.0005, reduce_only=True))
    assert (rest.state, rest.repeated) == ("rejected", False)
    assert "holds" in rest.note
    assert len(venue.orders()) == 2
    assert not [sent for sent in venue.sent("POST order") if "reduceOnly" in sent], "the venue knows no such thing"


async def test_so_it_does_at_a_venue_of_which_nothing_is_promised(venue: Remote) -> None:
    broker = CcxtBroker(client_of(venue.port), symbols=["BTCUSDT"], features=UNKNOWN_VENUE.features)
    try:
        venue("charge", fee="0.001")
        await broker.submit(request())
        assert (await broker.submit(request(side="sell"))).state == "rejected", "it is no exit"
        report = await broker.submit(request(side="sell", closes=True))
        assert (report.state, report.filled_quantity) == ("filled", 0.4995)
        assert await broker.positions() == []
    finally:
        await broker.close()


async def test_an_exit_of_less_than_the_venue_trades_says_so_and_no_other_refusal_does(
    broker: CcxtBroker, venue: Remote
) -> None:
    await broker.submit(request())
    below_step, below_cost, entry = [
        await broker.submit(request(side=side, quantity=quantity, closes=side == "sell"))
        for side, quantity in (("sell", 0.000_009), ("sell", 0.000_09), ("buy", 0.000_09))
    ]
    assert [(one.state, one.too_small) for one in (below_step, below_cost)] == [("rejected", True)] * 2
    assert "NOTIONAL" in below_cost.note
    assert (entry.state, entry.too_small) == ("rejected", False)
    venue.faults("echo")
    refused = await broker.submit(request(side="sell", closes=True))
    assert (refused.state, refused.too_small) == ("rejected", False), "it is worth a lot, whatever it was refused for"
    assert len(venue.orders()) == 1


async def test_a_spot_account_goes_not_short(broker: CcxtBroker, venue: Remote) -> None:
    await broker.submit(request())
    for short in (request(side="sell"), request(side="buy", reduce_only=True)):
        assert (await broker.submit(short)).state == "rejected"
    assert len(venue.orders()) == 1


async def test_a_second_order_with_an_id_is_refused_while_the_first_is_open(broker: CcxtBroker, venue: Remote) -> None:
    first = resting()
    await broker.submit(first)
    again = await broker.submit(first)
    assert (again.state, again.repeated) == ("rejected", True)
    found = await broker.find("BTCUSDT", first.client_order_id)
    assert found is not None
    assert found.state == "open", "find tells what became of the first"
    assert len(venue.orders()) == 1
    # And, as the features say, not for good: once it is filled its id may be used again.
    assert broker.features.refuses_repeated_ids == "while_open"
    venue("fill", id=first.client_order_id, quantity="0.5")
    assert (await broker.submit(first)).state == "open"
    assert len(venue.orders()) == 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    # what is asked, what the venue's words must hold
    ({"quantity": 1_000.0}, "insufficient balance"),
    ({"side": "sell"}, "a spot account sells what it holds"),
    ({"quantity": 0.000_001}, "amount"),  # less than the least lot: ccxt says it before the venue can
]


@pytest.fixture(params=["host of ours", "as at its own host"])
async def either(venue: Remote, request: pytest.FixtureRequest) -> AsyncIterator[CcxtBroker]:
    """A broker; ccxt knows more error codes of binance's own host than of another."""
    made = CcxtBroker(client_of(venue.port, as_at_home="own" in request.param))
    yield made
    await made.close()


async def test_what_the_venue_refuses_is_a_report(either: CcxtBroker, venue: Remote) -> None:
    for more, said in REFUSED:
        report = await either.submit(request(**more))
        assert (report.state, report.repeated) == ("rejected", False)
        assert said in report.note
    assert venue.orders() == []


LOST = [
    # fault, whether the order stands although no answer said so
    ("lose the answer", True),
    ("half an answer", True),
    ("500 applied", True),
    ("504 applied", True),
    ("html applied", True),
    ("nonsense applied", True),
    ("another's answer", True),
    ("refuse to listen", False),
    ("503 unapplied", False),
    ("echo unknown", False),
]


async def test_an_answer_that_is_lost_leaves_the_outcome_unknown_until_it_is_asked_for(
    either: CcxtBroker, venue: Remote, record_property: Any
) -> None:
    for fault, stands in LOST:
        before = len(venue.orders())
        asked = resting()
        venue.faults(fault)
        with pytest.raises(UnknownOutcomeError):
            await either.submit(asked)
        assert len(venue.orders()) == before + stands, fault  # sent once
        found = await either.find("BTCUSDT", asked.client_order_id)
        assert (found is not None) == stands, fault
        assert found is None or (found.state, found.client_order_id) == ("open", asked.client_order_id)
    record_property("proof:lost answers over ccxt", {"faults": len(LOST)})


async def test_a_time_out_after_sending_leaves_the_outcome_unknown(broker: CcxtBroker, venue: Remote) -> None:
    await broker.open_orders()
    asked = resting()
    venue.faults("hold the answer")
    broker.client.timeout = 300
    with pytest.raises(UnknownOutcomeError):
        await broker.submit(asked)
    broker.client.timeout = 5000
    venue("release")
    found = await broker.find("BTCUSDT", asked.client_order_id)
    assert found is not None
    assert found.state == "open"


async def test_ccxt_does_not_repeat_an_order_whose_answer_was_lost(venue: Remote) -> None:
    client = client_of(venue.port)
    client.options |= {"maxRetriesOnFailure": 3}  # as a user may have set it
    broker = CcxtBroker(client)
    try:
        venue.faults("lose the answer")
        with pytest.raises(UnknownOutcomeError):
            await broker.submit(request())
        assert len(venue.orders()) == 1, "a filled order's id is free again: the venue would not have refused a second"
    finally:
        await broker.close()


async def test_what_never_reached_the_venue_is_unavailable_and_may_be_sent_again(
    broker: CcxtBroker, venue: Remote
) -> None:
    asked = resting()
    await broker.open_orders()
    here = broker.client.urls["api"]
    broker.client.urls["api"] = dict.fromkeys(here, f"http://127.0.0.1:{free_port()}/api/v3")
    for tried in (broker.submit(asked), broker.cancel("BTCUSDT", "none"), broker.find("BTCUSDT", "none")):
        with pytest.raises(UnavailableError):
            await tried
    broker.client.urls["api"] = here
    venue.faults("429")
    with pytest.raises(UnavailableError):
        await broker.submit(asked)
    assert venue.orders() == []
    assert (await broker.submit(asked)).state == "open"


async def test_questions_are_unavailable_whatever_becomes_of_their_answer(broker: CcxtBroker, venue: Remote) -> None:
    await broker.open_orders()
    for at, ask in (
        ("GET order", lambda: broker.find("BTCUSDT", "x")),
        ("GET openOrders", broker.open_orders),
        ("GET allOrders", lambda: broker.history("BTCUSDT", int(time.time() * 1000) - 1000)),
        ("GET account", broker.positions),
    ):
        for fault in (
            "500 applied",
            "503 unapplied",
            "html applied",
            "nonsense applied",
            "half an answer",
            "429",
            "late",
        ):
            # aiohttp asks once more by itself where a kept connection had been closed under it
            venue.faults(fault, fault, at=at)
            with pytest.raises(UnavailableError):
                await ask()
        venue.faults()
        await ask()


async def test_a_venue_that_was_asked_too_often_is_left_alone_by_every_context_for_as_long_as_it_says(
    venue: Remote,
) -> None:
    elapsed_s = [1_000.0]
    broker = CcxtBroker(client_of(venue.port), elapsed=lambda: elapsed_s[0])
    try:
        await broker.open_orders()
        for fault, seconds in (("418", 120.0), ("429 silent", 1.0), ("429 silent", 2.0), ("429 silent", 4.0)):
            venue.faults(fault)
            with pytest.raises(UnavailableError):
                await broker.submit(resting())
            asked = len(venue("state")["requests"])
            elapsed_s[0] += seconds - 0.5
            for ask in (lambda: broker.submit(resting()), broker.open_orders, broker.positions):
                with pytest.raises(UnavailableError, match="left alone"):
                    await ask()
            assert len(venue("state")["requests"]) == asked, "nothing was sent"
            elapsed_s[0] += 0.6 if fault != "418" else 61
            await broker.open_orders()
    finally:
        await broker.close()


async def test_a_request_whose_time_has_passed_is_not_sent(broker: CcxtBroker, venue: Remote) -> None:
    report = await broker.submit(request(expires_at_ms=int(time.time() * 1000) - 1))
    assert report.state == "expired"
    assert venue.sent("POST order") == []


async def test_the_venue_is_told_the_longest_window_that_it_takes(broker: CcxtBroker, venue: Remote) -> None:
    await broker.submit(resting(expires_at_ms=int(time.time() * 1000) + 3_600_000))
    assert venue.sent("POST order")[0]["recvWindow"] == "60000"


async def test_a_request_that_the_rate_limit_held_back_is_refused_once_its_time_has_passed(venue: Remote) -> None:
    clock_s = [time.time()]
    client = client_of(venue.port)
    broker = CcxtBroker(client, now=lambda: clock_s[0])
    try:
        await broker.open_orders()

        async def held_back(cost: float | None = None) -> None:
            clock_s[0] += 3
            venue("set", clock_ahead_ms=3000)  # on both clocks alike
            client.options["timeDifference"] = -3000  # what ccxt would stamp it with

        client.enableRateLimit, client.throttle = True, held_back
        report = await broker.submit(resting(expires_at_ms=int(clock_s[0] * 1000) + 2000))
        assert report.state == "expired"
        assert "recvWindow" in report.note
        assert venue.orders() == []
    finally:
        await broker.close()


async def test_clocks_that_have_drifted_apart_are_measured_again(broker: CcxtBroker, venue: Remote) -> None:
    await broker.open_orders()
    for drift_ms in (120_000, -120_000):  # the venue's clock: far ahead, then far behind
        venue("set", clock_ahead_ms=drift_ms)
        asked = resting()
        with pytest.raises(UnavailableError, match="Timestamp"):
            await broker.submit(asked)
        assert (await broker.submit(asked)).state == "open"
        sent = venue.sent("POST order")[-1]
        ends_ms = int(sent["timestamp"]) + int(sent["recvWindow"]) - drift_ms
        assert asked.expires_at_ms - 1000 < ends_ms <= asked.expires_at_ms + 1000, "the expiry, by the venue's clock"


async def test_a_cancellation_that_comes_too_late_tells_how_the_order_ended(broker: CcxtBroker, venue: Remote) -> None:
    asked = request()
    await broker.submit(asked)
    ended = await broker.cancel("BTCUSDT", asked.client_order_id)
    assert ended is not None
    assert (ended.state, ended.filled_quantity) == ("filled", 0.5)
    assert await broker.cancel("BTCUSDT", "neverseen") is None
    assert await broker.find("BTCUSDT", "neverseen") is None


async def test_a_lost_cancellation_is_unknown_until_it_is_asked_for(broker: CcxtBroker, venue: Remote) -> None:
    for fault, state in (("500 applied", "cancelled"), ("503 unapplied", "open")):
        asked = resting()
        await broker.submit(asked)
        venue.faults(fault, at="DELETE order")
        with pytest.raises(UnknownOutcomeError):
            await broker.cancel("BTCUSDT", asked.client_order_id)
        found = await broker.find("BTCUSDT", asked.client_order_id)
        assert found is not None
        assert found.state == state


async def test_open_orders_are_named_as_we_name_them_and_others_as_the_venue(broker: CcxtBroker, venue: Remote) -> None:
    ours, others = resting(), resting(symbol="ETH/USDT", price=1_900.0)
    await broker.submit(ours)
    apart = CcxtBroker(client_of(venue.port))
    await apart.submit(others)
    await apart.close()
    assert {one.symbol: one.client_order_id for one in await broker.open_orders()} == {
        "BTCUSDT": ours.client_order_id, "ETHUSDT": others.client_order_id,
    }  # fmt: skip
    [one] = await broker.open_orders("BTCUSDT")
    assert (one.client_order_id, one.state, one.quantity) == (ours.client_order_id, "open", 0.5)


async def test_the_history_is_whole_over_pages_and_days(broker: CcxtBroker, venue: Remote) -> None:
    now_ms = int(time.time() * 1000)
    order = {"symbol": "BTCUSDT", "side": "BUY", "type": "MARKET", "quantity": "0.001"}
    older = [resting(), request()]
    for one in older:
        await broker.submit(one)
    venue("age", ms=3 * 86_400_000)
    venue("many", count=1_100, order=order)  # three pages, many with the same time stamp
    found = await broker.history("BTCUSDT", now_ms - 4 * 86_400_000)
    names = [one.client_order_id for one in found]
    assert names[:2] == [one.client_order_id for one in older], "oldest first"
    assert sorted(names[2:]) == sorted(f"many{n}" for n in range(1_100))
    assert [one.state for one in found[:3]] == ["open", "filled", "filled"]
    assert len(await broker.history("BTCUSDT", now_ms - 86_400_000)) == 1_100
    assert await broker.history("ETHUSDT", now_ms - 86_400_000) == []


async def test_positions_are_what_the_account_holds_besides_what_it_pays_with(
    broker: CcxtBroker, venue: Remote
) -> None:
    assert await broker.positions() == []
    await broker.submit(request())
    await broker.submit(request(side="sell", quantity=0.125, reduce_only=True))
    [held] = await broker.positions()
    assert (held.symbol, held.side, held.quantity) == ("BTCUSDT", "long", 0.375)


async def test_what_is_held_of_a_market_is_told_whatever_it_is_paid_with_and_however_it_is_spelt(venue: Remote) -> None:
    broker = CcxtBroker(client_of(venue.port), symbols=["BTCUSDT"], quote="USDC")
    try:
        assert await broker.holding("BTCUSDT") == []
        await broker.submit(request())
        await broker.open_orders("BTC/USDT")  # as another strategy spells it
        for name in ("BTCUSDT", "BTC/USDT"):
            held = await broker.holding(name)
            assert held is not None
            assert [(one.symbol, one.side, one.quantity) for one in held] == [(name, "long", 0.5)]
        since_ms = int(time.time() * 1000) - 60_000
        assert [one.symbol for one in await broker.history("BTC/USDT", since_ms)] == ["BTC/USDT"]
    finally:
        await broker.close()


async def test_of_an_exchange_that_nobody_knows_nothing_is_assumed(venue: Remote) -> None:
    client = client_of(venue.port)
    client.id = "somebody"
    broker = CcxtBroker(client)
    try:
        assert UNKNOWN_VENUE.features == Features(
            refuses_repeated_ids="never", refuses_expired=False, reduce_only=False, id_length=18
        )  # fmt: skip
        assert broker.features == msgspec.structs.replace(UNKNOWN_VENUE.features, reduce_only=True), "it has no shorts"
        rests, done = resting(), request()
        assert (await broker.submit(rests)).state == "open"
        assert (await broker.submit(done)).state == "filled"
        assert all("recvWindow" not in sent or sent["recvWindow"] == "10000" for sent in venue.sent("POST order"))
        asked = [await broker.find("BTCUSDT", one) for one in (rests.client_order_id, done.client_order_id, "none")]
        assert [one and one.state for one in asked] == ["open", "filled", None]
        ended = [await broker.cancel("BTCUSDT", one) for one in (rests.client_order_id, done.client_order_id, "none")]
        assert [one and one.state for one in ended] == ["cancelled", "filled", None]
        assert [sent.get("origClientOrderId") for sent in venue.sent("DELETE order")] == [None], "by the venue's number"
    finally:
        await broker.close()


async def test_a_wrong_key_or_symbol_can_never_work(venue: Remote) -> None:
    for client in (client_of(venue.port, secret="another"), client_of(venue.port, api_key="another")):
        broker = CcxtBroker(client)
        with pytest.raises(InvalidInputError):
            await broker.submit(request())
        await broker.close()
    broker = CcxtBroker(client_of(venue.port))
    with pytest.raises(InvalidInputError, match="no market 'DOGEBTC'"):
        await broker.submit(request(symbol="DOGEBTC"))
    await broker.close()
    assert venue.orders() == []


async def test_the_key_is_told_by_its_fingerprint_only(
    broker: CcxtBroker, venue: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert broker.account == hashlib.sha256(KEY.encode()).hexdigest()[:16]
    told = [repr(broker), str(broker.features)]
    for fault in ("echo unknown", "504 applied", "lose the answer", "429", "hold the answer"):
        venue.faults(fault)
        broker.client.timeout = 300 if "hold" in fault else 5000
        with pytest.raises(HoldfastError) as caught:
            await broker.submit(resting())
        told += traceback.format_exception(caught.value)
    venue.faults("echo")
    refused = await broker.submit(resting())
    told += [refused.note, caplog.text]
    assert refused.state == "rejected"
    assert "***" in refused.note
    for secret in (KEY, SECRET, "signature="):
        assert not [text for text in told if secret in text]
