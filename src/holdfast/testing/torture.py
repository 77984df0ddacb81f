"""Torture: kill a live run again and again, and compare it with one that was never killed.

One round is a market of its own that waits for the bot, a run that nobody touches, and a run over the same
candles that is killed at random instants and at numbered steps, until the market ends. After each kill the store
is opened read-only: every invariant must hold, and every commit that was acknowledged must be there.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from ..backends.file import FileBackend
from ..contract import Key
from ..errors import FailedError, HoldfastError
from ..invariants import check_store
from ..market.process import MarketProcess
from ..rows import Outage
from ..store import Store
from .witness import Witness
from .zygote import Zygote

COMPARED = ("ledger", "risk", "partial", "signal", "schedule")
"""Domains whose rows must be the same, byte for byte, as those of the run that was never killed."""
KILLS_PER_ROUND = 100
MOST_IDLE_ROUNDS = 5
"""Rounds in a row whose market ended before anybody was killed."""
FIRST_STEPS = 30
"""Changing file-system calls from the start of a process: all of its opening and recovery."""
PHASE_STEPS = 4
"""Changing file-system calls from the beginning of a commit: its own two, and what follows."""
PHASES = (
    "recovering",
    "opening",
    "scheduling",
    "activating",
    "partial",
    "closing",
    "cancelled",
    "rejected",
    "delivering",
)
_LONGEST_LIFE_SECONDS = 300.0


class Plan(msgspec.Struct, kw_only=True):
    """What to torture, and how much."""

    bot: str
    kills: int
    seed: int = 1
    steps: bool = False
    """First kill at every numbered step, besides the random kills."""
    work: str
    """Directory for the stores, the logs and the result of each round."""
    time_cap_seconds: float = 0.0
    """Begin no round after so many seconds; 0 for no cap."""
    market: Callable[[int], Sequence[str]]
    """Arguments of the market server for a seed; it waits for its participants unless ``expected`` is given."""
    expected: Callable[[int, Mapping[str, Sequence[Outage]]], Awaitable[dict[Key, bytes]]] | None = None
    """For a market that does not wait: what must be stored at its end, by seed and recorded outages."""
    run_seconds: float = 1.0
    """For a market that does not wait: how long it takes."""
    run: Sequence[str] = ()
    """More arguments for ``holdfast run``."""


class Round(msgspec.Struct, kw_only=True):
    """What one round, or several added up, showed."""

    seed: int = 0
    kills: int = 0
    steps: list[str] = []
    """Numbered steps that were tried: killed there, or the market ended before it came."""
    during: dict[str, int] = {}
    """How many kills hit a process that was doing this."""
    lives: int = 0
    recoveries: int = 0
    """Restarts after a kill that came to serve again."""
    commits: int = 0
    """Acknowledged to the witness."""
    lost: list[str] = []
    duplicated: list[str] = []
    broken: list[str] = []
    """Invariants that did not hold, and runs that failed."""
    events_repeated: int = 0
    trades: int = 0
    identical: bool = True
    differences: list[str] = []
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing was lost, duplicated, broken or different."""
        return self.identical and not (self.lost or self.duplicated or self.broken)

    def __iadd__(self, other: Round) -> Round:
        during = Counter(self.during)
        during.update(other.during)
        self.during = dict(during)
        for name in ("kills", "steps", "lives", "recoveries", "commits", "lost", "duplicated", "broken",
                     "events_repeated", "trades", "differences", "seconds"):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.identical = self.identical and other.identical
        return self


def numbered_steps() -> list[str]:
    """Return every numbered step: of the opening and recovery, and of a commit of each phase."""
    return [str(n) for n in range(1, FIRST_STEPS + 1)] + [
        f"{phase}:{n}" for phase in PHASES for n in range(1, PHASE_STEPS + 1)
    ]


