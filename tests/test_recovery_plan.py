"""The recovery plan: one verdict for whatever was restored, from the missed candles; what is then done is just that."""

from __future__ import annotations

import gzip
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes import Bot, FakeMarket, candle, flat, minute_ms, put, signal_row, sound
from gap_kit import ALL, CONTEXT, Gap, bot_of, filled, planned, recovered, rows_of, run_of, stored
from mortal import Death, Killer, MortalBackend, World

from holdfast.contract import Op, Survives
from holdfast.domains import context_key
from holdfast.engine.plan import RecoveryPolicy, foreseen
from holdfast.engine.registry import Registry
from holdfast.errors import InvalidInputError, UnavailableError, UndecidedError
from holdfast.market.synthetic import SyntheticMarket
from holdfast.rows import Decision, Event, GapPlan, Levels, Signal
from holdfast.rules.candles import MINUTE_MS, Candle
from holdfast.rules.params import reset_config, set_config
from holdfast.store import Store

NAMES = [gap.name for gap in ALL]
REAL = Path(os.environ.get("HOLDFAST_CANDLES") or Path(__file__).resolve().parents[2] / "shared" / "data")


@pytest.fixture(autouse=True)
def _params(request: pytest.FixtureRequest) -> Iterator[None]:
    gap = request.node.callspec.params.get("gap") if hasattr(request.node, "callspec") else None
    if isinstance(gap, Gap) and gap.params:
        set_config(gap.params)
    yield
    reset_config()


def by_name(name: str) -> Gap:
    return next(gap for gap in ALL if gap.name == name)


@pytest.mark.parametrize("gap", ALL, ids=NAMES)
async def test_the_plan_says_what_recovery_then_does(gap: Gap, record_property: Any) -> None:
    world = await filled(gap)
    before = await stored(world)
    plan = await planned(gap, world)
    assert await stored(world) == before, "a plan changed something"
    outlook = plan.outlook
    assert outlook is not None
    assert outlook.verdict == gap.verdict
    assert outlook.at_ms == (None if gap.at is None else minute_ms(gap.at + 1))
    assert outlook.levels == Levels(profit_levels=gap.levels[0], loss_levels=gap.levels[1])
    assert (outlook.both_hit, outlook.missing_minutes) == (gap.both, gap.missing)
    assert outlook.entry_passed_ms == (None if gap.entry_passed is None else minute_ms(gap.entry_passed + 1))

    done = await recovered(gap, world)
    assert done.outlook == outlook
    assert done.events == outlook.events
    rows, out = await stored(world)
    state = outlook.state
    assert rows.get(context_key("signal", CONTEXT)) == state.signal
    assert rows.get(context_key("schedule", CONTEXT)) == state.scheduled
    kept = [row for row in rows.values() if isinstance(row, GapPlan)]
    assert [one.events for one in kept] == ([tuple(map(foreseen, outlook.events))] if outlook.events else [])
    await sound(await world.boot())

    assert (await recovered(gap, world)).events == (), "the second time there was something left"
    assert await stored(world) == (rows, out), "recovering twice is not recovering once"
    record_property("proof:recovery plans", {"gaps": 1, "events foreseen": len(outlook.events)})


@pytest.mark.parametrize("gap", ALL, ids=NAMES)
async def test_a_live_run_does_what_the_plan_said(gap: Gap) -> None:
    plan = await planned(gap, world := await filled(gap))
    bot = bot_of(gap)
    told: list[Event] = []
    bot.listeners.listen("signal", lambda news: told.append(news) if isinstance(news, Event) else None)
    async for _ in bot.run(await world.boot()):
        pass
    assert plan.outlook is not None
    assert tuple(told) == plan.outlook.events
    rows, _ = await stored(world)
    kept = [row for row in rows.values() if isinstance(row, GapPlan)]
    assert sum((one.events for one in kept), ()) == tuple(map(foreseen, plan.outlook.events))


KILLED = [gap for gap in ALL if len(gap.missed) < 100]


