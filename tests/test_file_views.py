"""The JSON files beside the log: current soon, written together, mended after damage, never needed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from file_ground import KEY, closed_store, everything, get, key, payload, put, until

from holdfast.backends.disk import OsDisk
from holdfast.backends.file import FileBackend
from holdfast.contract import Key, Op
from holdfast.testing.faults import FaultyDisk, WrappedDisk


def view(place: Path, at: Key) -> Path:
    """Return where the view of a key lies."""
    return place / at.domain / at.entity_name / f"{at.entity_id}.json"


def temporary_files(place: Path) -> list[Path]:
    """Return every temporary file of ours."""
    return [path for path in place.rglob("*") if path.name.endswith(".tmp")]


async def test_a_view_shows_the_row_soon_while_the_store_is_open(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path)
    await backend.open()
    await put(backend, KEY, payload(1))
    shown = view(tmp_path, KEY)
    await until(lambda: shown.exists() and shown.read_bytes() == payload(1) + b"\n")
    await put(backend, KEY, payload(2))
    await until(lambda: shown.read_bytes() == payload(2) + b"\n")
    await backend.close()


async def test_views_are_current_after_close_and_deleted_rows_leave_no_directories(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path)
    await backend.open()
    await put(backend, KEY, payload(1))
    await put(backend, Key("risk", "limits", "a"), payload(1))
    await put(backend, Key("risk", "limits", "b"), payload(2))
    await backend.close()
    assert view(tmp_path, KEY).read_bytes() == payload(1) + b"\n"
    await backend.open()
    await put(backend, KEY, None)
    await put(backend, Key("risk", "limits", "a"), None)
    await backend.close()
    assert sorted(os.listdir(tmp_path)) == [".holdfast", "risk"]  # noqa: PTH208
    assert [path.name for path in (tmp_path / "risk" / "limits").iterdir()] == ["b.json"]
    assert not temporary_files(tmp_path)


async def test_the_flat_domain_lies_directly_under_the_directory(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path)
    await backend.open()
    await put(backend, Key("entity", "cache", "7"), payload(7))
    await backend.close()
    assert (tmp_path / "cache" / "7.json").read_bytes() == payload(7) + b"\n"


async def test_many_changes_of_a_row_are_one_view(tmp_path: Path) -> None:
    class Renames(WrappedDisk):
        count = 0

        def rename(self, old: str, new: str, *, at: int) -> None:
            self.count += new.endswith(".json")
            super().rename(old, new, at=at)

    disk = Renames(OsDisk())
    backend = FileBackend(tmp_path, disk=disk, view_delay_seconds=1)
    await backend.open()
    for number in range(50):
        await put(backend, KEY, payload(number))
    await backend.close()
    assert disk.count <= 2
    assert view(tmp_path, KEY).read_bytes() == payload(49) + b"\n"


@pytest.mark.parametrize("damage", [b"", b"\0\0\0\0", b'{"price":666}\n', payload(1), None])
async def test_a_damaged_or_edited_view_is_mended_and_its_bytes_are_kept(
    tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    log = await closed_store(tmp_path)
    shown = view(tmp_path, key(1))
    if damage is None:
        shown.unlink()
    else:
        shown.write_bytes(damage)
    backend = FileBackend(tmp_path)
    await backend.open()
    assert await get(backend, key(1)) == payload(1)
    await backend.close()
    assert shown.read_bytes() == payload(1) + b"\n"
    if damage is None:
        assert not (log.parent / "quarantine").exists()
    else:
        assert caplog.text.count("edited or damaged") == 1
        assert [kept.read_bytes() for kept in (log.parent / "quarantine").iterdir()] == [damage]


async def test_views_that_lag_after_a_crash_are_brought_up_to_date_without_a_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = await closed_store(tmp_path / "data")
    backend = FileBackend(tmp_path / "data", view_delay_seconds=1)
    await backend.open()
    await put(backend, key(0), payload(10))
    await put(backend, key(1), None)
    await put(backend, key(2), payload(2))
    text, witness = log.read_bytes(), (log.parent / "witness").read_bytes()
    views = {path: path.read_bytes() for path in (tmp_path / "data" / "signal").rglob("*.json")}
    assert len(views) == 2
    await backend.close()
    log.write_bytes(text)
    (log.parent / "witness").write_bytes(witness)
    for path, shown in views.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shown)
    await backend.open()
    await backend.close()
    assert view(tmp_path / "data", key(0)).read_bytes() == payload(10) + b"\n"
    assert not view(tmp_path / "data", key(1)).exists()
    assert view(tmp_path / "data", key(2)).read_bytes() == payload(2) + b"\n"
    assert not (log.parent / "quarantine").exists()
    told = [record.getMessage() for record in caplog.records]
    assert not [message for message in told if " lies on " not in message], "but for the file system they run on"


async def test_a_row_deleted_before_a_checkpoint_does_not_leave_its_view(tmp_path: Path) -> None:
    await closed_store(tmp_path)
    backend = FileBackend(tmp_path, checkpoint_bytes=1, view_delay_seconds=1)
    await backend.open()
    stale = view(tmp_path, key(1)).read_bytes()
    await put(backend, key(1), None)
    for number in range(10):
        await put(backend, key(0), payload(number))
    await backend.close()
    assert not view(tmp_path, key(1)).exists()
    view(tmp_path, key(1)).parent.mkdir()
    view(tmp_path, key(1)).write_bytes(stale)  # as if the power had been cut before its removal was durable
    await backend.open()
    await backend.close()
    assert not view(tmp_path, key(1)).exists()


async def test_foreign_files_among_the_views_are_left_alone_and_leftovers_are_swept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await closed_store(tmp_path)
    inside = view(tmp_path, key(1)).parent
    (inside / "notes.txt").write_text("mine")
    (inside / ".holdfast.tmp").write_text("leftover")
    (inside / "deep").mkdir()
    backend = FileBackend(tmp_path)
    await backend.open()
    await backend.close()
    assert (inside / "notes.txt").read_text() == "mine"
    assert (inside / "deep").is_dir()
    assert not temporary_files(tmp_path)
    assert caplog.text.count("is not Holdfast's") == 2


async def test_a_change_during_the_check_of_all_views_wins(tmp_path: Path) -> None:
    await closed_store(tmp_path, rows=30)
    reading, go_on = threading.Event(), threading.Event()

    class Gate(WrappedDisk):
        def before(self, call: str) -> None:
            if call == "read" and threading.current_thread().name == "holdfast-views":
                reading.set()
                assert go_on.wait(20)

    backend = FileBackend(tmp_path, disk=Gate(OsDisk()), view_delay_seconds=0)
    await backend.open()
    await until(reading.is_set)
    for number in range(30):
        await put(backend, key(number), payload(number + 100) if number % 2 else None)
    go_on.set()
    await backend.close()
    for number in range(30):
        shown = view(tmp_path, key(number))
        if number % 2:
            assert shown.read_bytes() == payload(number + 100) + b"\n"
        else:
            assert not shown.exists()
    assert not (tmp_path / ".holdfast" / "quarantine").exists()


async def test_a_commit_never_waits_for_views(tmp_path: Path) -> None:
    go_on = threading.Event()

    class Stuck(WrappedDisk):
        def before(self, call: str) -> None:
            if threading.current_thread().name == "holdfast-views":
                assert go_on.wait(20)

    backend = FileBackend(tmp_path, disk=Stuck(OsDisk()), view_delay_seconds=0)
    await backend.open()
    for number in range(20):
        await put(backend, KEY, payload(number))
    assert not view(tmp_path, KEY).exists()
    go_on.set()
    await backend.close()
    assert view(tmp_path, KEY).read_bytes() == payload(19) + b"\n"


async def test_the_witness_tells_of_durable_commits_only(tmp_path: Path) -> None:
    disk = FaultyDisk(OsDisk(), kind="fdatasync")
    backend = FileBackend(tmp_path, disk=disk, view_delay_seconds=0)
    await backend.open()
    await put(backend, KEY, payload(1))
    disk.at = disk.calls + 1
    with pytest.raises(Exception, match="open it again"):
        await put(backend, KEY, payload(2))
    await backend.close()
    assert view(tmp_path, KEY).read_bytes() == payload(1) + b"\n"
    assert b'"heads":{"main":1}' in (tmp_path / ".holdfast" / "witness").read_bytes()
    await backend.open()
    assert (await everything(backend))["main"][0].number in (1, 2)
    assert await backend.commit("main", {KEY: payload(3)}, {}, op=Op("late", 1)) >= 2
    await backend.close()
