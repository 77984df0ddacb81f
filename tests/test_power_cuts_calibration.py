"""Can the simulated disk see a fault? Each planted one must yield violations, where the code as it is has none."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from power_workloads import FOCUS, WORKLOADS, make_backend

from holdfast.backends.disk import Disk, Mode
from holdfast.testing.faults import WrappedDisk
from holdfast.testing.power import Cuts, Ground, power_cuts


class NoDataSync(WrappedDisk):
    def fdatasync(self, fd: int) -> None:
        pass


class NoDirectorySync(WrappedDisk):
    def fsync(self, fd: int) -> None:
        pass


class RenameBeforeSync(WrappedDisk):
    """Syncs a temporary file only after it has its name."""

    late: int | None = None

    def open_file(self, name: str, mode: Mode, *, at: int) -> int:
        fd = super().open_file(name, mode, at=at)
        if name.endswith(".tmp"):
            self.late = fd
        return fd

    def fdatasync(self, fd: int) -> None:
        if fd != self.late:
            super().fdatasync(fd)

    def rename(self, old: str, new: str, *, at: int) -> None:
        super().rename(old, new, at=at)
        self.disk.fsync(at)
        late, self.late = self.late, None
        if late is not None and old.endswith(".tmp"):
            self.disk.fdatasync(late)


class KeepsTornTail(WrappedDisk):
    def truncate(self, fd: int, size: int) -> None:
        pass


class SyncBeforeWrite(WrappedDisk):
    def write(self, fd: int, data: bytes | memoryview) -> int:
        self.disk.fdatasync(fd)
        return super().write(fd, data)

    def fdatasync(self, fd: int) -> None:
        pass


class ShortWriteCalledWhole(WrappedDisk):
    """Takes only the first half of a long write, and says that it took all."""

    def write(self, fd: int, data: bytes | memoryview) -> int:
        if len(data) > 700:
            self.disk.write(fd, data[: len(data) // 2])
            return len(data)
        return super().write(fd, data)


PLANTED: list[tuple[Callable[[Disk], Disk], str]] = [
    (NoDataSync, "overwrite"),
    (NoDataSync, "group commit"),
    (NoDirectorySync, "first write"),
    (NoDirectorySync, "checkpoint"),
    (RenameBeforeSync, "checkpoint"),
    (KeepsTornTail, "recovery of a torn tail"),
    (SyncBeforeWrite, "overwrite"),
    (ShortWriteCalledWhole, "overwrite"),
]


@pytest.mark.parametrize(("fault", "name"), PLANTED)
async def test_a_planted_fault_is_found(fault: Callable[[Disk], Disk], name: str) -> None:
    one = WORKLOADS[name]
    planted = msgspec.structs.replace(one, make=lambda disk: one.make(fault(disk)))
    report = await power_cuts(
        planted.workload, make_backend, Cuts(focus=FOCUS, draws=1, most_per_cut=128), image=await one.before()
    )
    assert report.violations, f"{name}: {report}"


class NoSyncAtOpen(WrappedDisk):
    """Skips every sync until :attr:`serving`."""

    serving = False

    def fdatasync(self, fd: int) -> None:
        if self.serving:
            super().fdatasync(fd)

    def fsync(self, fd: int) -> None:
        if self.serving:
            super().fsync(fd)


async def test_acting_on_what_was_read_before_it_was_synced_is_found() -> None:
    """The defect that kills alone cannot show: kill between write and sync, restart, act, power cut."""
    one = WORKLOADS["overwrite"]
    image = await one.before()
    violations = 0
    for kill_at in range(1, 12):

        async def workload(ground: Ground, kill_at: int = kill_at) -> None:
            from holdfast.errors import HoldfastError

            try:
                await one.steps(await ground.start(kill_at=kill_at))
            except HoldfastError:
                pass
            await ground.kill()
            ground.make = lambda disk: make_backend(NoSyncAtOpen(disk))
            await ground.start()
            await ground.kill()

        report = await power_cuts(workload, make_backend, Cuts(focus=FOCUS, draws=1, most_per_cut=64), image=image)
        violations += len(report.violations)
    assert violations > 0
