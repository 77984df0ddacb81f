"""Emergency journals of a fleet: an exit that lies in one is merged or told of, wherever its context has gone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from emergency_kit import CONTEXT, TARGET, Place, Process, policy_of, stored
from fakes import candle, memory_store, proposal, sound, stepped

from holdfast.engine.emergency import Emergency
from holdfast.engine.health import health_of
from holdfast.engine.journals import JournalFolder, Journals
from holdfast.engine.modes import TroublePolicy
from holdfast.errors import InvalidInputError
from holdfast.names import Context


class Machine:
    """Workers of one machine, one after the other or at once, on a store that outlives them."""

    def __init__(self, place: Path) -> None:
        self.folder = JournalFolder(str(place / "journals"))
        self.place = Place(place)
        self.told: list[tuple[Context, str]] = []

    async def worker(self, number: int) -> tuple[Process, Journals]:
        """Start one whose journal has this number."""
        self.place.policy = policy_of(self.folder.path / f"worker-{number}")
        process = await self.place.process(signals={1: proposal(), 3: proposal()})
        process.be_patient()
        await process.health.emergency.open()
        policy = process.health.policy
        told = lambda context, why: self.told.append((context, why))  # noqa: E731
        return process, Journals(process.store, process.health.emergency, policy, self.folder, told)

    async def with_an_exit(self, number: int) -> tuple[Process, Journals]:
        """Start one that opens, loses its store, and closes."""
        process, journals = await self.worker(number)
        session = await process.start()
        await stepped(session, candle(0, 43000))
        process.backend.go("refuses")
        assert [event.kind for event in await stepped(session, TARGET)] == ["closed"]
        assert session.unsaved == 1
        return process, journals

    async def kept(self, number: int) -> list[Context]:
        """Return of which contexts a file of an ended worker keeps something."""
        policy = policy_of(self.folder.path / f"worker-{number}")
        emergency = Emergency(await memory_store(self.place.memory), policy)
        await emergency.open()
        await emergency.close()
        return emergency.contexts


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


async def finished(process: Process) -> dict[str, Any]:
    """Deliver what waits, end the process, and return what it left in the store."""
    await process.session.flush()
    while process.session.outbox.has_early:
        await process.session.flush()
    await process.session.deliver()
    await process.session.close()
    await sound(process.store)
    return await stored(process.store)


async def untroubled(place: Path) -> dict[str, Any]:
    """Return what a run leaves whose store never went away."""
    process = await Place(place).process()
    await stepped(await process.start(), candle(0, 43000), TARGET)
    await process.session.close()
    return await stored(process.store)


async def test_the_exit_of_a_worker_that_died_is_merged_by_the_one_that_takes_its_context_over(
    machine: Machine, tmp_path: Path
) -> None:
    first, _ = await machine.with_an_exit(1)
    first.die()
    second, journals = await machine.worker(2)
    await journals.look(())
    assert second.health.emergency.contexts == [CONTEXT]
    session = await second.start()
    assert session.state.signal is None, "the candle that closed it need not come again"
    assert session.unsaved == 0
    assert await finished(second) == await untroubled(tmp_path)
    assert machine.told == []
    assert [event.number for event in machine.place.told] == [1, 2, 1, 2], "told again, as after any crash"
    assert (await machine.kept(1), await machine.kept(2)) == ([], [])


async def test_a_worker_that_dies_while_it_takes_over_what_another_left_leaves_it_twice_and_it_is_merged_once(
    machine: Machine, tmp_path: Path
) -> None:
    first, _ = await machine.with_an_exit(1)
    first.die()
    before = tmp_path / "before"
    shutil.copy(machine.folder.path / "worker-1", before)
    second, journals = await machine.worker(2)
    await journals.look(())
    for space in second.spaces:
        space.close()
    shutil.copy(before, machine.folder.path / "worker-1")
    third, journals = await machine.worker(3)
    await journals.look(())
    await third.start()
    await journals.look((CONTEXT,))
    assert await finished(third) == await untroubled(tmp_path)
    assert [await machine.kept(n) for n in (1, 2, 3)] == [[], [], []]
    assert machine.told == []


async def test_an_exit_whose_context_moved_to_another_worker_that_has_gone_on_is_told_of_and_forgotten(
    machine: Machine,
) -> None:
    first, journals = await machine.with_an_exit(1)
    first.session.writer.background.cancel()
    first.backend.go("")
    await journals.look(())
    assert first.health.emergency.contexts == [CONTEXT], "nobody has gone on yet"
    second, others = await machine.worker(2)
    await others.look(())
    assert second.health.emergency.contexts == [], "the first one lives, so its journal is its own"
    session = await second.start()
    assert session.state.signal is not None
    told = await stepped(session, TARGET, candle(2, 43000))
    assert [event.kind for event in told if event.number > 1] == ["closed", "opened"]
    await journals.look(())
    await journals.look(())
    assert machine.told == [(CONTEXT, "commit 1 of the emergency journal was left out: another owner has gone on")]
    assert first.health.emergency.contexts == []
    await second.session.close()
    assert len(await second.store.scan("ledger")) == 1
    first.die()
    assert await machine.kept(1) == []


async def test_what_an_ended_worker_left_of_a_context_that_runs_here_already_is_told_of(machine: Machine) -> None:
    first, _ = await machine.with_an_exit(1)
    second, journals = await machine.worker(2)
    await stepped(await second.start(), TARGET, candle(2, 43000))
    first.die()
    await journals.look((CONTEXT,))
    assert [context for context, _ in machine.told] == [CONTEXT]
    assert second.health.emergency.contexts == []
    assert second.session.unsaved == 0
    await second.session.close()
    assert await machine.kept(1) == []


async def test_an_exit_that_another_worker_has_found_too_needs_no_word(machine: Machine) -> None:
    first, journals = await machine.with_an_exit(1)
    second, _ = await machine.worker(2)
    await stepped(await second.start(), TARGET)
    first.backend.go("")
    first.session.writer.background.cancel()
    await journals.look(())
    assert (machine.told, first.health.emergency.contexts) == ([], [])
    await second.session.close()
    first.die()


async def test_what_stays_when_a_worker_ends_is_told_of(machine: Machine) -> None:
    first, journals = await machine.with_an_exit(1)
    journals.tell_left()
    assert [context for context, why in machine.told if "stays in" in why and "worker-1" in why] == [CONTEXT]
    first.die()


async def test_each_worker_of_a_machine_takes_a_journal_of_its_own_and_one_that_is_free_again_is_used_again(
    tmp_path: Path,
) -> None:
    folder, policy = JournalFolder(str(tmp_path / "journals")), TroublePolicy(emergency_bytes=64 * 1024)
    stores = [await memory_store() for _ in range(3)]
    claimed = [await folder.claim(store, policy) for store in stores[:2]]
    assert [Path(str(one.emergency)).name for one in claimed] == ["worker-1", "worker-2"]
    assert folder.others(claimed[0].emergency) == [claimed[1].emergency]
    await health_of(stores[0]).emergency.close()
    assert (await folder.claim(stores[2], policy)).emergency == claimed[0].emergency
    for store in stores:
        await health_of(store).emergency.close()
        await store.close()


async def test_a_damaged_journal_stays_as_it_is_and_the_others_are_taken_over(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = await machine.with_an_exit(1)
    first.die()
    damaged = machine.folder.path / "worker-0"
    damaged.write_bytes(b"x" * 100_000)
    second, journals = await machine.worker(2)
    await journals.look(())
    await journals.look(())
    assert second.health.emergency.contexts == [CONTEXT]
    assert damaged.read_bytes() == b"x" * 100_000
    assert sum("worker-0" in record.message for record in caplog.records) == 1
    await second.start()
    await second.session.close()


def test_a_folder_that_can_be_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "none" / "journals"):
        with pytest.raises(InvalidInputError, match="can be no folder"):
            JournalFolder(str(path))
