"""Live runs: waiting, fetching, stopping, failing, and going on after an outage as the pure step says."""

from __future__ import annotations

import asyncio
import gc
import math
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from fakes import (
    Bot,
    FakeMarket,
    candle,
    flat,
    memory_store,
    minute_ms,
    no_sleep,
    proposal,
    put,
    session_of,
    signal_row,
    sound,
    stepped,
    until,
)
from mortal import Death, Killer, World, four_method_class

import holdfast
from holdfast.documents import adapters
from holdfast.domains import context_key, ledger_key
from holdfast.engine.live import Live
from holdfast.engine.ownership import own
from holdfast.engine.registry import Registry
from holdfast.engine.session import wall_clock_ms
from holdfast.errors import FencedError, InvalidInputError, UnavailableError
from holdfast.market.history import History
from holdfast.market.pace import WaitingPace
from holdfast.market.replay import LocalMarket
from holdfast.names import Context
from holdfast.rows import Event, Outage, Trade
from holdfast.rules.candles import MINUTE_MS, Candle, Window
from holdfast.rules.params import Params
from holdfast.rules.signals import Spec, State, Transition, answer, step
from holdfast.store import Store

CONTEXT = Context("binance", "BTCUSDT", "my-strategy")


@pytest.fixture(autouse=True)
def no_runs_left() -> Iterator[None]:
    yield
    gc.collect()
    assert [run for run in Live.list() if run.status == "pending"] == []


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    made = await memory_store()
    yield made
    await made.close()


def market(candles: list[Candle], **more: Any) -> FakeMarket:
    return FakeMarket({"BTCUSDT": candles}, **more)


# ---------------------------------------------------------------------- outages


def walk(seed: int, minutes: int) -> list[Candle]:
    """Return a market that moves enough to hit levels now and then; some minutes have no candle."""
    chance, price, made = random.Random(seed), 43000.0, []
    for minute in range(-30, minutes):
        before, price = price, price * (1 + chance.gauss(0, 0.0016))
        high, low = max(before, price) * (1 + chance.random() * 0.0006), min(before, price) * 0.9996
        if minute <= 0 or chance.random() > 0.04:
            made.append(Candle(minute_ms(minute), before, high, low, price, chance.random() + 0.1))
    return made


def proposals(symbol: str, when_ms: int) -> Any:
    """Propose from the time alone: at once, or waiting for a better price."""
    minute = (when_ms - minute_ms(0)) // MINUTE_MS
    if minute % 7 != 3:
        return None
    return lambda price: {
        "position": "long", "priceTakeProfit": price * 1.006, "priceStopLoss": price * 0.993,
        "minuteEstimatedTime": 25, **({"priceOpen": price * 0.9985} if minute % 2 else {}),
    }  # fmt: skip


def pure_run(candles: list[Candle], outages: list[Outage]) -> tuple[State, list[Event]]:
    """Step the candles without any storage, entries forbidden in the outages."""
    spec, window, state, events = Spec(CONTEXT, MINUTE_MS, Params()), Window(5), State(), []  # type: ignore[var-annotated]
    for one in candles:
        window.push(one)
        entries = not any(outage.from_ms <= one[0] <= outage.to_ms for outage in outages)
        outcome = step(state, one, window, spec, entries=entries)
        while outcome is not None and not isinstance(outcome, Transition):
            proposed = proposals("BTCUSDT", outcome.now_ms)
            outcome = answer(outcome, proposed and proposed(outcome.price))
        if outcome is not None:
            state = outcome.state
            events += outcome.events
    return state, events


class Priced:
    """A strategy that computes its levels from the price, as the pure run does."""

    def __init__(self) -> None:
        self.price = 0.0

    def __call__(self, symbol: str, when_ms: int) -> Any:
        proposed = proposals(symbol, when_ms)
        return proposed and proposed(self.price)


