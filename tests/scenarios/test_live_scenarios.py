"""The live scenarios of the reference, one test each, named by number.

Where a scenario speaks of a live VWAP, it is restated for closed candles (docs/architecture.md, "The step"): a
level is reached when a closed candle's high or low reaches it, and what happened while the bot was down is found
at the candle in which it happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import pytest
from fakes import Bot, FakeMarket, candle, flat, minute_ms, put, signal_row, sound, until
from mortal import Death, Killer, World

from holdfast.contract import Key
from holdfast.documents import adapters
from holdfast.domains import context_key, risk_key, to_mapping
from holdfast.engine.listeners import Failure
from holdfast.engine.live import Live
from holdfast.errors import UnavailableError
from holdfast.names import Context, entity_name
from holdfast.rows import Event, RiskPosition, ScheduledSignal, Signal
from holdfast.rules.candles import MINUTE_MS, Candle
from holdfast.store import Store

CONTEXT = Context("binance", "BTCUSDT", "my-strategy")
NAME = entity_name(CONTEXT.symbol, CONTEXT.strategy_name, CONTEXT.exchange_name)


@pytest.fixture(autouse=True)
def no_runs_left() -> Iterator[None]:
    yield
    assert [run for run in Live.list() if run.status == "pending"] == []


@pytest.fixture(params=["home", "classes"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made = World(classes=request.param == "classes")
    yield made
    await made.memory.close()


def stored(world: World, row: Signal, domain: str = "signal", name: str = NAME) -> dict[Key, Any]:
    """Put a row where a previous process would have left it: in the user's class, or in the store."""
    if world.classes:
        world.shelf[(f"./dump/data/{domain}/", name, row.symbol)] = to_mapping(row)
        return {}
    return {Key(domain, name, row.symbol): row}


def market(candles: list[Candle], *, start: int = 0, hold: bool = False) -> FakeMarket:
    return FakeMarket({"BTCUSDT": candles}, start=start, hold=hold)


async def booted(world: World, *rows: tuple[Signal, str]) -> Store:
    store = await world.boot()
    for row, domain in rows:
        found = stored(world, row, domain)
        if found:
            await put(store, found)
    return store


def entry(target: float = 44000, **more: Any) -> dict[str, Any]:
    """Return what a strategy proposes."""
    return {"position": "long", "priceTakeProfit": target, "priceStopLoss": 42000, "minuteEstimatedTime": 60, **more}


async def test_scenario_01_a_stored_long_at_its_target_closes_on_the_first_tick(world: World) -> None:
    """Closed-candle form: the first candle after the start reaches 44000 with its high."""
    store = await booted(world, (signal_row(at_minute=-5), "signal"))
    bot = Bot(market([*flat(43000, -20, -1), candle(0, 43000, high=44000)]))
    await bot.live(store)
    (closed,) = bot.heard("on_close")
    assert (closed.reason, closed.price_close, closed.candle_ms) == ("take_profit", 44000, minute_ms(0))


async def test_scenario_02_a_stored_short_at_its_stop_closes(world: World) -> None:
    """Closed-candle form: the first candle's high reaches 43000."""
    row = signal_row(position="short", opened=42000, target=41000, stop=43000, at_minute=-5)
    store = await booted(world, (row, "signal"))
    bot = Bot(market([*flat(42000, -20, -1), candle(0, 42000, high=43000)]))
    await bot.live(store)
    assert [event.reason for event in bot.heard("on_close")] == ["stop_loss"]


async def test_scenario_03_a_stored_signal_past_its_minute_of_life_closes_as_expired(world: World) -> None:
    store = await booted(world, (signal_row(minutes=1, at_minute=-2), "signal"))
    bot = Bot(market(flat(43000, -20, 0)))
    await bot.live(store)
    (closed,) = bot.heard("on_close")
    assert (closed.reason, closed.price_close) == ("time_expired", 43000)


async def test_scenario_04_a_target_reached_during_an_hour_of_downtime_closes_at_once(world: World) -> None:
    """Closed-candle form: it closes at the candle of the downtime that reached the target, and is told so."""
    row = signal_row(position="short", opened=42000, target=41000, stop=43000, minutes=180, at_minute=-90)
    store = await booted(world, (row, "signal"))
    candles = [*flat(42000, -100, -31), candle(-30, 41500, low=41000), *flat(41000, -29, 0)]
    bot = Bot(market(candles))
    await bot.live(store)
    (closed,) = bot.heard("on_close")
    assert (closed.reason, closed.candle_ms) == ("take_profit", minute_ms(-30))


