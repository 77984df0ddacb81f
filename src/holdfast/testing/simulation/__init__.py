"""Deterministic simulation: the real engine and store rules, with simulated time, storage, market and faults.

``python -m holdfast.testing.simulation --seeds 1000`` plays histories; one seed always plays the same one.
"""

from __future__ import annotations

from .plan import Fault, Plan, drawn
from .shrink import shrunk
from .world import Outcome, play

__all__ = ["Fault", "Outcome", "Plan", "drawn", "play", "shrunk"]
