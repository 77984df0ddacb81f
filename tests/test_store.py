"""The typed view: checked rows, quarantine, the policy, the ledger's scope."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from backend_list import BACKENDS

from holdfast import domains
from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Backend, Guarantees, Key, KeyPrefix, Op, Record, Survives
from holdfast.domains import context_key, encode, ledger_key
from holdfast.errors import (
    ConflictError,
    CorruptedError,
    FailedError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
    UnsafeSettingError,
)
from holdfast.names import Context
from holdfast.quarantine import kept_bytes, kept_rows
from holdfast.rows import Entity, Guard, Quarantined, Row, Signal, Trade
from holdfast.store import Store

BTC, ETH = Context("binance", "BTCUSDT", "st"), Context("binance", "ETHUSDT", "st")
BTC_KEY, ETH_KEY = context_key("signal", BTC), context_key("signal", ETH)
DAMAGED = b'{"id":"s-1","note":"half a ro","_schema":1,"_sum":"00000000"}'


def signal(context: Context = BTC, **changes: Any) -> Signal:
    row = Signal(
        id="s-1",
        position="long",
        price_open=2.0,
        price_take_profit=3.0,
        price_stop_loss=1.0,
        minute_estimated_time=60,
        symbol=context.symbol,
        exchange_name=context.exchange_name,
        strategy_name=context.strategy_name,
        scheduled_at=1,
        pending_at=1,
    )
    return msgspec.structs.replace(row, **changes)


def trade(context: Context = BTC) -> Trade:
    return Trade(
        id="s-1",
        event_id=f"{context}#2",
        symbol=context.symbol,
        exchange_name=context.exchange_name,
        strategy_name=context.strategy_name,
        position="long",
        price_open=2.0,
        price_close=3.0,
        price_take_profit=3.0,
        price_stop_loss=1.0,
        scheduled_at=1,
        pending_at=1,
        closed_at=2,
        reason="take_profit",
        pnl_percent=1.5,
    )


@pytest.fixture(params=sorted(BACKENDS))
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    made: Backend = BACKENDS[request.param](tmp_path)
    return made


@pytest.fixture
async def store(backend: Backend) -> AsyncIterator[Store]:
    opened = Store(backend, require=Survives.NOTHING)
    await opened.open()
    yield opened
    await opened.close()


async def spoil(store: Store, key: Key, payload: bytes = DAMAGED) -> None:
    """Put bytes under ``key`` that the store would never write."""
    place = store.place(key)
    await place.backend.commit(place.scope, {key: payload}, {}, op=Op(f"vandal-{key}", 1))


async def test_a_committed_row_is_loaded_with_the_number_of_its_commit(store: Store) -> None:
    writer = store.writer("test")
    first = await writer.commit({BTC_KEY: signal()}, {BTC_KEY: 0})
    second = await writer.commit({ETH_KEY: signal(ETH), BTC_KEY: signal(note="new")}, {BTC_KEY: first})
    found = await store.load(ETH_KEY, BTC_KEY, context_key("schedule", BTC))
    assert {key: loaded.version for key, loaded in found.items()} == {ETH_KEY: second, BTC_KEY: second}
    assert found[BTC_KEY].row == signal(note="new")
    assert await store.get(context_key("schedule", BTC)) is None
    assert list(await store.scan("signal")) == await store.keys() == [BTC_KEY, ETH_KEY]
    assert (await store.head()).number == second
    await writer.commit({BTC_KEY: None}, {BTC_KEY: second})
    assert await store.keys(KeyPrefix("signal")) == [ETH_KEY]


async def test_a_commit_whose_guard_does_not_hold_changes_nothing(store: Store) -> None:
    writer = store.writer("test")
    await writer.commit({BTC_KEY: signal()}, {BTC_KEY: 0})
    with pytest.raises(ConflictError) as caught:
        await writer.commit({BTC_KEY: None, ETH_KEY: signal(ETH)}, {BTC_KEY: 0})
    assert caught.value.keys == (BTC_KEY,) and await store.keys() == [BTC_KEY]
    assert await writer.commit({ETH_KEY: signal(ETH)}, {ETH_KEY: 0}) == 2


async def test_a_row_that_cannot_be_stored_changes_nothing(store: Store) -> None:
    with pytest.raises(InvalidInputError, match="finite"):
        await store.writer("test").commit({BTC_KEY: signal(), ETH_KEY: signal(ETH, price_open=float("nan"))})
    assert await store.keys() == []


async def test_a_damaged_row_goes_to_quarantine_whole_and_only_its_key_stops(store: Store) -> None:
    writer = store.writer("test")
    await writer.commit({BTC_KEY: signal(), ETH_KEY: signal(ETH)})
    await spoil(store, BTC_KEY)
    with pytest.raises(CorruptedError, match="quarantine") as caught:
        await store.load(ETH_KEY, BTC_KEY)
    assert caught.value.key == BTC_KEY
    assert (await store.load(ETH_KEY))[ETH_KEY].row == signal(ETH)
    held = await store.quarantined("signal", BTC_KEY.entity_name)
    assert kept_bytes([loaded.row for loaded in held.values()]) == DAMAGED
    assert BTC_KEY in store.damaged and not await store.quarantined("signal", ETH_KEY.entity_name)
    for _ in range(2):  # it stays stopped, and is not moved twice
        with pytest.raises(CorruptedError):
            await store.get(BTC_KEY)
    assert len(await store.quarantined("signal", BTC_KEY.entity_name)) == 1


async def test_a_scan_gives_the_good_rows_and_names_the_damaged_ones(store: Store) -> None:
    await store.writer("test").commit({BTC_KEY: signal(), ETH_KEY: signal(ETH)})
    await spoil(store, BTC_KEY)
    assert list(await store.scan("signal")) == [ETH_KEY]
    assert list(store.damaged) == [BTC_KEY]
    found, damaged = await store.salvage(BTC_KEY, ETH_KEY)
    assert list(found) == [ETH_KEY] and list(damaged) == [BTC_KEY]


async def test_a_stopped_key_is_stopped_after_reopening_until_it_is_released(store: Store) -> None:
    await spoil(store, BTC_KEY)
    await store.scan("signal")
    await store.close()
    await store.open()
    assert list(store.damaged) == [BTC_KEY] and store.is_stopped(BTC_KEY)
    with pytest.raises(CorruptedError, match="release"):
        await store.get(BTC_KEY)
    assert await store.release(BTC_KEY) == 1
    assert await store.get(BTC_KEY) is None and not store.damaged
    assert not await store.quarantined("signal", BTC_KEY.entity_name)
    kept = [loaded.row for loaded in (await store.scan("quarantine")).values()]
    assert [row.text for row in kept if isinstance(row, Quarantined)] == [DAMAGED.decode()]  # nothing thrown away
    await store.close()
    await store.open()
    assert not store.is_stopped(BTC_KEY)
    with pytest.raises(NotFoundError):
        await store.release(BTC_KEY)


async def test_a_row_written_on_a_stopped_key_can_be_read_while_the_quarantine_still_speaks(store: Store) -> None:
    await spoil(store, BTC_KEY)
    await store.scan("signal")
    await store.writer("test").commit({BTC_KEY: signal()}, {BTC_KEY: 0})
    loaded = await store.get(BTC_KEY)
    assert loaded is not None and loaded.row == signal()
    assert await store.quarantined("signal", BTC_KEY.entity_name)


async def test_a_row_that_contradicts_its_key_can_be_put_in_quarantine(store: Store) -> None:
    await store.writer("test").commit({BTC_KEY: signal(ETH)})
    await store.quarantine(BTC_KEY, "the row is of ETHUSDT")
    with pytest.raises(CorruptedError, match="of ETHUSDT"):
        await store.get(BTC_KEY)
    [kept] = (await store.quarantined("signal", BTC_KEY.entity_name)).values()
    assert kept.row.text.encode() == encode(BTC_KEY, signal(ETH)) and kept.row.version == 1
    with pytest.raises(NotFoundError):
        await store.quarantine(ETH_KEY, "there is none")


async def test_the_same_key_can_be_damaged_again_and_nothing_is_overwritten(store: Store) -> None:
    for text in (b'"first"', b'"second"'):
        place = store.place(BTC_KEY)
        await place.backend.commit(place.scope, {BTC_KEY: text}, {}, op=Op(f"vandal-{text!r}", 1))
        await store.scan("signal")
    kept = await store.quarantined("signal", BTC_KEY.entity_name)
    assert {loaded.row.text for loaded in kept.values()} == {'"first"', '"second"'}
    assert await store.release(BTC_KEY) == 2


@pytest.mark.parametrize("payload", [b"", b"\xff\xfe\x00 no text", b"\x01" * 2_000_000, bytes(range(256)) * 20_000])
async def test_quarantine_keeps_any_bytes_exactly(payload: bytes) -> None:
    rows = kept_rows(BTC_KEY, Record(payload, 7, Op("w", 1)), "because", 7)
    assert kept_bytes(list(rows.values())) == payload
    for key, row in rows.items():
        assert domains.decode(key, encode(key, row)) == row


async def test_a_row_of_a_newer_version_stays_where_it_is(store: Store) -> None:
    text = b'{"id":"s-1","_schema":9'
    newer = b'%b,"_sum":"%08x"}' % (text, domains._checksum(BTC_KEY, text))
    await spoil(store, BTC_KEY, newer)
    with pytest.raises(CorruptedError, match="upgrade"):
        await store.get(BTC_KEY)
    assert not await store.quarantined("signal", BTC_KEY.entity_name) and await store.keys() == [BTC_KEY]
    assert BTC_KEY in store.damaged


async def test_a_damaged_quarantine_row_frees_nothing(store: Store) -> None:
    await spoil(store, BTC_KEY)
    await store.scan("signal")
    [kept] = await store.quarantined("signal", BTC_KEY.entity_name)
    await spoil(store, kept, b'"worse"')
    [loaded] = (await store.quarantined("signal", BTC_KEY.entity_name)).values()
    assert "checksum" in loaded.row.reason
    with pytest.raises(CorruptedError):
        await store.get(BTC_KEY)


async def test_a_read_only_store_reports_damage_and_changes_nothing(store: Store) -> None:
    await spoil(store, BTC_KEY)
    await store.close()
    await store.open(read_only=True)
    before = await store.head()
    with pytest.raises(CorruptedError):
        await store.get(BTC_KEY)
    assert await store.scan("signal") == {} and BTC_KEY in store.damaged
    assert await store.head() == before
    with pytest.raises(InvalidInputError, match="read-only"):
        await store.writer("test").commit({ETH_KEY: signal(ETH)})


class PinnedDamage(MemoryBackend):
    """A backend that finds some keys damaged by itself, as the file backend does."""

    damaged: set[Key]

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        for key in keys:
            if key in self.damaged:
                raise CorruptedError(f"{key}: its stored bytes are damaged", key=key)
        return await super().read(scope, keys)

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:
        number = await super().commit(scope, changes, expect, op=op)
        self.damaged.difference_update(changes)
        return number


async def test_damage_that_the_backend_itself_found_stops_only_its_key() -> None:
    backend = PinnedDamage()
    backend.damaged = set()
    store = Store(backend, require=Survives.NOTHING)
    await store.open()
    other = context_key("signal", Context("binance", "SOLUSDT", "st"))
    await store.writer("test").commit({BTC_KEY: signal(), ETH_KEY: signal(ETH), other: signal()})
    backend.damaged = {BTC_KEY, other}
    assert list(await store.scan("signal")) == [ETH_KEY]
    assert set(store.damaged) == {BTC_KEY, other}
    assert ETH_KEY in await store.load(ETH_KEY)
    with pytest.raises(CorruptedError):
        await store.get(BTC_KEY)
    assert len(await store.quarantined("signal", BTC_KEY.entity_name)) == 1
    await store.release(BTC_KEY)
    assert await store.get(BTC_KEY) is None


class FullDisk(MemoryBackend):
    full = False

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:
        if self.full:
            raise UnavailableError("no space left")
        return await super().commit(scope, changes, expect, op=op)


async def test_a_damaged_row_that_cannot_be_moved_is_left_and_still_stops_its_key() -> None:
    backend = FullDisk()
    store = Store(backend, require=Survives.NOTHING)
    await store.open()
    await store.writer("test").commit({ETH_KEY: signal(ETH)})
    await spoil(store, BTC_KEY)
    backend.full = True
    with pytest.raises(CorruptedError, match="left where it is"):
        await store.get(BTC_KEY)
    assert list(await store.scan("signal")) == [ETH_KEY] and BTC_KEY in await store.keys()
    backend.full = False
    with pytest.raises(CorruptedError, match="moved to quarantine"):
        await store.get(BTC_KEY)


async def test_the_ledger_lies_in_a_scope_of_its_own(store: Store, backend: Backend) -> None:
    writer, key = store.writer("test"), ledger_key(BTC, "s-1")
    await writer.commit({BTC_KEY: signal()})
    assert await writer.commit({key: trade()}, {key: 0}) == 1
    assert [scope async for scope in backend.scopes()] == ["main", "main.ledger"]
    assert (await store.load(key, BTC_KEY))[key].row == trade()
    assert list(await store.scan("ledger")) == [key] and await store.keys() == [key, BTC_KEY]
    with pytest.raises(InvalidInputError, match="ledger"):
        await writer.commit({key: trade(), ETH_KEY: signal(ETH)})
    with pytest.raises(InvalidInputError, match="ledger"):
        await writer.commit({ETH_KEY: signal(ETH)}, {key: 1})
    await spoil(store, key)
    with pytest.raises(CorruptedError):
        await store.get(key)
    assert await store.quarantined("ledger", key.entity_name)
    await store.close()
    await store.open()
    assert store.is_stopped(key) and await store.release(key) == 1


async def test_a_backend_below_the_policy_is_refused_and_left_closed() -> None:
    backend = MemoryBackend()
    with pytest.raises(UnsafeSettingError, match=r"require=Survives\.NOTHING"):
        await Store(backend).open()
    await Store(backend, require=Survives.NOTHING).open()  # the refused one let go of it
    await backend.close()
    await Store(backend).open(read_only=True)


async def test_guarantees_are_those_of_the_weakest_part(tmp_path: Path) -> None:
    class Weak(MemoryBackend):
        async def open(self, *, read_only: bool = False) -> Guarantees:
            found = await super().open(read_only=read_only)
            return msgspec.structs.replace(found, atomic=False, survives=Survives.PROCESS)

    store = Store(BACKENDS["file"](tmp_path), routes={"risk": Weak()})
    with pytest.raises(FailedError, match="not open"):
        _ = store.guarantees
    found = await store.open()
    assert found == store.guarantees and not found.atomic and found.survives is Survives.PROCESS
    await store.close()
    await store.close()


@pytest.mark.parametrize("scope", ["", "a b", "x" * 58, "../x"])
def test_a_scope_that_cannot_be_used_is_refused(scope: str) -> None:
    with pytest.raises(InvalidInputError):
        Store(MemoryBackend(), scope=scope)


def test_only_the_documents_domains_can_be_routed() -> None:
    with pytest.raises(InvalidInputError, match="owner"):
        Store(MemoryBackend(), routes={"owner": MemoryBackend()})


async def test_observers_are_told_of_each_acknowledged_commit(store: Store) -> None:
    told: list[tuple[str, int, Mapping[Key, Row | None]]] = []
    store.observers.append(lambda scope, number, changes: told.append((scope, number, changes)))
    writer, key = store.writer("test"), ledger_key(BTC, "s-1")
    await writer.commit({BTC_KEY: signal()})
    with pytest.raises(ConflictError):
        await writer.commit({BTC_KEY: None}, {BTC_KEY: 9})
    await writer.commit({key: trade()})
    assert told == [("main", 1, {BTC_KEY: signal()}), ("main.ledger", 1, {key: trade()})]


async def test_values_of_any_domain_come_back(store: Store) -> None:
    key, guard = Key("entity", "e", "=1"), Key("guard", "r", "guard")
    await store.writer("test").commit({key: Entity(id=1, value={"a": [1, None, -0.0]}), guard: Guard(changes=3)})
    found = await store.load(key, guard)
    assert found[key].row == Entity(id=1, value={"a": [1, None, -0.0]}) and found[guard].row == Guard(changes=3)
