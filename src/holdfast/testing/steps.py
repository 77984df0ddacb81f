"""Running a coroutine up to its k-th suspension: cancellation between any two steps, made repeatable."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _CancelledAt(Generic[T]):
    """Awaits a coroutine and cancels its own task at the coroutine's k-th suspension."""

    def __init__(self, work: Awaitable[T], at: int) -> None:
        self.work = work
        self.at = at
        self.suspensions = 0

    def __await__(self) -> Generator[Any, Any, T]:
        inner = self.work.__await__()
        task = asyncio.current_task()
        assert task is not None
        answer: Any = None
        error: BaseException | None = None
        while True:
            try:
                waited_for = inner.send(answer) if error is None else inner.throw(error)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            self.suspensions += 1
            if self.suspensions == self.at:
                task.cancel()  # the task is cancelled the moment it hands out what it waits for
            answer, error = None, None
            try:
                answer = yield waited_for
            except BaseException as raised:
                error = raised


async def cancelled_at(work: Coroutine[Any, Any, T], at: int) -> tuple[bool, T | None]:
    """Run ``work`` in a task that is cancelled at its ``at``-th suspension (1 is the first).

    Returns:
        Whether it ended cancelled, and its result where it ended by returning. It returns without being
        cancelled when it has fewer suspensions, or when it shields itself to its end.
    """
    counted = _CancelledAt(work, at)

    async def run() -> T:
        return await counted

    task = asyncio.get_running_loop().create_task(run())
    await asyncio.wait([task])
    if task.cancelled():
        return True, None
    if counted.suspensions < at:
        task.result()
        return False, task.result()
    return False, task.result()
