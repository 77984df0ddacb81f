"""BEHAVIOUR §6, the scenarios that run in a backtest: 14 to 26, 32, 35, 36 (its half), 49. One test each, by number.

Where the design decides otherwise, the test states the decided form: the step tests the high and low of
closed one-minute candles in every mode, and callbacks come after the decision is committed.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from rule_kit import LONG, SHORT, T0, History, at, flat, once, turns

from holdfast.engine.backtest import Backtest
from holdfast.engine.listeners import Failure
from holdfast.rows import Event, Signal
from holdfast.rules.candles import MINUTE_MS

LIMIT_LONG = {**LONG, "priceOpen": 42_500.0}
LIMIT_SHORT = {**SHORT, "priceOpen": 43_500.0}


async def test_scenario_14_two_limit_longs_write_their_rows_and_a_null_each() -> None:
    """Two limit LONGs (target, then stop): the first write is a row, none happens at scheduling."""
    candles = [
        *flat(range(2)), at(2, low=42_500.0), at(3, high=44_000.0), *flat(range(4, 7)),
        at(7, low=42_500.0), at(8, low=42_000.0), *flat(range(9, 12)),
    ]  # fmt: skip
    history = History(candles, turns(LIMIT_LONG, LIMIT_LONG))
    closed = await history.run()
    assert [event.reason for event in closed] == ["take_profit", "stop_loss"]
    first = history.written()[0]
    assert isinstance(first, Signal)
    assert (first.position, first.price_open) == ("long", 42_500.0)
    assert [value is None for value in history.written()] == [False, True, False, True]
    assert history.names()[:2] == ["on_schedule", "on_write"]


async def test_scenario_15_the_written_row_holds_every_field_with_its_value() -> None:
    """The captured row contains position, prices, lifetime, names and both times."""
    history = History([*flat(range(2)), at(2, low=42_500.0), *flat(range(3, 6))], once({**LIMIT_LONG, "note": "why"}))
    await history.run()
    row = history.written()[0]
    assert (row.position, row.price_open, row.price_take_profit, row.price_stop_loss) == (
        "long", 42_500.0, 44_000.0, 42_000.0,
    )  # fmt: skip
    assert (row.minute_estimated_time, row.symbol, row.strategy_name, row.exchange_name, row.note) == (
        60, "BTCUSDT", "trend", "binance", "why",
    )  # fmt: skip
    assert (row.scheduled_at, row.pending_at) == (T0 + MINUTE_MS, T0 + 3 * MINUTE_MS)


async def test_scenario_16_a_short_lifecycle_writes_a_short_row_then_null() -> None:
    """SHORT: the first write is the short row; a null follows the close."""
    history = History([*flat(range(2)), at(2, low=42_000.0), *flat(range(3, 5))], once(SHORT))
    (event,) = await history.run()
    assert event.reason == "take_profit"
    row, cleared = history.written()
    assert row.position == "short"
    assert cleared is None


async def test_scenario_17_each_closed_signal_has_a_null_and_cancelled_ones_never_write() -> None:
    """Target, stop, cancelled and rejected mixed: one null per closed signal, none for the others."""
    candles = [
        *flat(range(1)), at(1, high=44_000.0), *flat(range(2, 5)),  # asked at 0: target
        at(5), at(6, low=42_000.0), *flat(range(7, 10)),  # asked at 5: stop
        at(10), at(11, low=41_900.0), *flat(range(12, 15)),  # asked at 10: through entry and stop: cancelled
        at(15), *flat(range(16, 20)),  # asked at 15: rejected by risk
    ]  # fmt: skip
    history = History(
        candles, turns(LONG, LONG, LIMIT_LONG, {**LONG, "reject": True}),
        risks={"picky": [lambda payload: "reject" not in (payload.pending_signal.extra or {})]},
    )  # fmt: skip
    events: list[Event] = []
    history.listeners.listen("signal", events.append, filter=lambda value: isinstance(value, Event))
    await history.run()
    kinds = [event.kind for event in events]
    assert kinds == ["opened", "closed", "opened", "closed", "scheduled", "cancelled", "rejected"]
    assert [value is None for value in history.written()] == [False, True, False, True]


async def test_scenario_18_the_order_of_write_open_and_close() -> None:
    """One lifecycle: onWrite(row) before onOpen; onWrite(null) after onClose. Decided form: after the commit."""
    history = History([at(0), at(1, high=44_000.0), *flat(range(2, 4))], once(LONG))
    await history.run()
    assert history.names() == ["on_write", "on_open", "on_close", "on_write"]
    assert history.written()[1] is None


async def test_scenario_19_one_open_is_exactly_one_row_write() -> None:
    """One open: exactly one row is written, levels and later candles notwithstanding."""
    history = History([*flat(range(2)), *flat(range(2, 12), 43_600.0), at(12, high=44_000.0)], once(LONG))
    await history.run()
    assert history.told("on_partial_profit")
    assert sum(value is not None for value in history.written()) == 1


async def test_scenario_20_one_close_is_exactly_one_null_write() -> None:
    """One close: exactly one null."""
    history = History([at(0), at(1, low=42_000.0), *flat(range(2, 30))], once(LONG))
    await history.run()
    assert sum(value is None for value in history.written()) == 1


async def test_scenario_21_a_limits_lifetime_counts_from_its_activation() -> None:
    """A limit signal waits, then activates: its lifetime counts from pendingAt, not from scheduledAt."""
    candles = [*flat(range(50)), at(50, low=42_500.0), *flat(range(51, 130))]
    history = History(candles, once(LIMIT_LONG))
    (event,) = await history.run()
    assert event.reason == "time_expired"
    assert event.signal.pending_at - event.signal.scheduled_at == 50 * MINUTE_MS
    assert event.at_ms - event.signal.pending_at == 60 * MINUTE_MS


async def test_scenario_22_a_market_signal_has_both_times_equal() -> None:
    """Market signal: scheduledAt equals pendingAt."""
    history = History(flat(range(3)), once(LONG))
    await history.run()
    row = history.written()[0]
    assert row.scheduled_at == row.pending_at == T0 + MINUTE_MS


async def test_scenario_23_a_limit_that_is_never_reached_is_cancelled_after_two_hours() -> None:
    """Limit never reached: cancelled 120 minutes after scheduledAt, with reason timeout."""
    history = History(flat(range(200)), once(LIMIT_LONG))
    (event,) = await history.run()
    assert (event.kind, event.reason) == ("cancelled", "timeout")
    assert event.at_ms - event.signal.scheduled_at == 120 * MINUTE_MS
    assert [told.id for told in history.told("on_cancel")] == [event.id]
    assert history.written() == []


@pytest.mark.parametrize(("reply", "through"), [(LIMIT_LONG, at(1, low=41_900.0)), (LIMIT_SHORT, at(1, high=44_100.0))])
async def test_scenario_24_price_through_entry_and_stop_cancels(reply: dict[str, Any], through: Any) -> None:
    """Price skips the entry straight through the stop, long and short: onCancel, no onOpen.

    Decided form: a candle whose low (long) or high (short) reaches both the entry and the stop.
    """
    history = History([at(0), through, *flat(range(2, 5))], once(reply))
    (event,) = await history.run()
    assert (event.kind, event.reason) == ("cancelled", "stop_loss")
    assert history.names() == ["on_schedule", "on_cancel"]


@pytest.mark.parametrize("reply", [{**LONG, "priceOpen": 43_100.0}, {**SHORT, "priceOpen": 42_900.0}])
async def test_scenario_25_a_passed_entry_opens_at_once_and_past_the_stop_never(reply: dict[str, Any]) -> None:
    """Entry already passed: opens immediately, without scheduling; with the price beyond the stop it is refused."""
    history = History([at(0), *flat(range(1, 3))], once(reply))
    await history.run()
    assert history.names()[:2] == ["on_write", "on_open"]
    assert history.told("on_open")[0].signal.price_open == reply["priceOpen"]
    beyond = 41_900.0 if reply["position"] == "long" else 44_100.0
    refused, failures = History(flat(range(3), beyond), once(reply)), list[Failure]()
    refused.listeners.listen("validation", failures.append)
    assert await refused.run() == []
    assert refused.log == []
    assert len(failures) == 1


@pytest.mark.parametrize("reply", [LONG, SHORT])
async def test_scenario_26_a_candle_that_holds_both_means_take_profit_and_says_so(reply: dict[str, Any]) -> None:
    """A candle touching both: take_profit. Decided form: ``both_hit`` decides, and the event says that it did."""
    history = History([at(0), at(1, high=44_000.0, low=42_000.0), at(2)], once(reply))
    (event,) = await history.run()
    assert (event.reason, event.both_hit) == ("take_profit", True)
    assert event.price_close == event.signal.price_take_profit


async def test_scenario_32_each_level_is_told_once_ascending_in_tens() -> None:
    """Progress rises to 20 %, falls, rises again: one event per level, only multiples of ten, ascending.

    Decided form: levels follow the price, the VWAP of the last five closed candles.
    """
    candles = [
        *flat(range(2)), *flat(range(2, 8), 43_205.0), *flat(range(8, 14)), *flat(range(14, 20), 43_205.0),
        *flat(range(20, 26), 43_355.0),
    ]  # fmt: skip
    history = History(candles, once(LONG))
    await history.run()
    assert [event.level for event in history.told("on_partial_profit")] == [10, 20, 30]
    assert history.told("on_partial_loss") == []


async def test_scenario_35_stopping_during_an_open_signal_lets_it_complete_first() -> None:
    """Backtest stop during an open signal: it completes first, and nothing further opens."""
    candles = [*flat(range(30)), at(30, high=44_000.0), *flat(range(31, 200))]
    history = History(candles, lambda symbol, when_ms: dict(LONG))
    history.listeners.listen(
        "signal",
        lambda event: Backtest.stop("BTCUSDT", "trend"),
        once=True,
        filter=lambda value: value.kind == "opened",
    )
    (event,) = await history.run()
    assert (event.reason, event.candle_ms) == ("take_profit", T0 + 30 * MINUTE_MS)
    assert len(history.told("on_open")) == 1


async def test_scenario_36_three_finished_backtests_are_fulfilled() -> None:
    """Three finished backtests: the list shows three, all fulfilled. (The live half is with the engine's scenarios.)"""
    history = History(flat(range(300)), lambda symbol, when_ms: None)
    ended: list[Any] = []
    history.listeners.listen("done_backtest", ended.append)
    names: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "binance", "frame_name": "frame"}
    for symbol in ("BTCUSDT", "ETHUSDT", "XRPUSDT"):
        Backtest.background(symbol, **names, registry=history.registry, listeners=history.listeners)
    assert [one.status for one in Backtest.list()] == ["pending"] * 3
    async with asyncio.timeout(10):
        await asyncio.gather(*Backtest._tasks)
    assert [(one.symbol, one.status) for one in Backtest.list()] == [
        (symbol, "fulfilled") for symbol in ("BTCUSDT", "ETHUSDT", "XRPUSDT")
    ]
    assert len(ended) == 3


async def test_scenario_49_a_backtest_makes_no_backend_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backtest: zero backend calls in any domain, and no file is made."""
    from holdfast.backends import file, memory

    calls: list[str] = []
    for kind in (memory.MemoryBackend, file.FileBackend):
        for name in ("open", "read", "commit", "head", "keys", "scopes", "close"):
            monkeypatch.setattr(kind, name, lambda *_, name=name, **__: calls.append(name))
    monkeypatch.chdir(tmp_path)
    candles = [*flat(range(2)), *flat(range(2, 12), 43_600.0), at(12, high=44_000.0), *flat(range(13, 200))]
    history = History(candles, turns(LONG, LIMIT_LONG, LIMIT_LONG), risks={"any": [lambda payload: True]})
    events = await history.run()
    assert {event.kind for event in events} == {"closed", "cancelled"}
    assert history.told("on_partial_profit")
    assert calls == []
    assert [*tmp_path.iterdir()] == []  # noqa: ASYNC240
