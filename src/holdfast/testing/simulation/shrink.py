"""Making a failing plan smaller, as long as it still fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from .plan import Plan, SimulatedVenue

_MOST_PLAYS = 400

replace = msgspec.structs.replace


def shrunk(plan: Plan, fails: Callable[[Plan], bool]) -> Plan:
    """Return the smallest plan found that fails: fewer faults, processes, contexts and minutes, nothing by chance.

    Args:
        fails: Plays a plan and tells whether it fails (in the same way, if that matters).
    """
    plays = 0
    again = True
    while again and plays < _MOST_PLAYS:
        again = False
        for smaller in _smaller(plan):
            plays += 1
            if fails(smaller):
                plan, again = smaller, True
                break
            if plays >= _MOST_PLAYS:
                break
    return plan


def _smaller(plan: Plan) -> Iterator[Plan]:
    """Yield plans that are a step smaller, the biggest steps first."""
    yield from _without_processes(plan)
    if len(plan.faults) > 3:
        half = len(plan.faults) // 2
        yield replace(plan, faults=plan.faults[:half])
        yield replace(plan, faults=plan.faults[half:])
    for at in range(len(plan.faults)):
        yield replace(plan, faults=plan.faults[:at] + plan.faults[at + 1 :])
    for one in plan.contexts if len(plan.contexts) > 1 else ():
        kept = tuple(other for other in plan.contexts if other is not one)
        processes = tuple(
            replace(process, contexts=tuple(n for n in process.contexts if n != one.number))
            for process in plan.processes
        )
        yield replace(plan, contexts=kept, processes=tuple(process for process in processes if process.contexts))
    if plan.venue is not None:
        for venue in (None, SimulatedVenue()):
            if venue != plan.venue:
                yield replace(plan, venue=venue)
    for simpler in ({"shuffled": False}, {"tell_seconds": 0.0}, {"lag_seconds": 0.002}):
        smaller = replace(plan, **simpler)
        if smaller != plan:
            yield smaller
    for at, spec in enumerate(plan.contexts):
        plain = replace(spec, thinks_seconds=0.0, interval="1m")
        if plain != spec:
            yield replace(plan, contexts=(*plan.contexts[:at], plain, *plan.contexts[at + 1 :]))
    for minutes in (plan.minutes // 2, plan.minutes - 1):
        if 2 <= minutes < plan.minutes:
            yield replace(plan, minutes=minutes)


def _without_processes(plan: Plan) -> Iterator[Plan]:
    for one in plan.processes if len(plan.processes) > 1 else ():
        yield replace(
            plan, processes=tuple(other for other in plan.processes if other is not one),
            faults=tuple(fault for fault in plan.faults if fault.process != one.number),
        )  # fmt: skip
