"""The four domain adapters."""

from __future__ import annotations

import asyncio
import os
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from process_store import ADAPTERS, fresh_process, signal, slot

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import KeyPrefix, Op, Survives
from holdfast.documents.adapters import (
    PersistBase,
    PersistPartialAdapter,
    PersistRiskAdapter,
    PersistScheduleAdapter,
    PersistSignalAdapter,
    close_stores,
    current_routes,
    default_store,
    lent_store,
    use_store,
)
from holdfast.domains import context_key
from holdfast.errors import CorruptedError, FailedError, InvalidInputError, UnavailableError
from holdfast.rows import Levels, RiskPosition, ScheduledSignal, Signal
from holdfast.store import Store
from holdfast.urls import open_backend

__all__ = ["fresh_process"]
pytestmark = pytest.mark.usefixtures("fresh_process")

PAIR = ("BTCUSDT", "my-strategy")
ROW = msgspec.convert(signal(), Signal)
BTC = ROW.context


class Kept:
    """A user's class over a dict; it remembers what it was told."""

    values: ClassVar[dict[tuple[str, str, str], Any]] = {}
    made: ClassVar[list[str]] = []
    closed: ClassVar[list[str]] = []

    def __init_subclass__(cls) -> None:
        cls.values, cls.made, cls.closed = {}, [], []

    def __init__(self, entity_name: str, base_dir: str) -> None:
        self.entity_name, self.base_dir = entity_name, base_dir
        self.made.append(entity_name)

    async def wait_for_init(self, initial: bool) -> None:
        assert initial

    async def has_value(self, entity_id: str) -> bool:
        return (self.base_dir, self.entity_name, entity_id) in self.values

    async def read_value(self, entity_id: str) -> Any:
        return self.values[self.base_dir, self.entity_name, entity_id]

    async def write_value(self, entity_id: str, entity: Any) -> None:
        self.values[self.base_dir, self.entity_name, entity_id] = entity

    async def close(self) -> None:
        self.closed.append(self.entity_name)


async def test_a_plain_mapping_is_written_and_a_row_is_read() -> None:
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    row = await PersistSignalAdapter.read_signal_data(*PAIR)
    assert row == ROW and isinstance(row, Signal)
    assert await PersistScheduleAdapter.read_schedule_data(*PAIR) is None
    await PersistSignalAdapter.write_signal_data(msgspec.structs.replace(ROW, note="row"), *PAIR)
    changed = await PersistSignalAdapter.read_signal_data(*PAIR)
    assert changed is not None and changed.note == "row"
    await PersistSignalAdapter.write_signal_data(None, *PAIR)
    assert await PersistSignalAdapter.read_signal_data(*PAIR) is None


async def test_the_engine_finds_what_the_adapters_wrote() -> None:
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    store = await default_store()
    loaded = await store.get(context_key("signal", BTC))
    assert loaded is not None and loaded.row == ROW


async def test_a_schedule_takes_a_signal_or_a_mapping() -> None:
    await PersistScheduleAdapter.write_schedule_data(signal(_isScheduled=True), *PAIR)
    row = await PersistScheduleAdapter.read_schedule_data(*PAIR)
    assert isinstance(row, ScheduledSignal) and row.is_scheduled
    await PersistScheduleAdapter.write_schedule_data(ROW, *PAIR)
    assert await PersistSignalAdapter.read_signal_data(*PAIR) is None


async def test_members_that_are_not_known_are_kept() -> None:
    await PersistSignalAdapter.write_signal_data(signal(myIndicator=[1, {"x": None}]), *PAIR)
    row = await PersistSignalAdapter.read_signal_data(*PAIR)
    assert row is not None and row.extra == {"myIndicator": [1, {"x": None}]}


async def test_levels_are_written_and_read_by_signal_id() -> None:
    assert await PersistPartialAdapter.read_partial_data(*PAIR) == {}
    levels: dict[str, Any] = {"s-1": {"profitLevels": [10, 20], "lossLevels": []}, "s-2": Levels(loss_levels=(10,))}
    await PersistPartialAdapter.write_partial_data(levels, *PAIR)
    found = await PersistPartialAdapter.read_partial_data(*PAIR)
    assert found == {"s-1": Levels(profit_levels=(10, 20)), "s-2": Levels(loss_levels=(10,))}
    await PersistPartialAdapter.write_partial_data(found, *PAIR)
    assert await PersistPartialAdapter.read_partial_data(*PAIR) == found
    empty: dict[str, Any] = {}
    for nothing in (empty, None):
        await PersistPartialAdapter.write_partial_data(found, *PAIR)
        await PersistPartialAdapter.write_partial_data(nothing, *PAIR)
        assert await PersistPartialAdapter.read_partial_data(*PAIR) == {}


