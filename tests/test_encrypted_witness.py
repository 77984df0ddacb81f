"""The witness: an older state put back is found, and nothing else is an alarm."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from encrypted_kit import A, B, lying, opened, put_back, refused, ring

from holdfast.backends.file import FileBackend
from holdfast.backends.memory import MemoryBackend
from holdfast.backends.sqlite import SqliteBackend
from holdfast.contract import Key, Op
from holdfast.errors import (
    ConflictError,
    CorruptedError,
    InvalidInputError,
    UnavailableError,
)
from holdfast.testing.faults import Fault, FaultyBackend
from holdfast.wrappers.around import Around
from holdfast.wrappers.encrypted import Encrypted
from holdfast.wrappers.witness import Seen, Witness


def witnessed(inner: Any, path: Path) -> Encrypted:
    return Encrypted(inner, ring(), witness=path)


async def test_without_a_witness_an_older_row_is_believed_and_the_guarantees_say_so(tmp_path: Path) -> None:
    memory = MemoryBackend()
    store = Encrypted(memory, ring())
    promised = await store.open()
    assert any("without a witness" in warning for warning in promised.warnings)
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    old = lying(memory, A)
    await store.commit("main", {A: b"2"}, {}, op=Op("w", 2))
    put_back(memory, A, old)
    assert (await store.read("main", [A]))[A].payload == b"1"
    await store.close()
    promised = await witnessed(memory, tmp_path / "w").open()
    assert not any("without a witness" in warning for warning in promised.warnings)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("version", [1, 3, 9])
async def test_an_older_row_put_back_is_found(version: int, restart: bool, tmp_path: Path) -> None:
    """With its old version, with the newest, and with one made up, by its own writer's numbers."""
    memory = MemoryBackend()
    store = witnessed(memory, tmp_path / "w")
    await store.open()
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    old = lying(memory, A)
    await store.commit("main", {B: b"1"}, {}, op=Op("w", 2))
    await store.commit("main", {A: b"2"}, {}, op=Op("w", 3))
    if restart:
        await store.close()
        store = witnessed(memory, tmp_path / "w")
        await store.open()
    put_back(memory, A, old._replace(version=version))
    error = await refused(store, A)
    assert "an older row was put back" in str(error)
    assert (await store.read("main", [B]))[B].payload == b"1"
    await store.close()


async def test_a_deleted_row_put_back_is_found_and_a_new_one_is_not_mistaken_for_it(tmp_path: Path) -> None:
    memory = MemoryBackend()
    store = witnessed(memory, tmp_path / "w")
    await store.open()
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    old = lying(memory, A)
    await store.commit("main", {A: None}, {}, op=Op("w", 2))
    put_back(memory, A, old)
    await refused(store, A)
    del memory._state.scope("main").rows[A]
    await store.commit("main", {A: b"1"}, {A: 0}, op=Op("w", 3))
    assert (await store.read("main", [A]))[A].payload == b"1"
    await store.close()


@pytest.mark.parametrize("kind", ["file", "sqlite"])
async def test_a_whole_store_put_back_is_refused_at_open_until_the_witness_is_moved_away(
    kind: str, tmp_path: Path
) -> None:
    import shutil

    make: dict[str, Callable[[], Any]] = {
        "file": lambda: FileBackend(tmp_path / "data"),
        "sqlite": lambda: SqliteBackend(tmp_path / "data"),
    }
    witness = tmp_path / "w"

    async def commit(n: int) -> None:
        store = witnessed(make[kind](), witness)
        await store.open()
        await store.commit("main", {A: b"%d" % n}, {}, op=Op("w", n))
        await store.close()

    await commit(1)
    copy = shutil.copytree if kind == "file" else shutil.copy
    copy(tmp_path / "data", tmp_path / "backup")
    await commit(2)
    if kind == "file":
        shutil.rmtree(tmp_path / "data")
    copy(tmp_path / "backup", tmp_path / "data")
    for _ in range(2):
        with pytest.raises(CorruptedError, match=r"scope main stands at commit 1, but .* has seen 2"):
            await commit(3)
    store = witnessed(make[kind](), witness)
    promised = await store.open(read_only=True)
    assert any("stands at commit 1" in warning for warning in promised.warnings), "people may look at it"
    await store.close()
    witness.rename(tmp_path / "moved")
    await commit(3)


