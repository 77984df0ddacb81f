"""Playing one history: a plan in, what came of it out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from random import Random

import msgspec

from ...contract import Key, Op, Record
from .journal import disk
from .loop import Scheduler, StuckError, no_spinning
from .market import SimulatedMarket
from .oracle import Oracle
from .plan import Plan, SimulatedProcess, drawn
from .process import Process
from .seams import simulated_surroundings, tokens
from .storage import SharedMemory
from .trades import TradeOracle
from .venue import SharedVenue

_AFTER_SECONDS = 30.0
"""How long after the end of the market the last process starts, which takes everything over."""
_LONGEST_SECONDS = 7200.0
"""How long that may take."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one history."""

    plan: Plan
    violations: tuple[str, ...]
    """What must not be, first thing first; empty is good."""
    trace: str
    """A hash of everything that happened: the same plan gives the same one."""
    lines: tuple[str, ...]
    """Everything that happened."""
    commits: int
    """How many the storage accepted."""
    events: int
    """How many different events were committed."""
    orders: int = 0
    """How many the venue took."""

    @property
    def ok(self) -> bool:
        """Whether nothing was violated."""
        return not self.violations


class World:
    """All that one history consists of."""

    def __init__(self, plan: Plan, *, told: bool = True) -> None:
        self.plan, self._told = plan, told
        self.lines: list[str] = []
        self.violations: list[str] = []
        self.commits = 0
        self.late_seconds = 0.0
        """When the last thing is over that was held up."""
        self.scheduler = Scheduler(Random(plan.seed) if plan.shuffled else None)
        self.market = SimulatedMarket(plan)
        self.oracle = Oracle(plan, self.market, lambda: self.scheduler.now_seconds, self.violate)
        self.memory = SharedMemory(self._accepted)
        self.venue: SharedVenue | None = None
        self.trades: TradeOracle | None = None
        if plan.venue is not None:
            self.venue = SharedVenue(plan, self.scheduler, self.note)
            self.trades = self.oracle.trades = TradeOracle(
                plan, self.venue, self.oracle, lambda: self.scheduler.now_seconds, self.violate
            )
        disk.restart(self.oracle.kept)
        self.processes = [Process(self, spec) for spec in plan.processes]

    def late(self, until_seconds: float) -> None:
        """Take note that something was held up until then."""
        self.late_seconds = max(self.late_seconds, until_seconds)

    def note(self, text: str) -> None:
        """Put a line on the record."""
        if self._told:
            self.lines.append(f"{self.scheduler.now_seconds:.6f} {text}")

    def violate(self, text: str) -> None:
        """Record that something happened which must not; the history ends there."""
        self.note(f"VIOLATED {text}")
        self.violations.append(text)
        self.scheduler.ended = True

    def run(self) -> None:
        """Play it to its end."""
        try:
            with no_spinning(self.scheduler):
                self._run(self.scheduler, self.market.end_seconds + _AFTER_SECONDS)
        except StuckError as error:
            self.violate(str(error))
        finally:
            for process in self.processes:
                if process.life is not None:
                    process.life.dead = True
                    process.life.loop.kill()

    def _run(self, scheduler: Scheduler, end_seconds: float) -> None:
        scheduler.run(end_seconds)
        everything = tuple(one.number for one in self.plan.contexts)
        scheduler.at(end_seconds, self._switch_off)
        spec = SimulatedProcess(number=-1, contexts=everything, start_seconds=end_seconds, on_conflict="takeover")
        last = Process(self, spec)
        self.processes.append(last)
        scheduler.run(end_seconds)
        self._finish(last)
        if self.late_seconds > scheduler.now_seconds:
            scheduler.run(self.late_seconds + self.plan.lease_seconds)  # whoever wakes up now is late
            self._finish(last)  # it starts again and again, and meets what came late
        if not scheduler.ended:
            self.oracle.judge_end()

    def _finish(self, last: Process) -> None:
        scheduler = self.scheduler
        scheduler.run(
            scheduler.now_seconds + _LONGEST_SECONDS, done=lambda: last.lives > 0 and last.life is None
        )  # fmt: skip
        if not scheduler.ended and (last.life is not None or not last.lives):
            self.violate("with every fault over, the run does not come to its end")

    def _switch_off(self) -> None:
        """End what would take from the last process: nobody comes after that one."""
        for process in self.processes:
            # With an emergency journal, the last process is the next start of this one, on the same disk.
            if process.life is not None and (self.plan.emergency or process.spec.on_conflict == "takeover"):
                process.life.crash()

    def _accepted(self, scope: str, number: int, op: Op, changes: Mapping[Key, Record | None], sender: object) -> None:
        self.commits += 1
        if self._told:
            told = " ".join(
                f"{'/'.join(key)}={'-' if record is None else record.payload[-10:-2].decode()}"
                for key, record in changes.items()
            )
            self.note(f"{getattr(sender, 'name', '?')} {scope} {number} {op.writer}#{op.n} {told}")
        self.oracle.accepted(scope, number, op, changes, sender)

    def outcome(self) -> Outcome:
        """Return what came of it."""
        return Outcome(
            plan=self.plan, violations=tuple(self.violations), lines=tuple(self.lines), commits=self.commits,
            trace=hashlib.blake2b("\n".join(self.lines).encode(), digest_size=16).hexdigest() if self._told else "",
            events=self.oracle.count(), orders=0 if self.venue is None else len(self.venue.book.orders),
        )  # fmt: skip


def play(plan: Plan | int, *, told: bool = True) -> Outcome:
    """Play the history of a plan, or of a seed, from its beginning to its end.

    Call it outside of any event loop, and of any run of the engine in the same process.

    Args:
        plan: What to play.
        told: Keep a line for each thing that happens, and their hash; the verdict does not depend on it.
    """
    with simulated_surroundings():
        tokens.restart()
        world = World(drawn(plan) if isinstance(plan, int) else plan, told=told)
        world.run()
        return world.outcome()
