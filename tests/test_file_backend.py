"""The file backend as its callers see it: one owner, shared flushes, private files, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from file_ground import KEY, everything, get, key, payload, put, raised, until

from holdfast.backends.disk import OsDisk
from holdfast.backends.file import FileBackend
from holdfast.contract import How, Key, Op, Survives
from holdfast.errors import (
    ConflictError,
    FailedError,
    FencedError,
    HeldError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
    UnsafeSettingError,
)
from holdfast.testing.faults import FaultyDisk, WrappedDisk


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[FileBackend]:
    one = FileBackend(tmp_path / "data")
    await one.open()
    yield one
    await one.close()


class SlowDisk(WrappedDisk):
    """A disk whose syncs of data wait until they are let go."""

    def __init__(self) -> None:
        super().__init__(OsDisk())
        self.go_on = threading.Event()
        self.go_on.set()
        self.waiting = threading.Event()
        self.syncs = 0

    def before(self, call: str) -> None:
        if call == "fdatasync":
            self.syncs += 1
            self.waiting.set()
            assert self.go_on.wait(20)


async def test_what_was_committed_is_there_after_opening_again(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path / "data")
    await backend.open()
    await put(backend, KEY, payload(1))
    await put(backend, key(2), payload(2))
    await put(backend, KEY, None)
    await backend.commit("main.ledger", {key(9): payload(9)}, {}, op=Op("keeper", 7))
    before = await everything(backend)
    await backend.close()
    await backend.open()
    assert await everything(backend) == before
    assert (await backend.head("main.ledger")).writers["keeper"] == (7, 1)
    await backend.close()


async def test_a_local_disk_is_attested_to_survive_a_power_cut(tmp_path: Path) -> None:
    disk = _DiskOfKind("ext4")
    backend = FileBackend(tmp_path / "data", disk=disk)
    found = await backend.open()
    await backend.close()
    assert (found.survives, found.survives_how, found.atomic, found.fenced, found.shared, found.warnings) == (
        Survives.HOST, How.ATTESTED, True, True, False, ()
    )  # fmt: skip


class _DiskOfKind(OsDisk):
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def filesystem(self, fd: int) -> str:
        return self.kind


@pytest.mark.parametrize("kind", ["tmpfs", "overlay"])
async def test_a_volatile_file_system_is_accepted_with_a_warning(kind: str, tmp_path: Path) -> None:
    backend = FileBackend(tmp_path / "data", disk=_DiskOfKind(kind))
    found = await backend.open()
    await backend.close()
    assert found.survives is Survives.PROCESS
    assert kind in found.warnings[0]


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "9p", "fuse.sshfs"])
async def test_a_network_file_system_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeSettingError, match=kind):
        await FileBackend(tmp_path / "data", disk=_DiskOfKind(kind)).open()


async def test_an_unknown_file_system_is_assumed_and_said_so(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path / "data", disk=_DiskOfKind(""))
    found = await backend.open()
    await backend.close()
    assert found.survives_how is How.ASSUMED
    assert "unknown file system" in found.warnings[0]


async def test_commits_that_wait_at_one_moment_share_a_flush(tmp_path: Path) -> None:
    disk = SlowDisk()
    backend = FileBackend(tmp_path / "data", disk=disk)
    await backend.open()
    disk.go_on.clear()
    disk.waiting.clear()
    first = asyncio.ensure_future(put(backend, key(0), payload(0)))
    await until(disk.waiting.is_set)
    before = disk.syncs
    rest = [asyncio.ensure_future(put(backend, key(n), payload(n))) for n in range(1, 51)]
    await asyncio.sleep(0)
    disk.go_on.set()
    assert await asyncio.gather(first, *rest) == list(range(1, 52))
    assert disk.syncs - before == 1
    await backend.close()


async def test_nothing_is_shown_before_it_is_durable(tmp_path: Path) -> None:
    disk = SlowDisk()
    backend = FileBackend(tmp_path / "data", disk=disk)
    await backend.open()
    disk.go_on.clear()
    disk.waiting.clear()
    op = Op("one", 1)
    waiting = asyncio.ensure_future(backend.commit("main", {KEY: payload(1)}, {KEY: 0}, op=op))
    await until(disk.waiting.is_set)
    assert await get(backend) is None
    assert (await backend.head("main")).number == 0
    conflict = asyncio.ensure_future(put(backend, KEY, payload(2), expect=0))
    repeated = asyncio.ensure_future(backend.commit("main", {KEY: payload(1)}, {KEY: 0}, op=op))
    await asyncio.sleep(0.02)
    assert not conflict.done(), "a conflict with a commit that is not durable yet must wait for it"
    assert not repeated.done(), "a repeated op is answered once it is durable"
    disk.go_on.set()
    assert await waiting == 1
    assert await repeated == 1
    assert isinstance(await raised(conflict), ConflictError)
    assert await get(backend) == payload(1)
    await backend.close()


async def test_the_event_loop_never_waits_for_the_disk(tmp_path: Path) -> None:
    here = threading.get_ident()
    callers: set[int] = set()

    class Watched(WrappedDisk):
        def before(self, call: str) -> None:
            callers.add(threading.get_ident())

    backend = FileBackend(tmp_path / "data", disk=Watched(OsDisk()), view_delay_seconds=0)
    await backend.open()
    await put(backend, KEY, payload(1))
    await backend.close()
    assert callers, "the seam is used"
    assert here not in callers


async def test_a_second_process_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from holdfast.backends.file import FileBackend\n"
        "async def main():\n"
        "    backend = FileBackend(sys.argv[1])\n"
        "    await backend.open()\n"
        "    print('open', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    await backend.close()\n"
        "asyncio.run(main())\n"
    )
    place = tmp_path / "data"
    holder = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
        [sys.executable, "-c", program, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert await asyncio.to_thread(holder.stdout.readline) == "open\n"
        backend = FileBackend(place)
        with pytest.raises(HeldError) as caught:
            await backend.open()
        assert f"process {holder.pid} on {os.uname().nodename}" in str(caught.value)
        assert isinstance(caught.value, UnavailableError)
        holder.kill()
        holder.wait()
        await backend.open()
        await backend.close()
    finally:
        holder.kill()
        holder.communicate()


async def test_two_backends_of_one_process_cannot_hold_a_directory(backend: FileBackend, tmp_path: Path) -> None:
    with pytest.raises(HeldError, match=f"process {os.getpid()} "):
        await FileBackend(tmp_path / "data").open()
    with pytest.raises(FailedError, match="close it first"):
        await backend.open()
    assert await put(backend, KEY, payload(1)) == 1


@pytest.mark.parametrize("name", ["lock", "commit.log"])
@pytest.mark.parametrize("how", ["deleted", "replaced"])
async def test_a_deleted_or_replaced_lock_or_log_stops_the_writer(tmp_path: Path, name: str, how: str) -> None:
    backend = FileBackend(tmp_path / "data")
    await backend.open()
    await put(backend, KEY, payload(1))
    path = tmp_path / "data" / ".holdfast" / name
    text = path.read_bytes()
    path.rename(path.with_name("aside"))
    if how == "replaced":
        path.write_bytes(text)
    with pytest.raises(FencedError, match="stops writing"):
        for number in range(2 if name == "lock" else 1_000_000):
            await put(backend, KEY, payload(number))
            assert name != "lock", "the lock is looked at before every flush"
    with pytest.raises(FailedError):
        await put(backend, KEY, payload(3))
    await backend.close()
    assert path.exists() == (how == "replaced")
    if how == "replaced":
        assert path.read_bytes() == text


async def test_a_read_only_store_shows_what_is_there_beside_a_running_bot(backend: FileBackend, tmp_path: Path) -> None:
    await put(backend, KEY, payload(1))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data" / ".holdfast").iterdir()}
    reader = FileBackend(tmp_path / "data")
    await reader.open(read_only=True)
    assert await get(reader) == payload(1)
    with pytest.raises(FailedError, match="read-only"):
        await put(reader, KEY, payload(2))
    await reader.close()
    assert await put(backend, KEY, payload(2)) == 2
    assert set(before) - {tmp_path / "data" / ".holdfast" / "witness"} <= set(
        (tmp_path / "data" / ".holdfast").iterdir()
    )


async def test_a_read_only_store_changes_nothing_even_after_a_crash(tmp_path: Path) -> None:
    writer = FileBackend(tmp_path / "data")
    await writer.open()
    await put(writer, KEY, payload(1))
    await writer.close()
    log = tmp_path / "data" / ".holdfast" / "commit.log"
    torn = log.read_bytes() + b"HF1 0000"
    log.write_bytes(torn)
    before = sorted(path.name for path in log.parent.iterdir())
    reader = FileBackend(tmp_path / "data")
    await reader.open(read_only=True)
    assert await get(reader) == payload(1)
    await reader.close()
    assert log.read_bytes() == torn
    assert sorted(path.name for path in log.parent.iterdir()) == before


async def test_reading_a_store_that_is_not_there_says_so_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no store"):
        await FileBackend(tmp_path / "none").open(read_only=True)
    assert not (tmp_path / "none").exists()


async def test_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        backend = FileBackend(tmp_path / "a" / "data", view_delay_seconds=0)
        await backend.open()
        await put(backend, KEY, payload(1))
        await backend.close()
    finally:
        os.umask(old)
    for path in (tmp_path / "a", *(tmp_path / "a").rglob("*")):
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


@pytest.mark.parametrize("name", ["commit.log", "lock", "witness", "."])
async def test_a_link_in_the_place_of_a_file_of_ours_is_refused(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / "victim"
    victim.write_bytes(b"precious")
    place = tmp_path / "data"
    backend = FileBackend(place)
    await backend.open()
    await put(backend, KEY, payload(1))
    await backend.close()
    target = place / ".holdfast" / name if name != "." else place / ".holdfast"
    target.rename(tmp_path / "moved")
    target.symlink_to(outside if name == "." else victim)
    with pytest.raises(UnsafeSettingError, match="link"):
        await backend.open()
    assert victim.read_bytes() == b"precious"
    assert [path.name for path in outside.iterdir()] == ["victim"]


@pytest.mark.parametrize("level", ["domain", "entity", "view"])
async def test_a_link_among_the_views_is_not_followed(tmp_path: Path, level: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "BTCUSDT.json").write_bytes(b"precious")
    place = tmp_path / "data"
    link = {
        "domain": place / "signal",
        "entity": place / "signal" / "BTCUSDT_trend_binance",
        "view": place / "signal" / "BTCUSDT_trend_binance" / "BTCUSDT.json",
    }[level]
    backend = FileBackend(place, view_delay_seconds=0)
    await backend.open()
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside / "BTCUSDT.json" if level == "view" else outside)
    assert await put(backend, KEY, payload(1)) == 1
    await backend.close()
    assert [path.name for path in outside.iterdir()] == ["BTCUSDT.json"]
    assert (outside / "BTCUSDT.json").read_bytes() == b"precious"
    await backend.open()
    assert await get(backend) == payload(1)
    await backend.close()


@pytest.mark.parametrize(
    "bad",
    [
        Key("..", "a", "b"), Key("signal", "..", "b"), Key("signal", "a/b", "c"), Key("signal", "a", ""),
        Key("signal", "a\0b", "c"), Key("signal", "é", "c"), Key("signal", "a" * 251, "c"), Key(".holdfast", "a", "b"),
        ("signal", "a", "b"), Key("signal", "a", 7),  # type: ignore[arg-type]
    ],
)  # fmt: skip
async def test_a_key_that_was_not_quoted_is_refused_and_touches_nothing(
    backend: FileBackend, tmp_path: Path, bad: Key
) -> None:
    with pytest.raises(InvalidInputError, match="storage key"):
        await put(backend, bad, payload(1))
    assert (await backend.head("main")).number == 0
    assert os.listdir(tmp_path) == ["data"]  # noqa: PTH208


async def test_the_longest_names_have_views(backend: FileBackend, tmp_path: Path) -> None:
    longest = Key("d" * 250, "e" * 250, "i" * 250)
    await put(backend, longest, payload(1))
    await backend.close()
    assert (tmp_path / "data" / longest[0] / longest[1] / f"{longest[2]}.json").read_bytes() == payload(1) + b"\n"


async def test_a_key_lies_in_one_scope_only(backend: FileBackend) -> None:
    await put(backend, KEY, payload(1))
    with pytest.raises(InvalidInputError, match="'main'"):
        await backend.commit("other", {KEY: payload(2)}, {}, op=Op("w", 1))


@pytest.mark.parametrize("op", [Op("", 1), Op("a\nb", 1), Op("w", -1), Op("w", True), Op("w", 2**63)])
async def test_an_op_that_cannot_be_stored_is_refused(backend: FileBackend, op: Op) -> None:
    with pytest.raises(InvalidInputError, match=r"op\."):
        await backend.commit("main", {KEY: b"{}"}, {}, op=op)


@pytest.mark.parametrize("value", ["text", bytearray(b"{}"), 7, b"x" * (8 * 1024 * 1024 + 1)])
async def test_a_payload_that_cannot_be_stored_is_refused(backend: FileBackend, value: object) -> None:
    with pytest.raises(InvalidInputError, match="payload"):
        await put(backend, KEY, value)  # type: ignore[arg-type]
    assert await put(backend, KEY, b"x" * (8 * 1024 * 1024)) == 1


async def test_a_call_before_open_or_after_close_says_so(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path / "data")
    await backend.close()
    with pytest.raises(FailedError, match="open it first"):
        await get(backend)
    await backend.open()
    await backend.close()
    await backend.close()
    for call in (get(backend), put(backend, KEY, payload(1)), backend.head("main"), everything(backend)):
        assert isinstance(await raised(call), FailedError)


async def test_closing_waits_for_what_is_queued(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path / "data")
    await backend.open()
    waiting = [asyncio.ensure_future(put(backend, key(n), payload(n))) for n in range(20)]
    await asyncio.sleep(0)
    await asyncio.gather(backend.close(), backend.close())
    assert await asyncio.gather(*waiting) == list(range(1, 21))


async def test_nothing_is_left_running_or_open(tmp_path: Path) -> None:
    def state() -> tuple[int, int]:
        mine = [thread for thread in threading.enumerate() if thread.name.startswith("holdfast")]
        return len(mine), len(list(Path("/proc/self/fd").iterdir()))

    backend = FileBackend(tmp_path / "data")
    gc.collect()  # what other tests have left may go at any moment
    before = state()
    await backend.open()
    await put(backend, KEY, payload(1))
    await backend.close()
    assert all(now <= then for now, then in zip(state(), before, strict=True))
    with pytest.raises(NotFoundError):
        await FileBackend(tmp_path / "none").open(read_only=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="directory"):
        await FileBackend(tmp_path / "file").open()
    assert all(now <= then for now, then in zip(state(), before, strict=True))


def test_one_event_loop_after_another_may_use_it(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path / "data")

    async def leave_one_waiting() -> None:
        waiting = asyncio.ensure_future(put(backend, key(2), payload(2)))
        await asyncio.sleep(0)
        waiting.cancel()

    asyncio.run(_ignoring(backend.open()))
    assert asyncio.run(put(backend, key(1), payload(1))) == 1
    asyncio.run(leave_one_waiting())
    assert asyncio.run(put(backend, key(3), payload(3))) == 3
    assert asyncio.run(get(backend, key(2))) == payload(2)
    asyncio.run(backend.close())


async def _ignoring(call: object) -> None:
    await call  # type: ignore[misc]


async def test_a_cancelled_commit_goes_on_in_its_turn(tmp_path: Path) -> None:
    disk = SlowDisk()
    backend = FileBackend(tmp_path / "data", disk=disk)
    await backend.open()
    disk.go_on.clear()
    first = asyncio.ensure_future(put(backend, KEY, payload(1)))
    await asyncio.sleep(0)
    second = asyncio.ensure_future(put(backend, KEY, payload(2)))
    await asyncio.sleep(0)
    first.cancel()
    assert isinstance(await asyncio.wait({first}), tuple)
    disk.go_on.set()
    assert await second == 2
    assert await get(backend) == payload(2)
    await backend.close()


async def test_commits_cancelled_at_random_points_leave_a_store_that_works(tmp_path: Path) -> None:
    dice = random.Random(5)
    backend = FileBackend(tmp_path / "data", view_delay_seconds=0)
    await backend.open()
    acknowledged: dict[Key, int] = {}

    async def one(number: int) -> None:
        at = key(number % 5)
        version = await put(backend, at, payload(number))
        acknowledged[at] = max(version, acknowledged.get(at, 0))

    for start in range(0, 300, 10):
        tasks = [asyncio.ensure_future(one(start + offset)) for offset in range(10)]
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0)
        for task in dice.sample(tasks, 4):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    after = await put(backend, key(0), b"{}")
    assert after == (await backend.head("main")).number
    before = await everything(backend)
    for at, version in acknowledged.items():
        assert before["main"][1][at].version >= version
    await backend.close()
    await backend.open()
    assert await everything(backend) == before
    await backend.close()


async def test_an_open_that_is_cancelled_lets_go_of_the_directory(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path / "data")
    for turns in range(4):
        opening = asyncio.ensure_future(backend.open())
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        await asyncio.wait({opening})
    await backend.open()
    assert await put(backend, KEY, payload(1)) == 1
    await backend.close()


async def test_twenty_writers_of_one_key_leave_the_last_acknowledged_value(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path / "data", view_delay_seconds=0)
    await backend.open()
    for round_number in range(25):
        numbers = await asyncio.gather(*(put(backend, KEY, payload(round_number * 100 + n)) for n in range(20)))
        record = (await backend.read("main", [KEY]))[KEY]
        assert record.version == max(numbers)
        assert record.payload == payload(round_number * 100 + numbers.index(max(numbers)))
    await backend.close()
    shown = (tmp_path / "data" / "signal" / "BTCUSDT_trend_binance" / "BTCUSDT.json").read_bytes()
    assert shown == record.payload + b"\n"


async def test_a_log_that_has_grown_is_replaced_by_a_shorter_one(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path / "data", checkpoint_bytes=20_000)
    await backend.open()
    log = tmp_path / "data" / ".holdfast" / "commit.log"
    sizes = []
    for number in range(400):
        await put(backend, key(number % 7), payload(number) if number % 5 else None)
        sizes.append(log.stat().st_size)
    assert max(sizes) < 45_000
    before = await everything(backend)
    await backend.close()
    await backend.open()
    assert await everything(backend) == before
    assert before["main"][0].number == 400
    await backend.close()


async def test_a_checkpoint_that_fails_leaves_the_old_log_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FaultyDisk(OsDisk(), at=1, kind="rename", lasting=True)
    backend = FileBackend(tmp_path / "data", disk=OsDisk(), checkpoint_bytes=5_000)
    await backend.open()
    await backend.close()
    backend = FileBackend(tmp_path / "data", disk=disk, checkpoint_bytes=5_000)
    await backend.open()
    for number in range(100):
        await put(backend, KEY, payload(number))
    assert "cannot replace the log" in caplog.text
    disk.heal()
    for number in range(100):
        await put(backend, KEY, payload(number))
    await backend.close()
    assert (tmp_path / "data" / ".holdfast" / "commit.log").stat().st_size < 15_000
    await backend.open()
    assert (await backend.head("main")).number == 200
    assert not list((tmp_path / "data" / ".holdfast").glob("*.tmp"))
    await backend.close()


async def test_a_forked_child_lets_go_and_the_parent_keeps_the_lock(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path / "data")
    await backend.open()
    await put(backend, KEY, payload(1))
    await backend.close()
    program = (
        "import asyncio, os, sys\n"
        "from holdfast.backends.file import FileBackend\n"
        "from holdfast.errors import FailedError, HeldError\n"
        "backend = FileBackend(sys.argv[1])\n"
        "asyncio.run(backend.open())\n"
        "async def child():\n"
        "    try:\n"
        "        await backend.read('main', [])\n"
        "    except FailedError:\n"
        "        await backend.close()\n"
        "        try:\n"
        "            await FileBackend(sys.argv[1]).open()\n"
        "        except HeldError:\n"
        "            return 7\n"
        "    return 1\n"
        "if not (pid := os.fork()):\n"
        "    os._exit(asyncio.run(child()))\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "asyncio.run(backend.close())\n"
    )
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program, str(tmp_path / "data")], capture_output=True, text=True
    )
    assert done.stdout == "7\n", done.stderr
