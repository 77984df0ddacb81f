"""Simulated processes: each life runs the real drivers on a store of its own, and everything may happen to it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from random import Random
from typing import TYPE_CHECKING, Any

from ...contract import Survives
from ...engine.driver import Driver
from ...engine.listeners import Listeners
from ...engine.modes import TroublePolicy
from ...engine.specs import Callbacks, ExchangeSpec, StrategySpec, plain_number
from ...engine.turns import Turns
from ...engine.worker import sign_of_life
from ...errors import FailedError, FencedError, HeldError, HoldfastError, UnavailableError
from ...rows import Event
from ...rules.risk import RiskPayload, RiskProfile, Validation
from ...store import Store
from .journal import disk, path_of
from .line import FaultyLine
from .loop import ProcessLoop
from .market import PARAMS, START_MS, Feed, Trouble, context_of
from .plan import Fault, SimulatedContext, SimulatedProcess
from .storage import SimulatedBackend
from .venue import SimulatedBroker

if TYPE_CHECKING:
    from .world import World

_LONGEST_AGE_SECONDS = 240.0
"""How old a candle may be on which something opens, in a process that nothing held up."""


class Process:
    """One process of a plan: its lives, one after the other, and the faults that it meets."""

    def __init__(self, world: World, spec: SimulatedProcess) -> None:
        self.world, self.spec = world, spec
        self.life: Life | None = None
        self.lives = 0
        self.calls: Counter[str] = Counter()
        self.clock_seconds = 0.0
        """How far its wall clock is off."""
        self.outage_until = 0.0
        self.silent_until = 0.0
        """Until then no commit is answered, whether it is applied or not."""
        self.full_until = 0.0
        """Until then the storage has no room for this process."""
        self.cut_off_until = 0.0
        """Until then the venue cannot be reached."""
        self.raises: set[int] = set()
        """Minutes at which its strategies raise."""
        self.troubles: list[Trouble] = []
        self.at_calls: dict[tuple[str, int], Fault] = {}
        self._chance = Random(f"{world.plan.seed}/process/{spec.number}")
        for fault in world.plan.faults:
            if fault.process == spec.number and fault.call:
                self.at_calls[fault.call, int(fault.at)] = fault
            elif fault.process == spec.number:
                world.scheduler.at(fault.at, self._strike, fault)
        world.scheduler.at(spec.start_seconds, self.start)

    @property
    def name(self) -> str:
        """Names it in the trace."""
        return f"p{self.spec.number}"

    def start(self) -> None:
        """Begin a life, unless one is under way, or the market is over: then only the last process may begin."""
        if self.life is None and not self.is_late:
            self.lives += 1
            self.life = Life(self, f"{self.name}.{self.lives}")

    def ended(self, life: Life) -> None:
        """The life is over; another begins after a while if the run is not over."""
        if self.life is not life:
            return
        self.life = None
        world = self.world
        world.scheduler.at(world.scheduler.now_seconds + self.spec.restart_seconds, self.start)

    @property
    def is_late(self) -> bool:
        """Whether nothing more may begin in it: whoever starts after the last process would take everything from it."""
        return self.spec.number >= 0 and self.world.scheduler.now_seconds >= self.world.market.end_seconds

    def lag(self) -> float:
        """Draw how long a call takes."""
        return self._chance.random() * self.world.plan.lag_seconds

    def is_lost(self) -> bool:
        """Draw what an outage does to a commit: refused, or lost without an answer."""
        return self._chance.random() < 0.3

    def _strike(self, fault: Fault) -> None:
        now, life = self.world.scheduler.now_seconds, self.life
        self.world.note(f"{self.name} {fault.kind} for {fault.seconds:g} s")
        match fault.kind:
            case "crash" if life is not None:
                life.crash()
            case "pause" if life is not None:
                life.pause(fault.seconds)
            case "leave" if life is not None:
                life.loop.call_soon(life.task.cancel)
            case "clock":
                self.clock_seconds += fault.seconds
            case "outage":
                self.outage_until = max(self.outage_until, now + fault.seconds)
            case "silence":
                self.silent_until = max(self.silent_until, now + fault.seconds)
            case "full":
                self.full_until = max(self.full_until, now + fault.seconds)
            case "cut_off":
                self.cut_off_until = max(self.cut_off_until, now + fault.seconds)
            case "candles_late" | "candles_refused" | "gap":
                self.troubles.append(Trouble(fault.kind, now, now + fault.seconds))
            case "strategy_raises":
                self.raises.add(int(now // 60))


class _Hearing(Listeners):
    """Listeners of one life, before whom the oracle listens."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self._life = life
        self.listen("error", lambda failure: life.failed(failure.where, failure.error))
        self.listen("validation", lambda failure: None)

    async def tell(self, event: Event, callbacks: Callbacks, mode: Any) -> None:
        """Tell of an event, the oracle first."""
        life = self._life
        if life.dead:
            raise asyncio.CancelledError
        life.world.note(f"{life.name} tells {event.id} {event.kind}")
        life.world.oracle.telling(life, event)
        if life.world.plan.tell_seconds:
            await life.sleep(life.world.plan.tell_seconds)
        await super().tell(event, callbacks, mode)
        if not life.dead:
            life.world.oracle.told(life, event)