@pytest.mark.parametrize("classes", [False, True], ids=["home", "classes"])
@pytest.mark.parametrize("seed", range(12))
async def test_a_killed_run_equals_the_pure_step_with_entries_forbidden_in_the_recorded_outages(
    seed: int, classes: bool
) -> None:
    """The market does not wait: it goes on while the bot is dead, and sometimes while it lives."""
    chance, minutes = random.Random(seed), 240
    candles = walk(seed, minutes)
    world, told, present, kills = World(classes=classes), list[Event](), 0, 0
    while True:
        scene = market([one for one in candles if one[0] < minute_ms(minutes)], start=present)
        strategy = Priced()
        bot = Bot(scene, strategy)
        bot.listeners.listen("signal", lambda news: told.append(news) if isinstance(news, Event) else None)
        killer = Killer(chance.randrange(4, 40) if kills < 8 else None)
        get_candles = scene.get_candles

        async def fetched(*arguments: Any, scene: FakeMarket = scene, get_candles: Any = get_candles) -> Any:
            if chance.random() < 0.03:
                scene.present_ms = min(scene.end_ms, scene.present_ms + chance.randrange(1, 5) * MINUTE_MS)
            return await get_candles(*arguments)

        bot = bot_with_prices(scene, strategy, fetched, bot)
        run = None
        try:
            store = await world.boot(killer)
            run = bot.run(store)
            async for _ in run:
                pass
            break
        except Death:
            kills += 1
            if run is not None:
                await run.aclose()
            present = min(minutes - 1, (scene.present_ms - minute_ms(0)) // MINUTE_MS + chance.randrange(0, 12))
    await store.close()
    store = await world.boot()
    await sound(store)
    outages = [cast("Outage", loaded.row) for loaded in (await store.scan("outage")).values()]
    state, events = pure_run(candles, outages)
    assert {event.id: event for event in told} == {event.id: event for event in events}
    trades = [cast("Trade", loaded.row) for loaded in (await store.scan("ledger")).values()]
    assert {trade.event_id for trade in trades} == {event.id for event in events if event.kind == "closed"}
    loaded = (await store.salvage(context_key("signal", CONTEXT)))[0]
    assert [one.row for one in loaded.values()] == ([state.signal] if state.signal else [])
    assert kills > 0
    await store.close()


def bot_with_prices(scene: FakeMarket, strategy: Priced, fetched: Any, old: Bot) -> Bot:
    """Return the bot again, its strategy told the price that the rules see."""
    from holdfast.engine.context import current

    window: dict[int, float] = {}

    def get_signal(symbol: str, when_ms: int) -> Any:
        span = [one for one in scene.candles[symbol] if when_ms - 5 * MINUTE_MS <= one[0] < when_ms]
        made = Window(5)
        for one in span:
            made.push(one)
        strategy.price = window.setdefault(when_ms, made.price())
        assert current().when_ms == when_ms
        return strategy(symbol, when_ms)

    registry = Registry()
    registry.add_exchange(
        exchange_name="binance", get_candles=fetched, wait_closed=scene.wait_closed, format_price=None
    )
    again = Bot(scene, get_signal, registry=registry)
    again.listeners = old.listeners
    return again


async def test_an_exit_in_the_downtime_is_found_over_many_fetches(store: Store) -> None:
    """The exchange gives at most 50 candles at once; the stop was hit somewhere in 600."""
    await put(store, {context_key("signal", CONTEXT): signal_row(at_minute=-600, minutes=1400)})
    scene = market([*flat(43000, -640, -201), candle(-200, 42500, low=42000), *flat(42500, -199, 1)])
    get_candles = scene.get_candles

    async def stingy(symbol: str, interval: str, since_ms: int, limit: int) -> list[Candle]:
        return (await get_candles(symbol, interval, since_ms, limit))[:50]

    scene.get_candles = stingy  # type: ignore[method-assign]
    bot = Bot(scene)
    (closed,) = [event async for event in bot.run(store) if event.kind == "closed"]
    assert (closed.reason, closed.candle_ms) == ("stop_loss", minute_ms(-200))
    await sound(store)


async def test_nothing_open_skips_the_gap_and_records_it(store: Store) -> None:
    bot = Bot(market(flat(43000, -20, 3)))
    await bot.live(store)
    scene = market(flat(43000, -20, 5003), start=5000)
    await Bot(scene).live(store)
    assert sum(limit for _, _, limit in scene.fetches) < 30
    ranges = [cast("Outage", loaded.row) for loaded in (await store.scan("outage")).values()]
    assert [(one.from_ms, one.to_ms) for one in ranges] == [
        (0, minute_ms(-1)), (minute_ms(0), minute_ms(4999)),
    ]  # fmt: skip


async def test_an_exchange_that_lags_behind_at_a_restart_gives_the_same_prices() -> None:
    """The candles that were decided before the restart come late, and still belong to the window."""
    candles = [candle(minute, 43000 + 40 * (minute % 7)) for minute in range(-20, 20)]
    candles[23] = candle(3, 43120, high=44000)  # closes the first signal: the last decision before the restart
    heard: list[list[Event]] = []
    for lag in (0, 3):
        store = await memory_store()
        asked = {1: proposal(), 5: proposal(id="second")}
        events = await Bot(market([one for one in candles if one[0] < minute_ms(4)]), asked).live(store)
        events += await Bot(market(candles, start=3 - lag), asked).live(store)
        heard.append(events)
        await store.close()
    assert heard[0] == heard[1]
    assert [event.kind for event in heard[0]] == ["opened", "closed", "opened"]


# ---------------------------------------------------------------------- trouble


async def test_an_exchange_that_fails_is_asked_again_and_what_was_missed_is_only_watched(store: Store) -> None:
    scene = market([*flat(43000, -20, 1), candle(2, 43000, high=44000), *flat(43000, 3, 8)])
    bot = Bot(scene, {1: proposal(), 4: proposal(id="missed"), 7: proposal(id="next")})
    bot_run = bot.run(store)
    events = [await anext(bot_run)]
    scene.failures = [OSError("no route")] * 9  # three attempts each, three minutes
    events += [event async for event in bot_run]
    assert [(event.kind, event.candle_ms) for event in events] == [
        ("opened", minute_ms(0)), ("closed", minute_ms(2)), ("opened", minute_ms(6)),
    ]  # fmt: skip
    assert {failure.where for failure in bot.errors} == {"candles"}
    await sound(store)


async def test_a_market_that_cannot_tell_the_time_is_asked_again(store: Store) -> None:
    scene = market(flat(43000, -20, 3))
    wait_closed, failures = scene.wait_closed, [OSError("reset"), OSError("reset")]

    async def flaky(participant: str, after_ms: int | None) -> int:
        if failures:
            raise failures.pop()
        return await wait_closed(participant, after_ms)

    scene.wait_closed = flaky  # type: ignore[method-assign]
    bot = Bot(scene, {2: proposal()})
    assert [event.kind for event in await bot.live(store)] == ["opened"]
    assert len(bot.errors) == 2


async def test_candles_that_cannot_be_true_are_not_used(store: Store) -> None:
    await put(store, {context_key("signal", CONTEXT): signal_row(at_minute=-5)})
    wrong = candle(1, 43000, low=0.001)
    bot = Bot(market([*flat(43000, -20, 0), wrong]))
    assert await bot.live(store) == []
    assert "far under" in str(bot.errors[0].error)


async def test_a_candle_that_is_absurd_throughout_hits_no_stop_though_it_is_fetched_alone(store: Store) -> None:
    await put(store, {context_key("signal", CONTEXT): signal_row(at_minute=-5)})
    bot = Bot(market([*flat(43000, -20, 1), candle(2, 1.0)]))
    assert await bot.live(store) == []
    assert "far under" in str(bot.errors[0].error)


async def test_a_candle_that_stays_wrong_does_not_leave_a_position_unwatched(store: Store) -> None:
    await put(store, {context_key("signal", CONTEXT): signal_row(at_minute=-5)})
    never_mended = candle(1, 43000)._replace(high=math.nan)
    candles = [*flat(43000, -20, 0), never_mended, candle(2, 43000, low=41000), *flat(43000, 3, 20)]
    bot = Bot(market(candles))
    [closed] = await bot.live(store)
    assert (closed.reason, closed.candle_ms) == ("stop_loss", minute_ms(2))
    assert [failure.where for failure in bot.errors] == ["candles"] * 5


async def test_a_store_that_is_away_at_the_start_is_tried_again(store: Store) -> None:
    backend: Any = store.home.backend
    commit, failures = backend.commit, [UnavailableError("full"), UnavailableError("full")]

    async def away(*arguments: Any, **named: Any) -> int:
        if failures:
            raise failures.pop()
        return int(await commit(*arguments, **named))

    backend.commit = away
    bot = Bot(market(flat(43000, -20, 3)), {2: proposal()})
    assert [event.kind for event in await bot.live(store)] == ["opened"]
    assert [failure.where for failure in bot.errors] == ["store", "store"]


async def test_a_run_that_is_fenced_raises_and_is_listed_as_rejected(store: Store) -> None:
    scene = market(flat(43000, -20, 1), hold=True)
    bot = Bot(scene, {1: proposal(), 3: proposal()})
    exits: list[Any] = []
    bot.listeners.listen("exit", exits.append)
    cancel = Live.background(
        "BTCUSDT", strategy_name="my-strategy", exchange_name="binance", store=store, registry=bot.registry,
        listeners=bot.listeners, sleep=no_sleep,
    )  # fmt: skip
    await until(scene.waiting.is_set)
    await own(store, store.writer("thief"), CONTEXT, holder="thief", now_ms=0, sleep=no_sleep)
    scene.go_on([candle(2, 43000, high=44000), *flat(43000, 3, 4)])
    await asyncio.wait_for(cancel.wait(), 30)
    assert [run.status for run in Live.list()] == ["rejected"]
    assert isinstance(exits[0].error, FencedError) and isinstance(bot.errors[-1].error, FencedError)
    assert scene.left == [str(CONTEXT)]


async def test_a_fenced_iterator_raises(store: Store) -> None:
    bot = Bot(market(flat(43000, -20, 5)), {1: proposal(), 3: proposal()})
    run = bot.run(store)
    await anext(run)
    await own(store, store.writer("thief"), CONTEXT, holder="thief", now_ms=0, sleep=no_sleep)
    bot.market.candles["BTCUSDT"][-1] = candle(5, 43000, high=44000)
    with pytest.raises(FencedError):
        await anext(run)


# ---------------------------------------------------------------------- stopping and starting


async def test_a_stop_before_the_first_candle_cancels_what_was_stored_as_waiting(store: Store) -> None:
    waiting = signal_row(opened=42500, scheduled=True, at_minute=-5)
    await put(store, {context_key("schedule", CONTEXT): waiting})
    bot = Bot(market(flat(43000, -20, 5)), lambda symbol, when_ms: proposal())
    run = bot.run(store)
    run.stop()
    (cancelled,) = [event async for event in run]
    assert (cancelled.kind, cancelled.reason) == ("cancelled", "stopped")
    assert bot.asked == []
    await sound(store)


async def test_a_stop_before_the_first_candle_still_watches_a_stored_position(store: Store) -> None:
    await put(store, {context_key("signal", CONTEXT): signal_row(at_minute=-5)})
    bot = Bot(market([*flat(43000, -20, 2), candle(3, 43000, high=44000), *flat(43000, 4, 9)]))
    run = bot.run(store)
    run.stop()
    assert [event.kind for event in [event async for event in run]] == ["closed"]
    assert bot.market.present_ms < minute_ms(5)  # and then it ended


async def test_a_stop_before_the_first_candle_with_nothing_stored_ends_at_once(store: Store) -> None:
    done: list[Any] = []
    bot = Bot(market(flat(43000, -20, 5)))
    bot.listeners.listen("done_live", done.append)
    run = bot.run(store)
    run.stop()
    assert [event async for event in run] == []
    assert [one.context for one in done] == [CONTEXT]


async def test_stop_tells_how_many_runs_it_reached(store: Store) -> None:
    assert Live.stop("BTCUSDT", "my-strategy") == 0
    run = Bot(market(flat(43000, -20, 5))).run(store)
    assert Live.stop("BTCUSDT", "my-strategy", "bybit") == 0
    assert Live.stop("BTCUSDT", "my-strategy") == 1
    assert [event async for event in run] == []


async def test_a_context_runs_once_and_a_pair_runs_on_two_exchanges(store: Store) -> None:
    registry = Registry()
    scene = market(flat(43000, -20, 3))
    bot = Bot(scene, {2: proposal()}, registry=registry)
    registry.add_exchange(market(flat(43000, -20, 3)), exchange_name="bybit")
    first = bot.run(store)
    with pytest.raises(InvalidInputError, match="already running"):
        bot.run(store)
    other = Live.run(
        "BTCUSDT", strategy_name="my-strategy", exchange_name="bybit", store=store, registry=registry,
        listeners=bot.listeners, sleep=no_sleep, clock=wall_clock_ms,
    )  # fmt: skip
    assert [event.kind for event in [event async for event in first]] == ["opened"]
    assert [event.kind for event in [event async for event in other]] == ["opened"]
    assert len(await store.scan("signal")) == 2
    await sound(store)


@pytest.mark.parametrize(
    "names", [{"strategy_name": "unknown"}, {"exchange_name": "unknown"}, {"symbol": ""}, {"symbol": 7}]
)
async def test_what_is_unknown_or_wrong_is_refused_at_once(store: Store, names: dict[str, Any]) -> None:
    bot = Bot(market(flat(43000, -20, 3)))
    given: dict[str, Any] = {
        "symbol": "BTCUSDT", "strategy_name": "my-strategy", "exchange_name": "binance", "registry": bot.registry,
    } | names  # fmt: skip
    with pytest.raises(InvalidInputError):
        Live.run(given.pop("symbol"), store=store, **given)
    assert Live.list() == []


async def test_an_event_that_was_not_delivered_comes_again_with_its_id(store: Store) -> None:
    bot = Bot(market(flat(43000, -20, 5)), {1: proposal()})
    run = bot.run(store)
    first = await anext(run)
    await run.aclose()
    again = await anext(run2 := Bot(market(flat(43000, -20, 5))).run(store))
    assert again == first
    assert [event async for event in run2] == []
    assert [event async for event in Bot(market(flat(43000, -20, 6))).run(store)] == []
    await sound(store)


async def test_a_run_that_is_aborted_leaves_its_position_for_the_next(store: Store) -> None:
    scene = market(flat(43000, -20, 2), hold=True)
    bot = Bot(scene, {1: proposal()})
    cancel = Live.background(
        "BTCUSDT", strategy_name="my-strategy", exchange_name="binance", store=store, registry=bot.registry,
        listeners=bot.listeners,
    )  # fmt: skip
    await until(scene.waiting.is_set)
    await asyncio.wait_for(cancel.abort(), 30)
    assert [run.status for run in Live.list()] == ["rejected"]
    await sound(store)
    again = Bot(market([*flat(43000, -20, 4), candle(5, 43000, high=44000)], start=4))
    assert [event.kind for event in await again.live(store)] == ["closed"]


# ---------------------------------------------------------------------- many contexts


def contested(symbols: int, minutes: int, participants: int) -> LocalMarket:
    """Return a waiting market in which every context would like to open at once."""
    candles = {f"S{at}": [louder(one, at) for one in walk(at, minutes)] for at in range(symbols)}
    pace = WaitingPace(minute_ms(0), minute_ms(minutes - 1), participants=participants)
    return LocalMarket(History(candles), pace)


def louder(one: Candle, at: int) -> Candle:
    return one._replace(volume=1.0 + at)


async def played(store: Store, scene: Any, symbols: list[str]) -> None:
    registry = Registry()
    bot = Bot(
        scene,
        lambda symbol, when_ms: proposal(43600, 42500, priceOpen=43000) if when_ms % 300_000 == 0 else None,
        registry=registry,
        risk=[lambda payload: payload.active_position_count < 2],
    )

    async def consume(symbol: str) -> None:
        async for _ in bot.run(store, symbol):
            pass

    async with asyncio.TaskGroup() as group:
        for symbol in symbols:
            group.create_task(consume(symbol))


async def test_contexts_that_share_a_limit_trade_the_same_whatever_order_they_start_in() -> None:
    symbols = [f"S{at}" for at in range(5)]
    results = []
    for order in (symbols, symbols[::-1]):
        store = await memory_store()
        await asyncio.wait_for(played(store, contested(5, 120, 5), order), 60)
        await sound(store)
        rows = {**await store.scan("ledger"), **await store.scan("signal"), **await store.scan("risk")}
        results.append({key: loaded.row for key, loaded in rows.items()})
        await store.close()
    assert results[0] == results[1]
    assert len(results[0]) > 5


async def test_an_exchange_that_gives_nothing_keeps_nobody_waiting(store: Store) -> None:
    """They share a risk profile, and the one whose exchange fails comes first by its name."""
    registry = Registry()
    bad, good = market(flat(43000, -20, 30), hold=True), market(flat(43000, -20, 30))
    bad.failures = [OSError("no route")] * 10_000
    registry.add_exchange(bad, exchange_name="a-bad")
    bot = Bot(good, {25: proposal()}, registry=registry, risk=[lambda payload: True])
    stuck = Live.background(
        "BTCUSDT", strategy_name="my-strategy", exchange_name="a-bad", store=store, registry=registry,
        listeners=bot.listeners, sleep=no_sleep,
    )  # fmt: skip
    events = await asyncio.wait_for(bot.live(store), 20)
    assert [event.kind for event in events] == ["opened"]
    await asyncio.wait_for(stuck.abort(), 20)


async def test_a_run_that_was_set_up_and_dropped_keeps_nobody_waiting(store: Store) -> None:
    registry = Registry()
    scene = market(flat(43000, -20, 5))
    bot = Bot(scene, {2: proposal()}, registry=registry, risk=[lambda payload: True])
    dropped = bot.run(store, "AAA")
    del dropped
    gc.collect()
    events = await asyncio.wait_for(bot.live(store), 20)
    assert [event.kind for event in events] == ["opened"]
    assert {run.status for run in Live.list()} == {"fulfilled"}


# ---------------------------------------------------------------------- the clock, the default store, ticks


async def test_an_exchange_that_cannot_tell_the_time_runs_by_the_wall_clock(store: Store) -> None:
    now = [minute_ms(0) / 1000 + 7]
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds
        await asyncio.sleep(0)

    candles = {one[0]: one for one in flat(43000, -20, 30)}

    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> list[Candle]:
        """Give what has closed, and the one that is forming."""
        return [one for at, one in candles.items() if since_ms <= at <= now[0] * 1000][:limit]

    registry = Registry()
    registry.add_exchange(exchange_name="binance", get_candles=get_candles)
    bot = Bot(None, {3: proposal()}, registry=registry)
    run = Live.run(
        "BTCUSDT", strategy_name="my-strategy", exchange_name="binance", store=store, registry=registry,
        listeners=bot.listeners, clock=lambda: int(now[0] * 1000), sleep=sleep,
    )  # fmt: skip
    opened = await anext(run)
    assert (opened.candle_ms, max(slept) <= 5.0) == (minute_ms(2), True)
    assert minute_ms(3) + 2000 <= now[0] * 1000 <= minute_ms(3) + 3000  # two seconds of grace after the close
    await run.aclose()


async def test_the_default_store_lies_in_the_working_directory_and_takes_registered_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shelf: dict[tuple[str, str, str], Any] = {}
    adapters.use_store(None)
    adapters.PersistSignalAdapter.use_persist_signal_adapter(four_method_class(shelf))
    try:
        bot = Bot(market(flat(43000, -20, 3)), {2: proposal()})
        run = Live.run(
            "BTCUSDT", strategy_name="my-strategy", exchange_name="binance", registry=bot.registry,
            listeners=bot.listeners, sleep=no_sleep,
        )  # fmt: skip
        assert [event.kind for event in [event async for event in run]] == ["opened"]
        (value,) = shelf.values()
        assert value["priceTakeProfit"] == 44000
        assert (tmp_path / "dump" / "data").is_dir()
        row = await adapters.PersistSignalAdapter.read_signal_data("BTCUSDT", "my-strategy", "binance")
        assert row is not None and row.price_take_profit == 44000
    finally:
        await holdfast.close()
        holdfast.reset()


async def test_quiet_candles_are_told_only_while_somebody_listens(store: Store) -> None:
    class Silent(Bot):
        def _recorders(self) -> dict[str, Any]:
            return {}

    bot = Silent(market(flat(43000, -20, 5)), {2: proposal()})
    made: list[Any] = []
    run = bot.run(store)
    await anext(run)
    unsubscribe = bot.listeners.listen("signal_live", made.append)
    async for _ in run:
        pass
    unsubscribe()
    assert [tick.kind for tick in made] == ["active"] * 4
    assert [(tick.at_ms - minute_ms(0)) // MINUTE_MS for tick in made] == [3, 4, 5, 6]


async def test_performance_is_measured_while_somebody_listens(store: Store) -> None:
    bot = Bot(market(flat(43000, -20, 5)))
    measured: list[Any] = []
    bot.listeners.listen("performance", measured.append)
    await bot.live(store)
    assert len(measured) == 6 and all(one.seconds >= 0 and one.mode == "live" for one in measured)


async def test_a_trade_reaches_the_ledger(store: Store) -> None:
    bot = Bot(market([*flat(43000, -20, 2), candle(3, 43000, high=44000), *flat(43000, 4, 5)]), {1: proposal(id="t")})
    await bot.live(store)
    loaded = await store.get(ledger_key(CONTEXT, "t"))
    assert loaded is not None
    trade = msgspec.to_builtins(loaded.row)
    assert (trade["reason"], trade["closedAt"], round(trade["pnlPercent"], 6)) == (
        "take_profit", minute_ms(4), 1.921135,
    )  # fmt: skip


def test_background_needs_a_running_loop() -> None:
    bot = Bot(market(flat(43000, -20, 3)))
    with pytest.raises(InvalidInputError, match="event loop"):
        Live.background(
            "BTCUSDT", strategy_name="my-strategy", exchange_name="binance", registry=bot.registry,
            listeners=bot.listeners,
        )  # fmt: skip


# ---------------------------------------------------------------------- user code at the worst moment


async def stray_cancellation(*values: Any) -> None:
    """What a client library does when another of its tasks is cancelled."""
    gone = asyncio.get_running_loop().create_future()
    gone.cancel()
    await gone


@pytest.mark.parametrize("place", ["strategy", "validation", "callback", "listener", "get_candles", "wait_closed"])
async def test_a_cancellation_that_nobody_asked_for_is_a_failure_of_its_place_and_not_the_end(
    store: Store, place: str
) -> None:
    scene = market([*flat(43000, -10, 3), candle(4, 44000), *flat(44000, 5, 8)])
    calls = 0

    async def first_call_goes_wrong(*values: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            await stray_cancellation()
        return proposal() if calls == 2 else None

    if place in ("get_candles", "wait_closed"):
        real = getattr(scene, place)

        async def third_call_goes_wrong(*values: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                await stray_cancellation()
            return await real(*values)

        setattr(scene, place, third_call_goes_wrong)
    bot = Bot(
        scene,
        first_call_goes_wrong if place == "strategy" else {2: proposal()},
        risk=[stray_cancellation] if place == "validation" else None,
        callbacks={"on_open": stray_cancellation} if place == "callback" else None,
    )
    if place == "listener":
        bot.listeners.listen("signal", stray_cancellation)
    rejected: list[Any] = []
    bot.listeners.listen("risk", rejected.append)
    events = [event.kind async for event in bot.run(store)]
    assert events == ([] if place == "validation" else ["opened", "closed"])
    if place == "validation":
        assert len(rejected) == 1
    elif place != "get_candles":  # which is simply asked again
        assert "CancelledError" in str(bot.errors[0].error)
    await sound(store)


async def test_what_a_strategy_thinks_of_after_the_stop_does_not_open(store: Store) -> None:
    thinking, answered = asyncio.Event(), asyncio.Event()

    async def slow(symbol: str, when_ms: int) -> Any:
        thinking.set()
        await answered.wait()
        return proposal()

    run = Bot(market(flat(43000, -20, 5)), slow).run(store)
    running = asyncio.ensure_future(anext(run, None))
    await thinking.wait()
    run.stop()
    answered.set()
    assert await running is None
    assert await store.scan("signal") == {}
    assert (minute_ms(0), minute_ms(0)) in [(one.from_ms, one.to_ms) for one in await recorded(store)]


async def recorded(store: Store) -> list[Outage]:
    return [cast(Outage, loaded.row) for loaded in (await store.scan("outage")).values()]


async def test_a_stop_while_the_store_is_away_at_the_start_still_watches_a_stored_position(store: Store) -> None:
    await put(store, {context_key("signal", CONTEXT): signal_row(at_minute=-5)})
    bot = Bot(market([*flat(43000, -20, 2), candle(3, 43000, high=44000), *flat(43000, 4, 9)]))
    run = bot.run(store)
    backend: Any = store.home.backend
    commit, failures = backend.commit, [UnavailableError("full"), UnavailableError("full")]

    async def away(*arguments: Any, **named: Any) -> int:
        if failures:
            run.stop()
            raise failures.pop()
        return int(await commit(*arguments, **named))

    backend.commit = away
    assert [event.kind async for event in run] == ["closed"]


async def test_a_background_run_that_is_aborted_before_it_began_is_over(store: Store) -> None:
    bot = Bot(market(flat(43000, -20, 1)), {1: proposal()}, risk=[lambda payload: True])
    cancel = Live.background(
        "BTCUSDT", strategy_name="my-strategy", exchange_name="binance", store=store, registry=bot.registry,
        listeners=bot.listeners, sleep=no_sleep,
    )  # fmt: skip
    await cancel.abort()
    assert [run.status for run in Live.list()] == ["fulfilled"]
    assert [event.kind for event in await bot.live(store)] == ["opened"]


async def test_a_minute_at_which_the_strategy_failed_is_on_record_as_one_outage(store: Store) -> None:
    def unsure(symbol: str, when_ms: int) -> Any:
        minute = (when_ms - minute_ms(0)) // MINUTE_MS
        if minute in (3, 4, 7):
            raise ConnectionError("no candles of the other symbol")
        return proposal() if minute == 9 else None

    bot = Bot(market(flat(43000, -20, 9)), unsure)
    assert [event.kind for event in await bot.live(store)] == ["opened"]
    found = [(one.from_ms, one.to_ms) for one in await recorded(store) if one.from_ms]
    assert found == [(minute_ms(2), minute_ms(3)), (minute_ms(6), minute_ms(6))]


async def test_a_halt_longer_than_one_request_reaches_does_not_end_the_watching(store: Store) -> None:
    class Ranged(FakeMarket):
        """Answers for the span from ``since`` on that ``limit`` candles would fill, as several exchanges do."""

        async def get_candles(self, symbol: str, interval: str, since_ms: int, limit: int) -> list[Candle]:
            found = await super().get_candles(symbol, interval, since_ms, limit)
            return [one for one in found if one[0] < since_ms + limit * MINUTE_MS]

    scene = Ranged({"BTCUSDT": [*flat(43000, -10, 3), *flat(43000, 2500, 2502), candle(2503, 44000)]}, start=2502)
    await put(store, {context_key("signal", CONTEXT): signal_row(at_minute=1, minutes=10_000)})
    assert [event.kind for event in await Bot(scene).live(store)] == ["closed"]


async def test_a_row_that_comes_with_a_release_is_watched_by_the_run_that_waited_for_it(store: Store) -> None:
    key = context_key("signal", CONTEXT)
    await put(store, {key: signal_row(exchange="bybit")})
    scene = market(flat(43000, -20, 1), hold=True)
    bot = Bot(scene, lambda symbol, when_ms: proposal())
    running = asyncio.ensure_future(anext(bot.run(store)))
    await scene.waiting.wait()
    release, expect = await store.release_changes(key)
    await store.writer("hand").commit({**release, key: signal_row(signal_id="by hand")}, expect)
    store.released(key)
    scene.go_on([candle(2, 43000), candle(3, 43000, high=44000), candle(4, 43000)])
    closed = await running
    assert (closed.kind, closed.signal.id) == ("closed", "by hand")


async def test_a_minute_on_record_as_an_outage_stays_one_in_a_run_that_begins_in_it(store: Store) -> None:
    failing = True

    def unsure(symbol: str, when_ms: int) -> Any:
        if failing:
            raise ConnectionError("no candles of the other symbol")
        return proposal()

    scene = market(flat(43000, -20, 2), start=2, hold=True)
    bot = Bot(scene, unsure)
    session = await session_of(bot, store)
    await stepped(session, *flat(43000, 0, 2))
    await session.close()
    failing = False
    run = bot.run(store)
    running = asyncio.ensure_future(anext(run))
    await until(lambda: scene.waiting.is_set() or running.done())
    scene.go_on([candle(3, 43000)])
    assert (await running).candle_ms == minute_ms(3)
    await run.aclose()
