"""The cutting proxy, which is part of the proof kit, and what tests of cut links share."""

from typing import TypeVar

from holdfast.contract import Backend
from holdfast.errors import UnavailableError
from holdfast.testing.proxy import Cut, Direction, How, Proxy

__all__ = ["SLACK_SECONDS", "Cut", "Direction", "How", "Proxy", "opened"]

SLACK_SECONDS = 2.0
"""What a busy machine may take beyond a deadline; who does not look at the deadline takes more."""

B = TypeVar("B", bound=Backend)


async def opened(backend: B) -> B:
    """Open, again where its short deadline passed: an open asks and probes more than any later call."""
    for _ in range(20):
        try:
            await backend.open()
        except UnavailableError:
            continue
        return backend
    raise AssertionError("never opened")
