"""The other half of a recovery plan: what the venue says of the stored orders, and of what no row tells of."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import candle, flat, memory_store, sound
from order_kit import CONTEXT, Desk, features, orders_in

from holdfast.engine.gap_run import GapReport, GapRun
from holdfast.engine.venue_plan import VenueVerdict
from holdfast.store import Store

QUIET = [*flat(43000, -10, 9)]
STOPPED = [*flat(43000, -10, 4), candle(5, 43000, low=41000), *flat(43000, 6, 9)]


async def left(desk: Desk, store: Store, *, fault: str = "") -> None:
    """Run until the position is open, and leave it there; ``fault`` happens to its order."""
    if fault:
        desk.broker.faults.append(fault)
        desk.broker.read_faults = 1_000_000  # so that nobody finds out what became of it
    run = desk.run(store)
    async for event in run:
        assert event.kind == "opened"
        break
    for _ in range(200):
        await desk.time.sleep(0.01)
        book = await orders_in(store)
        if desk.broker.sent and (fault or all(order.state == "filled" for order in book.orders.values())):
            break
    await run.aclose()
    desk.broker.read_faults = 0


def gap_run(desk: Desk, store: Store, **more: Any) -> GapRun:
    desk.market.present_ms = desk.market.end_ms
    return GapRun(
        store, operator="me@here", registry=desk.bot.registry, listeners=desk.bot.listeners, clock=desk.time,
        sleep=desk.time.sleep, holder="another", **more,
    )  # fmt: skip


async def planned(desk: Desk, store: Store) -> GapReport:
    """Plan; nothing may be sent or stored for it."""
    sent, head = len(desk.broker.sent), (await store.head()).number
    report = await gap_run(desk, store).plan(CONTEXT)
    assert (len(desk.broker.sent), (await store.head()).number) == (sent, head)
    return report


def words(found: tuple[VenueVerdict, ...]) -> list[tuple[str, str]]:
    return [(one.what, one.word) for one in found]


async def test_a_filled_order_and_its_position_are_as_stored() -> None:
    desk, store = Desk(candles=QUIET), await memory_store()
    await left(desk, store)
    report = await planned(desk, store)
    assert words(report.venue) == [("order", "as_stored")]
    assert report.outlook is not None and report.outlook.verdict == "still_valid"


async def test_an_order_whose_answer_was_lost_has_moved_on() -> None:
    desk, store = Desk(candles=QUIET), await memory_store()
    await left(desk, store, fault="lost answer")
    report = await planned(desk, store)
    assert words(report.venue) == [("order", "moved_on")]
    assert report.venue[0].venue == "filled, 2 filled"


async def test_an_order_that_never_came_is_unknown_at_the_venue_and_what_is_done_is_said() -> None:
    desk, store = Desk(candles=QUIET), await memory_store()
    await left(desk, store, fault="lost request")
    report = await planned(desk, store)
    assert words(report.venue) == [("order", "unknown_at_venue")]
    assert report.venue[0].then in ("the open is sent again", "waited for")
    desk, store = Desk(candles=QUIET, promised=features("while_open")), await memory_store()
    await left(desk, store, fault="lost request")
    assert (await planned(desk, store)).venue[0].then == "waited for"


async def test_an_order_twice_at_the_venue_is_told() -> None:
    desk, store = Desk(candles=QUIET, promised=features("never")), await memory_store()
    await left(desk, store, fault="twice")
    assert ("order", "twice_at_venue") in words((await planned(desk, store)).venue)


async def test_what_no_row_tells_of_is_foreign() -> None:
    from holdfast.engine.broker import OrderRequest

    desk, store = Desk(candles=QUIET), await memory_store()
    await left(desk, store)
    other = OrderRequest(
        symbol="BTCUSDT", client_order_id="byhand", side="buy", quantity=3.0, expires_at_ms=desk.time() + 60_000
    )
    desk.broker.book.submit(other, part=0.5, rests=True)
    report = await planned(desk, store)
    assert words(report.venue) == [
        ("order", "as_stored"), ("order", "foreign_at_venue"), ("position", "foreign_at_venue"),
    ]  # fmt: skip
    foreign, position = report.venue[1:]
    assert (foreign.client_order_id, position.stored, position.venue) == ("byhand", "long 2", "long 3.5")


async def test_a_position_that_the_venue_no_longer_has_is_unknown_there() -> None:
    desk, store = Desk(candles=QUIET), await memory_store()
    await left(desk, store)
    desk.broker.book.holdings["BTCUSDT"] = 0.0
    report = await planned(desk, store)
    assert words(report.venue) == [("order", "as_stored"), ("position", "unknown_at_venue")]


async def test_what_the_candles_say_is_told_while_the_venue_keeps_silent_and_the_other_way_round() -> None:
    desk, store = Desk(candles=STOPPED), await memory_store()
    await left(desk, store)
    desk.broker.read_faults = 1_000_000
    report = await planned(desk, store)
    assert report.outlook is not None and report.outlook.verdict == "hit_stop"
    assert (report.venue, report.failed) == ((), "")
    assert "cannot be asked" in report.unasked
    desk.broker.read_faults = 0
    desk.market.failures = [OSError("the market is down")] * 1000
    report = await planned(desk, store)
    assert (report.outlook, words(report.venue), report.unasked) == (None, [("order", "as_stored")], "")
    assert "the market is down" in report.failed


@pytest.mark.parametrize("fault", ["", "lost answer", "partial"])
async def test_recover_closes_at_the_venue_what_the_missed_candles_stopped(fault: str) -> None:
    desk, store = Desk(candles=STOPPED), await memory_store()
    await left(desk, store, fault=fault)
    report = await planned(desk, store)
    assert report.outlook is not None and report.outlook.verdict == "hit_stop"
    done = await gap_run(desk, store).recover(CONTEXT)
    assert [(event.kind, event.reason) for event in done.events][-1] == ("closed", "stop_loss")
    assert desk.broker.held_quantity == 0
    assert done.venue == ()
    await sound(store)
    sent = len(desk.broker.sent)
    again = await gap_run(desk, store).recover(CONTEXT)
    assert (again.outlook, len(desk.broker.sent)) == (None, sent), "the second time nothing is sent"
