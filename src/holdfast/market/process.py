"""A replay server as a child process."""

from __future__ import annotations

import select
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

import msgspec

from ..errors import InvalidInputError, UnavailableError
from .wire import Ready


class MarketProcess:
    """Starts ``python -m holdfast.market.serve`` with these arguments and waits until it can be reached.

    A context manager; blocking, so start it outside the event loop. The server ends
    when this process does, whatever ends it.

    Args:
        arguments: The server's own options.
        timeout_seconds: How long it may take to read its candles.

    Raises:
        InvalidInputError: The server refused its arguments or a file; the message is its own.
        UnavailableError: It did not answer in time.
    """

    def __init__(self, arguments: Sequence[str], *, timeout_seconds: float = 60.0) -> None:
        command = [sys.executable, "-m", "holdfast.market.serve", *arguments]
        # A session of its own: Ctrl-C in the terminal is for the bot, which still needs its market to end well.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            ready = self._first_line(timeout_seconds)
        except BaseException:
            self.close()
            raise
        self.address, self.info, self.pid = ready.address, ready.info, self._process.pid

    def _first_line(self, timeout_seconds: float) -> Ready:
        assert self._process.stdout is not None and self._process.stderr is not None
        if not select.select([self._process.stdout], [], [], timeout_seconds)[0]:
            raise UnavailableError(f"the market server was not ready within {timeout_seconds:g} s")
        line = self._process.stdout.readline()
        if not line:
            said = self._process.stderr.read().decode(errors="replace").strip()
            raise InvalidInputError(said.removeprefix("holdfast market: ") or "the market server ended at once")
        return msgspec.json.decode(line, type=Ready)

    def close(self) -> None:
        """End the server and wait for its end. Repeatable."""
        process = self._process
        if process.stdin is not None and not process.stdin.closed:
            process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> MarketProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
