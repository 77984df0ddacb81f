"""Recovery: own, load, check, reconcile; each part may die, and recovering twice is recovering once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from fakes import Bot, FakeMarket, candle, flat, minute_ms, proposal, put, session_of, signal_row, sound, stepped
from mortal import Death, Killer, MortalBackend, World
from test_invariants import event

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Key, Op
from holdfast.domains import context_key, event_key, guard_key, ledger_key, risk_key, risk_slot_key, to_mapping
from holdfast.engine.outbox import trade_of
from holdfast.engine.reconcile import session_row, slot_of
from holdfast.engine.recovery import RecoveryReport
from holdfast.errors import CorruptedError, FencedError, UnavailableError
from holdfast.invariants import check_store
from holdfast.names import Context
from holdfast.rows import Levels, Owner, PartialLevels, RiskPosition, Row, SessionRow
from holdfast.rules.signals import State
from holdfast.store import Store

CONTEXT = Context("binance", "BTCUSDT", "my-strategy")
SIGNAL = signal_row(at_minute=-5)
WAITING = signal_row(at_minute=-5, scheduled=True, opened=42500, signal_id="waits")
DONE = signal_row(at_minute=-50, signal_id="done")
KEYS = {domain: context_key(domain, CONTEXT) for domain in ("signal", "schedule", "partial", "session", "owner")}
SLOT = risk_key("limit", CONTEXT)
NAMELESS = risk_slot_key("limit", "BTCUSDT", "my-strategy", None)
Rows = Mapping[Key, Row]


def at_rest(**more: Any) -> SessionRow:
    state = State(**{"last_candle_ms": minute_ms(-6), "last_event": 1, **more})
    return session_row(CONTEXT, state, ())


def holding(**more: Any) -> SessionRow:
    return msgspec.structs.replace(at_rest(**more), risk_names=("limit",))


LEVELS = PartialLevels(levels={SIGNAL.id: Levels(profit_levels=(10, 20)), "stale": Levels()})
OLD_SLOT = RiskPosition(strategy_name="gone", exchange_name="binance", symbol="ETHUSDT", open_timestamp=1)
OLD_KEY = risk_key("limit", Context("binance", "ETHUSDT", "gone"))

# What a store without atomic commits, or a hand, may leave; what recovery mends; what is true afterwards.
LEFTOVERS: dict[str, tuple[Rows, set[str], set[Key]]] = {
    "nothing": ({}, set(), set()),
    "a sound open position": (
        {KEYS["signal"]: SIGNAL, SLOT: slot_of(SIGNAL), KEYS["session"]: holding()},
        set(),
        {KEYS["signal"], SLOT, KEYS["session"]},
    ),
    "W1: open without slot": (
        {KEYS["signal"]: SIGNAL, KEYS["session"]: holding()},
        {"slot-restored"},
        {KEYS["signal"], SLOT, KEYS["session"], guard_key("limit")},
    ),
    "W1: a row alone, as a class leaves it": (
        {KEYS["signal"]: SIGNAL},
        {"slot-restored", "session-made"},
        {KEYS["signal"], SLOT, KEYS["session"], guard_key("limit")},
    ),
    "a slot as the documents write it, without an exchange": (
        {KEYS["signal"]: SIGNAL, NAMELESS: slot_of(SIGNAL), KEYS["session"]: holding()},
        {"slot-adopted", "slot-restored"},
        {KEYS["signal"], SLOT, KEYS["session"], guard_key("limit")},
    ),
    "a slot without an exchange, beside its own": (
        {KEYS["signal"]: SIGNAL, SLOT: slot_of(SIGNAL), NAMELESS: slot_of(SIGNAL), KEYS["session"]: holding()},
        set(),
        {KEYS["signal"], SLOT, NAMELESS, KEYS["session"]},
    ),
    "W4: activated, and still scheduled": (
        {KEYS["signal"]: msgspec.structs.replace(SIGNAL, id="waits"), KEYS["schedule"]: WAITING, SLOT: slot_of(SIGNAL),
         KEYS["session"]: holding()},
        {"schedule-removed", "slot-renamed"},
        {KEYS["signal"], SLOT, KEYS["session"], guard_key("limit")},
    ),
    "W7: closed, and the row is still there": (
        {KEYS["signal"]: SIGNAL, SLOT: slot_of(SIGNAL), KEYS["session"]: at_rest(closed_ids=(SIGNAL.id,))},
        {"closed-signal-removed", "slot-removed"},
        {KEYS["session"], guard_key("limit")},
    ),
    "W7: closed in the outbox only": (
        {KEYS["signal"]: SIGNAL, event_key(CONTEXT, 1): event(1, "closed", SIGNAL)},
        {"closed-signal-removed", "session-made"},
        {KEYS["session"], event_key(CONTEXT, 1)},
    ),
    "W8: levels of nothing": (
        {KEYS["partial"]: LEVELS, KEYS["session"]: at_rest()}, {"levels-dropped"}, {KEYS["session"]},
    ),
    "levels of another id beside the open one's": (
        {KEYS["signal"]: SIGNAL, SLOT: slot_of(SIGNAL), KEYS["session"]: holding(), KEYS["partial"]: LEVELS},
        {"levels-dropped"},
        {KEYS["signal"], SLOT, KEYS["session"], KEYS["partial"]},
    ),
    "W9, W12: a slot of nothing": (
        {SLOT: slot_of(SIGNAL), KEYS["session"]: holding()},
        {"slot-removed", "session-repaired"},
        {KEYS["session"], guard_key("limit")},
    ),
    "W12: a slot past its lifetime": (
        {OLD_KEY: OLD_SLOT, KEYS["session"]: at_rest()}, {"slot-pruned"}, {KEYS["session"], guard_key("limit")},
    ),
    "a profile that the strategy no longer has": (
        {KEYS["signal"]: SIGNAL, SLOT: slot_of(SIGNAL), risk_key("former", CONTEXT): slot_of(SIGNAL),
         KEYS["session"]: msgspec.structs.replace(holding(), risk_names=("limit", "former"))},
        {"slot-removed", "session-repaired"},
        {KEYS["signal"], SLOT, KEYS["session"], guard_key("former")},
    ),
    "the session row is behind its events": (
        {KEYS["session"]: at_rest(last_event=0), event_key(CONTEXT, 1): event(1, "cancelled", WAITING)},
        {"session-repaired"},
        {KEYS["session"], event_key(CONTEXT, 1)},
    ),
    "the session row is lost": (
        {ledger_key(CONTEXT, "done"): trade_of(event(7, "closed", DONE))},
        {"session-made"},
        {KEYS["session"], ledger_key(CONTEXT, "done")},
    ),
    "K3: a waiting row lies as an open one": (
        {KEYS["signal"]: msgspec.structs.replace(SIGNAL, is_scheduled=True), KEYS["session"]: at_rest()},
        {"scheduled-not-open"},
        {KEYS["schedule"], KEYS["session"]},
    ),
    "another signal waits beside the open one": (
        {KEYS["signal"]: SIGNAL, SLOT: slot_of(SIGNAL), KEYS["session"]: holding(), KEYS["schedule"]: WAITING},
        {"schedule-removed"},
        {KEYS["signal"], SLOT, KEYS["session"]},
    ),
}  # fmt: skip


def bot(signals: Any = None) -> Bot:
    return Bot(FakeMarket({"BTCUSDT": flat(43000, -60, 0)}), signals, risk=[lambda payload: True])


async def filled(rows: Rows) -> World:
    world = World()
    store = await world.boot()
    ledger = {key: row for key, row in rows.items() if key.domain == "ledger"}
    for part in (ledger, {key: row for key, row in rows.items() if key not in ledger}):
        await put(store, part)
    return world


async def recovered(store: Store) -> RecoveryReport:
    session = await session_of(bot(), store, recover=False)
    report = await session.recover()
    await session.close()
    return report


async def stored(store: Store) -> dict[Key, Row]:
    rows = (await store.salvage(*await store.keys()))[0]
    return {key: loaded.row for key, loaded in rows.items() if key.domain != "owner"}


@pytest.mark.parametrize("name", LEFTOVERS)
async def test_what_was_left_half_done_is_mended_and_reported_and_then_there_is_nothing_to_do(name: str) -> None:
    rows, mended, left = LEFTOVERS[name]
    world = await filled(rows)
    store = await world.boot()
    report = await recovered(store)
    assert {repair.what for repair in report.repairs} == mended
    after = await stored(store)
    assert set(after) == left
    await sound(store)
    again = await recovered(store)
    assert again.repairs == () and again.epoch == report.epoch + 1
    assert await stored(store) == after
    await store.close()


@pytest.mark.parametrize("name", LEFTOVERS)
async def test_recovery_may_die_at_each_storage_call_and_ends_the_same(name: str) -> None:
    rows, _, _ = LEFTOVERS[name]
    counter = Killer()
    store = await (world := await filled(rows)).boot(counter)
    await recovered(store)
    expected = await stored(store)
    await store.close()
    steps = counter.steps
    assert steps >= 4
    for at in range(steps):
        world = await filled(rows)
        try:
            dying = await world.boot(Killer(at))
            await recovered(dying)
        except Death:
            pass
        store = await world.boot()
        await recovered(store)
        assert await stored(store) == expected, f"died at {at}"
        await store.close()


async def test_the_last_levels_and_the_event_numbers_are_gone_on_from() -> None:
    world = await filled(LEFTOVERS["levels of another id beside the open one's"][0])
    store = await world.boot()
    session = await session_of(bot(), store)
    assert session.state.levels == Levels(profit_levels=(10, 20))
    told = await stepped(session, *flat(43900, 0, 2))
    assert [(one.number, one.level) for one in told] == [(2, 30), (3, 40), (4, 50)]
    await session.close()
    await sound(store)
    await store.close()


async def test_closed_ids_are_found_again_in_the_ledger_when_the_session_row_is_lost() -> None:
    world = await filled(LEFTOVERS["the session row is lost"][0])
    store = await world.boot()
    session = await session_of(bot(), store)
    assert (session.state.closed_ids, session.state.last_event) == (("done",), 7)
    await session.close()
    await store.close()


async def test_a_damaged_signal_keeps_its_slot_and_levels_and_nothing_opens() -> None:
    rows = {
        SLOT: slot_of(SIGNAL),
        KEYS["session"]: holding(),
        KEYS["partial"]: PartialLevels(levels={SIGNAL.id: Levels()}),
    }
    world = await filled(rows)
    store = await world.boot()
    await store.home.backend.commit(store.scope, {KEYS["signal"]: b'{"torn'}, {}, op=Op("vandal", 1))
    report = await recovered(store)
    assert report.repairs == () and len(report.stopped) == 1
    assert SLOT in await stored(store)
    await sound(store)
    session = await session_of(bot(lambda symbol, when_ms: proposal()), store)
    assert await stepped(session, candle(0, 43000)) == []
    await session.close()
    (kept,) = (await store.quarantined("signal", KEYS["signal"].entity_name)).values()
    assert kept.row.text == '{"torn'
    await store.close()


@pytest.mark.parametrize("domain", ["schedule", "partial", "session", "outbox"])
async def test_any_damaged_row_stops_entries_and_leaves_the_open_position_watched(domain: str) -> None:
    world = await filled({KEYS["signal"]: SIGNAL, SLOT: slot_of(SIGNAL), KEYS["session"]: holding()})
    store = await world.boot()
    key = event_key(CONTEXT, 1) if domain == "outbox" else KEYS[domain]
    await store.home.backend.commit(store.scope, {key: b"\0\0\0\0"}, {}, op=Op("vandal", 1))
    session = await session_of(bot(lambda symbol, when_ms: proposal()), store, recover=False)
    report = await session.recover()
    assert len(report.stopped) == 1 and session.state.signal == SIGNAL
    told = await stepped(session, candle(0, 43000, high=44000), candle(1, 43000))
    assert [one.kind for one in told] == ["closed"]
    await session.close()
    await store.close()


async def test_a_damaged_owner_row_is_replaced() -> None:
    world = World()
    store = await world.boot()
    await store.home.backend.commit(store.scope, {KEYS["owner"]: b"?"}, {}, op=Op("vandal", 1))
    assert (await recovered(store)).epoch == 1
    loaded = await store.get(KEYS["owner"])
    assert loaded is not None and isinstance(loaded.row, Owner)
    await store.close()


async def test_a_row_of_a_newer_version_is_left_alone_and_refused() -> None:
    world = await filled({KEYS["session"]: at_rest()})
    store = await world.boot()
    from zlib import crc32

    text = b'{"context":["binance","BTCUSDT","my-strategy"],"lastCandleMs":1,"_schema":99'
    key = KEYS["session"]
    checksum = crc32(text, crc32(f"{key.domain}/{key.entity_name}/{key.entity_id}\n".encode()))
    payload = text + b',"_sum":"%08x"}' % checksum
    await store.home.backend.commit(store.scope, {key: payload}, {}, op=Op("newer", 1))
    with pytest.raises(CorruptedError, match="newer"):
        await recovered(store)
    assert (await store.home.backend.read(store.scope, [key]))[key].payload == payload
    await store.close()


async def test_an_impossible_signal_goes_to_quarantine() -> None:
    upside_down = msgspec.structs.replace(SIGNAL, price_take_profit=41000.0)
    world = await filled({KEYS["signal"]: upside_down})
    store = await world.boot()
    report = await recovered(store)
    assert "price_take_profit > price_open" in report.stopped[0]
    await store.close()


async def test_a_profile_that_changes_meanwhile_is_read_again() -> None:
    world = await filled({KEYS["signal"]: SIGNAL, KEYS["session"]: holding()})
    store = await world.boot()
    backend: Any = store.home.backend
    commit = backend.commit
    meddled: list[int] = []

    async def meddle(scope: str, changes: Any, expect: Any, *, op: Op) -> int:
        if SLOT in changes and not meddled:
            meddled.append(1)
            await commit(scope, {guard_key("limit"): await guard_payload()}, {}, op=Op("other", 1))
        return int(await commit(scope, changes, expect, op=op))

    async def guard_payload() -> bytes:
        from holdfast.domains import encode
        from holdfast.rows import Guard

        return encode(guard_key("limit"), Guard(changes=41))

    backend.commit = meddle
    await recovered(store)
    loaded = await store.get(guard_key("limit"))
    assert loaded is not None and to_mapping(loaded.row)["changes"] == 42
    await sound(store)
    await store.close()


async def test_two_that_own_the_same_context_end_with_one_owner() -> None:
    world = World()
    store = await world.boot()
    first, second = (
        await session_of(bot(), store, holder="a"),
        await session_of(bot({1: proposal()}), store, holder="b"),
    )
    with pytest.raises(FencedError):
        first.gate.outages.forbid(1, 2)
        await first.flush()
    assert len(await stepped(second, candle(0, 43000))) == 1
    await first.close()
    await second.close()
    await store.close()


async def test_a_store_that_is_away_leaves_recovery_to_be_called_again() -> None:
    world = await filled({KEYS["signal"]: SIGNAL})
    store = await world.boot()
    backend: Any = store.home.backend
    commit = backend.commit

    async def away(*arguments: Any, **named: Any) -> int:
        raise UnavailableError("the disk is full")

    backend.commit = away
    session = await session_of(bot(), store, recover=False)
    with pytest.raises(UnavailableError):
        await session.recover()
    backend.commit = commit
    assert (await session.recover()).signal_id == SIGNAL.id
    await session.close()
    assert await check_store(store) == []
    await store.close()


def test_the_mortal_backend_dies_for_good() -> None:
    killer = Killer(0)
    assert isinstance(MortalBackend(MemoryBackend(), killer).backend, MemoryBackend)
    for _ in range(2):
        with pytest.raises(Death):
            killer.pass_by()


@pytest.mark.parametrize("at", range(2))
async def test_a_check_asks_a_class_that_cannot_list_what_it_holds(at: int) -> None:
    """Right after opening, a four-method class has met no entity yet."""
    world = World(classes=True)
    store = await world.boot()
    session = await session_of(bot({1: proposal()}), store)
    await stepped(session, candle(0, 43000))
    await session.close()
    await store.close()
    if at:
        world.shelf = {place: value for place, value in world.shelf.items() if "risk" not in place[0]}
    store = await world.boot()
    assert [found.rule for found in await check_store(store)] == ["signal-without-slot"] * at
    await store.close()


async def test_no_event_number_is_used_twice_when_the_session_row_is_lost() -> None:
    store = await World().boot()
    bot = Bot(FakeMarket({"BTCUSDT": flat(43000, -10, 0)}), {1: proposal()})
    session = await session_of(bot, store)
    (opened,) = await stepped(session, candle(0, 43000))
    await session.close()
    await store.quarantine(KEYS["session"], "rotten")
    again = await session_of(bot, store)
    (closed,) = await stepped(again, candle(1, 43000, high=44000))
    assert closed.kind == "closed" and closed.number > opened.number + 22
    await again.close()
    await store.close()
