"""Copies: the first decides, the others follow, the quorum acknowledges; repair, promote, and what comes back later."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import replicated_model

from holdfast.backends.memory import MemoryBackend
from holdfast.backends.sqlite import SqliteBackend
from holdfast.contract import Guarantees, Head, Key, KeyPrefix, Op, Record, Survives
from holdfast.errors import (
    ConflictError,
    CorruptedError,
    FailedError,
    InvalidInputError,
    NewerFormatError,
    UnavailableError,
    UnknownOutcomeError,
)
from holdfast.wrappers.around import Around
from holdfast.wrappers.replicated import Replicated
from holdfast.wrappers.replicated.copies import CONFIG_KEY, ID_KEY, Copy
from holdfast.wrappers.replicated.promotion import promote
from holdfast.wrappers.replicated.repair import pages
from holdfast.wrappers.replicated.standing import DOMAIN, FIRST_GENERATION, STORE_SCOPE, charter_key, next_generation

KEY = Key("signal", "BTCUSDT_a_x", "BTCUSDT")
OTHER = Key("partial", "BTCUSDT_a_x", "levels")
THIRD = Key("schedule", "BTCUSDT_a_x", "BTCUSDT")


class Machine(Around):
    """A copy's machine: memory that outlives its clients, can be away, and can die at a numbered write."""

    def __init__(self) -> None:
        super().__init__(MemoryBackend())
        self.memory = self.backend
        self.is_up = True
        self.users = 0
        self.writes = 0
        self.dies_at = 0
        self.gate: asyncio.Event | None = None
        self.loses_answers = 0
        self.loses_next = 0
        self.answers: asyncio.Event | None = None
        self.promise: Guarantees | None = None

    async def open(self, *, read_only: bool = False) -> Guarantees:
        self._require_up()
        if self.promise is None:
            self.promise = await self.memory.open()
        return self.promise

    async def close(self) -> None:
        return None

    def _require_up(self) -> None:
        if not self.is_up:
            raise UnavailableError("the machine is away")

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        self._require_up()
        await asyncio.sleep(0)
        return await self.memory.read(scope, keys)

    async def head(self, scope: str) -> Head:
        self._require_up()
        return await self.memory.head(scope)

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        self._require_up()
        async for key in self.memory.keys(scope, prefix):
            yield key

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        if self.gate is not None:
            await self.gate.wait()
        self._require_up()
        if self.loses_next:
            self.loses_next -= 1
            raise UnknownOutcomeError("it was lost on the way there")
        self.writes += 1
        if self.writes == self.dies_at:
            self.is_up = False
            self._require_up()
        number = await self.memory.commit(scope, changes, expect, op=op)
        if self.loses_answers:
            self.loses_answers -= 1
            raise UnknownOutcomeError("the answer was lost")
        await (asyncio.sleep(0) if self.answers is None else self.answers.wait())
        return number


def machines(count: int = 3) -> list[Machine]:
    return [Machine() for _ in range(count)]


def store_over(copies: Sequence[Around], *, deadline_seconds: float = 1.0, quorum: int | None = None) -> Replicated:
    first, *followers = copies
    return Replicated(
        first, *followers, quorum=quorum, deadline_seconds=deadline_seconds, retry_seconds=0.005
    )  # fmt: skip


@asynccontextmanager
async def opened(copies: Sequence[Around], **options: float) -> AsyncIterator[Replicated]:
    store = store_over(copies, **options)  # type: ignore[arg-type]
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def level(store: Replicated) -> None:
    """Wait until no copy lags."""
    for _ in range(2000):
        lags = await store.lag()
        if all(lag.commits == 0 and lag.state in ("the first", "follows") for lag in lags):
            return
        await asyncio.sleep(0.002)
    raise AssertionError(f"not level: {lags}")


async def content(backend: Around, scope: str = "main") -> tuple[int, dict[Key, Record]]:
    """Return a copy's number and rows, under whatever name its scope lies there."""
    copy = Copy(backend, 0)
    standing = await copy.standing(scope)
    rows: dict[Key, Record] = {}
    async for page in pages(copy, standing.physical):
        rows |= await backend.read(standing.physical, page)
    return standing.number, rows


async def put(store: Replicated, n: int, writer: str = "w", **expect: int) -> int:
    return await store.commit("main", {KEY: b'{"n":%d}' % n}, {}, op=Op(writer, n))


