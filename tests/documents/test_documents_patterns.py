"""The documents' Mongo adapter and their patterns: cached, replicated, encrypted, in Python.

Two samples are mended on purpose: the cached one touches its cache only after the store has the value (the older
document's order leaves them apart after a failed write), and the replicated one tells when a replica failed.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from itertools import cycle
from typing import Any, ClassVar

import pytest
from process_store import fresh_process, signal
from stand_ins import Collection

from holdfast.documents.adapters import PersistBase, PersistSignalAdapter
from holdfast.errors import CorruptedError, UnknownOutcomeError

__all__ = ["fresh_process"]
pytestmark = pytest.mark.usefixtures("fresh_process")

PAIR = ("BTCUSDT", "my-strategy")

database: dict[str, Collection] = {}


class MongoPersist(PersistBase):
    """The older document's Mongo class: a collection for each entity name."""

    def __init__(self, entity_name: str, base_dir: str) -> None:
        super().__init__(entity_name, base_dir)
        self.collection = database.setdefault(entity_name, Collection())

    async def wait_for_init(self, initial: bool = True) -> None:
        await self.collection.create_index("entityId", unique=True)

    async def read_value(self, entity_id: str | int) -> Any:
        document = await self.collection.find_one({"entityId": entity_id})
        if document is None:
            raise LookupError(f"Entity {self.entity_name}:{entity_id} not found")
        return document["data"]

    async def has_value(self, entity_id: str | int) -> bool:
        return await self.collection.count_documents({"entityId": entity_id}) > 0

    async def write_value(self, entity_id: str | int, value: Any) -> None:
        update = {"$set": {"entityId": entity_id, "data": value, "updatedAt": datetime.now(UTC)}}
        await self.collection.update_one({"entityId": entity_id}, update, upsert=True)

    async def remove_value(self, entity_id: str | int) -> None:
        if await self.collection.delete_one({"entityId": entity_id}) == 0:
            raise LookupError(f"Entity {self.entity_name}:{entity_id} not found for deletion")

    async def remove_all(self) -> None:
        await self.collection.delete_many()

    async def values(self) -> AsyncIterator[Any]:
        for document in await self.collection.find_sorted():
            yield document["data"]

    async def keys(self) -> AsyncIterator[str | int]:
        for document in await self.collection.find_sorted():
            yield str(document["entityId"])


@pytest.fixture(autouse=True)
def empty_database() -> None:
    database.clear()


async def test_the_mongo_adapter_writes_and_reads_and_removes() -> None:
    persist = MongoPersist("test-entity", "./test-data")
    await persist.wait_for_init(True)
    await persist.write_value("key1", {"id": "abc", "data": "value"})
    assert await persist.read_value("key1") == {"id": "abc", "data": "value"}
    assert [key async for key in persist.keys()] == ["key1"]  # noqa: SIM118
    await persist.remove_value("key1")
    with pytest.raises(LookupError):
        await persist.remove_value("key1")


async def test_signals_go_to_mongo_after_registration() -> None:
    PersistSignalAdapter.use_persist_signal_adapter(MongoPersist)
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    assert (await database["BTCUSDT_my-strategy_binance"].find_one({"entityId": "BTCUSDT"}) or {})["data"] == signal()
    row = await PersistSignalAdapter.read_signal_data(*PAIR)
    assert row is not None and row.note == "breakout"


class CachedPersist(MongoPersist):
    """The older document's caching layer."""

    def __init__(self, entity_name: str, base_dir: str) -> None:
        super().__init__(entity_name, base_dir)
        self.cache: dict[str, Any] = {}
        self.reads = 0

    async def read_value(self, entity_id: str | int) -> Any:
        key = str(entity_id)
        if key not in self.cache:
            self.reads += 1
            self.cache[key] = await super().read_value(entity_id)
        return self.cache[key]

    async def write_value(self, entity_id: str | int, value: Any) -> None:
        self.cache.pop(str(entity_id), None)
        await super().write_value(entity_id, value)
        self.cache[str(entity_id)] = value  # only after the store has it


async def test_a_cached_adapter_serves_what_the_store_acknowledged() -> None:
    persist = CachedPersist("test-entity", "./test-data")
    await persist.write_value("key1", 1)
    assert await persist.read_value("key1") == 1 and persist.reads == 0
    real, persist.collection = persist.collection, Broken()
    with pytest.raises(ConnectionError):
        await persist.write_value("key1", 2)
    persist.collection = real
    assert await persist.read_value("key1") == 1 and persist.reads == 1


class Broken(Collection):
    async def update_one(self, query: dict[str, Any], update: dict[str, Any], *, upsert: bool) -> None:
        raise ConnectionError("the region is gone")