async def test_an_exchange_that_is_not_named_is_the_only_one_stored() -> None:
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    await PersistSignalAdapter.write_signal_data(signal(exchangeName="bybit"), *PAIR)
    with pytest.raises(InvalidInputError, match="binance, bybit"):
        await PersistSignalAdapter.read_signal_data(*PAIR)
    with pytest.raises(InvalidInputError, match="exchange_name="):
        await PersistSignalAdapter.write_signal_data(None, *PAIR)
    row = await PersistSignalAdapter.read_signal_data(*PAIR, "bybit")
    assert row is not None and row.exchange_name == "bybit"
    await PersistSignalAdapter.write_signal_data(None, *PAIR, "bybit")
    assert await PersistSignalAdapter.read_signal_data(*PAIR) == ROW


async def test_a_row_without_an_exchange_lies_under_the_documents_own_name() -> None:
    bare = {name: value for name, value in signal().items() if name != "exchangeName"}
    await PersistSignalAdapter.write_signal_data(bare, *PAIR)
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    row = await PersistSignalAdapter.read_signal_data(*PAIR)
    assert row is not None and row.exchange_name == ""
    assert await (await default_store()).keys(KeyPrefix("signal", "BTCUSDT_my-strategy"))


@pytest.mark.parametrize("empty", ["", None])
async def test_an_exchange_that_is_empty_in_the_row_is_the_one_that_was_named(empty: str | None) -> None:
    plain = {**signal(), "exchangeName": empty}
    await PersistSignalAdapter.write_signal_data(plain, "BTCUSDT", "my-strategy", "binance")
    row = await PersistSignalAdapter.read_signal_data("BTCUSDT", "my-strategy")
    assert row is not None and row.exchange_name == "binance"


