"""Sending a commit until its outcome is known."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from ..contract import Key
from ..errors import FailedError, UnavailableError, UnknownOutcomeError
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
    patient: Callable[[], bool] | None = None,
) -> int:
    """Commit, and where the answer is lost send the same op again until there is one.

    Args:
        sleep: Takes seconds; a seam for tests.
        patient: For callers that rely on "nothing was changed". Asked each time the store cannot be used while the
            outcome is unknown: True waits for it, however long.

    Raises:
        ConflictError: Nothing was changed.
        UnavailableError: Nothing was changed. Without ``patient`` it may also be that an answer was lost and the store
            cannot be asked now; the lane finds out before its next commit, so read again before deciding again.
        FailedError: The outcome is still unknown after :data:`MAX_RESENDS` attempts; only a new start can tell.

    Crash: Before the return, all of the changes or none; after it, all.
    """
    try:
        return await writer.commit(changes, expect)
    except UnknownOutcomeError as error:
        unknown = error
    delay_seconds = _FIRST_DELAY_SECONDS
    attempts = 0
    while attempts < MAX_RESENDS:
        _log.warning("%s: the outcome of a commit is unknown (%s): sending it again", writer.name, unknown)
        await sleep(delay_seconds)
        delay_seconds = min(2 * delay_seconds, _LONGEST_DELAY_SECONDS)
        try:
            return await writer.resend()
        except UnknownOutcomeError as error:
            unknown = error
            attempts += 1
        except UnavailableError:
            if patient is None:
                raise
            attempts += not patient()
    raise FailedError(
        f"the outcome of a commit is still unknown after {MAX_RESENDS} attempts: mend the store, then start again",
        key=unknown.key,
        backend=unknown.backend,
    ) from unknown
