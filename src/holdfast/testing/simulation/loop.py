"""One clock, and an event loop for each simulated process: no threads, no sockets, no waiting.

Time stands still while anybody has something to do, and then jumps to the next timer. A process that is paused keeps
what it would do; one that has crashed forgets it. So a crash or a pause falls between two steps of a process's tasks,
which is where a real one, or a signal, shows at all.

Invariants:

* Whatever runs, runs in the order in which it became ready, unless a seed of chance permutes it: the same plan runs
  the same steps in the same order.
* What belongs to no process (a request that is under way, a fault) has no loop, and no process can hold it up.
"""

from __future__ import annotations

import asyncio
import heapq
import signal
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from random import Random
from typing import Any

import msgspec

_set_running_loop = asyncio._set_running_loop
_MOST_STEPS = 200_000
"""A history that takes more steps than this goes round in circles."""


_MOST_SPINNING_SECONDS = 20.0
"""Of this process's own time: a history that takes longer spins where the scheduler cannot see it."""


class StuckError(AssertionError):
    """A simulated history does not come to its end."""


class _Spinning(BaseException):
    """Raised amid whatever runs; what catches errors lets it through."""


@contextmanager
def no_spinning(scheduler: Scheduler, most_seconds: float = _MOST_SPINNING_SECONDS) -> Iterator[None]:
    """End what the scheduler runs within the ``with`` block when it takes too much of the processor.

    A task that never waits for anything gives the scheduler no step to count. Works in the main thread only: nobody
    else can be interrupted.

    Raises:
        StuckError: It was ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    spun = False

    def end(*what: object) -> None:
        nonlocal spun
        spun = scheduler.ended = True  # the exception itself ends no more than one task
        raise _Spinning

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, most_seconds, 1.0)  # again, should a finalizer swallow the first
    try:
        with suppress(_Spinning):
            yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)
    if spun:
        raise StuckError(f"a task runs on and waits for nothing: {most_seconds:g} s without an end")


class Handle(msgspec.Struct, eq=False):
    """Something that will run, unless it is cancelled; stands in for ``asyncio.Handle`` and ``TimerHandle``."""

    callback: Callable[..., Any] | None
    args: tuple[Any, ...]
    context: Context | None
    loop: ProcessLoop | None
    when_seconds: float = 0.0

    def cancel(self) -> None:
        """Never run it."""
        self.callback, self.args = None, ()

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self.callback is None

    def when(self) -> float:
        """When it is due."""
        return self.when_seconds


class Scheduler:
    """Runs what is ready on all loops, and moves the clock.

    Args:
        chance: Permutes what is ready at the same time; None: first come, first served.
    """

    def __init__(self, chance: Random | None = None) -> None:
        self.now_seconds = 0.0
        self.steps = 0
        self.ended = False
        """Set to run nothing more."""
        self.ready: deque[Handle] = deque()
        self._running: ProcessLoop | None = None
        self._timers: list[tuple[float, int, Handle]] = []
        self._serial = 0
        self._chance = chance

    def at(self, when_seconds: float, callback: Callable[..., Any], *args: Any) -> Handle:
        """Run ``callback`` at a moment, outside of every process."""
        return self.time(Handle(callback, args, None, None, when_seconds))

    def time(self, handle: Handle) -> Handle:
        """Take a handle that is due at a moment."""
        self._serial += 1
        heapq.heappush(self._timers, (handle.when_seconds, self._serial, handle))
        return handle

    def run(self, until_seconds: float = float("inf"), *, done: Callable[[], bool] | None = None) -> None:
        """Run until nothing is left, until a moment, or until ``done`` says so when the clock would move.

        Raises:
            StuckError: It takes too many steps.
        """
        ready, timers, chance = self.ready, self._timers, self._chance
        take, due = ready.popleft, heapq.heappop
        self._running, steps = None, 0
        try:
            while not self.ended:
                while ready and not self.ended:
                    if chance is not None and len(ready) > 1:
                        ready.rotate(-int(chance.random() * min(len(ready), 4)))
                    handle = take()
                    callback = handle.callback
                    if callback is None:
                        continue
                    loop = handle.loop
                    if loop is not None:  # what belongs to no process does not care in whose loop it runs
                        if loop.held is not None:
                            loop.held.append(handle)
                            continue
                        if loop is not self._running:
                            self.enter(loop)
                    steps += 1
                    if steps > _MOST_STEPS:
                        raise StuckError(f"more than {_MOST_STEPS} steps: it goes round in circles")
                    context = handle.context
                    if context is None:
                        callback(*handle.args)
                    else:
                        context.run(callback, *handle.args)
                if not timers or timers[0][0] > until_seconds or (done is not None and done()):
                    return
                when, _, handle = due(timers)
                if handle.callback is not None:
                    if when > self.now_seconds:
                        self.now_seconds = when
                    ready.append(handle)
        finally:
            self.enter(None)

    def enter(self, loop: ProcessLoop | None) -> None:
        """Let asyncio know whose loop runs from here on."""
        _set_running_loop(loop)
        self._running = loop


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class ProcessLoop(asyncio.AbstractEventLoop):
    """The event loop of one simulated process.

    Args:
        scheduler: Runs it.
        complain: Told what asyncio would have logged: a task's exception that nobody looked at.
    """

    def __init__(self, scheduler: Scheduler, complain: Callable[[dict[str, Any]], None]) -> None:
        self._scheduler, self._complain = scheduler, complain
        self._ready = scheduler.ready
        self.held: deque[Handle] | None = None
        """What waits for a paused process to go on; None while it runs."""
        self._tasks: list[asyncio.Task[Any]] = []
        self.dead = False

    # ------------------------------------------------------------------ what asyncio asks of a loop

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Handle:  # type: ignore[override]
        handle = Handle(callback, args, context, self)
        self._ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Handle:
        scheduler = self._scheduler
        return scheduler.time(Handle(callback, args, context, self, scheduler.now_seconds + delay))

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Handle:
        return self._scheduler.time(Handle(callback, args, context, self, when))

    def time(self) -> float:
        return self._scheduler.now_seconds

    def woken_in(self, seconds: float) -> tuple[asyncio.Future[None], Handle]:
        """Return what is done after so long, and its timer: ``asyncio.sleep`` in fewer steps."""
        future: asyncio.Future[None] = asyncio.Future(loop=self)
        scheduler = self._scheduler
        return future, scheduler.time(Handle(_wake, (future,), None, self, scheduler.now_seconds + seconds))

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], *, name: Any = None, context: Any = None) -> Any:  # type: ignore[override]
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        if len(self._tasks) > 100:
            self._tasks = [one for one in self._tasks if not one.done()]
        self._tasks.append(task)
        return task

    get_debug = staticmethod(bool)  # False, told in C: each future asks for it

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self.dead:
            self._complain(context)

    # ------------------------------------------------------------------ what happens to processes

    def pause(self) -> None:
        """Run nothing of it until it resumes; its timers go on, and their time comes late."""
        if self.held is None:
            self.held = deque()

    def resume(self) -> None:
        """Go on."""
        if self.held is not None and not self.dead:
            held, self.held = self.held, None
            self._ready.extend(held)

    def kill(self) -> None:
        """End it without a word. Its tasks are unwound, so that nothing is left; whatever they try is refused."""
        self.dead = True
        ready = self._ready
        others = deque(handle for handle in ready if handle.loop is not self)
        held = self.held if self.held is not None else ()
        mine = [*held, *(handle for handle in ready if handle.loop is self)]
        ready.clear()
        ready.extend(mine)  # a task whose step was dropped could never be unwound
        self.held = None
        self._scheduler.enter(self)
        try:
            for _ in range(5):
                alive = [task for task in self._tasks if not task.done()]
                if not alive:
                    break
                for task in alive:
                    task.cancel()
                while ready:
                    handle = ready.popleft()
                    if handle.loop is not self:
                        others.append(handle)
                    elif handle.callback is not None and handle.context is not None:
                        handle.context.run(handle.callback, *handle.args)
                    elif handle.callback is not None:
                        handle.callback(*handle.args)
            for task in self._tasks:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
        finally:
            self._scheduler.enter(None)
        self._tasks.clear()
        ready.extend(others)
        self.held = deque()  # what still comes for it stays there
