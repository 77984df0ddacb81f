"""Cancellations that nobody asked for.

User code may let out a ``CancelledError`` of its own: it awaited a future that somebody else cancelled, or its
client library closed a connection. Taken for a cancellation of the run, it would end the watching of an open
position without a word, because nothing treats a cancellation as a failure.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from .errors import UnavailableError


class StrayCancellations:
    """A ``with`` block around user code: a ``CancelledError`` that nobody asked of this task becomes an ordinary error.

    Raises:
        UnavailableError: The code within raised ``CancelledError``, and nobody has cancelled the running task.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not asyncio.CancelledError:
            return
        task = asyncio.current_task()
        if task is not None and not task.cancelling():
            raise UnavailableError("CancelledError came out of it, though nobody cancelled the run") from error


no_stray_cancellation = StrayCancellations()
