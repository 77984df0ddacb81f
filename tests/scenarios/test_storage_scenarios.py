"""The storage scenarios of BEHAVIOUR §6, by number. Where DESIGN decides otherwise, the docstring says so."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from process_store import fresh_process, signal, slot

from holdfast.contract import KeyPrefix, Op
from holdfast.documents.adapters import (
    PersistBase,
    PersistPartialAdapter,
    PersistRiskAdapter,
    PersistScheduleAdapter,
    PersistSignalAdapter,
    close_stores,
    default_store,
)
from holdfast.domains import context_key, risk_key
from holdfast.errors import ConflictError, CorruptedError, HeldError, NotFoundError
from holdfast.names import Context
from holdfast.quarantine import kept_bytes
from holdfast.rows import Levels, Quarantined, RiskPosition, Signal

__all__ = ["fresh_process"]
pytestmark = pytest.mark.usefixtures("fresh_process")

PAIR = ("BTCUSDT", "my-strategy")


class Watched:
    """A user's class that shows what it was given."""

    stored: ClassVar[dict[tuple[str, str], Any]] = {}

    def __init__(self, entity_name: str, base_dir: str) -> None:
        self.entity_name = entity_name

    async def wait_for_init(self, initial: bool) -> None: ...

    async def has_value(self, entity_id: str) -> bool:
        return (self.entity_name, entity_id) in self.stored

    async def read_value(self, entity_id: str) -> Any:
        return self.stored[self.entity_name, entity_id]

    async def write_value(self, entity_id: str, entity: Any) -> None:
        self.stored[self.entity_name, entity_id] = entity


@pytest.fixture(autouse=True)
def nothing_stored() -> None:
    Watched.stored.clear()


async def positions(risk_name: str) -> list[tuple[str, str]]:
    found = await PersistRiskAdapter.read_position_data(risk_name)
    return [(row.strategy_name, row.symbol) for _, row in found]


@pytest.mark.parametrize("custom", [False, True])
async def test_scenario_27_a_written_risk_list_reads_back_identical_and_ordered(custom: bool) -> None:
    """The class sees the id ``positions`` and a list; it has a few members more than the documents' four."""
    if custom:
        PersistRiskAdapter.use_persist_risk_adapter(Watched)
    pairs = [slot("strategy2", "ETHUSDT", 2), slot("strategy1", "BTCUSDT", 1)]
    await PersistRiskAdapter.write_position_data(pairs, "test-risk")
    found = await PersistRiskAdapter.read_position_data("test-risk")
    assert [name for name, _ in found] == [name for name, _ in pairs]
    for (_, row), (_, plain) in zip(found, pairs, strict=True):
        assert (row.strategy_name, row.exchange_name, row.open_timestamp) == (
            plain["strategyName"], plain["exchangeName"], plain["openTimestamp"]
        )  # fmt: skip
        assert row.extra == {"signal": None}
    if custom:
        assert list(Watched.stored) == [("test-risk", "positions")]
        assert isinstance(Watched.stored["test-risk", "positions"], list)


async def test_scenario_28_a_map_of_positions_keeps_size_keys_and_values() -> None:
    """DESIGN: positions are rows; the map is what a user makes of the pairs."""
    given = {f"s{n}:C{n}": slot(f"s{n}", f"C{n}", n)[1] for n in range(12)}
    await PersistRiskAdapter.write_position_data(given.items(), "test-risk")
    back = dict(await PersistRiskAdapter.read_position_data("test-risk"))
    assert list(back) == list(given)
    await PersistRiskAdapter.write_position_data(back.items(), "test-risk")
    again = dict(await PersistRiskAdapter.read_position_data("test-risk"))
    assert again == back and {row.open_timestamp for row in again.values()} == set(range(12))


@pytest.mark.parametrize("custom", [False, True])
async def test_scenario_29_a_second_risk_write_fully_replaces_the_first(custom: bool) -> None:
    if custom:
        PersistRiskAdapter.use_persist_risk_adapter(Watched)
    await PersistRiskAdapter.write_position_data([slot("a", "BTCUSDT"), slot("b", "ETHUSDT")], "r")
    await PersistRiskAdapter.write_position_data([slot("c", "SOLUSDT")], "r")
    assert await positions("r") == [("c", "SOLUSDT")]
    await PersistRiskAdapter.write_position_data([], "r")
    assert await positions("r") == []


