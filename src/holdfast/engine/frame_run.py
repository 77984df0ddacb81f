"""One context over one piece of history, once: the loop of a backtest. Memory alone; nothing here knows of storage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping

from ..names import Context
from ..rows import Event, RiskPosition
from ..rules.candles import MAX_FETCH_CANDLES, MINUTE_MS, Candle, Window, fetch_candles, interval_ms, preload_from_ms
from ..rules.params import Params
from ..rules.risk import RiskProfile
from ..rules.signals import Question, Spec, State, Transition, expire, progress_percent, step, stop_scheduled
from .context import Sleep
from .listeners import Listeners, Performance, Progress, Tick
from .registry import ExchangeSpec, FrameSpec, StrategySpec
from .settle import Settled, Settler

_BREATH_SECONDS = 0.005  # how long other tasks of the loop may have to wait
_DAY_MS = 1440 * MINUTE_MS


class FrameRun:
    """One run. :class:`~holdfast.engine.backtest.Backtest` makes these.

    Args:
        profiles: The risk profiles that the strategy names.
        sleep: Takes seconds; pauses between attempts to fetch candles.
        now_ms: The present, to cap the frame.
    """

    def __init__(
        self,
        symbol: str,
        *,
        strategy: StrategySpec,
        exchange: ExchangeSpec,
        frame: FrameSpec,
        profiles: Mapping[str, RiskProfile],
        params: Params,
        listeners: Listeners,
        sleep: Sleep = asyncio.sleep,
        now_ms: Callable[[], float] = lambda: time.time() * 1000,
    ) -> None:
        self.context = Context(exchange.exchange_name, symbol, strategy.strategy_name)
        self.frame, self.params, self.listeners = frame, params, listeners
        self.stopping = False
        """Set it to let nothing more open; the run ends when nothing is open."""
        self.state = State()
        self.candles_stepped = 0
        self.seconds = {"fetch": 0.0, "strategy": 0.0, "tell": 0.0}
        """Where time went; what is missing to the whole is the step itself."""
        self._exchange, self._sleep, self._callbacks = exchange, sleep, strategy.callbacks
        # A frame of a coarse interval asks as coarsely; every minute is stepped all the same.
        slot_ms = max(strategy.interval_ms, interval_ms(frame.interval))
        self._spec = Spec(self.context, slot_ms, params, strategy.risk_names)
        self._window = Window(params.avg_price_candles_count)
        self._settler = Settler(
            strategy, exchange, mode="backtest", params=params, profiles=profiles, listeners=listeners, sleep=sleep
        )
        # Inclusive, but nothing of today: it is not over, so a rerun would differ.
        self._end_ms = min(frame.end_ms, int(now_ms()) // _DAY_MS * _DAY_MS - MINUTE_MS)
        self._now_ms = now_ms
        self._cursor_ms = max(0, preload_from_ms(frame.start_ms, slot_ms, params))
        self._last: Candle | None = None
        self._breath_at = 0.0

    async def events(self) -> AsyncGenerator[Event, None]:
        """Step through the frame and yield closed and cancelled events, after they were told."""
        began = self._breath_at = time.perf_counter()
        await self._warm_up()
        while chunk := await self._next_chunk():
            at = 0
            while at < len(chunk) and not self._ended(chunk[at]):
                at, events = await self._advance(chunk, at)
                for event in events:
                    if event.kind in ("closed", "cancelled"):
                        yield event
            await self._progress()
            if at < len(chunk):
                break
        for event in await self._run_out():
            yield event
        await self._progress(ended=True)
        await self._performance(time.perf_counter() - began)

    def _ended(self, candle: Candle) -> bool:
        # What is open or waiting at the frame's end is watched on; once it is gone, nothing new opens.
        at_rest = self.state.signal is None and self.state.scheduled is None
        return at_rest and (self.stopping or candle[0] > self._end_ms)

    async def _advance(self, chunk: list[Candle], at: int) -> tuple[int, tuple[Event, ...]]:
        """Step until something happens or the chunk ends; return where to go on, and what happened."""
        if self.stopping and self.state.scheduled is not None and self._last is not None:
            dropped = stop_scheduled(self.state, self._spec, self._last, self._window.price())
            return at, await self._record(Settled(dropped))
        noisy = self.listeners.wants_ticks(self._callbacks, "backtest")
        reached, outcome = self._quietly(chunk, at, at + 1 if noisy else len(chunk))
        events: tuple[Event, ...] = ()
        if isinstance(outcome, Question):
            began = time.perf_counter()
            settled = await self._settler.settle(outcome, _no_slots)
            self.seconds["strategy"] += time.perf_counter() - began
            events = await self._record(settled)
        elif outcome is not None:
            events = await self._record(Settled(outcome))
        if noisy and not events:
            await self._tell_tick()
        if time.perf_counter() - self._breath_at > _BREATH_SECONDS:
            await asyncio.sleep(0)
            self._breath_at = time.perf_counter()
        return reached, events

    def _quietly(self, chunk: list[Candle], at: int, end: int) -> tuple[int, Transition | Question | None]:
        # The hot loop: plain calls only. Returns where to go on, and what the candle before there brought.
        state, window, spec = self.state, self._window, self._spec
        push, decide = window.push, step
        outcome, reached = None, end
        for index in range(at, end):
            candle = chunk[index]
            push(candle)
            outcome = decide(state, candle, window, spec)
            if outcome is not None:
                reached = index + 1
                break
        self._last = chunk[reached - 1]
        self.candles_stepped += reached - at
        return reached, outcome

    async def _record(self, settled: Settled) -> tuple[Event, ...]:
        transition = settled.transition
        if transition is None:
            return ()
        self.state = transition.state
        began = time.perf_counter()
        await self._settler.tell_risk(settled)
        for event in transition.events:
            await self.listeners.tell(event, self._callbacks, "backtest")
        self.seconds["tell"] += time.perf_counter() - began
        return transition.events

    async def _run_out(self) -> tuple[Event, ...]:
        """Out of candles: an open signal ends at the last price; a waiting one is cancelled."""
        if self._last is None:
            return ()
        ended = expire(self.state, self._spec, self._last, self._window.price())
        ended = ended or stop_scheduled(self.state, self._spec, self._last, self._window.price())
        return await self._record(Settled(ended))

    async def _tell_tick(self) -> None:
        state, last = self.state, self._last
        if last is None:
            return
        price = self._window.price()
        moved = None if state.signal is None else progress_percent(state.signal, price)
        percent = 0.0 if moved is None else moved[1] if moved[0] == "profit" else -moved[1]
        tick = Tick(
            kind="active" if state.signal else "waiting" if state.scheduled else "idle",
            context=self.context, price=price, at_ms=last[0] + MINUTE_MS,
            signal=state.signal or state.scheduled, percent=percent,
        )  # fmt: skip
        await self.listeners.tell_tick(tick, self._callbacks, "backtest")

    async def _warm_up(self) -> None:
        # As a live bot would: the price and the slots of the first minutes look back before the frame.
        start_ms = self.frame.start_ms
        for candle in await self._fetch(self._cursor_ms, start_ms - MINUTE_MS):
            self._window.push(candle)
        self._cursor_ms = start_ms

    async def _next_chunk(self) -> list[Candle]:
        """Return the next candles; empty when there are no more to step."""
        while self._cursor_ms <= self._end_ms:
            chunk = await self._fetch(self._cursor_ms, self._end_ms)
            self._cursor_ms = chunk[-1][0] + MINUTE_MS if chunk else self._cursor_ms + MAX_FETCH_CANDLES * MINUTE_MS
            if chunk:
                return chunk  # else a gap: what is missing is not stepped
        if self.state.signal is None and self.state.scheduled is None:
            return []
        self._cursor_ms = max(self._end_ms + MINUTE_MS, self._after_last_ms)
        return await self._fetch(self._cursor_ms, None)

    @property
    def _after_last_ms(self) -> int:
        return 0 if self._last is None else self._last[0] + MINUTE_MS

    async def _fetch(self, since_ms: int, end_ms: int | None) -> list[Candle]:
        limit = MAX_FETCH_CANDLES
        if end_ms is not None:
            limit = min(limit, (end_ms - since_ms) // MINUTE_MS + 1)
            if limit <= 0:
                return []
        began = time.perf_counter()
        chunk = await fetch_candles(
            self._exchange.get_candles, self.context.symbol, "1m", since_ms=since_ms, limit=limit,
            until_ms=int(self._now_ms()) if end_ms is None else end_ms + MINUTE_MS,
            params=self.params, sleep=self._sleep, on_candle_data=self._exchange.on_candle_data,
        )  # fmt: skip
        self.seconds["fetch"] += time.perf_counter() - began
        return chunk

    async def _progress(self, *, ended: bool = False) -> None:
        if not self.listeners.has("progress"):
            return
        start_ms = self.frame.start_ms
        total = max(0, self._end_ms - start_ms + MINUTE_MS) // MINUTE_MS
        reached = total if ended else max(0, self._after_last_ms - start_ms) // MINUTE_MS
        await self.listeners.emit(
            "progress",
            Progress(
                context=self.context, frame_name=self.frame.frame_name, done=min(reached, total), total=total
            ),
        )  # fmt: skip

    async def _performance(self, seconds: float) -> None:
        if not self.listeners.has("performance"):
            return
        parts = {**self.seconds, "step": seconds - sum(self.seconds.values())}
        await self.listeners.emit(
            "performance",
            Performance(
                context=self.context, mode="backtest", metric="backtest", seconds=seconds,
                candles=self.candles_stepped, parts=parts,
            ),
        )  # fmt: skip


def _no_slots(risk_name: str) -> tuple[RiskPosition, ...]:
    # One context runs alone, and it is asked only while nothing of it is open: nobody holds a slot then.
    return ()
