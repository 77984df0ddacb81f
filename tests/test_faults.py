"""The disk fails at every call in turn: one clear error, nothing acknowledged is lost, the next attempt works."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from power_workloads import BASE, FOCUS, PARTIAL, RISK, SIGNAL, WORKLOADS, make_backend, row

from holdfast.backends.disk import OsDisk
from holdfast.backends.file import FileBackend
from holdfast.contract import Backend, Key, Op
from holdfast.errors import (
    CorruptedError,
    FailedError,
    FencedError,
    HoldfastError,
    UnavailableError,
    UnknownOutcomeError,
)
from holdfast.testing.disk import SimulatedDisk
from holdfast.testing.faults import ERRNOS, Fault, FaultyBackend, FaultyDisk
from holdfast.testing.history import History, Witnessed, observe
from holdfast.testing.medium import Medium
from holdfast.testing.power import Cuts, Ground, power_cuts
from holdfast.testing.steps import cancelled_at

Note = Callable[[str, object], None]
Error = int | Literal["short"]
MOST_CALLS = 400
BY_NAME = {**{errno.errorcode[number]: number for number in ERRNOS}, "short write": "short"}


async def some_commits(backend: Backend, begin: int) -> None:
    """Three commits over three domains, one after another; the second waits for nobody's view."""
    for n in range(3):
        changes: dict[Key, bytes | None] = {SIGNAL: row(begin + n), RISK: row(begin + n)}
        changes[PARTIAL] = None if n == 1 else row(begin + n)
        await backend.commit("main", changes, {}, op=Op(f"lane-{begin}", n + 1))


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("name", BY_NAME)
async def test_each_failing_call_of_a_store_is_one_clear_error_and_loses_nothing(
    name: str, lasting: bool, record_property: Note
) -> None:
    error: Error = BY_NAME[name]  # type: ignore[assignment]
    image = await WORKLOADS["overwrite"].before()
    faults = 0
    for at in range(1, MOST_CALLS):
        medium, history = Medium(image), History()
        history.acted_on(await observed(medium))
        kind = "write" if error == "short" else ""
        disk = FaultyDisk(SimulatedDisk(medium), at=at, kind=kind, error=error, lasting=lasting)
        backend = Witnessed(make_backend(disk), history)
        said: HoldfastError | None = None
        try:
            await backend.open()
            await some_commits(backend, 10)
        except HoldfastError as raised:
            said = raised
        faults += bool(disk.hits)  # a view that cannot be written is no error of a commit
        if said is not None:
            assert not isinstance(said, CorruptedError | FencedError), f"call {at}: a failing disk is neither: {said!r}"
            assert isinstance(said, UnavailableError | UnknownOutcomeError | FailedError), f"call {at}: {said!r}"
            assert len(str(said)) > 20 and BASE in str(said), f"call {at}: the message names no place: {said}"
        disk.heal()
        backend = await next_attempt(backend, disk, history, said)
        await some_commits(backend, 20)
        state = await observe(backend)
        await backend.close()
        wrong = history.violation(state, history.moment)
        assert wrong is None, f"call {at}: {wrong}"
        wrong = history.violation(await observed(medium), history.moment)
        assert wrong is None, f"call {at}, after a restart: {wrong}"
        assert disk.disk.open_files == 0, f"call {at}: descriptors leaked"  # type: ignore[attr-defined]
        if not disk.hits:
            break
    else:
        raise AssertionError("more calls than expected")
    record_property("proof:failing disk calls", {"faults": faults, "lost": 0})
    assert faults >= 4


async def observed(medium: Medium) -> Any:
    """What a fresh process on a sound disk finds."""
    disk = SimulatedDisk(medium)
    backend = make_backend(disk)
    await backend.open()
    try:
        return await observe(backend)
    finally:
        disk.kill()
        try:
            await backend.close()
        except HoldfastError:
            pass


async def next_attempt(
    backend: Witnessed, disk: FaultyDisk, history: History, said: HoldfastError | None
) -> Witnessed:  # fmt: skip
    """Do what the error says: try again, or close and open again."""
    if said is None:
        return backend
    try:
        if isinstance(said, UnavailableError):
            await backend.commit("main", {SIGNAL: row(1)}, {}, op=Op("again", 1))
            return backend
    except FailedError:
        pass  # it was the opening that failed
    await backend.close()
    # What was under way is found out by reading, as by any process that starts.
    again = Witnessed(backend.backend, history)
    await again.open()
    return again


async def test_a_failed_sync_is_never_followed_by_trust_in_the_same_file(record_property: Note) -> None:
    """After a failed sync the kernel calls its pages clean: what is acknowledged later must lie in a fresh file."""
    one = WORKLOADS["overwrite"]
    image = await one.before()
    found = 0
    for failing in range(1, 9):

        async def workload(ground: Ground, failing: int = failing) -> None:
            nonlocal found
            backend = await started(ground, failing)
            try:
                await one.steps(backend)
            except HoldfastError:
                found += 1
            await backend.close()
            ground.disk.failing_syncs = set()
            await backend.open()
            await one.steps(backend, again=True)
            await ground.kill()

        report = await power_cuts(workload, make_backend, Cuts(focus=FOCUS, draws=1, most_per_cut=32), image=image)
        assert not report.violations, f"sync {failing}: {report}"
        record_property("proof:power cuts", {"cuts": report.cuts, "images": report.images, "distinct": report.distinct})
    assert found >= 2


async def started(ground: Ground, failing: int) -> Backend:
    """Start a process whose sync of this number fails; if that was the opening's, it starts once more."""
    try:
        return await ground.start(failing_syncs=frozenset((failing,)))
    except HoldfastError:
        ground.disk.failing_syncs = set()
        backend = ground._backend
        assert backend is not None
        await backend.open()
        return backend