async def test_a_store_that_falls_back_while_it_is_open_is_found_by_its_head(tmp_path: Path) -> None:
    memory = MemoryBackend()
    store = witnessed(memory, tmp_path / "w")
    await store.open()
    for n in (1, 2):
        await store.commit("main", {A: b"1"}, {}, op=Op("w", n))
    memory._state.scope("main").number = 1
    with pytest.raises(CorruptedError, match="has seen 2"):
        await store.head("main")
    await store.close()


async def test_a_commit_that_failed_or_conflicted_is_not_noted(tmp_path: Path) -> None:
    faulty = FaultyBackend(MemoryBackend(), Fault(2, "unavailable"))
    store = witnessed(faulty, tmp_path / "w")
    await store.open()
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    with pytest.raises(UnavailableError):
        await store.commit("main", {A: b"2"}, {}, op=Op("w", 2))
    with pytest.raises(ConflictError):
        await store.commit("main", {A: b"2"}, {A: 7}, op=Op("w", 2))
    assert store.witness is not None
    assert store.witness.floor("main") == 1
    assert (await store.read("main", [A]))[A].payload == b"1"
    await store.close()


async def test_a_repeated_op_raises_no_alarm_though_its_row_was_written_since(tmp_path: Path) -> None:
    store, _ = await opened(witness=tmp_path / "w")
    await store.commit("main", {A: b"1"}, {}, op=Op("v", 1))
    await store.commit("main", {A: b"2"}, {}, op=Op("w", 1))
    assert await store.commit("main", {A: b"1"}, {}, op=Op("v", 1)) == 1
    assert (await store.read("main", [A]))[A].payload == b"2"
    await store.close()


class _Slow(Around):
    """Answers reads with what was there when they began, but only when told to."""

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self.go_on = asyncio.Event()
        self.reading = asyncio.Event()

    async def read(self, scope: str, keys: Any) -> Any:
        found = await super().read(scope, keys)
        self.reading.set()
        await self.go_on.wait()
        return found

    async def head(self, scope: str) -> Any:
        found = await super().head(scope)
        self.reading.set()
        await self.go_on.wait()
        return found


@pytest.mark.parametrize("what", ["read", "head"])
async def test_a_read_that_a_commit_overtakes_is_no_alarm(what: str, tmp_path: Path) -> None:
    slow = _Slow(MemoryBackend())
    slow.go_on.set()
    store = witnessed(slow, tmp_path / "w")
    await store.open()
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    slow.go_on.clear()
    slow.reading.clear()
    call = asyncio.ensure_future(store.read("main", [A]) if what == "read" else store.head("main"))
    await slow.reading.wait()
    await store.commit("main", {A: b"2"}, {}, op=Op("w", 2))
    slow.go_on.set()
    assert await call
    assert (await store.read("main", [A]))[A].payload == b"2"
    await store.close()


async def test_what_a_crash_keeps_from_the_witness_is_no_alarm(tmp_path: Path) -> None:
    """It lags, and never runs ahead: the file is written after the store has acknowledged."""
    memory = MemoryBackend()
    store = witnessed(memory, tmp_path / "w")
    await store.open()
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    assert store.witness is not None
    await store.witness.flush()
    image = (tmp_path / "w").read_bytes()
    await store.commit("main", {A: b"2", B: b"2"}, {}, op=Op("w", 2))
    await store.close()
    (tmp_path / "w").write_bytes(image)
    (tmp_path / "w.new").write_bytes(b'{"half')
    store = witnessed(memory, tmp_path / "w")
    await store.open()
    assert (await store.read("main", [A]))[A].payload == b"2"
    assert store.witness is not None
    assert store.witness.floor("main") == 2
    await store.close()


async def test_the_witness_is_written_soon_after_a_commit_without_being_asked(tmp_path: Path) -> None:
    store, _ = await opened(witness=tmp_path / "w")
    store.witness = Witness(tmp_path / "w", flush_seconds=0.0)
    await store.witness.open("memory", read_only=False)
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    async with asyncio.timeout(10):
        # Another thread writes it.
        while b'"main":1' not in (tmp_path / "w").read_bytes():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await store.close()


async def test_processes_that_share_a_witness_add_what_they_know(tmp_path: Path) -> None:
    one, two = MemoryBackend(), MemoryBackend()
    path = tmp_path / "w"
    first, second = witnessed(one, path), witnessed(two, path)  # the same name, "memory": as two processes of one store
    two._state = one._state
    await first.open()
    await second.open()
    await first.commit("main", {A: b"1"}, {}, op=Op("a", 1))
    old = lying(one, A)
    await first.commit("main", {A: b"2"}, {}, op=Op("a", 2))
    await second.commit("other", {B: b"1"}, {}, op=Op("b", 1))
    await first.close()
    await second.close()
    third = witnessed(one, path)
    await third.open()
    assert third.witness is not None
    assert third.witness.scopes == {"main": 2, "other": 1}
    put_back(one, A, old)
    await refused(third, A)
    await third.close()