@pytest.mark.parametrize("gap", KILLED, ids=[gap.name for gap in KILLED])
@pytest.mark.parametrize("wanted", [None, "close"])
async def test_killed_at_each_step_it_ends_as_if_never_killed(gap: Gap, wanted: Any, record_property: Any) -> None:
    world = await filled(gap)
    whole = await recovered(gap, world, counter := Killer(), wanted=wanted)
    expected = await stored(world)
    for at in range(counter.steps):
        world = await filled(gap)
        with pytest.raises(Death):
            await recovered(gap, world, Killer(at), wanted=wanted)
        # Whoever comes next decides nothing: what the operator wanted is on record, or was not begun.
        rows, _ = await stored(world)
        begun = any(isinstance(row, Decision) for row in rows.values())
        await recovered(gap, world, wanted=None if begun else wanted)
        assert await stored(world) == expected, f"killed at {at}"
    assert whole.outlook is not None
    record_property("proof:recovery plans", {"kills": counter.steps})


def test_there_are_at_least_forty_gaps_and_every_verdict_is_among_them() -> None:
    assert len(set(NAMES)) == len(ALL) >= 40
    assert {gap.verdict for gap in ALL} == {
        "still_valid", "hit_stop", "hit_target", "partial", "expired", "still_waiting", "timed_out", "cancelled",
        "no_candles",
    }  # fmt: skip


# ---------------------------------------------------------------------- what may be entered


async def test_a_live_run_may_enter_on_the_newest_candle_and_its_plan_says_so() -> None:
    gap = by_name("it waits on")._replace(missed=[*flat(43000, 0, 8), candle(9, 43000, low=42400)])
    bot = bot_of(gap)
    world = await filled(gap)
    events = [event async for event in bot.run(await world.boot())]
    assert [(event.kind, event.candle_ms) for event in events] == [("opened", minute_ms(9))]
    rows, _ = await stored(world)
    (plan,) = [row for row in rows.values() if isinstance(row, GapPlan)]
    assert (plan.verdict, plan.events) == ("activated", tuple(map(foreseen, events)))


async def test_an_entry_that_its_risk_profile_refuses_is_foreseen_as_refused() -> None:
    gap = by_name("it waits on")._replace(missed=[*flat(43000, 0, 8), candle(9, 43000, low=42400)])
    market = bot_of(gap).market
    bot = Bot(market, risk=[lambda payload: False])
    world = await filled(gap)
    events = [event async for event in bot.run(await world.boot())]
    assert [(event.kind, event.reason) for event in events] == [("cancelled", "risk")]
    rows, _ = await stored(world)
    (plan,) = [row for row in rows.values() if isinstance(row, GapPlan)]
    assert (plan.verdict, plan.events) == ("rejected", tuple(map(foreseen, events)))


async def test_recover_enters_nothing_where_a_run_would() -> None:
    gap = by_name("it waits on")._replace(missed=[*flat(43000, 0, 8), candle(9, 43000, low=42400)])
    done = await recovered(gap, await filled(gap))
    assert done.outlook is not None
    assert (done.outlook.verdict, done.events) == ("still_waiting", ())
    assert done.outlook.entry_passed_ms == minute_ms(10)


async def test_with_nothing_open_there_is_no_plan_and_nothing_is_fetched() -> None:
    world, bot = World(), Bot(FakeMarket({"BTCUSDT": flat(43000, -5, 5)}))
    report = await run_of(bot, await world.boot()).recover(CONTEXT)
    assert (report.outlook, report.decided, report.events) == (None, None, ())
    assert bot.market.fetches == []


# ---------------------------------------------------------------------- who decides


def asking(gap: Gap, policy: RecoveryPolicy) -> Bot:
    """The bot of the gap, its strategy with another recovery policy."""
    bot = bot_of(gap)
    spec = bot.registry.strategy(bot.strategy)
    registry = Registry()
    registry.add_exchange(bot.market, exchange_name=bot.exchange)
    registry.add_risk(risk_name="limit", validations=[lambda payload: True])
    registry.add_strategy(
        spec.get_signal, strategy_name=spec.strategy_name, interval="1m", risk_name="limit",
        recovery=policy,
    )  # fmt: skip
    bot.registry = registry
    return bot


