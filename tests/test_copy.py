"""``holdfast copy``: every row arrives, whatever interrupts it; nothing is taken for whole that is not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from backend_list import BACKENDS
from fakes import Bot, FakeMarket, flat, minute_ms, proposal

from holdfast.backends.file import FileBackend
from holdfast.backends.memory import MemoryBackend
from holdfast.backends.sqlite import SqliteBackend
from holdfast.cli import main
from holdfast.contract import Backend, Key, KeyPrefix, Op
from holdfast.copying import SCOPE, copy, require_whole
from holdfast.domains import context_key, encode, worker_key
from holdfast.engine.worker import boot_seconds
from holdfast.errors import CorruptedError, HoldfastError, InvalidInputError, UnavailableError
from holdfast.names import Context
from holdfast.rows import Entity, Worker
from holdfast.store import Store
from holdfast.testing.faults import Fault, FaultyBackend
from holdfast.wrappers.around import Around
from holdfast.wrappers.cached import Cached
from holdfast.wrappers.keyring import new_entry

ROWS = 450


def key(n: int) -> Key:
    return Key("entity", "settings", f"row-{n:04d}")


def payload(n: int) -> bytes:
    return encode(key(n), Entity(id=f"row-{n:04d}", value={"n": n, "text": "ä" * (n % 7), "price": n / 7}))


async def fill(backend: Backend) -> None:
    """Two scopes, more than a page of rows, rows rewritten and deleted."""
    for at in range(0, ROWS, 150):
        changes: dict[Key, bytes | None] = {key(n): payload(n) for n in range(at, at + 150)}
        await backend.commit("main", changes, {}, op=Op("filler", at + 1))
    await backend.commit("main", {key(0): None, key(1): payload(1)}, {}, op=Op("filler", 9000))
    await backend.commit("main.ledger", {Key("ledger", "a_b_c", "t-1"): b'{"id":"t-1"}'}, {}, op=Op("filler", 1))


async def content(backend: Backend) -> dict[tuple[str, Key], bytes]:
    found: dict[tuple[str, Key], bytes] = {}
    async for scope in backend.scopes():
        keys = [one async for one in backend.keys(scope)]
        found |= {(scope, one): record.payload for one, record in (await backend.read(scope, keys)).items()}
    return found


@pytest.fixture
async def source() -> AsyncIterator[MemoryBackend]:
    backend = MemoryBackend()
    await backend.open()
    await fill(backend)
    yield backend
    await backend.close()


@pytest.mark.parametrize("name", BACKENDS)
async def test_every_row_arrives_on_every_backend_and_comes_back(
    name: str, source: MemoryBackend, tmp_path: Path
) -> None:
    there, back = BACKENDS[name](tmp_path), MemoryBackend()
    await there.open()
    await back.open()
    told: list[tuple[int, int]] = []
    try:
        copied = await copy(source, there, name="memory", progress=lambda done, total: told.append((done, total)))
        assert copied.rows == copied.written == ROWS
        assert told[0] == (0, ROWS)
        assert told[-1] == (ROWS, ROWS)
        again = await copy(source, there, name="memory")
        assert (again.written, again.scopes) == (0, copied.scopes)
        await copy(there, back, name=name)
        assert await content(back) == await content(source)
    finally:
        await there.close()


@pytest.mark.parametrize("kind", ["unknown_applied", "unknown_lost", "die_before", "die_after", "unavailable"])
async def test_it_can_be_interrupted_at_every_commit_and_run_again(kind: Any, source: MemoryBackend) -> None:
    for at in range(1, 100):
        target = MemoryBackend()
        faulty = FaultyBackend(target, Fault(at, kind))
        await faulty.open()
        try:
            await copy(source, faulty, name="it")
        except HoldfastError:
            unfinished = (await target.read(SCOPE, [Key("copy", "state", "unfinished")])) != {}
            assert unfinished or at == 1 or await content(target) == await content(source)
            if unfinished:
                with pytest.raises(InvalidInputError, match="was not finished: run the same holdfast copy again"):
                    await require_whole(target)
                other = MemoryBackend()
                await other.open()
                await fill(other)
                with pytest.raises(InvalidInputError, match="unfinished copy of it"):
                    await copy(other, target, name="another")
            await copy(source, target, name="it")
        assert await content(target) == await content(source)
        await require_whole(target)
        if not faulty.hits:
            return
    raise AssertionError("it never ended")


async def test_what_the_source_deleted_after_an_interruption_does_not_stay_in_the_target(source: MemoryBackend) -> None:
    target = MemoryBackend()
    faulty = FaultyBackend(target, Fault(4, "die_before"))
    await faulty.open()
    with pytest.raises(HoldfastError):
        await copy(source, faulty, name="it")
    await source.commit("main", {key(2): None, key(3): payload(4)}, {}, op=Op("filler", 9001))
    await copy(source, target, name="it")
    assert await content(target) == await content(source)


async def test_a_target_with_other_data_is_refused_and_not_touched(source: MemoryBackend) -> None:
    target = MemoryBackend()
    await target.open()
    await target.commit("main", {key(7): b'"other"'}, {}, op=Op("w", 1))
    before = await content(target)
    with pytest.raises(InvalidInputError, match="the target is not empty"):
        await copy(source, target, name="it")
    assert await content(target) == before


class _Moving(Around):
    """A store to which somebody writes as soon as its last row was copied."""

    at_end = False

    def progress(self, done: int, total: int) -> None:
        self.at_end = done == total

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        if self.at_end:
            self.at_end = False
            await self.backend.commit("main", {key(5): payload(6)}, {}, op=Op("bot", 1))
        async for one in self.backend.keys(scope, prefix):
            yield one


async def test_a_store_that_changes_meanwhile_is_not_taken_for_copied(source: MemoryBackend) -> None:
    target = MemoryBackend()
    await target.open()

    moving = _Moving(source)
    with pytest.raises(UnavailableError, match="changed while it was copied"):
        await copy(moving, target, name="it", progress=moving.progress)
    with pytest.raises(InvalidInputError, match="not finished"):
        await require_whole(target)
    await copy(source, target, name="it")
    assert await content(target) == await content(source)


class _Flipping(MemoryBackend):
    """Keeps one row with another byte than it was given."""

    async def commit(self, scope: str, changes: Any, expect: Any, *, op: Op) -> int:
        if key(9) in changes:
            changes = {**changes, key(9): payload(8)}
        return await super().commit(scope, changes, expect, op=op)


async def test_a_target_that_keeps_other_bytes_is_found_out(source: MemoryBackend) -> None:
    target = _Flipping()
    await target.open()
    with pytest.raises(CorruptedError, match="came back from the target with other bytes"):
        await copy(source, target, name="it")


async def test_what_is_compared_is_read_from_the_medium_not_from_a_memory_of_it(source: MemoryBackend) -> None:
    target = Cached(_Flipping())
    await target.open()
    with pytest.raises(CorruptedError, match="came back from the target with other bytes"):
        await copy(source, target, name="it")
    with pytest.raises(InvalidInputError, match="not finished"):
        await require_whole(target)


async def test_a_damaged_mark_is_told_as_such(source: MemoryBackend) -> None:
    target = MemoryBackend()
    await target.open()
    await target.commit(SCOPE, {Key("copy", "state", "unfinished"): b"{}"}, {}, op=Op("another", 1))
    for call in (require_whole(target), copy(source, target, name="it")):
        with pytest.raises(CorruptedError, match="the mark of an unfinished copy is damaged"):
            await call


class _Crowded(MemoryBackend):
    """Another copy begins here while this one looks whether the place is empty."""

    async def scopes(self) -> AsyncIterator[str]:
        mark = Key("copy", "state", "unfinished")
        await self.commit(SCOPE, {mark: b'{"source":"another"}'}, {mark: 0}, op=Op("another", 1))
        async for scope in super().scopes():
            yield scope


async def test_of_two_copies_that_begin_at_once_in_one_place_one_goes_on(source: MemoryBackend) -> None:
    target = _Crowded()
    await target.open()
    with pytest.raises(UnavailableError, match="somebody else writes to the target"):
        await copy(source, target, name="it")
    with pytest.raises(InvalidInputError, match="the copy of another to this store was not finished"):
        await require_whole(target)


# ---------------------------------------------------------------------- the command


async def traded(folder: Path) -> None:
    """Leave a store with an open position in a folder."""
    store = Store(FileBackend(folder))
    await store.open()
    bot = Bot(FakeMarket({"BTCUSDT": flat(43000, -10, 5)}), {1: proposal()}, risk=[lambda payload: True])
    await bot.live(store)
    await store.close()


def test_a_folder_becomes_a_database_and_the_command_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(traded(tmp_path / "data"))
    target = f"sqlite:{tmp_path / 'store.db'}"
    assert main(["copy", str(tmp_path / "data"), target, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows"] == said["written"] > 3
    assert main(["copy", str(tmp_path / "data"), target, "--plain"]) == 0
    assert "0 written now" in capsys.readouterr().out
    assert main(["check", target]) == 0
    for command in (["show", str(tmp_path / "data"), "--json"], ["show", target, "--json"]):
        assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown.count('"BTCUSDT"') >= 2


def test_a_bot_on_either_side_is_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(traded(tmp_path / "data"))

    async def held() -> int:
        bot = FileBackend(tmp_path / "data")
        await bot.open()
        try:
            return await asyncio.to_thread(main, ["copy", str(tmp_path / "data"), f"sqlite:{tmp_path / 'a.db'}"])
        finally:
            await bot.close()

    assert asyncio.run(held()) == 3
    assert "is held by process" in capsys.readouterr().err

    async def alive() -> int:
        store = Store(SqliteBackend(tmp_path / "bot.db"))
        await store.open()
        writer, ended = store.writer("bot"), asyncio.Event()
        began = boot_seconds()

        async def beat() -> None:
            n = 0
            while not ended.is_set():
                n += 1
                row = Worker(holder="bot", beat=n, lease_seconds=20, host="elsewhere", pid=77, at_ms=0)
                await writer.commit({worker_key("bot"): row})
                await asyncio.sleep(0.01)

        beating = asyncio.ensure_future(beat())
        try:
            return await asyncio.to_thread(main, ["copy", str(tmp_path / "data"), f"sqlite:{tmp_path / 'bot.db'}"])
        finally:
            ended.set()
            await beating
            await store.close()
            assert boot_seconds() - began < 20

    assert asyncio.run(alive()) == 3
    assert "process 77 on elsewhere works on this store" in capsys.readouterr().err


def test_an_encrypted_store_is_copied_under_its_keys_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOLDFAST_KEYS", new_entry())
    asyncio.run(traded(tmp_path / "data"))
    hidden = f"encrypted+sqlite:{tmp_path / 'hidden.db'}"
    assert main(["copy", str(tmp_path / "data"), hidden]) == 0
    assert main(["copy", hidden.removeprefix("encrypted+"), f"sqlite:{tmp_path / 'raw.db'}"]) != 0
    assert "encrypted" in capsys.readouterr().err
    assert main(["copy", hidden, f"encrypted+file:{tmp_path / 'again'}"]) == 0
    assert main(["check", f"encrypted+file:{tmp_path / 'again'}"]) == 0


def test_a_damaged_row_is_not_copied_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def damaged() -> None:
        backend = SqliteBackend(tmp_path / "store.db")
        await backend.open()
        await backend.commit("main", {key(1): payload(1).replace(b'"n":1', b'"n":2')}, {}, op=Op("w", 1))
        await backend.close()

    asyncio.run(damaged())
    assert main(["copy", f"sqlite:{tmp_path / 'store.db'}", str(tmp_path / "new")]) == 4
    assert "row-0001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere", "sqlite:b.db"], "there is no store at nowhere"),
        (["memory:", "sqlite:b.db"], "memory: keeps nothing"),
        (["a", "a"], "the same place"),
        (["data", "sqlite:b.db", "--exchange", "binance"], "are for a folder of raw files"),
    ],
)
def test_a_mistake_gets_one_clear_error(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert main(["copy", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "b.db").exists()


# ---------------------------------------------------------------------- raw files

RAW_SIGNAL = {
    "id": "s-1", "position": "long", "note": "breakout", "priceOpen": 43000, "priceTakeProfit": 44000,
    "priceStopLoss": 42000, "minuteEstimatedTime": 60, "symbol": "BTCUSDT", "exchangeName": "binance",
    "strategyName": "my-strategy", "scheduledAt": minute_ms(-5), "pendingAt": minute_ms(-5), "_isScheduled": False,
}  # fmt: skip


def raw(folder: Path, name: str, value: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=2))


def raw_folder(folder: Path) -> None:
    raw(folder, "signal/BTCUSDT_my-strategy/BTCUSDT.json", RAW_SIGNAL)
    raw(folder, "signal/ETHUSDT_my-strategy/ETHUSDT.json", "null")
    levels = {"profitLevels": [10, 20], "lossLevels": []}
    raw(folder, "partial/BTCUSDT_my-strategy/levels.json", {"s-1": levels, "s-0": levels})
    position = {"signal": RAW_SIGNAL, "strategyName": "my-strategy", "exchangeName": "", "openTimestamp": minute_ms(-5)}
    raw(folder, "risk/limit/positions.json", [["my-strategy:BTCUSDT", position]])
    raw(folder, "signal/BTCUSDT_my-strategy/.tmp-ab12-BTCUSDT.json", '{"id"')


def test_the_documents_raw_files_are_imported_and_the_bot_goes_on_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_folder(tmp_path / "old")
    before = {path: path.read_bytes() for path in (tmp_path / "old").rglob("*.json")}
    assert main(["copy", str(tmp_path / "old"), str(tmp_path / "new"), "--plain"]) == 0
    said = capsys.readouterr().out
    assert "3 rows" in said
    assert "levels of a signal that is not open" in said
    assert {path: path.read_bytes() for path in (tmp_path / "old").rglob("*.json")} == before

    async def goes_on() -> list[Any]:
        store = Store(FileBackend(tmp_path / "new"))
        await store.open()
        market = FakeMarket({"BTCUSDT": [*flat(43000, -10, 2), *flat(44500, 3, 10)]})
        bot = Bot(market, risk=[lambda payload: True])
        events = await bot.live(store)
        levels = await store.get(context_key("partial", Context("binance", "BTCUSDT", "my-strategy")))
        await store.close()
        assert levels is None
        return events

    (closed,) = asyncio.run(goes_on())
    assert (closed.kind, closed.signal.id, closed.reason) == ("closed", "s-1", "take_profit")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("signal/BTCUSDT_b/BTCUSDT.json", '{"id": "s', "BTCUSDT_b"),
        ("signal/BTCUSDT_b/BTCUSDT.json", {**RAW_SIGNAL, "minuteEstimatedTime": None}, "minuteEstimatedTime"),
        ("signal/BTCUSDT_b/BTCUSDT.json", {**RAW_SIGNAL, "priceTakeProfit": 41000}, "cannot be watched"),
        ("signal/BTCUSDT_b/BTCUSDT.json", RAW_SIGNAL, "another file says"),
        ("signal/X_b/X.json", {**RAW_SIGNAL, "symbol": "X", "exchangeName": ""}, "--exchange"),
        ("schedule/X_b/X.json", [1], "a row is an object"),
        ("risk/limit/positions.json", {"a": 1}, "risk takes a list"),
    ],
)
def test_a_raw_file_that_cannot_be_trusted_stops_the_import_unless_told_otherwise(
    name: str, value: Any, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_folder(tmp_path / "old")
    raw(tmp_path / "old", name, value)
    assert main(["copy", str(tmp_path / "old"), str(tmp_path / "new"), "--plain"]) == 4
    said = capsys.readouterr().out
    assert told in said
    assert "Nothing was imported" in said
    assert not (tmp_path / "new").exists()
    assert main(["copy", str(tmp_path / "old"), str(tmp_path / "new"), "--plain", "--leave-damaged"]) == 0
    assert told in capsys.readouterr().out
