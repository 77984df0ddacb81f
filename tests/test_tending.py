"""Orders that are not settled are gone on with by a broker of their account, or by nobody, and that is told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fakes import memory_store, sound
from order_kit import CONTEXT, Desk, orders_in
from test_adopt_venue import NAME, POSITION, T0, answer, call, clock, held, key, sold, venue
from test_recovery_venue import STOPPED, gap_run, left

from holdfast.brokers.paper_venue import VenueProcess
from holdfast.cli.check import examine
from holdfast.contract import Key
from holdfast.domains import context_key
from holdfast.engine.hands import Hands
from holdfast.engine.holdings import Holdings
from holdfast.errors import InvalidInputError, NotFoundError
from holdfast.store import Store

__all__ = ["key", "venue"]  # fixtures


def brokerless(desk: Desk) -> Desk:
    """Return the same bot in another process, its exchange added without the broker."""
    desk.market.broker = None  # type: ignore[attr-defined]
    return desk.again()


@pytest.mark.parametrize("fault", ["", "lost answer", "partial"])
async def test_a_position_is_not_gone_on_with_where_there_is_no_broker(fault: str) -> None:
    desk, store = Desk(candles=STOPPED), await memory_store()
    await left(desk, store, fault=fault)
    (order,) = (await orders_in(store)).orders.values()
    head = await store.load(*[key for key in await store.keys() if key.domain in ("signal", "order", "outbox")])
    told = rf"signal 'binance.*{order.client_order_id}.*"
    other = brokerless(desk)
    with pytest.raises(InvalidInputError, match=f"account 'acc'.*{told}without a broker.*close {CONTEXT} --settled"):
        await other.live(store)
    with pytest.raises(InvalidInputError, match=told):
        await gap_run(other, store).recover(CONTEXT)
    with pytest.raises(InvalidInputError, match=told):
        await gap_run(other, store).plan(CONTEXT)
    assert head == await store.load(*head), "nothing was decided without it"
    assert await store.keys() and not await store.scan("ledger")
    desk.market.broker = desk.broker  # type: ignore[attr-defined]
    assert [event.kind for event in await desk.again().live(store)] == ["opened", "closed"]
    assert desk.broker.held_quantity == 0, "the same start with the broker goes on, and closes"
    await sound(store)


async def test_without_anything_at_stake_no_broker_is_needed() -> None:
    desk, store = Desk(), await memory_store()
    assert [event.kind for event in await desk.live(store)] == ["opened", "closed"]
    assert (await orders_in(store)).orders, "settled ones stay on record"
    assert await brokerless(desk).live(store) == []


async def test_an_order_in_quarantine_is_not_passed_over_where_there_is_no_broker() -> None:
    desk, store = Desk(), await memory_store()
    await left(desk, store)
    (key,) = await _order_keys(store)
    await store.quarantine(key, "its checksum is wrong")
    with pytest.raises(InvalidInputError, match=rf"{key} is in quarantine.*without a broker.*holdfast clear {key}"):
        await brokerless(desk).live(store)


async def _order_keys(store: Store) -> list[Key]:
    return list(await store.scan("order", context_key("order", CONTEXT).entity_name))


@pytest.mark.parametrize("planned", [True, False])
async def test_a_plan_under_the_wrong_key_is_refused_as_the_run_is(planned: bool) -> None:
    desk, store = Desk(candles=STOPPED), await memory_store()
    await left(desk, store)
    desk.broker.account = "rotated"
    run = gap_run(desk.again(), store)
    with pytest.raises(InvalidInputError, match=f"account 'acc'.*trades 'rotated'.*adopt {CONTEXT} --account"):
        await (run.plan(CONTEXT) if planned else run.recover(CONTEXT))


# ---------------------------------------------------------------------- the operator's word


def hands(desk: Desk, store: Store) -> Hands:
    return Hands(store, operator="me@here", why="I looked", clock=desk.time, sleep=desk.time.sleep)


def holdings(desk: Desk, store: Store) -> Holdings:
    return Holdings(
        store, desk.broker, "binance", format_quantity=lambda symbol, quantity: f"{quantity:g}", operator="me@here",
        clock=desk.time, sleep=desk.time.sleep,
    )  # fmt: skip


@pytest.mark.parametrize("fault", ["", "lost answer", "partial"])
async def test_a_position_whose_key_was_rotated_is_moved_and_closed_under_the_new_one(fault: str) -> None:
    desk, store = Desk(candles=STOPPED), await memory_store()
    await left(desk, store, fault=fault)
    desk.broker.account = "rotated"
    done = await hands(desk, store).move(CONTEXT, holdings(desk, store))
    assert {row["account"] for row in done.audit.before.values()} == {"acc"}
    assert {row["account"] for row in done.audit.after.values()} == {"rotated"}
    with pytest.raises(InvalidInputError, match="belong to the account 'rotated' already"):
        await hands(desk, store).move(CONTEXT, holdings(desk, store))
    assert [event.kind for event in await desk.again().live(store)] == ["opened", "closed"]
    assert desk.broker.held_quantity == 0
    with pytest.raises(NotFoundError, match="every order is settled"):
        await hands(desk, store).move(CONTEXT, holdings(desk, store))
    await sound(store)


async def test_orders_are_not_moved_to_an_account_that_does_not_hold_them() -> None:
    desk, store = Desk(candles=STOPPED), await memory_store()
    await left(desk, store)
    desk.broker.account = "another"
    desk.broker.book.holdings["BTCUSDT"] = 1.9
    with pytest.raises(InvalidInputError, match=r"'another' shows long 1\.9 of BTCUSDT, and the orders come to long 2"):
        await hands(desk, store).move(CONTEXT, holdings(desk, store))
    assert {order.account for order in (await orders_in(store)).orders.values()} == {"acc"}


@pytest.mark.parametrize("fault", ["", "lost answer", "lost request", "partial", "resting"])
@pytest.mark.parametrize("closed_before", [True, False])
async def test_what_was_settled_at_the_venue_is_settled_here_and_nothing_is_sent_for_it(
    fault: str, closed_before: bool
) -> None:
    desk, store = Desk(candles=STOPPED), await memory_store()
    await left(desk, store, fault=fault)
    if closed_before:
        await hands(desk, store).close(CONTEXT, 43000.0)
        with pytest.raises(InvalidInputError, match="without a broker"):
            await brokerless(desk).live(store)
        desk.market.broker = desk.broker  # type: ignore[attr-defined]
    desk.broker.book.holdings["BTCUSDT"] = 0.0  # the operator closed it there
    if not closed_before:
        with pytest.raises(InvalidInputError, match="at which price"):
            await hands(desk, store).close(CONTEXT, None, settled=True)
    done = await hands(desk, store).close(CONTEXT, None if closed_before else 43000.0, settled=True)
    assert (done.event is None) == closed_before
    book = await orders_in(store)
    assert book.unsettled() == []
    assert all(order.adopted for order in book.orders.values()), "a fill that turns up later is nobody's to close again"
    assert any(key.startswith("order/") for key in done.audit.before), "each row is on record as it was"
    await sound(store)
    sent = len(desk.broker.sent)
    desk.time.now_ms += 3_600_000
    await brokerless(desk).live(store)
    desk.market.broker = desk.broker  # type: ignore[attr-defined]
    again = desk.again()
    await again.live(store)
    assert (len(desk.broker.sent), again.bot.errors) == (sent, [])
    with pytest.raises(NotFoundError, match="every order is settled"):
        await hands(desk, store).close(CONTEXT, None, settled=True)
    await sound(store)


def test_the_same_file_without_its_broker_is_refused_by_every_command(
    venue: VenueProcess, key: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert call("adopt", NAME, *POSITION, "--bot", "bot.py", "--store", "data") == 0
    with_broker = Path("bot.py").read_text()
    Path("plain.py").write_text(re.sub(r", broker=PaperBroker\(.*?\)", "", with_broker))
    clock(30)
    capsys.readouterr()
    for command in (("run", "plain.py", "--plain"), ("recover", "plain.py"), ("recover", "plain.py", "--plan")):
        assert call(*command, "--store", "data") == 2
        assert f"holdfast close {NAME} --settled" in capsys.readouterr().err
    assert call("run", "bot.py", "--plain", "--store", "data", "--market", "synthetic:7", "--minutes", "5") == 2
    assert "without a broker" in capsys.readouterr().err
    (order,) = answer(capsys, "show", "data")["contexts"][0]["orders"]
    row = f"order/BTCUSDT_watcher_paper/{order['clientOrderId']}"
    assert call("check", "data") == 0, "it is open, and the next start goes on with it"
    assert call("clear", row, "--store", "data") == 2
    assert "holdfast close CONTEXT --settled" in capsys.readouterr().err
    Path("other.py").write_text(with_broker.replace(f'key="{key}"', 'key="another"'))
    assert call("run", "other.py", "--plain", "--store", "data") == 2
    assert f"holdfast adopt {NAME} --account" in capsys.readouterr().err
    assert call("adopt", NAME, "--account", "--bot", "other.py", "--store", "data") == 2
    assert "shows nothing" in capsys.readouterr().err
    assert call("close", NAME, "--settled", "--store", "data") == 2, "it is open: at which price?"
    done: Any = answer(
        capsys,
        "close",
        NAME,
        "--settled",
        "--price",
        "43000",
        "--store",
        "data",
        "--why",
        "by hand",
        "--at",
        str(T0 + 30 * 60_000),
    )
    assert (done["event"]["kind"], done["why"]) == ("closed", "by hand")
    assert call("run", "plain.py", "--plain", "--store", "data") == 0
    assert call("check", "data") == 0
    assert (held(venue, key), sold(venue, key)) == ({"long": 3.0}, []), "nothing was sent"


async def test_check_finds_a_position_that_nothing_is_to_close() -> None:
    desk, store = Desk(candles=STOPPED), await memory_store()
    await left(desk, store)
    assert (await examine(store)).findings == []
    await hands(desk, store).close(CONTEXT, 43000.0)
    (found,) = (await examine(store)).findings
    assert found.rule == "position-left-open"
    assert "2 of BTCUSDT" in found.message and "start the bot with its broker" in found.message
    await desk.again().live(store)
    assert (await examine(store)).findings == []