def torture(plan: Plan, progress: Callable[[Round, int], None] = lambda so_far, kills: None) -> Round:
    """Run rounds until the plan's kills are done; rounds that the work directory has results of count.

    Args:
        plan: What to do.
        progress: Told after each kill: what is known so far, and how many kills there will be.

    Returns:
        All rounds added up; ``ok`` is False on any loss.
    """
    began = time.monotonic()
    work = Path(plan.work)
    work.mkdir(parents=True, exist_ok=True)
    results = work / "rounds.jsonl"
    total = Round(seed=plan.seed)
    number = 0
    if results.exists():
        for line in results.read_bytes().splitlines():
            total += msgspec.json.decode(line, type=Round)
            number += 1
    steps = numbered_steps() if plan.steps else []
    wanted = plan.kills + len(steps)
    idle = 0
    with Zygote() as zygote:
        while (todo := [step for step in steps if step not in total.steps]) or total.kills < wanted:
            if plan.time_cap_seconds and time.monotonic() - began > plan.time_cap_seconds:
                break
            one = _Round(plan, plan.seed * 1000 + number, zygote, work / f"round-{number}")
            so_far = total

            def told(round_: Round, so_far: Round = so_far) -> None:
                shown = Round()
                shown += so_far
                shown += round_
                progress(shown, wanted)

            kills = min(KILLS_PER_ROUND, max(wanted - total.kills, len(todo)))
            found = one.run(kills, todo[:KILLS_PER_ROUND], told)
            with results.open("ab") as file:
                file.write(msgspec.json.encode(found) + b"\n")
            total += found
            number += 1
            if found.ok:
                shutil.rmtree(work / f"round-{number - 1}")
            idle = 0 if found.kills else idle + 1
            if not found.ok or idle >= MOST_IDLE_ROUNDS:
                break
    return total


