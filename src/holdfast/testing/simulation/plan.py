"""The plan of one history: contexts, processes and faults, all drawn from one seed, and small enough to shrink."""

from __future__ import annotations

from random import Random
from typing import Literal

import msgspec

from ...engine.broker import Features, RepeatedIds
from ...engine.ownership import OnConflict

Kind = Literal[
    # at a call of the storage or of the venue
    "refused", "lost", "unanswered", "late", "slow", "slow_answer", "crash_before", "crash_sent", "crash_after",
    "pause_sent", "pause_after",
    # at a call of the venue
    "crash_late", "pause_before",
    # what the venue does with a request
    "rejected", "partial", "part_only", "resting", "twice", "fill_first", "fill_after",
    # at a time
    "crash", "pause", "leave", "clock", "outage", "silence", "candles_late",
    "candles_refused", "strategy_raises", "gap", "cut_off", "full",
]  # fmt: skip
Call = Literal["", "commit", "read", "submit", "cancel", "ask"]
VENUE = -2
"""In the place of a process: the venue itself."""

AT_A_COMMIT: tuple[Kind, ...] = (
    "refused", "lost", "unanswered", "late", "slow", "slow_answer", "crash_before", "crash_sent", "crash_after",
    "pause_sent", "pause_after",
)  # fmt: skip
AT_A_READ: tuple[Kind, ...] = ("refused", "slow", "slow_answer", "crash_before", "pause_sent", "pause_after")
AT_A_REQUEST: tuple[Kind, ...] = (*AT_A_COMMIT, "crash_late", "crash_late", "pause_before")
"""Of the venue: submissions and cancellations."""
DEEDS: dict[Call, tuple[Kind, ...]] = {
    "submit": ("rejected", "partial", "part_only", "resting", "resting", "twice"),
    "cancel": ("fill_first", "fill_after"),
}
"""What the venue may do with a request."""
AT_A_TIME: tuple[Kind, ...] = (
    "crash", "crash", "pause", "pause", "leave", "clock", "outage", "outage", "silence", "candles_late",
    "candles_refused", "strategy_raises", "gap",
)  # fmt: skip


