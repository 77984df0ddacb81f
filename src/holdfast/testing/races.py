"""Conformance checks in which commits overlap, race, or are cancelled."""

from __future__ import annotations

import asyncio
import itertools
from typing import NamedTuple

from ..contract import Backend, Op
from ..errors import ConflictError
from .conformance import Bench, Need, check
from .steps import cancelled_at

MOST_STEPS = 60
"""How many suspension points of one commit are tried before the check gives up."""


class _Write(NamedTuple):
    number: int
    value: int
    begun: int
    acknowledged: int


@check()
async def racing_committers_have_one_winner_per_version(bench: Bench) -> None:
    """A counter that is read, raised and written under ``expect`` by eight tasks loses no increment."""
    backend = await bench.open()
    await bench.put(backend, {0: 0})
    wins: list[int] = []

    async def raise_it(writer: str) -> None:
        for n in range(1, 9):
            while True:
                record = await bench.get(backend, 0)
                assert record is not None
                value = next(i for i in range(len(wins) + 66) if bench.payload(0, i) == record.payload)
                try:
                    wins.append(await bench.put(backend, {0: value + 1}, {0: record.version}, op=Op(writer, n)))
                    break
                except ConflictError:
                    await asyncio.sleep(0)

    await asyncio.gather(*(raise_it(f"racer-{i}") for i in range(8)))
    record = await bench.get(backend, 0)
    assert record is not None
    assert record.payload == bench.payload(0, 64), "each acknowledged increment counts once"
    assert len(set(wins)) == 64, "no two commits have the same number"
    assert record.version == max(wins)


async def overlapping_writes(bench: Bench, backend: Backend, rounds: int) -> None:
    """Let 20 writers of one key overlap; what is read is the last acknowledged value, in every round.

    Also: a write that began after another was acknowledged has the higher number.

    Raises:
        AssertionError: In the first round in which that is not so.
    """
    clock = itertools.count()
    numbers = itertools.count(1)
    for turn in range(rounds):
        writes: list[_Write] = []
        n = next(numbers)

        async def write(value: int, n: int = n, writes: list[_Write] = writes) -> None:
            for _ in range(value % 5):
                await asyncio.sleep(0)  # they begin at different moments, while others are under way
            begun = next(clock)
            number = await bench.put(backend, {0: value}, op=Op(f"overlap-{value}", n))
            writes.append(_Write(number, value, begun, next(clock)))

        await asyncio.gather(*(write(value) for value in range(20)))
        record = await bench.get(backend, 0)
        last = max(writes)
        assert record is not None
        assert (record.version, record.payload) == (last.number, bench.payload(0, last.value)), f"round {turn}"
        for earlier, later in itertools.permutations(writes, 2):
            if earlier.acknowledged < later.begun:
                assert earlier.number < later.number, f"round {turn}: {later} began after {earlier} was acknowledged"
        assert len({write.number for write in writes}) == 20


@check()
async def twenty_overlapping_writers_leave_the_last_value(bench: Bench) -> None:
    await overlapping_writes(bench, await bench.open(), rounds=20)


@check()
async def a_commit_conflicts_with_one_in_flight(bench: Bench) -> None:
    backend = await bench.open()
    for turn in range(10):
        record = await bench.get(backend, 0)
        version = record.version if record else 0
        racers = [bench.put(backend, {0: turn, 1: i}, {0: version}, op=Op(f"flight-{i}", turn + 1)) for i in range(5)]
        answers = await asyncio.gather(*racers, return_exceptions=True)
        won = [(i, answer) for i, answer in enumerate(answers) if isinstance(answer, int)]
        assert len(won) == 1, answers
        assert sum(isinstance(answer, ConflictError) for answer in answers) == 4, answers
        found = await bench.get(backend, 1)
        assert found is not None
        assert (found.version, found.payload) == (won[0][1], bench.payload(1, won[0][0]))


