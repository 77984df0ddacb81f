"""What a context has on record beside its state does not grow without bound, and what is still needed stays."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from fakes import Bot, FakeMarket, flat, minute_ms, no_sleep, put, signal_row, sound
from gap_kit import CONTEXT, GAPS, Gap, bot_of, filled, recovered, rows_of, run_of, stored
from mortal import Death, Killer, World

from holdfast.contract import Key, Op
from holdfast.domains import context_key, plan_key
from holdfast.engine.commits import Outages, Recorded, outage_key
from holdfast.engine.hands import Hands
from holdfast.engine.retention import DAY_MS, Retention
from holdfast.errors import InvalidInputError
from holdfast.rows import Audit, Decision, GapPlan, Outage, Quarantined, Row
from holdfast.rules.candles import MINUTE_MS
from holdfast.rules.params import reset_config, set_config
from holdfast.store import Store

NAME = context_key("outage", CONTEXT).entity_name
WICK = next(gap for gap in GAPS if gap.name == "the stop by a wick")


@pytest.fixture(autouse=True)
def _params() -> Iterator[None]:
    yield
    reset_config()


def test_the_newest_stays_and_of_the_older_ones_so_many_and_none_too_old() -> None:
    ends = {name: at * DAY_MS for at, name in enumerate("abcdef")}
    assert Retention(days=90, rows=10).surplus(ends, 5 * DAY_MS) == []
    assert Retention(days=90, rows=4).surplus(ends, 5 * DAY_MS) == ["a", "b"]
    assert Retention(days=2, rows=10).surplus(ends, 5 * DAY_MS) == ["a", "b", "c"]
    assert Retention(days=2, rows=10).surplus(ends, 500 * DAY_MS) == ["a", "b", "c", "d", "e"]
    assert Retention(days=1, rows=1).surplus({}, 0) == []


@pytest.mark.parametrize("wrong", [{"record_retention_days": 0}, {"record_limit_rows": 0}, {"record_limit_rows": 1.5}])
def test_a_retention_of_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        set_config(wrong)


# ---------------------------------------------------------------------- outages


def taken(outages: Outages) -> dict[int, int | None]:
    """What the next commit would write, in minutes."""
    return {
        minutes(int(key.entity_id)): minutes(row.to_ms) if isinstance(row, Outage) else None
        for key, row in outages.take().items()
    }


def minutes(at_ms: int) -> int:
    return (at_ms - minute_ms(0)) // MINUTE_MS


def on_record(*ranges: tuple[int, int]) -> Recorded:
    rows = [Outage(from_ms=minute_ms(start), to_ms=minute_ms(end)) for start, end in ranges]
    return Recorded(tuple(row.from_ms for row in rows), rows[-1] if rows else None)


def test_a_range_that_touches_the_newest_on_record_goes_on_with_it() -> None:
    outages = Outages(CONTEXT, on_record((1, 2), (5, 8)))
    outages.forbid(minute_ms(9))
    assert taken(outages) == {5: 9}
    outages.allow()
    outages.forbid(minute_ms(11))
    assert taken(outages) == {11: 11}, "on minute 10 something could begin"
    outages.forbid(minute_ms(12), minute_ms(20))
    outages.allow()
    outages.forbid(minute_ms(21))
    assert taken(outages) == {11: 21}


def test_a_range_never_shrinks_while_it_is_stepped_again() -> None:
    outages = Outages(CONTEXT, on_record((5, 8)))
    outages.forbid(minute_ms(5))
    assert taken(outages) == {5: 8}


def test_the_time_before_the_first_start_stays_a_row_of_its_own() -> None:
    row = Outage(from_ms=0, to_ms=minute_ms(4))
    outages = Outages(CONTEXT, Recorded((0,), row))
    outages.forbid(minute_ms(5))
    assert taken(outages) == {5: 5}


def test_a_range_that_covers_others_replaces_them_once_it_does() -> None:
    outages = Outages(CONTEXT, on_record((1, 2), (10, 12), (20, 24)))
    for minute in range(6, 23):
        outages.forbid(minute_ms(minute))
    assert taken(outages) == {6: 22, 10: None}, "what the newest says of 23 and 24 is still needed"
    for minute in (23, 24):
        outages.forbid(minute_ms(minute))
    assert taken(outages) == {6: 24, 20: None}


def test_older_ones_go_with_the_commit_that_records_a_newer_one_and_come_back_when_it_fails() -> None:
    outages = Outages(CONTEXT, on_record((1, 2), (10, 12), (20, 24)), Retention(rows=2))
    assert taken(outages) == {}, "nothing to go along with"
    outages.forbid(minute_ms(30))
    rows = outages.take()
    assert sorted(int(key.entity_id) for key, row in rows.items() if row is None) == [minute_ms(1), minute_ms(10)]
    outages.put_back(rows)
    assert outages.take() == rows
    outages = Outages(CONTEXT, on_record((1, 2), (10, 12), (20, 24)), Retention(days=1))
    outages.forbid(minute_ms(19 + 1440))
    assert taken(outages) == {19 + 1440: 19 + 1440, 1: None}, "the second ends within a day, as far as keys tell"


def test_whatever_happens_the_rows_say_which_candles_were_closed() -> None:
    """Random runs, commits that fail, restarts: the rows, put together, are the candles that were forbidden."""
    for seed in range(300):
        chance = random.Random(seed)
        stored: dict[Key, Outage] = {}
        told: set[int] = set()
        minute, outages = 0, Outages(CONTEXT)
        for _ in range(60):
            match chance.choice(["forbid", "forbid", "range", "allow", "allow", "commit", "fail", "restart"]):
                case "forbid":
                    outages.forbid(minute_ms(minute))
                    told.add(minute)
                    minute += 1
                case "range":
                    last = minute + chance.randrange(4)
                    outages.forbid(minute_ms(minute), minute_ms(last))
                    told |= set(range(minute, last + 1))
                    minute = last + 1
                case "allow":
                    outages.allow()
                    minute += 1
                case "fail":
                    outages.put_back(outages.take())
                case "commit" | "restart" as what:
                    commit(stored, outages)
                    if what == "restart":
                        rows = [stored[key] for key in sorted(stored)]
                        recorded = Recorded(tuple(row.from_ms for row in rows), rows[-1] if rows else None)
                        outages = Outages(CONTEXT, recorded)
        commit(stored, outages)
        found = {(ms - minute_ms(0)) // MINUTE_MS for row in stored.values()
                 for ms in range(row.from_ms, row.to_ms + 1, MINUTE_MS)}  # fmt: skip
        assert found == told, seed
        edges = sorted((row.from_ms, row.to_ms) for row in stored.values())
        assert all(one[1] + MINUTE_MS < two[0] for one, two in itertools.pairwise(edges)), "two that touch"


def commit(stored: dict[Key, Outage], outages: Outages) -> None:
    for key, row in outages.take().items():
        if isinstance(row, Outage):
            stored[key] = row
        else:
            del stored[key]  # nothing is deleted that is not there


async def restarted(world: World, minutes: range, killer: Killer | None = None) -> None:
    """A run in which something is entered and left, so that the next gap is another one."""
    candles = [*flat(43000, -10, minutes[-1] - 2), *flat(45000, minutes[-1] - 1, minutes[-1])]
    proposal = {"position": "long", "priceTakeProfit": 44000, "priceStopLoss": 42000, "minuteEstimatedTime": 60}
    bot = Bot(FakeMarket({"BTCUSDT": candles}, start=minutes[0]), {minutes[0] + 1: proposal})
    async for _ in bot.run(await world.boot(killer)):
        pass


async def outages_in(world: World) -> list[int]:
    store = await world.boot()
    keys = [key for key in await store.keys() if key.domain == "outage"]
    await store.close()
    return [(int(key.entity_id) - minute_ms(0)) // MINUTE_MS for key in keys if int(key.entity_id)]


async def test_a_bot_that_is_restarted_for_years_keeps_so_many_outages(record_property: Any) -> None:
    set_config(record_limit_rows=4)
    world = World()
    for start in range(0, 200, 20):
        await restarted(world, range(start, start + 10))
        assert len(await outages_in(world)) <= 4
    found = await outages_in(world)
    assert len(found) == 4 and found[0] > 100, "the newest ones"
    await sound(await world.boot())
    counter = Killer()
    await restarted(world, range(200, 210), counter)
    whole = await outages_in(world)
    for at in range(0, counter.steps, 3):
        world = World()
        for start in range(0, 100, 20):
            await restarted(world, range(start, start + 10))
        before = await outages_in(world)
        with pytest.raises(Death):
            await restarted(world, range(100, 110), Killer(at))
        now = await outages_in(world)
        assert len(now) <= 4 and now[-1] >= before[-1], "pruned without what it went along with"
        assert now == before or len(set(now) - set(before)) == 1
    assert len(whole) == 4
    record_property("proof:retention", {"kills": len(range(0, counter.steps, 3))})


# ---------------------------------------------------------------------- plans and decisions


def old_records(count: int, *, signal_id: str = "long-gone", days: int = 1) -> dict[Key, Row]:
    """Plans and decisions of earlier gaps, each ``days`` before the next."""
    rows: dict[Key, Row] = {}
    for number in range(1, count + 1):
        until_ms = minute_ms(0) - (count + 1 - number) * days * DAY_MS
        rows[plan_key("plan", CONTEXT, number)] = GapPlan(
            context=(CONTEXT.exchange_name, CONTEXT.symbol, CONTEXT.strategy_name), signal_id=signal_id,
            verdict="partial", from_ms=0, until_ms=until_ms, candles=1, made_by="engine", made_at_ms=until_ms,
        )  # fmt: skip
        rows[plan_key("decision", CONTEXT, number)] = Decision(
            signal_id=signal_id, what="step", by="policy", until_ms=until_ms, at_ms=until_ms
        )
    return rows


async def with_records(gap: Gap, records: dict[Key, Row]) -> World:
    world = await filled(gap)
    store = await world.boot()
    session = rows_of(gap)[context_key("session", CONTEXT)]
    later: Any = msgspec.structs.replace(session, last_event=20)
    await put(store, {**records, context_key("session", CONTEXT): later})
    await store.close()
    return world


def numbers(rows: dict[Key, Row], domain: str) -> list[int]:
    return sorted(int(key.entity_id) for key in rows if key.domain == domain)


async def test_older_plans_go_with_their_decisions_when_a_new_one_is_made(record_property: Any) -> None:
    set_config(record_limit_rows=3)
    records = old_records(6)
    world = await with_records(WICK, records)
    await recovered(WICK, world, counter := Killer())
    expected = await stored(world)
    assert numbers(expected[0], "plan") == numbers(expected[0], "decision") == [5, 6, 21]
    await recovered(WICK, world)
    assert await stored(world) == expected
    for at in range(counter.steps):
        world = await with_records(WICK, records)
        with pytest.raises(Death):
            await recovered(WICK, world, Killer(at))
        rows = (await stored(world))[0]
        assert numbers(rows, "plan") in ([1, 2, 3, 4, 5, 6], [5, 6, 21]), f"killed at {at}"
        await recovered(WICK, world)
        assert await stored(world) == expected, f"killed at {at}"
    record_property("proof:retention", {"kills": counter.steps})


async def test_plans_that_are_too_old_go_and_those_about_the_restored_signal_stay() -> None:
    set_config(record_retention_days=90)
    mine = old_records(2, signal_id=WICK.row.id, days=50)
    others = {
        key._replace(entity_id=f"{int(key.entity_id) + 2:012d}"): row for key, row in old_records(3, days=40).items()
    }
    world = await with_records(WICK, {**mine, **others})
    await recovered(WICK, world)
    rows = (await stored(world))[0]
    assert numbers(rows, "plan") == numbers(rows, "decision") == [1, 2, 4, 5, 21]


async def test_a_plan_that_an_operator_decided_about_is_there_for_whoever_goes_on() -> None:
    """Everything else may go: with room for a single row, what the recovery needs is still found after each kill."""
    set_config(record_limit_rows=1)
    world = await with_records(WICK, old_records(4))
    done = await recovered(WICK, world, counter := Killer(), wanted="close")
    expected = await stored(world)
    for at in range(counter.steps):
        world = await with_records(WICK, old_records(4))
        with pytest.raises(Death):
            await recovered(WICK, world, Killer(at), wanted="close")
        begun = any(isinstance(row, Decision) and row.by == "me@here" for row in (await stored(world))[0].values())
        await recovered(WICK, world, wanted=None if begun else "close")
        assert await stored(world) == expected, f"killed at {at}"
    assert done.decided == "close"


async def test_a_plan_alone_prunes_nothing() -> None:
    set_config(record_limit_rows=1)
    world = await with_records(WICK, old_records(4))
    before = await stored(world)
    await run_of(bot_of(WICK), await world.boot()).plan(CONTEXT)
    assert await stored(world) == before


# ---------------------------------------------------------------------- what was done by hand


def hands(store: Store, day: int = 0) -> Hands:
    return Hands(store, operator="me@here", clock=lambda: minute_ms(30) + day * DAY_MS, sleep=no_sleep)


async def audits(store: Store) -> list[tuple[str, int]]:
    rows = [loaded.row for loaded in (await store.scan("audit")).values()]
    told = [((row.at_ms - minute_ms(30)) // DAY_MS, row.action) for row in rows if isinstance(row, Audit)]
    return [(action, day) for day, action in sorted(told)]


async def opened_and_closed(store: Store, day: int, *, close: bool = True) -> None:
    hand, at_ms = hands(store, day), minute_ms(30) + day * DAY_MS
    row = msgspec.structs.replace(signal_row(), id=f"by-hand-{day}", scheduled_at=at_ms, pending_at=at_ms)
    await hand.take_over(CONTEXT, row, at_ms=at_ms)
    if close:
        await hand.close(CONTEXT, 43500, at_ms=at_ms + MINUTE_MS)


async def test_what_was_done_by_hand_stays_so_many_times() -> None:
    set_config(record_limit_rows=4)
    store = await World().boot()
    for day in range(5):
        await opened_and_closed(store, day)
    assert await audits(store) == [("adopt", 3), ("close", 3), ("adopt", 4), ("close", 4)]
    await sound(store)


async def test_what_was_done_by_hand_stays_so_long_and_while_its_signal_is_open() -> None:
    set_config(record_retention_days=30)
    store = await World().boot()
    await opened_and_closed(store, 0)
    await opened_and_closed(store, 20, close=False)
    assert len(await audits(store)) == 3
    await store.quarantine(context_key("signal", CONTEXT), "test")
    await hands(store, 60).adopt(context_key("signal", CONTEXT))
    assert len(await audits(store)) == 4, "a signal was in quarantine: what is open could not be told"
    await hands(store, 100).close(CONTEXT, 43500, at_ms=minute_ms(30) + 100 * DAY_MS)
    assert [day for _, day in await audits(store)] == [20, 60, 100], "what tells of the signal that was open until then"
    await opened_and_closed(store, 200)
    assert [day for _, day in await audits(store)] == [200, 200]
    await sound(store)


async def test_nothing_is_pruned_while_it_cannot_be_told_what_is_open() -> None:
    set_config(record_limit_rows=1)
    store = await World().boot()
    await opened_and_closed(store, 0, close=False)
    await store.quarantine(context_key("signal", CONTEXT), "test")
    await store.quarantine(context_key("session", CONTEXT), "test")
    await hands(store, 1).clear(context_key("session", CONTEXT))
    assert len(await audits(store)) == 2


def test_the_key_of_an_outage_sorts_by_time() -> None:
    assert outage_key(NAME, 5) < outage_key(NAME, 40) < outage_key(NAME, minute_ms(0))


async def test_a_newest_outage_that_cannot_be_read_is_kept_whole_and_the_older_ones_stay() -> None:
    world = World()
    await restarted(world, range(10))
    await restarted(world, range(20, 30))
    before = await outages_in(world)
    store = await world.boot()
    place = store.place(outage_key(NAME, minute_ms(before[-1])))
    await place.backend.commit(place.scope, {outage_key(NAME, minute_ms(before[-1])): b"?"}, {}, op=Op("hand", 1))
    await store.close()
    await restarted(world, range(40, 50))
    store = await world.boot()
    kept = [loaded.row for loaded in (await store.scan("quarantine")).values()]
    assert [row.text for row in kept if isinstance(row, Quarantined)] == ["?"]
    await store.close()
    now = await outages_in(world)
    assert now[:-1] == before[:-1] and now[-1] > before[-1]