class Fault(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that goes wrong in one process, or at the venue."""

    kind: Kind
    process: int
    call: Call = ""
    """Which call of the storage or the venue it comes with; "" for one that comes at a time."""
    at: float
    """Number of that call, from 1, of the process or as it arrives at the venue; or seconds from the beginning."""
    seconds: float = 0.0
    """How long it lasts; of ``clock``, how far the wall clock steps."""


class SimulatedContext(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One context of a history: its strategy proposes by chance."""

    number: int
    interval: str = "1m"
    risk_name: str = ""
    thinks_seconds: float = 0.0
    """How long its strategy takes to answer; 0: it is a plain function."""


class SimulatedProcess(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One process of a history; when it crashes, it starts again, unless the run is over."""

    number: int
    contexts: tuple[int, ...]
    start_seconds: float = 0.0
    on_conflict: OnConflict = "refuse"
    restart_seconds: float = 5.0
    """How long after its end it starts again."""


class SimulatedVenue(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The venue of a history: every context trades there, on one account."""

    refuses_repeated_ids: RepeatedIds = "always"
    refuses_expired: bool = True
    reduce_only: bool = True

    @property
    def features(self) -> Features:
        """What it promises."""
        return Features(
            refuses_repeated_ids=self.refuses_repeated_ids, refuses_expired=self.refuses_expired,
            reduce_only=self.reduce_only,
        )  # fmt: skip


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one history is made of."""

    seed: int
    minutes: int
    contexts: tuple[SimulatedContext, ...]
    processes: tuple[SimulatedProcess, ...]
    faults: tuple[Fault, ...] = ()
    limit: int = 0
    """Most open signals under the risk profile that some contexts share."""
    lease_seconds: float = 120.0
    lag_seconds: float = 0.01
    """Longest time that an untroubled call of the storage takes."""
    shuffled: bool = False
    """What is ready at the same time runs in an order of chance."""
    tell_seconds: float = 0.0
    """How long a listener takes."""
    venue: SimulatedVenue | None = None
    """Where orders go; None: nobody has a broker."""
    emergency: bool = False
    """Each process has an emergency journal; the last process finds that of the first, those of others are lost."""


def drawn(seed: int) -> Plan:
    """Return the plan that belongs to a seed."""
    chance = Random(seed)
    minutes = chance.choice((5, 6, 6, 8, 8, 10, 12, 20))
    shape = chance.random()
    if shape < 0.35:
        contexts, processes = _alone(chance, contexts=1)
    elif shape < 0.5:
        contexts, processes = _alone(chance, contexts=chance.choice((2, 3)))
    elif shape < 0.8:
        contexts, processes = _rivals(chance, minutes)
    else:
        contexts, processes = _neighbours(chance, minutes)
    end_seconds = minutes * 60.0
    faults = [_fault(chance, processes, end_seconds) for _ in range(chance.choice((0, 1, 1, 2, 2, 3, 4, 6)))]
    shared = sum(bool(one.risk_name) for one in contexts)
    plan = Plan(
        seed=seed, minutes=minutes, contexts=contexts, processes=processes, faults=tuple(faults),
        limit=chance.choice((1, 1, max(1, shared))), lease_seconds=chance.choice((120.0, 240.0, 480.0)),
        lag_seconds=chance.choice((0.002, 0.02, 0.5)), shuffled=chance.random() < 0.25,
        tell_seconds=chance.choice((0.0, 0.0, 0.0, 1.5)),
    )  # fmt: skip
    return _traded(plan, Random(f"{seed}/venue"))


def _context(chance: Random, number: int, risk_name: str) -> SimulatedContext:
    return SimulatedContext(
        number=number, interval=chance.choice(("1m", "1m", "3m")), risk_name=risk_name,
        thinks_seconds=chance.choice((0.0, 0.0, 0.0, 0.3, 20.0)),
    )  # fmt: skip


def _alone(chance: Random, contexts: int) -> tuple[tuple[SimulatedContext, ...], tuple[SimulatedProcess, ...]]:
    """One process."""
    risk_name = chance.choice(("", "limit"))
    made = tuple(_context(chance, number, risk_name) for number in range(contexts))
    process = SimulatedProcess(
        number=0, contexts=tuple(range(contexts)), start_seconds=chance.random() * 60,
        restart_seconds=chance.choice((1.0, 30.0, 150.0)),
    )  # fmt: skip
    return made, (process,)


def _rivals(chance: Random, minutes: int) -> tuple[tuple[SimulatedContext, ...], tuple[SimulatedProcess, ...]]:
    """Two or three processes that want the same contexts."""
    contexts = chance.choice((1, 1, 2))
    risk_name = chance.choice(("", "limit"))
    made = tuple(_context(chance, number, risk_name) for number in range(contexts))
    processes = tuple(
        SimulatedProcess(
            number=number, contexts=tuple(range(contexts)),
            start_seconds=chance.random() * (60.0 if number == 0 else minutes * 40.0),
            on_conflict=chance.choice(("refuse", "wait", "wait", "takeover")),
            restart_seconds=chance.choice((1.0, 30.0, 150.0)),
        )
        for number in range(chance.choice((2, 2, 3)))
    )  # fmt: skip
    return made, processes


def _neighbours(chance: Random, minutes: int) -> tuple[tuple[SimulatedContext, ...], tuple[SimulatedProcess, ...]]:
    """Two or three processes with a context each, under one risk profile."""
    count = chance.choice((2, 2, 3))
    made = tuple(_context(chance, number, "limit") for number in range(count))
    processes = tuple(
        SimulatedProcess(
            number=number, contexts=(number,), start_seconds=chance.random() * 90,
            on_conflict="wait", restart_seconds=chance.choice((1.0, 30.0, 150.0)),
        )
        for number in range(count)
    )  # fmt: skip
    return made, processes


def _fault(chance: Random, processes: tuple[SimulatedProcess, ...], end_seconds: float) -> Fault:
    process = chance.choice(processes).number
    seconds = chance.choice((0.5, 5.0, 40.0, 90.0, 200.0, 400.0))
    if chance.random() < 0.6:
        call: Literal["commit", "read"] = chance.choice(("commit", "commit", "read"))
        kind = chance.choice(AT_A_COMMIT if call == "commit" else AT_A_READ)
        # The first calls are those of a start; the others come with candles, beats and acknowledgements.
        at = chance.randint(1, 12) if chance.random() < 0.4 else chance.randint(8, 70)
        return Fault(kind=kind, process=process, call=call, at=at, seconds=seconds)
    kind = chance.choice(AT_A_TIME)
    if kind == "clock":
        seconds = chance.choice((-86_400.0, -3600.0, -61.0, 61.0, 3600.0, 864_000.0))
    return Fault(kind=kind, process=process, at=round(chance.random() * end_seconds, 3), seconds=seconds)


def _traded(plan: Plan, chance: Random) -> Plan:
    """Give two plans of three a venue, and what goes wrong there."""
    if chance.random() >= 2 / 3:
        return plan
    venue = SimulatedVenue(
        refuses_repeated_ids=chance.choice(("always", "always", "while_open", "never")),
        refuses_expired=chance.random() < 0.75, reduce_only=chance.random() < 0.75,
    )  # fmt: skip
    faults = [_stepped(fault, chance) if fault.kind == "clock" else fault for fault in plan.faults]
    faults += [_venue_fault(chance, plan) for _ in range(chance.choice((0, 1, 1, 2, 2, 3, 4)))]
    emergency = chance.random() < 0.5
    if emergency:
        faults += [_store_in_trouble(chance, plan) for _ in range(chance.choice((1, 1, 2)))]
    return msgspec.structs.replace(plan, venue=venue, faults=tuple(faults), emergency=emergency)


def _store_in_trouble(chance: Random, plan: Plan) -> Fault:
    return Fault(
        kind=chance.choice(("full", "full", "outage", "silence")), process=0,
        at=round(chance.random() * plan.minutes * 60, 3), seconds=chance.choice((40.0, 90.0, 200.0)),
    )  # fmt: skip


def _stepped(fault: Fault, chance: Random) -> Fault:
    """Let a clock step by less than the grace that orders have, most often."""
    return msgspec.structs.replace(fault, seconds=chance.choice((-2.0, -2.0, 2.0, 2.0, -61.0, 45.0, -3600.0)))


def _venue_fault(chance: Random, plan: Plan) -> Fault:
    # Soon after the sender has ceased to wait, so that what comes late meets what is asked or sent then.
    soon = round(1 + chance.random(), 3)
    seconds = chance.choice((0.5, soon, soon, 5.0, 40.0, 90.0, 200.0, 400.0))
    call: Call = chance.choice(("submit", "submit", "submit", "cancel"))
    at = chance.randint(1, 6)
    drawn = chance.random()
    if drawn < 0.4:
        return Fault(kind=chance.choice(DEEDS[call]), process=VENUE, call=call, at=at, seconds=seconds)
    process = chance.choice(plan.processes).number
    if drawn < 0.8:
        return Fault(kind=chance.choice(AT_A_REQUEST), process=process, call=call, at=at, seconds=seconds)
    if drawn < 0.9:
        at = chance.randint(1, 20)
        return Fault(kind=chance.choice(AT_A_READ), process=process, call="ask", at=at, seconds=seconds)
    at_seconds = round(chance.random() * plan.minutes * 60, 3)
    return Fault(kind="cut_off", process=process, at=at_seconds, seconds=seconds)
