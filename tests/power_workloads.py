"""What is done to a file store while the power is cut; shared by the proof and by its calibration."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from holdfast.backends.disk import Disk
from holdfast.backends.file import FileBackend
from holdfast.contract import Backend, Key, Op
from holdfast.testing.disk import SimulatedDisk
from holdfast.testing.medium import Image, Medium
from holdfast.testing.power import Ground, Workload

BASE = "/disk/dump/data"
SIGNAL = Key("signal", "BTCUSDT_a_x", "BTCUSDT")
PARTIAL = Key("partial", "BTCUSDT_a_x", "levels")
RISK = Key("risk", "limits", "BTCUSDT_a_x")
OTHER = Key("signal", "ETHUSDT_a_x", "ETHUSDT")
LARGE = b'{"note":"' + b"n" * 900 + b'"}'


def FOCUS(path: str) -> bool:
    """Only what recovery reads to decide is enumerated in full; of the views, draws are taken."""
    return not path.startswith(f"{BASE}/") or path.startswith(f"{BASE}/.holdfast")


def make_backend(disk: Disk) -> Backend:
    return FileBackend(BASE, disk=disk, view_delay_seconds=0.0)


def make_with_checkpoints(disk: Disk) -> Backend:
    return FileBackend(BASE, disk=disk, view_delay_seconds=0.0, checkpoint_bytes=512)


def row(number: int) -> bytes:
    return b'{"priceOpen":%d.5}' % number


class Steps(Protocol):
    """Commits to an open backend; ``again`` when a process does it a second time."""

    def __call__(self, backend: Backend, *, again: bool = False) -> Awaitable[None]: ...


class PowerWorkload(msgspec.Struct, kw_only=True):
    """One workload: what was done before (durable), what is done while the power is cut, how to end."""

    steps: Steps
    earlier: Steps | None = None
    make: Callable[[Disk], Backend] = make_backend
    ending: str = "kill"
    nested: int = 6
    most_per_cut: int = 512
    alter: Callable[[Image], Image] = lambda image: image

    async def before(self) -> Image:
        """Return the image that the workload finds."""
        if self.earlier is None:
            return ()
        medium = Medium()
        backend = self.make(SimulatedDisk(medium))
        await backend.open()
        await self.earlier(backend)
        await backend.close()
        return self.alter(medium.now())

    @property
    def workload(self) -> Workload:
        async def run(ground: Ground) -> None:
            ground.make = self.make
            await self.steps(await ground.start())
            await (ground.stop() if self.ending == "close" else ground.kill())

        return run


def _op(number: int, *, again: bool) -> Op:
    return Op("second" if again else "first", number)


async def nothing(backend: Backend, *, again: bool = False) -> None:
    await asyncio.sleep(0)


async def first_write(backend: Backend, *, again: bool = False) -> None:
    await backend.commit("main", {SIGNAL: row(1)}, {}, op=_op(1, again=again))


async def three_rows(backend: Backend, *, again: bool = False) -> None:
    await backend.commit("main", {SIGNAL: row(1), RISK: row(1), PARTIAL: row(1)}, {}, op=Op("before", 1))
    await backend.commit("main.ledger", {Key("ledger", "BTCUSDT_a_x", "id"): row(9)}, {}, op=Op("before", 1))


async def overwrite(backend: Backend, *, again: bool = False) -> None:
    await backend.commit("main", {SIGNAL: row(2)}, {}, op=_op(1, again=again))
    await backend.commit("main", {SIGNAL: LARGE}, {}, op=_op(2, again=again))


async def delete(backend: Backend, *, again: bool = False) -> None:
    await backend.commit("main", {SIGNAL: None}, {}, op=_op(1, again=again))
    await backend.commit("main", {RISK: None, PARTIAL: None}, {}, op=_op(2, again=again))


async def three_domains(backend: Backend, *, again: bool = False) -> None:
    await backend.commit("main", {SIGNAL: LARGE, RISK: row(2), PARTIAL: None}, {}, op=_op(1, again=again))
    await backend.commit("main", {SIGNAL: None, RISK: None, PARTIAL: row(3)}, {}, op=_op(2, again=again))


async def group_commit(backend: Backend, *, again: bool = False) -> None:
    writers = [Op(f"writer-{i}", 2 if again else 1) for i in range(6)]
    await asyncio.gather(
        *(
            backend.commit("main", {Key("signal", f"S{i}_a_x", f"S{i}"): row(i), RISK: row(i)}, {}, op=op)
            for i, op in enumerate(writers)
        )
    )


async def checkpoints(backend: Backend, *, again: bool = False) -> None:
    for number in range(1, 8):
        await backend.commit("main", {SIGNAL: LARGE[:300], OTHER: row(number)}, {}, op=_op(number, again=again))


def in_log(change: Callable[[bytes], bytes]) -> Callable[[Image], Image]:
    """Alter the log's bytes in an image."""
    return lambda image: tuple(
        (path, change(data) if data is not None and path.endswith("commit.log") else data) for path, data in image
    )


torn = in_log(lambda data: data + b"HF1 0000" + b"\xff" * 600)
"""Leave an unfinished frame at the log's end, as a cut within a write does."""
damaged = in_log(lambda data: data.replace(b'{"priceOpen":1.5}', b'{"priceOpen":7.5}', 1))
"""Change a byte within a stored row."""

WORKLOADS: dict[str, PowerWorkload] = {
    "first use of an empty directory": PowerWorkload(steps=nothing),
    "first write": PowerWorkload(steps=first_write),
    "first write and close": PowerWorkload(steps=first_write, ending="close"),
    "overwrite": PowerWorkload(steps=overwrite, earlier=three_rows),
    "delete": PowerWorkload(steps=delete, earlier=three_rows),
    "three domains": PowerWorkload(steps=three_domains, earlier=three_rows, ending="close"),
    "group commit": PowerWorkload(steps=group_commit, earlier=three_rows),
    "checkpoint": PowerWorkload(steps=checkpoints, earlier=three_rows, make=make_with_checkpoints),
    "recovery of a torn tail": PowerWorkload(steps=overwrite, earlier=three_rows, alter=torn),
    "close": PowerWorkload(steps=nothing, earlier=three_rows, ending="close"),
    "quarantine of a damaged row": PowerWorkload(steps=overwrite, earlier=three_rows, alter=damaged),
}
