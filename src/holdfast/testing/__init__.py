"""The proof kit: run it on your own storage and your own strategy. ``docs/proof.md`` says what each part shows.

Names are loaded when they are first used, so that nothing of it weighs on a bot that runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .conformance import Bench, Check, Material, Report, certify, conformance_cases
    from .disk import SimulatedDisk
    from .faults import Fault, FaultyBackend, FaultyDisk
    from .killer import KillerDisk
    from .medium import Medium
    from .power import Cuts, PowerReport, power_cuts
    from .steps import cancelled_at
    from .witness import Witness

_HOMES = {
    "Bench": "conformance",
    "Check": "conformance",
    "Material": "conformance",
    "Report": "conformance",
    "certify": "conformance",
    "conformance_cases": "conformance",
    "SimulatedDisk": "disk",
    "Fault": "faults",
    "FaultyBackend": "faults",
    "FaultyDisk": "faults",
    "KillerDisk": "killer",
    "Medium": "medium",
    "Cuts": "power",
    "PowerReport": "power",
    "power_cuts": "power",
    "cancelled_at": "steps",
    "Witness": "witness",
}

__all__ = [
    "Bench",
    "Check",
    "Cuts",
    "Fault",
    "FaultyBackend",
    "FaultyDisk",
    "KillerDisk",
    "Material",
    "Medium",
    "PowerReport",
    "Report",
    "SimulatedDisk",
    "Witness",
    "cancelled_at",
    "certify",
    "conformance_cases",
    "power_cuts",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
