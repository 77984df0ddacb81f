"""A process that has everything imported and forks a bot when told to: a restart without the interpreter's start.

``python -m holdfast.testing.zygote`` reads one JSON line for each bot to start, and answers with two: its
process id, and how it ended. The bot has ended, but is not reaped, when the second line comes, so its id cannot
yet be somebody else's. When standard input closes, the bot is killed and the process ends.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Sequence

import msgspec

from ..errors import FailedError, HoldfastError


class Start(msgspec.Struct):
    """Start a bot: ``holdfast`` with these arguments."""

    arguments: list[str]
    witness: str
    """The witness's file; lines are appended."""
    log: str
    """Where standard output and error go; appended."""


class Told(msgspec.Struct):
    """An answer: the bot's process id, and its end once it has ended (an exit code, or minus a signal)."""

    pid: int
    ended: int | None = None


def _preload() -> None:
    import holdfast.backends.file
    import holdfast.cli.run
    import holdfast.cli.screen
    import holdfast.engine.context
    import holdfast.market.replay
    import holdfast.testing.watched  # noqa: F401


def _preload_driver(arguments: Sequence[str]) -> None:
    """Import what the store needs, which is otherwise half of a restart's time; nothing is opened."""
    from ..urls import open_backend

    if "--store" in arguments[:-1]:
        with contextlib.suppress(HoldfastError):
            open_backend(arguments[arguments.index("--store") + 1])


def _bot(start: Start) -> int:
    from ..cli import main

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(start.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    witness = os.open(start.witness, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    random.seed()  # a fresh interpreter would draw anew
    return main([*start.arguments, "--witness-fd", str(witness)])


def serve() -> None:
    """Answer requests until standard input ends."""
    _preload()
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    last: int | None = None
    while line := sys.stdin.buffer.readline():
        if last is not None:
            os.waitpid(last, 0)
        start = msgspec.json.decode(line, type=Start)
        if last is None:
            _preload_driver(start.arguments)
        last = os.fork()
        if last == 0:
            code = 70
            try:
                code = _bot(start)
                sys.stdout.flush()
            finally:
                os._exit(code)
        _tell(Told(last))
        while (info := os.waitid(os.P_PID, last, os.WEXITED | os.WNOWAIT | os.WNOHANG)) is None:
            readable, _, _ = select.select([0, woken], [], [])
            if woken in readable:
                os.read(woken, 4096)
            if 0 in readable:  # nobody asks while a bot runs: the parent is gone
                os.kill(last, signal.SIGKILL)
                return
        _tell(Told(last, info.si_status if info.si_code == os.CLD_EXITED else -info.si_status))


def _tell(told: Told) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(told) + b"\n")
    sys.stdout.buffer.flush()


class Zygote:
    """Starts :func:`serve` in a child process; a context manager. One bot at a time."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "holdfast.testing.zygote"]
        # Unbuffered: a line that was read ahead would not wake the select that waits for it.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._ended: int | None = None
        """How the bot ended; it is told once, and may be asked for again."""

    def start(self, arguments: Sequence[str], *, witness: str, log: str) -> int:
        """Start a bot and return its process id."""
        assert self._process.stdin is not None
        self._ended = None
        self._process.stdin.write(msgspec.json.encode(Start(list(arguments), witness, log)) + b"\n")
        return self._answer().pid

    def ended(self, within_seconds: float) -> int | None:
        """Wait so long for the bot to end by itself; return its exit code or minus its signal, or None. Repeatable."""
        assert self._process.stdout is not None
        if self._ended is None and select.select([self._process.stdout], [], [], max(0.0, within_seconds))[0]:
            self._ended = self._answer().ended
        return self._ended

    def kill(self, pid: int) -> int:
        """Kill the bot with SIGKILL, wait for its end and return it (it may just have ended by itself)."""
        os.kill(pid, signal.SIGKILL)
        ended = self.ended(30.0)
        if ended is None:
            raise FailedError(f"process {pid} did not end within 30 s of SIGKILL")
        return ended

    def _answer(self) -> Told:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise FailedError("the process that starts the bots has ended: see its standard error")
        return msgspec.json.decode(line, type=Told)

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


if __name__ == "__main__":
    serve()
