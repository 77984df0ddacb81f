"""Storage that fails when told to: the n-th call of a kind, on a disk or on a backend."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Literal, NamedTuple

from ..backends.disk import Disk, Entry, Mode
from ..contract import Backend, Guarantees, Head, Key, KeyPrefix, Op, Record
from ..errors import FailedError, UnavailableError, UnknownOutcomeError
from ..wrappers.around import Around

_NEVER_FAIL = frozenset(("close", "filesystem"))
ERRNOS = (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EACCES, errno.EROFS)
"""What a disk says when it is full, broken, out of descriptors, closed to us, or read-only."""


class WrappedDisk:
    """A disk that passes every call on, after :meth:`before`; implements :class:`holdfast.backends.disk.Disk`.

    Subclass it, and raise ``OSError`` (or end the process) in :meth:`before`.
    """

    def __init__(self, disk: Disk) -> None:
        self.disk = disk

    def before(self, call: str) -> None:
        """Do something before the call of this name."""

    def open_base(self, path: str) -> int:
        self.before("open_base")
        return self.disk.open_base(path)

    def open_directory(self, name: str, *, at: int) -> int:
        self.before("open_directory")
        return self.disk.open_directory(name, at=at)

    def open_file(self, name: str, mode: Mode, *, at: int) -> int:
        self.before("open_file")
        return self.disk.open_file(name, mode, at=at)

    def close(self, fd: int) -> None:
        self.before("close")
        self.disk.close(fd)

    def read(self, fd: int) -> bytes:
        self.before("read")
        return self.disk.read(fd)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self.before("write")
        return self.disk.write(fd, data)

    def truncate(self, fd: int, size: int) -> None:
        self.before("truncate")
        self.disk.truncate(fd, size)

    def fdatasync(self, fd: int) -> None:
        self.before("fdatasync")
        self.disk.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        self.before("fsync")
        self.disk.fsync(fd)

    def mkdir(self, name: str, *, at: int) -> None:
        self.before("mkdir")
        self.disk.mkdir(name, at=at)

    def rename(self, old: str, new: str, *, at: int) -> None:
        self.before("rename")
        self.disk.rename(old, new, at=at)

    def unlink(self, name: str, *, at: int) -> None:
        self.before("unlink")
        self.disk.unlink(name, at=at)

    def rmdir(self, name: str, *, at: int) -> None:
        self.before("rmdir")
        self.disk.rmdir(name, at=at)

    def listdir(self, fd: int) -> list[str]:
        self.before("listdir")
        return self.disk.listdir(fd)

    def stat(self, name: str, *, at: int) -> Entry:
        self.before("stat")
        return self.disk.stat(name, at=at)

    def fstat(self, fd: int) -> Entry:
        self.before("fstat")
        return self.disk.fstat(fd)

    def lock(self, fd: int) -> bool:
        self.before("lock")
        return self.disk.lock(fd)

    def filesystem(self, fd: int) -> str:
        self.before("filesystem")
        return self.disk.filesystem(fd)


class FaultyDisk(WrappedDisk):
    """A disk whose calls can be made to fail.

    Args:
        disk: The disk behind it.
        at: The number of the first call that fails, 1 being the first of its kind; 0 for none.
        kind: Name of the calls that are counted, such as ``"fdatasync"``; empty counts all.
        error: The errno; or ``"short"``: a write takes only half of its bytes, once, and the next one fails
            with ENOSPC.
        lasting: Every later call of the kind fails too, until :meth:`heal`.
    """

    def __init__(
        self,
        disk: Disk,
        *,
        at: int = 0,
        kind: str = "",
        error: int | Literal["short"] = errno.EIO,
        lasting: bool = False,
    ) -> None:
        super().__init__(disk)
        self.at = at
        self.kind = kind
        self.error = error
        self.lasting = lasting
        self.calls = 0
        self.hits = 0
        self.names: Counter[str] = Counter()
        self._lock = threading.Lock()

    def heal(self) -> None:
        """Let no further call fail."""
        self.at = 0

    def before(self, call: str) -> None:
        """Count the call; fail it if it is its turn. Closing always works: it frees the descriptor whatever it says."""
        with self._lock:
            self.names[call] += 1
            if (self.kind and call != self.kind) or call in _NEVER_FAIL:
                return
            self.calls += 1
            due = self.at and (self.calls == self.at or (self.lasting and self.calls > self.at))
            if not due or (self.error == "short" and call != "write"):
                return
            self.hits += 1
        if self.error != "short":
            raise OSError(self.error, os.strerror(self.error))

    def write(self, fd: int, data: bytes | memoryview) -> int:
        hits = self.hits
        self.before("write")
        if self.hits > hits and len(data) > 1:
            self.at, self.error, self.kind, self.lasting = 1, errno.ENOSPC, "write", False
            self.calls = 0
            return self.disk.write(fd, data[: len(data) // 2])
        return self.disk.write(fd, data)


FaultKind = Literal["unavailable", "unknown_applied", "unknown_lost", "die_before", "die_after", "delay"]


class Fault(NamedTuple):
    """What happens to one call of a :class:`FaultyBackend`."""

    at: int
    """Number of the call, 1 being the first of its kind."""
    kind: FaultKind
    call: Literal["open", "read", "commit", "head", "keys", "any"] = "commit"


class FaultyBackend(Around):
    """A backend whose calls can be refused, lose their answer, wait, or be the last.

    ``unavailable``: nothing is written, ``UnavailableError``. ``unknown_applied`` and ``unknown_lost``: the
    answer is lost, with the commit applied or not. ``die_before`` and ``die_after``: from this call on everything
    raises ``FailedError``, with the commit lost or applied. ``delay``: the call waits until :attr:`go_on` is set;
    :attr:`waiting` is set as soon as it does.

    Args:
        backend: The backend behind it.
        faults: What happens when.
    """

    def __init__(self, backend: Backend, *faults: Fault) -> None:
        super().__init__(backend)
        self.faults = list(faults)
        self.calls: Counter[str] = Counter()
        self.hits = 0
        self.dead = False
        self.waiting = asyncio.Event()
        self.go_on = asyncio.Event()

    async def _before(self, call: str) -> FaultKind | None:
        if self.dead:
            raise FailedError("the backend died as it was told to: open it again")
        self.calls[call] += 1
        self.calls["any"] += 1
        fault = next((f for f in self.faults if f.call in (call, "any") and f.at == self.calls[f.call]), None)
        if fault is None:
            return None
        self.hits += 1
        match fault.kind:
            case "delay":
                self.waiting.set()
                await self.go_on.wait()
            case "unavailable":
                raise UnavailableError(f"{call} {fault.at} was told to fail: try again")
            case "unknown_lost":
                raise UnknownOutcomeError(f"the answer to {call} {fault.at} was lost: send the same op again")
            case "die_before":
                self.dead = True
                raise FailedError(f"the backend died before {call} {fault.at}: open it again")
            case "die_after" if call != "commit":
                self.dead = True
                raise FailedError(f"the backend died at {call} {fault.at}: open it again")
        return fault.kind

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Open the backend, unless told otherwise."""
        await self._before("open")
        return await super().open(read_only=read_only)

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Read, unless told otherwise."""
        await self._before("read")
        return await super().read(scope, keys)

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        """Commit, unless told otherwise."""
        fault = await self._before("commit")
        number = await super().commit(scope, changes, expect, op=op)
        if fault == "unknown_applied":
            raise UnknownOutcomeError("the answer was lost: send the same op again")
        if fault == "die_after":
            self.dead = True
            raise FailedError("the backend died after a commit: open it again")
        return number

    async def head(self, scope: str) -> Head:
        """Ask the backend, unless told otherwise."""
        await self._before("head")
        return await super().head(scope)

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """List, unless told otherwise."""
        await self._before("keys")
        async for key in super().keys(scope, prefix):
            yield key

    async def scopes(self) -> AsyncIterator[str]:
        """List, unless told otherwise."""
        await self._before("keys")
        async for scope in super().scopes():
            yield scope
