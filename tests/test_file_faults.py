"""Each file-system call fails in turn: one clear error, nothing acknowledged is lost, the next attempt works."""

from __future__ import annotations

import asyncio
import errno
import resource
import subprocess
import sys
import threading
from collections.abc import Awaitable
from pathlib import Path
from typing import Literal

import pytest
from file_ground import KEY, everything, get, key, payload, put, raised, until

from holdfast.backends.disk import OsDisk
from holdfast.backends.file import FileBackend
from holdfast.contract import Key, Op
from holdfast.errors import FailedError, HoldfastError, UnavailableError, UnknownOutcomeError
from holdfast.testing.faults import FaultyDisk, WrappedDisk

Fault = int | Literal["short"]
FAULTS: tuple[Fault, ...] = (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EACCES, errno.EROFS, "short")


class Run:
    """Commits a few rows whatever happens, and remembers what was acknowledged and what was only sent."""

    def __init__(self) -> None:
        self.acknowledged: dict[Key, bytes] = {}
        self.sent: dict[Key, list[bytes]] = {}
        self.errors: list[HoldfastError] = []
        self.n = 0

    async def attempt(self, call: Awaitable[object]) -> bool:
        """Await; remember an error of ours, let any other one escape."""
        try:
            await call
        except HoldfastError as error:
            self.errors.append(error)
            return False
        return True

    async def commit(self, backend: FileBackend, at: Key, value: bytes) -> None:
        """Commit one row."""
        self.n += 1
        self.sent.setdefault(at, []).append(value)
        if await self.attempt(backend.commit("main", {at: value}, {}, op=Op("run", self.n))):
            self.acknowledged[at] = value
            self.sent[at] = [value]

    async def check(self, backend: FileBackend) -> None:
        """Every acknowledged row is there, or a later one that was sent."""
        for at, value in self.acknowledged.items():
            assert await get(backend, at) in {value, *self.sent[at]}, f"{at} was acknowledged and is gone"


async def drive(disk: FaultyDisk, place: Path) -> tuple[int, Run]:
    """Open, commit, close, open again with faults; then check with a sound disk. Return how many calls it took."""
    run = Run()
    backend = FileBackend(place, disk=disk, view_delay_seconds=0, checkpoint_bytes=900)
    for _ in range(2):
        if await run.attempt(backend.open()):
            await run.attempt(run.check(backend))
            for number in range(5):
                await run.commit(backend, key(number % 3), payload(run.n))
        await backend.close()
    calls = disk.calls
    disk.heal()
    await backend.open()
    await run.check(backend)
    await run.commit(backend, KEY, payload(99))
    await backend.close()
    sound = FileBackend(place)
    await sound.open()
    await run.check(sound)
    assert await get(sound) == payload(99), "the store works again once the disk does"
    await sound.close()
    return calls, run


@pytest.mark.parametrize("error", FAULTS)
async def test_every_call_fails_in_turn_and_nothing_acknowledged_is_lost(error: Fault, tmp_path: Path) -> None:
    calls, _ = await drive(FaultyDisk(OsDisk()), tmp_path / "sound")
    hits = 0
    step = 3 if error in (errno.ENOSPC, errno.EIO) else 7
    for at in range(1, calls + 1, step):
        disk = FaultyDisk(OsDisk(), at=at, error=error)
        place = tmp_path / str(at)
        _, run = await drive(disk, place)
        hits += disk.hits
        for found in run.errors:
            assert str(found), "every error has a message"
            assert found.__class__ is not HoldfastError
    assert hits > 10 or error == "short"


@pytest.mark.parametrize("kind", ["write", "fdatasync", "fsync", "rename", "open_file", "mkdir"])
async def test_a_kind_of_call_that_fails_for_good_fails_clearly_and_heals(kind: str, tmp_path: Path) -> None:
    await drive(FaultyDisk(OsDisk(), at=1, kind=kind, error=errno.ENOSPC, lasting=True), tmp_path / "first")
    await drive(FaultyDisk(OsDisk(), at=4, kind=kind, error=errno.EIO, lasting=True), tmp_path / "fourth")