async def test_every_copy_holds_the_same_rows_versions_ops_and_numbers() -> None:
    copies = machines()
    async with opened(copies) as store:
        for n in range(1, 6):
            await store.commit("main", {KEY: b"%d" % n, OTHER: None if n % 2 else b"1"}, {}, op=Op("w", n))
        await store.commit("main", {}, {}, op=Op("empty", 1))
        await level(store)
        head = await store.head("main")
        for copy in copies:
            assert await content(copy) == await content(copies[0])
            assert (await copy.head("main")).writers == head.writers
        assert head.number == 6


async def test_commits_of_many_tasks_reach_the_followers_in_order() -> None:
    copies = machines()
    async with opened(copies) as store:
        numbers = await asyncio.gather(*(put(store, 1, f"w{at}") for at in range(300)))
        assert sorted(numbers) == list(range(1, 301))
        await level(store)
        assert await content(copies[1]) == await content(copies[2]) == await content(copies[0])


async def test_without_enough_copies_nothing_is_written() -> None:
    copies = machines()
    async with opened(copies) as store:
        await put(store, 1)
        copies[1].is_up = copies[2].is_up = False
        with pytest.raises(UnknownOutcomeError):
            await put(store, 2, "first to notice")
        writes = copies[0].writes
        with pytest.raises(UnavailableError, match="nothing was written"):
            await put(store, 3)
        assert copies[0].writes == writes


async def test_a_commit_that_the_quorum_did_not_confirm_is_unknown_and_the_same_op_finishes_it() -> None:
    copies = machines()
    async with opened(copies, deadline_seconds=0.2) as store:
        await put(store, 1)
        copies[1].gate = copies[2].gate = asyncio.Event()
        with pytest.raises(UnknownOutcomeError, match="same op again"):
            await put(store, 2)
        copies[1].is_up = copies[2].is_up = False
        copies[1].gate.set()
        await asyncio.sleep(0.02)
        with pytest.raises(UnknownOutcomeError):
            await put(store, 2)  # below the quorum: but never "nothing was written", as the first copy has it
        copies[1].is_up = copies[2].is_up = True
        for _ in range(500):
            with suppress(UnknownOutcomeError):
                assert await put(store, 2) == 2
                break
            await asyncio.sleep(0.002)
        assert sum([(await content(copy))[0] == 2 for copy in copies]) >= 2
        assert (await store.head("main")).number == 2, "it was not applied twice"


async def test_a_lost_follower_is_survived_seen_and_repaired() -> None:
    copies = machines()
    async with opened(copies) as store:
        await store.commit("main", {KEY: b"1", OTHER: b"1"}, {}, op=Op("w", 1))
        copies[2].is_up = False
        for n in range(2, 40):
            await store.commit("main", {KEY: b"%d" % n, OTHER: None, THIRD: b"%d" % n}, {}, op=Op("w", n))
        lags = await store.lag()
        assert [lag.commits for lag in lags] == [0, 0, None]
        assert lags[2].state == "away"
        copies[2].is_up = True
        await level(store)
        assert await content(copies[2]) == await content(copies[0])
        assert (await copies[2].head("main")).writers["w"].n == 39


async def test_what_does_not_fit_the_queue_is_fetched_from_the_first_copy() -> None:
    copies = machines()
    store = Replicated(*copies, retry_seconds=0.005, queue_bytes=2000)
    await store.open()
    await put(store, 1)
    copies[2].gate = asyncio.Event()
    for n in range(2, 60):
        await put(store, n)
    copies[2].gate.set()
    await level(store)
    assert await content(copies[2]) == await content(copies[0])
    await store.close()


async def test_a_process_that_died_between_the_copies_leaves_nothing_undone() -> None:
    copies = machines()
    async with opened(copies, deadline_seconds=0.2) as store:
        await put(store, 1)
        copies[1].gate = copies[2].gate = asyncio.Event()
        with pytest.raises(UnknownOutcomeError):
            await put(store, 2)
    copies[1].gate = copies[2].gate = None
    async with opened(copies) as store:
        assert (await store.read("main", [KEY]))[KEY].version == 2
        held = [copy for copy in copies if (await content(copy))[0] == 2]
        assert len(held) >= 2, "what was read is held by the quorum"


async def test_what_only_the_first_copy_holds_is_not_read() -> None:
    copies = machines()
    async with opened(copies, deadline_seconds=0.2) as store:
        await put(store, 1)
        copies[1].gate = copies[2].gate = asyncio.Event()
        with pytest.raises(UnknownOutcomeError):
            await put(store, 2)
        with pytest.raises(UnavailableError, match="may not last"):
            await store.read("main", [KEY])
        with pytest.raises(UnavailableError):
            await store.head("main")
        with pytest.raises(UnavailableError):
            _ = [key async for key in store.keys("main")]
        copies[1].gate.set()
        assert (await store.read("main", [KEY]))[KEY].version == 2


