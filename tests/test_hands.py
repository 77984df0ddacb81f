"""The operator's hands: adopt, close, clear: each one audited commit, after which every invariant holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from fakes import Bot, FakeMarket, candle, flat, minute_ms, no_sleep, put, signal_row, sound
from gap_kit import CONTEXT, GAPS, bot_of, filled, recovered, rows_of, run_of, stored
from mortal import Death, Killer, MortalBackend, World
from test_ownership import Process, finished, two  # noqa: F401 -- a fixture
from test_recovery import LEVELS, OLD_KEY, OLD_SLOT

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Key, Op, Survives
from holdfast.domains import context_key, event_key, guard_key, ledger_key, risk_key
from holdfast.engine.audited import Done
from holdfast.engine.hands import Hands
from holdfast.engine.ownership import own
from holdfast.errors import FencedError, HeldError, InvalidInputError, NotFoundError
from holdfast.invariants import check_store
from holdfast.quarantine import kept_bytes
from holdfast.rows import Audit, Owner, Quarantined, Row, Trade
from holdfast.store import Store

SIGNAL_KEY, SCHEDULE_KEY = context_key("signal", CONTEXT), context_key("schedule", CONTEXT)
SLOT = risk_key("limit", CONTEXT)
OPEN, WAITING = GAPS[0], next(gap for gap in GAPS if gap.row.is_scheduled)
NOW_MS = minute_ms(30)


def hands(store: Store, **more: Any) -> Hands:
    return Hands(store, operator="me@here", clock=lambda: NOW_MS, sleep=no_sleep, **{"why": "test", **more})


async def rows_in(store: Store) -> Mapping[Key, Row]:
    found, _ = await store.salvage(*await store.keys())
    return {key: loaded.row for key, loaded in found.items()}


async def audits(store: Store) -> list[Audit]:
    return [row for row in (await rows_in(store)).values() if isinstance(row, Audit)]


async def sound_and_audited(store: Store, done: Done) -> None:
    await sound(store)
    assert await audits(store) == [done.audit]
    assert (done.audit.by, done.audit.why, done.audit.at_ms) == ("me@here", "test", NOW_MS)


# ---------------------------------------------------------------------- close


async def test_close_is_a_transition_with_its_event_its_trade_and_the_freed_slot() -> None:
    world = await filled(OPEN)
    store = await world.boot()
    before = (await store.head()).number
    done = await hands(store).close(CONTEXT, 43500)
    assert (await store.head()).number == before + 1, "one commit"
    await sound_and_audited(store, done)
    assert done.event is not None
    assert (done.event.kind, done.event.reason, done.event.price_close) == ("closed", "operator", 43500)
    assert done.event.at_ms == NOW_MS
    rows = await rows_in(store)
    assert SIGNAL_KEY not in rows and SLOT not in rows
    trade = rows[ledger_key(CONTEXT, OPEN.row.id)]
    assert isinstance(trade, Trade) and trade.price_close == 43500
    assert done.audit.before[str(SIGNAL_KEY)]["id"] == OPEN.row.id and done.audit.after[str(SIGNAL_KEY)] is None
    with pytest.raises(NotFoundError, match="nothing is open"):
        await hands(store).close(CONTEXT, 43500)
    bot = Bot(FakeMarket({"BTCUSDT": flat(43000, -5, 40)}, start=31), risk=[lambda payload: True])
    events = [event async for event in bot.run(store)]
    assert events == [done.event], "the next run tells of it"


async def test_close_of_what_waits_cancels_it() -> None:
    store = await (await filled(WAITING)).boot()
    done = await hands(store).close(CONTEXT, 43000)
    await sound_and_audited(store, done)
    assert done.event is not None and (done.event.kind, done.event.reason) == ("cancelled", "stopped")


async def test_close_refuses_a_present_that_is_far_from_the_last_decision() -> None:
    store = await (await filled(OPEN)).boot()
    far = Hands(store, operator="me@here", clock=lambda: minute_ms(60 * 24 * 30), sleep=no_sleep)
    with pytest.raises(InvalidInputError, match="--at TIME"):
        await far.close(CONTEXT, 43500)
    done = await far.close(CONTEXT, 43500, at_ms=minute_ms(20))
    assert done.event is not None and done.event.at_ms == minute_ms(20)


@pytest.mark.parametrize("what", ["close", "adopt", "clear", "take_over"])
async def test_killed_at_each_step_a_hand_did_all_or_nothing(what: str, record_property: Any) -> None:
    async def begun() -> World:
        world = World() if what in ("take_over", "clear") else await filled(OPEN)
        store = await world.boot()
        if what == "adopt":
            await store.quarantine(SIGNAL_KEY, "test")
        if what == "clear":
            await put(store, {OLD_KEY: OLD_SLOT})
        await store.close()
        return world

    async def act(world: World, killer: Killer | None) -> None:
        hand = hands(await world.boot(killer))
        match what:
            case "close":
                await hand.close(CONTEXT, 43500)
            case "adopt":
                await hand.adopt(SIGNAL_KEY)
            case "clear":
                await hand.clear(OLD_KEY)
            case _:
                await hand.take_over(CONTEXT, signal_row())

    world = await begun()
    untouched = {key for key in (await stored(world))[0] if key.domain not in ("audit", "quarantine")}
    await act(world, counter := Killer())
    whole = {key for key in (await stored(world))[0] if key.domain not in ("audit", "quarantine", "ledger")}
    for at in range(counter.steps):
        world = await begun()
        with pytest.raises(Death):
            await act(world, Killer(at))
        rows = (await stored(world))[0]
        left = {key for key in rows if key.domain not in ("audit", "quarantine", "ledger")}
        did = any(isinstance(row, Audit) for row in rows.values())
        assert left == (whole if did else untouched), f"killed at {at}"
        if did:
            await sound(await world.boot())
    record_property("proof:operator's hands", {"kills": counter.steps})


# ---------------------------------------------------------------------- adopt


async def test_a_row_that_names_another_exchange_is_taken_as_ones_own() -> None:
    world = await filled(OPEN)
    store = await world.boot()
    await put(store, {SIGNAL_KEY: msgspec.structs.replace(OPEN.row, exchange_name="elsewhere")})
    from holdfast.engine.recovery import look

    await look(store, CONTEXT, (), now_ms=0, lifetime_ms=0)
    assert store.is_stopped(SIGNAL_KEY)
    await put(store, {SLOT: None})  # lost meanwhile: it must come back with the row
    done = await hands(store).adopt(SIGNAL_KEY)
    await sound_and_audited(store, done)
    rows = await rows_in(store)
    assert rows[SIGNAL_KEY] == OPEN.row
    assert SLOT in rows
    assert any(isinstance(row, Quarantined) and key.entity_id.endswith(".released") for key, row in rows.items())
    assert not store.damaged
    report = await recovered(GAPS[2], world)
    assert [event.reason for event in report.events] == ["take_profit"], "it is watched again"


async def test_a_row_whose_checksum_is_damaged_is_adopted_as_its_bytes_say() -> None:
    world = await filled(OPEN)
    store = await world.boot()
    place = store.place(SIGNAL_KEY)
    record = (await place.backend.read(place.scope, [SIGNAL_KEY]))[SIGNAL_KEY]
    damaged = record.payload.replace(b'"priceStopLoss":42000.0', b'"priceStopLoss":42500.0')
    assert damaged != record.payload
    await place.backend.commit(place.scope, {SIGNAL_KEY: damaged}, {}, op=Op("hand", 1))
    _, broken = await store.salvage(SIGNAL_KEY)
    assert broken
    done = await hands(store).adopt(SIGNAL_KEY)
    await sound_and_audited(store, done)
    row = (await rows_in(store))[SIGNAL_KEY]
    assert row == msgspec.structs.replace(OPEN.row, price_stop_loss=42500.0)


@pytest.mark.parametrize(
    ("payload", "told"),
    [(b"\0\0\0", "clear it"), (b'{"id":"x"}', "clear it"), (b"[1]", "clear it")], ids=["zeros", "part", "list"],
)  # fmt: skip
async def test_bytes_that_are_no_row_are_not_adopted(payload: bytes, told: str) -> None:
    store = await (await filled(OPEN)).boot()
    place = store.place(SIGNAL_KEY)
    await place.backend.commit(place.scope, {SIGNAL_KEY: payload}, {}, op=Op("hand", 1))
    await store.salvage(SIGNAL_KEY)
    with pytest.raises(InvalidInputError, match=told):
        await hands(store).adopt(SIGNAL_KEY)
    done = await hands(store).clear(SIGNAL_KEY)
    await sound_and_audited(store, done)
    rows = await rows_in(store)
    assert SIGNAL_KEY not in rows and SLOT not in rows
    kept = [row for key, row in rows.items() if isinstance(row, Quarantined)]
    assert kept_bytes(kept) == payload


async def test_a_closed_signal_or_one_beside_another_is_not_adopted() -> None:
    store = await (await filled(OPEN)).boot()
    await store.quarantine(SIGNAL_KEY, "test")
    await put(store, {SIGNAL_KEY: msgspec.structs.replace(OPEN.row, id="another")})
    with pytest.raises(InvalidInputError, match="another row stands there"):
        await hands(store).adopt(SIGNAL_KEY)

    store = await (await filled(OPEN)).boot()
    session = await store.get(context_key("session", CONTEXT))
    assert session is not None
    closed: Any = msgspec.structs.replace(session.row, closed_ids=(OPEN.row.id,))
    await put(store, {context_key("session", CONTEXT): closed})
    await store.quarantine(SIGNAL_KEY, "test")
    with pytest.raises(InvalidInputError, match="closed before"):
        await hands(store).adopt(SIGNAL_KEY)
    assert await audits(store) == []


async def test_a_position_from_elsewhere_comes_under_watch_with_an_event() -> None:
    world = World()
    store = await world.boot()
    done = await hands(store, risk_names={"my-strategy": ("limit",)}).take_over(CONTEXT, signal_row(at_minute=25))
    await sound_and_audited(store, done)
    rows = await rows_in(store)
    assert SLOT in rows and guard_key("limit") in rows and event_key(CONTEXT, 1) in rows
    with pytest.raises(InvalidInputError, match="is there already"):
        await hands(store).take_over(CONTEXT, signal_row())
    market = FakeMarket({"BTCUSDT": [*flat(43000, -5, 35), candle(36, 43000, low=41000)]}, start=31)
    bot = Bot(market, risk=[lambda payload: True])
    events = [event async for event in bot.run(store)]
    assert [(event.kind, event.reason) for event in events] == [("opened", None), ("closed", "stop_loss")]


async def test_a_position_that_cannot_be_true_is_not_adopted() -> None:
    store = await World().boot()
    with pytest.raises(InvalidInputError, match="cannot be watched"):
        await hands(store).take_over(CONTEXT, signal_row(stop=45000))
    assert await store.keys() == []


# ---------------------------------------------------------------------- clear


async def test_a_slot_of_nothing_is_cleared_and_its_bytes_are_kept() -> None:
    store = await World().boot()
    await put(store, {OLD_KEY: OLD_SLOT})
    assert await check_store(store) != []
    done = await hands(store).clear(OLD_KEY)
    await sound_and_audited(store, done)
    rows = await rows_in(store)
    assert OLD_KEY not in rows and Key("guard", OLD_KEY.entity_name, "guard") in rows
    (kept,) = [row for row in rows.values() if isinstance(row, Quarantined)]
    assert '"gone"' in kept.text
    assert not store.damaged
    with pytest.raises(NotFoundError, match="no such row"):
        await hands(store).clear(OLD_KEY)


async def test_what_belongs_to_an_open_position_is_not_cleared() -> None:
    store = await (await filled(OPEN)).boot()
    await put(store, {context_key("partial", CONTEXT): LEVELS})
    for key, told in (
        (SLOT, "close or clear that"), (context_key("partial", CONTEXT), "close or clear that"),
        (SIGNAL_KEY, "close it"), (context_key("session", CONTEXT), "by itself"),
    ):  # fmt: skip
        with pytest.raises(InvalidInputError, match=told):
            await hands(store).clear(key)
    assert await audits(store) == []


async def test_levels_of_nothing_are_cleared() -> None:
    store = await (await filled(WAITING)).boot()
    await put(store, {context_key("partial", CONTEXT): LEVELS})
    await sound_and_audited(store, await hands(store).clear(context_key("partial", CONTEXT)))


async def test_a_session_row_in_quarantine_is_cleared_and_no_event_number_comes_twice() -> None:
    store = await (await filled(OPEN)).boot()
    await store.quarantine(context_key("session", CONTEXT), "test")
    await sound_and_audited(store, await hands(store).clear(context_key("session", CONTEXT)))
    session = await store.get(context_key("session", CONTEXT))
    assert session is not None and getattr(session.row, "last_event", 0) > 1000


# ---------------------------------------------------------------------- who owns it


async def test_a_hand_is_refused_while_the_owner_lives_and_fences_it_once_it_slept(
    two: tuple[Process, Process, Any],  # noqa: F811
) -> None:
    first, second, time = two
    session = await first.session()
    from holdfast.engine.worker import Watch

    await put(second.store, {SIGNAL_KEY: OPEN.row})
    watch = Watch(second.store, boot_clock=time)
    hand = Hands(second.store, operator="me@here", clock=lambda: NOW_MS, sleep=time.sleep, watch=watch)
    import asyncio

    refused = asyncio.ensure_future(hand.close(CONTEXT, 43500))
    await finished(refused, time, within=60)
    with pytest.raises(HeldError, match="is alive"):
        await refused
    await first.die()
    closing = asyncio.ensure_future(hand.close(CONTEXT, 43500))
    await finished(closing, time, within=60)
    done = await closing
    assert done.event is not None and done.event.reason == "operator"
    await sound(second.store)
    with pytest.raises(FencedError):
        await session.note({context_key("outage", CONTEXT)._replace(entity_id="1"): None})


async def test_the_next_owner_need_not_wait_for_the_hand_that_was_last() -> None:
    world = await filled(OPEN)
    store = await world.boot()
    await own(store, store.writer("x"), CONTEXT, holder="dead", now_ms=0, sleep=no_sleep)
    await hands(store).close(CONTEXT, 43500)
    found = await store.get(context_key("owner", CONTEXT))
    assert found is not None and isinstance(found.row, Owner)
    assert (found.row.released, found.row.epoch) == (True, 2)


async def test_another_commit_between_look_and_commit_makes_the_hand_look_again() -> None:
    class Meddled(MortalBackend):
        meddle: Any = None

        async def commit(self, scope: str, changes: Any, expect: Any, *, op: Op) -> int:
            if self.meddle is not None and any(key.domain == "audit" for key in changes):
                meddle, self.meddle = self.meddle, None
                await meddle()
            return await super().commit(scope, changes, expect, op=op)

    backend = Meddled(MemoryBackend(), Killer())
    store = Store(backend, require=Survives.NOTHING)
    await store.open()
    await put(store, rows_of(OPEN))

    async def moved() -> None:
        await put(store, {SIGNAL_KEY: msgspec.structs.replace(OPEN.row, note="written meanwhile")})

    backend.meddle = moved
    done = await hands(store).close(CONTEXT, 43500)
    assert done.event is not None and done.event.signal.note == "written meanwhile"
    assert len(await audits(store)) == 1


async def test_rows_in_four_method_classes_are_planned_for_recovered_and_closed() -> None:
    world = World(classes=True)
    await put(await world.boot(), rows_of(OPEN))
    stops = GAPS[3]._replace(row=OPEN.row)
    store = await world.boot()
    plan = await run_of(bot_of(stops), store).plan(CONTEXT)
    assert plan.outlook is not None and plan.outlook.verdict == "hit_stop"
    done = await run_of(bot_of(stops), store).recover(CONTEXT)
    assert done.events == plan.outlook.events
    await sound(store)

    world = World(classes=True)
    await put(await world.boot(), rows_of(OPEN))
    store = await world.boot()
    closed = await hands(store).close(CONTEXT, 43500)
    assert closed.event is not None and closed.event.price_close == 43500
    await sound(store)
