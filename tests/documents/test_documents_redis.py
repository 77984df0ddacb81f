"""The Redis adapters of both documents, in Python.

The older one's keys leave out ``base_dir``: registered for two domains it would read a waiting signal as an open one
(BEHAVIOUR, K3). The examples below that register one class for several domains therefore put ``base_dir`` into the key,
as the newer document's table of key formats does.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest
from process_store import fresh_process, signal, slot
from stand_ins import Redis

from holdfast.documents.adapters import (
    PersistBase,
    PersistPartialAdapter,
    PersistRiskAdapter,
    PersistScheduleAdapter,
    PersistSignalAdapter,
)
from holdfast.documents.entities import natural_order
from holdfast.rows import Levels

__all__ = ["fresh_process"]
pytestmark = pytest.mark.usefixtures("fresh_process")

redis = Redis()


@pytest.fixture(autouse=True)
def empty_redis() -> None:
    redis.values.clear()


class RedisPersist(PersistBase):
    """The older document's class, method by method."""

    def _redis_key(self, entity_id: str | int) -> str:
        return f"{self.entity_name}:{entity_id}"

    async def wait_for_init(self, initial: bool = True) -> None:
        await redis.connect()

    async def read_value(self, entity_id: str | int) -> Any:
        data = await redis.get(self._redis_key(entity_id))
        if data is None:
            raise LookupError(f"Entity {self.entity_name}:{entity_id} not found")
        return json.loads(data)

    async def has_value(self, entity_id: str | int) -> bool:
        return await redis.exists(self._redis_key(entity_id)) == 1

    async def write_value(self, entity_id: str | int, value: Any) -> None:
        await redis.set(self._redis_key(entity_id), json.dumps(value))

    async def remove_value(self, entity_id: str | int) -> None:
        if await redis.delete(self._redis_key(entity_id)) == 0:
            raise LookupError(f"Entity {self.entity_name}:{entity_id} not found for deletion")

    async def remove_all(self) -> None:
        keys = await redis.keys(f"{self.entity_name}:*")
        if keys:
            await redis.delete(*keys)

    async def values(self) -> AsyncIterator[Any]:
        for key in sorted(await redis.keys(f"{self.entity_name}:*"), key=natural_order):
            data = await redis.get(key)
            if data is not None:
                yield json.loads(data)

    async def keys(self) -> AsyncIterator[str | int]:
        for key in sorted(await redis.keys(f"{self.entity_name}:*"), key=natural_order):
            yield key[len(self.entity_name) + 1 :]


async def test_custom_redis_adapter_works_correctly() -> None:
    persist = RedisPersist("test-entity", "./logs/test")
    await persist.wait_for_init(True)
    await persist.write_value("key1", {"data": "value1"})
    assert (await persist.read_value("key1"))["data"] == "value1"
    await persist.remove_value("key1")
    assert not await persist.has_value("key1")


async def test_what_is_not_overridden_builds_on_what_is() -> None:
    persist = RedisPersist("test-entity", "./logs/test")
    for number in (10, 2, 1):
        await persist.write_value(f"k{number}", number)
    assert [key async for key in persist.keys()] == ["k1", "k2", "k10"]  # noqa: SIM118
    assert [value async for value in persist] == [1, 2, 10]
    assert [value async for value in persist.filter(lambda value: value > 1)] == [2, 10]
    assert [value async for value in persist.take(2)] == [1, 2]
    await persist.remove_all()
    assert [value async for value in persist.take(0)] == []


async def test_signals_go_to_redis_after_registration() -> None:
    PersistSignalAdapter.use_persist_signal_adapter(RedisPersist)
    await PersistSignalAdapter.write_signal_data(signal(), "BTCUSDT", "my-strategy")
    assert list(redis.values) == ["BTCUSDT_my-strategy_binance:BTCUSDT"]
    assert json.loads(redis.values["BTCUSDT_my-strategy_binance:BTCUSDT"]) == signal()
    row = await PersistSignalAdapter.read_signal_data("BTCUSDT", "my-strategy")
    assert row is not None and row.id == "s-1"
    await PersistSignalAdapter.write_signal_data(None, "BTCUSDT", "my-strategy")
    assert redis.values["BTCUSDT_my-strategy_binance:BTCUSDT"] == "null"
    assert await PersistSignalAdapter.read_signal_data("BTCUSDT", "my-strategy") is None