async def test_scenario_05_a_stored_signal_between_its_levels_is_read_and_stays_open(world: World) -> None:
    store = await booted(world, (signal_row(at_minute=-5), "signal"))
    bot = Bot(market(flat(43100, -20, 3)))
    assert await bot.live(store) == []
    assert bot.heard("on_close") == []
    loaded = await store.get(context_key("signal", CONTEXT))
    assert loaded is not None and loaded.row == signal_row(at_minute=-5)
    if world.classes:
        assert ("read", "./dump/data/signal/", NAME, "BTCUSDT") in world.calls


async def test_scenario_06_a_restored_signal_is_told_to_on_active_with_its_note(world: World) -> None:
    store = await booted(world, (signal_row(at_minute=-5, note="keep me"), "signal"))
    bot = Bot(market(flat(43100, -20, 0)))
    await bot.live(store)
    first = bot.heard("on_active")[0]
    assert (first.signal.position, first.signal.note) == ("long", "keep me")
    assert bot.told[0][0] == "on_active"


async def test_scenario_07_half_of_a_24_hour_life_remains_after_12_hours(world: World) -> None:
    row = signal_row(minutes=1440, at_minute=-720, scheduled_minute=-1440)
    store = await booted(world, (row, "signal"))
    bot = Bot(market(flat(43000, -730, 725), start=0))
    await bot.live(store)
    (closed,) = bot.heard("on_close")
    assert (closed.reason, closed.at_ms) == ("time_expired", minute_ms(720))


async def test_scenario_08_a_stored_scheduled_short_is_told_again_then_dropped_beyond_its_stop(world: World) -> None:
    """Closed-candle form: the first candle stands at 3200, beyond the stop of 3100."""
    row = signal_row(
        position="short", opened=3000, target=2900, stop=3100, scheduled=True, at_minute=-5, note="wait", minutes=60
    )
    store = await booted(world, (row, "schedule"))
    bot = Bot(market([*flat(3200, -20, 0)]))
    await bot.live(store)
    (again,) = bot.heard("on_schedule")
    assert (again.signal.is_scheduled, again.signal.price_open, again.signal.note) == (True, 3000, "wait")
    (cancelled,) = bot.heard("on_cancel")
    assert cancelled.reason == "stop_loss"
    assert bot.heard("on_open") == []


async def foreign_row_is_left_alone(world: World, stranger: Mapping[str, Any]) -> None:
    row = signal_row(at_minute=-5, **stranger)
    store = await world.boot()
    rows = stored(world, row)  # under the key of the context that runs
    if rows:
        await put(store, rows)
    bot = Bot(market(flat(43000, -20, 3)), {1: entry()})
    await bot.live(store)
    assert bot.heard("on_active") == bot.heard("on_open") == bot.heard("on_close") == []
    kept = await store.keys()
    assert any(key.domain == "quarantine" for key in kept)  # DESIGN: quarantined, bytes kept, nothing opens


async def test_scenario_09_a_row_of_another_exchange_is_never_active(world: World) -> None:
    await foreign_row_is_left_alone(world, {"exchange": "bybit"})


async def test_scenario_10_a_row_of_another_strategy_is_never_active(world: World) -> None:
    await foreign_row_is_left_alone(world, {"strategy": "strategy-a"})


async def test_scenario_11_empty_stores_tell_nothing_and_a_new_signal_comes(world: World) -> None:
    store = await booted(world)
    bot = Bot(market(flat(43000, -20, 3)), {2: entry()})
    events = await bot.live(store)
    assert [event.kind for event in events] == ["opened"]
    before_it = [name for name, _ in bot.told[: [name for name, _ in bot.told].index("on_open")]]
    assert "on_active" not in before_it and "on_schedule" not in before_it
    assert bot.errors == []


async def test_scenario_12_what_is_not_there_is_never_read() -> None:
    world = World(classes=True)
    store = await world.boot()
    bot = Bot(market(flat(43000, -20, 2)), risk=[lambda payload: True])
    await bot.live(store)
    assert {call[0] for call in world.calls} == {"has"}
    adapters.use_store(store)
    try:
        assert await adapters.PersistRiskAdapter.read_position_data("limit") == []
    finally:
        adapters.use_store(None)
    await store.close()