async def test_a_strategy_that_asks_decides_nothing_until_the_operator_did() -> None:
    gap = by_name("the stop by a wick")
    world = await filled(gap)
    before, _ = await stored(world)
    for _ in range(2):
        with pytest.raises(UndecidedError, match="--decide step") as caught:
            async for _event in asking(gap, "ask").run(await world.boot()):
                pass
        assert "hit_stop" in str(caught.value)
    rows, _ = await stored(world)
    added = {key for key in rows if key not in before}
    assert {key.domain for key in added} == {"plan"}, "only the plan is on record"
    assert {key: rows[key] for key in before} == before

    store = await world.boot()
    report = await run_of(asking(gap, "ask"), store).recover(CONTEXT)
    assert report.undecided and report.events == ()
    report = await run_of(asking(gap, "ask"), store, wanted="step").recover(CONTEXT)
    assert [event.reason for event in report.events] == ["stop_loss"]
    await sound(store)
    rows, _ = await stored(world)
    (decision,) = [row for row in rows.values() if isinstance(row, Decision)]
    assert (decision.what, decision.by, decision.signal_id) == ("step", "me@here", "stored-1")
    events = [event async for event in asking(gap, "ask").run(await world.boot())]
    assert [event.reason for event in events] == ["stop_loss"], "told by the run that has the listeners"


async def test_a_strategy_that_asks_goes_on_by_itself_where_nothing_is_to_be_decided() -> None:
    for name in ("a quiet night", "it waits on", "no candle at all", "levels that were told before"):
        gap = by_name(name)
        world = await filled(gap)
        assert [event async for event in asking(gap, "ask").run(await world.boot())] == []


async def test_candles_that_come_while_a_run_is_live_are_not_asked_about() -> None:
    gap = by_name("a quiet night")
    bot, world = asking(gap, "ask"), await filled(gap)
    bot.market.candles["BTCUSDT"] += [candle(10, 43000), candle(11, 43000, low=41000)]
    events = [event async for event in bot.run(await world.boot())]
    assert [event.candle_ms for event in events] == [minute_ms(11)]


async def test_what_an_operator_decided_does_not_cover_what_came_later() -> None:
    gap = by_name("levels on the way to the target")
    world = await filled(gap)
    # Decided, and killed before anything of it was done.
    for at in range(100):
        with pytest.raises(Death):
            await run_of(asking(gap, "ask"), await world.boot(Killer(at)), wanted="step").recover(CONTEXT)
        if any(isinstance(row, Decision) for row in (await stored(world))[0].values()):
            break
    later = gap._replace(missed=[*gap.missed, candle(6, 43150, low=41000)])
    with pytest.raises(UndecidedError, match="hit_stop"):
        async for _ in asking(later, "ask").run(await world.boot()):
            pass
    events: list[Any] = []
    bot = asking(gap, "ask")
    bot.listeners.listen("signal", events.append)
    async for _ in bot.run(await world.boot()):
        pass
    assert [event.level for event in events if isinstance(event, Event)] == [10], "what was decided, is done"


@pytest.mark.parametrize(
    ("name", "kind", "price"),
    [("a quiet night", "closed", 43000.0), ("the stop by a wick", "closed", 42000.0),
     ("it waits on", "cancelled", None), ("levels on the way to the target", "closed", 43150.0)],
)  # fmt: skip
@pytest.mark.parametrize("live", [True, False], ids=["live", "recover"])
async def test_close_at_market_leaves_nothing_open(name: str, kind: str, price: float | None, live: bool) -> None:
    gap = by_name(name)
    world = await filled(gap)
    bot, store = asking(gap, "close_at_market"), await world.boot()
    if live:
        events = [event async for event in bot.run(store)]
    else:
        report = await run_of(bot, store).recover(CONTEXT)
        events = [event for event in report.events if event.kind in ("closed", "cancelled")]
        assert report.outlook is not None and report.outlook.events == report.events
    assert [(event.kind, event.price_close) for event in events] == [(kind, price)]
    await sound(store)
    rows, _ = await stored(world)
    assert context_key("signal", CONTEXT) not in rows and context_key("schedule", CONTEXT) not in rows
    assert [row.by for row in rows.values() if isinstance(row, Decision)] == ["policy"]


