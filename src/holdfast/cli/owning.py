"""What a command does about another process that has what it wants: options, and waiting for a store of one process."""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ..engine.ownership import ON_CONFLICT
from ..engine.worker import LEASE_SECONDS, SHORTEST_LEASE_SECONDS
from ..errors import HeldError, InvalidInputError
from .exits import complain

_LOOK_SECONDS = 0.5
_LONGEST_LEASE_SECONDS = 3600.0

T = TypeVar("T")


def add_lease_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--lease``."""
    parser.add_argument(
        "--lease",
        type=_lease_seconds,
        default=LEASE_SECONDS,
        metavar="SECONDS",
        help="a process that gave no sign of life for so long may be replaced; the same for all on one store "
        f"(default: {LEASE_SECONDS:g})",
    )


def add_conflict_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--on-conflict``."""
    parser.add_argument(
        "--on-conflict",
        choices=ON_CONFLICT,
        default="refuse",
        help="where another live process owns a context: end with an error (default), wait until it dies or lets go, "
        "or take over at once; a folder belongs to one process, so there only that process's end helps",
    )


def _lease_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not SHORTEST_LEASE_SECONDS <= seconds <= _LONGEST_LEASE_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{text!r:.40} is no lease: give {SHORTEST_LEASE_SECONDS:g} to {_LONGEST_LEASE_SECONDS:g} seconds"
        )
    return seconds


async def when_free(
    open_store: Callable[[], Awaitable[T]],
    on_conflict: str,
    *,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> T:
    """Open a store; where it belongs to one process, and another has it, do as ``on_conflict`` says.

    Args:
        open_store: Opens it, or raises ``HeldError``; called again and again while it is waited for.
        on_conflict: ``wait`` waits; ``takeover`` says why it cannot be done.
        sleep: Takes seconds; a seam for tests.

    Raises:
        HeldError: Another process holds it; the message names it.
        InvalidInputError: A takeover was asked for.
    """
    told = False
    while True:
        try:
            return await open_store()
        except HeldError as error:
            if on_conflict == "takeover":
                raise InvalidInputError(
                    f"{error}; a folder's store belongs to one process and cannot be taken from it: end that process, "
                    "then start again (or give --on-conflict wait before you end it)"
                ) from error
            if on_conflict != "wait":
                raise
            if not told:
                told = True
                complain(f"waiting: {error}")
        await sleep(_LOOK_SECONDS)
