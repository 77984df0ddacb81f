"""A disk on which the process ends itself with SIGKILL before its n-th file-system call."""

from __future__ import annotations

import os
import signal
import threading

from ..backends.disk import Disk
from .faults import WrappedDisk

CHANGING = frozenset(("write", "truncate", "fdatasync", "fsync", "mkdir", "rename", "unlink", "rmdir", "open_file"))
"""The calls that are numbered: between any two others nothing on the disk changes."""


class KillerDisk(WrappedDisk):
    """Counts the calls that change something, and dies before number ``kill_at`` (1 is the first; 0: never).

    Crash: At once and for good: nothing is cleaned up, buffers are not flushed, no handler runs.
    """

    def __init__(self, disk: Disk, kill_at: int) -> None:
        super().__init__(disk)
        self.kill_at = kill_at
        self.calls = 0
        self._lock = threading.Lock()

    def arm(self, step: int) -> None:
        """Die before the ``step``-th changing call from now on."""
        with self._lock:
            self.kill_at = self.calls + step

    def before(self, call: str) -> None:
        """Die if it is time."""
        if call not in CHANGING:
            return
        with self._lock:
            self.calls += 1
            if self.calls == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
