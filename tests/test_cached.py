"""Cached: what is served from memory is what the store holds, whatever fails, races or arrives late."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Backend, Guarantees, Key, Op, Record
from holdfast.errors import (
    ConflictError,
    FailedError,
    HoldfastError,
    InvalidInputError,
    UnavailableError,
    UnknownOutcomeError,
)
from holdfast.wrappers.around import Around
from holdfast.wrappers.cached import Cached, Leases

KEYS = [Key("signal", f"S{i}_trend_x", f"S{i}") for i in range(8)]
KEY, OTHER = KEYS[:2]


class Gate:
    """Where a call waits until it may go on."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def pass_(self) -> None:
        """Wait here."""
        self.reached.set()
        await self.open.wait()


class Watched(Around):
    """A store in memory that counts its calls, and stops or fails them where it is told to."""

    def __init__(self, *, shared: bool = False, atomic: bool = True, backend: Backend | None = None) -> None:
        super().__init__(backend or MemoryBackend())
        self.shared, self.atomic = shared, atomic
        self.reads = 0
        self.commits = 0
        self.before_read: Gate | None = None
        self.after_read: Gate | None = None
        self.before_commit: Gate | None = None
        self.after_commit: Gate | None = None
        self.fails: Callable[[], BaseException] | None = None
        self.applies_first = False

    async def open(self, *, read_only: bool = False) -> Guarantees:
        import msgspec

        found = await super().open(read_only=read_only)
        return msgspec.structs.replace(found, shared=self.shared, atomic=self.atomic)

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        self.reads += 1
        before, after = self.before_read, self.after_read
        if before:
            await before.pass_()
        found = await super().read(scope, keys)
        if after:
            await after.pass_()
        return found

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        self.commits += 1
        before, after, fails = self.before_commit, self.after_commit, self.fails
        if before:
            await before.pass_()
        if fails is not None and not self.applies_first:
            raise fails()
        number = await super().commit(scope, changes, expect, op=op)
        if after:
            await after.pass_()
        if fails is not None:
            raise fails()
        return number


class Lease:
    """The lease of a test: an epoch, or none."""

    def __init__(self, now: int | None = 1) -> None:
        self.now = now

    def epoch(self, scope: str, key: Key) -> int | None:
        """Return the epoch."""
        return self.now


class Bench:
    """A cache over a watched store, and short ways to use it."""

    def __init__(self, inner: Watched | None = None, **options: Any) -> None:
        self.inner = inner or Watched()
        self.cached = Cached(self.inner, **options)
        self.n = 0

    async def open(self) -> Bench:
        await self.cached.open()
        return self

    async def put(self, value: int | None, key: Key = KEY, *, writer: str = "w", n: int | None = None) -> int:
        if n is None:
            self.n = n = self.n + 1
        payload = None if value is None else b"%d" % value
        return await self.cached.commit("main", {key: payload}, {}, op=Op(writer, n))

    async def get(self, key: Key = KEY) -> int | None:
        record = (await self.cached.read("main", [key])).get(key)
        return None if record is None else int(record.payload)

    async def read_free(self, key: Key = KEY) -> int | None:
        """Read, and insist that the store was not asked."""
        before = self.inner.reads
        value = await self.get(key)
        assert self.inner.reads == before, "the store was asked"
        return value

    async def read_asking(self, key: Key = KEY) -> int | None:
        """Read, and insist that the store was asked."""
        before = self.inner.reads
        value = await self.get(key)
        assert self.inner.reads == before + 1, "the store was not asked"
        return value


async def test_what_was_read_or_committed_is_served_from_memory_as_the_store_has_it() -> None:
    bench = await Bench().open()
    await bench.put(1)
    assert await bench.read_free() == 1
    assert await bench.read_asking(OTHER) is None
    assert await bench.read_free(OTHER) is None, "that a key is absent is kept too"
    await bench.put(None)
    assert await bench.read_free() is None
    await bench.put(2, OTHER)
    from_memory = await bench.cached.read("main", [KEY, OTHER])
    assert from_memory == await bench.inner.read("main", [KEY, OTHER]) == {OTHER: Record(b"2", 3, Op("w", 3))}
    assert bench.cached.figures[:2] == (4, 1)