async def test_the_witness_keeps_a_bounded_number_of_rows_and_forgets_deleted_ones_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.wrappers.witness.MAX_ROWS", 10)
    store, memory = await opened(witness=tmp_path / "w")
    assert store.witness is not None
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    old = lying(memory, A)
    await store.commit("main", {A: b"2"}, {}, op=Op("w", 2))
    for n in range(3, 60):
        key = Key("outbox", "BTCUSDT_a_x", f"{n:012d}")
        await store.commit("main", {key: b"1"}, {}, op=Op("w", n * 2))
        await store.commit("main", {key: None}, {}, op=Op("w", n * 2 + 1))
        await store.witness.flush()
    assert len(store.witness._rows) <= 20
    await store.close()
    assert (tmp_path / "w").read_bytes().count(b'":[') == 10
    again, _ = await opened(memory, witness=tmp_path / "w")
    put_back(memory, A, old)
    await refused(again, A)
    await again.close()


async def test_what_is_noted_while_the_witness_is_cut_to_its_bound_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.wrappers.witness.MAX_ROWS", 1)
    memory_of = Witness(tmp_path / "w")
    await memory_of.open("memory", read_only=False)
    for n in range(1, 5):
        memory_of.note_commit("main", n, {Key("outbox", "BTCUSDT_a_x", f"{n}"): b"1"}, Op("w", n))
    flushing = asyncio.create_task(memory_of.flush())
    await asyncio.sleep(0)  # the rows have gone to the thread that writes them
    memory_of.note_commit("main", 5, {A: b"1"}, Op("w", 5))
    await flushing
    assert memory_of.known("main", [A]) == {A: Seen(5, "w", 5)}
    await memory_of.close()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format":1,"stores":{}}\n00000000\n'])
async def test_a_damaged_witness_is_refused_and_the_store_is_let_go(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(content)
    store = witnessed(FileBackend(tmp_path / "data"), tmp_path / "w")
    with pytest.raises(CorruptedError, match="is damaged"):
        await store.open()
    assert (tmp_path / "w").read_bytes() == content
    (tmp_path / "w").unlink()
    await store.open()
    await store.close()


async def test_a_witness_that_cannot_be_written_is_refused_at_open_and_told_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = witnessed(MemoryBackend(), tmp_path / "missing" / "w")
    with pytest.raises(InvalidInputError, match="cannot be written"):
        await store.open()
    (tmp_path / "there").mkdir()
    store = witnessed(MemoryBackend(), tmp_path / "there" / "w")
    await store.open()
    (tmp_path / "there").rename(tmp_path / "gone")
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    with caplog.at_level(logging.WARNING, "holdfast"):
        await store.close()
    assert "could not be written" in caplog.text


async def test_read_only_writes_no_witness(tmp_path: Path) -> None:
    memory = MemoryBackend()
    store = witnessed(memory, tmp_path / "w")
    await store.open(read_only=True)
    await store.read("main", [A])
    await store.close()
    assert not (tmp_path / "w").exists()


async def test_the_file_is_synced_before_it_takes_its_name_and_the_name_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(fd: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        calls.append(
            "sync of the directory"
            if is_directory
            else "sync of all"
            if os.fstat(fd).st_size > 100
            else "sync of nothing"
        )
        fsync(fd)

    def noted_replace(self: Path, target: Any) -> Path:
        calls.append("rename")
        return replace(self, target)

    store, _ = await opened(witness=tmp_path / "w")
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    monkeypatch.setattr("os.fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    await store.close()
    assert calls == ["sync of all", "rename", "sync of the directory"]
    assert (tmp_path / "w").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("names", [("a + b", "b"), ("b", "a + b", "a"), ("a", "b + a", "c + b", "c")])
async def test_a_store_with_copies_is_known_whichever_of_them_are_there(names: tuple[str, ...], tmp_path: Path) -> None:
    for n, name in enumerate(names, 1):
        witness = Witness(tmp_path / "w")
        assert await witness.open(name, read_only=False) is (n > 1)
        assert witness.floor("main") == n - 1
        witness.note_commit("main", n, {A: b"1"}, Op("w", n))
        await witness.close()
    stranger = Witness(tmp_path / "w")
    assert not await stranger.open("another", read_only=False)
    assert stranger.floor("main") == 0
    await stranger.close()
