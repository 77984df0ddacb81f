"""What belongs to the process as a whole: its stores, and the names and listeners that were added to it."""

from __future__ import annotations

from .listeners import default_listeners
from .live import Live
from .params import reset_config
from .registry import default_registry
from .shared import close_stores


async def close() -> None:
    """Close every store that the adapters and live runs of this process share; the next use opens it again.

    Crash: As before the call: nothing acknowledged depends on it.
    """
    await close_stores()


def reset() -> None:
    """Forget exchanges, strategies, frames, risk profiles, listeners, ended runs and changed parameters (for tests)."""
    default_registry.reset()
    default_listeners.clear()
    Live.clear()
    reset_config()
