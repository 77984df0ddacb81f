"""The engine's cost beside the pure step: ``python -m bench.engine [--json]``.

Two figures, the second as a ratio to a floor measured in the same run, medians of interleaved rounds:

* how many storage calls an unchanged tick makes, with an open, a waiting and an idle context (must be 0);
* how long 1,000 contexts take to step one tick on one event loop, over the bare step functions called in a
  loop with the same states and candles (must be under 1.5).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Guarantees, Head, Key, KeyPrefix, Op, Record, Survives
from holdfast.engine.listeners import Listeners
from holdfast.engine.registry import ExchangeSpec, Registry
from holdfast.engine.session import Session
from holdfast.names import Context
from holdfast.rows import ScheduledSignal, Signal
from holdfast.rules.candles import MINUTE_MS, Candle, Window
from holdfast.rules.params import Params
from holdfast.rules.signals import Spec, State, step
from holdfast.store import Store

CONTEXTS = 1000
ROUNDS = 41
TICKS = 5
"""Ticks in a round; their strategies are asked in none of them."""
START_MS = 1_700_000_100_000
LIMIT_RATIO = 1.5


class CountingBackend:
    """A memory backend that counts its calls."""

    def __init__(self) -> None:
        self._inner = MemoryBackend()
        self.calls = 0

    async def open(self, *, read_only: bool = False) -> Guarantees:
        return await self._inner.open(read_only=read_only)

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        self.calls += 1
        return await self._inner.read(scope, keys)

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:
        self.calls += 1
        return await self._inner.commit(scope, changes, expect, op=op)

    async def head(self, scope: str) -> Head:
        self.calls += 1
        return await self._inner.head(scope)

    def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        self.calls += 1
        return self._inner.keys(scope, prefix)

    def scopes(self) -> AsyncIterator[str]:
        self.calls += 1
        return self._inner.scopes()

    async def close(self) -> None:
        await self._inner.close()


def state_of(number: int, context: Context) -> State:
    """Return one of three states in turn: idle, open, waiting; prices are far from every level."""
    kind: Any = (None, Signal, ScheduledSignal)[number % 3]
    if kind is None:
        return State(last_candle_ms=START_MS - MINUTE_MS)
    signal = kind(
        id=f"s{number}", position="long", price_open=100.0 if kind is Signal else 90.0, price_take_profit=150.0,
        price_stop_loss=60.0, minute_estimated_time=1_000_000, symbol=context.symbol,
        exchange_name=context.exchange_name, strategy_name=context.strategy_name, scheduled_at=START_MS - MINUTE_MS,
        pending_at=START_MS - MINUTE_MS,
    )  # fmt: skip
    waiting = kind is ScheduledSignal
    return State(None if waiting else signal, signal if waiting else None, last_candle_ms=START_MS - 2 * MINUTE_MS)


def candle_at(minute: int) -> Candle:
    """Return a quiet candle."""
    return Candle(START_MS + minute * MINUTE_MS, 100.0, 100.4, 99.6, 100.0 + minute % 3 * 0.1, 5.0)


async def made_sessions(store: Store, params: Params) -> list[Session]:
    """Return recovered sessions in the three states, with windows that are full."""
    registry = Registry()

    @registry.add_strategy(strategy_name="quiet", interval="1h")
    def quiet(symbol: str, when_ms: int) -> None:
        return None

    exchange: ExchangeSpec = registry.add_exchange(exchange_name="none", get_candles=lambda *args: [])
    sessions = []
    for number in range(CONTEXTS):
        context = Context("none", f"SYMBOL{number}", "quiet")
        session = Session(
            context, registry.strategy("quiet"), exchange, store, listeners=Listeners(), params=params,
            risk_profiles={}, holder="bench",
        )  # fmt: skip
        await session.recover()
        session.state = state_of(number, context)
        warm(session.window)
        sessions.append(session)
    return sessions


def warm(window: Window) -> None:
    """Fill a window up to the start."""
    for minute in range(-10, 0):
        window.push(candle_at(minute))


class Floor:
    """The bare step functions over the same states and candles."""

    def __init__(self, sessions: list[Session], params: Params) -> None:
        self.parts: list[tuple[State, Window, Spec]] = []
        for session in sessions:
            window = Window(params.avg_price_candles_count)
            warm(window)
            self.parts.append((session.state, window, session.spec))

    def tick(self, candle: Candle) -> int:
        """Step every context once; return how many changed."""
        changed = 0
        for state, window, spec in self.parts:
            window.push(candle)
            if step(state, candle, window, spec, entries=True) is not None:
                changed += 1
        return changed


async def engine_tick(sessions: list[Session], candle: Candle) -> int:
    """Step every session once, on the event loop; return how many changed."""
    changed = 0
    for session in sessions:
        outcome = session.step(candle)
        if outcome is not None:
            await outcome
            changed += 1
    return changed


async def measure() -> dict[str, Any]:
    """Return the figures."""
    params = msgspec.structs.replace(Params(), schedule_await_minutes=1_000_000)
    backend = CountingBackend()
    store = Store(backend, require=Survives.NOTHING)
    await store.open()
    sessions = await made_sessions(store, params)
    floor = Floor(sessions, params)
    before = backend.calls
    engine_seconds, floor_seconds, ratios = [], [], []
    minute = changed = 0
    gc.collect()
    gc.disable()
    for round_number in range(ROUNDS):
        spent = {"engine": 0.0, "floor": 0.0}
        for _ in range(TICKS):
            if (START_MS // MINUTE_MS + minute + 1) % 60 == 0:
                # The first candle of an hour asks the strategies: it is not timed, for either.
                for window in (*(session.window for session in sessions), *(part[1] for part in floor.parts)):
                    window.push(candle_at(minute))
                minute += 1
            candle = candle_at(minute)
            minute += 1
            for who in ("engine", "floor") if round_number % 2 else ("floor", "engine"):
                began = time.perf_counter()
                changed += await engine_tick(sessions, candle) if who == "engine" else floor.tick(candle)
                spent[who] += time.perf_counter() - began
        if round_number:  # the first one warms up
            engine_seconds.append(spent["engine"] / TICKS)
            floor_seconds.append(spent["floor"] / TICKS)
            ratios.append(spent["engine"] / spent["floor"])
    gc.enable()
    calls = backend.calls - before
    for session in sessions:
        await session.close()
    await store.close()
    assert changed == 0, "a tick changed something: the figures would mean nothing"
    ratio = statistics.median(ratios)
    return {
        "storage_calls_of_unchanged_ticks": calls,
        "ticks": (ROUNDS * TICKS) * CONTEXTS,
        "contexts": CONTEXTS,
        "engine_tick_ms": round(statistics.median(engine_seconds) * 1000, 3),
        "floor_tick_ms": round(statistics.median(floor_seconds) * 1000, 3),
        "ratio": round(ratio, 3),
        "limit_ratio": LIMIT_RATIO,
        "good": calls == 0 and ratio < LIMIT_RATIO,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures; 1 if one is beyond its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    figures = asyncio.run(measure())
    if options.json:
        print(json.dumps(figures))
    else:
        print(f"unchanged ticks: {figures['ticks']:,}, storage calls: {figures['storage_calls_of_unchanged_ticks']}")
        print(
            f"one tick of {figures['contexts']:,} contexts: {figures['engine_tick_ms']} ms; bare steps "
            f"{figures['floor_tick_ms']} ms; ratio {figures['ratio']} (under {figures['limit_ratio']})"
        )
    return 0 if figures["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
