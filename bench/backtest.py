"""Speed of a backtest, beside a bare loop over the same candles: ``python -m bench.backtest [--json]``.

The bare loop does in plain Python what no backtest can leave out: for each
candle the five-candle price and the comparison of high and low with two levels.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

from holdfast.engine.backtest import Backtest
from holdfast.engine.listeners import Listeners, Performance
from holdfast.engine.registry import Registry
from holdfast.rules.candles import MINUTE_MS, Candle, Window, average_price

CANDLES = 200_000
ROUNDS = 3
START_MS = 1_600_000_200_000
TARGET_SECONDS_PER_MILLION = 60.0


def make_candles(count: int, seed: int = 1) -> list[Candle]:
    """Return a seeded random walk of one-minute candles."""
    dice, price, candles = random.Random(seed), 100.0, []
    for minute in range(count):
        opened, price = price, price * (1 + dice.gauss(0, 0.0007))
        high, low = max(opened, price) * 1.0003, min(opened, price) * 0.9997
        candles.append(Candle(START_MS + minute * MINUTE_MS, opened, high, low, price, dice.random() * 10))
    return candles


def bare_loop(candles: Sequence[Candle]) -> int:
    """Do for each candle the least that the rules need; return how many levels were hit."""
    hits, target, stop = 0, candles[0].close * 1.02, candles[0].close * 0.98
    for at in range(5, len(candles)):
        candle = candles[at]
        price = average_price(candles[at - 4 : at + 1])
        if candle.high >= target or candle.low <= stop:
            hits += 1
            target, stop = price * 1.02, price * 0.98
    return hits


def price_loop(candles: Sequence[Candle]) -> None:
    """Compute the price at every candle, as a run does while a signal is open."""
    window = Window(5)
    for candle in candles:
        window.push(candle)
        window.price()


async def backtest(candles: Sequence[Candle], strategy: Any) -> Performance:
    """Run one backtest over ``candles`` and return where its time went."""
    registry, listeners = Registry(), Listeners()
    found: list[Performance] = []

    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> Sequence[Candle]:
        at = max(0, -(-(since_ms - START_MS) // MINUTE_MS))
        return candles[at : at + limit]

    registry.add_exchange(exchange_name="bench", get_candles=get_candles)
    registry.add_frame(frame_name="all", interval="1m", start=START_MS, end=candles[-1].open_time_ms)
    registry.add_strategy(strategy, strategy_name="walk", interval="5m")
    listeners.listen("performance", found.append)
    names = {"strategy_name": "walk", "exchange_name": "bench", "frame_name": "all"}
    async for _ in Backtest.run("WALK", **names, registry=registry, listeners=listeners):  # type: ignore[arg-type]
        pass
    Backtest.clear()
    return found[0]


def measure() -> dict[str, Any]:
    """Measure both in turn, several times, and keep the best of each: other programs only ever slow one down."""
    candles = make_candles(CANDLES)

    def idle(symbol: str, when_ms: int) -> None:
        return None

    def trading(symbol: str, when_ms: int) -> dict[str, Any] | None:
        if when_ms // MINUTE_MS % 60:
            return None
        close = candles[(when_ms - START_MS) // MINUTE_MS - 1].close
        return {
            "position": "long", "price_take_profit": close * 1.02, "price_stop_loss": close * 0.98,
            "minute_estimated_time": 600,
        }  # fmt: skip

    bare: list[float] = []
    priced: list[float] = []
    runs: dict[str, list[Performance]] = {"trading": [], "idle": []}
    for _ in range(ROUNDS):
        began = time.perf_counter()
        bare_loop(candles)
        bare.append(time.perf_counter() - began)
        began = time.perf_counter()
        price_loop(candles)
        priced.append(time.perf_counter() - began)
        for name, strategy in (("trading", trading), ("idle", idle)):
            runs[name].append(asyncio.run(backtest(candles, strategy)))
    best = {name: min(found, key=lambda one: one.seconds) for name, found in runs.items()}
    scale = 1_000_000 / CANDLES
    return {
        "candles": CANDLES,
        "bare_seconds_per_million": min(bare) * scale,
        "price_seconds_per_million": min(priced) * scale,
        "runs": {
            name: {
                "seconds_per_million": run.seconds * scale,
                "candles_per_second": run.candles / run.seconds,
                "speed_to_bare": min(bare) / run.seconds,
                "share": {part: seconds / run.seconds for part, seconds in run.parts.items()},
            }
            for name, run in best.items()
        },
        "target_seconds_per_million": TARGET_SECONDS_PER_MILLION,
        "met": best["trading"].seconds * scale <= TARGET_SECONDS_PER_MILLION,
    }


def main() -> int:
    """Print the figures; exit code 1 when a million candles take over a minute."""
    figures = measure()
    if "--json" in sys.argv[1:]:
        print(json.dumps({"backtest": figures}))
        return 0 if figures["met"] else 1
    print(f"backtest, {figures['candles']:,} one-minute candles, one core, best of {ROUNDS}")
    print(f"  bare loop           {figures['bare_seconds_per_million']:6.2f} s per million candles")
    print(
        f"  window and price    {figures['price_seconds_per_million']:6.2f} s (part of the step while a signal is open)"
    )
    for name, run in figures["runs"].items():
        share = ", ".join(f"{part} {part_share:.0%}" for part, part_share in run["share"].items())
        print(
            f"  {name:19} {run['seconds_per_million']:6.2f} s per million candles = "
            f"{run['candles_per_second']:,.0f}/s, {run['speed_to_bare']:.2f} times the bare loop's speed ({share})"
        )
    print(f"  target: at most {TARGET_SECONDS_PER_MILLION:.0f} s per million: {'met' if figures['met'] else 'MISSED'}")
    return 0 if figures["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
