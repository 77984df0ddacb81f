"""Driving one context live: wait for a closed candle, fetch what is missing, step it, deliver what came of it."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack

from ..cancellation import no_stray_cancellation
from ..documents.default import lent_store
from ..errors import HeldError, HoldfastError, UnavailableError, UnknownOutcomeError
from ..market.clock import WallClock
from ..market.protocol import MarketEnded
from ..names import Context
from ..rows import Event
from ..rules.candles import MAX_FETCH_CANDLES, MINUTE_MS, Candle, CandleError, fetch_candles, preload_from_ms
from ..rules.params import Params
from ..rules.risk import RiskProfile
from ..store import Store
from .executor import Executor
from .gap import Gap
from .health import health_of
from .holder import holder_of
from .lanes import Sleep
from .listeners import Failure, Listeners, Performance
from .modes import TroublePolicy
from .ownership import OnConflict
from .registry import ExchangeSpec, StrategySpec
from .session import Session
from .tending import require_account
from .turns import Turn
from .until import Flag, Until
from .worker import LEASE_SECONDS, SignOfLife, sign_of_life

_YIELDED = frozenset(("opened", "closed", "cancelled"))
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0
_MOST_REFUSALS = 5
"""An exchange mends a candle within minutes or never; then what is open must be watched without that candle."""
_FRESH_MS = MINUTE_MS
"""How far behind the newest closed minute a candle may be and still allow an entry: exchanges publish late."""


class Driver:
    """One live run of one context.

    Args:
        context: What it runs.
        strategy: Who proposes.
        exchange: Where candles come from; its ``wait_closed`` is the clock, or else the wall clock is.
        turn: Its place among those that share a risk profile; taken before the run starts.
        store: An open store; None for the process's default one.
        profiles: The risk profiles that the strategy names.
        holder: By which it knows its own rows on the store; empty: :func:`holder_of` says.
        clock: Tells the time in epoch milliseconds.
        sleep: Takes seconds; a seam for tests.
        on_conflict, lease_seconds, on_trouble: See :meth:`holdfast.engine.live.Live.run`.
    """

    def __init__(
        self,
        context: Context,
        strategy: StrategySpec,
        exchange: ExchangeSpec,
        turn: Turn,
        *,
        store: Store | None,
        profiles: dict[str, RiskProfile],
        listeners: Listeners,
        params: Params,
        clock: Callable[[], int],
        sleep: Sleep,
        on_conflict: OnConflict = "refuse",
        lease_seconds: float = LEASE_SECONDS,
        on_trouble: TroublePolicy = TroublePolicy(),
        holder: str = "",
    ) -> None:
        self.context, self.turn, self.session = context, turn, None
        self._strategy, self._exchange, self._store = strategy, exchange, store
        self._profiles, self._listeners, self._params = profiles, listeners, params
        self._holder, self._clock, self._sleep = holder, clock, sleep
        self._on_conflict, self._lease_seconds, self._on_trouble = on_conflict, lease_seconds, on_trouble
        wall = WallClock(now=lambda: clock() / 1000, sleep=sleep)
        self._wait_closed = exchange.wait_closed or wall.wait_closed
        self._stop, self._leaving = Flag(), Flag()
        self._queue: deque[Candle] = deque()
        self._newest_ms: int | None = None
        """Open time of the newest closed minute that was waited for."""
        self._newest_at_seconds = 0.0
        """When that was, by the loop's clock."""
        self._next_ms: int | None = None
        """Open time of the next candle to fetch; None before the first."""
        self._more = False
        """The last fetch ended before the newest candle: there may be more."""
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._gap: Gap | None = None
        """What is planned about the candles that were missed; None before it has recovered."""
        self._refusals = 0
        """How often in a row the exchange gave candles that cannot be true."""

    session: Session | None

    def stop(self) -> None:
        """Let nothing more open; the run ends when nothing is open. Repeatable, also before the first candle."""
        self._stop.set()
        if self.session is not None:
            self.session.gate.stopping = True

    def leave(self) -> None:
        """End the run between two candles, whatever is open: somebody else is to go on with it. Repeatable."""
        self._leaving.set()
        if self.session is not None and self.session.executor is not None:
            self.session.executor.leave()

    @property
    def is_leaving(self) -> bool:
        """Whether it was told to :meth:`leave`."""
        return self._leaving.is_set()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Run until the market ends or the run is stopped; yields opened, closed and cancelled events.

        An event counts as delivered when the next one is asked for.

        Raises:
            FencedError, FailedError, CorruptedError, HeldError: Nobody watches this context any more.

        Crash: Starting again goes on from what is stored; an event that was not delivered comes again.
        """
        async with AsyncExitStack() as stack:
            stack.callback(self.turn.leave)
            stack.push_async_callback(self._leave_market)
            store = self._store if self._store is not None else await stack.enter_async_context(lent_store())
            session = self.new_session(store)
            stack.push_async_callback(session.close)
            if self._on_conflict == "wait":
                self.turn.stand_aside()  # the others must not wait for one that has nothing to decide yet
            try:
                await self._recover(session)
            except (UnavailableError, UnknownOutcomeError):
                if self._stop.is_set() or self._leaving.is_set():
                    return  # it never was its own: there is nothing to watch
                raise
            while True:
                while (event := await self._told(session)) is not None:
                    if event.kind in _YIELDED:
                        yield event
                    session.delivered()
                if self._leaving.is_set():
                    return
                if self._stop.is_set():
                    if await self._cancelled(session):
                        continue
                    if session.state.signal is None and session.state.scheduled is None:
                        await session.orders_quiet()
                        if len(session.outbox) == 0:
                            return
                        await self._pause()  # the ledger cannot be written now
                        continue
                if not await self._advance(session):
                    await session.orders_quiet()
                    return

    def new_session(self, store: Store) -> Session:
        """Return a session on an open store; whoever asks recovers and closes it."""
        holder = self._holder or holder_of(store)
        sign = sign_of_life(
            store, holder=holder, lease_seconds=self._lease_seconds, sleep=self._sleep, clock=self._clock
        )
        session = self.session = Session(
            self.context, self._strategy, self._exchange, store, listeners=self._listeners, params=self._params,
            risk_profiles=self._profiles, holder=holder, clock=self._clock, sleep=self._sleep,
            sign=sign, on_conflict=self._on_conflict, executor=self._executor(sign),
            health=health_of(store, self._on_trouble),
        )  # fmt: skip
        session.gate.stopping = self._stop.is_set()
        return session

    def _executor(self, sign: SignOfLife | None) -> Executor | None:
        if self._exchange.broker is None:
            return None
        return Executor(
            self._exchange.broker, format_quantity=self._exchange.format_quantity, params=self._params,
            listeners=self._listeners, sign=sign, clock=self._clock, sleep=self._sleep,
        )  # fmt: skip

    @staticmethod
    async def require_broker(session: Session) -> None:
        """Refuse to go on with orders that nobody could send anything for.

        Raises:
            InvalidInputError: There is no broker, and orders are not settled.
            UnavailableError: The store cannot be read now.
        """
        if session.executor is None:
            kept = session.writer.lifeline.kept_rows("order")  # which the store does not have yet
            await require_account(session.store, session.context, None, kept.values())

    async def _recover(self, session: Session) -> None:
        """Recover, however long the store takes to answer."""
        while True:
            try:
                await session.recover()
                await self.require_broker(session)
                self._gap = Gap(session, self._strategy.recovery, clock=self._clock)
                self._queue.clear()
                self._newest_ms = self._next_ms = None
                self._more = False
                return
            except HeldError:
                raise  # somebody else watches it
            except (UnavailableError, UnknownOutcomeError) as error:
                await self._report("store", error)
                if self._leaving.is_set():
                    raise
            await self._pause()  # a stop does not end this: a position may be stored, and must be watched

    async def _told(self, session: Session) -> Event | None:
        try:
            return await session.outbox.tell_next()
        except UnavailableError as error:
            await self._report("ledger", error)  # the event stays first; the next candle tries again
            return None

    async def _cancelled(self, session: Session) -> bool:
        """Once stopped: cancel what waits for its price; tell whether that is now done."""
        try:
            return await session.stop_scheduled() is not None
        except UnavailableError as error:
            await self._report("store", error)
            return False

    # ------------------------------------------------------------------ candles

    async def _advance(self, session: Session) -> bool:
        """Step the next candle, or wait for one; False when the market has ended."""
        gap = self._gap
        if not self._queue or (gap is not None and gap.wants_more(self._queue, self._newest_ms, self._more)):
            return await self._fetch_next(session)
        if session.gate.is_released:
            await self._recover(session)
            return True
        if session.executor is not None and (not await self._entered(session) or self._leaving.is_set()):
            return True
        if gap is not None and not await self._planned(gap):
            return True
        candle = self._queue.popleft()
        newest = not self._queue and self._is_fresh(candle) and not (gap is not None and gap.is_closing)
        began = time.perf_counter()
        await session.tell_restored()
        if not self.turn.free(candle[0]):
            await self.turn.wait(candle[0])
        changed = session.step(candle, entries=newest)
        quiet = changed is None or await changed is None
        if gap is not None and not gap.is_over:
            quiet = not await self._passed(gap, candle) and quiet
        self.turn.done(candle[0])
        if newest:
            if session.gate.outages and not session.gate.stopping:
                session.flush_soon()
            callbacks = self._strategy.callbacks
            if quiet and self._listeners.wants_ticks(callbacks, "live"):
                await self._listeners.tell_tick(session.tick(), callbacks, "live")
            if self._listeners.has("performance"):
                seconds = time.perf_counter() - began
                await self._listeners.emit(
                    "performance", Performance(context=self.context, mode="live", metric="tick", seconds=seconds)
                )
        return True

    async def _entered(self, session: Session) -> bool:
        """Have it known what became of an entry before anything is decided on it; False when that must wait."""
        try:
            return await session.settle_orders(self._queue[0]) is None  # else there is an event to tell first
        except UnavailableError as error:
            await self._report("store", error)
            await self._pause()
            return False

    def _is_fresh(self, candle: Candle) -> bool:
        """Whether a candle that is the last one at hand may begin something."""
        if self._more or candle[0] < (self._newest_ms or 0) - _FRESH_MS:
            return False
        # While it was not known what became of an entry, say, other minutes have closed.
        return asyncio.get_running_loop().time() - self._newest_at_seconds <= _FRESH_MS / 1000

    async def _planned(self, gap: Gap) -> bool:
        """Have what was missed planned and decided about before it is stepped; False when that must wait."""
        last = self._queue[-1]
        may_enter = self._is_fresh(last) and self.session is not None and self.session.gate.may_enter(last[0])
        try:
            await gap.plan(self._queue, last[0] if may_enter else None)
        except UnavailableError as error:
            await self._report("store", error)
            await self._pause()
            return False
        return True

    async def _passed(self, gap: Gap, candle: Candle) -> bool:
        try:
            return await gap.passed(candle)
        except UnavailableError as error:
            await self._report("store", error)  # the next candle tries again
            return False

    async def fetch_missed(self, session: Session) -> list[Candle]:
        """Return every closed candle since the session's last decision; those before go into its window.

        Raises:
            UnavailableError: The exchange gives none that can be trusted.
        """
        self._queue.clear()
        self._newest_ms, self._next_ms = await self._closed(session), None
        if self._newest_ms is not None:
            await self._fetch(session)
            while self._more:
                await self._fetch(session)
        return list(self._queue)

    async def _fetch_next(self, session: Session) -> bool:
        try:
            if not self._more:
                newest_ms = await self._closed(session)
                if newest_ms is None:
                    return True  # stopped while nothing was open
                self._newest_ms, self._newest_at_seconds = newest_ms, asyncio.get_running_loop().time()
            await self._fetch(session)
        except MarketEnded:
            return False
        except UnavailableError as error:
            await self._report("candles", error)
            if isinstance(error.__cause__, CandleError):
                self._refusals += 1
            if self._newest_ms is not None:
                self.turn.done(self._newest_ms)  # the others must not wait for this one's exchange
            await self._pause()
            return True
        self._pause_seconds, self._refusals = _FIRST_PAUSE_SECONDS, 0
        if not self._queue and not self._more and self._newest_ms is not None:
            self.turn.done(self._newest_ms)  # a thin market: this minute has no candle
            await session.tell_restored()
        return True

    async def _fetch(self, session: Session) -> None:
        """Fetch the candles up to the newest closed one, and those before them that a price and a slot need."""
        newest_ms = self._newest_ms
        assert newest_ms is not None
        if self._next_ms is None and session.state.last_candle_ms == 0:
            await session.begin(newest_ms)
        start_ms = max(self._next_ms or 0, session.state.last_candle_ms + MINUTE_MS)
        watching = session.state.signal is not None or session.state.scheduled is not None or session.is_behind
        recent_ms = newest_ms - _FRESH_MS
        if not watching and start_ms < recent_ms:
            # Nothing is open and nothing may open in the past: only the newest candles can change anything.
            session.gate.forbid(start_ms, recent_ms - MINUTE_MS)
            start_ms = recent_ms
        # From where the window ends, or from where it must begin: at the start an exchange may lag behind what
        # was decided already, and those candles belong to the price as soon as they come.
        since_ms = preload_from_ms(start_ms, self._strategy.interval_ms, self._params)
        # What waits in the queue, while the whole of a gap is fetched, comes into the window when it is stepped.
        reached_to_ms = self._queue[-1][0] if self._queue else session.window.newest_ms
        if reached_to_ms is not None:
            since_ms = max(since_ms, reached_to_ms + MINUTE_MS)
        since_ms = min(since_ms, start_ms)
        limit = min(MAX_FETCH_CANDLES, max(1, (newest_ms - since_ms) // MINUTE_MS + 1))
        batch = await fetch_candles(
            self._exchange.get_candles, self.context.symbol, "1m", since_ms=max(0, since_ms), limit=limit,
            until_ms=newest_ms + MINUTE_MS, known=self._known(session), leave_out=self._refusals >= _MOST_REFUSALS,
            params=self._params, sleep=self._sleep, on_candle_data=self._exchange.on_candle_data,
        )  # fmt: skip
        self._more = (
            bool(batch) and batch[-1][0] < recent_ms
        )  # an exchange may give fewer at once than it was asked for
        if batch and batch[-1][0] < start_ms and session.is_behind:
            self._more = False  # nothing of it can be used now: asking again at once would bring the same again
        for candle in batch:
            if candle[0] < start_ms:
                if not session.is_behind:  # else they wait to be decided, each at the price of its own moment
                    session.window.push(candle)
            else:
                self._queue.append(candle)
        self._next_ms = max(start_ms, batch[-1][0] + MINUTE_MS) if batch else start_ms
        reached_ms = since_ms + limit * MINUTE_MS
        if not batch and reached_ms <= recent_ms:
            # Nothing was traded for as long as one request reaches: an exchange that answers for that span alone
            # would give nothing for ever, and what is open would never be watched again.
            self._next_ms, self._more = max(start_ms, reached_ms), True

    def _known(self, session: Session) -> tuple[Candle, ...]:
        """Return the candles before the next ones, by which those are judged."""
        return tuple(list(self._queue)[-len(session.window.candles) - 1 :]) if self._queue else session.window.candles

    async def _closed(self, session: Session) -> int | None:
        """Wait for a newer closed minute; None when the run is left, or stopped while nothing is open."""
        ends = [session.fenced, self._leaving]
        if not self._stop.is_set() and session.state.signal is None and self._newest_ms is not None:
            ends.append(self._stop)
        newest_ms = None
        async with Until(*ends):
            newest_ms = await self._told_closed()
        if session.fenced.is_set():
            await session.flush()  # says by whom
        return newest_ms

    async def _told_closed(self) -> int:
        try:
            with no_stray_cancellation:
                return await self._wait_closed(str(self.context), self._newest_ms)
        except HoldfastError:
            raise
        except Exception as error:
            raise UnavailableError(f"the market cannot tell when a candle closes: {error!r}") from error

    # ------------------------------------------------------------------ the rest

    async def _pause(self) -> None:
        """Wait before trying again, longer each time; a stop ends the wait."""
        if self._stop.is_set():
            await self._sleep(_FIRST_PAUSE_SECONDS)
            return
        pause_seconds, self._pause_seconds = self._pause_seconds, min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
        async with Until(self._stop, self._leaving):
            await self._sleep(pause_seconds)

    async def _leave_market(self) -> None:
        """Tell a market that waits for its participants not to wait for this one."""
        leave = getattr(self._exchange.source, "leave", None)
        if leave is None:
            return
        try:
            with no_stray_cancellation:
                left = leave(str(self.context))
                if inspect.isawaitable(left):
                    await left
        except Exception as error:  # the market may be gone already, and nothing depends on it
            await self._report("market", error)

    async def _report(self, where: str, error: Exception) -> None:
        await self._listeners.report(Failure(where=where, error=error, context=self.context))