async def test_scenario_30_two_risk_names_through_one_class_read_only_their_own() -> None:
    PersistRiskAdapter.use_persist_risk_adapter(Watched)
    await PersistRiskAdapter.write_position_data([slot("a", "BTCUSDT")], "one")
    await PersistRiskAdapter.write_position_data([slot("b", "ETHUSDT")], "two")
    assert await positions("one") == [("a", "BTCUSDT")] and await positions("two") == [("b", "ETHUSDT")]
    assert set(Watched.stored) == {("one", "positions"), ("two", "positions")}


@pytest.mark.parametrize("custom", [False, True])
async def test_scenario_31_slots_are_counted_by_profile_and_removed_by_strategy_and_symbol(custom: bool) -> None:
    """DESIGN: one row for each position, added and removed by commits; so two strategies cannot lose each other's."""
    if custom:
        PersistRiskAdapter.use_persist_risk_adapter(Watched)
    store = await default_store()
    contexts = [Context("binance", symbol, strategy) for symbol, strategy in (("A", "s"), ("B", "s"), ("A", "t"))]

    async def add(context: Context, risk_name: str) -> None:
        row = RiskPosition(
            strategy_name=context.strategy_name, exchange_name="binance", symbol=context.symbol, open_timestamp=1
        )
        key = risk_key(risk_name, context)
        await store.writer(str(context)).commit({key: row}, {key: 0})

    await asyncio.gather(*(add(context, "one") for context in contexts))
    await add(contexts[0], "two")
    assert len(await positions("one")) == 3 and len(await positions("two")) == 1
    await store.writer("x").commit({risk_key("one", contexts[0]): None})
    assert sorted(await positions("one")) == [("s", "B"), ("t", "A")] and await positions("two") == [("s", "A")]


async def test_scenario_36a_a_removed_object_is_gone_and_reading_it_raises() -> None:
    entity = PersistBase("test-entity", "./logs/test")
    await entity.wait_for_init(True)
    await entity.write_value("key1", {"data": "value1", "n": [1.5, None]})
    assert await entity.read_value("key1") == {"data": "value1", "n": [1.5, None]}
    await entity.remove_value("key1")
    assert not await entity.has_value("key1")
    with pytest.raises(NotFoundError):
        await entity.read_value("key1")


async def test_scenario_36b_a_signal_is_read_back_equal_after_all_instances_were_dropped() -> None:
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    await PersistSignalAdapter.clear()
    await close_stores()
    assert await PersistSignalAdapter.read_signal_data(*PAIR) == msgspec.convert(signal(), Signal)


async def test_scenario_41_a_temporary_file_is_swept_and_never_listed(fresh_process: Path) -> None:
    """DESIGN: under the directory lock every temporary file is a leftover, whatever its age: it is swept.

    Files of the reference's names are not ours: they are left alone, and nothing is read from them.
    """
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    await close_stores()
    directory = fresh_process / "dump/data/signal/BTCUSDT_my-strategy_binance"
    [view] = directory.glob("*.json")
    text, ours, foreign = view.read_text(), directory / ".holdfast.tmp", directory / ".tmp-0123456789ab-BTCUSDT.json"
    ours.write_text(text)
    foreign.write_text(text)
    store = await default_store()
    assert await store.keys() == [context_key("signal", Context("binance", *PAIR))]
    assert await PersistBase("BTCUSDT_my-strategy_binance", "./dump/data/signal/").get_count() == 1
    assert await PersistSignalAdapter.read_signal_data(*PAIR) == msgspec.convert(signal(), Signal)
    await close_stores()
    assert not ours.exists() and foreign.exists() and view.read_text() == text


async def test_scenario_42_a_corrupt_row_is_kept_reported_and_stops_only_its_key() -> None:
    """DESIGN: what is stored is moved to quarantine by a commit, its bytes kept whole."""
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    await PersistSignalAdapter.write_signal_data(signal(symbol="ETHUSDT"), "ETHUSDT", "my-strategy")
    store = await default_store()
    key = context_key("signal", Context("binance", *PAIR))
    await store.home.backend.commit("main", {key: b'{"id": "s-1", "pri'}, {}, op=Op("vandal", 1))
    with pytest.raises(CorruptedError, match="quarantine") as caught:
        await PersistSignalAdapter.read_signal_data(*PAIR)
    assert caught.value.key == key
    kept = [loaded.row for loaded in (await store.scan("quarantine")).values()]
    assert kept_bytes([row for row in kept if isinstance(row, Quarantined)]) == b'{"id": "s-1", "pri'
    assert await PersistSignalAdapter.read_signal_data("ETHUSDT", "my-strategy")
    await PersistScheduleAdapter.write_schedule_data(signal(), *PAIR)
    assert await PersistScheduleAdapter.read_schedule_data(*PAIR)


