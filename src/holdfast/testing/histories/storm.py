"""The faults of one history: what happens to its clients, their connections and their server, and when.

Moments are chosen by how far the history has come, not by the clock, so that a slow machine suffers no less.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from ..proxy import Direction, How, Proxy

Restart = Callable[[], Awaitable[None]]
"""Kills the server with SIGKILL and starts it again; returns when it answers."""

_HOWS: tuple[How, ...] = ("close", "reset", "hold")
_DIRECTIONS: tuple[Direction, ...] = ("requests", "answers")
_POLL_SECONDS = 0.003
_LONGEST_PAUSE_SECONDS = 1.0
_DELIVERY_SECONDS = 0.2
_WITH_TLS = re.compile(r"rediss|https|ssl|tls", re.IGNORECASE)
_ADDRESS = re.compile(r"(?:(?<=//)|(?<=@)|(?<=%2F)|(?<=%40)|(?<=,))([A-Za-z0-9.\-]+)(:|%3A)(\d{1,5})(?=[/?&,\s]|%2F|$)")


class Address(NamedTuple):
    """The one host and port that stand in a store's URL."""

    host: str
    port: int
    store: str

    def through(self, port: int) -> str:
        """Return the URL with a loopback port in the place of host and port."""
        store = _ADDRESS.sub(lambda found: f"127.0.0.1{found[2]}{port}", self.store)
        if "mongodb://" in store and "directConnection" not in store:
            # MongoDB's driver would ask for the set's members, and go round the proxy.
            store += f"{'&' if '?' in store else '?'}directConnection=true"
        return store


def address(store: str) -> Address | None:
    """Return the address in a store's URL; None if there is none or more than one, or if names must be as they are."""
    found = _ADDRESS.findall(store)
    if len(found) != 1 or _WITH_TLS.search(store):
        return None
    return Address(found[0][0], int(found[0][2]), store)


class Stage(Protocol):
    """What a storm needs to know and can do."""

    def progress(self) -> float:
        """Return which part of the operations is done, from 0 to 1."""

    def over(self) -> bool:
        """Tell whether all clients have ended."""

    def clients(self) -> list[int]:
        """Return those that run."""

    def send(self, client: int, number: int) -> None:
        """Send a signal to one."""

    async def replace(self, client: int) -> None:
        """Kill one with SIGKILL and start another in its place."""


async def reached(moment: Callable[[], bool]) -> None:
    """Wait until something is so that other processes bring about and nobody tells."""
    while not moment():  # noqa: ASYNC110
        await asyncio.sleep(_POLL_SECONDS)


class Storm:
    """Runs the faults of one history.

    Args:
        seed: Of what happens when.
        proxy: Before the server, if there is one.
        restart: Kills the server and starts it again, if the caller can.
        kills: How many clients are killed.
        pauses: How many are stopped for a while.
        cuts: How many connections are cut, if there is a proxy.
    """

    def __init__(
        self, seed: int, *, proxy: Proxy | None, restart: Restart | None, kills: int, pauses: int, cuts: int
    ) -> None:
        self.chance = random.Random(seed)
        self.done: Counter[str] = Counter()
        self._proxy = proxy
        self._restart = restart
        what = ["kill"] * kills + ["pause"] * pauses
        what += ["cut"] * cuts if proxy is not None else []
        what += ["restart"] if restart is not None else []
        self._events = sorted((self.chance.uniform(0.03, 0.92), one) for one in what)

    async def rage(self, stage: Stage) -> None:
        """Let happen what was chosen, each at its moment, until all of it has or the clients have ended."""
        for moment, what in self._events:
            await self._until(stage, moment)
            if stage.over():
                return
            match what:
                case "kill":
                    await stage.replace(self.chance.choice(stage.clients()))
                case "pause":
                    await self._pause(stage)
                case "restart":
                    assert self._restart is not None
                    await self._restart()
                case _:
                    await self._cut()
                    continue
            self.done[what] += 1

    async def calm(self) -> None:
        """Deliver what a cut still holds: a request that arrives after everybody has gone on."""
        if self._proxy is not None:
            self._proxy.spare()
            await self._deliver()

    async def _until(self, stage: Stage, moment: float) -> None:
        await reached(lambda: stage.over() or stage.progress() >= moment)

    async def _pause(self, stage: Stage) -> None:
        client = self.chance.choice(stage.clients())
        clock = asyncio.get_running_loop().time
        began, end = stage.progress(), clock() + _LONGEST_PAUSE_SECONDS
        length = self.chance.uniform(0.01, 0.08)
        stage.send(client, signal.SIGSTOP)
        await reached(lambda: stage.over() or stage.progress() >= began + length or clock() >= end)
        stage.send(client, signal.SIGCONT)

    async def _cut(self) -> None:
        assert self._proxy is not None
        await self._deliver()  # of the cut before: a request that arrives late
        how = self.chance.choice(_HOWS)
        self._proxy.cut(self.chance.choice(_DIRECTIONS), self.chance.randrange(0, 600), how)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST_PAUSE_SECONDS):
                await self._proxy.was_cut.wait()
                self.done["cut"] += 1

    async def _deliver(self) -> None:
        assert self._proxy is not None
        with contextlib.suppress(OSError, TimeoutError):
            await self._proxy.release(patience_seconds=_DELIVERY_SECONDS)