@check()
async def the_same_op_sent_twice_at_once_is_applied_once(bench: Bench) -> None:
    backend = await bench.open()
    op = bench.op()
    first, second = await asyncio.gather(
        bench.put(backend, {0: 1}, {0: 0}, op=op), bench.put(backend, {0: 1}, {0: 0}, op=op)
    )
    assert first == second
    assert await bench.put(backend, {1: 1}) == first + 1, "the repetition had no number of its own"


@check(Need.ATOMIC)
async def a_read_is_of_one_moment(bench: Bench) -> None:
    backend = await bench.open()
    await bench.put(backend, {0: 0, 1: 0, 2: 0})
    done = False

    async def rewrite() -> None:
        nonlocal done
        for i in range(1, 31):
            await bench.put(backend, {0: i, 1: i, 2: i})
        done = True

    async def watch() -> None:
        newest = 0
        while not done:
            found = await backend.read(bench.scope, list(bench.keys[:3]))
            versions = {record.version for record in found.values()}
            assert len(found) == 3
            assert len(versions) == 1, "three rows of three different moments"
            assert min(versions) >= newest, "a later read is never older"
            newest = min(versions)
            await asyncio.sleep(0)

    await asyncio.gather(rewrite(), watch(), watch())


@check(Need.ATOMIC)
async def a_commit_cancelled_at_any_step_is_whole_or_absent(bench: Bench) -> None:
    backend = await bench.open()
    for at in range(1, MOST_STEPS):
        before = await backend.read(bench.scope, list(bench.keys[:2]))
        op = Op(f"cancelled-{at}", 1)
        cancelled, number = await cancelled_at(bench.put(backend, {0: at, 1: at}, op=op), at)
        found = await backend.read(bench.scope, list(bench.keys[:2]))
        if found != before:
            assert all(record.op == op for record in found.values()), "half of a cancelled commit"
            assert {key: record.payload for key, record in found.items()} == {
                bench.keys[i]: bench.payload(i, at) for i in (0, 1)
            }
        settled = await bench.put(backend, {0: 500 + at, 1: 500 + at})
        await asyncio.sleep(0)
        now = await backend.read(bench.scope, list(bench.keys[:2]))
        assert {record.version for record in now.values()} == {settled}, "a cancelled write came after a later one"
        if not cancelled:
            assert number is not None
            return
    raise AssertionError(f"a commit with more than {MOST_STEPS} steps")


@check(Need.ATOMIC)
async def cancelling_one_of_several_does_not_harm_the_others(bench: Bench) -> None:
    backend = await bench.open()
    for at in range(1, 8):
        doomed = asyncio.ensure_future(cancelled_at(bench.put(backend, {0: at}, op=Op("doomed", at)), at))
        others = [bench.put(backend, {i: at}, op=Op(f"other-{i}", at)) for i in range(1, 5)]
        numbers = await asyncio.gather(*others)
        await doomed
        found = await backend.read(bench.scope, list(bench.keys[1:5]))
        assert [found[bench.keys[i]].version for i in range(1, 5)] == numbers
        assert [found[bench.keys[i]].payload for i in range(1, 5)] == [bench.payload(i, at) for i in range(1, 5)]


@check(Need.PERSISTENT)
async def closing_waits_for_commits_under_way(bench: Bench) -> None:
    backend = await bench.open()
    await bench.put(backend, {0: 0})
    under_way = [asyncio.ensure_future(bench.put(backend, {i: 1}, op=Op(f"closing-{i}", 1))) for i in range(4)]
    await asyncio.sleep(0)
    await backend.close()
    answers = await asyncio.gather(*under_way, return_exceptions=True)
    again = await bench.open()
    found = await again.read(bench.scope, list(bench.keys))
    for i, answer in enumerate(answers):
        record = found.get(bench.keys[i])
        if isinstance(answer, int):
            assert record is not None
            assert (record.version, record.payload) == (answer, bench.payload(i, 1)), "acknowledged, then lost"
