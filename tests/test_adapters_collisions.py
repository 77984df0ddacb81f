"""The pairs of names of BEHAVIOUR §5.2 that meet in the reference: here they never do, on any backend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from backend_list import BACKENDS
from process_store import fresh_process, signal, slot

from holdfast.contract import Survives
from holdfast.documents.adapters import (
    PersistBase,
    PersistPartialAdapter,
    PersistRiskAdapter,
    PersistScheduleAdapter,
    PersistSignalAdapter,
    use_store,
)
from holdfast.rows import Levels
from holdfast.store import Store

__all__ = ["fresh_process"]

CONTEXTS: dict[str, list[tuple[str, str, str]]] = {
    # (symbol, strategy, exchange)
    "K1 a colon in either half": [("BTC:USDT", "x", "e"), ("BTC", "USDT:x", "e")],
    "K1 as it happens": [("BTC/USDT:USDT", "x", "e"), ("BTC/USDT", "USDT:x", "e")],
    "K2 an underscore in either half": [("BTC_USDT", "x", "e"), ("BTC", "USDT_x", "e"), ("BTC_USDT_x", "e", "e")],
    "K2 an underscore before the exchange": [("BTC", "x_y", "e"), ("BTC", "x", "y_e"), ("BTC_x", "y", "e")],
    "K4 a slash": [("BTC/USDT", "x", "e"), ("BTC%2FUSDT", "x", "e"), ("BTCUSDT", "x", "e")],
    "K5 dots": [("..", "x", "e"), ("../signal/BTCUSDT_st", "x", "e"), (".", "x", "e"), ("%2E.", "x", "e")],
    "K5 names of devices": [
        ("CON", "x", "e"),
        ("con", "x", "e"),
        ("CON.", "x", "e"),
        ("a*", "x", "e"),
        ("a", "x", "e"),
    ],
    "K5 case": [("Alpha", "x", "e"), ("alpha", "x", "e"), ("ALPHA", "x", "e")],
    "K5 normal forms": [("\u00e9", "x", "e"), ("e\u0301", "x", "e")],
    "K5 long names": [("a" * 300, "x", "e"), ("a" * 300 + "b", "x", "e"), ("a" * 299, "x", "e")],
    "K7 two exchanges": [("BTCUSDT", "x", "binance"), ("BTCUSDT", "x", "bybit")],
    "K8 one signal id on two symbols": [("BTCUSDT", "x", "e"), ("ETHUSDT", "x", "e")],
    "K9 names of members": [("__proto__", "x", "e"), ("constructor", "x", "e"), ("BTC", "__proto__", "e")],
    "K10 glob characters": [("BTC*", "x", "e"), ("BTC?", "x", "e"), ("BTC[1]", "x", "e"), ("BTC1", "x", "e")],
    "NUL, newline, space": [("a\0", "x", "e"), ("a\n", "x", "e"), ("a ", "x", "e"), ("a", "x", "e")],
}
NAMES = sorted({name for contexts in CONTEXTS.values() for context in contexts for name in context})


@pytest.fixture(params=sorted(BACKENDS))
async def store(request: pytest.FixtureRequest, fresh_process: Path) -> AsyncIterator[Store]:
    made = Store(BACKENDS[request.param](fresh_process), require=Survives.NOTHING)
    use_store(made)
    yield made
    use_store(None)
    await made.close()


async def reopen(store: Store) -> None:
    """Let every answer come from the medium."""
    await store.close()
    await store.open()


def row_of(context: tuple[str, str, str], **changes: Any) -> dict[str, Any]:
    symbol, strategy, exchange = context
    return signal(symbol=symbol, strategyName=strategy, exchangeName=exchange, **changes)


@pytest.mark.parametrize("case", sorted(CONTEXTS))
async def test_contexts_whose_names_look_alike_never_meet(store: Store, case: str) -> None:
    contexts = CONTEXTS[case]
    for number, context in enumerate(contexts):
        await PersistSignalAdapter.write_signal_data(row_of(context, note=f"open {number}"), *context)
        await PersistScheduleAdapter.write_schedule_data(row_of(context, note=f"waits {number}"), *context)
        levels = {"one-id": {"profitLevels": [10 * (number + 1)], "lossLevels": []}}
        await PersistPartialAdapter.write_partial_data(levels, *context)
    await reopen(store)
    for number, context in enumerate(contexts):
        opened = await PersistSignalAdapter.read_signal_data(*context)
        waits = await PersistScheduleAdapter.read_schedule_data(*context)
        assert opened is not None and opened.note == f"open {number}"
        assert waits is not None and waits.note == f"waits {number}"
        found = await PersistPartialAdapter.read_partial_data(*context)
        assert found == {"one-id": Levels(profit_levels=(10 * (number + 1),))}
    await PersistSignalAdapter.write_signal_data(None, *contexts[0])
    await PersistPartialAdapter.write_partial_data(None, *contexts[0])
    for context in contexts[1:]:
        assert await PersistSignalAdapter.read_signal_data(*context)
        assert await PersistPartialAdapter.read_partial_data(*context)
    assert await PersistScheduleAdapter.read_schedule_data(*contexts[0])


async def test_a_waiting_signal_is_never_read_as_an_open_one(store: Store) -> None:
    context = ("BTCUSDT", "st", "e")  # K3
    await PersistScheduleAdapter.write_schedule_data(row_of(context), *context)
    assert await PersistSignalAdapter.read_signal_data(*context) is None
    await PersistSignalAdapter.write_signal_data(row_of(context), *context)
    await PersistScheduleAdapter.write_schedule_data(None, *context)
    assert await PersistSignalAdapter.read_signal_data(*context)


async def test_risk_profiles_whose_names_look_alike_never_meet(store: Store) -> None:
    for name in NAMES:
        await PersistRiskAdapter.write_position_data([slot(f"strategy of {name}", "BTCUSDT")], name)
    await reopen(store)
    for name in NAMES:
        [(_, row)] = await PersistRiskAdapter.read_position_data(name)
        assert row.strategy_name == f"strategy of {name}"
    await PersistRiskAdapter.write_position_data([], NAMES[0])
    assert all([await PersistRiskAdapter.read_position_data(name) for name in NAMES[1:]])


@pytest.mark.parametrize("case", sorted(CONTEXTS))
async def test_positions_whose_names_look_alike_take_a_slot_each(store: Store, case: str) -> None:
    pairs = [(symbol, strategy) for symbol, strategy, _ in CONTEXTS[case]]  # K6
    unique = list(dict.fromkeys(pairs))
    await PersistRiskAdapter.write_position_data([slot(strategy, symbol) for symbol, strategy in unique], "r")
    await reopen(store)
    found = [(row.symbol, row.strategy_name) for _, row in await PersistRiskAdapter.read_position_data("r")]
    assert found == unique


async def test_no_profile_name_reaches_another_domain(store: Store) -> None:
    await PersistSignalAdapter.write_signal_data(signal(), "BTCUSDT", "my-strategy")
    for name in (
        "../signal/BTCUSDT_my-strategy_binance",
        "/etc",
        "signal",
        ".holdfast",
        "..",
        "BTCUSDT_my-strategy_binance",
    ):
        await PersistRiskAdapter.write_position_data([slot("a", "b")], name)
        await PersistRiskAdapter.write_position_data(None, name)
    assert await PersistSignalAdapter.read_signal_data("BTCUSDT", "my-strategy")


async def test_entities_whose_names_or_ids_look_alike_never_meet(store: Store) -> None:
    ids: list[str | int] = [*NAMES, 1, "1", "=1", 10, "01", -1, "-1"]
    for name in ("e", "E", "e_f", "e/f"):
        entity = PersistBase(name)
        for number, entity_id in enumerate(ids):
            await entity.write_value(entity_id, [name, number])
    await reopen(store)
    for name in ("e", "E", "e_f", "e/f"):
        entity = PersistBase(name)
        for number, entity_id in enumerate(ids):
            assert await entity.read_value(entity_id) == [name, number]
        assert {(type(i), i) async for i in entity.keys()} == {(type(i), i) for i in ids}  # noqa: SIM118
    await PersistBase("e").remove_all()
    assert await PersistBase("E").get_count() == await PersistBase("e_f").get_count() == len(ids)


async def test_nothing_outside_the_directory_is_touched(store: Store, fresh_process: Path) -> None:
    outside = set(fresh_process.parent.iterdir())
    for one, other in combinations(["..", "../..", "/", "a/../../b"], 2):
        await PersistSignalAdapter.write_signal_data(
            signal(symbol=one, strategyName=other, exchangeName=one), one, other
        )
        await PersistBase(one).write_value(other, 1)
    await store.close()
    assert set(fresh_process.parent.iterdir()) == outside
    await store.open()
