"""What several benches share: the row that they write, how a call is timed, and one line of a report."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from holdfast.contract import Key
from holdfast.rows import Signal


def make_key(number: int) -> Key:
    """Return the key of a context of its own."""
    return Key("signal", f"SYM{number:05d}_trend_binance", f"SYM{number:05d}")


def make_signal(number: int, note: str = "breakout " * 22) -> Signal:
    """Return an open signal as a strategy makes one, of 600 bytes when stored if its note is this long."""
    return Signal(
        id=f"binance:BTCUSDT:trend:{number}",
        symbol="BTCUSDT",
        exchange_name="binance",
        strategy_name="trend",
        position="long",
        note=note,
        price_open=43_000.25 + number,
        price_take_profit=43_900.5 + number,
        price_stop_loss=42_500.125 + number,
        minute_estimated_time=240,
        scheduled_at=1_700_000_000_000 + number,
        pending_at=1_700_000_000_000 + number,
    )


async def timed(repeat: int, call: Callable[[int], Awaitable[object]]) -> list[float]:
    """Return the seconds that each of ``repeat`` calls took, one after another."""
    times = []
    for at in range(repeat):
        began = time.perf_counter()
        await call(at)
        times.append(time.perf_counter() - began)
    return times


def line(
    name: str, floor: float, ours: float, ratio: float, target: float | None, *, most: bool, unit: str
) -> dict[str, Any]:
    """Return one line of a report; ``target`` None: there is none to meet."""
    met = target is None or (ratio <= target if most else ratio >= target)
    return {"name": name, "unit": unit, "floor": floor, "ours": ours, "ratio": ratio, "target": target,
            "direction": "at most" if most else "at least", "met": met}  # fmt: skip