async def test_a_caller_that_changes_its_answer_changes_nothing_in_memory() -> None:
    bench = await Bench().open()
    await bench.put(1)
    (await bench.cached.read("main", [KEY])).clear()
    assert await bench.read_free() == 1


def lost() -> BaseException:
    return UnknownOutcomeError("the answer was lost")


REFUSALS: list[Callable[[], HoldfastError]] = [
    lambda: ConflictError("no", keys=[KEY]),
    lambda: ConflictError("no"),
    lambda: UnavailableError("no"),
    lambda: InvalidInputError("no"),
    lambda: FailedError("no"),
    lambda: UnknownOutcomeError("no"),
]
OPEN_ENDS: list[Callable[[], BaseException]] = [lost, lambda: FailedError("part-way"), asyncio.CancelledError]


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error()).__name__)
async def test_what_the_store_refused_is_never_served(error: Callable[[], HoldfastError]) -> None:
    bench = await Bench().open()
    await bench.put(1)
    bench.inner.fails = error
    with pytest.raises(type(error())):
        await bench.put(2)
    assert await bench.read_asking() == 1


async def test_a_conflict_drops_what_was_expected_and_what_the_store_names() -> None:
    bench = await Bench(Watched(shared=True), leases=Lease()).open()
    for key in KEYS[:3]:
        await bench.put(1, key)
    await bench.inner.backend.commit("main", {KEY: b"7"}, {}, op=Op("somebody", 1))  # the lease did not hold
    with pytest.raises(ConflictError):
        await bench.cached.commit("main", {OTHER: b"2"}, {KEY: 1, KEYS[2]: 3}, op=Op("w", 9))
    assert await bench.read_asking(KEY) == 7
    assert await bench.read_asking(OTHER) == 1
    assert await bench.read_asking(KEYS[2]) == 1


@pytest.mark.parametrize("error", OPEN_ENDS)
async def test_what_may_have_been_applied_is_read_from_the_store(error: Callable[[], BaseException]) -> None:
    bench = await Bench().open()
    await bench.put(1)
    bench.inner.fails, bench.inner.applies_first = error, True
    with pytest.raises(type(error())):
        await bench.put(2)
    assert await bench.read_asking() == 2


@pytest.mark.parametrize("error", OPEN_ENDS)
async def test_a_commit_that_lands_late_is_not_hidden_by_a_row_read_before(error: Callable[[], BaseException]) -> None:
    bench = await Bench().open()
    await bench.put(1)
    bench.inner.fails = error
    with pytest.raises(type(error())):
        await bench.put(2)
    bench.inner.fails = None
    assert await bench.get() == 1  # it has not landed yet
    await bench.inner.backend.commit("main", {KEY: b"2"}, {}, op=Op("w", 2))
    assert await bench.get() == 2
    await bench.put(5, OTHER)  # the same writer goes on: from here on the store refuses its older ops
    assert await bench.read_asking() == 2
    assert await bench.read_free() == 2


async def test_a_conflict_does_not_end_the_doubt_about_the_same_op() -> None:
    bench = await Bench().open()
    bench.inner.fails = lost
    with pytest.raises(UnknownOutcomeError):
        await bench.put(2)
    bench.inner.fails = lambda: ConflictError("some expect does not hold")
    with pytest.raises(ConflictError):
        await bench.put(2, n=1)
    bench.inner.fails = None
    assert await bench.get() is None
    await bench.inner.backend.commit("main", {KEY: b"2"}, {}, op=Op("w", 1))
    assert await bench.get() == 2


