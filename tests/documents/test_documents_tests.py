"""The tests that the documents show, in Python: the unit test, the restart test, registration and its lifecycle."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
import pytest
from process_store import fresh_process, signal

from holdfast.documents.adapters import PersistBase, PersistRiskAdapter, PersistSignalAdapter
from holdfast.rows import Signal

__all__ = ["fresh_process"]
pytestmark = pytest.mark.usefixtures("fresh_process")


class CustomPersist:
    """A user's own class: a dict that outlives its instances, as a server would."""

    server: ClassVar[dict[tuple[str, str, str], Any]] = {}
    inits: ClassVar[list[tuple[str, bool]]] = []

    def __init__(self, entity_name: str, base_dir: str) -> None:
        self.entity_name, self.base_dir = entity_name, base_dir

    async def wait_for_init(self, initial: bool) -> None:
        self.inits.append((self.entity_name, initial))

    async def read_value(self, entity_id: str) -> Any:
        return self.server[self.base_dir, self.entity_name, entity_id]

    async def has_value(self, entity_id: str) -> bool:
        return (self.base_dir, self.entity_name, entity_id) in self.server

    async def write_value(self, entity_id: str, entity: Any) -> None:
        self.server[self.base_dir, self.entity_name, entity_id] = entity


@pytest.fixture(autouse=True)
def empty_server() -> None:
    CustomPersist.server.clear()
    CustomPersist.inits.clear()


@pytest.mark.parametrize("cls", [PersistBase, CustomPersist])
async def test_should_write_and_read_entity_atomically(cls: Any) -> None:
    persist = cls("test-entity", "./test-data")
    await persist.wait_for_init(True)
    entity = {"id": "abc", "data": "value"}
    await persist.write_value("key1", entity)
    assert await persist.read_value("key1") == entity


@pytest.mark.parametrize("cls", [None, CustomPersist])
async def test_should_survive_process_restart(cls: type | None) -> None:
    if cls is not None:
        PersistSignalAdapter.use_persist_signal_adapter(cls)
    await PersistSignalAdapter.write_signal_data(signal(), "BTCUSDT", "my-strategy")
    PersistSignalAdapter.clear()  # simulate a restart: forget memoised instances
    restored = await PersistSignalAdapter.read_signal_data("BTCUSDT", "my-strategy")
    assert restored == msgspec.convert(signal(), Signal)


async def test_instances_are_made_once_for_each_entity_and_initialised_once() -> None:
    PersistSignalAdapter.use_persist_signal_adapter(CustomPersist)
    for symbol in ("BTCUSDT", "ETHUSDT"):
        for _ in range(3):
            await PersistSignalAdapter.write_signal_data(signal(symbol=symbol), symbol, "my-strategy", "binance")
            await PersistSignalAdapter.read_signal_data(symbol, "my-strategy", "binance")
    assert CustomPersist.inits == [
        ("BTCUSDT_my-strategy_binance", True),
        ("ETHUSDT_my-strategy_binance", True),
    ]


async def test_a_registration_takes_effect_at_once() -> None:
    """The documents ask to register before any use, because memoised instances stay; here they do not."""
    await PersistSignalAdapter.write_signal_data(signal(note="in files"), "BTCUSDT", "my-strategy")
    PersistSignalAdapter.use_persist_signal_adapter(CustomPersist)
    assert await PersistSignalAdapter.read_signal_data("BTCUSDT", "my-strategy") is None
    PersistSignalAdapter.use_json()
    row = await PersistSignalAdapter.read_signal_data("BTCUSDT", "my-strategy")
    assert row is not None and row.note == "in files"
    PersistSignalAdapter.use_dummy()
    await PersistSignalAdapter.write_signal_data(signal(), "BTCUSDT", "my-strategy")
    assert await PersistSignalAdapter.read_signal_data("BTCUSDT", "my-strategy") is None


async def test_a_profile_is_handed_over_as_the_documents_pairs() -> None:
    PersistRiskAdapter.use_persist_risk_adapter(CustomPersist)
    position = {"signal": None, "strategyName": "my-strategy", "exchangeName": "", "openTimestamp": 1}
    await PersistRiskAdapter.write_position_data([("my-strategy:BTCUSDT", position)], "conservative")
    [[name, stored]] = CustomPersist.server["./dump/data/risk/", "conservative", "positions"]
    assert name == "my-strategy:BTCUSDT" and {key: stored[key] for key in position} == position
