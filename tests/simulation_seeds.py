"""Plans that once found something, shrunk and kept: each must be in order now.

Plans, not seeds: a change of how plans are drawn makes another history of a seed. ``make torture`` puts the shrunk plan
of a seed that fails into ``tests/simulation_plans``, where it is a test from then on.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from holdfast.testing.simulation import Fault, Plan
from holdfast.testing.simulation.plan import SimulatedContext, SimulatedProcess

PLANS: dict[str, Plan] = {
    "an answer is lost, then the store is away": Plan(
        seed=323, minutes=16,
        contexts=(SimulatedContext(number=1, risk_name="limit"),),
        processes=(SimulatedProcess(number=1, contexts=(1,), start_seconds=74.70358253100046, restart_seconds=30.0),),
        faults=(Fault(kind="outage", process=1, at=339.091, seconds=90.0),),
        limit=1, lease_seconds=120.0, lag_seconds=0.002,
    ),
    "a commit waits behind one whose outcome is unknown": Plan(
        seed=517, minutes=30,
        contexts=tuple(SimulatedContext(number=n, interval=i) for n, i in enumerate(("1m", "1m", "3m"))),
        processes=(
            SimulatedProcess(number=0, contexts=(0, 1, 2), start_seconds=34.10947910691012, restart_seconds=1.0),
        ),
        faults=(Fault(kind="outage", process=0, at=565.825, seconds=400.0),),
        limit=1, lease_seconds=480.0, lag_seconds=0.002,
    ),
}  # fmt: skip

KEPT: dict[str, Plan] = {
    file.stem: msgspec.json.decode(file.read_bytes(), type=Plan)
    for file in sorted(Path(__file__).with_name("simulation_plans").glob("*.json"))
}
"""Those that ``make torture`` has found and kept."""