async def test_a_read_that_looked_before_the_doubt_ended_is_not_kept() -> None:
    bench = await Bench().open()
    bench.inner.fails = lost
    with pytest.raises(UnknownOutcomeError):
        await bench.put(2)
    bench.inner.fails = None
    bench.inner.after_read = gate = Gate()
    reading = asyncio.ensure_future(bench.get())
    await gate.reached.wait()
    await bench.inner.backend.commit("main", {KEY: b"2"}, {}, op=Op("w", 1))  # lands
    await bench.put(5, OTHER)  # ends the doubt
    gate.open.set()
    assert await reading is None, "it began before"
    bench.inner.after_read = None
    assert await bench.get() == 2


async def test_many_writers_in_doubt_end_the_keeping_and_not_the_truth() -> None:
    bench = await Bench().open()
    bench.inner.fails = lost
    for number in range(4100):
        with pytest.raises(UnknownOutcomeError):
            await bench.put(2, writer=f"w{number}", n=1)
    bench.inner.fails = None
    await bench.put(3)
    assert await bench.read_asking() == 3
    assert await bench.read_asking() == 3
    await bench.cached.close()
    await bench.open()
    await bench.get()
    assert await bench.read_free() == 3


async def test_while_a_commit_is_under_way_its_rows_are_asked_of_the_store() -> None:
    bench = await Bench().open()
    await bench.put(1)
    bench.inner.before_commit = before = Gate()
    bench.inner.after_commit = after = Gate()
    committing = asyncio.ensure_future(bench.put(2))
    await before.reached.wait()
    assert await bench.read_asking() == 1, "not before the store has it"
    before.open.set()
    await after.reached.wait()
    assert await bench.read_asking() == 2
    assert await bench.read_asking() == 2, "and an older one is never seen after it"
    after.open.set()
    await committing
    assert await bench.read_free() == 2


@pytest.mark.parametrize("ends_first", ["commit", "read"])
async def test_a_read_that_raced_a_commit_does_not_put_its_row_back(ends_first: str) -> None:
    bench = await Bench().open()
    await bench.inner.backend.commit("main", {KEY: b"1"}, {}, op=Op("before", 1))
    bench.inner.after_read = gate = Gate()
    reading = asyncio.ensure_future(bench.get())
    await gate.reached.wait()
    if ends_first == "commit":
        await bench.put(2)
        gate.open.set()
        assert await reading == 1
    else:
        bench.inner.before_commit = before = Gate()
        committing = asyncio.ensure_future(bench.put(2))
        await before.reached.wait()
        gate.open.set()
        assert await reading == 1
        before.open.set()
        await committing
    assert await bench.get() == 2


async def test_a_read_that_began_during_a_commit_and_ended_after_it_is_not_kept() -> None:
    bench = await Bench().open()
    await bench.inner.backend.commit("main", {KEY: b"1"}, {}, op=Op("before", 1))
    bench.inner.before_commit = committing_gate = Gate()
    committing = asyncio.ensure_future(bench.put(2))
    await committing_gate.reached.wait()
    bench.inner.after_read = reading_gate = Gate()
    reading = asyncio.ensure_future(bench.get())
    await reading_gate.reached.wait()
    committing_gate.open.set()
    await committing
    reading_gate.open.set()
    assert await reading == 1
    assert await bench.get() == 2


async def test_of_two_commits_that_overlapped_the_later_one_counts() -> None:
    bench = await Bench().open()
    await bench.put(0)
    bench.inner.after_commit = gate = Gate()
    first = asyncio.ensure_future(bench.put(1, writer="a", n=1))
    await gate.reached.wait()
    bench.inner.after_commit = None
    await bench.put(2, writer="b", n=1)
    gate.open.set()
    await first  # the earlier one is acknowledged last
    assert await bench.get() == 2


async def test_an_op_that_is_answered_with_an_older_number_brings_no_old_row_back() -> None:
    bench = await Bench().open()
    await bench.put(1, writer="a", n=1)
    await bench.put(2, writer="b", n=1)
    assert await bench.put(1, writer="a", n=1) == 1
    assert await bench.get() == 2
    await bench.cached.close()
    await bench.open()
    assert await bench.put(1, writer="a", n=1) == 1, "an op of an earlier life"
    assert await bench.get() == 2


