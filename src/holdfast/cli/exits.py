"""Exit codes, the same for every command, and how an error is told to a person."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .. import arguments
from ..errors import (
    CorruptedError,
    FencedError,
    HoldfastError,
    InvalidInputError,
    NotFoundError,
    UndecidedError,
    UnsafeSettingError,
)

OK = 0
LOSS = 1
"""A loss, or a broken rule, was found."""
USAGE = arguments.USAGE
"""The command, the user's file or a setting has to be mended."""
UNAVAILABLE = 3
"""The store or the market cannot be used now, or another process holds the store."""
STOPPED = 4
"""Another owner has taken over, what is stored cannot be trusted, or an operator has to decide."""


def exit_code(error: HoldfastError) -> int:
    """Return the exit code for an error that ended a command."""
    if isinstance(error, FencedError | CorruptedError | UndecidedError):
        return STOPPED
    if isinstance(error, InvalidInputError | UnsafeSettingError | NotFoundError):
        return USAGE
    return UNAVAILABLE


def complain(message: object) -> None:
    """Write one message to standard error."""
    print(f"holdfast: {message}", file=sys.stderr, flush=True)


class _Once(logging.Handler):
    """Tells each warning of the library once, however often a command opens the same store."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._told:
            self._told.add(message)
            complain(message)


@contextmanager
def warnings_once() -> Iterator[None]:
    """Write the library's warnings to standard error while a command runs, each once."""
    logger, handler = logging.getLogger("holdfast"), _Once()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