async def test_very_long_names_find_their_exchange_too() -> None:
    long = "s" * 300
    await PersistSignalAdapter.write_signal_data(signal(strategyName=long), "BTCUSDT", long)
    row = await PersistSignalAdapter.read_signal_data("BTCUSDT", long)
    assert row is not None and row.strategy_name == long


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (signal(symbol="ETHUSDT"), "ETHUSDT"),
        (signal(strategyName="other"), "other"),
        (signal(priceOpen=float("nan")), "finite"),
        (signal(priceOpen=Decimal("1")), "Decimal"),
        (signal(priceOpen="1"), "priceOpen"),
        (signal(scheduledAt=2**70), "64 bits"),
        (signal(position="up"), "position"),
        (signal(note="x" * 9_000_000), "at most"),
        ({"id": "x"}, "required"),
        ([signal()], "list"),
        ("text", "str"),
        (RiskPosition(strategy_name="a", exchange_name="", symbol="b", open_timestamp=1), "signal"),
    ],
)
async def test_a_row_that_cannot_be_used_is_refused_by_name_and_nothing_is_written(row: Any, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        await PersistSignalAdapter.write_signal_data(row, *PAIR)
    assert await (await default_store()).keys() == []


async def test_names_that_are_no_text_and_exchanges_that_disagree_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="symbol"):
        await PersistSignalAdapter.read_signal_data(5, "x")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="empty"):
        await PersistSignalAdapter.read_signal_data("", "x")
    with pytest.raises(InvalidInputError, match="bybit"):
        await PersistSignalAdapter.write_signal_data(signal(), *PAIR, "bybit")
    with pytest.raises(InvalidInputError, match="risk_name"):
        await PersistRiskAdapter.read_position_data(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("positions", "says"),
    [
        ({"a:b": {}}, "list of"),
        ("text", "list of"),
        ([["a:b"]], "pair"),
        ([["a:b", 5]], "int"),
        ([slot("a", "b"), slot("a", "b")], "twice"),
        ([["b:a", slot("a", "b")[1]]], "strategyName:symbol"),
        ([["a:b", {**slot("a", "b")[1], "openTimestamp": "now"}]], "openTimestamp"),
        ([["a:b", {**slot("a", "b")[1], "symbol": "c"}]], "disagree"),
    ],
)
async def test_a_risk_list_that_cannot_be_used_is_refused_and_nothing_is_written(positions: Any, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        await PersistRiskAdapter.write_position_data(positions, "r")
    assert await PersistRiskAdapter.read_position_data("r") == []


async def test_positions_whose_pair_reads_the_same_stay_two() -> None:
    pairs = [slot("trend:BTC/USDT", "USDT"), slot("trend", "BTC/USDT:USDT")]
    await PersistRiskAdapter.write_position_data(pairs, "r")
    found = await PersistRiskAdapter.read_position_data("r")
    assert [name for name, _ in found] == ["trend:BTC/USDT:USDT"] * 2
    assert [row.symbol for _, row in found] == ["USDT", "BTC/USDT:USDT"]
    await PersistRiskAdapter.write_position_data(found[1:], "r")
    assert [row.symbol for _, row in await PersistRiskAdapter.read_position_data("r")] == ["BTC/USDT:USDT"]


async def test_a_registered_class_holds_the_domain_at_once() -> None:
    class Mine(Kept): ...

    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    PersistSignalAdapter.use_persist_signal_adapter(Mine)
    assert list(current_routes()) == ["signal"]
    assert await PersistSignalAdapter.read_signal_data(*PAIR) is None
    await PersistSignalAdapter.write_signal_data(signal(note="mine"), *PAIR)
    assert Mine.values == {("./dump/data/signal/", "BTCUSDT_my-strategy_binance", "BTCUSDT"): signal(note="mine")}
    store = await default_store()
    loaded = await store.get(context_key("signal", BTC))
    assert loaded is not None and isinstance(loaded.row, Signal) and loaded.row.note == "mine"
    PersistSignalAdapter.use_json()
    assert await PersistSignalAdapter.read_signal_data(*PAIR) == ROW
    assert "BTCUSDT_my-strategy_binance" in Mine.closed  # what was memoised before is closed and gone


async def test_a_store_that_is_in_use_sees_a_registration_at_once() -> None:
    class Mine(Kept): ...

    store = await default_store()
    await store.writer("engine").commit({context_key("signal", BTC): ROW})
    PersistSignalAdapter.use_persist_signal_adapter(Mine)
    assert not store.guarantees.atomic
    await store.writer("engine").commit({context_key("signal", BTC): ROW})
    assert Mine.values
    PersistSignalAdapter.use_json()
    assert store.guarantees.atomic


async def test_a_store_that_was_passed_in_sees_a_registration_too() -> None:
    class Mine(Kept): ...

    store = Store(MemoryBackend(), require=Survives.NOTHING)
    use_store(store)
    PersistSignalAdapter.use_persist_signal_adapter(Mine)
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    assert Mine.values and await store.get(context_key("signal", BTC))
    PersistSignalAdapter.use_json()
    assert await store.get(context_key("signal", BTC)) is None
    use_store(None)
    await store.close()


async def test_clear_forgets_instances_as_a_restart_would_and_the_data_stay() -> None:
    class Mine(Kept): ...

    PersistSignalAdapter.use_persist_signal_adapter(Mine)
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    made = len(Mine.made)
    PersistSignalAdapter.clear()
    assert await PersistSignalAdapter.read_signal_data(*PAIR) == ROW
    assert sorted(Mine.closed) == sorted(Mine.made[:made]) and len(Mine.made) > made
    await PersistSignalAdapter.clear()
    assert sorted(Mine.closed) == sorted(Mine.made)


async def test_clear_closes_the_files_and_the_next_call_opens_them_again(fresh_process: Path) -> None:
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    await PersistSignalAdapter.clear()
    other = Store(open_backend(str(fresh_process / "dump/data")))
    await other.open()  # nobody holds the directory
    await other.close()
    assert await PersistSignalAdapter.read_signal_data(*PAIR) == ROW


async def test_clear_leaves_a_store_that_a_run_holds_open() -> None:
    async with lent_store() as store:
        for adapter in ADAPTERS:
            await adapter.clear()
        assert await store.keys() == [] and await default_store() is store
    await PersistSignalAdapter.clear()
    assert not store.is_open


async def test_a_dummy_discards_writes_and_has_nothing() -> None:
    for adapter in ADAPTERS:
        adapter.use_dummy()
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    await PersistScheduleAdapter.write_schedule_data(signal(), *PAIR)
    await PersistRiskAdapter.write_position_data([slot("a", "b")], "r")
    await PersistPartialAdapter.write_partial_data({"s": Levels()}, *PAIR)
    assert await PersistSignalAdapter.read_signal_data(*PAIR) is None
    assert await PersistScheduleAdapter.read_schedule_data(*PAIR) is None
    assert await PersistRiskAdapter.read_position_data("r") == []
    assert await PersistPartialAdapter.read_partial_data(*PAIR) == {}
    assert await (await default_store()).unrouted().keys() == []


@pytest.mark.parametrize("cls", [object, None, 5, Kept("a", "b"), lambda *_: None])
async def test_what_is_no_persistence_class_is_refused_and_nothing_changes(cls: Any) -> None:
    with pytest.raises(InvalidInputError):
        PersistSignalAdapter.use_persist_signal_adapter(cls)
    assert current_routes() == {}


async def test_a_class_that_raises_is_one_clear_error() -> None:
    class Broken(Kept):
        async def has_value(self, entity_id: str) -> bool:
            raise ConnectionError("no route")

    PersistSignalAdapter.use_persist_signal_adapter(Broken)
    with pytest.raises(UnavailableError, match=r"Broken.*no route") as caught:
        await PersistSignalAdapter.read_signal_data(*PAIR, "binance")
    assert isinstance(caught.value.__cause__, ConnectionError)


async def test_a_damaged_row_stops_its_key_until_a_new_one_is_written() -> None:
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    await PersistSignalAdapter.write_signal_data(signal(symbol="ETHUSDT"), "ETHUSDT", "my-strategy")
    store = await default_store()
    await store.home.backend.commit("main", {context_key("signal", BTC): b"torn"}, {}, op=Op("vandal", 1))
    for _ in range(2):
        with pytest.raises(CorruptedError):
            await PersistSignalAdapter.read_signal_data(*PAIR)
    assert await PersistSignalAdapter.read_signal_data("ETHUSDT", "my-strategy")
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    assert await PersistSignalAdapter.read_signal_data(*PAIR) == ROW and not store.damaged
    await PersistSignalAdapter.write_signal_data(None, *PAIR)
    assert await PersistSignalAdapter.read_signal_data(*PAIR) is None
    assert len(await store.keys(KeyPrefix("quarantine"))) == 1


async def test_a_damaged_slot_stops_its_profile_only() -> None:
    await PersistRiskAdapter.write_position_data([slot("a", "b"), slot("c", "d")], "r")
    await PersistRiskAdapter.write_position_data([slot("a", "b")], "other")
    store = await default_store()
    key = (await store.keys(KeyPrefix("risk", "r")))[0]
    await store.home.backend.commit("main", {key: b"torn"}, {}, op=Op("vandal", 1))
    for _ in range(2):
        with pytest.raises(CorruptedError):
            await PersistRiskAdapter.read_position_data("r")
    assert len(await PersistRiskAdapter.read_position_data("other")) == 1
    await PersistRiskAdapter.write_position_data([slot("a", "b")], "r")
    assert len(await PersistRiskAdapter.read_position_data("r")) == 1


async def test_overlapping_writes_end_on_the_last_call() -> None:
    for round_ in range(20):
        await asyncio.gather(
            *(PersistSignalAdapter.write_signal_data(signal(note=f"{round_}-{n}"), *PAIR) for n in range(20)),
            *(PersistRiskAdapter.write_position_data([slot("a", f"{n}")], "r") for n in range(20)),
        )
        row = await PersistSignalAdapter.read_signal_data(*PAIR)
        assert row is not None and row.note == f"{round_}-19"
        assert [name for name, _ in await PersistRiskAdapter.read_position_data("r")] == ["a:19"]


async def test_the_default_directory_is_resolved_once(
    fresh_process: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    os.chdir(elsewhere)
    await PersistSignalAdapter.clear()
    assert await PersistSignalAdapter.read_signal_data(*PAIR) == ROW
    assert (fresh_process / "dump/data/.holdfast").is_dir() and not list(elsewhere.iterdir())


async def test_the_default_store_can_be_another_directory_a_url_or_a_store(tmp_path: Path) -> None:
    await PersistSignalAdapter.write_signal_data(signal(note="first"), *PAIR)
    for place in (tmp_path / "other", str(tmp_path / "third"), "memory:", f"file:{tmp_path}/fourth"):
        use_store(place)
        assert await PersistSignalAdapter.read_signal_data(*PAIR) is None
        await PersistSignalAdapter.write_signal_data(signal(note=str(place)), *PAIR)
    mine = Store(MemoryBackend(), require=Survives.NOTHING)
    use_store(mine)
    await PersistSignalAdapter.write_signal_data(signal(note="mine"), *PAIR)
    await close_stores()
    assert mine.is_open and await mine.keys()
    use_store(None)
    row = await PersistSignalAdapter.read_signal_data(*PAIR)
    assert row is not None and row.note == "first"
    for bad in ("", "a\0b", 5, b"x"):
        with pytest.raises(InvalidInputError):
            use_store(bad)  # type: ignore[arg-type]


def test_it_works_from_one_event_loop_to_the_next() -> None:
    async def write(note: str) -> None:
        await asyncio.gather(*(PersistSignalAdapter.write_signal_data(signal(note=note), *PAIR) for _ in range(5)))

    async def read() -> str | None:
        row = await PersistSignalAdapter.read_signal_data(*PAIR)
        return None if row is None else row.note

    for note in ("one", "two", "three"):  # each loop ends without closing anything
        asyncio.run(write(note))
        assert asyncio.run(read()) == note
    asyncio.run(close_stores())


async def test_the_documents_class_shows_the_adapters_rows() -> None:
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    shown = PersistBase("BTCUSDT_my-strategy_binance", "./dump/data/signal/")
    assert await shown.read_value("BTCUSDT") == signal() and [v async for v in shown] == [signal()]
    await shown.write_value("BTCUSDT", signal(note="by hand"))
    row = await PersistSignalAdapter.read_signal_data(*PAIR)
    assert row is not None and row.note == "by hand"
    await PersistRiskAdapter.write_position_data([slot("a", "b"), slot("c", "d")], "r")
    risk = PersistBase("r", "./dump/data/risk/")
    assert [name for name, _ in await risk.read_value("positions")] == ["a:b", "c:d"]
    await risk.write_value("positions", [slot("e", "f")])
    assert [name for name, _ in await PersistRiskAdapter.read_position_data("r")] == ["e:f"]
    levels = PersistBase("BTCUSDT_my-strategy", "./dump/data/partial/")
    await levels.write_value("levels", {"s": {"profitLevels": [10], "lossLevels": []}})
    assert await PersistPartialAdapter.read_partial_data(*PAIR) == {"s": Levels(profit_levels=(10,))}
    await levels.remove_value("levels")
    assert not await levels.has_value("levels")


async def test_a_subclass_of_the_documents_class_can_hold_a_domain_in_the_files_in_its_own_way() -> None:
    class Sealed(PersistBase):
        async def write_value(self, entity_id: str | int, value: Any) -> None:
            await super().write_value(entity_id, {"sealed": [value]})

        async def read_value(self, entity_id: str | int) -> Any:
            return (await super().read_value(entity_id))["sealed"][0]

    for adapter, method in ((PersistSignalAdapter, "signal"), (PersistRiskAdapter, "risk")):
        getattr(adapter, f"use_persist_{method}_adapter")(Sealed)
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    await PersistRiskAdapter.write_position_data([slot("a", "b")], "r")
    store = await default_store()
    session = context_key("session", BTC)
    await store.writer("engine").commit({context_key("signal", BTC): ROW, session: None})
    await PersistSignalAdapter.clear()
    assert await PersistSignalAdapter.read_signal_data(*PAIR) == ROW
    assert [name for name, _ in await PersistRiskAdapter.read_position_data("r")] == ["a:b"]


async def test_a_store_that_failed_is_opened_again_by_the_next_call() -> None:
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    await (await default_store()).home.backend.close()  # as after an fsync that failed
    with pytest.raises(FailedError):
        await PersistSignalAdapter.write_signal_data(signal(note="lost"), *PAIR)
    assert await PersistSignalAdapter.read_signal_data(*PAIR) == ROW
    await (await default_store()).home.backend.close()
    with pytest.raises(FailedError):
        await PersistRiskAdapter.read_position_data("r")
    assert await PersistRiskAdapter.read_position_data("r") == []


async def test_a_new_row_and_the_release_of_its_key_are_one_commit() -> None:
    store = await default_store()
    key = context_key("signal", BTC)
    await store.home.backend.commit("main", {key: b"torn"}, {}, op=Op("vandal", 1))
    await store.scan("signal")
    before = (await store.head()).number
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    assert (await store.head()).number == before + 1 and not store.is_stopped(key)
    entity = PersistBase("e")
    await entity.write_value("x", 1)
    await store.home.backend.commit("main", {entity._key("x"): b"torn"}, {}, op=Op("vandal", 2))
    await entity.remove_value("x")  # a damaged value can be removed; its bytes are kept
    assert not await entity.has_value("x") and len(await store.keys(KeyPrefix("quarantine"))) == 2
