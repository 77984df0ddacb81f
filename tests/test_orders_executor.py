"""Orders of a live run: committed, sent, asked about, recorded; against a venue that answers as it likes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from fakes import Bot, candle, flat, memory_store, minute_ms, proposal, put, signal_row, sound, stepped, until
from order_kit import CONTEXT, BookBroker, Desk, Time, features, orders_in

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Key, KeyPrefix, Op, Survives
from holdfast.domains import context_key, order_key
from holdfast.engine.account import AccountRecord
from holdfast.engine.broker import OrderReport, OrderRequest
from holdfast.engine.executor import Executor
from holdfast.engine.live import Live
from holdfast.engine.orders import client_order_id, is_ended
from holdfast.engine.session import Session
from holdfast.errors import FencedError, HeldError, InvalidInputError, OrderError, UnavailableError
from holdfast.names import Context
from holdfast.rows import Order, Row, SessionRow
from holdfast.rules.params import Params
from holdfast.store import Store

SIGNAL_ID = f"binance:BTCUSDT:my-strategy:{minute_ms(1)}"
ENTRY = client_order_id(CONTEXT, SIGNAL_ID, "open", 1)
EXIT = client_order_id(CONTEXT, SIGNAL_ID, "close", 1)


def stored(action: str, *, at_ms: int | None = None, **more: Any) -> Order:
    """Return an order row as a bot that was killed may have left it, made at minute 1."""
    at_ms = minute_ms(1) if at_ms is None else at_ms
    common = {"context": tuple(CONTEXT), "account": "acc", "signal_id": SIGNAL_ID, "quantity": 2.0, "epoch": 1}
    if action == "open":
        plain = {"client_order_id": ENTRY, "side": "buy", "expires_at_ms": at_ms + 30_000}
    else:
        plain = {"client_order_id": EXIT, "side": "sell", "expires_at_ms": at_ms + 10_000, "reduce_only": True}
    return msgspec.convert(
        msgspec.to_builtins(
            Order(**{"action": action, "state": "intended", "intended_at_ms": at_ms, **common, **plain, **more})
        ),
        Order,
    )  # fmt: skip


async def left_behind(*orders: Order, is_open: bool) -> Store:
    """Return a store as a bot left it that was killed after minute 1."""
    store = await memory_store()
    rows: dict[Key, Row | None] = {order_key(CONTEXT, order.client_order_id): order for order in orders}
    closed = () if is_open else (SIGNAL_ID,)
    rows[context_key("session", CONTEXT)] = SessionRow(
        context=tuple(CONTEXT), last_candle_ms=minute_ms(0), last_event=0, closed_ids=closed  # type: ignore[arg-type]
    )  # fmt: skip
    if is_open:
        rows[context_key("signal", CONTEXT)] = signal_row(signal_id=SIGNAL_ID, at_minute=1)
    await put(store, rows)
    return store


async def opened(session: Session) -> None:
    """Step the candle that opens."""
    pending = session.step(candle(0, 43000))
    assert pending is not None
    await pending
    assert session.state.signal is not None


def sold(desk: Desk) -> list[tuple[str, float]]:
    return [(request.side, request.quantity) for request in desk.broker.sent]


async def live(desk: Desk, store: Store) -> list[tuple[str, str | None]]:
    async with asyncio.timeout(20):
        return [(event.kind, event.reason) for event in await desk.live(store)]


OPENED, CLOSED = ("opened", None), ("closed", "take_profit")

# ---------------------------------------------------------------------- the way of an order


async def test_an_order_is_committed_with_its_signal_and_sent_only_then() -> None:
    desk, store = Desk(), await memory_store()
    happened: list[tuple[str, ...]] = []

    def committed(scope: str, number: int, changes: Mapping[Key, Row | None]) -> None:
        if orders := [row for row in changes.values() if isinstance(row, Order)]:
            with_signal = "signal" if any(key.domain == "signal" for key in changes) else "alone"
            happened.append((orders[0].action, orders[0].state, with_signal))

    async def submit(request: OrderRequest) -> Any:
        happened.append(("sent",))
        return await sent(request)

    store.observers.append(committed)
    sent, desk.broker.submit = desk.broker.submit, submit  # type: ignore[method-assign]
    assert await live(desk, store) == [OPENED, CLOSED]
    assert happened == [
        ("open", "intended", "signal"), ("sent",), ("open", "filled", "alone"),
        ("close", "intended", "signal"), ("sent",), ("close", "filled", "alone"),
    ]  # fmt: skip
    assert sold(desk) == [("buy", 2.0), ("sell", 2.0)]
    assert desk.broker.held_quantity == 0
    await sound(store)


@pytest.mark.parametrize(
    ("faults", "events", "traded"),
    [
        (["lost answer"], [OPENED, CLOSED], 2.0),
        (["lost request"], [OPENED, CLOSED], 2.0),
        (["late"], [OPENED, CLOSED], 2.0),
        (["down"], [OPENED, CLOSED], 2.0),
        (["broken"], [OPENED, CLOSED], 2.0),
        (["broken after"], [OPENED, CLOSED], 2.0),
        (["twice", "twice"], [OPENED, CLOSED], 2.0),
        (["part only"], [OPENED, CLOSED], 0.8),
        (["partial"], [OPENED, CLOSED], 0.8),
        (["reject"], [OPENED, ("cancelled", "order_rejected")], 0.0),
        (["resting"], [OPENED, ("cancelled", "order_cancelled")], 0.0),
        (["down"] * 100, [OPENED, ("cancelled", "order_expired")], 0.0),
        (["", "lost answer"], [OPENED, CLOSED], 2.0),
        (["", "lost request"], [OPENED, CLOSED], 2.0),
        (["", "down", "down"], [OPENED, CLOSED], 2.0),
        (["", *["down"] * 20], [OPENED, CLOSED], 2.0),
        (["", "reject"], [OPENED, CLOSED], 2.0),
        (["", *["reject"] * 6], [OPENED, CLOSED], 2.0),
        (["", "part only", "partial"], [OPENED, CLOSED], 2.0),
        (["", "resting"], [OPENED, CLOSED], 2.0),
        (["", "late"], [OPENED, CLOSED], 2.0),
    ],
)
async def test_whatever_the_venue_does_the_rows_say_what_it_holds(
    faults: list[str], events: list[tuple[str, str | None]], traded: float
) -> None:
    desk, store = Desk(), await memory_store()
    desk.broker.faults = list(faults)
    assert await live(desk, store) == events
    book = await orders_in(store)
    assert all(map(is_ended, book.orders.values()))
    assert desk.broker.held_quantity == 0
    assert book.unsettled() == []
    entry = book.entry(SIGNAL_ID)
    assert entry is not None
    assert entry.filled_quantity == pytest.approx(traded)
    assert len({order.request.client_order_id for order in desk.broker.book.orders}) == len(desk.broker.book.orders)
    await sound(store)


@pytest.mark.parametrize("mode", ["while_open", "never"])
@pytest.mark.parametrize("faults", [["lost request"], ["late"], ["", "lost request"], ["", "late"]])
async def test_where_ids_may_repeat_nothing_is_sent_again_before_its_expiry_and_grace_are_over(
    mode: Any, faults: list[str]
) -> None:
    desk, store = Desk(promised=features(mode)), await memory_store()
    desk.broker.faults = list(faults)
    running = asyncio.ensure_future(live(desk, store))
    await until(lambda: len(desk.broker.sent) == len(faults))
    first, lost_ms = desk.broker.sent[-1], desk.time.now_ms
    await until(lambda: len(desk.broker.sent) > len(faults) or running.done())
    assert desk.time.now_ms >= first.expires_at_ms + 5_000 > lost_ms
    events = await running
    assert len(desk.broker.book.orders) == len({one.request.client_order_id for one in desk.broker.book.orders})
    if len(faults) == 1:
        assert events == [OPENED, ("cancelled", "order_expired")], "an entry is never made up for"
    else:
        assert events == [OPENED, CLOSED]
        assert desk.broker.sent[-1].client_order_id == client_order_id(CONTEXT, SIGNAL_ID, "close", 2)
    assert [report.state for report in desk.broker.arrive()] == ["expired"] * (faults[-1] == "late")
    assert desk.broker.held_quantity == 0


async def test_a_possible_duplicate_is_told_where_the_venue_refuses_no_late_request() -> None:
    desk, store = Desk(promised=features("never", refuses_expired=False)), await memory_store()
    desk.broker.faults = ["", "late"]
    assert await live(desk, store) == [OPENED, CLOSED]
    told = [str(failure.error) for failure in desk.bot.errors if isinstance(failure.error, OrderError)]
    assert len(told) == 1
    assert "may still turn up, and an exit may be there twice" in told[0]


async def test_a_possible_duplicate_is_told_by_the_next_run_too_which_cannot_know_whether_anybody_was() -> None:
    desk = Desk(promised=features(refuses_expired=False))
    late = stored("open", state="expired", at_ms=minute_ms(-60))
    store = await left_behind(late, is_open=False)
    await live(desk, store)
    told = [str(failure.error) for failure in desk.bot.errors if isinstance(failure.error, OrderError)]
    assert sum(f"{ENTRY}" in text and "may still turn up" in text for text in told) == 1


class Nameless(BookBroker):
    """A venue that answers with its own number, and that never repeats the client order id after that."""

    def __init__(self, time: Time) -> None:
        super().__init__(time, features("never", refuses_expired=False, reduce_only=False))
        self.shows = True

    async def submit(self, request: OrderRequest) -> OrderReport:
        report = await super().submit(request)
        return msgspec.structs.replace(report, state="sent", filled_quantity=0.0, average_price=None)

    async def find(self, symbol: str, client_order_id: str) -> None:
        return None

    async def cancel(self, symbol: str, client_order_id: str) -> None:
        return None

    async def history(self, symbol: str, since_ms: int) -> list[OrderReport]:
        listed = await super().history(symbol, since_ms) if self.shows else []
        return [msgspec.structs.replace(one, client_order_id="") for one in listed]


async def test_an_order_is_known_by_the_number_that_the_venue_gave_it() -> None:
    desk, store = Desk(), await memory_store()
    desk.broker = desk.market.broker = Nameless(desk.time)  # type: ignore[attr-defined]
    desk.bot = Bot(desk.market, {1: proposal(quantity=2)})
    assert await live(desk, store) == [OPENED, CLOSED]
    assert sold(desk) == [("buy", 2.0), ("sell", 2.0)]
    assert desk.broker.held_quantity == 0


async def test_an_order_that_the_venue_took_is_never_given_up_because_it_is_not_shown() -> None:
    desk, store = Desk(), await memory_store()
    desk.broker = venue = Nameless(desk.time)
    venue.shows = False
    session = await desk.session(store)
    await opened(session)
    await until(lambda: any("shows nothing of it" in str(told.error) for told in desk.bot.errors))
    assert session.executor is not None
    assert session.executor.holds_candles
    assert [order.state for order in (await orders_in(store)).orders.values()] == ["sent"]
    venue.shows = True
    await until(lambda: session.executor is not None and not session.executor.holds_candles)
    assert [order.filled_quantity for order in (await orders_in(store)).orders.values()] == [2.0]
    await session.close()


async def test_a_refused_exit_is_not_given_up_where_nobody_can_tell_what_is_held() -> None:
    desk, store = Desk(), await memory_store()

    async def holding(symbol: str) -> None:
        return None

    desk.broker.holding = holding  # type: ignore[attr-defined]
    desk.broker.positions = holding  # type: ignore[assignment, method-assign]
    desk.broker.faults = ["", "reject", "reject", "reject"]
    assert await live(desk, store) == [OPENED, CLOSED]
    assert desk.broker.held_quantity == 0
    assert not [order for order in (await orders_in(store)).orders.values() if order.missing_quantity]
    assert len([told for told in desk.bot.errors if "cannot tell what the account holds" in str(told.error)]) == 2


@pytest.mark.parametrize("reduce_only", [True, False])
@pytest.mark.parametrize("mode", ["while_open", "never"])
async def test_an_exit_that_the_dead_sent_from_a_lost_journal_is_found_and_not_sent_again(
    mode: Any, reduce_only: bool
) -> None:
    desk = Desk(promised=features(mode, reduce_only=reduce_only))
    desk.time.now_ms = minute_ms(1) + 2_000
    entry = stored("open", state="filled", filled_quantity=2.0, venue_id="p2")
    sent: dict[str, Any] = {"symbol": "BTCUSDT", "expires_at_ms": 10**15, "reference_price": 43000.0}
    book = desk.broker.book
    book.submit(OrderRequest(client_order_id="others", side="buy", quantity=5.0, **sent))
    book.submit(OrderRequest(client_order_id=ENTRY, side="buy", quantity=2.0, **sent))
    book.submit(OrderRequest(client_order_id=EXIT, side="sell", quantity=2.0, reduce_only=reduce_only, **sent))
    store = await left_behind(entry, is_open=True)
    assert await live(desk, store) == [CLOSED]
    assert desk.broker.sent == []
    assert desk.broker.held_quantity == 5.0, "what belongs to others"
    exits = [order for order in (await orders_in(store)).orders.values() if order.action == "close"]
    assert [(order.state, order.filled_quantity) for order in exits] == [("filled", 2.0)]


async def test_an_exit_that_the_dead_had_put_on_record_is_not_sent_beside_one_from_a_lost_journal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One owner sent the second exit out of its journal; the next intended the first, and died before it had asked."""
    monkeypatch.setattr(Executor, "_may_be_made", True)  # as on a shared store
    desk = Desk(promised=features("always", refuses_expired=False, reduce_only=False))
    desk.time.now_ms = minute_ms(1) + 2_000
    entry = stored("open", state="filled", filled_quantity=2.0, venue_id="p1")
    second = client_order_id(CONTEXT, SIGNAL_ID, "close", 2)
    sent: dict[str, Any] = {"symbol": "BTCUSDT", "expires_at_ms": 10**15, "reference_price": 43000.0, "quantity": 2.0}
    desk.broker.book.submit(OrderRequest(client_order_id=ENTRY, side="buy", **sent))
    desk.broker.book.submit(OrderRequest(client_order_id=second, side="sell", **sent))
    store = await left_behind(entry, stored("close", reduce_only=False), is_open=False)
    await live(desk, store)
    assert desk.broker.sent == []
    assert desk.broker.held_quantity == 0
    exits = [order for order in (await orders_in(store)).orders.values() if order.action == "close"]
    assert {(order.n, order.state, order.filled_quantity) for order in exits} == {
        (1, "expired", 0.0),
        (2, "filled", 2.0),
    }