async def test_scenario_13_a_limit_never_reached_is_scheduled_and_the_signal_domain_is_not_written(
    world: World,
) -> None:
    store = await booted(world)
    bot = Bot(market(flat(43000, -20, 5)), {1: entry(priceOpen=42500)})
    written: list[Key] = []
    store.observers.append(lambda scope, number, changes: written.extend(changes))
    await bot.live(store)
    assert [event.signal.price_open for event in bot.heard("on_schedule")] == [42500]
    assert [key for key in written if key.domain == "signal"] == []
    assert [key for key in written if key.domain == "schedule"] == [context_key("schedule", CONTEXT)]
    if world.classes:
        assert [call for call in world.calls if call[0] == "write" and "signal" in call[1]] == []


async def test_scenario_33_a_stop_while_idle_ends_the_run_without_a_close(world: World) -> None:
    store = await booted(world)
    standing = market(flat(43000, -20, 2), hold=True)
    bot = Bot(standing)
    run = bot.run(store)
    events: list[Event] = []

    async def consume() -> None:
        events.extend([event async for event in run])

    task = asyncio.ensure_future(consume())
    await until(standing.waiting.is_set)
    Live.stop("BTCUSDT", "my-strategy", "binance")
    await asyncio.wait_for(task, 30)
    assert events == bot.heard("on_close") == []
    assert [one.status for one in Live.list()] == ["fulfilled"]


async def test_scenario_34_a_stop_inside_on_close_gives_one_close_and_no_new_signal(world: World) -> None:
    store = await booted(world, (signal_row(at_minute=-5), "signal"))
    closes: list[Event] = []

    def on_close(event: Event) -> None:
        closes.append(event)
        Live.stop("BTCUSDT", "my-strategy")

    bot = Bot(
        market([*flat(43000, -20, -1), candle(0, 43500, high=44000), *flat(43500, 1, 9)]),
        lambda symbol, when_ms: entry(46000),
        callbacks={"on_close": on_close},
    )
    events = await bot.live(store)
    assert [event.kind for event in events] == ["closed"]
    assert len(closes) == 1 and bot.heard("on_open") == []


async def test_scenario_36_three_live_runs_are_listed_as_pending() -> None:
    """The live half; that finished backtests are fulfilled is tested with the backtest."""
    world = World()
    store = await world.boot()
    standing = FakeMarket({symbol: flat(100, -20, 0) for symbol in ("BTCUSDT", "ETHUSDT", "SOLUSDT")}, hold=True)
    bot = Bot(standing)
    runs = [bot.run(store, symbol) for symbol in ("BTCUSDT", "ETHUSDT", "SOLUSDT")]
    assert [(run.symbol, run.status) for run in Live.list()] == [
        ("BTCUSDT", "pending"),
        ("ETHUSDT", "pending"),
        ("SOLUSDT", "pending"),
    ]
    for run in runs:
        await run.aclose()
    assert {run.status for run in Live.list()} == {"fulfilled"}
    await store.close()


@pytest.mark.parametrize("left", ["both", "open without slot", "schedule only"])
async def test_scenario_37_a_crash_between_activation_writes_leaves_exactly_one_position(
    world: World, left: str
) -> None:
    """Whatever of an activation was written, one position (or one waiting signal) is restored, never zero or two."""
    waiting = signal_row(opened=42500, scheduled=True, at_minute=-5, signal_id="a-1")
    opened = signal_row(opened=42500, at_minute=-1, scheduled_minute=-5, signal_id="a-1")
    rows: list[tuple[Signal, str]] = []
    if left in ("both", "schedule only"):
        rows.append((waiting, "schedule"))
    if left in ("both", "open without slot"):
        rows.append((opened, "signal"))
    store = await booted(world, *rows)
    bot = Bot(market([*flat(43000, -20, -1), candle(0, 43000, low=42500), *flat(43000, 1, 3)]), risk=[lambda p: True])
    await bot.live(store)
    found, _ = await store.salvage(context_key("signal", CONTEXT), context_key("schedule", CONTEXT))
    assert list(found) == [context_key("signal", CONTEXT)]
    assert len(await store.scan("risk", "limit")) == 1


async def test_scenario_38_a_missing_slot_is_restored_with_the_original_open_time(world: World) -> None:
    store = await booted(world, (signal_row(at_minute=-5), "signal"))
    bot = Bot(market(flat(43000, -20, 1)), risk=[lambda payload: True])
    await bot.live(store)
    (slot,) = (await store.scan("risk", "limit")).values()
    assert isinstance(slot.row, RiskPosition)
    assert (slot.row.open_timestamp, slot.row.signal_id) == (minute_ms(-5), "stored-1")


