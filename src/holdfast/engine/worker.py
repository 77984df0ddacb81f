"""Workers: the sign of life of a process that shares its store with others, and how others judge it.

One row for each process, in a scope of its own, is rewritten several times within a lease. Nobody compares clocks:
a watcher that sees the same row for a whole lease, by its own clock, knows that its worker is gone, or paused, or cut
off from the store; whoever takes over then raises the epoch of the owner row, and what the old worker still sends is
refused. So the lease decides only when to take over; that two never write is decided by the store, at each commit.

Invariants:

* Time is ``CLOCK_BOOTTIME``, which goes on while the machine sleeps.
* A worker counts its own lease as over ``MARGIN`` before others may; and a sign of life counts only once it has looked
  at its owner rows after that, so that whoever replaces a living worker need not wait longer than for its lease.
* A failed look starts the watching anew: an outage of the store is not taken for the death of a worker.
* A worker whose lease ran out may be about to be replaced, by a takeover that was decided meanwhile. It may take its
  lease again, but for each context that counts only once the owner row was written anew, which that takeover expects
  unchanged (:meth:`holdfast.engine.tenure.Tenure.proof`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import cast

import msgspec

from ..contract import Key
from ..domains import context_key, worker_key
from ..errors import FencedError, HoldfastError, InvalidInputError
from ..names import Context
from ..rows import Owner, Row, Worker
from ..store import Loaded, Store
from .lanes import Sleep
from .leases import Leases, Owning, offer

_log = logging.getLogger("holdfast")

LEASE_SECONDS = 20.0
"""Default; a worker that gave no sign of life for so long may be replaced."""
SHORTEST_LEASE_SECONDS = 0.5
BEATS_PER_LEASE = 5
MARGIN = 0.25
"""The part of a lease by which its holder gives it up earlier than others may take it."""


def boot_seconds() -> float:
    """Return the time since the machine started, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def machine() -> str:
    """Name the running kernel, and the process table and the clock in it that this process lives by.

    Empty where that cannot be told. Whoever lives by another clock reads other times at which processes started.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        time_namespace = Path("/proc/self/ns/time")  # not before Linux 5.6
        clock = f"/{time_namespace.readlink()}" if time_namespace.exists() else ""
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}{clock}"
    except OSError:
        return ""


def started_ticks(pid: int) -> int | None:
    """Return when a process of this machine started, in the kernel's ticks; 0 once it has ended, None if unreadable."""
    try:
        # The name, in parentheses, may hold anything; what follows its last one has fixed places.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])


def is_gone(pid: int, started: int) -> bool:
    """Whether the process of this machine that started then has certainly ended."""
    now = started_ticks(pid)
    if now is not None:
        return now != started
    try:
        os.kill(pid, 0)  # /proc may hide the processes of other users, and has no row of one that is gone either
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


class Life(Enum):
    """What is known of a worker."""

    ALIVE = "it gave a sign of life while it was watched"
    DEAD = "it is gone, or gave none for its whole lease"
    UNKNOWN = "it was not watched for long enough"


