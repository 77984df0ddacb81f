"""Client processes without the interpreter's start: a process that has everything imported forks one when told to.

``python -m holdfast.testing.histories.nest`` reads a JSON line for each client to start or to signal, and writes one
for each that ended. When its standard input closes it kills what is left and ends.
"""

from __future__ import annotations

import asyncio
import os
import random
import select
import signal
import sys
import traceback
from collections.abc import Awaitable

import msgspec

from .client import Client, backend_of
from .lines import Orders


class Start(msgspec.Struct, tag="start"):
    """Start a client under this number; what it prints goes to a file."""

    client: int
    orders: Orders
    output: str


class Send(msgspec.Struct, tag="send"):
    """Send a signal to a client, if it still runs."""

    client: int
    number: int


class Preload(msgspec.Struct, tag="preload"):
    """Import what opening this store needs. Not in the command line: it may hold a password."""

    store: str
    opener: str
    path: list[str]
    """Where modules are looked for: the same places as in the process that asks."""


class Ended(msgspec.Struct):
    """A client has ended: with this exit code, or minus this signal."""

    client: int
    code: int


_Told = Start | Send | Preload
_TOLD: msgspec.json.Decoder[_Told] = msgspec.json.Decoder(_Told)


def _be_client(start: Start) -> int:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    output = os.open(start.output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    random.seed()  # what a fresh interpreter would draw anew must not be inherited

    async def run() -> None:
        await Client(start.orders).run()

    try:
        asyncio.run(run())
    except Exception:
        traceback.print_exc()
        return 70
    return 0


def _serve() -> None:
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this ends it by closing its standard input
    signal.set_wakeup_fd(wake)
    running: dict[int, int] = {}
    rest = b""
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            _reap(running)
        if 0 not in readable:
            continue
        more = os.read(0, 1 << 16)
        if not more:
            break
        *lines, rest = (rest + more).split(b"\n")
        for line in lines:
            _do(_TOLD.decode(line), running)
    for pid in running.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _do(told: _Told, running: dict[int, int]) -> None:
    if isinstance(told, Preload):
        sys.path[:] = told.path
        backend_of(told.store, told.opener)
        return
    if isinstance(told, Send):
        if told.client in running:  # not reaped yet, so its id is nobody else's
            os.kill(running[told.client], told.number)
        return
    pid = os.fork()
    if pid:
        running[told.client] = pid
        return
    code = 71
    try:
        code = _be_client(told)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _reap(running: dict[int, int]) -> None:
    for client, pid in list(running.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            del running[client]
            os.write(1, msgspec.json.encode(Ended(client, os.waitstatus_to_exitcode(status))) + b"\n")


class Nest:
    """Starts :func:`_serve` in a process of its own; an async context manager.

    Args:
        store: What the clients will open: its driver is imported once, before any is started.
        opener: How, if not by its URL; see :class:`~holdfast.testing.histories.lines.Orders`.
    """

    def __init__(self, store: str, opener: str) -> None:
        self.store = store
        self.opener = opener
        self._count = 0
        self._ends: dict[int, asyncio.Future[int]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Nest:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "holdfast.testing.histories.nest",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        self._tell(Preload(self.store, self.opener, sys.path))
        self._reader = asyncio.ensure_future(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None and self._process.stdin is not None and self._reader is not None
        self._process.stdin.close()
        await self._process.wait()
        await self._reader

    def start(self, orders: Orders, output: str) -> tuple[int, Awaitable[int]]:
        """Start a client; return its number, and its exit code when it has ended."""
        self._count += 1
        end = self._ends[self._count] = asyncio.get_running_loop().create_future()
        self._tell(Start(self._count, orders, output))
        return self._count, end

    def send(self, client: int, number: int) -> None:
        """Send a signal to a client; nothing happens if it has ended."""
        self._tell(Send(client, number))

    def _tell(self, told: _Told) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(told) + b"\n")

    async def _listen(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        while line := await self._process.stdout.readline():
            ended = msgspec.json.decode(line, type=Ended)
            self._ends.pop(ended.client).set_result(ended.code)
        for end in self._ends.values():
            end.cancel()


if __name__ == "__main__":
    _serve()
