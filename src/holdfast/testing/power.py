"""Power cuts: run a workload once on a simulated disk, then open every image that a cut may have left.

Example, over the file backend::

    report = await power_cuts(workload, lambda disk: FileBackend("/disk/data", disk=disk))
    assert not report.violations, report
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec

from ..backends.disk import Disk
from ..contract import Backend
from ..errors import HoldfastError
from .disk import SimulatedDisk
from .history import History, State, Witnessed, observe
from .medium import Image, Medium

MakeBackend = Callable[[Disk], Backend]
Focus = Callable[[str], bool]


class PowerReport(msgspec.Struct, kw_only=True):
    """What the cuts showed. Reports of several workloads add up with ``+=``."""

    cuts: int = 0
    """Moments at which the power was cut."""
    images: int = 0
    """Images that those cuts may leave, counted at each cut."""
    distinct: int = 0
    """Images that differ; each was opened and read by the library's own recovery."""
    violations: list[str] = []

    def __iadd__(self, other: PowerReport) -> PowerReport:
        self.cuts += other.cuts
        self.images += other.images
        self.distinct += other.distinct
        self.violations += other.violations
        return self

    def __str__(self) -> str:
        first = "".join(f"\n  {text}" for text in self.violations[:5])
        return (
            f"power cuts: {self.cuts} cuts, {self.images} images, {self.distinct} distinct, "
            f"{len(self.violations)} violations{first}"
        )


class Cuts(msgspec.Struct, frozen=True, kw_only=True):
    """How to cut, and how many images to try."""

    order: Literal["posix", "journal"] = "posix"
    """How a directory's changes persist; see :mod:`holdfast.testing.medium`."""
    most_per_cut: int = 512
    """Images of one cut that are tried; beyond it, a sample."""
    focus: Focus = lambda path: True
    """Paths that recovery may read to decide: enumerated. What happens to the others is drawn."""
    draws: int = 2
    """How many draws of the others to try for each image of the paths in focus."""
    nested: int = 0
    """Out of the images found, cut the power again during the recovery of so many."""
    seed: int = 0
    """For what is drawn instead of enumerated."""


class Ground:
    """What a workload runs on: one medium, and simulated processes that come and go.

    Attributes:
        history: What was begun and acknowledged so far.
        disk: The disk of the process that runs now.
    """

    def __init__(self, make: MakeBackend, medium: Medium, history: History) -> None:
        self.make = make
        self.medium = medium
        self.history = history
        self.disk = SimulatedDisk(medium)
        self._backend: Backend | None = None

    async def start(self, *, kill_at: int | None = None, failing_syncs: frozenset[int] = frozenset()) -> Backend:
        """Start a new process: open a backend; from here on what it holds counts as acted on.

        Args:
            kill_at: The process dies before the medium's changing call of this number.
            failing_syncs: Which syncs of the process fail, 1 being the first.
        """
        self.disk = SimulatedDisk(self.medium)
        self.disk.kill_at = kill_at
        self.disk.failing_syncs = set(failing_syncs)
        backend = self.backend()
        await backend.open()
        return backend

    def backend(self) -> Backend:
        """Return a backend that is not open yet, on the disk of the process that runs now."""
        self._backend = Witnessed(self.make(self.disk), self.history)
        return self._backend

    async def stop(self) -> None:
        """Close the backend in good order."""
        if self._backend is not None:
            await self._backend.close()

    async def kill(self) -> None:
        """End the process here; what it wrote stays in the page cache."""
        self.disk.kill()
        if self._backend is not None:
            await _abandon(self._backend)


Workload = Callable[[Ground], Awaitable[None]]


async def _abandon(backend: Backend) -> None:
    try:
        await backend.close()
    except HoldfastError:
        pass  # its disk is dead: only its threads and tasks had to be ended


