"""A process that wants to own contexts, and when it has been replaced waits for them again: ``owner_process.py URL``.

Its market and its record are :mod:`fleet_bot`'s. Ends with SIGTERM.
"""

from __future__ import annotations

import asyncio
import signal
import sys

import fleet_bot

from holdfast.contract import Survives
from holdfast.engine.live import Live
from holdfast.engine.registry import default_registry
from holdfast.errors import FencedError, HoldfastError, UnavailableError
from holdfast.store import Store
from holdfast.urls import open_backend

_OPENINGS = 10


async def hold(store: Store, symbol: str, lease_seconds: float) -> None:
    """Own the symbol's context whenever nobody else does."""
    record = fleet_bot.RECORD
    assert record is not None
    while True:
        run = Live.run(
            symbol, strategy_name=fleet_bot.STRATEGY, exchange_name=fleet_bot.EXCHANGE, store=store,
            on_conflict="wait", lease_seconds=lease_seconds,
        )  # fmt: skip
        try:
            async for _ in run:
                pass
            return  # the market has ended
        except FencedError as error:
            record.line("fenced", context=str(run.context), error=str(error))
        except HoldfastError as error:
            record.line("failed", context=str(run.context), error=f"{type(error).__name__}: {error}")
        finally:
            await run.aclose()


async def main(url: str, lease_seconds: float) -> None:
    """Hold every symbol of the market until it ends, or SIGTERM comes."""
    store = Store(open_backend(url), require=Survives.NOTHING)  # some of the tests' servers are kept in memory
    for attempts_left in reversed(range(_OPENINGS)):
        try:
            await store.open()
            break
        except UnavailableError:  # the other one, held up by a busy machine, may keep a file locked for long
            if not attempts_left:
                raise
    symbols = default_registry.strategy(fleet_bot.STRATEGY).symbols
    tasks = [asyncio.ensure_future(hold(store, symbol, lease_seconds)) for symbol in symbols]

    def end() -> None:
        for task in tasks:
            task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    await store.close()
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
