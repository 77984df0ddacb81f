"""Gate: whether something may begin on a candle, and the record of those on which it could not.

Exits never ask here. ``is_plain`` is the one thing that a candle which changes nothing has to look at: while it holds,
nothing stands in the way, and nothing need be noted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..names import Context
from ..store import Store
from .commits import Outages, Recorded
from .modes import Mode
from .recovery import stopped_reasons
from .retention import Retention

if TYPE_CHECKING:
    from .executor import Executor
    from .health import Health


class Gate:
    """What may begin in one context.

    Args:
        context: Whose.
        store: Tells what is in quarantine.
        health: Of the store: entries need mode NORMAL.
        executor: Of its orders, which may block entries; None without a broker.
        crowded: Whether too many events wait for delivery.
        retention: How many outages stay on record.
    """

    def __init__(
        self,
        context: Context,
        store: Store,
        health: Health,
        executor: Executor | None,
        crowded: Callable[[], bool],
        retention: Retention,
    ) -> None:
        self._context, self._store, self._health, self._executor = context, store, health, executor
        self._crowded = crowded
        self.is_plain = False
        """Nothing stands in the way of an entry, as far as was known at the last look."""
        self.stopped = False
        """Something of the context is in quarantine: nothing may open."""
        self._stopping = False
        self._outage_to_ms = -1
        self._retention = retention
        self.outages = Outages(context)

    def recovered(self, *, stopped: bool, outages: Recorded) -> None:
        """Begin anew.

        Args:
            stopped: Something of the context is in quarantine.
            outages: Those that are on record.
        """
        self.stopped, self._outage_to_ms = stopped, outages.to_ms
        self.outages, self.is_plain = Outages(self._context, outages, self._retention), False

    def look_anew(self) -> None:
        """Ask again, with the next candle, whether anything may begin."""
        self.is_plain = False

    @property
    def stopping(self) -> bool:
        """Whether the context is being stopped: nothing new begins."""
        return self._stopping

    @stopping.setter
    def stopping(self, stopping: bool) -> None:
        self._stopping, self.is_plain = stopping, False

    @property
    def is_released(self) -> bool:
        """Whether what was in quarantine at recovery has been released: recover, as a new row may stand there."""
        return self.stopped and not stopped_reasons(self._store, self._context)

    def check_quarantine(self) -> tuple[str, ...]:
        """Find out what is in quarantine now, and return why."""
        reasons = stopped_reasons(self._store, self._context)
        self.stopped = bool(reasons)
        return reasons

    def opens(self, candle_ms: int, entries: bool, *, last_ms: int) -> bool:
        """Decide whether the candle may begin something, and note it where it may not.

        Args:
            candle_ms: Its open time.
            entries: False where the driver forbids it.
            last_ms: Open time of the last candle that is on record as stepped.
        """
        if self.stopped:
            self.check_quarantine()
        if entries and self.may_enter(candle_ms):
            self.outages.allow()
            self.is_plain = True
            return True
        if candle_ms > last_ms:
            self.outages.forbid(candle_ms)
        self.is_plain = False
        return False

    def may_enter(self, candle_ms: int) -> bool:
        """Whether something may begin on the candle, as far as is known."""
        # On record as an outage it stays one, though it may still be the newest candle when the next run begins.
        if (self._executor is not None and self._executor.blocks_entries) or self._health.mode is not Mode.NORMAL:
            return False
        return candle_ms > self._outage_to_ms and not (self._stopping or self.stopped or self._crowded())

    def forbid(self, from_ms: int, to_ms: int | None = None) -> None:
        """Note that nothing began on a candle, or on all from one open time to another, and look anew."""
        self.outages.forbid(from_ms, to_ms)
        self.is_plain = False