async def test_an_exit_of_a_restored_signal_that_nobody_sent_is_sent_once_the_venue_was_asked() -> None:
    desk = Desk(promised=features("while_open"))
    desk.time.now_ms = minute_ms(1) + 2_000
    entry = stored("open", state="filled", filled_quantity=2.0, venue_id="p1")
    desk.broker.book.submit(
        OrderRequest(
            symbol="BTCUSDT", client_order_id=ENTRY, side="buy", quantity=2.0, expires_at_ms=10**15,
            reference_price=43000.0,
        )
    )  # fmt: skip
    store = await left_behind(entry, is_open=True)
    assert await live(desk, store) == [CLOSED]
    assert sold(desk) == [("sell", 2.0)]
    assert desk.broker.held_quantity == 0


async def test_an_order_that_the_venue_has_twice_is_told_and_all_of_it_is_closed() -> None:
    desk, store = Desk(promised=features("never")), await memory_store()
    desk.broker.faults = ["twice"]
    assert await live(desk, store) == [OPENED, CLOSED]
    assert desk.broker.held_quantity == 0
    assert [request.quantity for request in desk.broker.sent] in ([2.0, 2.0, 2.0], [2.0, 4.0])
    told = [str(failure.error) for failure in desk.bot.errors]
    assert sum(f"{ENTRY} is at the venue 2 times" in text for text in told) == 1