async def test_scenario_44_names_that_look_alike_stay_apart_in_all_four_domains() -> None:
    """The whole table, under every backend, is in ``tests/test_adapters_collisions.py``; this is its core."""
    pairs = [("BTC_USDT", "x"), ("BTC", "USDT_x"), ("BTC:USDT", "x"), ("BTC", "USDT:x"), ("BTC/USDT", "x"), ("..", "x")]
    for number, (symbol, strategy) in enumerate(pairs):
        row = signal(symbol=symbol, strategyName=strategy, note=str(number))
        await PersistSignalAdapter.write_signal_data(row, symbol, strategy)
        await PersistScheduleAdapter.write_schedule_data({**row, "note": f"waits {number}"}, symbol, strategy)
        levels = {"s": {"profitLevels": [number], "lossLevels": []}}
        await PersistPartialAdapter.write_partial_data(levels, symbol, strategy)
        await PersistRiskAdapter.write_position_data([slot(strategy, symbol)], f"{symbol}_{strategy}")
    await close_stores()
    for number, (symbol, strategy) in enumerate(pairs):
        opened = await PersistSignalAdapter.read_signal_data(symbol, strategy)
        waits = await PersistScheduleAdapter.read_schedule_data(symbol, strategy)
        assert opened is not None and opened.note == str(number)
        assert waits is not None and waits.note == f"waits {number}"
        levels_read = await PersistPartialAdapter.read_partial_data(symbol, strategy)
        assert levels_read == {"s": Levels(profit_levels=(number,))}


_SECOND = """
import asyncio
from holdfast.documents.adapters import PersistSignalAdapter
from holdfast.errors import HeldError
async def main():
    try:
        await PersistSignalAdapter.read_signal_data("BTCUSDT", "my-strategy")
    except HeldError as error:
        print("refused:", error)
asyncio.run(main())
"""


async def test_scenario_46_a_second_process_on_the_same_directory_is_refused(fresh_process: Path) -> None:
    """DESIGN: a directory belongs to one process; within one, a writer that was overtaken is refused by its guard."""
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    command = [sys.executable, "-c", _SECOND]
    second = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, cwd=fresh_process)
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith("refused:") and str(fresh_process) in second.stdout
    store = await default_store()
    key = context_key("signal", Context("binance", *PAIR))
    loaded = await store.get(key)
    assert loaded is not None
    await store.writer("new owner").commit({key: loaded.row}, {key: loaded.version})
    with pytest.raises(ConflictError):
        await store.writer("old owner").commit({key: None}, {key: loaded.version})
    await close_stores()
    second = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, cwd=fresh_process)
    assert second.stdout == "" and second.returncode == 0, second.stderr


async def test_scenario_46_the_holder_is_named_to_the_second_one_in_this_process(fresh_process: Path) -> None:
    """Also two stores of one process: the second is refused."""
    from holdfast.store import Store
    from holdfast.urls import open_backend

    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    second = Store(open_backend(str(fresh_process / "dump/data")))
    with pytest.raises(HeldError):
        await second.open()
    await second.open(read_only=True)
    assert await second.keys(KeyPrefix("signal"))
    await second.close()


async def test_scenario_47_a_backend_swapped_after_use_is_used_by_the_next_call() -> None:
    await PersistSignalAdapter.write_signal_data(signal(note="files"), *PAIR)
    PersistSignalAdapter.use_persist_signal_adapter(Watched)
    assert await PersistSignalAdapter.read_signal_data(*PAIR) is None
    await PersistSignalAdapter.write_signal_data(signal(note="mine"), *PAIR)
    assert Watched.stored["BTCUSDT_my-strategy_binance", "BTCUSDT"]["note"] == "mine"
    PersistSignalAdapter.use_json()
    row = await PersistSignalAdapter.read_signal_data(*PAIR)
    assert row is not None and row.note == "files"
