"""Retention: how long what a context has on record beside its state is kept; plain functions, no I/O.

Recovery plans with their decisions, outages, and what operators did by hand: each is pruned by whoever writes the next
one, in the commit that writes it, so nothing has to be read or written for it alone.

Invariants:

* The newest record of each kind stays, however old it is.
* What belongs to an open or a waiting signal stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from ..rules.candles import MINUTE_MS
from ..rules.params import Params

T = TypeVar("T")

DAY_MS = 1440 * MINUTE_MS


class Retention(NamedTuple):
    """How much is kept."""

    days: int = 90
    rows: int = 1000
    """Of each kind, in each context."""

    @classmethod
    def of(cls, params: Params) -> Retention:
        """Return what the parameters say."""
        return cls(params.record_retention_days, params.record_limit_rows)

    def surplus(self, ends: Mapping[T, int], now_ms: int) -> list[T]:
        """Return which records of one kind may go.

        Args:
            ends: When each ended, oldest first.
            now_ms: The present, by the clock that the ends are of.
        """
        horizon_ms = now_ms - self.days * DAY_MS
        too_many = len(ends) - self.rows
        older = list(ends)[:-1]
        return [one for at, one in enumerate(older) if at < too_many or ends[one] < horizon_ms]