class SharedRedisPersist:
    """The newer document's class, inheriting nothing: one client for all instances, domain and name in the key."""

    client: ClassVar[Redis | None] = None

    def __init__(self, entity_name: str, base_dir: str) -> None:
        self.prefix = f"backtest-kit:{base_dir.rstrip('/').rpartition('/')[2]}:{entity_name}"
        if SharedRedisPersist.client is None:
            SharedRedisPersist.client = Redis()
        self.redis = SharedRedisPersist.client

    async def wait_for_init(self, initial: bool) -> None:
        if initial and not self.redis.connections:
            await self.redis.connect()

    async def read_value(self, entity_id: str) -> Any:
        data = await self.redis.get(f"{self.prefix}:{entity_id}")
        if data is None:
            raise LookupError(entity_id)
        return json.loads(data)

    async def has_value(self, entity_id: str) -> bool:
        return await self.redis.exists(f"{self.prefix}:{entity_id}") == 1

    async def write_value(self, entity_id: str, value: Any) -> None:
        await self.redis.set(f"{self.prefix}:{entity_id}", json.dumps(value))


async def write_all_domains() -> None:
    await PersistSignalAdapter.write_signal_data(signal(), "BTCUSDT", "my-strategy")
    await PersistScheduleAdapter.write_schedule_data(signal(_isScheduled=True), "BTCUSDT", "my-strategy")
    await PersistRiskAdapter.write_position_data([slot("my-strategy", "BTCUSDT")], "conservative")
    levels = {"s-1": {"profitLevels": [10], "lossLevels": []}}
    await PersistPartialAdapter.write_partial_data(levels, "BTCUSDT", "my-strategy")


async def check_all_domains() -> None:
    opened = await PersistSignalAdapter.read_signal_data("BTCUSDT", "my-strategy")
    waits = await PersistScheduleAdapter.read_schedule_data("BTCUSDT", "my-strategy")
    assert opened is not None and not opened.is_scheduled and waits is not None and waits.is_scheduled
    assert [name for name, _ in await PersistRiskAdapter.read_position_data("conservative")] == ["my-strategy:BTCUSDT"]
    levels = await PersistPartialAdapter.read_partial_data("BTCUSDT", "my-strategy")
    assert levels == {"s-1": Levels(profit_levels=(10,))}


def register_for_all_domains(cls: type) -> None:
    PersistSignalAdapter.use_persist_signal_adapter(cls)
    PersistRiskAdapter.use_persist_risk_adapter(cls)
    PersistScheduleAdapter.use_persist_schedule_adapter(cls)
    PersistPartialAdapter.use_persist_partial_adapter(cls)


async def test_one_client_is_shared_by_all_domains() -> None:
    SharedRedisPersist.client = None
    register_for_all_domains(SharedRedisPersist)
    await write_all_domains()
    await check_all_domains()
    client = SharedRedisPersist.client
    assert isinstance(client, Redis) and client.connections == 1
    assert sorted(client.values) == [
        "backtest-kit:partial:BTCUSDT_my-strategy:levels",
        "backtest-kit:risk:conservative:positions",
        "backtest-kit:schedule:BTCUSDT_my-strategy_binance:BTCUSDT",
        "backtest-kit:signal:BTCUSDT_my-strategy_binance:BTCUSDT",
    ]


async def test_each_domain_can_have_a_database_of_its_own() -> None:
    databases = {number: Redis(db=number) for number in range(4)}

    class Numbered(SharedRedisPersist):
        db = -1

        def __init__(self, entity_name: str, base_dir: str) -> None:
            self.prefix, self.redis = entity_name, databases[self.db]

    registrations = (
        PersistSignalAdapter.use_persist_signal_adapter,
        PersistRiskAdapter.use_persist_risk_adapter,
        PersistScheduleAdapter.use_persist_schedule_adapter,
        PersistPartialAdapter.use_persist_partial_adapter,
    )
    for number, register in enumerate(registrations):
        register(type(f"Database{number}", (Numbered,), {"db": number}))
    await write_all_domains()
    await check_all_domains()
    assert [len(databases[number].values) for number in range(4)] == [1, 1, 1, 1]


async def test_hot_domains_in_redis_and_cold_ones_elsewhere() -> None:
    objects: dict[str, str] = {}

    class S3Persist:
        """Stands for an object store: one object for each entity."""

        def __init__(self, entity_name: str, base_dir: str) -> None:
            self.prefix = f"s3://bucket/{entity_name}"

        async def wait_for_init(self, initial: bool) -> None: ...

        async def has_value(self, entity_id: str) -> bool:
            return f"{self.prefix}/{entity_id}.json" in objects

        async def read_value(self, entity_id: str) -> Any:
            return json.loads(objects[f"{self.prefix}/{entity_id}.json"])

        async def write_value(self, entity_id: str, value: Any) -> None:
            objects[f"{self.prefix}/{entity_id}.json"] = json.dumps(value)

    SharedRedisPersist.client = None
    register_for_all_domains(SharedRedisPersist)
    PersistPartialAdapter.use_persist_partial_adapter(S3Persist)
    await write_all_domains()
    await check_all_domains()
    assert list(objects) == ["s3://bucket/BTCUSDT_my-strategy/levels.json"]