async def test_an_exit_that_the_venue_made_twice_without_reduce_only_is_told() -> None:
    desk, store = Desk(promised=features("never", reduce_only=False)), await memory_store()
    desk.broker.faults = ["", "twice"]
    assert await live(desk, store) == [OPENED, CLOSED]
    assert desk.broker.held_quantity == -2
    told = [str(failure.error) for failure in desk.bot.errors]
    assert sum(f"{EXIT} is at the venue 2 times: no more is sent for it" in text for text in told) == 1
    assert sum("2 more was closed of signal" in text and "the reverse" in text for text in told) == 1


async def test_a_run_ends_though_the_row_of_an_exit_that_was_to_be_asked_about_is_deleted() -> None:
    """At a venue whose clock is ahead exits come late, one after the other; old rows of theirs go."""
    desk, store = Desk(), await memory_store()
    desk.broker.expired_exits = 4
    assert await asyncio.wait_for(live(desk, store), 10) == [OPENED, CLOSED]
    assert len((await orders_in(store)).of(SIGNAL_ID)) < 1 + 5, "old rows went"
    assert desk.broker.held_quantity == 0


@pytest.mark.parametrize("fault", ["fill first", "fill after", "lost answer", "down"])
async def test_a_fill_that_crosses_a_cancellation_is_not_forgotten(fault: str) -> None:
    desk, store = Desk(), await memory_store()
    desk.broker.faults, desk.broker.cancel_faults = ["resting"], [fault]
    await live(desk, store)
    book = await orders_in(store)
    entry = book.entry(SIGNAL_ID)
    assert entry is not None
    assert entry.filled_quantity == (2.0 if fault.startswith("fill") else 0.0)
    assert desk.broker.held_quantity == 0
    assert book.unsettled() == []