async def test_after_the_loss_of_the_first_writes_stop_until_promote_and_then_go_on_by_themselves() -> None:
    copies = machines()
    async with opened(copies) as store:
        await put(store, 1)
        await level(store)
        copies[0].is_up = False
        with pytest.raises((UnavailableError, UnknownOutcomeError)):
            await put(store, 2)
        done = await promote(store_over(copies))
        assert done.generation == 2
        assert done.first.startswith(("copy 2", "copy 3"))
        assert done.scopes == ("main",)
        assert await put(store, 1) == 1, "an op that was acknowledged before is known to the new first copy"
        number = await put(store, 3)
        assert (await store.read("main", [KEY]))[KEY].version == number > 1
        copies[0].is_up = True
        await level(store)
        assert await content(copies[0]) == await content(copies[1])
        assert [lag.kept for lag in await store.lag()] == [0, 0, 0]


async def test_opening_without_the_first_copy_names_promote() -> None:
    copies = machines()
    async with opened(copies) as store:
        await put(store, 1)
    copies[0].is_up = False
    with pytest.raises(UnavailableError, match="holdfast promote"):
        await store_over(copies).open()


async def test_commits_that_a_promote_dropped_are_kept_and_told(caplog: pytest.LogCaptureFixture) -> None:
    copies = machines()
    async with opened(copies, deadline_seconds=0.2) as store:
        await store.commit("main", {KEY: b"1", OTHER: b'"stays"'}, {}, op=Op("w", 1))
        await level(store)
        copies[1].gate = copies[2].gate = asyncio.Event()
        with pytest.raises(UnknownOutcomeError):
            await store.commit("main", {KEY: b'"dropped"', OTHER: None}, {}, op=Op("lost", 1))
        copies[0].is_up = False
        copies[1].gate = copies[2].gate = None
    await promote(store_over(copies))
    async with opened([copies[1], copies[2], copies[0]]) as store:
        await store.commit("main", {THIRD: b'"new"'}, {}, op=Op("w", 2))
        with caplog.at_level(logging.WARNING):
            copies[0].is_up = True
            await level(store)
        assert "never reached the quorum" in caplog.text
        assert await content(copies[0]) == await content(copies[1])
        assert (await store.read("main", [KEY, OTHER]))[OTHER].payload == b'"stays"'
        assert "lost" not in (await store.head("main")).writers
        assert await store.commit("main", {KEY: b"2"}, {KEY: 1}, op=Op("lost", 1)) == (await store.head("main")).number
        await level(store)
        assert await content(copies[0]) == await content(copies[1]), "an op that was dropped can be sent again"
        assert [lag.kept for lag in await store.lag()] == [0, 0, 2]
    kept = [key async for key in copies[0].memory.keys("main") if key.entity_id.startswith("dropped")]
    rows = json.loads((await copies[0].memory.read("main", kept))[kept[0]].payload)["rows"]
    assert {(tuple(row["key"]), row.get("payload"), row.get("deleted")) for row in rows} == {
        (tuple(KEY), '"dropped"', None),
        (tuple(OTHER), None, True),
    }
    reader = store_over([copies[1], copies[2], copies[0]])
    found = await reader.open(read_only=True)
    assert any("keeps 2 rows" in warning for warning in found.warnings)
    assert [scope async for scope in reader.scopes()] == ["main"]
    await reader.close()


async def test_a_process_of_an_older_generation_gets_nothing_acknowledged_by_its_old_first_copy() -> None:
    copies = machines()
    async with opened(copies) as zombie:
        await put(zombie, 1)
        await level(zombie)
        await promote(store_over(copies), force=True)
        async with opened(copies) as newer:
            await newer.commit("main", {KEY: b'"newer"'}, {KEY: 1}, op=Op("newer", 1))
            with pytest.raises(ConflictError):
                await zombie.commit("main", {KEY: b'"older"'}, {KEY: 1}, op=Op("zombie", 1))
            assert (await newer.read("main", [KEY]))[KEY].payload == b'"newer"'
            assert (await zombie.read("main", [KEY]))[KEY].payload == b'"newer"'


async def test_a_late_message_of_an_older_generation_is_refused_by_every_copy_that_promised() -> None:
    copies = machines()
    async with opened(copies, deadline_seconds=0.2) as zombie:
        await put(zombie, 1)
        await level(zombie)
        copies[1].gate = copies[2].gate = asyncio.Event()
        late = asyncio.ensure_future(zombie.commit("main", {KEY: b'"late"'}, {}, op=Op("zombie", 1)))
        await asyncio.sleep(0.02)  # on the first copy, and on its way to the others
        gate, copies[1].gate, copies[2].gate, copies[0].is_up = copies[1].gate, None, None, False
        await promote(store_over(copies))
        gate.set()
        with pytest.raises(UnknownOutcomeError):
            await late
        async with opened([copies[1], copies[2], copies[0]]) as store:
            assert (await store.read("main", [KEY]))[KEY].payload == b'{"n":1}'


