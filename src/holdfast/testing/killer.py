"""Storage on which the process ends itself with SIGKILL at its n-th step: a file-system call, or a side of a call."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import AsyncIterator, Mapping, Sequence

from ..backends.disk import Disk
from ..contract import Backend, Guarantees, Head, Key, KeyPrefix, Op, Record
from ..wrappers.around import Around
from .faults import WrappedDisk

CHANGING = frozenset(("write", "truncate", "fdatasync", "fsync", "mkdir", "rename", "unlink", "rmdir", "open_file"))
"""The calls that are numbered: between any two others nothing on the disk changes."""


class Countdown:
    """Counts steps, and ends the process at number ``kill_at`` (1 is the first; 0: never).

    Crash: At once and for good: nothing is cleaned up, buffers are not flushed, no handler runs.
    """

    def __init__(self, kill_at: int) -> None:
        self.kill_at = kill_at
        self.steps = 0
        self._lock = threading.Lock()

    def arm(self, step: int) -> None:
        """Die at the ``step``-th step from now on."""
        with self._lock:
            self.kill_at = self.steps + step

    def step(self) -> None:
        """Die if it is time."""
        with self._lock:
            self.steps += 1
            if self.steps == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


class KillerDisk(WrappedDisk):
    """A disk whose steps are the calls that change something: the process dies before one of them.

    Args:
        disk: Where the calls go.
        kill_at: Die before this one; 0 for never.
    """

    def __init__(self, disk: Disk, kill_at: int) -> None:
        super().__init__(disk)
        self.countdown = Countdown(kill_at)

    def before(self, call: str) -> None:
        """Die if it is time."""
        if call in CHANGING:
            self.countdown.step()


class KillerBackend(Around):
    """A backend with two steps to each call: before it is sent, and after its answer came.

    Args:
        backend: Where the calls go; its own file or server is beyond our counting.
        kill_at: Die at this step; 0 for never.
    """

    def __init__(self, backend: Backend, kill_at: int) -> None:
        super().__init__(backend)
        self.countdown = Countdown(kill_at)

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Open, and die before or after it if it is time."""
        self.countdown.step()
        found = await super().open(read_only=read_only)
        self.countdown.step()
        return found

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Read, and die before or after it if it is time."""
        self.countdown.step()
        found = await super().read(scope, keys)
        self.countdown.step()
        return found

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        """Commit, and die before it or between the answer and its being known if it is time.

        Crash: As what is wrapped.
        """
        self.countdown.step()
        number = await super().commit(scope, changes, expect, op=op)
        self.countdown.step()
        return number

    async def head(self, scope: str) -> Head:
        """Ask for the head, and die before or after it if it is time."""
        self.countdown.step()
        found = await super().head(scope)
        self.countdown.step()
        return found

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """Yield keys, and die before the first or after the last if it is time."""
        self.countdown.step()
        async for key in super().keys(scope, prefix):
            yield key
        self.countdown.step()

    async def scopes(self) -> AsyncIterator[str]:
        """Yield scopes, and die before the first or after the last if it is time."""
        self.countdown.step()
        async for scope in super().scopes():
            yield scope
        self.countdown.step()

    async def close(self) -> None:
        """Close, and die before or after it if it is time."""
        self.countdown.step()
        await super().close()
        self.countdown.step()
