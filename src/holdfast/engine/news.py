"""News that is not an event: what a quiet candle, or a restart, found."""

from __future__ import annotations

from ..names import Context
from ..rows import Event, ScheduledSignal, Signal
from ..rules.candles import MINUTE_MS, Window
from ..rules.signals import State, progress_percent
from .listeners import Listeners, Tick
from .registry import Callbacks


def tick_of(context: Context, state: State, window: Window) -> Tick:
    """Return the news of a candle that changed nothing; ``window`` ends with it."""
    price = window.price()
    progress = None if state.signal is None else progress_percent(state.signal, price)
    side, percent = progress or ("profit", 0.0)
    return Tick(
        kind="active" if state.signal else "waiting" if state.scheduled else "idle",
        context=context,
        price=price,
        at_ms=(window.newest_ms or 0) + MINUTE_MS,
        signal=state.signal or state.scheduled,
        percent=percent if side == "profit" else -percent,
    )


async def tell_restored(signal: Signal, callbacks: Callbacks, listeners: Listeners, tick: Tick) -> None:
    """Call ``on_active``, or ``on_schedule`` with an event of number 0, for what a restart found."""
    context, at_ms = tick.context, tick.at_ms
    if isinstance(signal, ScheduledSignal):
        if callbacks.on_schedule is not None:
            again = Event(
                id=f"{context}#restored:{signal.id}", number=0, kind="scheduled", at_ms=at_ms,
                candle_ms=at_ms - MINUTE_MS, signal=signal, price=tick.price,
            )  # fmt: skip
            await listeners.call(callbacks.on_schedule, again, where="callback", context=context, at_ms=at_ms)
    elif callbacks.on_active is not None:
        await listeners.call(callbacks.on_active, tick, where="callback", context=context, at_ms=at_ms)
