"""Group commit: commits that wait together share one round trip and one durability barrier.

Invariants:

* One group is in flight at a time, on one connection, because a barrier counts its own connection's writes only.
* A commit that was not sent is answered with ``UnavailableError``; one that was sent and whose answer or barrier is
  missing, with ``UnknownOutcomeError``. Nothing that may have been executed is ever sent again from here.
* Nobody waits beyond the deadline of its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from ...errors import HoldfastError, UnavailableError, UnknownOutcomeError
from .attest import Barrier
from .link import Link, LinkLostError, Refusal, UnreachableError

MAX_GROUP_COMMITS = 512
MAX_GROUP_BYTES = 16 * 1024 * 1024
_MAX_MOVES = 5
"""How often a commit follows its keys to another node before it is given back."""

LOOK_ANEW = frozenset(("READONLY", "MASTERDOWN", "CLUSTERDOWN", "MOVED", "ASK"))
"""Answers after which the primary is looked for again."""


class Command(Protocol):
    """Something to send."""

    @property
    def size_bytes(self) -> int:
        """About how much it is."""

    def packed(self, *, in_full: bool) -> bytes:
        """Return it for the wire; ``in_full`` where the server may not know the script."""


class Plain:
    """A command that is no script."""

    def __init__(self, command: bytes) -> None:
        self._command = command
        self.size_bytes = len(command)

    def packed(self, *, in_full: bool) -> bytes:
        """Return it as it is."""
        return self._command


class _Waiting:
    """One command whose caller waits."""

    __slots__ = ("command", "deadline", "future", "moves", "sent", "timer")

    def __init__(self, command: Command, deadline: float, future: asyncio.Future[Any]) -> None:
        self.command = command
        self.deadline = deadline
        self.future = future
        self.sent = False
        self.moves = 0
        self.timer: asyncio.TimerHandle | None = None

    def give(self, answer: Any) -> None:
        """Wake the caller, unless it has gone."""
        if self.timer is not None:
            self.timer.cancel()
        if not self.future.done():
            if isinstance(answer, BaseException):
                self.future.set_exception(answer)
            else:
                self.future.set_result(answer)


class Lane:
    """One queue of commits to one primary.

    Args:
        connect: Makes a connection to the present primary and attests it, by a deadline of the loop's clock. Raises
            ``UnreachableError``, ``LinkLostError``, ``Refusal`` or a ``HoldfastError``.
        forget: Called when the primary has to be looked for anew.
        barrier: What each group waits for.
        shown: The backend's name in errors.
    """

    def __init__(
        self,
        connect: Callable[[float], Awaitable[Link]],
        forget: Callable[[], None],
        barrier: Barrier,
        shown: str,
    ) -> None:
        self._connect = connect
        self._forget = forget
        self._barrier = barrier
        self._shown = shown
        self._waiting: deque[_Waiting] = deque()
        self._link: Link | None = None
        self._task: asyncio.Task[None] | None = None

    async def submit(self, command: Command, deadline: float) -> Any:
        """Send a command, and return its answer after the barrier.

        Cancellation: Not yet sent, it is not sent any more; sent, it may be executed.
        """
        loop = asyncio.get_running_loop()
        one = _Waiting(command, deadline, loop.create_future())
        one.timer = loop.call_at(deadline, self._expire, one)
        self._waiting.append(one)
        if self._task is None:
            self._task = loop.create_task(self._run())
        try:
            return await one.future
        finally:
            one.timer.cancel()

    async def close(self) -> None:
        """Wait for what is under way, each to its own deadline at most, and close the connection."""
        while self._task is not None:
            await asyncio.wait([self._task])
        if self._link is not None:
            await self._link.close()
            self._link = None

    def _expire(self, one: _Waiting) -> None:
        one.give(self._lost("no answer in time") if one.sent else self._not_sent("no answer in time"))

    def _lost(self, why: str) -> UnknownOutcomeError:
        return UnknownOutcomeError(
            f"{self._shown}: the commit was sent, then: {why}; send the same op again", backend=self._shown
        )

    def _not_sent(self, why: str) -> UnavailableError:
        return UnavailableError(f"{self._shown}: {why}; nothing was written", backend=self._shown)

    async def _run(self) -> None:
        try:
            while self._waiting:
                group = self._next_group()
                if group:
                    await self._exchange(group)
        finally:
            self._task = None

    def _next_group(self) -> list[_Waiting]:
        group: list[_Waiting] = []
        size = 0
        while self._waiting and len(group) < MAX_GROUP_COMMITS and size < MAX_GROUP_BYTES:
            one = self._waiting.popleft()
            if not one.future.done():  # it may have been cancelled, or have expired
                group.append(one)
                size += one.command.size_bytes
        return group

    async def _exchange(self, group: list[_Waiting]) -> None:
        """Send a group and give each of its callers an answer; or put back what was surely not executed."""
        deadline = max(one.deadline for one in group)
        try:
            link = await self._ready_link(deadline)
        except HoldfastError as error:
            for one in group:
                one.give(type(error)(str(error), backend=self._shown))
            return
        except (UnreachableError, LinkLostError) as error:
            self._forget()
            for one in group:
                one.give(self._not_sent(str(error)))
            return
        group = [one for one in group if not one.future.done()]  # connecting may have taken its time
        if not group:
            return
        answers: list[Any] = []
        try:
            async with asyncio.timeout_at(deadline):
                lacking = await self._send(link, group, answers, deadline)
        except (LinkLostError, TimeoutError) as error:
            lacking = "no answer in time" if isinstance(error, TimeoutError) else "the connection was lost"
            await self._drop()
        except BaseException:
            await self._drop()  # cancelled with the loop: whoever still waits must not wait for ever
            for one in group:
                one.give(self._lost("this process is ending"))
            raise
        await self._settle(group, answers, lacking)

    async def _ready_link(self, deadline: float) -> Link:
        if self._link is not None and self._link.stale:
            await self._drop()
        if self._link is None:
            try:
                self._link = await self._connect(deadline)
            except Refusal as refused:
                if refused.code in LOOK_ANEW:
                    self._forget()
                raise refused.mapped(self._shown) from None
        return self._link

    async def _send(self, link: Link, group: list[_Waiting], answers: list[Any], deadline: float) -> str:
        """Exchange a group's commands for answers; return what the barrier lacks."""
        commands = []
        for one in group:
            one.sent = True
            commands.append(one.command.packed(in_full=not link.knows_script))
            link.knows_script = True
        left = deadline - asyncio.get_running_loop().time()
        # The server looks at its clock ten times a second: leave it time to say how many have confirmed.
        barrier = self._barrier.commands(max(1, int(1000 * max(left - 0.2, left / 2))))
        await link.send([*commands, *barrier])
        for _ in group:
            answers.append(await link.answer())  # noqa: PERF401  (those that came count when the link is lost)
        return self._barrier.lacking([await link.answer() for _ in barrier])

    async def _settle(self, group: list[_Waiting], answers: list[Any], lacking: str) -> None:
        again = []
        for one, answer in zip(group, answers, strict=False):
            if not isinstance(answer, Refusal):
                refused = isinstance(answer, list) and answer[0] > 1  # decided and not written: no barrier needed
                one.give(self._lost(lacking) if lacking and not refused else answer)
            elif answer.code == "NOSCRIPT" or (answer.code == "MOVED" and one.moves < _MAX_MOVES):
                one.moves += answer.code == "MOVED"
                one.sent = False
                again.append(one)
            else:
                one.give(answer.mapped(self._shown))
        for one in group[len(answers) :]:
            one.give(self._lost(lacking))
        codes = {answer.code for answer in answers if isinstance(answer, Refusal)}
        if codes & LOOK_ANEW:
            self._forget()
            await self._drop()
        elif "NOSCRIPT" in codes and self._link is not None:
            self._link.knows_script = False
        self._waiting.extendleft(reversed(again))

    async def _drop(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.close()