async def test_an_op_whose_outcome_was_unknown_brings_no_old_row_back_when_it_is_answered() -> None:
    lease = Lease()
    bench = await Bench(Watched(shared=True), leases=lease).open()
    bench.inner.fails, bench.inner.applies_first = lost, True
    with pytest.raises(UnknownOutcomeError):
        await bench.put(1)
    bench.inner.fails, lease.now = None, None
    await bench.inner.backend.commit("main", {KEY: b"9"}, {}, op=Op("the next owner", 1))
    lease.now = 2
    assert await bench.put(1, n=1) == 1
    assert await bench.get() == 9


async def test_without_the_scopes_number_a_commit_is_not_kept_but_works() -> None:
    bench = Bench()
    asked = 0

    async def head(scope: str) -> Any:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        raise UnavailableError("not now")

    bench.inner.head = head  # type: ignore[method-assign]
    await bench.open()
    await bench.put(1)
    assert await bench.read_asking() == 1
    await asyncio.gather(*(bench.put(1, key, writer=key.entity_id, n=1) for key in KEYS))
    assert asked == 2, "those that begin together wait for one question, not each for one of its own"


async def test_rows_end_with_the_lease_and_do_not_come_back_with_the_next_one() -> None:
    lease = Lease()
    bench = await Bench(Watched(shared=True), leases=lease).open()
    await bench.put(1)
    assert await bench.read_free() == 1
    lease.now = None
    await bench.inner.backend.commit("main", {KEY: b"2"}, {}, op=Op("the next owner", 1))
    assert await bench.read_asking() == 2
    assert await bench.read_asking() == 2, "nothing is kept without a lease"
    lease.now = 2
    assert await bench.read_asking() == 2
    assert await bench.read_free() == 2


@pytest.mark.parametrize("then", [None, 2])
async def test_a_lease_that_ended_during_a_read_or_commit_keeps_nothing(then: int | None) -> None:
    lease = Lease()
    bench = await Bench(Watched(shared=True), leases=lease).open()
    await bench.put(0, KEYS[5])
    bench.inner.after_read = read_gate = Gate()
    bench.inner.after_commit = commit_gate = Gate()
    reading = asyncio.ensure_future(bench.get(OTHER))
    committing = asyncio.ensure_future(bench.put(1))
    await asyncio.gather(read_gate.reached.wait(), commit_gate.reached.wait())
    lease.now = None
    await bench.inner.backend.commit("main", {KEY: b"7", OTHER: b"7"}, {}, op=Op("the next owner", 1))
    lease.now = then
    read_gate.open.set()
    commit_gate.open.set()
    await asyncio.gather(reading, committing)
    bench.inner.after_read = None
    assert (await bench.get(), await bench.get(OTHER)) == (7, 7)


async def test_some_keys_in_memory_are_not_mixed_with_others_of_another_moment() -> None:
    bench = await Bench(most_rows=1).open()
    await bench.cached.commit("main", {KEY: b"1", OTHER: b"1"}, {}, op=Op("w", 1))
    await bench.get(KEY)
    assert await bench.read_free(KEY) == 1
    bench.inner.before_read = gate = Gate()
    reading = asyncio.ensure_future(bench.cached.read("main", [KEY, OTHER]))
    await gate.reached.wait()
    await bench.cached.commit("main", {KEY: b"2", OTHER: b"2"}, {}, op=Op("v", 1))
    gate.open.set()
    assert {record.payload for record in (await reading).values()} == {b"2"}


async def test_a_shared_store_without_leases_keeps_nothing_and_says_so() -> None:
    bench = Bench(Watched(shared=True))
    found = await bench.cached.open()
    assert "nothing is cached" in found.warnings[-1]
    assert "leases" in found.warnings[-1]
    assert "memory keeps nothing" in found.warnings[0], "what weakens the promise below is still told"
    await bench.put(1)
    assert await bench.read_asking() == 1
    assert await bench.read_asking() == 1
    assert bench.cached.figures.rows == 0


