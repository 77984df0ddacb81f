"""Kills around orders: a bot is killed at a numbered step, again and again, and its venue is the witness.

``python tests/order_kills.py [--store URL] [--runs N] [--seed S] [--time-cap SECONDS] [--resume FILE]`` prints what it
found as JSON. Each run has a store of its own, beside the one that is named (default: files).

A step is either side of a call of the store or of the broker. The venue is a process of its own that lives on, and
loses answers and requests, delays them, sends them twice, refuses, fills in part, fills after a cancellation, as each
run's plan says; it refuses repeated ids and expired requests, or does not. A run is one of these:

* ``after``: killed, in every second run once more while it recovers, and started again each time. On a store that
  processes share, half of them as if on another machine: then the lease must be waited out.
* ``waiting``: a second process runs already, and waits, when the first is killed.
* ``paused``: the same, and the first is not killed but stopped past its lease, replaced, and woken.

At the end what the venue holds is compared with the rows.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

sys.path.insert(0, str(Path(__file__).parent))

import order_bot
from order_bot import Life, answer, child, forked
from order_judge import after_refusal, judged, lines, told_of

import holdfast
from holdfast.brokers.paper_venue import VenueProcess
from holdfast.brokers.paper_wire import Fault, Faults
from holdfast.engine.broker import Features, RepeatedIds
from holdfast.testing.places import Place, derived
from holdfast.urls import open_backend, parse_store

Style = Literal["after", "waiting", "paused"]

LEASE_SECONDS = 0.6
BLOCKED_LEASES = 15
"""After so long nobody can replace a stopped owner: it holds a lock of the store's, as one of SQLite's writers may."""
MOST_LIVES = 6
PATIENCE_SECONDS = 300.0
SUBMITS: list[list[Fault]] = [
    [], ["lost_answer"], ["lost_request"], ["late"], ["", "lost_answer"], ["", "lost_request"], ["", "late"],
    ["partial"], ["part_only"], ["resting"], ["reject"], ["", "reject"], ["", "partial"], ["", "part_only"],
    ["slow"], ["lost_answer"] * 6, ["late", "late", "late"], ["", "resting"], ["reject", "", "lost_answer"],
    ["twice"], ["", "twice"],
]  # fmt: skip
CANCELS: list[list[Fault]] = [[], ["lost_answer"], ["lost_request"], ["late"], ["fill_first"], ["fill_after"]]
MODES: list[RepeatedIds] = ["always", "while_open", "never"]
DELAYED: frozenset[str] = frozenset(("late", "slow"))


class Plan(NamedTuple):
    """One run: on which venue, with which faults, killed at which steps."""

    number: int
    mode: RepeatedIds
    refuses_expired: bool
    submits: list[Fault]
    cancels: list[Fault]
    delay_seconds: float
    style: Style
    elsewhere: bool
    kills: list[int]


class Found(msgspec.Struct, kw_only=True):
    """What the runs have come to."""

    runs: int = 0
    kills: int = 0
    pauses: int = 0
    """Owners that were stopped past their lease, replaced and woken."""
    blocked: int = 0
    """Owners that were stopped while they held a lock of the store's, so that nobody could replace them."""
    fenced: int = 0
    """Lives that ended because another process owns the context."""
    takeovers: int = 0
    """Of processes that were waiting already."""
    venue_orders: int = 0
    lost: int = 0
    """Requests whose answer, or which themselves, were lost or late."""
    told: int = 0
    """Runs at venues that promise little, in which a possible duplicate was told."""
    surprises: int = 0
    """Orders that such a venue had twice, or that turned up after they were given up: each of them was told."""
    during: dict[str, int] = {}
    """What the killed were at."""
    twice: list[str] = []
    forgotten: list[str] = []
    without_row: list[str] = []
    other: list[str] = []
    seconds: float = 0.0

    @property
    def wrong(self) -> list[str]:
        """Everything that was wrong."""
        return [*self.twice, *self.forgotten, *self.without_row, *self.other]


def plans(runs: int, seed: int, steps: int, *, shared: bool, first: int = 0) -> list[Plan]:
    """Return the plans: every step of an undisturbed run is killed at in turn, with each kind of fault."""
    made = []
    for number in range(first, first + runs):
        chance = random.Random(f"{seed}/{number}")
        submits = SUBMITS[number % len(SUBMITS)] if number < 2 * steps else chance.choice(SUBMITS)
        step = 1 + (number * 7) % (steps + 6)  # 7 and steps + 6 share no factor, most likely: all come in turn
        kills = [step] if number % 2 == 0 else [step, chance.randint(1, steps)]
        resting = "resting" in submits or "partial" in submits
        made.append(
            Plan(
                number,
                MODES[chance.randrange(3)],
                chance.random() < 0.75,
                list(submits),
                list(chance.choice(CANCELS)) if resting else [],
                chance.choice([0.02, 0.08, 0.25]),
                chance.choices(("after", "waiting", "paused"), (2, 1, 1))[0] if shared else "after",
                shared and chance.random() < 0.5,
                kills,
            )
        )
    return made