async def test_promote_refuses_while_the_first_answers_and_changes_nothing_twice() -> None:
    copies = machines()
    async with opened(copies) as store:
        await put(store, 1)
    with pytest.raises(InvalidInputError, match="answers"):
        await promote(store_over(copies))
    copies[0].is_up = False
    await promote(store_over(copies))
    before = [await content(copy) for copy in copies[1:]]
    with pytest.raises(InvalidInputError, match="answers"):
        await promote(store_over(copies))
    assert [await content(copy) for copy in copies[1:]] == before


async def test_promote_needs_so_many_copies_that_every_quorum_is_among_them() -> None:
    copies = machines()
    async with opened(copies) as store:
        await put(store, 1)
    copies[0].is_up = copies[1].is_up = False
    with pytest.raises(UnavailableError, match="1 of 3 copies answer, and 2 must"):
        await promote(store_over(copies))
    done = await promote(store_over(copies), force=True)
    assert any("are lost" in warning for warning in done.warnings)
    assert any("a commit needs 2" in warning for warning in done.warnings)


async def test_of_the_copies_that_answer_the_newest_becomes_the_first() -> None:
    copies = machines()
    async with opened(copies) as store:
        await put(store, 1)
        await level(store)
        copies[1].is_up = False
        await put(store, 2)
        copies[0].is_up = False
    copies[1].is_up = True
    done = await promote(store_over(copies))
    assert done.first.startswith("copy 3")
    async with opened(copies) as store:
        assert (await store.read("main", [KEY]))[KEY].version == 2


async def test_a_promote_that_dies_at_any_write_can_be_run_again() -> None:
    died = 0
    for at in range(1, 40):
        copies = machines()
        async with opened(copies) as store:
            await put(store, 1)
            await level(store)
            copies[2].is_up = False
            await put(store, 2)
            await store.commit("other", {OTHER: b"1"}, {}, op=Op("w", 1))
            copies[0].is_up = False
        copies[2].is_up = True
        for copy in copies[1:]:
            copy.writes, copy.dies_at = 0, at
        with suppress(UnavailableError):
            await promote(store_over(copies))
        died += not (copies[1].is_up and copies[2].is_up)
        alive = copies[1].is_up and copies[2].is_up
        copies[1].is_up = copies[2].is_up = True
        copies[1].dies_at = copies[2].dies_at = 0
        with suppress(InvalidInputError):  # it had been done
            await promote(store_over(copies))
        copies[0].is_up = True
        async with opened(copies) as store:
            assert (await store.read("main", [KEY]))[KEY].payload == b'{"n":2}', f"dead at write {at}"
            assert await put(store, 2) == 2
            assert OTHER in await store.read("other", [OTHER])
            await put(store, 3)
            await level(store)
            assert await content(copies[0]) == await content(copies[1]) == await content(copies[2])
        if alive:
            break
    assert died > 3
    assert alive


async def test_a_repair_that_dies_at_any_write_goes_on() -> None:
    for at in range(1, 60):
        copies = machines()
        async with opened(copies, deadline_seconds=0.1) as store:
            for n in range(1, 4):
                await store.commit("main", {KEY: b"%d" % n, OTHER: b"%d" % n}, {}, op=Op("w", n))
            await level(store)
            copies[1].gate = copies[2].gate = asyncio.Event()
            for n in range(4, 6):
                with pytest.raises(UnknownOutcomeError):
                    await store.commit("main", {KEY: b"%d" % -n, OTHER: None}, {}, op=Op(f"lost{n}", n))
            copies[0].is_up = False
            copies[1].gate = copies[2].gate = None
        await promote(store_over(copies))
        copies[0].is_up, copies[0].writes, copies[0].dies_at = True, 0, at
        async with opened([copies[1], copies[2], copies[0]]) as store:
            for n in range(4, 9):
                await store.commit("main", {THIRD: b"%d" % n}, {}, op=Op("w", n))
            for _ in range(1000):
                lags = await store.lag()
                if not copies[0].is_up or lags[2].commits == 0:
                    break
                await asyncio.sleep(0.002)
            cut, copies[0].is_up = not copies[0].is_up, True
            await level(store)
            assert await content(copies[0]) == await content(copies[1]), f"dead at write {at}"
            assert (await store.lag())[2].kept == 2
        if not cut:
            assert at > 5
            return
    raise AssertionError("it died in every round")