async def test_a_cached_adapter_holds_a_domain() -> None:
    PersistSignalAdapter.use_persist_signal_adapter(CachedPersist)
    for note in ("one", "two"):
        await PersistSignalAdapter.write_signal_data(signal(note=note), *PAIR)
        row = await PersistSignalAdapter.read_signal_data(*PAIR)
        assert row is not None and row.note == note


class ReplicatedPersist(PersistBase):
    """The older document's replication: the primary is awaited, replicas follow."""

    failures: ClassVar[list[str]] = []

    def __init__(self, entity_name: str, base_dir: str) -> None:
        super().__init__(entity_name, base_dir)
        self.primary = MongoPersist(entity_name, base_dir)
        self.replicas = [MongoPersist(f"{region}.{entity_name}", base_dir) for region in ("eu", "us")]
        self.following: set[asyncio.Task[None]] = set()

    async def wait_for_init(self, initial: bool = True) -> None:
        await asyncio.gather(*(adapter.wait_for_init(initial) for adapter in (self.primary, *self.replicas)))

    async def has_value(self, entity_id: str | int) -> bool:
        return await self.primary.has_value(entity_id)

    async def read_value(self, entity_id: str | int) -> Any:
        return await self.primary.read_value(entity_id)

    async def write_value(self, entity_id: str | int, value: Any) -> None:
        await self.primary.write_value(entity_id, value)
        for replica in self.replicas:
            task = asyncio.create_task(self._follow(replica, entity_id, value))
            self.following.add(task)
            task.add_done_callback(self.following.discard)

    async def _follow(self, replica: MongoPersist, entity_id: str | int, value: Any) -> None:
        try:
            await replica.write_value(entity_id, value)
        except ConnectionError as error:
            self.failures.append(f"{replica.entity_name}: {error}")

    async def close(self) -> None:
        await asyncio.gather(*self.following)


async def test_a_replicated_adapter_is_acknowledged_by_its_primary() -> None:
    ReplicatedPersist.failures.clear()
    PersistSignalAdapter.use_persist_signal_adapter(ReplicatedPersist)
    database["us.BTCUSDT_my-strategy_binance"] = Broken()
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    row = await PersistSignalAdapter.read_signal_data(*PAIR)
    assert row is not None and row.id == "s-1"
    await PersistSignalAdapter.clear()  # closes the instance, which waits for its replicas
    copied = await database["eu.BTCUSDT_my-strategy_binance"].find_one({"entityId": "BTCUSDT"})
    assert copied is not None and copied["data"] == signal()
    assert ReplicatedPersist.failures == ["us.BTCUSDT_my-strategy_binance: the region is gone"]


async def test_a_primary_that_fails_is_an_unknown_outcome() -> None:
    PersistSignalAdapter.use_persist_signal_adapter(MongoPersist)
    database["BTCUSDT_my-strategy_binance"] = Broken()
    with pytest.raises(UnknownOutcomeError) as caught:
        await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    assert isinstance(caught.value.__cause__, ConnectionError)


def toy_cipher(text: bytes, key: bytes) -> bytes:
    """XOR, a stand-in for a real cipher: it protects nothing."""
    return bytes(one ^ other for one, other in zip(text, cycle(key), strict=False))


class EncryptedPersist(MongoPersist):
    """The newer document's encrypted write. Real code takes AES-256-GCM and a key from a secret manager."""

    key = b"a stand-in for a key from the environment"

    async def write_value(self, entity_id: str | int, value: Any) -> None:
        sealed = base64.b64encode(toy_cipher(json.dumps(value).encode(), self.key)).decode()
        await super().write_value(entity_id, sealed)

    async def read_value(self, entity_id: str | int) -> Any:
        sealed = await super().read_value(entity_id)
        return json.loads(toy_cipher(base64.b64decode(sealed), self.key))


async def test_an_encrypted_write_leaves_no_plain_text() -> None:
    PersistSignalAdapter.use_persist_signal_adapter(EncryptedPersist)
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    stored = await database["BTCUSDT_my-strategy_binance"].find_one({"entityId": "BTCUSDT"})
    assert stored is not None and "BTCUSDT" not in stored["data"] and "43000" not in stored["data"]
    row = await PersistSignalAdapter.read_signal_data(*PAIR)
    assert row is not None and row.price_open == 43000.0


async def test_a_class_that_forgets_to_decrypt_is_found_out() -> None:
    PersistSignalAdapter.use_persist_signal_adapter(EncryptedPersist)
    await PersistSignalAdapter.write_signal_data(signal(), *PAIR)
    PersistSignalAdapter.use_persist_signal_adapter(MongoPersist)
    with pytest.raises(CorruptedError, match="wrong shape"):
        await PersistSignalAdapter.read_signal_data(*PAIR)
    assert "BTCUSDT" in database["BTCUSDT_my-strategy_binance"].documents  # the value stays where it is