class Watch:
    """Watches the signs of life of other workers.

    Args:
        store: An open store.
        boot_clock: Seconds of ``CLOCK_BOOTTIME``; a seam for tests.
    """

    def __init__(self, store: Store, *, boot_clock: Callable[[], float] = boot_seconds) -> None:
        self._store, self.boot_clock = store, boot_clock
        self._machine = machine()
        self._seen: dict[str, tuple[int, Worker, float]] = {}
        """For each holder: the version of its row, the row, and since when that has been seen."""

    async def look(self, *holders: str) -> dict[str, tuple[Life, Worker | None]]:
        """Read the signs of life of ``holders`` and judge each.

        Raises:
            UnavailableError: The store cannot be read now; the watching begins anew.
        """
        before = self.boot_clock()  # a row that is read was there no earlier than this
        try:
            found, _ = await self._store.salvage(*(worker_key(holder) for holder in holders))
        except BaseException:
            self._seen.clear()
            raise
        return {holder: self._judge(holder, found, before) for holder in holders}

    def version(self, holder: str) -> int:
        """Return the version of the row that was seen last, for a commit that must not touch a newer one."""
        return self._seen[holder][0] if holder in self._seen else 0

    def _judge(self, holder: str, found: Mapping[Key, Loaded[Row]], before: float) -> tuple[Life, Worker | None]:
        loaded = cast("Loaded[Worker] | None", found.get(worker_key(holder)))
        if loaded is None:
            return Life.DEAD, None  # it ended in good order, or never lived on this store
        row = loaded.row
        _, known, since = self._seen.get(holder, (0, None, 0.0))
        # The same row under another number was moved or re-keyed by somebody: its worker writes another one each time.
        self._seen[holder] = (loaded.version, row, since if row == known else self.boot_clock())
        if self._machine and row.machine == self._machine and is_gone(row.pid, row.started):
            return Life.DEAD, row
        if row != known:
            return (Life.UNKNOWN if known is None else Life.ALIVE), row
        return (Life.DEAD if before - since >= row.lease_seconds else Life.UNKNOWN), row


class SignOfLife:
    """This process's own worker row: rewritten until it is closed; and a look at who owns its contexts.

    Made by :func:`sign_of_life`; begun by the first session that recovers, ended with the last one.
    """

    def __init__(
        self, store: Store, *, holder: str, lease_seconds: float, sleep: Sleep,
        clock: Callable[[], int], boot_clock: Callable[[], float] = boot_seconds,
    ) -> None:  # fmt: skip
        self.holder, self.lease_seconds = holder, lease_seconds
        self.watch = Watch(store, boot_clock=boot_clock)
        self._store, self._sleep, self._clock, self._boot_clock = store, sleep, clock, boot_clock
        self._writer = store.writer(f"worker-{holder}")
        self._sessions: list[Owning] = []
        self.fleet, self.leaving = "", False
        """What the worker row says of a fleet; see :mod:`holdfast.engine.fleet`."""
        self.leases = Leases(store.scope, self)
        self._task: asyncio.Task[None] | None = None
        self._starting, self._renewing = asyncio.Lock(), asyncio.Lock()
        self._looks = 0
        self.begun = 0
        """How many signs of life were begun."""
        self._sent_at = 0.0
        """When the newest sign of life that was stored, and followed by a look, had been sent; 0: none yet."""
        self.lapses = 0
        """How often the lease had run out when it was taken again."""

    @property
    def is_held(self) -> bool:
        """Whether the lease still runs, with the margin: whatever cannot be taken back needs that."""
        return self._sent_at > 0 and self._boot_clock() - self._sent_at < self.lease_seconds * (1 - MARGIN)

    async def join(self, session: Owning) -> None:
        """Give a sign of life from now on, because ``session`` is about to own. Repeatable.

        Raises:
            UnavailableError, UnknownOutcomeError: The store cannot be written now; nothing was begun.

        Crash: The row stays; whoever watches it sees within a lease that nobody rewrites it.
        """
        if session not in self._sessions:
            self._sessions.append(session)
        async with self._starting:
            self.leases.add(session)
            if self._task is None or self._task.done() or not self.is_held:
                await self.renew()
            if self._task is None or self._task.done():
                self._task = asyncio.get_running_loop().create_task(self._go_on(), name="holdfast sign of life")

    async def leave(self, session: Owning) -> None:
        """The session has ended; after the last one the row is deleted, so that nobody waits for a lease. Repeatable.

        Crash: The row stays until the lease is over.
        """
        if session in self._sessions:
            self._sessions.remove(session)
            self.leases.remove(session)
        async with self._starting:
            if self._sessions or self._task is None:
                return
            task, self._task = self._task, None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._sent_at = 0.0
            try:
                await self._writer.commit({worker_key(self.holder): None})
            except HoldfastError as error:
                _log.warning("the sign of life of this process stays for %g s: %s", self.lease_seconds, error)

    async def renew(self) -> None:
        """Give a sign of life now, and look who owns the contexts of this process.

        Raises:
            UnavailableError, UnknownOutcomeError: The store cannot be used now; the lease runs on, and out.

        Crash: As before the call, or with a row that nobody rewrites.
        """
        async with self._renewing:  # one look at a time: whoever waits for two of them must get two
            before = self._boot_clock()
            self.begun += 1
            pid = os.getpid()
            owns = sum(one.owner is not None for one in self._sessions)
            row = Worker(
                holder=self.holder, beat=self._looks, lease_seconds=self.lease_seconds, host=socket.gethostname(),
                pid=pid, machine=machine(), started=started_ticks(pid) or 0, contexts=owns,
                fleet=self.fleet, leaving=self.leaving, at_ms=self._clock(),
            )  # fmt: skip
            await self._writer.commit({worker_key(self.holder): row})
            await self.look_for_new_owners(*self._sessions)
            self._looks += 1
            lapsed, self._sent_at = self._sent_at > 0 and not self.is_held, before
            if lapsed:
                self.lapses += 1
                for session in self._sessions:
                    session.lapsed()

    async def _go_on(self) -> None:
        while True:
            await self._sleep(self.lease_seconds / BEATS_PER_LEASE)
            try:
                await self.renew()
            except HoldfastError as error:
                _log.warning("no sign of life could be stored: %s", error)

    async def look_for_new_owners(self, *sessions: Owning) -> None:
        """Fence each session whose context was taken over: one that has nothing to commit would not notice it.

        Raises:
            UnavailableError: The store cannot be read now.
        """
        owned = {context_key("owner", s.context): (s, s.owner) for s in sessions if s.owner is not None}
        if not owned:
            return
        found, damaged = await self._store.salvage(*owned)
        for key, (session, mine) in owned.items():
            if mine is not session.owner or key in damaged:
                continue  # it recovered meanwhile; or the row says nothing, and the next commit will
            loaded = found.get(key)
            row = None if loaded is None else cast("Owner", loaded.row)
            if row is None or (row.holder, row.epoch) != (mine.holder, mine.epoch):
                session.fence(fenced(session.context, mine, row))