async def test_the_filling_of_a_new_copy_goes_on_where_it_stopped() -> None:
    copies = machines(2)
    async with opened(copies) as store:
        for n in range(1, 1001):
            await store.commit("main", {Key("risk", "r", f"{n % 50}"): b"%d" % n}, {}, op=Op("w", n))
    fresh = Machine()
    fresh.dies_at = 300
    with pytest.raises(UnavailableError):
        await promote(store_over([*copies, fresh]))
    fresh.is_up, fresh.writes, fresh.dies_at = True, 0, 0
    await promote(store_over([*copies, fresh]))
    async with opened([*copies, fresh]) as store:
        await level(store)
    assert await content(fresh) == await content(copies[0])
    assert [scope async for scope in fresh.memory.scopes()] == ["holdfast.replicas", "main"], "not begun anew"
    assert fresh.writes < 800


async def torn(copies: Sequence[Machine]) -> None:
    """Leave the second of two copies in the middle of a repair, with rows of different moments."""
    async with opened(copies, deadline_seconds=0.2) as store:
        await store.commit("main", {KEY: b"1", OTHER: b"1"}, {}, op=Op("w", 1))
        copies[1].gate = asyncio.Event()
        for n in range(2, 6):
            with pytest.raises((UnknownOutcomeError, UnavailableError)):
                await store.commit("main", {(KEY, THIRD)[n % 2]: b"%d" % n}, {}, op=Op(f"w{n}", n))
    copies[1].gate, copies[1].writes, copies[1].dies_at = None, 0, 3
    async with opened(copies, deadline_seconds=0.2):
        for _ in range(1000):
            if not copies[1].is_up:
                break
            await asyncio.sleep(0.002)
    assert not copies[1].is_up
    copies[1].is_up, copies[1].dies_at = True, 0


async def test_a_copy_in_the_middle_of_a_repair_is_promoted_only_if_the_operator_insists() -> None:
    copies = machines(2)
    await torn(copies)
    copies[0].is_up = False
    with pytest.raises(UnavailableError, match="under repair"):
        await promote(store_over(copies))
    done = await promote(store_over(copies), force=True)
    assert any("different moments" in warning for warning in done.warnings)


async def test_a_repair_that_was_cut_goes_on_and_ends_level() -> None:
    copies = machines(2)
    await torn(copies)
    async with opened(copies) as store:
        await level(store)
        assert await content(copies[1]) == await content(copies[0])


async def test_rows_that_were_deleted_while_a_copy_was_away_are_gone_there_too() -> None:
    copies = machines()
    async with opened(copies) as store:
        await store.commit("main", {KEY: b"1", OTHER: b"1"}, {}, op=Op("w", 1))
        await level(store)
        copies[2].is_up = False
        await store.commit("main", {OTHER: None}, {}, op=Op("w", 2))
    copies[2].is_up = True
    async with opened(copies) as store:
        await level(store)
        assert set((await content(copies[2]))[1]) == {KEY}


async def test_a_commit_that_overtakes_the_one_before_it_is_refused_by_the_follower() -> None:
    copies = machines()
    async with opened(copies) as store:
        await put(store, 1)
        await level(store)
        copies[1].loses_next = copies[2].loses_next = 1
        await asyncio.gather(
            store.commit("main", {KEY: b"2"}, {}, op=Op("a", 1)), store.commit("main", {OTHER: b"3"}, {}, op=Op("b", 1))
        )
        await level(store)
        assert await content(copies[1]) == await content(copies[2]) == await content(copies[0])


async def test_a_follower_that_promised_takes_nothing_older_though_the_numbers_fit() -> None:
    copies = machines()
    async with opened(copies, deadline_seconds=0.2) as zombie:
        await put(zombie, 1)
        await level(zombie)
        gate = copies[1].gate = copies[2].gate = asyncio.Event()
        late = [
            asyncio.ensure_future(zombie.commit("main", {KEY: b'"late"'}, {}, op=Op(name, 1))) for name in ("a", "b")
        ]
        await asyncio.sleep(0.02)  # commits 2 and 3 are on their way to both followers
        copies[1].gate = copies[2].gate = None
        for copy in copies[1:]:
            promised = await Copy(copy, 0).promise("main", next_generation(FIRST_GENERATION, 1))
            assert promised.number == 2, "in the place of the commit that will be lost"
            copy.loses_next = 1
        gate.set()
        answers = await asyncio.gather(*late, return_exceptions=True)
        assert not any(isinstance(answer, int) for answer in answers)
        for copy in copies[1:]:
            assert (await content(copy))[1][KEY].payload == b'{"n":1}'