async def test_a_closing_that_the_store_refused_once_is_made_at_the_next_candle() -> None:
    class Refusing(MortalBackend):
        refusals = 1

        async def commit(self, scope: str, changes: Any, expect: Any, *, op: Op) -> int:
            if self.refusals and any(key.domain == "outbox" for key in changes):
                self.refusals -= 1
                raise UnavailableError("the disk is full")
            return await super().commit(scope, changes, expect, op=op)

    gap = by_name("a quiet night")
    bot, world = asking(gap, "close_at_market"), await filled(gap)
    bot.market.candles["BTCUSDT"] += [candle(10, 43000), candle(11, 43000)]
    store = Store(Refusing(world.memory, Killer()), require=Survives.NOTHING)
    await store.open()
    events = [event async for event in bot.run(store)]
    assert [(event.kind, event.reason, event.candle_ms) for event in events] == [("closed", "policy", minute_ms(10))]
    await sound(store)


async def test_close_at_market_enters_nothing_first() -> None:
    gap = by_name("it waits on")._replace(missed=[*flat(43000, 0, 8), candle(9, 43000, low=42400)])
    events = [event async for event in asking(gap, "close_at_market").run(await (await filled(gap)).boot())]
    assert [(event.kind, event.reason) for event in events] == [("cancelled", "stopped")]


async def test_an_unknown_policy_is_refused_where_the_strategy_is_added() -> None:
    with pytest.raises(InvalidInputError, match="use step, ask, close_at_market"):
        Registry().add_strategy(lambda s, w: None, strategy_name="s", interval="1m", recovery="guess")  # type: ignore[call-overload]


async def test_who_is_asked_about_a_candle_with_both_is_asked_once_and_the_answer_stays() -> None:
    asked: list[int] = []

    def answer(signal: Signal, one: Candle) -> str:
        asked.append(one.open_time_ms)
        return "take_profit" if len(asked) == 1 else "stop_loss"

    gap = by_name("both: asked, the target")._replace(on_both_hit=answer)
    set_config(gap.params)
    world = await filled(gap)
    for at in range(100):  # killed once the plan is on record, before it is done
        with pytest.raises(Death):
            await recovered(gap, world, Killer(at))
        if any(isinstance(row, GapPlan) for row in (await stored(world))[0].values()):
            break
        asked.clear()
    assert len(asked) == 1
    done = await recovered(gap, world)
    assert [event.reason for event in done.events] == ["take_profit"]
    assert len(asked) == 1


async def test_a_row_in_quarantine_is_named_and_what_else_there_is_is_planned() -> None:
    gap = by_name("the stop by a wick")
    world = await filled(gap)
    foreign = msgspec.structs.replace(gap.row, exchange_name="elsewhere")
    store = await world.boot()
    await put(store, {context_key("signal", CONTEXT): foreign})
    await store.close()
    plan = await planned(gap, world)
    assert plan.outlook is None
    assert "belongs to elsewhere" in plan.stopped[0]


# ---------------------------------------------------------------------- real candles, and such as look like them

DRAWN = "drawn, with gaps"
"""The real ones may not be kept in the repository, so a clone alone has these; they come up in every run."""
FILES = {
    "BTCUSDT-1m-2022-01.csv.gz": (0.4, 0.3), "ALTBTC-1m-2017-11-with-gaps.csv.gz": (2.5, 2.0),
    "XRPETH-1m-2019-10-with-gaps.csv.gz": (0.8, 0.6), DRAWN: (0.5, 0.4),
}  # fmt: skip


