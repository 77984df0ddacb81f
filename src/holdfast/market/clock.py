"""Waiting by the wall clock, for exchanges that do not tell when a minute has closed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from ..errors import InvalidInputError
from .protocol import MINUTE_MS

_LONGEST_SLEEP_SECONDS = 5.0


class WallClock:
    """Tells when one-minute candles close, aligned to the minute.

    Cancelling a wait interrupts it at once. A wait looks at the wall clock again at
    least every five seconds, so that a step of the clock, or a machine that slept,
    is noticed; a clock that goes back only makes the wait longer.

    Args:
        grace_seconds: How long after the end of a minute its candle counts as closed; 0 to 30.
            Exchanges publish a closed candle a moment late.
        now: Seconds since the epoch.
        sleep: Waits so many seconds.

    Raises:
        InvalidInputError: ``grace_seconds`` is out of range.
    """

    def __init__(
        self,
        *,
        grace_seconds: float = 2.0,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        if not 0 <= grace_seconds <= 30:
            raise InvalidInputError(f"grace_seconds is {grace_seconds!r}: choose 0 to 30")
        self._grace_seconds = grace_seconds
        self._now = now
        self._sleep = sleep

    def newest_closed_ms(self) -> int:
        """Return the open time of the newest closed minute, epoch milliseconds."""
        ms = int((self._now() - self._grace_seconds) * 1000)
        return ms - ms % MINUTE_MS - MINUTE_MS

    async def wait_closed(self, participant: str, after_ms: int | None) -> int:
        """Wait until a minute newer than ``after_ms`` has closed (None: at once) and return its open time."""
        while True:
            newest_ms = self.newest_closed_ms()
            if after_ms is None or newest_ms > after_ms:
                return newest_ms
            # The minute after `after_ms` opens one minute later and closes two minutes later.
            due = (after_ms + 2 * MINUTE_MS) / 1000 + self._grace_seconds
            await self._sleep(min(max(due - self._now(), 0.001), _LONGEST_SLEEP_SECONDS))