@pytest.mark.parametrize("call", ["open", "close", "commit"])
async def test_cancellation_between_any_two_steps_leaves_no_half_state_and_nothing_running(
    call: str, tmp_path: Path
) -> None:
    threads = _threads()
    for at in range(1, 60):
        place = tmp_path / str(at)
        first = FileBackend(place)
        if call != "open":
            await first.open()
            await first.commit("main", {SIGNAL: row(1), RISK: row(1)}, {}, op=Op("a", 1))
        work: dict[str, Callable[[], Any]] = {
            "open": first.open,
            "close": first.close,
            "commit": partial(first.commit, "main", {SIGNAL: row(2), RISK: row(2)}, {}, op=Op("a", 2)),
        }
        cancelled, _ = await cancelled_at(work[call](), at)
        await first.close()
        again = FileBackend(place)
        await again.open()
        rows = {record.payload for record in (await again.read("main", [SIGNAL, RISK])).values()}
        assert len(rows) <= 1, "half of a commit"
        assert call == "open" or rows, "an acknowledged commit is gone"
        await again.commit("main", {SIGNAL: row(3)}, {}, op=Op("b", 1))
        await again.close()
        if not cancelled:
            break
    else:
        raise AssertionError("too many steps")
    assert _threads() <= threads


def _threads() -> int:
    import threading

    return threading.active_count()


async def test_a_directory_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    """Not as root, who may write anywhere: the seam says what the system would."""
    for number in (errno.EACCES, errno.EROFS):
        disk = FaultyDisk(OsDisk(), at=1, kind="mkdir", error=number, lasting=True)
        backend = FileBackend(tmp_path / "new" / "data", disk=disk)
        with pytest.raises(UnavailableError, match="data"):
            await backend.open()
        await backend.close()
    assert not (tmp_path / "new").exists()


async def test_a_row_is_not_seen_before_it_is_durable(tmp_path: Path) -> None:
    """Hold the sync: whoever reads meanwhile waits, or sees what was there before."""
    import threading

    entered, go_on = threading.Event(), threading.Event()

    class Held(FaultyDisk):
        holding = False

        def fdatasync(self, fd: int) -> None:
            if self.holding:
                entered.set()
                assert go_on.wait(30)
            super().fdatasync(fd)

    disk = Held(OsDisk())
    backend = FileBackend(tmp_path, disk=disk, view_delay_seconds=1.0)
    await backend.open()
    await backend.commit("main", {SIGNAL: row(1)}, {}, op=Op("a", 1))
    disk.holding = True
    commit = asyncio.ensure_future(backend.commit("main", {SIGNAL: row(2)}, {}, op=Op("a", 2)))
    assert await asyncio.to_thread(entered.wait, 30)
    reading = asyncio.ensure_future(backend.read("main", [SIGNAL]))
    done, _ = await asyncio.wait([reading], timeout=0.05)
    early = [one.result()[SIGNAL].payload for one in done]
    head = (await asyncio.wait_for(backend.head("main"), 5)).number if done else 1
    go_on.set()
    assert await commit == 2
    await reading
    await backend.close()
    assert early in ([], [row(1)])
    assert head == 1


@pytest.mark.parametrize("kind", ["unavailable", "unknown_applied", "unknown_lost", "die_before", "die_after"])
async def test_a_store_answers_each_fault_of_its_backend_with_its_own_error(kind: Any) -> None:
    from holdfast.backends.memory import MemoryBackend
    from holdfast.contract import Survives
    from holdfast.domains import context_key
    from holdfast.names import Context
    from holdfast.rows import Guard
    from holdfast.store import Store

    expected = {
        "unavailable": UnavailableError,
        "unknown_applied": UnknownOutcomeError,
        "unknown_lost": UnknownOutcomeError,
        "die_before": FailedError,
        "die_after": FailedError,
    }[kind]
    key = Key("guard", "limits", "guard")
    assert context_key("signal", Context("x", "y", "z"))
    memory = MemoryBackend()
    store = Store(FaultyBackend(memory, Fault(2, kind)), require=Survives.NOTHING)
    await store.open()
    writer = store.writer("test")
    await writer.commit({key: Guard(changes=1)}, {key: 0})
    with pytest.raises(expected):
        await writer.commit({key: Guard(changes=2)}, {key: 1})
    if kind.startswith("unknown"):
        assert await writer.resend() == 2
        loaded = await store.get(key)
        assert loaded is not None and loaded.row == Guard(changes=2)
    await store.close()


async def test_a_commit_taken_out_of_the_middle_of_the_log_is_noticed(tmp_path: Path) -> None:
    """Each scope's own numbers would not tell: the one commit of its scope is taken out."""
    backend = FileBackend(tmp_path)
    await backend.open()
    await backend.commit("main", {SIGNAL: row(1)}, {}, op=Op("a", 1))
    await backend.commit("other", {RISK: row(1)}, {}, op=Op("a", 1))
    await backend.commit("main", {SIGNAL: row(2)}, {}, op=Op("a", 2))
    await backend.close()
    log = tmp_path / ".holdfast" / "commit.log"
    frames = log.read_bytes().split(b"HF1 ")
    (odd,) = [at for at, frame in enumerate(frames) if b'"other"' in frame]
    log.write_bytes(b"HF1 ".join(frames[:odd] + frames[odd + 1 :]))
    (tmp_path / ".holdfast" / "witness").unlink(missing_ok=True)
    with pytest.raises(CorruptedError, match="frame"):
        await FileBackend(tmp_path).open()
