"""Sending a commit until its outcome is known."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from ..contract import Key
from ..errors import FailedError, UnknownOutcomeError
from ..rows import Row
from ..store import Writer

_log = logging.getLogger("holdfast")

Sleep = Callable[[float], Awaitable[None]]

_FIRST_DELAY_SECONDS = 0.05
_LONGEST_DELAY_SECONDS = 5.0
MAX_RESENDS = 12
"""How often an op is sent again; with the delays between, about half a minute."""


async def commit_surely(
    writer: Writer,
    changes: Mapping[Key, Row | None],
    expect: Mapping[Key, int],
    *,
    sleep: Sleep = asyncio.sleep,
) -> int:
    """Commit, and where the answer is lost send the same op again until there is one.

    Args:
        sleep: Takes seconds; a seam for tests.

    Raises:
        ConflictError, UnavailableError: Nothing was changed.
        FailedError: The outcome is still unknown after :data:`MAX_RESENDS` attempts; only a new start can tell.

    Crash: Before the return, all of the changes or none; after it, all.
    """
    try:
        return await writer.commit(changes, expect)
    except UnknownOutcomeError as error:
        unknown = error
    delay_seconds = _FIRST_DELAY_SECONDS
    for _ in range(MAX_RESENDS):
        _log.warning("%s: the outcome of a commit is unknown (%s): sending it again", writer.name, unknown)
        await sleep(delay_seconds)
        delay_seconds = min(2 * delay_seconds, _LONGEST_DELAY_SECONDS)
        try:
            return await writer.resend()
        except UnknownOutcomeError as error:
            unknown = error
    raise FailedError(
        f"the outcome of a commit is still unknown after {MAX_RESENDS} attempts: mend the store, then start again",
        key=unknown.key,
        backend=unknown.backend,
    ) from unknown
