"""One scope: what is known of its object, and the queue of commits that change it.

Invariants:

* One write of a scope is under way at a time; commits that wait meanwhile go into the next one together.
* What refuses a commit, or answers a repeated one, was read after that commit was asked for, or was confirmed by the
  write that went along with it. What is remembered only ever serves to guess what a write will meet.
* "Nothing was written" is said only of a commit that was in no write, or whose write was refused; never of an op
  whose earlier write may still arrive. A late one meets another ETag and is refused.
* A scope's number, as this process knows it, is never followed by a lower one, and no op that it was told of is
  missing later: an object that was deleted or put back to an older version is found out and refused.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping

from ...contract import MAX_WRITERS, Key, Op
from ...errors import (
    ConflictError,
    FailedError,
    HoldfastError,
    InvalidInputError,
    UnavailableError,
    UnknownOutcomeError,
)
from ..waiting import copy_of
from . import document
from .document import NOTHING, Draft, Snapshot
from .service import Answer, Kind, Service

MAX_GROUP_COMMITS = 512
MAX_GROUP_BYTES = 16 * 1024 * 1024
_FIRST_PAUSE_SECONDS = 0.002
_LONGEST_PAUSE_SECONDS = 0.1
_MOST_CONFUSED = 8
"""How often in a row the service may fail before a caller is told."""


class _Waiting:
    """One call of ``commit``."""

    __slots__ = ("changes", "deadline", "expect", "future", "op", "sent", "size")

    def __init__(self, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], op: Op, deadline: float) -> None:
        self.changes = dict(changes)
        self.expect = dict(expect)
        self.op = op
        self.deadline = deadline
        self.size = sum(len(payload) for payload in changes.values() if payload is not None)
        self.sent = False
        """It is in a write that is under way."""
        self.future: asyncio.Future[int] = asyncio.get_running_loop().create_future()


_Verdict = int | HoldfastError


class Lane:
    """One scope of one opened backend."""

    def __init__(self, name: str, service: Service, deadline_seconds: float) -> None:
        self._name = name
        self._path = f"{name}.json"
        self._service = service
        self._shown = service.shown
        self._deadline_seconds = deadline_seconds
        self._seen: Snapshot | None = None
        """The newest that is known; the object may be newer."""
        self._doubtful = True
        """A write's outcome is not known, or nothing was read yet: read before writing."""
        self._floor = 0
        """The highest commit number that was acknowledged to this process or read by it."""
        self._told: dict[str, tuple[int, int]] = {}
        """Each writer's last op that was acknowledged here, as (n, number)."""
        self._in_doubt: dict[str, int] = {}
        """Each writer's op whose outcome is not known."""
        self._confused = 0
        self._queue: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None
        self._fetching: asyncio.Task[Snapshot] | None = None
        self._next_fetch: asyncio.Task[Snapshot] | None = None

    # -- reading ---------------------------------------------------------------------------------------------------

    async def current(self) -> Snapshot:
        """Return what the object holds at some moment after this call; calls that wait share one request.

        Raises:
            UnavailableError: No answer.
            FailedError: The object was deleted, or put back to an older version.
            CorruptedError: It is damaged, or another's.
        """
        if self._next_fetch is None:
            self._next_fetch = asyncio.ensure_future(self._fetch_after(self._fetching))
        fetch = self._next_fetch
        try:
            async with asyncio.timeout(self._deadline_seconds):
                return await asyncio.shield(fetch)
        except TimeoutError:
            why = f"{self._shown} did not answer in time; nothing was read and nothing was written"
            raise UnavailableError(why, backend=self._shown) from None
        except HoldfastError as error:
            raise copy_of(error) from None

    async def _fetch_after(self, earlier: asyncio.Task[Snapshot] | None) -> Snapshot:
        if earlier is not None:
            await asyncio.wait({earlier})
        # Whoever asks from here on needs a request that begins later than this one.
        self._fetching, self._next_fetch = self._next_fetch, None
        if self._fetching is not None:
            self._fetching.add_done_callback(_retrieved)
        return await self._fetch()

    async def _fetch(self) -> Snapshot:
        known, floor = self._seen, self._floor
        deadline = asyncio.get_running_loop().time() + self._deadline_seconds
        answer = await self._service.get(self._path, etag=known.etag if known else "", deadline=deadline)
        match answer.kind:
            case Kind.SAME if known is not None and known.etag:
                found = known
            case Kind.DONE:
                found = document.read(self._name, answer.etag, answer.body, self._shown)
            case Kind.ABSENT:
                found = NOTHING
            case Kind.REFUSED:
                raise self._service.mapped(answer)
            case _:
                raise UnavailableError(
                    f"{self._shown} {answer.why}; nothing was read and nothing was written", backend=self._shown
                )
        self._require_no_less(found, floor)
        if self._seen is None or found.number >= self._seen.number:
            self._seen = found
            self._floor = max(self._floor, found.number)
        return found

    def _require_no_less(self, found: Snapshot, floor: int) -> None:
        """Refuse an object that lacks what was acknowledged before it was asked for."""
        if found.number < floor:
            raise self._taken_back(f"stands at commit {found.number}, though commit {floor} was acknowledged")
        if found is self._seen:
            return
        writers = found.scope.writers
        for writer, (n, number) in self._told.items():
            last = writers.get(writer)
            lacks = last.n < n if last is not None else len(writers) < MAX_WRITERS
            if lacks and number <= floor:
                raise self._taken_back(f"stands at commit {found.number} without commit {number}")

    def _taken_back(self, how: str) -> FailedError:
        return FailedError(
            f"{self._shown}: scope {self._name} {how}: its object was deleted, or put back to an older version; "
            "stop, look into it, then open again",
            backend=self._shown,
        )

    # -- writing ---------------------------------------------------------------------------------------------------

    async def commit(self, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], op: Op) -> int:
        """Apply a commit, together with all that wait at that moment, and return its number.

        Cancellation: In a write that is under way, it may be applied.
        """
        loop = asyncio.get_running_loop()
        one = _Waiting(changes, expect, op, loop.time() + self._deadline_seconds)
        self._queue.append(one)
        if self._task is None:
            self._task = loop.create_task(self._serve())
        timer = loop.call_at(one.deadline, self._expire, one)
        try:
            return await one.future
        except asyncio.CancelledError:
            if one.sent:
                self._in_doubt[op.writer] = op.n
            raise
        finally:
            timer.cancel()

    async def idle(self) -> None:
        """Wait until nothing is under way."""
        while tasks := {task for task in (self._task, self._fetching, self._next_fetch) if task and not task.done()}:
            await asyncio.wait(tasks)

    def _expire(self, one: _Waiting) -> None:
        why = f"{self._shown} did not answer within {self._deadline_seconds:g} s"
        self._tell(one, self._lost(why) if one.sent else self._unwritten(why))

    async def _serve(self) -> None:
        try:
            while self._queue:
                await self._settle(self._take())
        finally:
            self._task = None

    def _take(self) -> list[_Waiting]:
        """Take from the queue what goes into one write."""
        size, count = 0, 0
        for one in self._queue[:MAX_GROUP_COMMITS]:
            size += one.size
            if count and size > MAX_GROUP_BYTES:
                break
            count += 1
        group, self._queue = self._queue[:count], self._queue[count:]
        return group

    async def _settle(self, group: list[_Waiting]) -> None:
        """Bring a group's commits to their end, whatever else is written to the object meanwhile."""
        pause = _FIRST_PAUSE_SECONDS
        fresh = False
        try:
            while True:
                if self._doubtful or self._seen is None:
                    await self.current()
                    self._doubtful, fresh = False, True
                # Only here, with nothing awaited from here to the write: whoever was told meanwhile that nothing was
                # written must not be written.
                group = [one for one in group if not one.future.done()]
                if not group:
                    return
                draft = Draft(self._name, self._seen or NOTHING)
                verdicts, granted = _judged(draft, group)
                if not granted and not fresh:
                    self._doubtful = True  # refusals need a look at what is there now
                elif not granted or await self._write(draft, granted):
                    for one, verdict in zip(group, verdicts, strict=True):
                        self._tell(one, verdict)
                    return
                else:
                    # Another process was faster. At once again, then with pauses that part the two.
                    fresh = False
                    await asyncio.sleep(random.uniform(0, pause) if pause > _FIRST_PAUSE_SECONDS else 0)
                    pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        except HoldfastError as error:
            for one in group:
                self._tell(one, copy_of(error))
        except Exception as error:  # a defect of ours: nobody may wait for ever
            self._doubtful = True
            for one in group:
                self._tell(one, self._lost(f"{self._shown}: {type(error).__name__}"))
            raise

    async def _write(self, draft: Draft, granted: list[_Waiting]) -> bool:
        """Replace the object, if it is still as it was seen; False if it is not.

        Raises:
            HoldfastError: For those that were not granted; the granted ones were told.
        """
        assert self._seen is not None
        deadline = max(one.deadline for one in granted)
        body = draft.body()
        for one in granted:
            one.sent = True
        answer = await self._service.put(self._path, body, etag=self._seen.etag, deadline=deadline)
        self._confused = self._confused + 1 if answer.kind is Kind.CONFUSED else 0
        if answer.kind is Kind.DONE:
            written = draft.snapshot(answer.etag)
            self._doubtful = not answer.etag
            self._seen = written
            self._floor = max(self._floor, written.number)
            return True
        self._doubtful = True
        if answer.kind in (Kind.LOST, Kind.ABSENT, Kind.CONFUSED) and self._confused < _MOST_CONFUSED:
            for one in granted:
                one.sent = False
                if answer.kind is Kind.CONFUSED:  # safe to try again: the next look tells, and a late one is refused
                    self._in_doubt[one.op.writer] = one.op.n
            return False
        for one in granted:
            self._tell(one, self._refusal(answer))
        raise self._unwritten(f"{self._shown} {answer.why}")

    def _refusal(self, answer: Answer) -> HoldfastError:
        why = f"{self._shown} {answer.why}"
        match answer.kind:
            case Kind.REFUSED:
                return self._service.mapped(answer)
            case Kind.NOT_SENT:
                return self._unwritten(why)
            case _:
                return self._lost(why)

    def _tell(self, one: _Waiting, verdict: _Verdict) -> None:
        """Tell a caller; "nothing was written" is not said of an op whose earlier write may still arrive."""
        writer, n = one.op
        if isinstance(verdict, int):
            self._in_doubt.pop(writer, None)
            self._told.pop(writer, None)
            self._told[writer] = (n, verdict)
            if len(self._told) > MAX_WRITERS:
                del self._told[next(iter(self._told))]
        elif isinstance(verdict, UnknownOutcomeError):
            self._in_doubt[writer] = n
        elif isinstance(verdict, ConflictError | InvalidInputError):
            self._in_doubt.pop(writer, None)
        elif isinstance(verdict, UnavailableError) and self._in_doubt.get(writer) == n:
            verdict = self._lost(f"{verdict} by this call, but an earlier one may have done it")
        if one.future.done():
            return
        if isinstance(verdict, int):
            one.future.set_result(verdict)
        else:
            one.future.set_exception(verdict)

    def _unwritten(self, why: str) -> UnavailableError:
        return UnavailableError(f"{why}; nothing was written", backend=self._shown)

    def _lost(self, why: str) -> UnknownOutcomeError:
        return UnknownOutcomeError(f"{why}; send the same op again", backend=self._shown)


def _judged(draft: Draft, group: list[_Waiting]) -> tuple[list[_Verdict], list[_Waiting]]:
    """Apply a group to a draft; return what each is to be told, and which of them have to be written."""
    verdicts: list[_Verdict] = []
    granted: list[_Waiting] = []
    for one in group:
        try:
            number, repeated = draft.add(one.changes, one.expect, one.op)
        except HoldfastError as error:
            verdicts.append(error)
            continue
        verdicts.append(number)
        if not repeated:
            granted.append(one)
    return verdicts, granted


def _retrieved(task: asyncio.Task[Snapshot]) -> None:
    """Look at a fetch's outcome, lest one that nobody waits for any more is called forgotten."""
    if not task.cancelled():
        task.exception()