class TailDisk(WrappedDisk):
    """A disk whose log can be told to fail, and views left alone."""

    def __init__(self) -> None:
        super().__init__(OsDisk())
        self.fail: dict[str, int] = {}
        self.half = False
        self.syncs_after_failure = 0
        self.failed = False

    def before(self, call: str) -> None:
        if threading.current_thread().name != "holdfast-writer":
            return
        if call == "fdatasync" and self.failed:
            self.syncs_after_failure += 1
        if call in self.fail:
            self.failed = self.failed or call == "fdatasync"
            raise OSError(self.fail[call], "told to fail")

    def write(self, fd: int, data: bytes | memoryview) -> int:
        if self.half and len(data) > 1:
            self.disk.write(fd, data[: len(data) // 2])
        return super().write(fd, data)


async def test_a_full_disk_refuses_commits_and_takes_them_again_when_there_is_space(tmp_path: Path) -> None:
    disk = TailDisk()
    backend = FileBackend(tmp_path / "data", disk=disk)
    await backend.open()
    await put(backend, KEY, payload(1))
    size = (tmp_path / "data" / ".holdfast" / "commit.log").stat().st_size
    disk.fail, disk.half = {"write": errno.ENOSPC}, True
    for _ in range(3):
        with pytest.raises(UnavailableError, match=r"nothing was written.*free some disk space"):
            await put(backend, KEY, payload(2), expect=1)
        assert await get(backend) == payload(1)
    assert (tmp_path / "data" / ".holdfast" / "commit.log").stat().st_size == size
    disk.fail, disk.half = {}, False
    assert await put(backend, KEY, payload(2), expect=1) == 2
    await backend.close()
    await backend.open()
    assert await get(backend) == payload(2)
    await backend.close()


async def test_a_write_that_cannot_be_taken_back_has_an_unknown_outcome(tmp_path: Path) -> None:
    disk = TailDisk()
    backend = FileBackend(tmp_path / "data", disk=disk)
    await backend.open()
    await put(backend, KEY, payload(1))
    disk.fail, disk.half = {"write": errno.EIO, "truncate": errno.EIO}, True
    op = Op("again", 1)
    with pytest.raises(UnknownOutcomeError, match="open it again"):
        await backend.commit("main", {KEY: payload(2)}, {KEY: 1}, op=op)
    with pytest.raises(FailedError, match="earlier commit failed"):
        await put(backend, KEY, payload(3))
    await backend.close()
    disk.fail, disk.half = {}, False
    await backend.open()
    assert await backend.commit("main", {KEY: payload(2)}, {KEY: 1}, op=op) == 2
    await backend.close()


async def test_after_a_failed_sync_nothing_is_synced_again_until_it_is_opened_anew(tmp_path: Path) -> None:
    disk = TailDisk()
    backend = FileBackend(tmp_path / "data", disk=disk)
    await backend.open()
    await put(backend, KEY, payload(1))
    log = tmp_path / "data" / ".holdfast" / "commit.log"
    inode = log.stat().st_ino
    disk.fail = {"fdatasync": errno.EIO}
    op = Op("again", 1)
    with pytest.raises(UnknownOutcomeError):
        await backend.commit("main", {KEY: payload(2)}, {KEY: 1}, op=op)
    disk.fail = {}
    with pytest.raises(FailedError):
        await put(backend, KEY, payload(3))
    assert await get(backend) == payload(1), "what is not known to be durable is not shown"
    await backend.close()
    assert disk.syncs_after_failure == 0
    await backend.open()
    assert log.stat().st_ino != inode, "what the kernel may have forgotten is written anew"
    assert await backend.commit("main", {KEY: payload(2)}, {KEY: 1}, op=op) == 2
    await backend.close()


async def test_those_queued_behind_a_failed_flush_are_told_that_nothing_was_written(tmp_path: Path) -> None:
    go_on, waiting = threading.Event(), threading.Event()

    class Gate(TailDisk):
        def before(self, call: str) -> None:
            if call == "fdatasync" and self.fail and threading.current_thread().name == "holdfast-writer":
                waiting.set()
                assert go_on.wait(20)
            super().before(call)

    disk = Gate()
    backend = FileBackend(tmp_path / "data", disk=disk)
    await backend.open()
    disk.fail = {"fdatasync": errno.EIO}
    op = Op("first", 1)
    first = asyncio.ensure_future(backend.commit("main", {KEY: payload(1)}, {}, op=op))
    await until(waiting.is_set)
    repeated = asyncio.ensure_future(backend.commit("main", {KEY: payload(1)}, {}, op=op))
    conflict = asyncio.ensure_future(put(backend, KEY, payload(2), expect=0))
    behind = asyncio.ensure_future(put(backend, key(2), payload(2)))
    await asyncio.sleep(0)
    go_on.set()
    assert type(await raised(first)) is UnknownOutcomeError
    assert type(await raised(repeated)) is UnknownOutcomeError
    assert type(await raised(conflict)) is UnavailableError
    assert type(await raised(behind)) is UnavailableError
    await backend.close()


async def test_a_read_only_directory_is_refused_with_the_remedy(tmp_path: Path) -> None:
    disk = FaultyDisk(OsDisk(), at=1, kind="mkdir", error=errno.EROFS)
    with pytest.raises(UnavailableError, match="mount the file system for writing"):
        await FileBackend(tmp_path / "data", disk=disk).open()


async def test_views_that_cannot_be_written_never_fail_a_commit_and_are_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class NoViews(WrappedDisk):
        broken = True

        def before(self, call: str) -> None:
            if self.broken and call == "write" and threading.current_thread().name == "holdfast-views":
                raise OSError(errno.ENOSPC, "No space left on device")

    disk = NoViews(OsDisk())
    backend = FileBackend(tmp_path / "data", disk=disk, view_delay_seconds=0)
    await backend.open()
    for number in range(20):
        await put(backend, key(number), payload(number))
    await until(lambda: "free some disk space" in caplog.text)
    assert caplog.text.count("waits") == 1
    disk.broken = False
    last = tmp_path / "data" / "signal" / "S19_trend_binance" / "S19.json"
    await until(last.exists)
    await backend.close()


def test_a_file_size_limit_refuses_a_commit_and_tears_nothing(tmp_path: Path) -> None:
    program = (
        "import asyncio, resource, sys\n"
        "from holdfast.backends.file import FileBackend\n"
        "from holdfast.contract import Key, Op\n"
        "from holdfast.errors import UnavailableError\n"
        "async def main():\n"
        "    backend = FileBackend(sys.argv[1])\n"
        "    await backend.open()\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))\n"
        "    key, n = Key('signal', 'a', 'b'), 0\n"
        "    try:\n"
        "        while True:\n"
        "            n = await backend.commit('main', {key: b'{%d}' % n}, {}, op=Op('w', n + 1))\n"
        "    except UnavailableError as error:\n"
        "        assert 'ulimit -f' in str(error), error\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "    assert await backend.commit('main', {key: b'{}'}, {key: n}, op=Op('w', n + 1)) == n + 1\n"
        "    await backend.close()\n"
        "    print(n)\n"
        "asyncio.run(main())\n"
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert soft == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "data")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = asyncio.run(_numbers(tmp_path / "data"))
    assert numbers == int(done.stdout) + 1 > 10


async def _numbers(place: Path) -> int:
    backend = FileBackend(place)
    await backend.open()
    try:
        return (await everything(backend))["main"][0].number
    finally:
        await backend.close()