async def test_an_answer_of_the_old_first_copy_that_comes_after_a_promote_is_not_passed_on() -> None:
    copies = machines()
    async with opened(copies) as store:
        await put(store, 1)
        await level(store)
        copies[0].answers = asyncio.Event()
        late = [asyncio.ensure_future(store.commit("main", {KEY: b'"old"'}, {}, op=Op(f"w{at}", 1))) for at in range(6)]
        await asyncio.sleep(0.02)
        assert (await content(copies[0]))[0] == 7, "on the old first copy, which has not answered"
        copies[0].is_up = False
        await promote(store_over(copies))
        assert (await store.read("main", [KEY]))[KEY].payload == b'{"n":1}'
        copies[0].answers.set()
        for answer in await asyncio.gather(*late, return_exceptions=True):
            assert isinstance(answer, UnknownOutcomeError)
        copies[0].answers = None
        await store.commit("main", {OTHER: b"1"}, {}, op=Op("new", 1))
        await asyncio.sleep(0.02)
        assert (await content(copies[1]))[1] == (await content(copies[2]))[1]
        assert (await store.read("main", [KEY]))[KEY].payload == b'{"n":1}'


async def test_a_first_copy_that_lost_commits_is_refused_until_promote() -> None:
    copies = machines(2)
    async with opened(copies) as store:
        await put(store, 1)
        await level(store)
        old, copies[0].memory = copies[0].memory, MemoryBackend()
        await copies[0].memory.open()
        for scope in [scope async for scope in old.scopes()]:  # a backup from before the second commit
            for key in [key async for key in old.keys(scope)]:
                record = (await old.read(scope, [key]))[key]
                if scope != "main":
                    await copies[0].memory.commit(scope, {key: record.payload}, {}, op=Op(f"backup{key}", 1))
            if scope == "main":
                rows = await old.read(scope, [key async for key in old.keys(scope)])
                await copies[0].memory.commit(scope, {k: r.payload for k, r in rows.items()}, {}, op=Op("backup", 1))
        newer, copies[0].memory = copies[0].memory, old
        await put(store, 2)
        await level(store)
    copies[0].memory = newer
    store = store_over(copies)
    await store.open()
    with pytest.raises(UnavailableError, match="has lost commits"):
        await put(store, 3)
    with pytest.raises(UnavailableError, match="has lost commits"):
        await store.read("main", [KEY])
    await store.close()
    done = await promote(store_over(copies))
    assert done.first.startswith("copy 2")
    async with opened(copies) as store:
        assert (await store.read("main", [KEY]))[KEY].version == 2


async def test_a_store_in_use_becomes_the_first_of_several_copies_and_a_follower_must_be_empty() -> None:
    copies = machines()
    plain = copies[0]
    await plain.open()
    for n in range(1, 4):
        await plain.commit("main", {KEY: b"%d" % n, OTHER: b"1"}, {}, op=Op("w", n))
    with pytest.raises(InvalidInputError, match="holds rows of its own"):
        await store_over([copies[1], plain, copies[2]]).open()
    async with opened(copies) as store:
        assert (await store.read("main", [KEY]))[KEY] == Record(b"3", 3, Op("w", 3))
        assert await store.commit("main", {KEY: b"4"}, {KEY: 3}, op=Op("w", 4)) == 5, "one number for becoming a copy"
        await level(store)
        assert await content(copies[1]) == await content(copies[0])


async def test_a_look_that_meets_the_first_commit_of_a_scope_does_not_leave_that_commit_in_doubt() -> None:
    copies = machines()
    async with opened(copies) as store:
        await store.head("main")
        answers = copies[0].answers = asyncio.Event()
        committing = asyncio.create_task(put(store, 1))
        for _ in range(20):
            await asyncio.sleep(0)
        assert (await copies[0].memory.head("main")).number, "it is there, and has no answer yet"

        async def answered_in_the_middle() -> None:
            answers.set()
            await asyncio.wait([committing])

        store._lanes["main"]._renew = answered_in_the_middle
        reading = asyncio.create_task(store.head("main"))
        for _ in range(20):
            await asyncio.sleep(0)  # the look has found the commit that has no answer yet
        answers.set()
        assert await committing == 1
        assert (await reading).number == 1


