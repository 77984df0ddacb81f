"""Histories: several processes on one store, faults on, and every answer checked for linearizability.

``python -m holdfast.testing.histories STORE`` runs them on your own storage; ``docs/proof.md``, "Races", says what
they show.

Invariants:

* Every payload is unique, so that a read tells which commit it saw.
* What is noted before a call was begun, and what is noted after it had ended, by one clock for all processes.
* At most eight operations are in flight at once, and few commits stay without an outcome, so that checking is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .hunt import Hunt, Report

__all__ = ["Hunt", "Report"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".hunt", __name__), name)