def fenced(context: Context, mine: Owner, now: Owner | None) -> FencedError:
    """Return the error that names who owns the context now."""
    by = "nobody" if now is None else f"process {now.pid} on {now.host} (epoch {now.epoch})"
    return FencedError(
        f"{context} is owned by {by} now, not by this session (epoch {mine.epoch}): stop trading it",
        key=context_key("owner", context),
    )


def sign_of_life(
    store: Store, *, holder: str, lease_seconds: float, sleep: Sleep, clock: Callable[[], int],
    boot_clock: Callable[[], float] = boot_seconds,
) -> SignOfLife | None:  # fmt: skip
    """Return the sign of life of this process on an open store; None where the store belongs to one process anyway.

    Raises:
        InvalidInputError: The lease is too short, or differs from that of runs under way on the same store.
    """
    if type(lease_seconds) not in (int, float) or not SHORTEST_LEASE_SECONDS <= lease_seconds <= 3600:
        raise InvalidInputError(f"lease_seconds is {lease_seconds!r}: use {SHORTEST_LEASE_SECONDS} to 3600")
    if not store.guarantees.shared:
        return None
    sign: SignOfLife | None = store.attached.get("sign of life")
    if sign is None or (sign.holder, sign.lease_seconds) != (holder, lease_seconds):
        if sign is not None and sign.holder == holder and sign._sessions:
            raise InvalidInputError(
                f"lease_seconds is {lease_seconds}, but other runs on this store have {sign.lease_seconds}: use one"
            )
        sign = store.attached["sign of life"] = SignOfLife(
            store, holder=holder, lease_seconds=lease_seconds, sleep=sleep, clock=clock, boot_clock=boot_clock
        )
        offer(store, sign.leases)
    return sign


def describe(row: Owner | Worker) -> str:
    """Say who it is, for an error message."""
    return f"process {row.pid} on {row.host}"


def released(owner: Owner) -> Owner:
    """Return the owner row that lets go of the context."""
    return msgspec.structs.replace(owner, released=True)
