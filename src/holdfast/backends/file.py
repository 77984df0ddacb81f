"""The default backend: a directory that one process owns, whose every commit is one flush, shared by all that wait.

The contract is here; the work is in ``committer.py`` (the writer thread), ``journal.py`` over ``log.py`` (the log
and its format), ``views.py`` (the readable copies), ``directory.py`` (lock and layout) and ``disk.py`` (the seam).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from ..contract import Guarantees, Head, Key, KeyPrefix, Op, Record
from ..errors import FailedError, InvalidInputError
from .committer import Committer
from .disk import Disk, OsDisk


class FileBackend:
    """Keeps rows in a directory that one process owns at a time.

    Args:
        path: The directory; made (0700, with its parents) if it is missing.
        disk: The file-system calls; another one only for tests.
        view_delay_seconds: How long a readable copy may wait for further changes, 0 to 1.
        checkpoint_bytes: The log is replaced by a fresh one when it is larger than this and than twice its rows.
        flat_domain: The domain whose entities lie directly under the directory.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        disk: Disk = OsDisk(),
        view_delay_seconds: float = 0.5,
        checkpoint_bytes: int = 16 * 1024 * 1024,
        flat_domain: str = "entity",
    ) -> None:
        text = str(path)
        if not text or "\0" in text:
            raise InvalidInputError(f"{path!r:.200} is not a path: give the directory of the store")
        if not 0 <= view_delay_seconds <= 1:
            raise InvalidInputError(f"view_delay_seconds is {view_delay_seconds!r}: use 0 to 1")
        if checkpoint_bytes < 1:
            raise InvalidInputError(f"checkpoint_bytes is {checkpoint_bytes!r}: use at least 1")
        self._path = str(Path.cwd() / os.path.normpath(text))  # made absolute once: the process may change directory
        self._disk = disk
        self._view_delay_seconds = view_delay_seconds
        self._checkpoint_bytes = checkpoint_bytes
        self._flat_domain = flat_domain
        self._committer: Committer | None = None
        self._suspect = False

    def __repr__(self) -> str:
        return f"FileBackend({self._path!r})"

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Open the directory; see :meth:`holdfast.contract.Backend.open`.

        Args:
            read_only: Take no lock and change nothing. Shows what is stored at this moment, not what comes later.

        Raises:
            HeldError: Another process, or another backend of this one, has it open.
            UnsafeSettingError: It lies on a network file system, or a link stands where a file of ours belongs.
            CorruptedError: The log is damaged, foreign, newer, or missing beside rows; nothing was deleted.
            UnavailableError: A file-system call failed; the message names the remedy.
            NotFoundError: ``read_only``, and there is no store.

        Crash: Leaves what was there; opening again finishes.
        """
        last = self._committer
        if last is not None:
            if last.stopping:
                await asyncio.shield(asyncio.wrap_future(last.closed))
            if not last.closed.done():
                raise FailedError(f"{last.name} is open already: close it first", backend=last.name)
            self._suspect = self._suspect or last.suspect
        committer = self._committer = Committer(
            self._path,
            self._disk,
            view_delay_seconds=self._view_delay_seconds,
            checkpoint_bytes=self._checkpoint_bytes,
            flat_domain=self._flat_domain,
            read_only=read_only,
            rewrite=self._suspect,
        )
        committer.start()
        try:
            guarantees = await asyncio.shield(asyncio.wrap_future(committer.opened))
        except asyncio.CancelledError:
            committer.stop()  # its thread finishes opening, then closes
            raise
        except BaseException:
            committer.join()
            raise
        if not read_only:
            self._suspect = False
        return guarantees

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys``; see :meth:`holdfast.contract.Backend.read`. Never waits.

        Raises:
            CorruptedError: The stored bytes of a key do not match their checksum; ``error.key`` names it.
        """
        return self._opened().read(scope, keys)

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
            UnavailableError: Nothing was written (the disk is full, say); the next commit may succeed.
            UnknownOutcomeError: The disk failed; close, open, then send the same op again.
            FencedError: The lock file was deleted or replaced; stop.
            FailedError: Not open, or an earlier commit failed part-way.

        Crash: Before the return, all of the changes or none; after it, all, as attested at open.
        Cancellation: The commit goes on, in its turn.
        """
        queued = self._opened().submit(asyncio.get_running_loop(), scope, changes, expect, op)
        return queued if isinstance(queued, int) else await queued

    async def head(self, scope: str) -> Head:
        """Return the scope's durable commit number and its writers' last ops."""
        return self._opened().head(scope)

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """Yield the keys under ``prefix`` as of the first step, in byte order."""
        for key in self._opened().keys(scope, prefix):
            yield key

    async def scopes(self) -> AsyncIterator[str]:
        """Yield the names of the scopes that have had a commit, in byte order."""
        for name in self._opened().scopes():
            yield name

    async def close(self) -> None:
        """Write what is queued, bring the views up to date, seal the log and let go of the lock. Repeatable.

        Crash: As before the call: nothing acknowledged depends on close.
        """
        committer = self._committer
        if committer is None:
            return
        if not committer.closed.done():
            committer.stop()
            await asyncio.shield(asyncio.wrap_future(committer.closed))
        committer.join()

    def _opened(self) -> Committer:
        if self._committer is None:
            raise FailedError(f"file:{self._path} is not open: open it first", backend=f"file:{self._path}")
        return self._committer
