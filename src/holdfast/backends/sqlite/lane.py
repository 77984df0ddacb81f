"""A thread with a SQLite connection of its own, and how an event loop waits for what is done there.

Invariants:

* What is asked is done in turn; commits that wait at the same moment share one transaction.
* After a flush has failed no commit is tried again on that connection.
* Every call is answered, also when the thread comes upon a defect.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ...contract import Guarantees
from ...errors import FailedError, HoldfastError, InvalidInputError, UnavailableError, UnknownOutcomeError
from ..sql import MAX_GROUP, MAX_GROUP_BYTES
from .file import SqliteFile
from .rows import Commit, SqliteRows

T = TypeVar("T")


class _Call:
    """Something that waits for its turn on a thread."""

    __slots__ = ("error", "future", "loop", "result", "work")

    def __init__(self, work: Commit | Callable[[], Any]) -> None:
        self.work = work
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.result: Any = None
        self.error: BaseException | None = None


class Lane:
    """A thread with a connection of its own. What is asked of it is done in turn; commits that wait go together.

    Args:
        file: The file; used on the thread only.
        role: Part of the thread's name.
    """

    rows: SqliteRows

    def __init__(self, file: SqliteFile, role: str) -> None:
        self._file = file
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._pending: list[_Call] = []
        self._failed = ""
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=f"holdfast-sqlite-{role}", daemon=True)
        self._thread.start()

    async def call(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns on the thread."""
        call = _Call(work)
        self._queue.put(call)
        result: T = await call.future
        return result

    def commit(self, commit: Commit) -> asyncio.Future[int]:
        """Apply a commit, together with all that wait at that moment; its number is what the future comes to."""
        call = _Call(commit)
        pending = self._pending
        pending.append(call)
        if len(pending) == 1:
            # Handed over after whatever else is about to run now: tasks that were woken together commit together.
            call.loop.call_soon(self._hand_over)
        return call.future

    def _hand_over(self) -> None:
        pending, self._pending = self._pending, []
        for call in pending:
            self._queue.put(call)

    async def end(self) -> None:
        """Do what is queued, close the connection and end the thread. Repeatable."""
        self._hand_over()
        self._queue.put(None)
        await asyncio.wrap_future(self._ended)
        self._thread.join()

    # On the thread

    def open(self) -> Guarantees:
        """Open the file and attest."""
        guarantees = self._file.open()
        self.rows = SqliteRows(self._file)
        return guarantees

    def connect(self) -> None:
        """Connect to the file that another lane has opened."""
        self._file.connect()
        self.rows = SqliteRows(self._file)

    def _run(self) -> None:
        try:
            call = self._queue.get()
            while call is not None:
                if isinstance(call.work, Commit):
                    call = self._commit_all_from(call)
                else:
                    self._answer(call, call.work)
                    _wake([call])
                    call = self._queue.get()
        finally:
            self._file.close()
            self._ended.set_result(None)

    def _answer(self, call: _Call, work: Callable[[], Any]) -> None:
        try:
            call.result = work()
        except BaseException as error:
            call.error = error

    def _commit_all_from(self, first: _Call) -> _Call | None:
        """Apply ``first`` and the commits behind it in one transaction; return what is next in the queue."""
        calls: list[_Call] = []
        commits: list[Commit] = []
        size = 0
        following: _Call | None = first
        next_call, is_empty = self._queue.get, self._queue.empty  # only this thread takes from it
        while following is not None and type(work := following.work) is Commit:
            size += work.size
            if calls and (size > MAX_GROUP_BYTES or len(calls) == MAX_GROUP):
                break
            calls.append(following)
            commits.append(work)
            if is_empty():
                following = first  # stands for: nothing is waiting
                break
            following = next_call()
        self._apply(commits)
        for call, commit in zip(calls, commits, strict=True):
            call.result, call.error = commit.number, commit.outcome
        _wake(calls)
        return self._queue.get() if following is first else following

    def _apply(self, commits: list[Commit]) -> None:
        if self._failed:
            for commit in commits:
                commit.outcome = FailedError(self._failed, backend=self._file.name)
            return
        try:
            self.rows.apply(commits)
        except UnknownOutcomeError as error:
            self._failed = f"an earlier commit failed: {error}"
            _fail(commits, error)
        except InvalidInputError as error:
            if len(commits) == 1:
                _fail(commits, error)
            else:  # one of them is to blame, and the others must not suffer
                for commit in commits:
                    commit.outcome = None
                    self._apply([commit])
        except HoldfastError as error:
            _fail(commits, error)
        except Exception as error:  # a defect, or no memory: nothing was committed, and nobody may wait for ever
            _fail(commits, UnavailableError(f"{self._file.name}: nothing was written: {error!r}"))


def _fail(commits: list[Commit], error: HoldfastError) -> None:
    for commit in commits:
        told = type(error)(str(error), backend=error.backend)  # one for each, since each gets a traceback of its own
        told.__cause__ = error.__cause__
        commit.outcome = told


def _wake(calls: list[_Call]) -> None:
    loops = {call.loop for call in calls}
    for loop in loops:
        mine = calls if len(loops) == 1 else [call for call in calls if call.loop is loop]
        with contextlib.suppress(RuntimeError):  # that loop is closed, so nobody waits there
            loop.call_soon_threadsafe(_deliver, mine)


def _deliver(calls: list[_Call]) -> None:
    for call in calls:
        if not call.future.done():
            if call.error is None:
                call.future.set_result(call.result)
            else:
                call.future.set_exception(call.error)
