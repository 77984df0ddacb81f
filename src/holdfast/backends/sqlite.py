"""SQLite: a file that the processes of one host may share; all commits that wait share one transaction and one flush.

The contract is here, over two threads: one writes, one reads. The work is in ``sqlite_rows.py`` (statements) and
``sqlite_file.py`` (settings, tables, what errors mean).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from ..contract import Guarantees, Head, Key, KeyPrefix, Op, Record
from ..errors import FailedError, HoldfastError, InvalidInputError, UnavailableError, UnknownOutcomeError
from .sql import MAX_GROUP, MAX_GROUP_BYTES, require_commit
from .sqlite_file import SqliteFile, Synchronous
from .sqlite_rows import Commit, SqliteRows

T = TypeVar("T")


class SqliteBackend:
    """Keeps rows in a SQLite file on a local disk.

    Args:
        path: The file; made (0600, its directories 0700) if it is missing.
        deadline_seconds: How long a commit may wait for another process's transaction, 0.05 to 60.
        synchronous: ``"full"`` survives a power cut; ``"normal"`` does not, and says so.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, deadline_seconds: float = 5.0, synchronous: Synchronous = "full"
    ) -> None:
        text = str(os.fspath(path))
        if not text or "\0" in text:
            raise InvalidInputError(f"{path!r:.200} is not a path: give the file of the store as text")
        if not 0.05 <= deadline_seconds <= 60:
            raise InvalidInputError(f"deadline_seconds is {deadline_seconds!r}: use 0.05 to 60")
        if synchronous not in ("full", "extra", "normal"):
            raise InvalidInputError(f"synchronous is {synchronous!r:.40}: use 'full', 'extra' or 'normal'")
        self._path = os.path.abspath(text)  # noqa: PTH100  (links stay as they are)
        self._name = f"sqlite:{self._path}"
        self._deadline_seconds = deadline_seconds
        self._synchronous = synchronous
        self._refusal: str | None = f"{self._name} is not open: open it first"
        self._writing_refusal: str | None = self._refusal
        self._writer: _Lane | None = None
        self._reader: _Lane | None = None
        self._pid = 0

    def __repr__(self) -> str:
        return f"SqliteBackend({self._path!r})"

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Open the file; see :meth:`holdfast.contract.Backend.open`.

        Raises:
            UnsafeSettingError: It lies on a network file system, or WAL cannot be had.
            CorruptedError: It is damaged, or another program's; nothing was changed.
            UnavailableError: It cannot be opened; the message names the remedy.
            NotFoundError: ``read_only``, and there is no store.

        Crash: Leaves what was there; opening again finishes.
        """
        if self._reader is not None:
            raise FailedError(f"{self._name} is open already: close it first", backend=self._name)
        self._reader = reader = _Lane(self._file(read_only), "reader")
        try:
            if read_only:
                guarantees = await reader.call(reader.open)
            else:
                self._writer = writer = _Lane(self._file(False), "writer")
                guarantees = await writer.call(writer.open)
                await reader.call(reader.connect)
        except BaseException:
            await asyncio.shield(self._end())
            raise
        self._pid = os.getpid()
        self._refusal = None
        self._writing_refusal = (
            f"{self._name} was opened read-only: nothing was written; open it for writing" if read_only else None
        )
        return guarantees

    def _file(self, read_only: bool) -> SqliteFile:
        return SqliteFile(
            self._path,
            deadline_seconds=self._deadline_seconds,
            synchronous=self._synchronous,
            read_only=read_only,
        )

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys``; see :meth:`holdfast.contract.Backend.read`."""
        reader = self._opened()
        wanted = list(keys)
        if not wanted:
            return {}
        return await reader.call(lambda: reader.rows.read(scope, wanted))

    async def commit(
        self,
        scope: str,
        changes: Mapping[Key, bytes | None],
        expect: Mapping[Key, int],
        *,
        op: Op,
    ) -> int:
        """Apply ``changes`` if ``expect`` holds; see :meth:`holdfast.contract.Backend.commit`.

        Raises:
            ConflictError: Some ``expect`` does not hold; nothing was changed.
            InvalidInputError: A key, payload, op or scope cannot be used; nothing was changed.
            UnavailableError: Nothing was written: the disk is full, or another process kept the file locked.
            UnknownOutcomeError: The flush failed; close, open, then send the same op again.
            FencedError: The file was deleted or replaced; stop.
            FailedError: Not open, or an earlier flush failed.

        Crash: Before the return, all of the changes or none; after it, all, as attested at open.
        Cancellation: The commit goes on, in its turn.
        """
        self._opened()
        if self._writing_refusal is not None or self._writer is None:
            raise FailedError(self._writing_refusal or self._name, backend=self._name)
        op = Op(*op)
        texts, size = require_commit(scope, changes, expect, op)
        return await self._writer.commit(Commit(scope, dict(changes), dict(expect), op, texts, size))

    async def head(self, scope: str) -> Head:
        """Return the scope's commit number and its writers' last ops."""
        reader = self._opened()
        return await reader.call(lambda: reader.rows.head(scope))

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """Yield the scope's keys under ``prefix`` in byte order, a page at a time."""
        last = Key("", "", "")
        while page := await self._page(scope, prefix, last):
            for last in page:
                yield last

    async def _page(self, scope: str, prefix: KeyPrefix, after: Key) -> list[Key]:
        reader = self._opened()
        return await reader.call(lambda: reader.rows.keys(scope, prefix, after))

    async def scopes(self) -> AsyncIterator[str]:
        """Yield the names of the scopes that have had a commit, in byte order."""
        reader = self._opened()
        for name in await reader.call(lambda: reader.rows.scopes()):
            yield name

    async def close(self) -> None:
        """Write what is queued, then close the file. Repeatable.

        Crash: As before the call: nothing acknowledged depends on close.
        """
        self._refusal = self._writing_refusal = f"{self._name} is not open: open it first"
        await asyncio.shield(self._end())

    async def _end(self) -> None:
        """Let both threads finish what is queued; the writer goes last, and so empties the log."""
        for name in ("_reader", "_writer"):
            thread: _Lane | None = getattr(self, name)
            if thread is not None:
                await thread.end()
                setattr(self, name, None)

    def _opened(self) -> _Lane:
        if self._refusal is not None or self._reader is None:
            raise FailedError(self._refusal or self._name, backend=self._name)
        if self._pid != os.getpid():  # SQLite's connections and our threads do not survive a fork
            raise FailedError(f"{self._name} was opened by the parent process: open it in this one", backend=self._name)
        return self._reader


class _Call:
    """Something that waits for its turn on a thread."""

    __slots__ = ("error", "future", "loop", "result", "work")

    def __init__(self, work: Commit | Callable[[], Any]) -> None:
        self.work = work
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.result: Any = None
        self.error: BaseException | None = None


class _Lane:
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

    async def commit(self, commit: Commit) -> int:
        """Apply a commit, together with all that wait at that moment, and return its number."""
        call = _Call(commit)
        self._pending.append(call)
        if len(self._pending) == 1:
            # Handed over after whatever else is about to run now: tasks that were woken together commit together.
            call.loop.call_soon(self._hand_over)
        number: int = await call.future
        return number

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
        while following is not None and isinstance(following.work, Commit):
            size += following.work.size
            if calls and (size > MAX_GROUP_BYTES or len(calls) == MAX_GROUP):
                break
            calls.append(following)
            commits.append(following.work)
            try:
                following = self._queue.get_nowait()
            except queue.Empty:
                following = first  # stands for: nothing is waiting
                break
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