async def test_scenario_39_a_slot_past_its_lifetime_is_pruned_and_the_limit_is_free() -> None:
    world = World()
    store = await world.boot()
    gone = Context("binance", "ETHUSDT", "retired")
    slot = RiskPosition(
        strategy_name="retired", exchange_name="binance", symbol="ETHUSDT", open_timestamp=minute_ms(-1441)
    )
    await put(store, {risk_key("limit", gone): slot})
    bot = Bot(market(flat(43000, -20, 3)), {1: entry()}, risk=[lambda payload: payload.active_position_count < 1])
    events = await bot.live(store)
    assert [event.kind for event in events] == ["opened"]
    assert list(await store.scan("risk", "limit")) == [risk_key("limit", CONTEXT)]
    await store.close()


async def test_scenario_40_a_mismatched_open_row_is_kept_and_the_scheduled_row_is_restored(world: World) -> None:
    """DESIGN: the open row goes to quarantine with its bytes; nothing opens, what waits is restored."""
    store = await booted(world, (signal_row(opened=42500, scheduled=True, at_minute=-5, signal_id="w-1"), "schedule"))
    foreign = stored(world, signal_row(exchange="bybit", at_minute=-5))
    if foreign:
        await put(store, foreign)
    bot = Bot(market([*flat(43000, -20, 2), candle(3, 43000, low=42500), *flat(43000, 4, 6)]))
    await bot.live(store)
    assert [event.signal.id for event in bot.heard("on_schedule")] == ["w-1"]
    assert bot.heard("on_open") == []  # nothing opens while something is in quarantine
    (kept,) = (await store.quarantined("signal", NAME)).values()
    assert '"exchangeName":"bybit"' in kept.row.text
    loaded = await store.get(context_key("schedule", CONTEXT))
    assert loaded is not None and isinstance(loaded.row, ScheduledSignal) and loaded.row.id == "w-1"


async def test_scenario_43_a_stop_watches_the_open_position_to_its_close_and_a_restart_trades_again(
    world: World,
) -> None:
    store = await booted(world, (signal_row(at_minute=-5), "signal"))
    standing = market(flat(43000, -20, 1), hold=True)
    bot = Bot(standing, lambda symbol, when_ms: entry(44500))
    cancel = Live.background(
        "BTCUSDT", strategy_name="my-strategy", exchange_name="binance", store=store, registry=bot.registry,
        listeners=bot.listeners,
    )  # fmt: skip
    await until(standing.waiting.is_set)
    cancel()
    await asyncio.sleep(0)
    assert [run.status for run in Live.list()] == ["pending"]  # still watching
    standing.go_on([*flat(43000, 2, 4), candle(5, 43500, high=44000), *flat(43500, 6, 8)])
    await asyncio.wait_for(cancel.wait(), 30)
    assert [event.candle_ms for event in bot.heard("on_close")] == [minute_ms(5)]
    assert bot.heard("on_open") == []
    standing.go_on(flat(43500, 9, 12))
    standing.finish()
    assert [event.kind for event in await bot.live(store)] == ["opened"]


async def test_scenario_48_a_failing_write_on_open_leaves_no_half_open_position() -> None:
    """The store refuses the open: memory and store stay idle, the error is told, and the next slot may open."""
    world = World()
    store = await world.boot()
    bot = Bot(market(flat(43000, -20, 5)), {1: entry(), 3: entry()}, risk=[lambda payload: True])
    commit = world.memory.commit
    refused: list[int] = []

    async def full(scope: str, changes: Any, expect: Any, *, op: Any) -> int:
        if any(key.domain == "signal" for key in changes) and not refused:
            refused.append(1)
            raise UnavailableError("no space left on device")
        return await commit(scope, changes, expect, op=op)

    world.memory.commit = full  # type: ignore[method-assign]
    events = await bot.live(store)
    (failure,) = bot.errors
    assert isinstance(failure, Failure) and "no space left" in str(failure.error)
    assert [(event.kind, event.candle_ms) for event in events] == [("opened", minute_ms(2))]
    assert len(bot.heard("on_open")) == 1
    await store.close()


# ---------------------------------------------------------------------- 45: killed at each point of each transition

