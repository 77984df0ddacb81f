"""Started again with the store full: what is open is closed all the same, and stored once there is room."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from emergency_kit import (
    CONTEXT,
    TARGET,
    Place,
    Process,
    Watched,
    closed_by_hand,
    ends_as_if_nothing_had_happened,
    kept_exit,
    kills,
    opened,
    policy_of,
    reached,
    session_in,
    settled,
    stored,
    untroubled,
)
from fakes import candle, flat, minute_ms, sound, stepped
from order_kit import orders_in
from troubled_stores import small_disk

from holdfast.backends.file import FileBackend
from holdfast.contract import Key, Survives
from holdfast.domains import context_key
from holdfast.engine.modes import Mode
from holdfast.errors import FencedError, UnavailableError
from holdfast.rows import Guard, Owner
from holdfast.store import Store

FREE = [lambda payload: None]


async def left_open(place: Place, **bot: Any) -> None:
    """Let a process open a position, and end without a word."""
    (await opened(place, **bot)).die()


async def standing(place: Place, **bot: Any) -> Process:
    """Start a process whose store has no room."""
    process = await place.process(**bot)
    process.backend.go("full")
    await process.start()
    return process


@pytest.mark.parametrize("risk", [None, FREE], ids=["no profile", "profile"])
async def test_a_bot_that_is_started_with_its_store_full_closes_what_is_open(tmp_path: Path, risk: Any) -> None:
    place = Place(tmp_path)
    await left_open(place, risk=risk)
    process = await standing(place, risk=risk)
    session = process.session
    assert session.state.signal is not None
    assert session.health.mode is Mode.CLOSE_ONLY
    (closed,) = await stepped(session, TARGET)
    assert (closed.kind, closed.number, closed.candle_ms) == ("closed", 2, minute_ms(1))
    assert session.unsaved == 1
    assert await stepped(session, candle(2, 43000)) == [], "nothing begins"
    process.backend.go("")
    await settled(process)
    assert session.unsaved == 0
    owner = await process.store.get(context_key("owner", CONTEXT))
    assert owner is not None and isinstance(owner.row, Owner)
    assert owner.row == session.owner
    assert owner.row.epoch == 2
    await session.close()
    assert [trouble.kind for trouble in process.trouble] == ["emergency", "emergency"]
    assert "owns it once the store can be written" in process.trouble[0].why
    await sound(process.store)
    assert await stored(process.store) == await untroubled(tmp_path, candle(0, 43000), TARGET, risk=risk)
    assert [event.number for event in place.told] == [1, 2]


async def test_it_becomes_an_owner_like_any_other(tmp_path: Path) -> None:
    place = Place(tmp_path)
    await left_open(place)
    process = await standing(place, signals=lambda symbol, when: None)
    process.backend.go("")
    await settled(process)
    assert await stepped(process.session, candle(1, 43000)) == []
    await settled(process)
    assert process.health.mode is Mode.NORMAL, "two quick commits in a row"
    (closed,) = await stepped(process.session, candle(2, 43000, high=44000))
    assert closed.kind == "closed"
    assert process.session.unsaved == 0, "the store took it"
    await process.session.close()
    await sound(process.store)


@pytest.mark.parametrize("why", ["nothing open", "no journal", "closed already", "never ran", "unreadable", "shared"])
async def test_where_nothing_can_or_need_be_closed_the_start_waits_for_the_store(tmp_path: Path, why: str) -> None:
    place = Place(tmp_path, **({"emergency": None} if why == "no journal" else {}))
    if why == "closed already":
        first, _ = await kept_exit(place, "full", flushed=False)
        first.die()
    elif why != "never ran":
        await left_open(place, signals={} if why == "nothing open" else {1: _proposal()})
    process = await place.process()
    process.backend.go("gone" if why == "unreadable" else "full")
    if why == "shared":
        process.store._guarantees = msgspec.structs.replace(process.store.guarantees, shared=True)
    with pytest.raises(UnavailableError):
        await process.start()
    process.backend.go("")
    session = await process.start()
    await session.close()
    await sound(process.store)


def _proposal() -> dict[str, Any]:
    return {"position": "long", "priceTakeProfit": 44000, "priceStopLoss": 42000, "minuteEstimatedTime": 60}


async def test_it_stops_where_somebody_else_has_gone_on_after_all(tmp_path: Path) -> None:
    place = Place(tmp_path)
    await left_open(place)
    process = await standing(place)
    await stepped(process.session, TARGET)
    other = await place.process()
    other.place = Place(tmp_path / "elsewhere")
    key = context_key("owner", CONTEXT)
    row = Owner(holder="other", epoch=9, host="h", pid=1, since_ms=0)
    await other.store.writer("other").commit({key: row})
    process.backend.go("")
    with pytest.raises(FencedError, match="epoch 9"):
        await process.session.flush()
    await process.session.close()


@pytest.mark.parametrize("then", ["room", "full again"])
async def test_killed_at_any_step_and_started_again_with_or_without_room_nothing_is_lost_or_repeated(
    tmp_path: Path, then: str, record_property: Any
) -> None:
    expected = await untroubled(tmp_path, candle(0, 43000), TARGET)

    async def run(place: Place, step: int, dies_after: int) -> bool:
        await left_open(place)
        process = await standing(place)
        process.by_hand()
        return await closed_by_hand(process, "full", step, dies_after)

    count = 0
    async for place, what in kills(tmp_path, run):
        count += 1
        if then == "full again":
            process = await place.process()
            process.backend.go("full")
            try:
                session = await process.start()
            except UnavailableError:  # what was open had been closed: the start waits
                for space in process.spaces:
                    space.close()
            else:
                await stepped(session, TARGET, entries=False)
                process.die()
        await ends_as_if_nothing_had_happened(place, expected, what)
    record_property("proof:emergency", {"kills while standing in": count})
    assert count > 5


async def test_restarted_with_the_disk_full_the_bot_sells_once(tmp_path: Path) -> None:
    """The user's own complaint: disk full, and the bot could not even sell; journal and store lie on that disk."""
    with small_disk(tmp_path / "small", 1) as disk:
        policy = policy_of(disk.where / "emergency")
        store = Store(FileBackend(disk.where / "store"), require=Survives.NOTHING)
        await store.open()
        first = Watched()
        running = first.start(first.desk.run(store, on_trouble=policy))
        await first.holds()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        disk.fill()
        with pytest.raises(UnavailableError):  # the last page of the log may have room for a commit or two
            for number in range(100):
                await store.writer("filler").commit({Key("guard", "limit", "guard"): Guard(changes=number)})
        await store.close()

        store = Store(FileBackend(disk.where / "store"), require=Survives.NOTHING)
        await store.open()
        watched = Watched(first.desk.again())
        desk = watched.desk
        desk.market.candles["BTCUSDT"] += [candle(4, 43000, high=44100), *flat(43000, 5, 6)]
        run = desk.run(store, on_trouble=policy)
        running = watched.start(run)
        await reached(lambda: desk.broker.held_quantity == 0)
        await reached(lambda: "closed" in [event.kind for event in watched.told])
        session = session_in(run)
        assert session.unsaved > 0
        assert [one.kind for one in watched.trouble] == ["emergency", "emergency"]
        assert "owns it once the store can be written" in watched.trouble[0].why
        disk.free()
        await reached(lambda: session.unsaved == 0 and len(session.outbox) == 0)
        desk.market.go_on(flat(43000, 7, 9))
        desk.market.finish()
        await running
        sent = [(order.side, order.quantity, order.reduce_only) for order in desk.broker.sent]
        assert sent == [("buy", 2, False), ("sell", 2, True)]
        orders = (await orders_in(store)).orders.values()
        assert [(order.action, order.state) for order in orders] == [("open", "filled"), ("close", "filled")]
        await sound(store)
        await store.close()