async def test_a_store_whose_commits_are_not_atomic_keeps_nothing_even_with_leases() -> None:
    bench = Bench(Watched(atomic=False), leases=Lease())
    found = await bench.cached.open()
    assert "not atomic" in found.warnings[-1]
    await bench.put(1)
    assert await bench.read_asking() == 1
    assert await bench.read_asking() == 1


async def test_a_reader_beside_the_owner_keeps_nothing() -> None:
    inner = Watched()
    reader = Cached(inner)
    await reader.open(read_only=True)
    for _ in range(2):
        await reader.read("main", [KEY])
    assert inner.reads == 2


async def test_closing_forgets_and_an_answer_of_an_earlier_life_is_not_kept() -> None:
    bench = await Bench().open()
    await bench.put(1)
    bench.inner.after_read = gate = Gate()
    reading = asyncio.ensure_future(bench.get(OTHER))
    await gate.reached.wait()
    await bench.cached.close()
    with pytest.raises(FailedError):
        await bench.cached.read("main", [KEY])
    await bench.open()
    await bench.inner.backend.commit("main", {KEY: b"3", OTHER: b"3"}, {}, op=Op("meanwhile", 1))
    gate.open.set()
    await reading
    bench.inner.after_read = None
    assert (await bench.get(), await bench.get(OTHER)) == (3, 3)


async def test_it_keeps_no_more_rows_and_bytes_than_it_may() -> None:
    bench = await Bench(most_rows=3).open()
    for value, key in enumerate(KEYS[:4]):
        await bench.put(value, key)
        await bench.get(KEY)  # used again and again
    assert bench.cached.figures.rows == 3
    assert await bench.read_free(KEYS[0]) == 0
    assert await bench.read_asking(KEYS[1]) == 1, "the one used longest ago went first"
    heavy = await Bench(most_bytes=10_000).open()
    for number, key in enumerate(KEYS[:4], 1):
        await heavy.cached.commit("main", {key: b'"%s"' % (b"x" * 3000)}, {}, op=Op("w", number))
    assert 0 < heavy.cached.figures.size_bytes <= 10_000
    assert heavy.cached.figures.rows == 2
    await heavy.cached.commit("main", {KEYS[5]: b'"%s"' % (b"x" * 20_000)}, {}, op=Op("w", 9))
    assert heavy.cached.figures.rows == 2, "one that would push out all others is not kept"
    for key in KEYS[:4]:
        await heavy.cached.commit("main", {key: None}, {}, op=Op(f"d{key.entity_id}", 1))
    await heavy.cached.close()
    assert heavy.cached.figures == (0, 0, 0, 0)


@pytest.mark.parametrize("options", [{"most_rows": 0}, {"most_bytes": 0}])
def test_bounds_that_hold_nothing_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match="give 1 or more"):
        Cached(MemoryBackend(), **options)  # type: ignore[arg-type]


def test_a_class_with_an_epoch_is_a_lease() -> None:
    assert isinstance(Lease(), Leases)


# ---------------------------------------------------------------------- histories


class Unruly(Around):
    """A store whose calls take a while, whose answers are lost, and whose lost commits may land later."""

    def __init__(self, backend: Backend, chance: random.Random) -> None:
        super().__init__(backend)
        self.chance = chance
        self.late: set[asyncio.Task[int]] = set()

    async def _while(self, most: int = 6) -> None:
        for _ in range(self.chance.randrange(most)):
            await asyncio.sleep(0)

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        await self._while()
        found = await super().read(scope, keys)
        await self._while()
        return found

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        fate = self.chance.random()
        await self._while()
        if fate < 0.05:
            raise UnavailableError("away")
        if fate < 0.15:
            self.late.add(asyncio.ensure_future(self._land(scope, changes, expect, op)))
            raise UnknownOutcomeError("lost on the way")
        number = await super().commit(scope, changes, expect, op=op)
        await self._while()
        if fate < 0.25:
            raise UnknownOutcomeError("lost on the way back")
        return number

    async def _land(self, scope: str, changes: Any, expect: Any, op: Op) -> int:
        await self._while(40)
        return await super().commit(scope, changes, expect, op=op)


