"""Calls that could not be made are made again; commits only where that cannot apply them twice.

Invariants:

* A commit is sent again with its own op and its own ``expect``, never with others.
* After an unknown outcome a commit without ``expect`` is not sent again: a late first copy and a second one could
  both land. The scope's head is looked at instead.
* Once an attempt's outcome is unknown, the call ends with the commit's number, with an error that says more, or as
  unknown; never as "nothing was written".
"""

from __future__ import annotations

import asyncio
import random as _random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, NamedTuple, TypeVar

from ..contract import Backend, Guarantees, Head, Key, KeyPrefix, Op, Record
from ..errors import HeldError, HoldfastError, InvalidInputError, UnavailableError, UnknownOutcomeError
from .around import Around

T = TypeVar("T")

DEADLINE_SECONDS = 30.0
"""How long a call is tried, unless told otherwise."""

_LOOKS = 3
"""How often the head is looked at for a commit without ``expect``: what is in flight lands soon, or nobody can tell."""


class Retry(NamedTuple):
    """A call that failed and will be made again: what an observer is told."""

    call: str
    """``open``, ``read``, ``commit``, ``head``, ``keys`` or ``scopes``."""
    backend: str
    """As :class:`~holdfast.contract.Guarantees` names it; empty before the first open."""
    attempt: int
    """Number of the attempt that failed, 1 being the first."""
    delay_seconds: float
    """How long it waits before the next one."""
    error: str
    """The class of the error, such as ``"UnavailableError"``."""


class _Patience:
    """How long one call goes on, and how it waits: exponential backoff with full jitter."""

    def __init__(self, owner: Retrying, call: str, begun: float) -> None:
        self._owner = owner
        self._call = call
        self._ends = begun + owner.deadline_seconds
        self._attempt = 0

    async def wait(self, error: HoldfastError) -> bool:
        """Wait before the next attempt, and return True; False if the deadline comes first."""
        owner = self._owner
        self._attempt += 1
        most = min(owner.most_delay_seconds, owner.first_delay_seconds * 2 ** min(self._attempt - 1, 30))
        delay = most * owner._random()
        if owner._clock() + delay >= self._ends:
            return False
        if owner.observer is not None:
            owner.observer(Retry(self._call, owner.name, self._attempt, delay, type(error).__name__))
        await owner._sleep(delay)
        return True


