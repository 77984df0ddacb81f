"""The simulation: thousands of histories in order, the same seed the same history, planted defects found."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from simulation_defects import DEFECTS
from simulation_seeds import KEPT, PLANS

from holdfast.testing.conformance import Bench, Check, conformance_cases
from holdfast.testing.simulation import Fault, Plan, drawn, play, shrunk
from holdfast.testing.simulation.__main__ import OK, USAGE, main
from holdfast.testing.simulation.hunt import Hunt, play_chunk
from holdfast.testing.simulation.loop import ProcessLoop, Scheduler
from holdfast.testing.simulation.plan import AT_A_COMMIT, AT_A_READ, AT_A_REQUEST, DEEDS, VENUE, Kind
from holdfast.testing.simulation.storage import SharedMemory, SimulatedBackend

SEEDS_A_PART, PARTS = 250, 8
EASY = (
    "the owner row is not expected", "who was not watched counts as dead", "events are told before their commit",
    "memory changes before the commit", "an outage is not recorded", "the price window begins empty",
    "each time it is sent an order has another client id", "an order that nobody knows never came, at once",
)  # fmt: skip
"""Defects that few seeds find; all of them: ``python tests/simulation_defects.py``, in ``make torture``."""


@pytest.mark.parametrize("part", range(PARTS))
def test_two_thousand_histories_violate_nothing(part: int, record_property: Any) -> None:
    found = play_chunk(part * SEEDS_A_PART, SEEDS_A_PART)
    counts = {"histories": found.count, "commits": found.commits, "events": found.events}
    record_property("proof:simulation", counts | {"violated": len(found.failed)})
    assert found.failed == ()
    assert found.commits > 20 * found.count
    assert found.events > found.count


@pytest.mark.parametrize("name", [*PLANS, *KEPT])
def test_a_plan_that_once_found_something_is_in_order(name: str) -> None:
    assert play((PLANS | KEPT)[name]).violations == ()


def test_where_an_entry_is_there_twice_its_exit_is_looked_for_before_another_is_sent() -> None:
    outcome = play(KEPT["entry-and-exit-both-there-twice"])
    assert sum("is at the venue 2 times" in line for line in outcome.lines) >= 2, "both are told"
    assert not any("more was closed" in line for line in outcome.lines)


def test_the_same_seed_gives_the_same_history_byte_for_byte_in_another_process_too() -> None:
    seeds = range(40, 60)
    here = [play(seed) for seed in seeds]
    assert [play(seed).trace for seed in seeds] == [one.trace for one in here]
    code = f"from holdfast.testing.simulation import play; print([play(s).trace for s in {list(seeds)}])"
    elsewhere = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert elsewhere.stdout.strip() == str([one.trace for one in here])
    assert len({one.trace for one in here}) == len(here)


@pytest.mark.parametrize(
    ("name", "planted"),
    list(
        zip(
            PLANS,
            ("a refusal after a lost answer is believed", "the number of an earlier commit is taken"),
            strict=True,
        )
    ),
)
def test_a_kept_plan_still_finds_what_it_found(name: str, planted: str) -> None:
    (defect,) = [one for one in DEFECTS if one.name.startswith(planted)]
    with defect.planted():
        assert not play(PLANS[name]).ok


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("a-candle-that-waited", "a candle that waited counts as new"),
        ("rows-of-events-go-in-order", "rows of events go before those of earlier ones"),
    ],
)  # fmt: skip
def test_a_plan_of_a_file_still_finds_what_it_found(name: str, planted: str) -> None:
    (defect,) = [one for one in DEFECTS if one.name == planted]
    with defect.planted():
        assert not play(KEPT[name]).ok


@pytest.mark.parametrize("name", EASY)
def test_a_planted_defect_is_found(name: str, record_property: Any) -> None:
    (defect,) = [one for one in DEFECTS if one.name == name]
    took = defect.found_after(0, 200)
    assert took is not None
    record_property("proof:simulation, planted defects", {"found": 1, "histories played for them": took})


def test_every_planted_defect_stands_for_a_text_that_is_there_once() -> None:
    assert len({one.name for one in DEFECTS}) == len(DEFECTS) >= 20
    for defect in DEFECTS:
        function, code = defect.code()
        assert code.co_code != function.__code__.co_code or code.co_consts != function.__code__.co_consts, defect.name


def test_a_failing_plan_is_shrunk_to_what_it_needs() -> None:
    (defect,) = [one for one in DEFECTS if one.name == "an outage is not recorded"]
    with defect.planted():
        seed = next(seed for seed in range(200) if not play(seed).ok and len(drawn(seed).faults) > 1)
        small = shrunk(drawn(seed), lambda plan: not play(plan).ok)
        assert not play(small).ok
    assert play(small).ok, "without the defect it is in order"
    assert len(small.faults) <= 1
    assert len(small.contexts) == len(small.processes) == 1
    assert small.minutes <= drawn(seed).minutes


def test_each_kind_of_fault_comes_up_and_changes_what_happens() -> None:
    kinds = {fault.kind for seed in range(400) for fault in drawn(seed).faults}
    assert kinds == set(get_args(Kind))
    quiet = next(
        plan for plan in map(drawn, range(4000)) if plan.venue and len(plan.faults) < 2 and plan.minutes >= 20
    )  # fmt: skip
    for kind in sorted(kinds):
        call: Any = "commit" if kind in AT_A_COMMIT else ""
        fault = Fault(kind=kind, process=0, call=call, at=12 if call else 400.0, seconds=90.0)
        _strike(quiet, fault)
        if kind in AT_A_REQUEST:
            _strike(quiet, msgspec.structs.replace(fault, call="submit", at=2))
        if kind in AT_A_READ:
            _strike(quiet, msgspec.structs.replace(fault, call="ask", at=1))


_RESTS = Fault(kind="resting", process=VENUE, call="submit", at=1, seconds=90.0)


def _strike(quiet: Plan, fault: Fault, *before: Fault) -> None:
    """Play a plan with a fault and without it; ``before`` is there both times."""
    calls = [call for call, kinds in DEEDS.items() if fault.kind in kinds]
    if calls:
        fault = msgspec.structs.replace(fault, process=VENUE, call=calls[0], at=1)
    elif fault.kind in AT_A_REQUEST and fault.kind not in AT_A_COMMIT:
        fault = msgspec.structs.replace(fault, call="submit", at=1)
    elif fault.kind == "cut_off":
        fault = msgspec.structs.replace(fault, seconds=900.0)
    if fault.call in ("cancel", "ask"):
        before = (_RESTS,)
    calm = play(msgspec.structs.replace(quiet, faults=before))
    struck = play(msgspec.structs.replace(quiet, faults=(*before, fault)))
    assert calm.violations == struck.violations == ()
    assert struck.trace != calm.trace, f"{fault} did nothing"
    assert len([line for line in calm.lines if "venue: " in line]) > 1


@pytest.mark.parametrize("check", conformance_cases())
async def test_the_simulated_storage_keeps_the_contract(check: Check, tmp_path: Path) -> None:
    places: dict[Path, SharedMemory] = {}
    await check.run_on(Bench(lambda place: SimulatedBackend(places.setdefault(place, SharedMemory())), tmp_path))


def test_simulated_time_jumps_and_a_paused_process_goes_on_late() -> None:
    scheduler = Scheduler()
    loops = [ProcessLoop(scheduler, lambda context: None) for _ in range(2)]  # type: ignore[abstract]
    woke: list[tuple[int, float]] = []

    async def sleeper(number: int) -> None:
        for _ in range(3):
            await asyncio.sleep(3600)
            woke.append((number, scheduler.now_seconds))

    for number, loop in enumerate(loops):
        loop.create_task(sleeper(number))
    scheduler.at(4000.0, loops[0].pause)
    scheduler.at(20_000.0, loops[0].resume)
    scheduler.at(8000.0, loops[1].kill)
    scheduler.run()
    assert woke == [(0, 3600.0), (1, 3600.0), (1, 7200.0), (0, 20_000.0), (0, 23_600.0)]


def test_the_command_tells_how_many_it_played_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--seeds", "3", "--resume", str(tmp_path)]) == OK
    assert "3 of 3 histories" in capsys.readouterr().out
    hunt = Hunt(0, 5, resume=tmp_path)
    assert hunt.done == 3
    hunt.run()
    assert (hunt.done, len(hunt.chunks)) == (5, 2)
    assert main(["--seeds", "0"]) == USAGE
    assert main(["--replay", "3"]) == OK
    assert "in order" in capsys.readouterr().out
