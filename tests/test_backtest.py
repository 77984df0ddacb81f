"""Backtest: the driver around the step. What the rules decide is tested with the step itself."""

from __future__ import annotations

import ast
import asyncio
import gzip
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rule_kit import LONG, SHORT, T0, History, Walk, at, flat, market, once, spec, turns

import holdfast
from holdfast.engine.backtest import Backtest
from holdfast.engine.context import get_average_price, get_candles, get_date, get_mode
from holdfast.engine.listeners import Done, Failure, Performance, Progress, Tick
from holdfast.errors import HoldfastError, InvalidInputError, UnavailableError
from holdfast.rules.candles import MINUTE_MS, Candle
from holdfast.rules.params import Params
from holdfast.rules.risk import RiskPayload, RiskRejection
from holdfast.rules.signals import InvalidSignalError

NAMES: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "binance", "frame_name": "frame"}
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "BTCUSDT-1m-2022-01.csv.gz"


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    assert not Backtest._tasks


def run(history: History, **more: Any) -> Any:
    """Return the iterator of a run."""
    return Backtest.run("BTCUSDT", **NAMES, registry=history.registry, listeners=history.listeners, **more)


def zigzag(minutes: int) -> list[Candle]:
    """Return candles that swing by two percent every hour or so, always the same."""
    return [
        at(minute, 43_000.0 + 900.0 * ((minute * 7 % 113) / 56 - 1), high=43_000.0 + minute * 13 % 997)
        for minute in range(minutes)
    ]


# ---------------------------------------------------------------------- what comes out


