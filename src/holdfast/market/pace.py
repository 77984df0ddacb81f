"""How a replayed market's clock goes: by itself, or only when everybody is done with the present candle."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from ..errors import InvalidInputError
from .protocol import MINUTE_MS, MarketEnded


class Pace(Protocol):
    """The clock of a replayed market."""

    start_ms: int
    """Open time of the minute that has just closed when the market begins."""
    end_ms: int
    """Open time of the last minute."""

    @property
    def present_ms(self) -> int:
        """Open time of the newest closed minute."""
        ...

    async def wait_closed(self, participant: str, after_ms: int | None) -> int:
        """As :meth:`holdfast.market.protocol.WaitingExchange.wait_closed`."""
        ...

    def leave(self, participant: str) -> None:
        """Do not wait for ``participant`` any more."""
        ...


def _check_span(start_ms: int, end_ms: int) -> None:
    if start_ms % MINUTE_MS or end_ms % MINUTE_MS or end_ms < start_ms:
        raise InvalidInputError(f"a market cannot run from {start_ms} to {end_ms}: give full minutes, the end last")


class RunningPace:
    """A clock that nobody can stop: it begins when it is first asked, and then goes at its speed.

    Args:
        start_ms: Open time of the minute that has just closed at the beginning.
        end_ms: Open time of the last minute.
        speed: Market seconds in a real second: 1 is real time, 60 a candle a second.
        now: Seconds of a clock that never goes back.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        start_ms: int,
        end_ms: int,
        *,
        speed: float,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        _check_span(start_ms, end_ms)
        if not (math.isfinite(speed) and 0 < speed <= 1_000_000):
            raise InvalidInputError(f"speed is {speed!r}: choose a number over 0, at most 1000000 (1 is real time)")
        self.start_ms, self.end_ms = start_ms, end_ms
        self._minute_seconds = 60 / speed
        self._now, self._sleep = now, sleep
        self._began: float | None = None

    @property
    def present_ms(self) -> int:
        """Open time of the newest closed minute. The first look starts the clock."""
        if self._began is None:
            self._began = self._now()
        minutes = int((self._now() - self._began) / self._minute_seconds)
        return min(self.start_ms + minutes * MINUTE_MS, self.end_ms)

    async def wait_closed(self, participant: str, after_ms: int | None) -> int:
        """Wait until a minute newer than ``after_ms`` has closed; other participants make no difference."""
        while True:
            present_ms = self.present_ms
            if after_ms is None or present_ms > after_ms:
                return present_ms
            if present_ms >= self.end_ms:
                raise MarketEnded("the market has ended")
            assert self._began is not None
            due = self._began + (min(after_ms, self.end_ms) + MINUTE_MS - self.start_ms) / MINUTE_MS * (
                self._minute_seconds
            )
            await self._sleep(max(due - self._now(), 0.0))

    def leave(self, participant: str) -> None:
        """Nothing to do: this clock waits for nobody."""


class WaitingPace:
    """A clock that advances one minute when every participant waits for a newer one than the present.

    A wait that is cancelled (its connection dropped, say) is forgotten, so the
    market stands still while a killed bot is away, and the bot that comes back
    finds the candle at which it was killed.

    Args:
        start_ms: Open time of the minute that has just closed at the beginning.
        end_ms: Open time of the last minute.
        participants: How many distinct participants must wait.
    """

    def __init__(self, start_ms: int, end_ms: int, *, participants: int) -> None:
        _check_span(start_ms, end_ms)
        if participants < 1:
            raise InvalidInputError(f"a waiting market needs at least 1 participant, not {participants}")
        self.start_ms, self.end_ms = start_ms, end_ms
        self._present_ms = start_ms
        self._participants = participants
        self._waits: dict[asyncio.Future[int], tuple[str, int]] = {}
        self._left: set[str] = set()

    @property
    def present_ms(self) -> int:
        """Open time of the newest closed minute."""
        return self._present_ms

    async def wait_closed(self, participant: str, after_ms: int | None) -> int:
        """Wait until everybody is done with the minutes up to ``after_ms``; at once where it is older."""
        self._left.discard(participant)
        if after_ms is None or after_ms < self._present_ms:
            return self._present_ms
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waits[future] = (participant, after_ms)
        try:
            self._advance()
            return await future
        finally:
            self._waits.pop(future, None)

    def leave(self, participant: str) -> None:
        """Do not wait for ``participant`` any more; a new wait of it counts again."""
        self._left.add(participant)
        self._advance()

    def _advance(self) -> None:
        while self._waits:
            waiting = {name for wait, (name, _) in self._waits.items() if not wait.done()} | self._left
            if len(waiting) < self._participants:
                return
            if self._present_ms >= self.end_ms:
                self._settle(lambda _: MarketEnded("the market has ended"))
                return
            self._present_ms += MINUTE_MS
            self._settle(lambda after_ms: self._present_ms if after_ms < self._present_ms else None)

    def _settle(self, answer: Callable[[int], int | MarketEnded | None]) -> None:
        for future, (_, after_ms) in list(self._waits.items()):
            outcome = answer(after_ms)
            if outcome is None:
                continue
            # Taken out at once: it must not count for the next minute before its task has run.
            del self._waits[future]
            if future.done():
                continue
            if isinstance(outcome, MarketEnded):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