async def test_the_first_commits_of_a_scope_that_waited_during_a_promote_are_not_acknowledged_by_one_copy() -> None:
    copies = machines()
    async with opened(copies) as store:
        await store.head("main")
        gate = copies[0].gate = asyncio.Event()
        calls = [
            asyncio.create_task(store.commit("main", {key: b"1"}, {}, op=Op(writer, 1)))
            for key, writer in ((KEY, "a"), (OTHER, "b"))
        ]
        for _ in range(20):
            await asyncio.sleep(0)  # one is under way to the first copy, the other waits for it
        copies[0].is_up = False
        await promote(store_over(copies))
        await store.renew()  # as another scope's call does
        copies[2].is_up = False
        gate.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [UnavailableError] * 2, "one copy of three answers"
        assert [key async for key in copies[1].memory.keys("main") if key.domain != DOMAIN] == []
        copies[2].is_up = True
        for _ in range(200):
            with suppress(UnavailableError):
                await store.commit("main", {OTHER: b"1"}, {}, op=Op("b", 1))
                break
            await asyncio.sleep(0.005)
        for copy in copies[1:]:
            assert (await content(copy))[1][OTHER].op == Op("b", 1)


async def test_a_store_in_use_whose_first_opening_died_can_be_promoted() -> None:
    copies = machines()
    await copies[0].open()
    for n in range(1, 4):
        await copies[0].commit("main", {KEY: b"%d" % n, OTHER: b"1"}, {}, op=Op("w", n))
    store = store_over(copies)
    await store.open_copies(read_only=False)
    await store._agreement()  # and before any scope is looked at it dies
    done = await promote(store_over(copies), force=True)
    assert done.first.startswith("copy 2")
    async with opened(copies) as store:
        assert (await store.read("main", [KEY]))[KEY] == Record(b"3", 3, Op("w", 3))
        await level(store)
        assert await content(copies[0]) == await content(copies[1]) == await content(copies[2])


@pytest.mark.parametrize("key", [charter_key("main"), CONFIG_KEY], ids=["charter", "agreement"])
async def test_what_a_newer_version_wrote_about_copies_is_refused_and_left(key: Key) -> None:
    copies = machines()
    async with opened(copies) as store:
        await put(store, 1)
        await level(store)
    scope = "main" if key.entity_name == "main" else STORE_SCOPE
    for copy in copies:
        row = json.loads((await copy.memory.read(scope, [key]))[key].payload)
        await copy.memory.commit(scope, {key: json.dumps({**row, "format": 2}).encode()}, {}, op=Op("newer", 1))
    before = [await copy.memory.head(scope) for copy in copies]
    store = store_over(copies)
    with pytest.raises(NewerFormatError, match="upgrade"):
        await store.open()
        await put(store, 2)
    await store.close()
    assert [await copy.memory.head(scope) for copy in copies] == before


async def test_a_copy_whose_id_is_damaged_is_told_as_such() -> None:
    copies = machines()
    async with opened(copies) as store:
        await put(store, 1)
        await level(store)
    await copies[1].memory.commit(STORE_SCOPE, {ID_KEY: b"{}"}, {}, op=Op("hand", 1))
    with pytest.raises(CorruptedError, match="is damaged"):
        await store_over(copies).open()


async def test_copies_are_added_replaced_and_dropped_by_promote() -> None:
    copies = machines(2)
    async with opened(copies) as store:
        await store.commit("main", {KEY: b"1", OTHER: b"1"}, {}, op=Op("w", 1))
        await level(store)
    copies[0].is_up = False
    fresh = Machine()
    done = await promote(store_over([copies[1], fresh]))
    assert (done.copies, done.quorum) == (2, 2)
    async with opened([copies[1], fresh]) as store:
        assert await put(store, 2) > 1
        assert await content(fresh) == await content(copies[1])
    third = Machine()
    async with opened([copies[1], fresh, third]) as store:
        await put(store, 3)
        await level(store)
        assert [lag.counts for lag in await store.lag()] == [True, True, False]
    assert (await promote(store_over([copies[1], fresh, third]))).copies == 3
    fresh.is_up = False
    async with opened([copies[1], fresh, third]) as store:
        await put(store, 4)
    copies[0].is_up = True
    with pytest.raises((UnavailableError, InvalidInputError)):
        async with opened([copies[0], copies[1]]) as store:  # the one that was dropped, beside one that knows better
            await put(store, 5)


async def test_a_copy_whose_disk_was_emptied_does_not_count() -> None:
    copies = machines()
    async with opened(copies) as store:
        await put(store, 1)
        await level(store)
    copies[1] = Machine()
    copies[2].is_up = False
    with pytest.raises(UnavailableError, match="1 of 3 copies answer"):
        await store_over(copies).open()