class _Recorder:
    """Collects the images of each cut, and the moments at which each may be found."""

    def __init__(self, medium: Medium, history: History, cuts: Cuts) -> None:
        self.medium = medium
        self.history = history
        self.cuts = cuts
        self.rng = random.Random(cuts.seed)
        self.found: dict[Image, set[int]] = {}
        self.report = PowerReport(violations=[])
        self._sharp: dict[Image, list[Image]] = {}

    def cut(self) -> None:
        """Note every image that a cut at this moment may leave."""
        self.report.cuts += 1
        cuts = self.cuts
        for image in self.medium.images(rng=self.rng, order=cuts.order, most=cuts.most_per_cut, focus=cuts.focus):
            self.report.images += 1
            sharp = tuple(item for item in image if cuts.focus(item[0]))
            drawn = self._sharp.setdefault(sharp, [])
            if image not in self.found:
                if len(drawn) >= cuts.draws:
                    image = self.rng.choice(drawn)  # enough of what is only sampled: take one seen before
                else:
                    drawn.append(image)
            self.found.setdefault(image, set()).add(self.history.moment)


async def recovered(
    make: MakeBackend, image: Image, check: Callable[[Backend], Awaitable[None]] | None = None
) -> State:
    """Open an image with the library's own recovery and return what it holds.

    Raises:
        HoldfastError: The image cannot be opened.
        AssertionError: ``check`` found fault with it.
    """
    disk = SimulatedDisk(Medium(image))
    backend = make(disk)
    try:
        await backend.open()
        state = await observe(backend)
        if check is not None:
            await check(backend)
        return state
    finally:
        disk.kill()
        await _abandon(backend)


async def power_cuts(
    workload: Workload,
    make: MakeBackend,
    cuts: Cuts = Cuts(),
    *,
    image: Image = (),
    check: Callable[[Backend], Awaitable[None]] | None = None,
) -> PowerReport:
    """Run ``workload`` once, cut the power before each of its changing calls, and judge every image.

    Args:
        workload: Starts processes with ``ground.start()``, commits, stops or kills.
        make: Makes a backend over a disk; its directory lies under ``/disk``.
        cuts: How to cut, and how many images to try.
        image: What lies on the disk at first.
        check: More to assert about each recovered backend, such as the engine's invariants.

    Returns:
        The counts, and one sentence for each violation.
    """
    medium, history = Medium(image), History()
    recorder = _Recorder(medium, history, cuts)
    medium.before_change = recorder.cut
    await workload(Ground(make, medium, history))
    recorder.cut()
    medium.before_change = lambda: None
    report = recorder.report
    report.distinct = len(recorder.found)
    states: dict[Image, State] = {}
    for at, (found, moments) in enumerate(recorder.found.items()):
        wrong: str | None
        try:
            states[found] = await recovered(make, found, check)
            wrong = next((text for m in sorted(moments) if (text := history.violation(states[found], m))), None)
        except (HoldfastError, AssertionError) as error:
            wrong = f"unreadable: {type(error).__name__}: {error}"
        if wrong:
            report.violations.append(f"image {at}: {wrong}")
    for found in recorder.rng.sample(list(states), min(cuts.nested, len(states))):
        again = msgspec.structs.replace(
            cuts, seed=recorder.rng.randrange(1 << 30), most_per_cut=min(64, cuts.most_per_cut), draws=1, nested=0
        )
        report += await power_cuts(_recover_to(states[found]), make, again, image=found, check=check)
    return report


def _recover_to(expected: State) -> Workload:
    """Recover an image once more, with cuts meanwhile, and commit one row after it."""

    async def workload(ground: Ground) -> None:
        ground.history.acted_on(expected)  # what one recovery found, every other one must find
        backend = await ground.start()
        await go_on(backend)
        await ground.stop()

    return workload


async def go_on(backend: Backend) -> None:
    """Commit one row more, as a process does after its recovery."""
    from ..contract import Key, Op

    scope = next(iter([scope async for scope in backend.scopes()]), "main")
    head = await backend.head(scope)
    op = Op(f"went-on-at-{head.number}", 1)
    await backend.commit(scope, {Key("signal", "WENTON_a_x", "WENTON"): b'{"went":"on"}'}, {}, op=op)