class Retrying(Around):
    """A backend that makes a call again while the medium cannot be reached, for at most ``deadline_seconds``.

    Reads, ``head``, ``keys``, ``scopes`` and ``open`` are made again after ``UnavailableError`` (but not after
    ``HeldError``); a commit also after ``UnknownOutcomeError``. Nothing else is: what was refused stays refused.

    Args:
        backend: What it wraps.
        deadline_seconds: No attempt begins later than this after the call. One that is under way then ends by the
            backend's own deadline.
        first_delay_seconds: Longest wait after the first failed attempt; it doubles with each further one.
        most_delay_seconds: Longest wait of all. Each wait is drawn evenly between nothing and its longest.
        observer: Told of each attempt that failed and is followed by another; must be quick and must not raise.
        clock: Seconds that only grow.
        sleep: Waits so many seconds.
        random: Draws from 0 to 1.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        deadline_seconds: float = DEADLINE_SECONDS,
        first_delay_seconds: float = 0.05,
        most_delay_seconds: float = 2.0,
        observer: Callable[[Retry], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        random: Callable[[], float] = _random.random,
    ) -> None:
        super().__init__(backend)
        if not 0 <= deadline_seconds <= 3600:
            raise InvalidInputError(f"deadline_seconds is {deadline_seconds!r:.40}: use 0 (no retry) to 3600")
        if not 0 < first_delay_seconds <= most_delay_seconds <= 3600:
            raise InvalidInputError(
                f"first_delay_seconds is {first_delay_seconds!r:.40} and most_delay_seconds is "
                f"{most_delay_seconds!r:.40}: use numbers over 0, the first not above the second"
            )
        self.deadline_seconds = deadline_seconds
        self.first_delay_seconds = first_delay_seconds
        self.most_delay_seconds = most_delay_seconds
        self.observer = observer
        self.name = ""
        """What was opened, as its guarantees name it."""
        self._clock, self._sleep, self._random = clock, sleep, random

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Open what is wrapped, as soon as it can be reached; see :meth:`holdfast.contract.Backend.open`.

        Raises:
            HeldError: At once: the holder goes by itself, or is ended by somebody.
            UnavailableError: It could not be reached until the deadline.
        """

        async def attempt() -> Guarantees:
            try:
                return await self.backend.open(read_only=read_only)
            except UnavailableError:
                with suppress(HoldfastError):
                    await self.backend.close()  # whatever an attempt left half open
                raise

        found = await self._again("open", attempt)
        self.name = found.backend
        return found

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys``; see :meth:`holdfast.contract.Backend.read`."""
        return await self._again("read", lambda: self.backend.read(scope, keys))

    async def head(self, scope: str) -> Head:
        """Return the scope's commit number and its writers' last ops."""
        return await self._again("head", lambda: self.backend.head(scope))

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        """Apply ``changes`` if ``expect`` holds, and send the same op again while the outcome is open.

        Raises:
            UnknownOutcomeError: An attempt's answer was lost, and the deadline came before one that tells.
            UnavailableError: No attempt was applied until the deadline.
            ConflictError: Some ``expect`` does not hold; nothing was changed.

        Crash: Before the return, all of the changes or none; after it, all.
        Cancellation: It may still be applied; no further attempt is made.
        """
        patience = _Patience(self, "commit", self._clock())
        unknown: UnknownOutcomeError | None = None
        last: HoldfastError
        while True:
            try:
                return await self.backend.commit(scope, changes, expect, op=op)
            except UnknownOutcomeError as error:
                unknown = last = error
                if not expect:
                    return await self._look(scope, op, unknown, patience)
            except UnavailableError as error:
                if isinstance(error, HeldError):
                    raise (unknown or error) from error
                last = error
            if not await patience.wait(last):
                raise unknown or last

    async def _look(self, scope: str, op: Op, unknown: UnknownOutcomeError, patience: _Patience) -> int:
        """Return the number of a commit that must not be sent again, if the head shows it."""
        looks = 0
        while True:
            try:
                found = (await self.backend.head(scope)).writers.get(op.writer)
            except UnavailableError:
                pass  # it says nothing about the commit
            else:
                if found is not None and found.n == op.n:
                    return found.number
                looks += 1
                if looks == _LOOKS:
                    raise unknown
            if not await patience.wait(unknown):
                raise unknown

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """Yield the scope's keys under ``prefix`` in byte order; what fails goes on after the last one yielded."""
        async with aclosing(self._resumed("keys", lambda: self.backend.keys(scope, prefix))) as found:
            async for key in found:
                yield key

    async def scopes(self) -> AsyncIterator[str]:
        """Yield the names of the scopes that have had a commit, in byte order."""
        async with aclosing(self._resumed("scopes", self.backend.scopes)) as found:
            async for scope in found:
                yield scope

    async def _resumed(self, call: str, begin: Callable[[], AsyncIterator[T]]) -> AsyncGenerator[T, None]:
        """Yield what ``begin`` yields; after a failure begin anew and leave out what was yielded already.

        The deadline is that of each item, not of the whole, and the consumer's own time does not count.
        """
        last: Any = None
        patience: _Patience | None = None
        while True:
            items = begin()
            try:
                try:
                    while True:
                        patience = patience or _Patience(self, call, self._clock())
                        item: Any = await anext(items)
                        if last is None or item > last:
                            last, patience = item, None
                            yield item
                finally:
                    if isinstance(items, AsyncGenerator):
                        await items.aclose()  # its connection is needed for the next attempt
            except StopAsyncIteration:
                return
            except HeldError:
                raise
            except UnavailableError as error:
                assert patience is not None
                if not await patience.wait(error):
                    raise

    async def _again(self, call: str, attempt: Callable[[], Awaitable[T]]) -> T:
        patience = _Patience(self, call, self._clock())
        while True:
            try:
                return await attempt()
            except HeldError:
                raise
            except UnavailableError as error:
                if not await patience.wait(error):
                    raise
