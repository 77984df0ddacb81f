"""One round of torture: a run that nobody touches, one that is killed, and what the store shows after each kill."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from ..brokers.paper_venue import VenueProcess
from ..brokers.paper_wire import Books
from ..contract import Backend, Key, Survives
from ..errors import FailedError, HoldfastError, NotFoundError
from ..invariants import check_store
from ..market.process import MarketProcess
from ..rows import Outage, Row
from ..store import Store
from .desk import compared, faults
from .places import Place, derived, retrying
from .plan import ORDER_PHASES, Plan, Round, numbered_steps
from .witness import Witness
from .zygote import Zygote

COMPARED = ("ledger", "risk", "partial", "signal", "schedule")
"""Domains whose rows must be the same, byte for byte, as those of the run that was never killed."""
PREDICTED = ("ledger", "signal", "schedule")
"""Domains that the pure step foretells."""
_LONGEST_LIFE_SECONDS = 300.0
_LONGEST_OUTAGE_SECONDS = 120.0
"""How long a bot may take to go on after its server is back."""
_BLOCKED_LEASES = 15
"""After so long nobody can replace a stopped owner: it holds a lock of the store's, as one of SQLite's writers may."""
_LOOK_SECONDS = 0.005
"""How often it is looked whether a bot has come to serve, or has gone on."""


class _Life(NamedTuple):
    """How one process ends: at a numbered step, or after so many seconds, whichever comes first."""

    step: str
    seconds: float
    server_kills: int = 0
    """So many kills of its server come before."""


class OneRound:
    """A round, with a directory for its logs and two stores of its own.

    Args:
        plan: What to do.
        seed: For the market and for chance.
        zygote: Starts the bots.
        place: For logs, and for the stores where the plan names none.
        word: For the names of the stores.
        server: Kills the server and starts it again.
    """

    def __init__(
        self, plan: Plan, seed: int, zygote: Zygote, place: Path, word: str, server: Callable[[], None] | None
    ) -> None:
        self.plan = plan
        self.seed = seed
        self.zygote = zygote
        self.place = place
        self.server = server
        self.word = word
        self.rng = random.Random(seed)
        self.found = Round(seed=seed)
        self.stores = {name: self._own_store(name) for name in ("whole", "killed")}
        self.witness = Witness(place / "killed.witness")
        self.start_seconds = 0.1
        """How long a process takes from its start to the end of its recovery; measured."""
        self.run_seconds = 1.0
        self.venue: VenueProcess | None = None
        """Where the run that is under way trades, if it does."""
        self.before = Round()
        """What the rounds before showed, added up."""
        self.other: Zygote | None = None
        """Starts processes that wait for the first to go."""

    def run(
        self, kills: int, server_kills: int, steps: Sequence[str], told: Callable[[Round], None]
    ) -> Round:  # fmt: skip
        """Run it until the market ends, or something is found wrong."""
        began = time.monotonic()
        shutil.rmtree(self.place, ignore_errors=True)  # of a round that was itself cut short
        self.place.mkdir(parents=True)
        self.remove()
        if self.plan.waits:
            with MarketProcess(list(self.plan.market(self.seed))) as market, self._venue():
                self._never_killed(market.address)
        else:
            self.run_seconds = self.plan.run_seconds
        with (
            MarketProcess(list(self.plan.market(self.seed))) as market,
            self._venue() as venue,
            Zygote() if self.plan.takeovers or self.plan.pauses else nullcontext() as self.other,
        ):
            if venue is not None:
                venue.set_faults(faults(self.seed))
            self._killed(market.address, kills, server_kills, steps, told)
            if venue is not None and not self.found.broken:
                self._compare_orders(venue.witness())
        if not self.found.broken:
            self._compare()
        self.found.seconds = round(time.monotonic() - began, 2)
        return self.found

    @contextmanager
    def _venue(self) -> Iterator[VenueProcess | None]:
        """Start the venue of one run, where the bot is to trade."""
        if not self.plan.orders:
            yield None
            return
        with VenueProcess() as self.venue:
            yield self.venue
        self.venue = None

    def _own_store(self, name: str) -> Place:
        if not self.plan.store:
            return Place(str(self.place / name))
        # A bot decides late what it could not store; a market that waits for the bot, and not for the server, would
        # run through hours while the server is away. So where servers are killed, the store is one that waits.
        store = retrying(self.plan.store) if self.plan.server_kills else self.plan.store
        return derived(store, f"{self.word}_{name}")

    def names(self) -> list[str]:
        """Return the names of its stores, without credentials."""
        return [f"{self.word}_{name}" for name in self.stores] if self.plan.store else [str(self.place)]

    def remove(self) -> list[str]:
        """Remove its stores; return the names of those that could not be, which is told and not more."""
        kept = []
        for name, store in self.stores.items():
            try:
                store.remove()
            except Exception as error:  # of whatever driver; its text may hold what must not be shown
                kept.append(f"{self.word}_{name} ({type(error).__name__})")
        return kept

    def _start(self, name: str, address: str, kill_at: str = "", *, by: Zygote | None = None) -> int:
        arguments = ["run", self.plan.bot, "--store", self.stores[name].store, "--market", address, "--json"]
        extra = ["--kill-at", kill_at] if kill_at else []
        if self.venue is not None:
            extra += ["--venue", self.venue.address]
        if self.plan.takeovers or self.plan.pauses:
            extra += ["--on-conflict", "wait", "--lease", f"{self.plan.lease_seconds:g}"]
        return (by or self.zygote).start(
            [*arguments, *self.plan.run, *extra],
            witness=str(self.place / f"{name}.witness"), log=str(self.place / f"{name}.log"),
        )  # fmt: skip

    def _never_killed(self, address: str) -> None:
        witness = Witness(self.place / "whole.witness")
        began = time.monotonic()
        pid = self._start("whole", address)
        ended = None
        while ended is None and time.monotonic() - began < _LONGEST_LIFE_SECONDS:
            ended = self.zygote.ended(_LOOK_SECONDS if pid not in witness.ready else 1.0)
            if pid not in witness.ready:
                witness.read()
                self.start_seconds = time.monotonic() - began
        self.run_seconds = max(time.monotonic() - began - self.start_seconds, 0.05)
        if ended is None:
            self.zygote.kill(pid)
        if ended != 0:
            raise FailedError(f"the run that was to be left alone ended with {ended}: {self._last_words('whole')}")

    def _lives(self, kills: int, server_kills: int, steps: Sequence[str]) -> Iterator[_Life]:
        """Yield how each life ends; the kills of the server are spread over them."""
        every = max(1, kills // server_kills) if server_kills else 0
        for number, (step, seconds) in enumerate(self._ends(kills, steps)):
            with_server = bool(every) and number % every == 0 and self.found.server_kills < server_kills
            yield _Life(step, seconds, int(with_server))

    def _ends(self, kills: int, steps: Sequence[str]) -> Iterator[tuple[str, float]]:
        yield from ((step, _LONGEST_LIFE_SECONDS) for step in steps)
        named = numbered_steps(orders=self.plan.orders)
        mean_seconds = 0.8 * self.run_seconds / max(kills, 1)
        while True:
            draw = self.rng.random()
            if draw < 0.25:
                yield self.rng.choice(named), self.start_seconds + self.rng.uniform(0.0, 4 * mean_seconds)
            elif draw < 0.5:  # short-lived: dies while it recovers from the kill before
                yield "", self.rng.uniform(0.0, 1.3 * self.start_seconds)
            else:
                yield "", self.start_seconds + self.rng.uniform(0.0, 2 * mean_seconds)

    def _killed(
        self, address: str, kills: int, server_kills: int, steps: Sequence[str], told: Callable[[Round], None]
    ) -> None:
        lives = self._lives(kills, server_kills, steps)
        found, witness = self.found, self.witness
        while True:
            done = found.kills >= kills and found.server_kills >= server_kills
            life = _Life("", _LONGEST_LIFE_SECONDS) if done else next(lives)
            pid = self._start("killed", address, life.step)
            found.lives += 1
            ended = None
            if life.seconds < _LONGEST_LIFE_SECONDS and (relay := self._relay_due(kills)):
                pid, ended = self._relayed(pid, address, relay)
            if ended is None:
                ended = self._live(pid, life)
            if life.step and life.seconds == _LONGEST_LIFE_SECONDS:
                found.steps.append(life.step)
            self._count()
            if ended == -signal.SIGKILL:
                found.kills += 1
                during = witness.died_during(pid)
                found.during[during] = found.during.get(during, 0) + 1
                found.twice_in_a_row += during == "recovering" and found.lives > 1
                found.order_kills += during in ORDER_PHASES
            self._look(f"after life {found.lives} ({life.step or f'{life.seconds:.3f} s'})")
            told(found)
            if found.broken or found.lost:
                return
            if ended == 0:
                return
            if ended != -signal.SIGKILL:
                found.broken.append(f"life {found.lives} ended with {ended}: {self._last_words('killed')}")
                return

    def _live(self, pid: int, life: _Life) -> int:
        """Wait for the end of a process, or bring it about; return how it ended."""
        for _ in range(life.server_kills):
            ended = self._lose_server(pid)
            if ended is not None:
                return ended
        ended = self.zygote.ended(life.seconds)
        if ended is None:
            ended = self.zygote.kill(pid)
            if life.seconds == _LONGEST_LIFE_SECONDS:
                self.found.broken.append(f"life {self.found.lives} (kill at {life.step or 'never'}) did not end")
        return ended

    def _relay_due(self, kills: int) -> str:
        """Say whether this life is to be followed by one that waits for its end: ``pause``, ``kill``, or neither."""
        found, plan = self.found, self.plan
        wanted = plan.takeovers + plan.pauses
        every = max(2, kills // wanted) if wanted else 0
        if not every or found.lives % every:
            return ""
        pauses = self.before.pauses + found.pauses
        if pauses + found.blocked < plan.pauses and (found.lives // every) % 2:
            return "pause"
        if self.before.takeovers + found.takeovers < plan.takeovers:
            return "kill"
        return "pause" if pauses < plan.pauses else ""

    def _relayed(self, pid: int, address: str, relay: str) -> tuple[int, int | None]:
        """Have a second process wait, kill or stop the first, and see it replaced.

        Returns:
            The process that goes on; or the first, and how it ended before anything could be done to it.
        """
        assert self.other is not None
        found, witness = self.found, self.witness
        before = self._until(pid, lambda: pid in witness.ready, "came to serve")
        if before is not None:
            return pid, before
        second = self._start("killed", address, by=self.other)
        found.lives += 1
        time.sleep(self.start_seconds + self.rng.uniform(0.0, self.run_seconds / 20))
        if relay == "kill":
            ended = self.zygote.kill(pid)
            found.kills += ended == -signal.SIGKILL
            found.takeovers += ended == -signal.SIGKILL
        else:
            os.kill(pid, signal.SIGSTOP)
            ends, gone = time.monotonic() + _BLOCKED_LEASES * self.plan.lease_seconds, None
            while gone is None and second not in witness.ready and time.monotonic() < ends:
                gone = self.other.ended(_LOOK_SECONDS)
                witness.read()
            os.kill(pid, signal.SIGCONT)
            if gone is not None and gone != 0:
                found.broken.append(
                    f"life {found.lives}, which waited, ended with {gone}: {self._last_words('killed')}"
                )
            replaced = second in witness.ready
            found.pauses, found.blocked = found.pauses + replaced, found.blocked + (not replaced and gone is None)
            if not replaced:
                if gone is None:
                    self.other.kill(second)
                return pid, None
            if self.zygote.ended(_LONGEST_OUTAGE_SECONDS) is None:
                found.broken.append(f"life {found.lives - 1} was replaced while it was stopped, and goes on")
                self.zygote.kill(pid)
        self.zygote, self.other = self.other, self.zygote
        return second, None

    def _compare_orders(self, books: Books) -> None:
        """Compare what the venue holds with the rows of the run that was killed."""

        async def rows() -> list[Row]:
            store = Store(self.stores["killed"].backend(), require=Survives.NOTHING)
            await store.open(read_only=True)
            try:
                found, _ = await store.salvage(
                    *[key for key in await store.keys() if key.domain in ("order", "signal")]
                )
                return [loaded.row for loaded in found.values()]
            finally:
                await store.close()

        self.found.orders, self.found.answers_lost = len(books.orders), books.lost
        self.found.broken += [f"seed {self.seed}: {text}" for text in compared(asyncio.run(rows()), books)]

    def _lose_server(self, pid: int) -> int | None:
        """Kill the server under a bot that serves, and see the bot go on; return its end if it ends meanwhile."""
        assert self.server is not None
        ended = self._until(pid, lambda: pid in self.witness.ready, "came to serve")
        if ended is None:
            ended = self.zygote.ended(self.rng.uniform(0.0, self.run_seconds / 50))
        if ended is not None:
            return ended
        self.server()
        self._count()
        self._look(f"after kill {self.found.server_kills + 1} of the server", running=True)
        before = self.witness.acknowledged
        ended = self._until(pid, lambda: self.witness.acknowledged > before, "went on after its server was back")
        if ended in (None, 0):
            self.found.server_kills += 1
        return ended

    def _until(self, pid: int, there: Callable[[], bool], what: str) -> int | None:
        """Wait for something that the witness tells; return the end of the process if that comes first."""
        end = time.monotonic() + _LONGEST_OUTAGE_SECONDS
        while not there():
            ended = self.zygote.ended(_LOOK_SECONDS)
            self.witness.read()
            if ended is not None:
                return ended
            if time.monotonic() > end:
                self.found.broken.append(
                    f"life {self.found.lives} never {what}, in {_LONGEST_OUTAGE_SECONDS:.0f} s: "
                    f"{self._last_words('killed')}"
                )
                return self.zygote.kill(pid)
        return None

    def _count(self) -> None:
        found, witness = self.found, self.witness
        witness.read()
        found.commits, found.events_repeated = witness.acknowledged, witness.repeated_events
        found.recoveries = max(0, len(witness.ready) - 1)

    def _look(self, when: str, *, running: bool = False) -> None:
        """Open the killed store read-only: what was acknowledged is there, and every invariant holds.

        Args:
            when: For the report.
            running: Somebody writes meanwhile: rows read one after the other then need not agree.
        """

        async def look() -> None:
            backend = self.stores["killed"].backend()
            store = Store(backend, require=Survives.NOTHING)
            await store.open(read_only=True)
            try:
                self.found.lost += [f"{when}: {loss}" for loss in await self.witness.losses(backend)]
                if not running:
                    self.found.broken += [f"{when}: {violation}" for violation in await check_store(store)]
                    self.found.broken += [f"{when}: {reason}" for reason in store.damaged.values()]
            finally:
                await store.close()

        try:
            asyncio.run(look())
        except NotFoundError:
            if self.witness.acknowledged:
                self.found.lost.append(f"{when}: the store is gone")
        except HoldfastError as error:
            self.found.broken.append(f"{when}: {type(error).__name__}: {error}")

    def _compare(self) -> None:
        """Compare with the run that was never killed; where candles were closed to entries, with the pure step.

        They are where the market did not wait, and where the store was away for so long that the engine entered
        nothing (:mod:`holdfast.engine.modes`); both are on record as outages.
        """
        killed = asyncio.run(payloads(self.stores["killed"].backend()))
        outages = asyncio.run(recorded_outages(self.stores["killed"].backend()))
        if self.plan.waits and outages == asyncio.run(recorded_outages(self.stores["whole"].backend())):
            whole = asyncio.run(payloads(self.stores["whole"].backend()))
        else:
            whole = asyncio.run(self._expected(outages))
            killed = {key: payload for key, payload in killed.items() if key.domain in PREDICTED}
        found = self.found
        found.trades = sum(key.domain == "ledger" for key in whole)
        if self.plan.shares_limits and (found.takeovers or found.pauses):
            found.uncompared = 1
            return
        for key in sorted({*whole, *killed}):
            if whole.get(key) == killed.get(key):
                continue
            text = f"seed {self.seed}: {key}: {_short(whole.get(key))} became {_short(killed.get(key))}"
            found.differences.append(text)
            if key.domain == "ledger":
                (found.duplicated if key not in whole else found.lost).append(text)
        found.identical = not found.differences

    async def _expected(self, outages: Mapping[str, Sequence[Outage]]) -> dict[Key, bytes]:
        assert self.plan.expected is not None
        return await self.plan.expected(self.seed, outages)

    def _last_words(self, name: str) -> str:
        log = self.place / f"{name}.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-8:]) if log.exists() else "(it said nothing)"


def _short(payload: bytes | None) -> str:
    return "nothing" if payload is None else payload.decode(errors="replace")[:400]


async def payloads(backend: Backend, domains: Sequence[str] = COMPARED) -> dict[Key, bytes]:
    """Return the stored bytes of every row of these domains, read-only."""
    await backend.open(read_only=True)
    try:
        found: dict[Key, bytes] = {}
        async for scope in backend.scopes():
            keys = [key async for key in backend.keys(scope) if key.domain in domains]
            found |= {key: record.payload for key, record in (await backend.read(scope, keys)).items()}
        return found
    finally:
        await backend.close()


async def recorded_outages(backend: Backend) -> dict[str, list[Outage]]:
    """Return where entries were forbidden, by the entity name of the context, read-only."""
    store = Store(backend, require=Survives.NOTHING)
    await store.open(read_only=True)
    try:
        found: dict[str, list[Outage]] = {}
        for key, loaded in (await store.scan("outage")).items():
            if isinstance(loaded.row, Outage):
                found.setdefault(key.entity_name, []).append(loaded.row)
        return found
    finally:
        await store.close()
