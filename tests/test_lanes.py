"""A commit whose answer was lost, at a store that then cannot be used."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes import Bot, FakeMarket, candle, flat, memory_store, proposal, session_of, sound, stepped

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Key
from holdfast.engine.lanes import commit_surely
from holdfast.errors import UnavailableError
from holdfast.rows import Guard
from holdfast.testing.faults import Fault, FaultKind, FaultyBackend

REFUSALS: list[FaultKind] = ["unavailable"] * 40


async def _session(*kinds: FaultKind) -> tuple[Bot, Any, FaultyBackend]:
    """Return a session whose next commits meet these faults, one each."""
    faulty = FaultyBackend(MemoryBackend())
    bot = Bot(FakeMarket({"BTCUSDT": flat(43000, -10, 30)}), lambda symbol, when: proposal())
    session = await session_of(bot, await memory_store(faulty))
    faulty.faults += [Fault(faulty.calls["commit"] + nth, kind) for nth, kind in enumerate(kinds, 1)]
    return bot, session, faulty


@pytest.mark.parametrize("lost", ["unknown_lost", "unknown_applied"])
async def test_a_refusal_after_a_lost_answer_is_waited_out_and_the_session_goes_on(lost: FaultKind) -> None:
    _, session, faulty = await _session(lost, *REFUSALS)
    told = await stepped(session, candle(0, 43000))
    assert [event.kind for event in told] == ["opened"]
    assert faulty.hits == 41
    told = await stepped(session, candle(1, 43000, high=44000))
    assert [event.kind for event in told] == ["closed"], "nobody else's commit was seen in its own"
    await sound(session.store)
    await session.close()


async def test_a_session_that_closes_does_not_wait_for_ever_for_the_answer_to_a_lost_commit() -> None:
    _, session, faulty = await _session()
    await stepped(session, candle(0, 43000))  # leaves a delivered event to delete
    now = faulty.calls["commit"]
    faulty.faults += [Fault(now + 1, "unknown_lost"), *(Fault(now + nth, "unavailable") for nth in range(2, 2000))]
    await asyncio.wait_for(session.close(), 10)
    assert faulty.hits < 100


async def test_whoever_reads_again_anyway_is_told_of_the_refusal() -> None:
    _, session, faulty = await _session()
    now = faulty.calls["commit"]
    faulty.faults += [Fault(now + 1, "unknown_lost"), Fault(now + 2, "unavailable")]
    with pytest.raises(UnavailableError):
        await commit_surely(session.store.writer("test"), {}, {Key("signal", "x", "x"): 0}, sleep=session._sleep)
    await session.close()


async def test_the_number_of_an_earlier_commit_is_never_taken_for_that_of_the_next() -> None:
    _, session, faulty = await _session()
    now = faulty.calls["commit"]
    faulty.faults += [Fault(now + 1, "unknown_lost"), Fault(now + 2, "unavailable"), Fault(now + 3, "unknown_lost")]
    store, lane = session.store, session.store.writer("test")
    first, second = Key("guard", "first", "guard"), Key("guard", "second", "guard")
    with pytest.raises(UnavailableError):
        await commit_surely(lane, {first: Guard(changes=1)}, {first: 0}, sleep=session._sleep)
    with pytest.raises(UnavailableError, match=r"an earlier commit of .* is not settled"):
        await commit_surely(lane, {second: Guard(changes=2)}, {second: 0}, sleep=session._sleep)
    assert await store.load(first, second) == {}
    await commit_surely(lane, {second: Guard(changes=2)}, {second: 0}, sleep=session._sleep)
    found = await store.load(first, second)
    assert {key: loaded.row for key, loaded in found.items()} == {
        first: Guard(changes=1),  # it was settled first
        second: Guard(changes=2),
    }
    await session.close()
