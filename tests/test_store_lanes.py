"""Lanes: an outcome that is unknown is found out before anything else is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Key, Op, Survives
from holdfast.errors import ConflictError, InvalidInputError, UnavailableError, UnknownOutcomeError
from holdfast.rows import Guard
from holdfast.store import Store

A, B = Key("guard", "a", "guard"), Key("guard", "b", "guard")


class Troubled(MemoryBackend):
    """Does ``before`` and ``after`` around a commit; each may raise, or wait."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[Callable[[], object]] = []
        self.after: list[Callable[[], object]] = []
        self.sent: list[Op] = []

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:
        self.sent.append(op)
        await self._do(self.before)
        number = await super().commit(scope, changes, expect, op=op)
        await self._do(self.after)
        return number

    async def _do(self, actions: list[Callable[[], object]]) -> None:
        found = actions.pop(0)() if actions else None
        if isinstance(found, asyncio.Event):
            await found.wait()


def lose() -> None:
    raise UnknownOutcomeError("the answer was lost")


def refuse() -> None:
    raise UnavailableError("down")


async def opened() -> tuple[Store, Troubled]:
    backend = Troubled()
    store = Store(backend, require=Survives.NOTHING)
    await store.open()
    return store, backend


async def test_a_lost_answer_is_got_by_sending_the_same_op_again() -> None:
    store, backend = await opened()
    writer = store.writer("x")
    backend.after = [lose]
    with pytest.raises(UnknownOutcomeError):
        await writer.commit({A: Guard(changes=1)}, {A: 0})
    assert await writer.resend() == 1 and backend.sent[0] == backend.sent[1]
    with pytest.raises(InvalidInputError, match="nothing to send again"):
        await writer.resend()
    assert await writer.commit({A: Guard(changes=2)}, {A: 1}) == 2


async def test_a_request_that_never_arrived_is_applied_by_sending_it_again() -> None:
    store, backend = await opened()
    writer = store.writer("x")
    backend.before = [lose, lose]
    with pytest.raises(UnknownOutcomeError):
        await writer.commit({A: Guard(changes=1)}, {A: 0})
    with pytest.raises(UnknownOutcomeError):
        await writer.resend()
    assert await writer.resend() == 1


async def test_an_unavailable_store_during_sending_again_leaves_the_outcome_unknown() -> None:
    store, backend = await opened()
    writer = store.writer("x")
    backend.after, backend.before = [lose], [lambda: None, refuse]
    with pytest.raises(UnknownOutcomeError):
        await writer.commit({A: Guard(changes=1)}, {A: 0})
    with pytest.raises(UnavailableError):
        await writer.resend()
    assert await writer.resend() == 1


async def test_an_unguarded_commit_is_looked_for_and_never_sent_again() -> None:
    store, backend = await opened()
    writer = store.writer("x")
    backend.after = [lose]
    with pytest.raises(UnknownOutcomeError):
        await writer.commit({A: Guard(changes=1)})
    assert await writer.resend() == 1
    backend.before = [lose]
    with pytest.raises(UnknownOutcomeError):
        await writer.commit({A: Guard(changes=2)})
    with pytest.raises(ConflictError):
        await writer.resend()
    assert len(backend.sent) == 2
    loaded = await store.get(A)
    assert loaded is not None and loaded.row == Guard(changes=1)


async def test_the_next_commit_settles_an_unknown_one_first() -> None:
    store, backend = await opened()
    told: list[int] = []
    store.observers.append(lambda _scope, number, _changes: told.append(number))
    writer = store.writer("x")
    backend.before = [lose]
    with pytest.raises(UnknownOutcomeError):
        await writer.commit({A: Guard(changes=1)}, {A: 0})
    assert await writer.commit({B: Guard(changes=1)}, {B: 0}) == 2
    assert [op.n for op in backend.sent] == [1, 1, 2] and told == [1, 2]
    loaded = await store.get(A)
    assert loaded is not None and loaded.version == 1


async def test_a_refused_commit_leaves_nothing_to_settle() -> None:
    store, backend = await opened()
    writer = store.writer("x")
    backend.before = [refuse]
    with pytest.raises(UnavailableError):
        await writer.commit({A: Guard(changes=1)}, {A: 0})
    with pytest.raises(InvalidInputError):
        await writer.resend()
    assert await writer.commit({A: Guard(changes=1)}, {A: 0}) == 1


@pytest.mark.parametrize("arrived", [False, True])
@pytest.mark.parametrize("guarded", [False, True])
async def test_a_cancelled_commit_is_settled_before_the_next_one(arrived: bool, guarded: bool) -> None:
    store, backend = await opened()
    writer, reached = store.writer("x"), asyncio.Event()

    def block() -> asyncio.Event:
        reached.set()
        return asyncio.Event()

    (backend.after if arrived else backend.before).append(block)
    task = asyncio.create_task(writer.commit({A: Guard(changes=1)}, {A: 0} if guarded else None))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await writer.commit({B: Guard(changes=1)}, {B: 0})
    assert [key for key in await store.keys() if key == A] == ([A] if arrived or guarded else [])
    assert sorted({op.n for op in backend.sent}) == [1, 2]


async def test_commits_of_one_lane_go_one_after_another() -> None:
    store, backend = await opened()
    writer, gate, reached = store.writer("x"), asyncio.Event(), asyncio.Event()

    def block() -> asyncio.Event:
        reached.set()
        return gate

    backend.before = [block]
    tasks = [asyncio.create_task(writer.commit({A: Guard(changes=n)})) for n in range(5)]
    await reached.wait()
    tasks[2].cancel()  # while it waits for its turn: it is never sent
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [r for r in results if isinstance(r, int)] == [1, 2, 3, 4]
    assert isinstance(results[2], asyncio.CancelledError) and [op.n for op in backend.sent] == [1, 2, 3, 4]


async def test_two_lanes_of_one_name_are_different_writers() -> None:
    store, backend = await opened()
    await store.writer("x").commit({A: Guard(changes=1)})
    await store.writer("x").commit({A: Guard(changes=2)})
    assert len({op.writer for op in backend.sent}) == 2 and all(op.writer.startswith("x@") for op in backend.sent)


async def test_a_lane_may_have_any_name() -> None:
    store, _ = await opened()
    for name in ("BTC/USDT:USDT\n\0", "x" * 5000, "é"):
        await store.writer(name).commit({A: Guard(changes=1)})
