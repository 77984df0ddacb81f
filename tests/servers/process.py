"""One server process, as a direct child that cannot outlive its parent unnoticed."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

START_SECONDS = 30.0
"""How long a server may take until it answers."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def free_port(below: int = 65536) -> int:
    """Return a loopback port that nothing listens on at this moment."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            if port < below:
                return port


def _die_with_parent() -> None:
    # A test run that is killed must not leave servers behind.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class ServerProcess:
    """A command that runs until it is ended; what it prints goes to ``server.log`` in its directory.

    Args:
        argv: The command.
        directory: Its working directory.
        ready: Asked again and again until it returns True; may raise ``OSError`` meanwhile.
        env: Its whole environment; by default a copy of ours.
    """

    def __init__(
        self, argv: Sequence[str], directory: Path, ready: Callable[[], bool], env: Mapping[str, str] | None = None
    ) -> None:
        self.argv = list(argv)
        self.directory = directory
        self.log = directory / "server.log"
        self._ready = ready
        self._env = dict(os.environ if env is None else env)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id; only while it runs."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it is ready.

        Raises:
            RuntimeError: It ended, or was not ready in time; with the end of its log.
        """
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.argv,
                cwd=self.directory,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
            )
        end = time.monotonic() + START_SECONDS
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.argv[0]} ended with {self._process.returncode}: {self.tail()}")
            try:
                if self._ready():
                    return
            except OSError:
                pass
            if time.monotonic() > end:
                self.kill()
                raise RuntimeError(f"{self.argv[0]} did not answer within {START_SECONDS:.0f} s: {self.tail()}")
            time.sleep(0.01)

    def tail(self) -> str:
        """Return the end of what it printed."""
        return self.log.read_text(errors="replace")[-800:] if self.log.exists() else ""

    def signal(self, number: int) -> None:
        """Send it a signal, such as SIGSTOP."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it with SIGKILL and wait until it is gone."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end, and wait until it is gone; by force after ten seconds. Repeatable."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
