"""What a session does without being awaited: within a second, commit what waits for a commit to go along with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ..errors import HoldfastError, UnavailableError

ACKNOWLEDGE_SECONDS = 1.0


class Background:
    """At most one timer and one task of a session.

    Args:
        flush: Commits what waits; a store that cannot be used is asked again a second later.
        failed: Told what else it raised.
    """

    def __init__(self, flush: Callable[[], Awaitable[None]], failed: Callable[[HoldfastError], None]) -> None:
        self._flush, self._failed = flush, failed
        self._timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None

    def soon(self) -> None:
        """Flush within a second."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(ACKNOWLEDGE_SECONDS, self.start)

    def start(self) -> None:
        """Flush now, unless that is under way."""
        self._timer = None
        if self.task is None or self.task.done():
            self.task = asyncio.get_running_loop().create_task(self._flush_quietly())

    def cancel(self) -> None:
        """Let the timer go; a flush that is under way goes on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def finish(self) -> None:
        """Let the timer go and wait for the flush that is under way."""
        self.cancel()
        if self.task is not None:
            await asyncio.gather(self.task, return_exceptions=True)
        self.cancel()  # it may have been set again meanwhile

    async def _flush_quietly(self) -> None:
        try:
            await self._flush()
        except UnavailableError:
            self.soon()
        except HoldfastError as error:
            self._failed(error)