async def test_a_run_yields_closed_and_cancelled_events_and_decides_what_the_bare_step_decides() -> None:
    candles = zigzag(1500)
    reply = {**LONG, "minuteEstimatedTime": 30}

    def strategy(symbol: str, when_ms: int) -> dict[str, Any]:
        return {**reply, "priceOpen": None if when_ms // MINUTE_MS % 2 else 42_800.0}

    history = History(candles, strategy)
    yielded = await history.run()
    walk = Walk(spec())
    for candle in candles:
        now_ms = candle.open_time_ms + MINUTE_MS
        try:
            walk.step(candle, strategy("", now_ms))
        except InvalidSignalError:
            continue
    assert {event.kind for event in walk.events} >= {"opened", "closed", "scheduled"}
    expected = [event for event in walk.events if event.kind in ("closed", "cancelled")]
    assert yielded[: len(expected)] == expected
    assert len(yielded) - len(expected) <= 1, "at most what was open at the end of the data"


async def test_missing_candles_are_not_stepped_and_long_gaps_are_crossed() -> None:
    asked: list[int] = []

    def strategy(symbol: str, when_ms: int) -> None:
        asked.append((when_ms - T0) // MINUTE_MS - 1)

    candles = [*flat(range(3)), *flat(range(7, 9)), *flat(range(2500, 2502))]

    def by_time(symbol: str, interval: str, since_ms: int, limit: int) -> Sequence[Candle]:
        end_ms = since_ms + limit * MINUTE_MS
        return [candle for candle in candles if since_ms <= candle.open_time_ms < end_ms]

    for get in (market(candles), by_time):
        history = History(candles, strategy)
        history.registry.remove_exchange("binance")
        history.registry.add_exchange(exchange_name="binance", get_candles=get)
        asked.clear()
        assert await history.run() == []
        assert asked == [0, 7, 2500]


async def test_candles_before_the_frame_make_its_first_price_and_slot() -> None:
    asked: list[int] = []

    def strategy(symbol: str, when_ms: int) -> dict[str, Any] | None:
        asked.append((when_ms - T0) // MINUTE_MS - 1)
        return dict(LONG)

    candles = [*flat(range(7), 42_900.0), *flat(range(7, 30), 43_100.0)]
    history = History(candles, strategy, frame=(T0 + 7 * MINUTE_MS, T0 + 20 * MINUTE_MS))
    await history.run()
    assert asked[0] == 10, "minute 7 is not the first of its slot"
    cold = History(candles, strategy, frame=(T0 + 8 * MINUTE_MS, T0 + 8 * MINUTE_MS), interval="1m")
    await cold.run()
    assert cold.told("on_open")[0].price == pytest.approx((3 * 42_900 + 2 * 43_100) / 5)


async def test_the_frame_is_inclusive_on_both_sides() -> None:
    asked: list[int] = []
    history = History(
        flat(range(-20, 60)),
        lambda symbol, when_ms: asked.append((when_ms - T0) // MINUTE_MS - 1),
        frame=(T0 + 5 * MINUTE_MS, T0 + 10 * MINUTE_MS),
        interval="1m",
    )
    await history.run()
    assert asked == [5, 6, 7, 8, 9, 10]


async def test_a_frame_of_a_coarse_interval_asks_as_coarsely() -> None:
    asked: list[int] = []
    history = History(flat(range(130)), lambda symbol, when_ms: asked.append(when_ms // MINUTE_MS), interval="5m")
    history.registry.add_frame(frame_name="hourly", interval="1h", start=T0, end=T0 + 129 * MINUTE_MS)
    names = {**NAMES, "frame_name": "hourly"}
    async for _ in Backtest.run("BTCUSDT", **names, registry=history.registry, listeners=history.listeners):
        pass
    assert all(minute % 60 == 0 for minute in asked[1:])
    assert len(asked) == 3


async def test_nothing_of_today_is_stepped() -> None:
    now_ms = time.time_ns() // 1_000_000
    today = now_ms // 86_400_000 * 86_400_000
    shift = (today - T0) // MINUTE_MS
    asked: list[int] = []
    candles = [at(shift + minute) for minute in range(-10, 10)]
    history = History(candles, lambda symbol, when_ms: asked.append(when_ms), interval="1m")
    await history.run()
    assert asked[-1] == today
    assert len(asked) == 10


async def test_a_signal_open_at_the_frames_end_is_watched_on_and_nothing_new_opens() -> None:
    candles = [*flat(range(30)), at(30, high=44_000.0), *flat(range(31, 90))]
    history = History(candles, lambda symbol, when_ms: dict(LONG), frame=(T0, T0 + 5 * MINUTE_MS))
    (event,) = await history.run()
    assert (event.reason, event.candle_ms) == ("take_profit", T0 + 30 * MINUTE_MS)
    assert len(history.told("on_open")) == 1


async def test_when_the_data_ends_an_open_signal_expires_at_the_last_price() -> None:
    history = History([*flat(range(10)), at(10, 43_300.0)], once(LONG))
    (event,) = await history.run()
    assert (event.kind, event.reason) == ("closed", "time_expired")
    assert event.price_close == event.price == pytest.approx((4 * 43_000 + 43_300) / 5)
    assert history.names()[-2:] == ["on_close", "on_write"]


async def test_when_the_data_ends_a_waiting_signal_is_cancelled() -> None:
    history = History(flat(range(10)), once({**LONG, "priceOpen": 42_500.0}))
    (event,) = await history.run()
    assert (event.kind, event.reason) == ("cancelled", "stopped")


async def test_a_run_again_gives_the_same_events() -> None:
    history = History(zigzag(600), lambda symbol, when_ms: dict(LONG))
    assert await history.run() == await history.run() != []


# ---------------------------------------------------------------------- strategies


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_strategy_sees_nothing_newer_than_its_moment(is_async: bool) -> None:
    seen: list[Any] = []
    candles = [at(minute, 43_000.0 + minute) for minute in range(40)]

    async def look(symbol: str, when_ms: int) -> None:
        await asyncio.sleep(0)
        last = await get_candles(symbol, "1m", 3)
        price = await get_average_price(symbol)
        assert all(candle.open_time_ms + MINUTE_MS <= when_ms for candle in last)
        seen.append(
            (len(last), last[-1].open_time_ms + MINUTE_MS == when_ms, price, get_date().timestamp() * 1000 == when_ms)
        )
        assert get_mode() == "backtest"

    history = History(candles, look if is_async else lambda symbol, when_ms: look(symbol, when_ms))
    failures: list[Failure] = []
    history.listeners.listen("error", failures.append)
    await history.run()
    assert failures == []
    assert seen[0] == (1, True, 43_000.0, True)
    assert seen[2] == (3, True, 43_008.0, True)


async def test_what_a_strategy_may_look_at_exists_only_while_it_is_asked() -> None:
    with pytest.raises(InvalidInputError, match="inside a strategy"):
        get_mode()
    await History(flat(range(10)), lambda symbol, when_ms: None).run()
    with pytest.raises(InvalidInputError, match="inside a strategy"):
        get_date()


async def test_candles_asked_for_wrongly_are_the_strategys_error() -> None:
    async def look(symbol: str, when_ms: int) -> None:
        await get_candles(symbol, "1m", 1001)

    history, failures = History(flat(range(3)), look), list[Failure]()
    history.listeners.listen("error", failures.append)
    await history.run()
    assert "1 to 1000" in str(failures[0].error)


async def test_a_strategy_that_raises_is_reported_and_asked_again_at_its_next_slot() -> None:
    def strategy(symbol: str, when_ms: int) -> dict[str, Any]:
        if when_ms < T0 + 5 * MINUTE_MS:
            raise RuntimeError("no data yet")
        return dict(LONG)

    history, failures = History(flat(range(12)), strategy), list[Failure]()
    history.listeners.listen("error", failures.append)
    await history.run()
    assert [(failure.where, str(failure.error), failure.at_ms) for failure in failures] == [
        ("strategy", "no data yet", T0 + MINUTE_MS)
    ]
    assert history.told("on_open")[0].candle_ms == T0 + 5 * MINUTE_MS


async def test_an_invalid_signal_goes_to_the_validation_listeners(caplog: pytest.LogCaptureFixture) -> None:
    history, failures = History(flat(range(12)), turns({**LONG, "priceStopLoss": 1.0}, LONG)), list[Failure]()
    stop = history.listeners.listen("validation", failures.append)
    await history.run()
    assert isinstance(failures[0].error, InvalidSignalError)
    assert len(history.told("on_open")) == 1
    stop()
    await History(flat(range(2)), once({**LONG, "priceStopLoss": 1.0})).run()
    assert "at most 20.0 %" in caplog.text, "without a listener the log has it"


async def test_a_strategy_that_thinks_too_long_proposes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = asyncio.timeout
    monkeypatch.setattr(
        "holdfast.engine.settle.asyncio.timeout", lambda seconds: real(0.001 if seconds == 180 else seconds)
    )

    async def forever(symbol: str, when_ms: int) -> None:
        await asyncio.Event().wait()

    history, failures = History(flat(range(3)), forever), list[Failure]()
    history.listeners.listen("error", failures.append)
    await history.run()
    assert "longer than 180 s" in str(failures[0].error)


# ---------------------------------------------------------------------- both hit


@pytest.mark.parametrize(
    ("reply", "reason"), [("take_profit", "take_profit"), ("stop_loss", "stop_loss"), (7, "stop_loss")]
)
async def test_undecided_asks_the_callback_and_takes_the_worse_when_it_cannot_say(
    monkeypatch: pytest.MonkeyPatch, reply: Any, reason: str
) -> None:
    monkeypatch.setattr("holdfast.rules.params._current", Params(both_hit="undecided"))
    failures: list[Failure] = []

    async def first_hit(signal: Any, candle: Candle) -> Any:
        assert (signal.position, candle.high, candle.low) == ("long", 44_000.0, 42_000.0)
        await asyncio.sleep(0)
        return reply

    history = History([at(0), at(1, high=44_000.0, low=42_000.0), at(2)], once(LONG))
    history.registry.add_strategy(once(LONG), strategy_name="knows", interval="5m", on_both_hit=first_hit)
    history.listeners.listen("error", failures.append)
    names = {**NAMES, "strategy_name": "knows"}
    found = Backtest.run("BTCUSDT", **names, registry=history.registry, listeners=history.listeners)
    assert [(event.reason, event.both_hit) async for event in found] == [(reason, True)]
    assert [failure.where for failure in failures] == ([] if reply == reason else ["on_both_hit"])
    with pytest.raises(InvalidInputError, match="on_both_hit"):
        run(history)


# ---------------------------------------------------------------------- risk


async def test_risk_profiles_see_the_slots_of_the_run_and_reject_by_name() -> None:
    counts: list[int] = []
    rejections: list[RiskRejection] = []
    told: list[Any] = []

    def limit(payload: RiskPayload) -> bool:
        counts.append(payload.active_position_count)
        return len(counts) != 2

    history = History([*flat(range(3)), at(3, high=44_000.0), *flat(range(4, 30))], lambda s, w: dict(LONG))
    history.registry.add_risk(
        risk_name="limit", validations=[{"validate": limit, "note": "enough"}],
        on_rejected=lambda payload, note: told.append(note), on_allowed=lambda payload: told.append("allowed"),
    )  # fmt: skip
    history.registry.add_strategy(lambda s, w: dict(LONG), strategy_name="ruled", interval="5m", risk_name="limit")
    history.listeners.listen("risk", rejections.append)
    names = {**NAMES, "strategy_name": "ruled"}
    found = Backtest.run("BTCUSDT", **names, registry=history.registry, listeners=history.listeners)
    assert [event.reason async for event in found] == ["take_profit", "time_expired"]
    assert counts == [0, 0, 0]
    assert told == ["allowed", "enough", "allowed"]
    assert [(one.risk_name, one.note, one.activation) for one in rejections] == [("limit", "enough", False)]


# ---------------------------------------------------------------------- news


async def test_progress_performance_and_done_are_told() -> None:
    history = History(flat(range(2500)), lambda symbol, when_ms: None)
    told: dict[str, list[Any]] = {"progress": [], "performance": [], "done_backtest": []}
    for topic, kept in told.items():
        history.listeners.listen(topic, kept.append)  # type: ignore[arg-type]
    await history.run()
    progress: list[Progress] = told["progress"]
    assert [one.done for one in progress] == [1000, 2000, 2500, 2500]
    assert progress[-1].percent == 100.0
    performance: Performance = told["performance"][0]
    assert performance.candles == 2500
    assert set(performance.parts) == {"fetch", "strategy", "tell", "step"}
    assert all(0 <= seconds <= performance.seconds for seconds in performance.parts.values())
    assert sum(performance.parts.values()) == pytest.approx(performance.seconds)
    assert told["done_backtest"] == [Done(context=performance.context, mode="backtest", frame_name="frame")]


async def test_listening_changes_nothing_but_brings_ticks_for_quiet_candles() -> None:
    silent = History(zigzag(300), lambda symbol, when_ms: dict(LONG))
    heard = History(zigzag(300), lambda symbol, when_ms: dict(LONG))
    news: list[Any] = []
    heard.listeners.listen("signal_backtest", news.append)
    assert await silent.run() == await heard.run()
    assert silent.log == heard.log
    ticks = [value for value in news if isinstance(value, Tick)]
    decided = {value.at_ms for value in news if not isinstance(value, Tick)} - {T0 + 300 * MINUTE_MS}
    told = [tick.at_ms for tick in ticks]
    assert sorted({*told, *decided}) == [T0 + minute * MINUTE_MS for minute in range(1, 301)]
    assert len(told) == len(set(told))
    assert decided.isdisjoint(told)


async def test_ticks_say_what_is_open_and_how_far_it_has_come() -> None:
    candles = [*flat(range(2)), *flat(range(2, 8), 43_050.0), *flat(range(8, 14), 42_950.0), at(14, high=44_000.0)]
    history, ticks = (
        History([*candles, *flat(range(15, 22))], turns(LONG, {**LONG, "priceOpen": 42_500.0})),
        list[Tick](),
    )
    history.listeners.listen("signal", ticks.append, filter=lambda value: isinstance(value, Tick))
    await history.run()
    told = {(tick.at_ms - T0) // MINUTE_MS - 1: tick for tick in ticks}
    assert [told[minute].kind for minute in (1, 7, 13, 16, 21)] == ["active"] * 3 + ["waiting"] * 2
    assert [told[minute].percent for minute in (1, 7, 13, 16)] == pytest.approx([0.0, 5.0, -5.0, 0.0])
    assert all(tick.signal is not None and tick.signal.is_scheduled == (tick.kind == "waiting") for tick in ticks)
    assert told[7].price == pytest.approx(43_050.0)


async def test_a_long_run_lets_other_tasks_of_the_loop_work() -> None:
    turns_taken = 0

    async def other() -> None:
        nonlocal turns_taken
        while True:
            turns_taken += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await History(flat(range(20_000)), lambda symbol, when_ms: None).run()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert turns_taken > 2


# ---------------------------------------------------------------------- the market


async def test_candles_are_asked_for_again_and_then_the_run_fails_with_one_clear_error() -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    def broken(symbol: str, interval: str, since_ms: int, limit: int) -> Sequence[Candle]:
        raise ConnectionError("exchange gone")

    history = History(flat(range(3)), lambda symbol, when_ms: None)
    history.registry.remove_exchange("binance")
    history.registry.add_exchange(exchange_name="binance", get_candles=broken)
    with pytest.raises(UnavailableError, match="exchange gone"):
        async for _ in run(history, sleep=sleep):
            pass
    assert pauses == [5.0, 5.0]
    assert [one.status for one in Backtest.list()] == ["rejected"]


async def test_no_request_asks_for_more_than_1000_candles_and_onlookers_see_each() -> None:
    seen: list[tuple[int, int]] = []
    history = History(flat(range(2300)), lambda symbol, when_ms: None)
    history.registry.remove_exchange("binance")
    history.registry.add_exchange(
        exchange_name="binance", get_candles=market(flat(range(2300))),
        on_candle_data=lambda symbol, interval, since_ms, limit, candles: seen.append((limit, len(candles))),
    )  # fmt: skip
    await history.run()
    assert seen[1:] == [(1000, 1000), (1000, 1000), (300, 300)]


# ---------------------------------------------------------------------- starting and stopping


async def test_unknown_names_are_refused_at_once() -> None:
    history = History(flat(range(3)), lambda symbol, when_ms: None)
    for name in NAMES:
        with pytest.raises(InvalidInputError, match="there is no"):
            Backtest.run("BTCUSDT", **{**NAMES, name: "other"}, registry=history.registry)
    with pytest.raises(InvalidInputError, match="symbol"):
        Backtest.run("", **NAMES, registry=history.registry)
    assert Backtest.list() == []


async def test_the_same_backtest_does_not_run_twice_at_a_time() -> None:
    history = History([*flat(range(3)), at(3, high=44_000.0), *flat(range(4, 9))], once(LONG))
    first = run(history)
    await anext(first)
    with pytest.raises(InvalidInputError, match="already under way"):
        await anext(run(history))
    await first.aclose()
    assert [one.status for one in Backtest.list()] == ["fulfilled"]
    assert await history.run() == []


async def test_in_the_background_listeners_tell_and_cancel_stops() -> None:
    history, ended = History(zigzag(3000), lambda symbol, when_ms: dict(LONG)), asyncio.Event()
    history.listeners.listen("done_backtest", lambda done: ended.set())
    cancel = Backtest.background("BTCUSDT", **NAMES, registry=history.registry, listeners=history.listeners)
    with pytest.raises(InvalidInputError, match="already under way"):
        Backtest.background("BTCUSDT", **NAMES, registry=history.registry, listeners=history.listeners)
    assert [one.status for one in Backtest.list()] == ["pending"]
    history.listeners.listen("signal_backtest", lambda value: cancel(), once=True, filter=lambda v: v.kind == "opened")
    async with asyncio.timeout(10):
        await ended.wait()
        await asyncio.gather(*Backtest._tasks)
    assert len(history.told("on_open")) == len(history.told("on_close")) == 1
    assert [one.status for one in Backtest.list()] == ["fulfilled"]


def test_without_an_event_loop_there_is_no_background() -> None:
    history = History(flat(range(3)), lambda symbol, when_ms: None)
    with pytest.raises(InvalidInputError, match="running event loop"):
        Backtest.background("BTCUSDT", **NAMES, registry=history.registry)
    assert Backtest.list() == []


async def test_a_background_run_that_fails_is_told_to_exit_listeners() -> None:
    def broken(symbol: str, interval: str, since_ms: int, limit: int) -> Sequence[Candle]:
        raise HoldfastError("closed for ever")

    history, failures = History(flat(range(3)), lambda symbol, when_ms: None), list[Failure]()
    history.registry.remove_exchange("binance")
    history.registry.add_exchange(exchange_name="binance", get_candles=broken)
    history.listeners.listen("exit", failures.append)
    Backtest.background("BTCUSDT", **NAMES, registry=history.registry, listeners=history.listeners)
    async with asyncio.timeout(10):
        await asyncio.gather(*Backtest._tasks)
    assert str(failures[0].error) == "closed for ever"
    assert [one.status for one in Backtest.list()] == ["rejected"]


async def test_stopping_cancels_a_waiting_signal_at_once() -> None:
    history = History(
        [*flat(range(3)), at(3, low=42_500.0), *flat(range(4, 30))], lambda s, w: {**LONG, "priceOpen": 42_500.0}
    )
    history.listeners.listen(
        "signal", lambda value: Backtest.stop("BTCUSDT", "trend"), filter=lambda v: v.kind == "scheduled"
    )
    (event,) = await history.run()
    assert (event.kind, event.reason, event.candle_ms) == ("cancelled", "stopped", T0)
    assert history.told("on_open") == []
    assert Backtest.stop("BTCUSDT", "trend") == 0, "nothing is under way any more"


# ---------------------------------------------------------------------- no storage

STORING = {
    "store", "writer", "spans", "session", "live", "documents", "custom", "urls", "outbox", "recovery", "invariants",
    "backends",
}  # fmt: skip


def test_nothing_that_a_backtest_imports_knows_of_storage() -> None:
    package = Path(holdfast.__file__).parent
    seen, left = set[str](), ["engine.backtest"]
    while left:
        name = left.pop()
        path = package.joinpath(*name.split(".")).with_suffix(".py")
        if name in seen or not path.exists():
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = name.split(".")[: -node.level]
                targets = [node.module] if node.module else [alias.name for alias in node.names]
                left += [".".join([*above, target]) for target in targets]
    assert {name for name in seen if name.rpartition(".")[2] in STORING} == set()
    assert {"engine.frame_run", "rules.signals", "engine.settle"} <= seen


def test_a_program_that_runs_a_backtest_never_loads_storage() -> None:
    program = """
import asyncio, sys
import holdfast
from holdfast.rules.candles import Candle
candles = [Candle(1_700_000_040_000 + n * 60_000, 100, 101, 99, 100, 1) for n in range(50)]
holdfast.add_exchange(exchange_name="e", get_candles=lambda s, i, since, n: [c for c in candles if c[0] >= since][:n])
holdfast.add_frame(frame_name="f", interval="1m", start=candles[0][0], end=candles[-1][0])
@holdfast.add_strategy(strategy_name="s", interval="5m")
def think(symbol, when_ms):
    return dict(position="long", price_take_profit=102, price_stop_loss=98, minute_estimated_time=10)
async def main():
    return [e async for e in holdfast.Backtest.run("X", strategy_name="s", exchange_name="e", frame_name="f")]
assert len(asyncio.run(main())) == 4
print(*sorted(name for name in sys.modules if name.startswith("holdfast.")))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    loaded = {part for name in done.stdout.split() for part in name.split(".")}
    assert "backtest" in loaded
    assert loaded & STORING == set()


# ---------------------------------------------------------------------- real candles


@pytest.mark.candles
async def test_real_candles_run_through_and_every_trade_adds_up() -> None:
    if not REAL.exists():
        pytest.skip(f"the real candles are not there: {REAL}")
    with gzip.open(REAL, "rt") as file:
        rows = [line.split(",") for line in file if line[:1].isdigit()]
    candles = [Candle(int(row[0]), *map(float, row[1:6])) for row in rows[:10_000]]
    prices = {candle.open_time_ms + MINUTE_MS: candle.close for candle in candles}

    def strategy(symbol: str, when_ms: int) -> dict[str, Any] | None:
        close = prices[when_ms]
        side = 1 if when_ms // MINUTE_MS % 2 else -1
        return {
            **(LONG if side == 1 else SHORT),
            "priceTakeProfit": close * (1 + side * 0.01), "priceStopLoss": close * (1 - side * 0.01),
        }  # fmt: skip

    history = History(candles, strategy, interval="15m")
    closed = await history.run()
    assert len(closed) > 50
    assert {event.reason for event in closed} == {"take_profit", "stop_loss", "time_expired"}
    assert [event.signal for event in history.told("on_open")] == [event.signal for event in closed]
    for event in closed:
        assert event.at_ms - event.signal.pending_at <= 61 * MINUTE_MS