class Life:
    """One life of a process, from its start to its end."""

    def __init__(self, process: Process, name: str) -> None:
        self.process, self.world, self.name = process, process.world, name
        self.on_conflict = process.spec.on_conflict
        self.looked_seconds = 0.0
        self._held_up_until = 0.0
        self.dead = False
        self.loop = ProcessLoop(self.world.scheduler, self._complain)  # type: ignore[abstract]
        self._line = FaultyLine(self)
        self._feed = Feed(self.world.market, self.world.scheduler, self.sleep)
        self._feed.troubles = process.troubles
        self.world.note(f"{name} starts ({self.on_conflict})")
        self.task: asyncio.Task[None] = self.loop.create_task(self._live())
        self.task.add_done_callback(self._done)

    # ------------------------------------------------------------------ its time

    async def sleep(self, seconds: float) -> None:
        """Sleep in simulated time."""
        if self.dead:
            raise asyncio.CancelledError
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken, timer = self.loop.woken_in(seconds)
        try:
            await woken
        finally:
            timer.cancel()

    def clock_ms(self) -> int:
        """Tell the wall clock's time, which may step."""
        return START_MS + int((self.world.scheduler.now_seconds + self.process.clock_seconds) * 1000)

    def boot_seconds(self) -> float:
        """Tell the time since the machine started, which does not."""
        return 1000.0 + self.world.scheduler.now_seconds

    def pause(self, seconds: float) -> None:
        """Stop the process; it goes on later as if nothing had happened."""
        self.world.note(f"{self.name} stops for {seconds:g} s")
        self.loop.pause()
        self.held_up(seconds)
        self.world.late(self.world.scheduler.now_seconds + seconds)
        self.world.scheduler.at(self.world.scheduler.now_seconds + seconds, self.loop.resume)

    def held_up(self, seconds: float) -> None:
        """Let its strategies be asked late, for so long and a while."""
        until = self.world.scheduler.now_seconds + seconds + _LONGEST_AGE_SECONDS
        self._held_up_until = max(self._held_up_until, until)

    def crash(self) -> None:
        """End the process without a word."""
        if not self.dead:
            self.world.note(f"{self.name} crashes")
            self.dead = True
            disk.release(self.name)
            self.loop.kill()
            self.process.ended(self)

    def _done(self, task: asyncio.Task[None]) -> None:
        if self.dead:
            return
        self.world.note(f"{self.name} ends")
        if not task.cancelled() and (error := task.exception()) is not None:
            self.world.violate(f"{self.name} ended with {error!r}")
        self.world.scheduler.at(self.world.scheduler.now_seconds, self._buried)

    def _buried(self) -> None:
        if not self.dead:
            self.dead = True
            disk.release(self.name)
            self.loop.kill()
            self.process.ended(self)

    def _complain(self, context: dict[str, Any]) -> None:
        if "never retrieved" not in context.get("message", "") or context.get("task") is not None:
            self.world.violate(f"{self.name}: {context.get('message')}: {context.get('exception')!r}")

    def failed(self, where: str, error: BaseException) -> None:
        """Take note of what a user would be told."""
        if self.dead:
            return
        if where == "orders":
            self.world.note(f"{self.name} is told: {error!s:.150}")
        if not isinstance(error, HoldfastError | _RaisedError):
            self.world.violate(f"{self.name}: {where}: {error!r}")

    # ------------------------------------------------------------------ what it does

    async def _live(self) -> None:
        store = Store(SimulatedBackend(self.world.memory, self._line, sender=self), require=Survives.NOTHING)
        while True:
            try:
                await store.open()
                break
            except UnavailableError:
                await self.sleep(1.0)
        sign_of_life(
            store, holder=self.name, lease_seconds=self.world.plan.lease_seconds, sleep=self.sleep,
            clock=self.clock_ms, boot_clock=self.boot_seconds,
        )  # fmt: skip
        turns = Turns()
        try:
            contexts = {one.number: one for one in self.world.plan.contexts}
            runs = [self._run(contexts[n], store, turns) for n in self.process.spec.contexts if n in contexts]
            if len(runs) == 1:
                await runs[0]
            else:
                await asyncio.gather(*runs)
        finally:
            await store.close()

    async def _run(self, spec: SimulatedContext, store: Store, turns: Turns) -> None:
        """Run one context to the end of the market, again after each end that a user would mend by a start."""
        while True:
            driver = self._driver(spec, store, turns)
            try:
                async with aclosing(driver.events()) as events:
                    async for event in events:
                        if self.dead:
                            return
                        if self.world.plan.tell_seconds:
                            await self.sleep(self.world.plan.tell_seconds)
                        self.world.oracle.handled(self, event)
                return
            except (HeldError, FencedError, FailedError) as error:
                if isinstance(error, FencedError):
                    self.world.oracle.fenced(self, spec.number)
                self.world.note(f"{self.name} s{spec.number} ends with {type(error).__name__}: {error!s:.150}")
            finally:
                driver.turn.leave()
            await self.sleep(self.process.spec.restart_seconds)
            if self.process.is_late:
                return

    def _driver(self, spec: SimulatedContext, store: Store, turns: Turns) -> Driver:
        context = context_of(spec.number)
        strategy = StrategySpec(
            strategy_name=context.strategy_name, interval=spec.interval, get_signal=self._strategy(spec),
            risk_names=(spec.risk_name,) if spec.risk_name else (),
        )  # fmt: skip
        exchange = ExchangeSpec(
            exchange_name=context.exchange_name, get_candles=self._feed.get_candles, format_price=plain_number,
            format_quantity=plain_number, wait_closed=self._feed.wait_closed, broker=self._broker(),
        )  # fmt: skip
        limit = self.world.plan.limit

        def allowed(payload: RiskPayload) -> bool:
            return payload.active_position_count < limit

        profiles = {
            name: RiskProfile(name=name, validations=(Validation(validate=allowed),)) for name in strategy.risk_names
        }
        return Driver(
            context, strategy, exchange, turns.join(context, strategy.risk_names), store=store, profiles=profiles,
            listeners=_Hearing(self), params=PARAMS, holder=self.name, clock=self.clock_ms, sleep=self.sleep,
            on_conflict=self.on_conflict, lease_seconds=self.world.plan.lease_seconds, on_trouble=self._policy(),
        )  # fmt: skip

    def _policy(self) -> TroublePolicy:
        """Return what to do about a store in trouble: the last process finds the journal of the first."""
        if not self.world.plan.emergency:
            return TroublePolicy()
        file = f"p{max(self.process.spec.number, 0)}"
        return TroublePolicy(emergency=path_of(file, self.name), emergency_bytes=64 * 1024)

    def _broker(self) -> SimulatedBroker | None:
        venue, trades = self.world.venue, self.world.trades
        return None if venue is None or trades is None else SimulatedBroker(venue, self._line, trades, sender=self)

    def _require_present(self, when_ms: int) -> None:
        now = self.world.scheduler.now_seconds
        if now > self.world.market.end_seconds:
            return  # the last candle stays the newest one
        age_seconds = now - (when_ms - START_MS) / 1000
        if age_seconds > _LONGEST_AGE_SECONDS and now > self._held_up_until and not self.dead:
            self.world.violate(f"{self.name}: a strategy was asked about a candle that closed {age_seconds:.0f} s ago")

    def _strategy(self, spec: SimulatedContext) -> Callable[[str, int], Any]:
        market, raises = self.world.market, self.process.raises

        def decide(symbol: str, when_ms: int) -> Any:
            self._require_present(when_ms)
            if raises and (when_ms - START_MS) // 60_000 in raises:
                raise _RaisedError("the simulated strategy was told to raise")
            return market.proposal(symbol, when_ms)

        if not spec.thinks_seconds:
            return decide

        async def think(symbol: str, when_ms: int) -> Any:
            await self.sleep(spec.thinks_seconds)
            return decide(symbol, when_ms)

        return think


class _RaisedError(Exception):
    """What a strategy of a user raises."""