class SlowStore(MemoryBackend):
    """A store whose every commit with an order takes eleven seconds: longer than an exit is valid for."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk = desk

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        if any(key.domain == "order" for key in changes):
            await self._desk.time.sleep(11.0)
        return await super().commit(scope, changes, expect, op=op)


async def test_an_exit_is_made_though_each_commit_takes_longer_than_it_is_valid_for() -> None:
    desk = Desk()
    store = await memory_store(SlowStore(desk))
    async with asyncio.timeout(10):
        assert await live(desk, store) == [OPENED, CLOSED]
    assert sold(desk) == [("buy", 2.0), ("sell", 2.0)]
    assert desk.broker.held_quantity == 0


async def test_an_exit_is_made_though_the_venue_has_it_later_than_it_is_valid_for() -> None:
    desk, store = Desk(), await memory_store()
    desk.broker.exit_delay_seconds = 25.0
    async with asyncio.timeout(10):
        assert await live(desk, store) == [OPENED, CLOSED]
    assert desk.broker.held_quantity == 0
    assert sold(desk) == [("buy", 2.0), ("sell", 2.0), ("sell", 2.0), ("sell", 2.0)], "10, 20, 40 seconds"
    book = await orders_in(store)
    assert [o.state for o in book.orders.values()] == ["filled", "expired", "filled"], "the first failure is not kept"


async def test_a_run_does_not_end_between_the_discovery_of_a_late_fill_and_its_exit() -> None:
    desk, gate, recording = Desk(), asyncio.Event(), asyncio.Event()

    class Gated(MemoryBackend):
        async def commit(
            self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
        ) -> int:  # fmt: skip
            found = [payload for key, payload in changes.items() if key.domain == "order" and payload]
            if any(b'"filled"' in payload and b'"open"' in payload for payload in found):
                recording.set()
                await gate.wait()
            return await super().commit(scope, changes, expect, op=op)

    store = await memory_store(Gated())
    desk.broker.faults, desk.broker.cancel_faults = ["resting"], ["fill after"]
    session = await desk.session(store)
    await opened(session)
    async with asyncio.timeout(10):
        gone = await session.settle_orders()
        assert gone is not None, "nothing was filled, as far as anybody knows"
        await recording.wait()
        assert desk.broker.held_quantity == 2.0
        ending = asyncio.ensure_future(session.orders_quiet())
        for _ in range(100):
            await asyncio.sleep(0)
        assert not ending.done()
        gate.set()
        await ending
    assert desk.broker.held_quantity == 0
    await session.close()


async def test_a_venue_that_cannot_be_asked_holds_the_candles_back_until_it_can() -> None:
    desk, store = Desk(), await memory_store()
    desk.broker.faults, desk.broker.read_faults = ["lost answer"], 30
    assert await live(desk, store) == [OPENED, CLOSED]
    assert desk.broker.calls.count("find") > 30
    assert sold(desk) == [("buy", 2.0), ("sell", 2.0)]


async def test_nothing_opens_while_an_earlier_exit_is_not_done_and_those_candles_are_on_record() -> None:
    desk = Desk({1: proposal(quantity=2), 7: proposal(quantity=1, id="second")})
    store = await memory_store()
    desk.broker.faults = ["", *["down"] * 1000]
    running = asyncio.ensure_future(live(desk, store))
    await until(lambda: desk.market.present_ms == desk.market.end_ms)
    desk.broker.faults = []
    assert await running == [OPENED, CLOSED]
    assert [key async for key in _outages(store)] != []


async def _outages(store: Store) -> Any:
    for loaded in (await store.scan("outage")).values():
        row: Any = loaded.row
        if row.from_ms <= minute_ms(6) <= row.to_ms:
            yield row


async def test_a_waiting_signal_is_entered_when_its_price_comes_and_a_short_is_sold_first() -> None:
    candles = [*flat(43000, -10, 3), candle(4, 43400, high=43600), candle(5, 42000, low=41900), *flat(42000, 6, 8)]
    short = {
        "position": "short", "priceOpen": 43500, "priceTakeProfit": 42000, "priceStopLoss": 44500,
        "minuteEstimatedTime": 60, "quantity": 0.123456789123,
    }  # fmt: skip
    desk, store = Desk({1: short}, candles=candles), await memory_store()
    assert await live(desk, store) == [OPENED, CLOSED]
    assert sold(desk) == [("sell", 0.12345678), ("buy", 0.12345678)], "as the exchange writes quantities, never more"


@pytest.mark.parametrize(
    ("quantity", "told"), [(None, "quantity is missing"), (-1, "is -1"), ("2", "'2'"), (True, "True"), (1e-12, "0")]
)
async def test_without_a_quantity_that_can_be_traded_nothing_opens_and_the_reason_is_told(
    quantity: object, told: str
) -> None:
    desk, store = Desk({1: proposal(quantity=quantity)}), await memory_store()
    assert await live(desk, store) == []
    assert [type(failure.error) for failure in desk.bot.errors] == [InvalidInputError]
    assert told in str(desk.bot.errors[0].error)
    assert desk.broker.sent == []


# ---------------------------------------------------------------------- owning


async def test_after_a_refused_commit_nothing_more_is_sent() -> None:
    desk = Desk({1: proposal(quantity=2)})
    store = await memory_store()
    first = await desk.session(store, holder="first")
    desk.broker.held = asyncio.Event()
    await opened(first)
    await until(lambda: desk.broker.sent)
    second = await desk.again().session(store, holder="second")
    desk.broker.held.set()
    await until(lambda: desk.broker.book.orders)
    await until(lambda: first.owner is None)
    assert first.fenced.is_set()
    with pytest.raises(FencedError):
        await stepped(first, candle(2, 43000, high=44100))  # which the new owner alone may answer with an exit
    sent = len(desk.broker.sent)
    assert second.executor is not None
    await second.executor.entered()
    assert await stepped(second, candle(2, 43000, high=44100)) != []
    await second.orders_quiet()
    assert [request.client_order_id for request in desk.broker.sent[sent:]] == [EXIT]
    assert desk.broker.held_quantity == 0
    await first.close()
    await second.close()


async def test_a_candle_waits_until_it_is_known_what_became_of_the_entry() -> None:
    desk, store = Desk(), await memory_store()
    session = await desk.session(store)
    desk.broker.held = asyncio.Event()
    await opened(session)
    hit = asyncio.ensure_future(stepped(session, candle(1, 43000, high=44100)))
    for _ in range(50):
        await asyncio.sleep(0)
    assert session.state.signal is not None
    desk.broker.held.set()
    assert [event.kind for event in await hit] == ["opened", "closed"]
    await session.orders_quiet()
    assert sold(desk) == [("buy", 2.0), ("sell", 2.0)]
    await session.close()


class _Sign:
    """A sign of life whose lease is over."""

    is_held, lease_seconds = False, 20.0


async def test_without_the_lease_nothing_is_sent() -> None:
    desk, store = Desk(), await memory_store()
    session = await desk.session(store)
    executor = session.executor
    assert executor is not None
    executor._sign = sign = _Sign()  # type: ignore[assignment]
    await opened(session)
    before = desk.time.now_ms
    await until(lambda: desk.time.now_ms > before + 5_000)
    assert desk.broker.sent == []
    sign.is_held = True
    await until(lambda: desk.broker.sent)
    await session.close()


async def test_a_session_that_is_replaced_while_its_venue_is_asked_does_not_send_again() -> None:
    desk, store = Desk(), await memory_store()
    session = await desk.session(store)
    desk.broker.faults = ["lost request"]
    asked = asyncio.Event()

    async def find(symbol: str, client_order_id: str) -> None:
        session.fence(FencedError("owned by another process now", key=context_key("owner", session.context)))
        asked.set()

    desk.broker.find = find  # type: ignore[method-assign]
    await opened(session)
    await asyncio.wait_for(asked.wait(), 20)
    assert session.executor is not None
    await session.executor.close()
    assert len(desk.broker.sent) == 1
    await session.close()


async def test_an_answer_that_cannot_be_committed_is_committed_before_anything_else_is_done() -> None:
    desk, store = Desk(), await memory_store()
    session = await desk.session(store)
    real, refused = session.note, 0

    async def note(rows: dict[Key, Row | None]) -> None:
        nonlocal refused
        if refused < 5:
            refused += 1
            raise UnavailableError("not now")
        await real(rows)

    session.note = note  # type: ignore[method-assign]
    await opened(session)
    await session.settle_orders()
    assert (refused, desk.broker.calls) == (5, ["submit"])
    assert (await orders_in(store)).orders[ENTRY].state == "filled"
    await session.close()


async def test_orders_of_another_account_stop_the_start() -> None:
    store = await left_behind(stored("open", account="another"), is_open=True)
    desk = Desk()
    with pytest.raises(InvalidInputError, match="not settled in the account 'another'"):
        await live(desk, store)
    assert desk.broker.calls == []


async def test_an_account_belongs_to_one_scope_of_a_store() -> None:
    desk, backend = Desk(), MemoryBackend()
    mine, other = (Store(backend, scope=scope, require=Survives.NOTHING) for scope in ("main", "other"))
    await mine.open()
    assert await live(desk, mine) == [OPENED, CLOSED]
    await mine.close()
    await other.open()
    with pytest.raises(HeldError, match="is traded by the scope 'main' of this store, not by 'other'"):
        await live(Desk(strategy="theirs"), other)
    assert [key.domain for key in await other.keys(KeyPrefix("account"))] == ["account"]
    await AccountRecord(other, desk.broker, "binance", holder="h", now_ms=0, sleep=desk.time.sleep).release()
    assert await live(Desk(strategy="theirs"), other) == [OPENED, CLOSED]
    await other.close()


async def test_one_at_a_time_acts_on_a_whole_account() -> None:
    desk, store = Desk(), await memory_store()
    first, second = (
        AccountRecord(store, desk.broker, "binance", holder=name, now_ms=0, sleep=desk.time.sleep)
        for name in ("first", "second")
    )
    with pytest.raises(FencedError):
        await first.still()
    await first.act()
    await first.still()
    await second.act()
    await second.still()
    with pytest.raises(FencedError, match="acts on the whole of it now"):
        await first.still()
    row = await second.check()
    assert (row.holder, row.epoch, row.fingerprint) == ("second", 2, "acc")


async def test_an_exchange_without_a_broker_stores_no_orders() -> None:
    desk, store = Desk(), await memory_store()
    desk.bot.registry.remove_exchange("binance")
    desk.bot.registry.add_exchange(
        get_candles=desk.market.get_candles, exchange_name="binance", wait_closed=desk.market.wait_closed
    )
    assert await live(desk, store) == [OPENED, CLOSED]
    assert (desk.broker.calls, await store.scan("order")) == ([], {})


async def test_a_broker_that_is_none_is_refused_with_its_exchange() -> None:
    desk = Desk()
    with pytest.raises(InvalidInputError, match="lacks submit"):
        desk.bot.registry.add_exchange(desk.market, exchange_name="other", broker=object())  # type: ignore[call-overload]


# ---------------------------------------------------------------------- after a crash


async def test_an_entry_that_was_never_sent_is_cancelled_and_recorded_once_its_time_is_over() -> None:
    store = await left_behind(stored("open"), is_open=True)
    desk = Desk({})
    desk.time.now_ms = minute_ms(3)
    assert await live(desk, store) == [("cancelled", "order_expired")]
    assert desk.broker.sent == []
    assert (await orders_in(store)).orders[ENTRY].state == "expired"
    await sound(store)


async def test_an_entry_that_was_never_sent_and_is_in_time_is_sent_where_ids_are_refused_for_good() -> None:
    store = await left_behind(stored("open"), is_open=True)
    desk = Desk({})
    desk.time.now_ms = minute_ms(1) + 1000
    assert await live(desk, store) == [CLOSED]
    assert [request.client_order_id for request in desk.broker.sent] == [ENTRY, EXIT]
    assert desk.broker.calls[:1] == ["find"], "asked first"


async def test_an_exit_that_was_never_sent_is_sent() -> None:
    store = await left_behind(
        stored("open", state="filled", filled_quantity=2.0), stored("close"), is_open=False
    )  # fmt: skip
    desk = Desk({})
    desk.broker.book.holdings["BTCUSDT"] = 2.0
    desk.time.now_ms = minute_ms(60)
    assert await live(desk, store) == []
    assert sold(desk) == [("sell", 2.0)]
    assert desk.broker.held_quantity == 0
    assert (await orders_in(store)).unsettled() == []


@pytest.mark.parametrize("fault", ["", "partial", "part only", "resting", "reject", "lost answer"])
async def test_an_entry_that_was_sent_by_the_dead_is_found_as_it_is(fault: str) -> None:
    store = await left_behind(stored("open"), is_open=True)
    desk = Desk({})
    desk.time.now_ms = minute_ms(1)
    desk.broker.faults = [fault]
    request = OrderRequest(
        symbol="BTCUSDT", client_order_id=ENTRY, side="buy", quantity=2.0, expires_at_ms=minute_ms(1) + 30_000
    )
    try:
        await desk.broker.submit(request)
    except Exception:
        assert fault == "lost answer"
    desk.time.now_ms = minute_ms(30)
    desk.broker.sent.clear()
    events = await live(desk, store)
    filled = {"": 2.0, "lost answer": 2.0, "partial": 0.8, "part only": 0.8}.get(fault, 0.0)
    assert events == (
        [CLOSED] if filled else [("cancelled", "order_cancelled" if fault == "resting" else "order_expired")]
    )
    assert sold(desk) == ([("sell", filled)] if filled else [])
    assert desk.broker.held_quantity == 0


async def test_a_stop_that_was_filled_at_the_venue_while_the_bot_was_down_ends_the_exit() -> None:
    store = await left_behind(stored("open", state="filled", filled_quantity=2.0), stored("close"), is_open=False)
    desk = Desk({})  # and its account holds nothing
    desk.time.now_ms = minute_ms(60)
    assert await live(desk, store) == []
    book = await orders_in(store)
    assert book.unsettled() == []
    assert sum(order.missing_quantity for order in book.orders.values()) == 2.0
    assert any("holds no more of it" in order.note for order in book.orders.values())


async def test_a_position_that_another_context_nets_away_is_not_taken_for_gone_and_the_user_is_told() -> None:
    """Two strategies hold opposite sides of one symbol on one account, which shows nothing."""
    store = await left_behind(stored("open", state="filled", filled_quantity=2.0), is_open=False)
    other = Context("binance", "BTCUSDT", "bear")
    theirs = signal_row(position="short", target=42000, stop=44000, strategy="bear", signal_id="theirs")
    name = client_order_id(other, "theirs", "open", 1)
    entry = stored(
        "open", context=tuple(other), signal_id="theirs", side="sell", client_order_id=name, state="filled",
        filled_quantity=2.0,
    )  # fmt: skip
    await put(store, {order_key(other, name): entry, context_key("signal", other): theirs})
    desk = Desk({})
    desk.time.now_ms = minute_ms(60)
    session = await desk.session(store)
    told = desk.bot.errors
    await until(lambda: any("nets it with theirs" in str(failure.error) for failure in told))
    await until(lambda: len(desk.broker.sent) > 5)
    assert sum("nets it with theirs" in str(failure.error) for failure in told) == 1
    book = await orders_in(store)
    assert book.unsettled() == [SIGNAL_ID]
    assert sum(order.missing_quantity for order in book.orders.values()) == 0.0
    await put(store, {context_key("signal", other): None})
    await session.orders_quiet()
    book = await orders_in(store)
    assert sum(order.missing_quantity for order in book.orders.values()) == 2.0, "theirs ends too: both are over"
    await session.close()


async def test_an_exit_that_was_perhaps_sent_and_has_nothing_left_to_close_is_not_sent_for_ever() -> None:
    """At a venue that takes late requests it may be sent again at any time: each time it is refused."""
    desk = Desk(promised=features("always", refuses_expired=False))
    old = [
        stored("open", state="filled", filled_quantity=2.0, venue_id="p1", at_ms=minute_ms(-2)),
        stored("close", at_ms=minute_ms(-1)),
    ]
    store = await left_behind(*old, is_open=False)
    await live(desk, store)
    book = await orders_in(store)
    assert book.unsettled() == []
    assert [order.state for order in book.of(SIGNAL_ID)] == ["filled", "expired", "rejected", "rejected"], (
        "what may still turn up stays until the venue was asked about it once more"
    )
    assert [order.missing_quantity for order in book.of(SIGNAL_ID)] == [0.0, 0.0, 0.0, 2.0]
    told = [str(failure.error) for failure in desk.bot.errors if isinstance(failure.error, OrderError)]
    assert any(EXIT in text and "may still turn up" in text for text in told)


async def test_a_run_that_is_aborted_while_it_sends_is_gone_on_with_by_the_next() -> None:
    desk, store = Desk(hold=True), await memory_store()
    desk.broker.held = asyncio.Event()
    cancel = Live.background(
        "BTCUSDT", strategy_name="my-strategy", exchange_name="binance", store=store, registry=desk.bot.registry,
        listeners=desk.bot.listeners, sleep=desk.time.sleep, clock=desk.time,
    )  # fmt: skip
    await until(lambda: desk.broker.sent)
    aborting = asyncio.ensure_future(cancel.abort())
    desk.broker.held.set()
    await aborting
    assert len(desk.broker.book.orders) == 1
    after = desk.again()
    after.market.ended = True
    assert (await live(after, store))[-1:] == [CLOSED]
    assert desk.broker.held_quantity == 0
    assert len(desk.broker.book.orders) == 2


async def test_a_run_that_is_stopped_ends_when_its_exit_is_filled() -> None:
    desk, store = Desk(hold=True), await memory_store()
    desk.broker.faults = ["", "lost request", "reject", "part only"]
    run = desk.run(store)
    events = []
    async for event in run:
        events.append(event.kind)
        run.stop()
    assert events == ["opened", "closed"]
    assert desk.broker.held_quantity == 0
    assert (await orders_in(store)).unsettled() == []


async def test_a_damaged_order_stops_the_context_and_is_kept() -> None:
    store = await left_behind(stored("open", state="filled", filled_quantity=2.0), is_open=True)
    key = order_key(CONTEXT, ENTRY)
    await store.quarantine(key, "it was damaged")
    desk = Desk({6: proposal(quantity=1)})
    desk.time.now_ms = minute_ms(3)
    await live(desk, store)
    assert "opened" not in [name for name, _ in desk.bot.told]
    assert desk.broker.sent == []


async def test_recovering_twice_gives_what_recovering_once_gives() -> None:
    outcomes = []
    for recoveries in (1, 2, 3):
        store = await left_behind(stored("open"), is_open=True)
        desk = Desk({})
        desk.time.now_ms = minute_ms(1) + 100
        for _ in range(recoveries):
            session = await desk.session(store)
            assert isinstance(session.executor, Executor)
            await session.close()
        assert await live(desk, store) == [CLOSED]
        outcomes.append([order.request.client_order_id for order in desk.broker.book.orders])
    assert outcomes == [[ENTRY, EXIT]] * 3


async def test_validities_are_parameters() -> None:
    desk, store = Desk(), await memory_store()
    params = Params(entry_validity_seconds=7.0, exit_validity_seconds=3.0, order_grace_seconds=1.0)
    session = await desk.session(store, params=params)
    assert session.executor is not None
    terms = session.executor.terms
    assert (terms.entry_validity_ms, terms.exit_validity_ms, terms.grace_ms) == (7000, 3000, 1000)
    await session.close()


async def test_a_position_without_an_order_is_closed_and_the_user_is_told_to_look_at_the_venue() -> None:
    """It was opened before a broker was attached, or adopted: nothing can be sent for it."""
    store = await left_behind(is_open=True)
    desk = Desk({})
    assert (await live(desk, store))[-1] == CLOSED
    assert desk.broker.sent == []
    told = [str(failure.error) for failure in desk.bot.errors if failure.where == "orders"]
    assert len(told) == 2
    assert "is open and has no order" in told[0] and "holdfast adopt" in told[0], "at the start, in time to mend it"
    assert "was closed without an order" in told[1] and SIGNAL_ID in told[1]
    await sound(store)
    await store.close()
