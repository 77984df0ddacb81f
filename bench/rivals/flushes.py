"""Count what a process really flushes, with strace."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

CALLS = "fsync,fdatasync,sync_file_range,msync,sync,syncfs"
# A call that another thread interrupts stands on two lines; it counts once, where it begins.
_LINE = re.compile(r"(?:\d+ +)?(\d+\.\d+) (\w+)\((?:\d+<([^>]*)>)?")


class Flush(NamedTuple):
    """One call that flushed something."""

    at: float
    """Wall clock, seconds."""
    directory: bool


class Flushes(NamedTuple):
    """Flushes per acknowledged write."""

    files: float
    directories: float


def trace_command(output: Path) -> list[str]:
    """Return what goes before a command to have its flushes written down."""
    return ["strace", "-f", "-y", "-qq", "-ttt", "-e", f"trace={CALLS}", "-e", "signal=none", "-o", str(output)]


class Attached:
    """strace on processes that run already, and on what they fork."""

    def __init__(self, pids: Iterable[int], output: Path) -> None:
        output.touch()
        words = [word for pid in pids for word in ("-p", str(pid))]
        self.output = output
        self._process = subprocess.Popen([*trace_command(output), *words], stderr=subprocess.PIPE)
        time.sleep(0.5)  # strace says nothing when it has attached
        if self._process.poll() is not None:
            raise OSError((self._process.communicate()[1] or b"").decode().strip())

    def close(self) -> None:
        """Let go of them; they go on."""
        self._process.send_signal(signal.SIGINT)
        self._process.communicate()


def read_trace(output: Path) -> list[Flush]:
    """Return the flushes written down so far."""
    found = []
    for line in output.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match and match[2] in CALLS.split(","):
            found.append(Flush(float(match[1]), directory=Path(match[3] or os.devnull).is_dir()))
    return found


def per_write(flushes: Iterable[Flush], began: float, ended: float, writes: int) -> Flushes:
    """Return how many fell on each write between two moments."""
    within = [flush for flush in flushes if began <= flush.at <= ended]
    folders = sum(flush.directory for flush in within)
    return Flushes((len(within) - folders) / writes, folders / writes)