class _Round:
    def __init__(self, plan: Plan, seed: int, zygote: Zygote, place: Path) -> None:
        self.plan = plan
        self.seed = seed
        self.zygote = zygote
        self.place = place
        self.rng = random.Random(seed)
        self.found = Round(seed=seed)
        self.start_seconds = 0.1
        """How long a process takes from its start to the end of its recovery; measured."""
        self.run_seconds = 1.0

    def run(self, kills: int, steps: Sequence[str], told: Callable[[Round], None]) -> Round:
        began = time.monotonic()
        shutil.rmtree(self.place, ignore_errors=True)  # of a round that was itself cut short
        self.place.mkdir(parents=True)
        if self.plan.expected is None:
            with MarketProcess(list(self.plan.market(self.seed))) as market:
                self._never_killed(market.address)
        else:
            self.run_seconds = self.plan.run_seconds
        with MarketProcess(list(self.plan.market(self.seed))) as market:
            self._killed(market.address, kills, self._plans(kills, steps), told)
        if not self.found.broken:
            self._compare()
        self.found.seconds = round(time.monotonic() - began, 2)
        return self.found

    def _arguments(self, name: str, address: str) -> list[str]:
        return ["run", self.plan.bot, "--store", str(self.place / name), "--market", address, "--json", *self.plan.run]

    def _start(self, name: str, address: str, kill_at: str = "") -> int:
        extra = ["--kill-at", kill_at] if kill_at else []
        return self.zygote.start(
            [*self._arguments(name, address), *extra],
            witness=str(self.place / f"{name}.witness"), log=str(self.place / f"{name}.log"),
        )  # fmt: skip

    def _never_killed(self, address: str) -> None:
        witness = Witness(self.place / "whole.witness")
        began = time.monotonic()
        pid = self._start("whole", address)
        ended = None
        while ended is None and time.monotonic() - began < _LONGEST_LIFE_SECONDS:
            ended = self.zygote.ended(0.005 if pid not in witness.ready else 1.0)
            if pid not in witness.ready:
                witness.read()
                self.start_seconds = time.monotonic() - began
        self.run_seconds = max(time.monotonic() - began - self.start_seconds, 0.05)
        if ended is None:
            self.zygote.kill(pid)
        if ended != 0:
            raise FailedError(f"the run that was to be left alone ended with {ended}: {self._last_words('whole')}")

    def _plans(self, kills: int, steps: Sequence[str]) -> Iterator[tuple[str, float]]:
        """Yield how each life ends: at a numbered step, or after so many seconds, whichever comes first."""
        yield from ((step, _LONGEST_LIFE_SECONDS) for step in steps)
        named = numbered_steps()
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
        self, address: str, kills: int, plans: Iterator[tuple[str, float]], told: Callable[[Round], None]
    ) -> None:
        found, witness = self.found, Witness(self.place / "killed.witness")
        while True:
            step, seconds = next(plans) if found.kills < kills else ("", _LONGEST_LIFE_SECONDS)
            pid = self._start("killed", address, step)
            found.lives += 1
            ended = self.zygote.ended(seconds)
            if ended is None:
                ended = self.zygote.kill(pid)
                if seconds == _LONGEST_LIFE_SECONDS:
                    found.broken.append(f"life {found.lives} (kill at {step or 'never'}) neither ended nor died")
            if step and seconds == _LONGEST_LIFE_SECONDS:
                found.steps.append(step)
            witness.read()
            found.commits, found.events_repeated = witness.acknowledged, witness.repeated_events
            found.recoveries = max(0, len(witness.ready) - 1)
            if ended == -signal.SIGKILL:
                found.kills += 1
                during = witness.died_during(pid)
                found.during[during] = found.during.get(during, 0) + 1
            self._look(witness, f"after life {found.lives} ({step or f'{seconds:.3f} s'})")
            told(found)
            if found.broken or found.lost:
                return
            if ended == 0:
                return
            if ended != -signal.SIGKILL:
                found.broken.append(f"life {found.lives} ended with {ended}: {self._last_words('killed')}")
                return

    def _look(self, witness: Witness, when: str) -> None:
        """Open the killed store read-only: what was acknowledged is there, and every invariant holds."""
        place = self.place / "killed"
        if not (place / ".holdfast" / "commit.log").exists():
            if witness.acknowledged:
                self.found.lost.append(f"{when}: the log is gone")
            return

        async def look() -> None:
            backend = FileBackend(place)
            store = Store(backend)
            await store.open(read_only=True)
            try:
                self.found.lost += [f"{when}: {loss}" for loss in await witness.losses(backend)]
                self.found.broken += [f"{when}: {violation}" for violation in await check_store(store)]
                self.found.broken += [f"{when}: {reason}" for reason in store.damaged.values()]
            finally:
                await store.close()

        try:
            asyncio.run(look())
        except HoldfastError as error:
            self.found.broken.append(f"{when}: {type(error).__name__}: {error}")

    def _compare(self) -> None:
        killed = asyncio.run(payloads(self.place / "killed"))
        if self.plan.expected is None:
            whole = asyncio.run(payloads(self.place / "whole"))
        else:
            outages = asyncio.run(recorded_outages(self.place / "killed"))
            whole = asyncio.run(self._expected(outages))
            killed = {key: payload for key, payload in killed.items() if key.domain in ("ledger", "signal", "schedule")}
        found = self.found
        for key in sorted({*whole, *killed}):
            if whole.get(key) == killed.get(key):
                continue
            text = f"seed {self.seed}: {key}: {_short(whole.get(key))} became {_short(killed.get(key))}"
            found.differences.append(text)
            if key.domain == "ledger":
                (found.duplicated if key not in whole else found.lost).append(text)
        found.identical = not found.differences
        found.trades = sum(key.domain == "ledger" for key in whole)

    async def _expected(self, outages: Mapping[str, Sequence[Outage]]) -> dict[Key, bytes]:
        assert self.plan.expected is not None
        return await self.plan.expected(self.seed, outages)

    def _last_words(self, name: str) -> str:
        log = self.place / f"{name}.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-8:]) if log.exists() else "(it said nothing)"


def _short(payload: bytes | None) -> str:
    return "nothing" if payload is None else payload.decode(errors="replace")[:400]


async def payloads(place: Path, domains: Sequence[str] = COMPARED) -> dict[Key, bytes]:
    """Return the stored bytes of every row of these domains, read-only."""
    backend = FileBackend(place)
    await backend.open(read_only=True)
    try:
        found: dict[Key, bytes] = {}
        async for scope in backend.scopes():
            keys = [key async for key in backend.keys(scope) if key.domain in domains]
            found |= {key: record.payload for key, record in (await backend.read(scope, keys)).items()}
        return found
    finally:
        await backend.close()


async def recorded_outages(place: Path) -> dict[str, list[Outage]]:
    """Return where entries were forbidden, by the entity name of the context, read-only."""
    store = Store(FileBackend(place))
    await store.open(read_only=True)
    try:
        found: dict[str, list[Outage]] = {}
        for key, loaded in (await store.scan("outage")).items():
            if isinstance(loaded.row, Outage):
                found.setdefault(key.entity_name, []).append(loaded.row)
        return found
    finally:
        await store.close()