SCRIPT: dict[int, Mapping[str, Any]] = {
    1: entry(),  # opens, gains levels, closes in candle 5
    7: entry(priceOpen=42800),  # waits, activates in 9, loses levels, closes in 12
    19: entry(priceOpen=42800),  # waits, is cancelled beyond its stop in 21
    24: entry(note="refuse"),  # is rejected
}
CANDLES = [
    *flat(43000, -20, 2), candle(3, 43600), candle(4, 43900), candle(5, 43900, high=44000), *flat(43000, 6, 8),
    candle(9, 43000, low=42800), candle(10, 42300), candle(11, 42100), candle(12, 42500, low=42000),
    *flat(43000, 13, 20), candle(21, 42500, low=41900), *flat(43000, 22, 25),
]  # fmt: skip


class Life:
    """What one run of the script, killed or not, told; and the state that it left."""

    def __init__(self) -> None:
        self.heard: list[Event] = []
        self.scene = market(CANDLES)

    @property
    def reached(self) -> int:
        """The minute at which the market stands."""
        return (self.scene.present_ms - minute_ms(0)) // MINUTE_MS

    async def live(self, world: World, killer: Killer | None, present: int) -> int:
        """Run from the market's minute ``present`` to its end or to its death; return the minute that was reached."""
        self.scene = market(CANDLES, start=present)
        bot = Bot(self.scene, SCRIPT, risk=[lambda payload: payload.pending_signal.note != "refuse"])
        bot.listeners.listen("signal", lambda news: self.heard.append(news) if isinstance(news, Event) else None)
        run = None
        try:
            store = await world.boot(killer)
            run = bot.run(store)
            async for _ in run:
                pass
            await sound(store)
        except Death:
            if run is not None:
                await run.aclose()
        return self.reached


async def final_rows(world: World) -> dict[Key, Any]:
    """Return everything that is stored but what tells of recoveries: the owner row, outages, plans and decisions."""
    store = await world.boot()
    for domain in ("signal", "schedule", "partial"):  # a four-method class is asked, it cannot list
        await store.salvage(context_key(domain, CONTEXT))
    await store.scan("risk", "limit")
    rows = {key: loaded.row for key, loaded in (await store.salvage(*await store.keys()))[0].items()}
    await store.close()
    return {key: row for key, row in rows.items() if key.domain not in ("owner", "outage", "guard", "plan", "decision")}


@pytest.mark.parametrize("classes", [False, True], ids=["home", "classes"])
async def test_scenario_45_killed_at_each_storage_call_of_each_transition(classes: bool) -> None:
    """Dies before and after each storage call of a run with every kind of transition; the next run makes it whole."""
    whole, world, counter = Life(), World(classes=classes), Killer()
    await whole.live(world, counter, 0)
    expected, expected_rows = {event.id: event for event in whole.heard}, await final_rows(world)
    assert {event.kind for event in whole.heard} == {
        "opened", "scheduled", "partial_profit", "partial_loss", "closed", "cancelled", "rejected",
    }  # fmt: skip
    assert counter.steps > 40
    # Died once; and died twice, the second time at a step of the recovery or soon after it.
    for at, again in [(at, again) for at in range(counter.steps) for again in (None, 1, 3, 4, 6, 9)]:
        life, world = Life(), World(classes=classes)
        reached = await life.live(world, Killer(at), 0)
        if again is not None:
            reached = await life.live(world, Killer(again), reached)
        await life.live(world, None, reached)
        numbers = [event.number for event in life.heard]
        news = list(dict.fromkeys(numbers))
        assert news == sorted(news), f"died at {at}, {again}: out of order"
        assert {event.id: event for event in life.heard} == expected, f"died at {at}, {again}"
        assert await final_rows(world) == expected_rows, f"died at {at}, {again}"


@pytest.mark.parametrize("classes", [False, True], ids=["home", "classes"])
async def test_scenario_45_cancelled_between_any_two_steps(classes: bool) -> None:
    """As above, but the run's task is cancelled at its n-th wait, for every n, and cleans up in the same process."""
    whole, world = Life(), World(classes=classes)
    await whole.live(world, None, 0)
    expected, expected_rows = {event.id: event for event in whole.heard}, await final_rows(world)
    turns = 0
    while True:
        life, world, slow = Life(), World(classes=classes), Killer()
        slow.giving_way = True
        task = asyncio.ensure_future(life.live(world, slow, 0))
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.done():
            break
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0)  # what the run's iterator leaves to be closed is closed
        await life.live(world, None, life.reached)
        assert {event.id: event for event in life.heard} == expected, f"cancelled at {turns}"
        assert await final_rows(world) == expected_rows, f"cancelled at {turns}"
        turns += 1
    assert turns > 40