async def test_the_wrappers_own_rows_and_scopes_are_hidden_and_refused() -> None:
    copies = machines()
    async with opened(copies) as store:
        await put(store, 1)
        assert [key async for key in store.keys("main")] == [KEY]
        assert [key async for key in store.keys("main", KeyPrefix(DOMAIN))] == []
        assert [scope async for scope in store.scopes()] == ["main"]
        own = Key(DOMAIN, "main", "number")
        for call in (
            store.read("main", [own]),
            store.commit("main", {own: b"1"}, {}, op=Op("w", 2)),
            store.commit("main", {}, {own: 1}, op=Op("w", 2)),
            store.commit("holdfast.replicas", {KEY: b"1"}, {}, op=Op("w", 2)),
            store.read("main.0123abcd.copy1", [KEY]),
        ):
            with pytest.raises(InvalidInputError):
                await call
        with pytest.raises(ConflictError) as refused:
            await store.commit("main", {KEY: b"1"}, {KEY: 9}, op=Op("w", 2))
        assert refused.value.keys == (KEY,)
        assert all(not name.startswith("~") for name in (await store.head("main")).writers)


@pytest.mark.parametrize(
    ("quorum", "survives", "said"), [(1, Survives.HOST, "lost with it"), (2, Survives.HOST, "on this machine")]
)
async def test_copies_on_one_machine_promise_no_more_than_that_machine(
    tmp_path: Path, quorum: int, survives: Survives, said: str
) -> None:
    store = Replicated(SqliteBackend(tmp_path / "a.db"), SqliteBackend(tmp_path / "b.db"), quorum=quorum)
    found = await store.open()
    assert found.survives is survives
    assert any(said in warning for warning in found.warnings)
    await store.close()


async def test_copies_on_several_machines_promise_the_loss_of_one_as_assumed() -> None:
    copies = machines()
    for at, copy in enumerate(copies):
        found = await copy.open()
        copy.promise = Guarantees(**{**{f: getattr(found, f) for f in found.__struct_fields__},
                                     "backend": f"redis://host{at}/0", "survives": Survives.HOST})  # fmt: skip
    store = store_over(copies)
    found = await store.open()
    assert (found.survives, found.survives_how) == (Survives.SERVER, "assumed")
    await store.close()


async def test_another_quorum_than_was_agreed_on_is_refused() -> None:
    copies = machines()
    async with opened(copies) as store:
        await put(store, 1)
    with pytest.raises(InvalidInputError, match="quorum=2, not 3"):
        await store_over(copies, quorum=3).open()
    assert (await promote(store_over(copies, quorum=3))).quorum == 3
    async with opened(copies, quorum=3) as store:
        await put(store, 2)


async def test_what_cannot_be_copies_is_refused() -> None:
    one = Machine()
    with pytest.raises(InvalidInputError, match="at least two"):
        Replicated(one)
    with pytest.raises(InvalidInputError, match="twice"):
        Replicated(one, one)
    with pytest.raises(InvalidInputError, match="quorum"):
        Replicated(one, Machine(), quorum=3)
    with pytest.raises(FailedError):
        await Replicated(one, Machine()).head("main")
    twin = Machine()
    twin.memory, twin.backend, twin.promise = one.memory, one.memory, await one.open()
    with pytest.raises(InvalidInputError, match="same place"):
        await store_over([one, twin]).open()
    away = Machine()
    away.is_up = False
    with pytest.raises(UnavailableError, match="first opening"):
        await store_over([Machine(), away]).open()


async def test_lost_answers_of_every_copy_apply_nothing_twice() -> None:
    copies = machines()
    async with opened(copies) as store:
        version = 0
        for n in range(1, 40):
            copies[n % 3].loses_answers = 1
            for _ in range(50):
                try:
                    version = await store.commit("main", {KEY: b"%d" % n}, {KEY: version}, op=Op("w", n))
                    break
                except (UnknownOutcomeError, UnavailableError):
                    await asyncio.sleep(0.002)
            else:
                raise AssertionError("never finished")
        assert version == 39
        await level(store)
        assert await content(copies[1]) == await content(copies[2]) == await content(copies[0])


@pytest.mark.parametrize("block", range(4))
def test_no_schedule_of_faults_takes_back_what_was_acknowledged_or_read(
    block: int, record_property: Callable[[str, object], None]
) -> None:
    logging.disable(logging.CRITICAL)
    try:
        worlds = [replicated_model.run(seed) for seed in range(25 * block, 25 * block + 25)]
    finally:
        logging.disable(logging.NOTSET)
    counts = {
        "schedules": len(worlds),
        "acknowledged": sum(len(world.acknowledged) for world in worlds),
        "promotes": sum(world.promotes for world in worlds),
        "lost": 0,
    }
    assert counts["acknowledged"] > 100
    assert counts["promotes"] > 5
    record_property("proof:copies", counts)
