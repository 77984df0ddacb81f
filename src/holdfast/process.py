"""What belongs to the process as a whole: its stores, and the names and listeners that were added to it."""

from __future__ import annotations

from .documents import default
from .engine.backtest import Backtest
from .engine.listeners import default_listeners
from .engine.live import Live
from .engine.registry import default_registry
from .rules.params import reset_config


async def close() -> None:
    """Close every store that the adapters and live runs of this process share; the next use opens it again.

    Crash: As before the call: nothing acknowledged depends on it.
    """
    await default.close_stores()


def reset() -> None:
    """Forget all that was added or changed: exchanges, strategies, …, listeners, parameters, adapters (for tests)."""
    default_registry.reset()
    default_listeners.clear()
    Backtest.clear()
    Live.clear()
    reset_config()
    default.reset()