class Seen:
    """What a history showed of each key: a read must not be older than anything seen or acknowledged before it."""

    def __init__(self) -> None:
        self.newest: dict[Key, int] = {}
        self.reads = 0

    def note(self, key: Key, version: int) -> None:
        """Somebody knows this version now."""
        self.newest[key] = max(self.newest.get(key, 0), version)

    async def read(self, backend: Backend, keys: Sequence[Key]) -> None:
        """Read, and compare with what was known before."""
        known = {key: self.newest.get(key, 0) for key in keys}
        found = await backend.read("main", keys)
        self.reads += 1
        for key in keys:
            version = found[key].version if key in found else 0
            assert version >= known[key], f"{key} was at {known[key]} before the read began, and it answers {version}"
            self.note(key, version)


async def _history(seed: int, make: Callable[[Backend, Lease], Cached]) -> tuple[int, int]:
    """Run readers and writers over an unruly store; return how many reads there were, and how many asked nobody."""
    chance = random.Random(seed)
    memory = MemoryBackend()
    lease = Lease()
    unruly = Unruly(memory, chance)
    cached = make(unruly, lease)
    await cached.open()
    seen = Seen()

    async def write(lane: int) -> None:
        for n in range(1, 16):
            op = Op(f"lane{lane}", n)
            some = chance.sample(KEYS[:3], chance.randrange(1, 3))
            changes: dict[Key, bytes | None] = dict.fromkeys(some, b'"%d.%d"' % (lane, n))
            for _ in range(chance.randrange(1, 4)):  # sent again after an unknown outcome, or given up
                try:
                    number = await asyncio.wait_for(cached.commit("main", changes, {}, op=op), 5)
                except UnknownOutcomeError:
                    continue
                except (UnavailableError, ConflictError):
                    break
                for key in changes:
                    seen.note(key, number)
                break

    async def look() -> None:
        for _ in range(40):
            await seen.read(cached, chance.sample(KEYS[:3], chance.randrange(1, 3)))
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)

    async def own() -> None:
        for epoch in range(2, 6):
            for _ in range(60):
                await asyncio.sleep(0)
            lease.now = None
            await asyncio.sleep(0)
            changes: dict[Key, bytes | None] = {KEYS[chance.randrange(3)]: b'"stranger"'}
            number = await memory.commit("main", changes, {}, op=Op("stranger", epoch))
            for key in changes:
                seen.note(key, number)
            await asyncio.sleep(0)
            lease.now = epoch

    work = [asyncio.ensure_future(one) for one in (write(0), write(1), look(), look(), look(), own())]
    await asyncio.wait(work)
    await asyncio.gather(*unruly.late, return_exceptions=True)
    for error in [done.exception() for done in work]:
        if error is not None:
            raise error
    for key in KEYS[:3]:
        stored = (await memory.read("main", [key])).get(key)
        assert (await cached.read("main", [key])).get(key) == stored, "at rest it serves what the store holds"
    return seen.reads, cached.figures.hits


async def test_histories_over_an_unruly_store_never_go_back(record_property: Callable[[str, object], None]) -> None:
    reads = hits = 0
    for seed in range(300):
        more, free = await _history(seed, lambda inner, lease: Cached(inner, leases=lease))
        reads, hits = reads + more, hits + free
    assert hits > reads / 10, "the cache was used at all"
    record_property("proof:cached", {"histories": 300, "reads": reads, "of them from memory": hits})


class _Naive(Cached):
    """The older document's sample: the cache is set before the store is written."""

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        number = (await self.backend.head(scope)).number + 1
        for key, payload in changes.items():
            if payload is not None and (epoch := self._leases.epoch(scope, key)) is not None:
                self._keep((scope, key), Record(payload, number, op), epoch)
        return await self.backend.commit(scope, changes, expect, op=op)


async def test_the_histories_find_a_cache_that_is_set_before_the_store() -> None:
    found = 0
    for seed in range(20):
        try:
            await _history(seed, lambda inner, lease: _Naive(inner, leases=lease))
        except AssertionError:
            found += 1
    assert found >= 18, "nearly every history shows it"
