"""Waiting for something, or until a flag says that it is not waited for any longer; without a task for each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType


class Flag:
    """Something that is so from one moment on, until it is cleared, and tells whoever waits."""

    __slots__ = ("_is_set", "_watchers")

    def __init__(self) -> None:
        self._is_set = False
        self._watchers: list[Callable[[], None]] = []

    def is_set(self) -> bool:
        """Whether it is so."""
        return self._is_set

    def set(self) -> None:
        """It is so from now on. Repeatable."""
        self._is_set = True
        for tell in tuple(self._watchers):
            tell()

    def clear(self) -> None:
        """It is so no longer."""
        self._is_set = False

    def watch(self, tell: Callable[[], None]) -> None:
        """Call ``tell`` when it is set, which may be now."""
        self._watchers.append(tell)
        if self._is_set:
            tell()

    def unwatch(self, tell: Callable[[], None]) -> None:
        """Call it no longer."""
        self._watchers.remove(tell)


class Until:
    """An ``async with`` block that ends when one of ``flags`` is set: what it awaits then is cancelled.

    It lets others run once before it begins, so that a loop around something that never waits holds nobody up.
    """

    __slots__ = ("_flags", "_timeout")

    def __init__(self, *flags: Flag) -> None:
        self._flags = flags
        self._timeout = asyncio.timeout(None)  # the flags are its clock

    async def __aenter__(self) -> None:
        await asyncio.sleep(0)
        await self._timeout.__aenter__()
        for flag in self._flags:
            flag.watch(self._end)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> bool | None:
        for flag in self._flags:
            flag.unwatch(self._end)
        try:
            await self._timeout.__aexit__(kind, error, at)
        except TimeoutError:
            return True
        return None

    def _end(self) -> None:
        if self._timeout.when() is None:
            self._timeout.reschedule(0.0)
