"""What the tests of the emergency journal share: a store that goes away in several ways, sessions with a journal."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from fakes import Bot, FakeMarket, candle, flat, memory_store, minute_ms, proposal, session_of

from holdfast.contract import Backend, Guarantees, Key, KeyPrefix, Op, Record
from holdfast.domains import context_key
from holdfast.engine.blocks import FileSpace, Space
from holdfast.engine.emergency import Emergency
from holdfast.engine.health import Health
from holdfast.engine.listeners import ModeChange, Trouble
from holdfast.engine.modes import TroublePolicy
from holdfast.engine.session import Session
from holdfast.errors import UnavailableError, UnknownOutcomeError
from holdfast.names import Context
from holdfast.rows import Event, Outage, Row
from holdfast.store import Store
from holdfast.wrappers.around import Around

CONTEXT = Context("binance", "BTCUSDT", "my-strategy")
How = Literal["", "refuses", "full", "gone", "silent", "answer lost", "request lost"]
"""How a store is away: commits refused, with or without the disk's word for it; reads too; no answer at all; the first
commit applied and its answer lost, or not even applied, and everything refused after that."""


class Switched(Around):
    """A backend that can be taken away."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.how: How = ""
        self.back = asyncio.Event()
        self.delay_seconds = 0.0
        """How long every commit takes, though reads do not."""
        self.commits = 0
        """How many were applied."""
        self.dies_after = 0
        """Number of the commit whose answer never comes because the process is killed; 0: none."""

    def go(self, how: How) -> None:
        """Be away from now on; "" is back."""
        self.how = how
        if how:
            self.back.clear()
        else:
            self.back.set()

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Read, unless away."""
        if self.how == "gone":
            raise UnavailableError("gone")
        if self.how == "silent":
            await self.back.wait()
        return await super().read(scope, keys)

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        """Commit, unless away."""
        match self.how:
            case "refuses" | "gone":
                raise UnavailableError(self.how)
            case "full":
                error = UnavailableError("nothing was written")
                raise error from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "silent":
                await self.back.wait()
            case "answer lost":
                self.how = "gone"
                await super().commit(scope, changes, expect, op=op)
                raise UnknownOutcomeError("the answer was lost")
            case "request lost":
                self.how = "gone"
                raise UnknownOutcomeError("the request was lost, or is on its way")
        if self.delay_seconds:
            await asyncio.sleep(self.delay_seconds)
        number = await super().commit(scope, changes, expect, op=op)
        self.commits += 1
        if self.commits == self.dies_after:
            raise Killed
        return number


class Server(Around):
    """A backend that stays when a process that used it is gone."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._guarantees: Guarantees | None = None

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Open it, the first time."""
        if self._guarantees is None:
            self._guarantees = await super().open(read_only=read_only)
        return self._guarantees

    async def close(self) -> None:
        """Stay."""


class Killed(BaseException):
    """The process ends here; nothing of it goes on."""


class MortalSpace:
    """A journal file whose n-th write or sync is the last thing that the process does.

    Args:
        path: The file.
        steps: Shared by the spaces of one process: how many steps it has left, and what it did.
    """

    def __init__(self, path: str, steps: Steps) -> None:
        self.inner, self.steps = FileSpace(path), steps

    def read(self) -> bytes:
        return self.inner.read()

    def write(self, at: int, data: bytes) -> None:
        self.steps.take()
        if self.steps.left == 0:
            self.inner.write(at, data[: len(data) // 2])  # torn: the rest of it never comes
            raise Killed
        self.inner.write(at, data)

    def sync(self) -> None:
        self.steps.take()
        if self.steps.left == 0:
            raise Killed
        self.inner.sync()

    def cut(self, size_bytes: int) -> None:
        self.inner.cut(size_bytes)

    def close(self) -> None:
        self.inner.close()


class Steps:
    """Counts the steps of a process; the last one kills it."""

    def __init__(self, left: int = -1) -> None:
        self.left, self.done = left, 0

    def take(self) -> None:
        self.done += 1
        self.left -= 1


def policy_of(path: Path | str, **values: Any) -> TroublePolicy:
    """Return a policy with a small journal and little patience."""
    return TroublePolicy(**{"emergency": str(path), "emergency_bytes": 64 * 1024, "patience_seconds": 5.0, **values})


class Place:
    """A store that can be taken away, its journal, and one process after another on them.

    Args:
        folder: For the journal.
    """

    def __init__(self, folder: Path, **policy: Any) -> None:
        from holdfast.backends.memory import MemoryBackend

        self.memory = Server(MemoryBackend())
        self.path = folder / "emergency"
        self.policy = policy_of(self.path, **policy)
        self.told: list[Event] = []
        """Every event that the callbacks of any process were told, in order."""

    async def process(self, **bot: Any) -> Process:
        """Start the next process."""
        backend = Switched(self.memory)
        return Process(self, backend, await memory_store(backend), **bot)


class Process:
    """One process: a bot, its session and its journal."""

    def __init__(self, place: Place, backend: Switched, store: Store, steps: Steps | None = None, **bot: Any) -> None:
        self.place, self.backend, self.store = place, backend, store
        self.steps = steps or Steps()
        signals = bot.pop("signals", {1: proposal()})
        self.bot = Bot(FakeMarket({"BTCUSDT": flat(43000, -10, 30)}), signals, **bot)
        self.modes: list[ModeChange] = []
        self.trouble: list[Trouble] = []
        self.bot.listeners.listen("mode", self.modes.append)
        self.bot.listeners.listen("trouble", self.trouble.append)
        self.bot.listeners.listen("signal_live", self._hear)
        self.health = Health(store, place.policy)
        self.health.emergency = Emergency(store, place.policy, open_space=self._space)
        self.spaces: list[MortalSpace] = []
        self.session: Session

    def _space(self, path: str) -> Space:
        self.spaces.append(MortalSpace(path, self.steps))
        return self.spaces[-1]

    def _hear(self, news: Any) -> None:
        if isinstance(news, Event):
            self.place.told.append(news)

    def be_patient(self) -> None:
        """Wait for the store as long as it takes, from now on: how quick the machine is must not decide anything."""
        self.health.policy = self.place.policy = msgspec.structs.replace(self.place.policy, patience_seconds=600.0)

    async def start(self) -> Session:
        """Recover, and begin where nothing was."""
        self.session = await session_of(self.bot, self.store, health=self.health)
        return self.session

    def die(self) -> None:
        """End without a word: nothing is flushed, and the lock goes with the process."""
        if self.session.writer.background.task is not None:
            self.session.writer.background.task.cancel()
        self.session.writer.background.cancel()
        for space in self.spaces:
            space.close()
        if self.health._timer is not None:
            self.health._timer.cancel()


async def stored(store: Store) -> dict[str, Row]:
    """Return what a run leaves, without owner rows, outages and what tells when it was done."""
    found: dict[str, Row] = {}
    for domain in ("signal", "schedule", "partial", "session", "outbox", "ledger", "risk", "guard", "order"):
        for key, loaded in (await store.scan(domain, "")).items():
            found[str(key)] = loaded.row
    return found


async def forbidden(store: Store) -> list[tuple[int, int]]:
    """Return the minutes on which nothing could begin."""
    keys = await store.keys(KeyPrefix("outage", context_key("outage", CONTEXT).entity_name))
    rows = [loaded.row for loaded in (await store.load(*keys)).values()]
    return [
        ((row.from_ms - minute_ms(0)) // 60_000, (row.to_ms - minute_ms(0)) // 60_000)
        for row in rows
        if isinstance(row, Outage) and row.from_ms
    ]


TARGET = candle(1, 43000, high=44000)
"""The candle that closes what the default bot opens at minute 0."""
