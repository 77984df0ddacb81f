"""What the tests of the emergency journal share: a store that goes away in several ways, sessions with a journal."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from fakes import Bot, FakeMarket, candle, flat, memory_store, minute_ms, proposal, session_of, sound, stepped
from order_kit import Desk, orders_in

from holdfast.contract import Backend, Guarantees, Key, KeyPrefix, Op, Record
from holdfast.domains import context_key, ledger_key
from holdfast.engine.blocks import FileSpace, Space
from holdfast.engine.broker import OrderRequest
from holdfast.engine.emergency import Emergency
from holdfast.engine.health import Health
from holdfast.engine.listeners import ModeChange, Trouble
from holdfast.engine.live import LiveRun
from holdfast.engine.modes import TroublePolicy
from holdfast.engine.session import Session
from holdfast.errors import FailedError, UnavailableError, UnknownOutcomeError
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

    def by_hand(self) -> None:
        """Let nothing happen in the background: each step is taken by the test."""
        self.session.writer.background.soon = lambda: None  # type: ignore[method-assign]
        self.session.writer.background.cancel()

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


async def opened(place: Place, *, flushed: bool = True, **bot: Any) -> Process:
    """Let a process open a position.

    Args:
        flushed: The store also knows that the event was told.
    """
    process = await place.process(**bot)
    session = await process.start()
    await stepped(session, candle(0, 43000))
    if flushed:
        await session.flush()
    return process


async def kept_exit(place: Place, how: How = "gone", *, flushed: bool = True) -> tuple[Process, Event]:
    """Let a process open a position, lose its store, and close from the journal; it lives, and keeps the exit."""
    process = await opened(place, flushed=flushed)
    process.backend.go(how)
    (closed,) = await stepped(process.session, TARGET)
    assert process.session.unsaved == 1
    return process, closed


async def settled(process: Process) -> None:
    """Merge what is kept, as the background does within a second."""
    process.be_patient()
    await process.session.flush()
    while process.session.outbox.has_early:
        await process.session.flush()
    await process.session.flush()


async def untroubled(folder: Path, *candles: Any, **bot: Any) -> dict[str, Row]:
    """Return what the store holds after a run that had no trouble."""
    place = Place(folder)
    process = await place.process(**bot)
    session = await process.start()
    await stepped(session, *candles)
    await session.close()
    return await stored(process.store)


# ---------------------------------------------------------------------- killed


async def closed_by_hand(process: Process, how: How, step: int, dies_after: int) -> bool:
    """Let a process close while its store is away, find it again and merge.

    Args:
        step: Of the journal, at which it is killed; -1: at none.
        dies_after: The commit at whose end it is killed; 0: of none.

    Returns:
        Whether it lived; it has ended in any case.
    """
    process.steps.left, process.steps.done = step, 0
    try:
        process.backend.go(how)
        await stepped(process.session, TARGET)
        process.be_patient()
        process.backend.go("")
        process.backend.commits, process.backend.dies_after = 0, dies_after
        await settled(process)
    except (Killed, FailedError, asyncio.CancelledError) as error:
        if not isinstance(error, Killed) and not isinstance(error.__cause__, Killed):
            raise
        process.die()
        return False
    await process.session.close()
    return True


async def kills(
    folder: Path, run: Callable[[Place, int, int], Awaitable[bool]], **policy: Any
) -> AsyncIterator[tuple[Place, str]]:
    """Yield the place of each run that was killed: at every step of its journal, then after every commit.

    Args:
        run: Gets a new place and the last two arguments of :func:`closed_by_hand`, and returns what that does.
    """
    for kind in ("journal", "store"):
        for step in range(1, 50):
            where = folder / f"{kind}{step}"
            where.mkdir()
            place = Place(where, **policy)
            if await run(place, step if kind == "journal" else -1, step if kind == "store" else 0):
                assert step > 2, "the run had fewer steps than it must have"
                break
            yield place, f"{kind} {step}"
        else:
            raise AssertionError("the run has more steps than were tried")


async def ends_as_if_nothing_had_happened(place: Place, expected: Mapping[str, Row], what: str) -> None:
    """Recover twice, and go on; fail unless that leaves what a run without trouble leaves, and the same was told."""
    before = list(place.told)
    for _ in range(2):  # recovering twice is recovering once
        process = await place.process()
        session = await process.start()
        await session.deliver()
        await stepped(session, TARGET, entries=False)
        await stepped(session, candle(2, 43000), entries=False)
        await session.close()
    await sound(process.store)
    assert await stored(process.store) == expected, what
    ids = [event.id for event in place.told]
    assert sorted(set(ids)) == [f"{CONTEXT}#1", f"{CONTEXT}#2"], "every event was told"
    assert {event.id: event for event in before}.items() <= {event.id: event for event in place.told}.items()
    assert len({(event.id, event.reason, event.price_close) for event in place.told}) == 2, "and is the same"


# ---------------------------------------------------------------------- with a venue


class Watched:
    """A desk whose position is held open, and all that is heard of it.

    Args:
        desk: Another process's view of one that was there before; None: a new one.
    """

    def __init__(self, desk: Desk | None = None) -> None:
        self.desk = desk or Desk(candles=flat(43000, -10, 3), hold=True)
        self.told: list[Event] = []
        self.modes: list[ModeChange] = []
        self.trouble: list[Trouble] = []
        self.desk.bot.listeners.listen("mode", self.modes.append)
        self.desk.bot.listeners.listen("trouble", self.trouble.append)

    def start(self, run: LiveRun) -> asyncio.Task[None]:
        """Begin a run of the desk, and go on hearing."""
        return asyncio.create_task(drain(run, self.told))

    async def holds(self) -> None:
        """Wait until the position is open and the market has no more candles."""
        await reached(lambda: self.desk.market.waiting.is_set() and self.desk.broker.held_quantity == 2)

    async def has_sold(self) -> OrderRequest:
        """Wait until the position is closed at the venue, and return the order that did it."""
        await reached(lambda: self.desk.broker.held_quantity == 0)
        closing = self.desk.broker.sent[-1]
        assert (closing.reduce_only, closing.quantity, closing.side) == (True, 2, "sell")
        return closing

    async def is_sound(self, store: Store) -> None:
        """Fail unless the store knows of one entry and one exit, and nothing was sent or told twice."""
        assert len(self.desk.broker.sent) == 2, "the entry and its exit, each once"
        assert [event.number for event in self.told] == [1, 2]
        orders = (await orders_in(store)).orders.values()
        assert [(order.action, order.state) for order in orders] == [("open", "filled"), ("close", "filled")]
        assert self.desk.broker.sent[-1].client_order_id in {order.client_order_id for order in orders}
        await sound(store)
        assert await store.get(ledger_key(CONTEXT, self.told[0].signal.id)) is not None


async def drain(run: LiveRun, told: list[Event]) -> None:
    """Add what a run tells to a list."""
    async for event in run:
        told.append(event)  # noqa: PERF401 -- others look at the list meanwhile


async def reached(condition: Callable[[], bool]) -> None:
    """Wait, not for ever, until something is so, however busy the machine is."""
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110 -- what is waited for happens in a process, a thread or at a server
            await asyncio.sleep(0.005)


def session_in(run: LiveRun) -> Session:
    """Return the session of a run's only context."""
    session = run._entry.driver.session
    assert session is not None
    return session