def real_candles(name: str, count: int) -> list[Candle]:
    if name == DRAWN:
        market, chance = SyntheticMarket(11, ("BTCUSDT",), minutes=2 * count), random.Random(11)
        drawn = market.candles("BTCUSDT", "1m", market.first_ms, 2 * count, closed_ms=market.last_ms)
        holes = {at + n for at in range(len(drawn)) if chance.random() < 0.02 for n in range(chance.randrange(1, 30))}
        return [one for at, one in enumerate(drawn) if at not in holes][:count]
    if not (REAL / name).exists():
        pytest.skip(f"the real candles are not there: {REAL} (HOLDFAST_CANDLES names another folder)")
    with gzip.open(REAL / name, "rt") as file:
        rows = [line.split(",") for line in file if line[:1].isdigit()]
    return [Candle(int(row[0]), *map(float, row[1:6])) for row in rows[:count]]


def first_exit(row: Signal, candles: list[Candle]) -> tuple[str, int | None]:
    """What a person would read off the chart: the first candle that ends the position, and how."""
    up = row.position == "long"
    for one in candles:
        if one.open_time_ms + MINUTE_MS - row.pending_at >= row.minute_estimated_time * MINUTE_MS:
            return "expired", one.open_time_ms + MINUTE_MS
        if one.high >= row.price_take_profit if up else one.low <= row.price_take_profit:
            return "hit_target", one.open_time_ms + MINUTE_MS
        if one.low <= row.price_stop_loss if up else one.high >= row.price_stop_loss:
            return "hit_stop", one.open_time_ms + MINUTE_MS
    return "still open", None


@pytest.mark.parametrize(
    "file", [pytest.param(name, marks=() if name == DRAWN else pytest.mark.candles) for name in FILES]
)
async def test_over_real_candles_the_plan_is_what_the_chart_shows_and_what_is_then_done(
    file: str, record_property: Any
) -> None:
    candles = real_candles(file, 3000)
    seen: Counter[str] = Counter()
    for at in range(50, len(candles) - 400, 110):
        position = "long" if at % 20 else "short"
        missed, price = candles[at + 1 : at + 1 + (40, 150, 400)[at % 3]], candles[at].close
        side = 1 if position == "long" else -1
        target, stop = (side * percent / 100 for percent in FILES[file])
        begun_ms = candles[at].open_time_ms + MINUTE_MS
        row = msgspec.structs.replace(
            signal_row(position=position, minutes=(60, 300, 1000)[at % 3 - 1]), price_open=price,
            price_take_profit=price * (1 + target), price_stop_loss=price * (1 - stop), scheduled_at=begun_ms,
            pending_at=begun_ms,
        )  # fmt: skip
        market = FakeMarket({"BTCUSDT": candles[: at + 1 + len(missed)]})
        market.present_ms = missed[-1].open_time_ms
        world = World()
        bot, store = Bot(market, risk=[lambda payload: True]), await world.boot()
        rows = rows_of(Gap("real", missed, "", row=row))
        session = rows[context_key("session", CONTEXT)]
        rows[context_key("session", CONTEXT)] = msgspec.structs.replace(
            session, last_candle_ms=candles[at].open_time_ms
        )
        await put(store, rows)
        plan = await run_of(bot, store).plan(CONTEXT)
        done = await run_of(bot, store).recover(CONTEXT)
        assert plan.outlook is not None
        assert done.events == plan.outlook.events
        verdict, at_ms = first_exit(row, missed)
        found = plan.outlook.verdict if plan.outlook.at_ms is not None else "still open"
        assert (found, plan.outlook.at_ms) == (verdict, at_ms), f"{file} at {at}"
        assert plan.outlook.missing_minutes == (missed[-1][0] - candles[at][0]) // MINUTE_MS - len(missed)
        before = await stored(world)
        await run_of(bot, await world.boot()).recover(CONTEXT)
        assert await stored(world) == before
        seen[found] += 1
    assert {"hit_target", "hit_stop"} <= set(seen), seen
    record_property("proof:recovery plans", {f"gaps in {'drawn' if file == DRAWN else 'real'} candles": seen.total()})