class Run:
    """One run, from its first life to the judgement.

    Args:
        plan: What to do.
        venue: Where.
        store: Its own.
        top: Where it gets a directory.
        lease_seconds: On a store that processes share; else 0.
        found: Is added to.
    """

    def __init__(
        self, plan: Plan, venue: VenueProcess, store: Place, top: Path, lease_seconds: float, found: Found
    ) -> None:  # fmt: skip
        self.plan, self.venue, self.store, self.found, self.lease_seconds = plan, venue, store, found, lease_seconds
        self.symbol = f"S{plan.number}USDT"
        """The run's own: no two share orders or positions."""
        self.place = top / str(plan.number)
        self.place.mkdir(parents=True)
        self.note = mmap.mmap(-1, 64)
        self.lives: dict[int, Life] = {}
        """Under way, by process."""
        self.stopped: set[int] = set()
        self.ends: list[str] = []
        self.number = 0

    def run(self) -> None:
        """Kill, restart, and judge."""
        plan = self.plan
        self.venue.set_faults(
            Faults(next=list(plan.submits), next_cancel=list(plan.cancels), delay_seconds=plan.delay_seconds)
        )
        self.venue.heard()
        try:
            if plan.style == "after":
                for kill_at in plan.kills:
                    self._ended(self._start(kill_at))
            else:
                self._taken_over()
            while not self._is_over() and self.number < MOST_LIVES:
                self._ended(self._start(0))
            time.sleep(plan.delay_seconds + 0.05 if DELAYED.intersection(plan.submits + plan.cancels) else 0)
            self._judge()
        finally:
            for pid in self.lives:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        answered = child(self.store.remove, str(self.place / "removal"))
        os.waitpid(answered, 0)
        shutil.rmtree(self.place, ignore_errors=True)

    def _is_over(self) -> bool:
        """Whether the last process to end came to the market's end, or something is wrong."""
        return bool(self.found.wrong) or (bool(self.ends) and self.ends[-1] == "done")

    # ------------------------------------------------------------------ lives

    def _start(self, kill_at: int, *, waits: bool = False, stops: bool = False, holds: bool = False) -> int:
        self.number += 1
        life = Life(
            self.number, self.store.store, self.place, self.venue.broker(), self.symbol, kill_at, stops,
            self.lease_seconds, self.plan.elsewhere, holds,
        )  # fmt: skip
        pid = forked(life, self.note, waits=waits)
        self.lives[pid] = life
        return pid

    def _until(self, there: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> bool:
        """Wait for something; note what becomes of the processes meanwhile. False: it did not come in time."""
        ends = time.monotonic() + seconds
        while True:
            for pid in list(self.lives):
                self._look(pid)
            if there():
                return True
            if time.monotonic() > ends:
                return False
            time.sleep(0.002)

    def _look(self, pid: int) -> None:
        done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if not done:
            return
        if os.WIFSTOPPED(status):
            self.stopped.add(pid)
            return
        life = self.lives.pop(pid)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            self.found.kills += 1
            at = self.note[:].strip(b"\0 ").decode()
            self.found.during[at] = self.found.during.get(at, 0) + 1
            self.ends.append("killed")
        elif status == 0:
            self.ends.append(life.word("end").read_text().split()[0])
            self.found.fenced += self.ends[-1] == "fenced"
        else:
            self.ends.append(f"status {status}")
            words = life.word("words").read_text()[-300:]
            self.found.other.append(
                f"run {self.plan.number}: life {life.number} ended with {status}: {words} {self.plan}"
            )

    def _ended(self, *pids: int) -> None:
        if not self._until(lambda: not self.lives.keys() & set(pids)):
            self.found.other.append(f"run {self.plan.number}: {pids} did not end: {self.plan} {self.ends}")

    def _taken_over(self) -> None:
        """Have a second process wait for the first, end or stop that one, and see it replaced."""
        plan, pauses = self.plan, self.plan.style == "paused"
        first = self._start(plan.kills[0], stops=pauses, holds=True)
        life = self.lives[first]
        self._until(lambda: first not in self.lives or first in self.stopped or life.word("owns").exists())
        if first not in self.lives:
            return  # killed before it owned anything: others are to go on
        second = self._start(plan.kills[1] if len(plan.kills) > 1 else 0, waits=True)
        other = self.lives[second]
        self._until(lambda: second not in self.lives or other.word("waits").exists() or other.word("owns").exists())
        life.word("goes").touch()
        self._until(lambda: first not in self.lives or first in self.stopped)
        if first in self.stopped:
            replaced = self._until(
                lambda: second not in self.lives or other.word("took").exists() or other.word("owns").exists(),
                BLOCKED_LEASES * self.lease_seconds,
            )
            self.found.pauses += replaced
            self.found.blocked += not replaced
            chance = random.Random(plan.number)
            self._until(lambda: second not in self.lives, chance.choice([0.0, 0.05, 0.3]))
            self.stopped.discard(first)
            os.kill(first, signal.SIGCONT)
        self._ended(first, second)
        self.found.takeovers += other.word("took").exists()

    # ------------------------------------------------------------------ judging

    def _judge(self) -> None:
        plan, found = self.plan, self.found
        record, faults = lines(self.place), set[str]([*plan.submits, *plan.cancels])
        told, books = told_of(record), self.venue.witness()
        wrong: list[str] = after_refusal(record, self.venue.heard())
        if not found.other:
            url, symbol, features = self.store.store, self.symbol, self.venue.features
            more, surprises = answer(
                lambda: judged(url, symbol, features, told, faults, books), self.place, "judgement"
            )  # fmt: skip
            wrong += more
            found.surprises += surprises
        found.runs += 1
        found.lost += sum(one in ("lost_answer", "lost_request", "late") for one in plan.submits + plan.cancels)
        found.told += bool(told)
        found.venue_orders += sum(one.symbol == self.symbol for one in books.orders)
        where = {"twice": found.twice, "forgotten": found.forgotten, "position": found.without_row}
        for text in wrong:
            kind = where.get(text.partition(":")[0], found.other)
            kind.append(f"run {plan.number}: {text}; {plan} {self.ends} told {sorted(told)}")


def hunt(
    runs: int, *, store: str = "", seed: int = 1, time_cap: float = math.inf, resume: Path | None = None,
    only: int = -1, part: tuple[int, int] = (0, 1), first: int = 0,
    stretch: float = 1.0,
) -> Found:  # fmt: skip
    """Do one of so many parts of ``runs`` runs; with ``resume`` go on where that file stopped.

    Args:
        stretch: Makes every validity and lease so many times longer, for a machine that is busy with other things: a
            process that gets no processor for a lease sends no order.
    """
    holdfast.set_config(
        entry_validity_seconds=0.15 * stretch, exit_validity_seconds=0.1 * stretch, order_grace_seconds=0.05 * stretch
    )
    order_bot.MOST_SECONDS *= max(1.0, stretch)
    found, began, ends = Found(), time.monotonic(), time.monotonic() + time_cap
    if resume is not None and resume.exists():
        found = msgspec.json.decode(resume.read_bytes(), type=Found)
    before = found.seconds
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-order-kills-")))
        shared = bool(store) and not parse_store(store).folders[0]
        lease_seconds = stretch * LEASE_SECONDS if shared else 0.0
        place = store or str(top / "data")
        open_backend(place)  # imports the driver, once; nothing is opened here
        venues: dict[Features, VenueProcess] = {}
        word = f"k{os.getpid():x}"
        steps = _undisturbed(derived(place, f"{word}steps"), top, lease_seconds, venues, stack)
        for plan in plans(runs, seed, steps, shared=shared, first=first)[part[0] :: part[1]][found.runs :]:
            if only not in (-1, plan.number):
                continue
            if time.monotonic() > ends or found.wrong:
                break
            venue = _venue(plan.mode, plan.refuses_expired, venues, stack)
            Run(plan, venue, derived(place, f"{word}r{plan.number}"), top, lease_seconds, found).run()
            found.seconds = round(before + time.monotonic() - began, 1)
            if resume is not None:
                resume.write_bytes(msgspec.json.encode(found))
    return found


def _venue(mode: RepeatedIds, expired: bool, venues: dict[Features, VenueProcess], stack: ExitStack) -> VenueProcess:
    """Return a venue that promises this, started when it is first needed."""
    features = Features(refuses_repeated_ids=mode, refuses_expired=expired, reduce_only=True)
    if features not in venues:
        venues[features] = stack.enter_context(VenueProcess(features))
    return venues[features]


def _undisturbed(
    store: Place, top: Path, lease_seconds: float, venues: dict[Features, VenueProcess], stack: ExitStack
) -> int:  # fmt: skip
    """Return how many steps an undisturbed run takes."""
    found = Found()
    plan = Plan(0, "always", True, [], [], 0.0, "after", False, [])
    run = Run(plan, _venue("always", True, venues, stack), store, top / "steps", lease_seconds, found)
    pid = run._start(0)
    life = run.lives[pid]
    run._ended(pid)
    if found.wrong:
        raise RuntimeError(f"the run that was to be left alone failed: {found.wrong}")
    steps = int(life.word("end").read_text().split()[1])
    os.waitpid(child(store.remove, str(run.place / "removal")), 0)
    assert steps > 20, steps
    return steps


def main(argv: Sequence[str]) -> int:
    """Hunt, print what was found, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="", metavar="URL", help="beside which each run has its own (default: files)")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, metavar="RUN", help="number of the first run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, default=-1, metavar="RUN", help="this one alone")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="part I of N, counted from 0")
    parser.add_argument("--time-cap", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--stretch", type=float, default=1.0, metavar="F", help="leases and validities F times as long")
    parser.add_argument("--resume", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    this, _, all_parts = options.part.partition("/")
    found = hunt(
        options.runs, store=options.store, seed=options.seed, time_cap=options.time_cap, resume=options.resume,
        only=options.only, part=(int(this), int(all_parts)), first=options.first, stretch=options.stretch,
    )  # fmt: skip
    print(json.dumps(msgspec.to_builtins(found)))
    return int(bool(found.wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
