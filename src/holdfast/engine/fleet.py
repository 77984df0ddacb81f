"""A fleet: contexts spread over any number of processes, with no coordinator besides the store.

Each worker works out alone who should run what: rendezvous hashing over the workers that live. They may disagree for a
while; that does no harm, because the owner row decides who runs a context, and a living owner is respected.

Invariants:

* A worker starts only contexts that it should run and that nobody living owns.
* A context that another living worker should run is left between two candles and released, never torn away.
* Workers that offer different contexts (a new version of the list is being rolled out, say) are different fleets:
  each leaves alone what the other owns.
* A worker that is leaving says so first; the others take what it releases from then on.
* What stayed owned by a worker that does not run it, since the store was away when it was to be released, is released
  as soon as the store is back: nobody may take it while that worker lives.
* What an ended worker of this machine left in its emergency journal is taken over before any context is begun.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from hashlib import blake2b
from typing import NamedTuple, cast

from ..contract import KeyPrefix
from ..domains import context_key, worker_key
from ..errors import ConflictError, FencedError, HeldError, HoldfastError, InvalidInputError
from ..names import Context
from ..rows import Owner, Worker
from ..store import Loaded, Store
from .health import health_of
from .holder import holder_of
from .journals import JournalFolder, Journals
from .lanes import Sleep
from .listeners import Listeners, Trouble, default_listeners
from .live import LiveRun
from .modes import TroublePolicy
from .worker import BEATS_PER_LEASE, Life, SignOfLife, released, sign_of_life

_log = logging.getLogger("holdfast")

_LONGEST_REST_LEASES = 64


def fingerprint(contexts: Iterable[Context]) -> str:
    """Return what tells one list of contexts from another; their order makes no difference."""
    digest = blake2b(digest_size=8)
    for context in sorted(set(contexts)):
        for part in context:
            digest.update(len(part.encode()).to_bytes(4) + part.encode())
    return digest.hexdigest()


def chosen(context: Context, holders: Collection[str]) -> str | None:
    """Return which of ``holders`` should run ``context``; None where there is none.

    Rendezvous hashing: everybody who knows the same holders chooses the same one; a holder that comes takes only what
    it should run itself, and what one that goes leaves is spread over all others.
    """
    name = "\0".join(context).encode()
    return max(holders, key=lambda holder: (_weight(holder, name), holder), default=None)


def assignment(contexts: Iterable[Context], holders: Collection[str]) -> dict[Context, str]:
    """Return who should run what; empty where nobody lives."""
    return {context: one for context in contexts if (one := chosen(context, holders)) is not None}


def _weight(holder: str, name: bytes) -> bytes:
    return blake2b(name, digest_size=8, key=blake2b(holder.encode(), digest_size=32).digest()).digest()


class _Presence:
    """What keeps the sign of life going while the worker runs nothing; it owns nothing itself."""

    context = Context("-", "-", "-")
    owner: Owner | None = None
    is_proven = has_lease = True

    def look_anew(self) -> None:
        """Nothing to decide."""

    def lapsed(self) -> None:
        """Nothing to show."""

    def fence(self, error: FencedError) -> None:
        """Nothing to stop."""


class _Run(NamedTuple):
    run: LiveRun
    task: asyncio.Task[None]


class _Rest(NamedTuple):
    """When a context that failed may be tried again."""

    until_seconds: float
    leases: int


class Fleet:
    """One worker of a fleet.

    Args:
        store: An open store that several processes may share.
        contexts: What the fleet runs; the same in each of its workers.
        start: Sets up a run of a context on that store, with this lease.
        lease_seconds: See :meth:`holdfast.engine.live.Live.run`.
        clock: Tells the time in epoch milliseconds, for people.
        sleep: Takes seconds; a seam for tests.
        told: Told what it does, in words: (context, what).
        listeners: Told of trouble with the emergency journal; default: the process's own.
        on_trouble: What ``start`` gives its runs.
        folder: Where the emergency journals of this machine's workers lie; ``on_trouble`` names the one of this worker.

    Raises:
        InvalidInputError: The store belongs to one process, or there is no context.
    """

    def __init__(
        self,
        store: Store,
        contexts: Iterable[Context],
        start: Callable[[Context], LiveRun],
        *,
        lease_seconds: float,
        clock: Callable[[], int],
        sleep: Sleep = asyncio.sleep,
        told: Callable[[Context, str], None] = lambda context, what: None,
        listeners: Listeners = default_listeners,
        on_trouble: TroublePolicy = TroublePolicy(),
        folder: JournalFolder | None = None,
    ) -> None:
        self.contexts = tuple(dict.fromkeys(contexts))
        if not self.contexts:
            raise InvalidInputError("a fleet needs at least one context")
        sign = sign_of_life(store, holder=holder_of(store), lease_seconds=lease_seconds, sleep=sleep, clock=clock)
        if sign is None:
            raise InvalidInputError(
                f"{store.guarantees.backend} belongs to one process: a fleet needs a store that several may share, "
                "such as sqlite: on one host, or redis:, postgresql:, mongodb:, s3:"
            )
        self._store, self._start, self._sleep, self._told = store, start, sleep, told
        self._sign: SignOfLife = sign
        self._writer = store.writer(f"fleet-{sign.holder}")
        self._fleet = fingerprint(self.contexts)
        self._listeners, self._health = listeners, health_of(store, on_trouble)
        self._journals = Journals(store, self._health.emergency, on_trouble, folder, self._trouble)
        self._alive: dict[str, Worker] = {}
        self._runs: dict[Context, _Run] = {}
        self._rests: dict[Context, _Rest] = {}
        self._left: set[Context] = set()
        """Contexts whose run ended here, and whose owner row was not looked at since."""
        self.ended: set[Context] = set()
        """Contexts whose market has ended."""
        self._leaving = asyncio.Event()
        self._woken = asyncio.Event()

    @property
    def running(self) -> tuple[Context, ...]:
        """What this worker runs now."""
        return tuple(self._runs)

    def leave(self) -> None:
        """Hand over everything, then end. Repeatable."""
        self._leaving.set()
        self._woken.set()

    async def work(self) -> None:
        """Run what this worker should run, until it is told to leave or every context's market has ended.

        Raises:
            UnavailableError, UnknownOutcomeError: The store could not be used at the very beginning.

        Crash: The others see within a lease that it is gone, and take over what it owned.
        """
        presence, sign = _Presence(), self._sign
        sign.fleet, sign.leaving = self._fleet, False
        await sign.join(presence)
        self._health.join(presence, self._listeners)
        try:
            await self._health.emergency.open()
            while not self._leaving.is_set() and not self.ended.issuperset(self.contexts):
                try:
                    await self._look()
                except HoldfastError as error:
                    _log.warning("the fleet cannot look around: %s", error)  # what runs here runs on
                await self._rest()
            await self._hand_over()
        finally:
            for one in self._runs.values():
                one.task.cancel()
            await asyncio.gather(*(one.task for one in self._runs.values()), return_exceptions=True)
            sign.fleet, sign.leaving = "", False
            self._journals.tell_left()
            await self._health.leave(presence)
            await sign.leave(presence)

    async def _rest(self) -> None:
        """Wait until the next look: a part of the lease, or until something ended."""
        sleeping = asyncio.ensure_future(self._sleep(self._sign.lease_seconds / BEATS_PER_LEASE))
        woken = asyncio.ensure_future(self._woken.wait())
        try:
            await asyncio.wait((sleeping, woken), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._woken.clear()
            for task in (sleeping, woken):
                task.cancel()
            await asyncio.gather(sleeping, woken, return_exceptions=True)

    # ------------------------------------------------------------------ looking around

    async def _look(self) -> None:
        await self._watch()
        await self._journals.look(self._runs)
        mates = {holder for holder, row in self._alive.items() if row.fleet == self._fleet and not row.leaving}
        should = assignment(self.contexts, mates | {self._sign.holder})
        mine = {context for context, holder in should.items() if holder == self._sign.holder}
        for context, one in self._runs.items():
            if context not in mine:
                self._told(context, f"handed over to {_named(self._alive, should[context])}")
                one.run.leave()
        await self._let_go(self._left - self._runs.keys() - mine)
        now = self._sign.watch.boot_clock()
        rested = (context for context in mine - self._runs.keys() - self.ended if self._rested(context, now))
        for context, owner in await self._free(sorted(rested)):
            if not self._leaving.is_set():
                self._begin(context, owner)

    async def _let_go(self, contexts: Collection[Context]) -> None:
        """Release what others should run and this worker still owns: their sessions' ends could not be stored."""
        keys = {context_key("owner", context): context for context in contexts}
        found = (await self._store.salvage(*keys))[0] if keys else {}
        for key, context in keys.items():
            loaded = cast("Loaded[Owner] | None", found.get(key))
            if loaded is not None and loaded.row.holder == self._sign.holder and not loaded.row.released:
                try:
                    await self._writer.commit({key: released(loaded.row)}, {key: loaded.version})
                except ConflictError:
                    continue  # look again
            self._left.discard(context)

    async def _watch(self) -> None:
        """Bring up to date who lives. Whoever is new counts as living until it has been silent for its lease."""
        others = {key.entity_name for key in await self._store.keys(KeyPrefix("worker"))} - {self._sign.holder}
        seen = await self._sign.watch.look(*others) if others else {}
        self._alive = {holder: row for holder, (life, row) in seen.items() if row is not None and life is not Life.DEAD}
        for holder, (life, row) in seen.items():
            if row is not None and life is Life.DEAD:
                await self._bury(holder)

    async def _bury(self, holder: str) -> None:
        """Delete the row of a worker that is gone, as it cannot; one that was only paused writes it anew."""
        key = worker_key(holder)
        try:
            await self._writer.commit({key: None}, {key: self._sign.watch.version(holder)})
        except ConflictError:
            pass  # another worker did, or it lives after all

    async def _free(self, contexts: list[Context]) -> list[tuple[Context, Owner | None]]:
        """Return those of ``contexts`` that nobody living owns, each with whoever had it before."""
        keys = {context_key("owner", context): context for context in contexts}
        found, _ = await self._store.salvage(*keys)
        owners = {context: cast("Loaded[Owner] | None", found.get(key)) for key, context in keys.items()}
        held = {one.row.holder for one in owners.values() if one is not None and not one.row.released}
        strangers = held - self._alive.keys() - {self._sign.holder}
        living = set(self._alive)
        if strangers:  # an owner without a sign of life, or one that appeared after the last look
            seen = await self._sign.watch.look(*strangers)
            living |= {holder for holder, (life, row) in seen.items() if row is not None and life is not Life.DEAD}
        return [
            (context, None if one is None else one.row)
            for context, one in owners.items()
            if one is None or one.row.released or one.row.holder not in living
        ]

    # ------------------------------------------------------------------ running

    def _rested(self, context: Context, now: float) -> bool:
        rest = self._rests.get(context)
        return rest is None or now >= rest.until_seconds

    def _begin(self, context: Context, before: Owner | None) -> None:
        try:
            run = self._start(context)
        except HoldfastError as error:
            self._failed(context, error)
            return
        run.stand_aside()
        dead = before is not None and not before.released and before.holder != self._sign.holder
        what = f"taken over from process {before.pid} on {before.host}" if before is not None and dead else "taken"
        self._told(context, what)
        task = asyncio.get_running_loop().create_task(self._follow(context, run), name=f"fleet {context}")
        self._runs[context] = _Run(run, task)

    async def _follow(self, context: Context, run: LiveRun) -> None:
        try:
            async for _ in run:
                pass
            if not run.is_leaving:
                self.ended.add(context)
            self._rests.pop(context, None)
        except HeldError:
            pass  # somebody was quicker, or lives after all
        except FencedError as error:
            self._told(context, f"ended: {error}")
        except Exception as error:  # whatever it is, the other contexts go on
            self._failed(context, error)
        finally:
            await run.aclose()
            self._runs.pop(context, None)
            self._left.add(context)
            self._woken.set()

    def _trouble(self, context: Context, why: str) -> None:
        self._health.tell(self._listeners, "trouble", Trouble(kind="emergency", context=context, why=why))

    def _failed(self, context: Context, error: Exception) -> None:
        """Try again later, and later each time: it may be this worker alone that cannot run it."""
        before, now, lease = self._rests.get(context), self._sign.watch.boot_clock(), self._sign.lease_seconds
        # One that went on for longer than it had rested before is not what fails again and again.
        went_on = before is None or now - before.until_seconds > before.leases * lease
        leases = 1 if before is None or went_on else min(2 * before.leases, _LONGEST_REST_LEASES)
        until = now + leases * lease
        self._rests[context] = _Rest(until, leases)
        self._told(context, f"ended: {error}")

    async def _hand_over(self) -> None:
        """Say that this worker leaves, then leave every context between two candles."""
        self._sign.leaving = True
        try:
            await self._sign.renew()
        except HoldfastError as error:
            _log.warning("the others are not told that this worker leaves: %s", error)
        running = list(self._runs.values())
        for one in running:
            one.run.leave()
        await asyncio.gather(*(one.task for one in running))


def _named(alive: Mapping[str, Worker], holder: str) -> str:
    row = alive.get(holder)
    return "another worker" if row is None else f"process {row.pid} on {row.host}"
