"""SQLite: a file that the processes of one host may share; all commits that wait share one transaction and one flush.

The contract is here, over two threads (``lane.py``): one writes, one reads. The work is in ``rows.py`` (statements)
and ``file.py`` (settings, tables, what errors mean).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence

from ...contract import Guarantees, Head, Key, KeyPrefix, Op, Record
from ...errors import FailedError, InvalidInputError
from ..sql import Doorman
from .file import SqliteFile, Synchronous
from .lane import Lane
from .rows import Commit


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
        self._doorman = Doorman()
        self._deadline_seconds = deadline_seconds
        self._synchronous = synchronous
        self._refusal: str | None = f"{self._name} is not open: open it first"
        self._writing_refusal: str | None = self._refusal
        self._writer: Lane | None = None
        self._reader: Lane | None = None
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
        self._reader = reader = Lane(self._file(read_only), "reader")
        try:
            if read_only:
                guarantees = await reader.call(reader.open)
            else:
                self._writer = writer = Lane(self._file(False), "writer")
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
        if type(op) is not Op:
            op = Op(*op)
        texts, size = self._doorman.admit(scope, changes, expect, op)
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
            thread: Lane | None = getattr(self, name)
            if thread is not None:
                await thread.end()
                setattr(self, name, None)

    def _opened(self) -> Lane:
        if self._refusal is not None or self._reader is None:
            raise FailedError(self._refusal or self._name, backend=self._name)
        if self._pid != os.getpid():  # SQLite's connections and our threads do not survive a fork
            raise FailedError(f"{self._name} was opened by the parent process: open it in this one", backend=self._name)
        return self._reader
