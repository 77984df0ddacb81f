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
