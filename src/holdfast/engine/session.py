"""One context: own, recover, step, commit, tell.

Decide purely, persist, then act. ``step`` is a plain method: a candle that changes nothing costs the pure
step and no more: no storage call, no coroutine, no task.

Invariants:

* ``state`` changes only after the commit that holds the change has returned.
* Every commit expects the owner row and the session row as this session last saw them; whoever takes the
  context over changes the owner row, and the next commit of this session is refused: ``FencedError``.
* A risk check is made on the slots as they are at the commit, or it is made again: the guard row of each
  profile is read before the slots and expected by the commit, a rejection's commit included.
* Callbacks and listeners are told after the commit, ``on_write`` too (the reference calls it before its
  write): what is told has happened, whatever fails next.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import msgspec

from ..contract import Key
from ..domains import context_key
from ..errors import FailedError, FullError, HeldError, HoldfastError, UnavailableError
from ..names import Context
from ..rows import CloseReason, Event, Guard, Owner, Row, SessionRow, Signal
from ..rules.candles import MINUTE_MS, Candle, Window
from ..rules.params import Params
from ..rules.risk import RiskProfile
from ..rules.signals import (
    AskStrategy,
    Question,
    Spec,
    State,
    Transition,
    step,
    stop_scheduled,
    withdraw,
)
from ..store import Loaded, Store
from .decider import Decider
from .emergency import may_be_kept
from .executor import Executor
from .gate import Gate
from .health import Health, health_of
from .lanes import Sleep
from .listeners import Failure, Listeners, Tick, Trouble
from .news import tell_restored, tick_of
from .outbox import CAP_ROWS, Outbox
from .ownership import Claim, OnConflict
from .plan import ended
from .reconcile import session_row
from .recovery import Recovered, RecoveryReport, look, recover
from .registry import ExchangeSpec, StrategySpec
from .retention import Retention
from .session_writer import SessionWriter
from .settle import Settler
from .standing_in import StandIn, stand_in
from .tenure import Tenure
from .until import Flag
from .worker import SignOfLife

_log = logging.getLogger("holdfast")

MAX_BEHIND = 10_000
"""How many candles may wait for a store that cannot be used: about a week."""


def wall_clock_ms() -> int:
    """Return the wall clock's time in epoch milliseconds."""
    return time.time_ns() // 1_000_000


class Session:
    """One context of the engine, fed with closed candles by a driver.

    Args:
        context: What it runs.
        strategy: Who proposes signals.
        exchange: Where its strategy may look at candles; the session itself fetches nothing.
        store: An open store.
        listeners: Who is told.
        params: The parameters, fixed for its life.
        risk_profiles: By name; every profile that the strategy names.
        holder: A random text of this process, by which it knows its own owner row.
        clock: Tells the time in epoch milliseconds, for the owner row and for pruning.
        sleep: Takes seconds; a seam for tests.
        sign: The sign of life of this process, where the store is shared with others.
        on_conflict: What to do about a live owner of the context; see :mod:`holdfast.engine.ownership`.
        executor: Sends its orders; None: it has no broker, and events are all that comes of it.
        health: How the store has been answering; default: the store's own, see :mod:`holdfast.engine.health`.
        cap_rows: Most event rows that may wait; see :mod:`holdfast.engine.outbox`.
    """

    def __init__(
        self,
        context: Context,
        strategy: StrategySpec,
        exchange: ExchangeSpec,
        store: Store,
        *,
        listeners: Listeners,
        params: Params,
        risk_profiles: Mapping[str, RiskProfile],
        holder: str,
        clock: Callable[[], int] = wall_clock_ms,
        sleep: Sleep = asyncio.sleep,
        sign: SignOfLife | None = None,
        on_conflict: OnConflict = "refuse",
        executor: Executor | None = None,
        health: Health | None = None,
        cap_rows: int = CAP_ROWS,
    ) -> None:
        self.context, self.strategy, self.exchange, self.store = context, strategy, exchange, store
        self.spec = Spec(context, strategy.interval_ms, params, strategy.risk_names)
        self.state = State()
        self.window = Window(params.avg_price_candles_count)
        self._listeners, self._holder = listeners, holder
        self._clock, self._sleep = clock, sleep
        self._sign, self._on_conflict = sign, on_conflict
        self.executor = executor
        self.health = health_of(store) if health is None else health
        self.fenced = Flag()
        """Set when somebody else has taken the context over, though nothing was to be committed."""
        self._settler = Settler(
            strategy, exchange, mode="live", params=params, profiles=risk_profiles, listeners=listeners, sleep=sleep
        )
        self.gate = Gate(context, store, self.health, executor, lambda: self.outbox.crowded, Retention.of(params))
        self.decider = Decider(self.spec, store, self._settler, self.gate, executor)
        outbox = Outbox(context, strategy.callbacks, listeners, store, cap_rows=cap_rows, sleep=sleep)
        self.writer = SessionWriter(
            context, store, risk_names=strategy.risk_names, outbox=outbox, gate=self.gate, health=self.health,
            executor=executor, has_lease=lambda: self.has_lease, tell=self._tell_trouble, ended=self.fence,
        )  # fmt: skip
        self._behind: deque[Candle] = deque()
        self._restored: Signal | None = None

    # ------------------------------------------------------------------ recovery

    async def recover(self) -> RecoveryReport:
        """Own the context, load it, check it, reconcile it. May be called again.

        Raises:
            HeldError: Another process owns it and lives; the message names it.
            UnavailableError: The store cannot be used now; call again.

        Crash: Any part may be done or not; recovering again does the rest.
        """
        if self.executor is not None:
            await self.executor.close()
        await self.writer.flush_last()  # a deletion under the old tenure must not be taken for a takeover
        self.writer.own_anew()
        self.health.join(self, self._listeners)
        await self._open_emergency()
        if self._sign is not None:
            await self._sign.join(self)  # first: an owner without a sign of life may be replaced at once
        predecessor, begun = None, 0 if self._sign is None else self._sign.begun
        try:
            found, tenure = await self._own()
        except UnavailableError as error:
            if isinstance(error, HeldError) or (standing := await self._stand_in(error)) is None:
                raise
            found, predecessor = standing.recovered, standing.predecessor
            tenure = self._tenure(found.owner, found.session)
        self.state = found.state
        for why in found.report.stopped:
            self._tell_trouble(Trouble(kind="quarantine", context=self.context, why=why))
        self.gate.recovered(stopped=bool(found.report.stopped), outages=found.outages)
        self.fenced.clear()  # of an earlier tenure: a look under way while this one began saw the next epoch
        self.writer.recovered(tenure, self.outbox.fresh(), held=found.risk_names, ignored=found.ignored)
        self._behind.clear()
        self.window = Window(self.spec.params.avg_price_candles_count)
        self.outbox.add(found.events)
        if predecessor is not None:
            self.writer.stand_in(predecessor)
        if self._sign is not None and self._sign.begun != begun:
            # Whoever takes a context over goes on after two signs of life of its old owner, which has looked at the
            # owner rows by then. But no look until now was for this session, which did not own yet.
            await self._sign.look_for_new_owners(self)
            self.writer.check()
        self._restored = found.state.signal or found.state.scheduled
        if self.executor is not None:
            await self.executor.recover(self)
            self.gate.check_quarantine()
        return found.report

    @property
    def _lifetime_ms(self) -> int:
        return self.spec.params.max_signal_lifetime_minutes * MINUTE_MS

    async def _own(self) -> tuple[Recovered, Tenure]:
        sign = self._sign
        claim = Claim(self._on_conflict, None if sign is None else sign.watch, lambda: self.gate.stopping)
        proven = 0 if sign is None else sign.lapses
        found = await recover(
            self.store, self.writer.lane, self.context, holder=self._holder, risk_names=self.spec.risk_names,
            lifetime_ms=self._lifetime_ms,
            clock=self._clock, sleep=self._sleep, claim=claim, merge=self._merge_kept,
        )  # fmt: skip
        return found, self._tenure(found.owner, found.session, proven)

    async def _merge_kept(self, owner: Loaded[Owner]) -> Loaded[Owner]:
        if not self.writer.lifeline.is_ahead:
            return owner
        return await self.writer.merge_kept(self._tenure(owner, None))

    def _tenure(self, owner: Loaded[Owner], session: Loaded[SessionRow] | None, proven: int = 0) -> Tenure:
        sign = self._sign
        return Tenure(
            self.store, self.writer.lane, self.context, owner, session, sleep=self._sleep,
            lapses=lambda: 0 if sign is None else sign.lapses, proven=proven,
        )  # fmt: skip

    async def _open_emergency(self) -> None:
        try:
            await self.health.emergency.open()
        except FullError as error:  # a new one, which holds nothing: a position must be watched all the same
            why = f"there is no emergency journal until the next start: {error}"
            self._tell_trouble(Trouble(kind="emergency", context=self.context, why=why))

    async def _stand_in(self, error: UnavailableError) -> StandIn | None:
        """Find out whether to go on without owning, as the store can be read and not written."""
        lifeline = self.writer.lifeline
        if not lifeline.can_keep:
            return None
        self.health.ended(self.health.began(), error)
        standing = await stand_in(
            self.store, self.context, lifeline.kept, self.spec.risk_names, holder=self._holder, now_ms=self._clock(),
            lifetime_ms=self._lifetime_ms,
        )  # fmt: skip
        if standing is not None:
            why = f"it goes on from what is stored and kept, and owns it once the store can be written: {error}"
            self._tell_trouble(Trouble(kind="emergency", context=self.context, why=why))
        return standing

    async def look(self) -> tuple[str, ...]:
        """Load what is stored without owning it, to plan on; nothing can be committed afterwards.

        Returns:
            What is in quarantine, and why.
        """
        found = await look(
            self.store, self.context, self.spec.risk_names, now_ms=self._clock(),
            lifetime_ms=self._lifetime_ms,
        )  # fmt: skip
        self.state, self.writer.held = found.plan.state, found.plan.risk_names
        self.gate.recovered(stopped=False, outages=found.outages)
        return self.gate.check_quarantine()

    async def begin(self, candle_ms: int) -> None:
        """Put on record that the context runs for the first time, from the candle that opens at ``candle_ms``.

        Everything before it is an outage: the candles that a run had, and those on which it could enter, can be
        told from the store alone.

        Crash: It begins later.
        """
        state = msgspec.structs.replace(self.state, last_candle_ms=candle_ms - MINUTE_MS)
        self.gate.forbid(0, candle_ms - MINUTE_MS)
        self.gate.outages.allow()
        rows: dict[Key, Row | None] = {
            context_key("session", self.context): session_row(self.context, state, self.writer.held)
        }
        await self.writer.send(rows, {})
        self.state = state

    async def tell_restored(self) -> None:
        """Tell ``on_active`` or ``on_schedule`` once of what was restored; needs a price, so push candles first."""
        if self._restored is None or self.window.newest_ms is None:
            return
        signal, self._restored = self._restored, None
        if signal not in (self.state.signal, self.state.scheduled):
            return
        await tell_restored(signal, self.strategy.callbacks, self._listeners, self.tick())

    # ------------------------------------------------------------------ the step

    def step(self, candle: Candle, *, entries: bool = True) -> Awaitable[Transition | None] | None:
        """Let one closed candle do what it does.

        Args:
            candle: Newer than the one before.
            entries: False forbids beginning anything: the candle lies in the past.

        Returns:
            None when nothing changed and nothing was stored; else what must be awaited, which gives the
            transition that was committed, or None where nothing came of it.

        Raises:
            FencedError: Another owner has taken over; stop trading this context.
            FailedError: The session cannot go on: close it, open the store again if the message says so,
                and recover with a new session.

        Crash: Before the awaited part returns, all of the transition or nothing is stored; after it, all.
        """
        if not (self.gate.is_plain and entries):
            if self.writer.broken is not None or self._behind:
                return self._step_late(candle, entries)
            entries = self.gate.opens(candle[0], entries, last_ms=self.state.last_candle_ms)
        if self.executor is not None and self.executor.holds_candles:
            return self._step_entered(candle, entries)
        self.window.push(candle)
        outcome = step(self.state, candle, self.window, self.spec, entries=entries)
        if outcome is None:
            return None
        reply: Any = None
        if type(outcome) is AskStrategy:
            try:
                reply = self._settler.ask_now(outcome)
            except Exception as error:  # a strategy that raises proposes nothing
                self.gate.forbid(candle[0])
                return self._settler.failed(outcome, error)
            if reply is None:
                return None
        return self._settle(outcome, candle, reply)

    @property
    def owner(self) -> Owner | None:
        """The owner row under which it commits; None before it owns, and once it lets go or cannot go on."""
        return self.writer.owner

    @property
    def outbox(self) -> Outbox:
        """Its events that were not delivered."""
        return self.writer.outbox

    def fence(self, error: HoldfastError) -> None:
        """Stop at once: the context is somebody else's, or its orders cannot go on."""
        self.writer.give_up(error)
        self.fenced.set()

    def look_anew(self) -> None:
        """Ask again, with the next candle, whether anything may begin."""
        self.gate.look_anew()

    @property
    def has_lease(self) -> bool:
        """Whether what cannot be taken back may be done: as far as this process can know, the context is its own."""
        tenure = self.writer.tenure
        if tenure is not None and tenure.is_doubtful:
            return False
        return self._sign is None or (self._sign.is_held and self.is_proven)

    @property
    def is_proven(self) -> bool:
        """Whether the context was shown to be its own since the lease ran out the last time."""
        return self.writer.tenure is not None and self.writer.tenure.is_proven

    def lapsed(self) -> None:
        """The lease had run out and was taken again: show within a second that the context is still its own."""
        if self.owner is not None:
            self.writer.background.soon()

    @property
    def exits_without_lease(self) -> bool:
        """Whether its user wants exits to go on without it."""
        return self.health.policy.exit_without_lease

    @property
    def unsaved(self) -> int:
        """How many decisions are in the emergency journal and not in the store yet."""
        return len(self.writer.lifeline.kept)

    @property
    def is_behind(self) -> bool:
        """Whether candles wait for a store that could not be used."""
        return bool(self._behind)

    async def _step_late(self, candle: Candle, entries: bool) -> Transition | None:
        """Decide first the candles that the store was not there for; exits are found late, but where they were."""
        self.writer.check()
        if len(self._behind) >= MAX_BEHIND:
            full = FailedError(f"{self.context}: the store could not be used for {MAX_BEHIND} candles: mend it")
            self.writer.give_up(full)
            raise full
        late, self._behind = self._behind, deque()
        late.append(candle)
        transition = None
        while late:
            one = late.popleft()
            again = self.step(one, entries=entries and one is candle)
            if again is not None:
                transition = await again
            if self._behind:
                self._behind.extend(late)
                break
        return transition

    async def _step_entered(self, candle: Candle, entries: bool) -> Transition | None:
        try:
            gone = await self.settle_orders(candle)
        except UnavailableError as error:
            self._behind.append(candle)
            await self._report("store", error, candle)
            return None
        if self.executor is not None and self.executor.is_leaving:
            self._behind.append(candle)  # whoever goes on steps it
            return None
        again = self.step(candle, entries=entries)
        return gone if again is None else await again or gone

    async def settle_orders(self, candle: Candle | None = None) -> Transition | None:
        """Wait until it is known what became of the open signal's entry, and cancel the signal if nothing came of it.

        Args:
            candle: The next one to step, in case there was none before it.

        Raises:
            UnavailableError: The cancellation cannot be committed now; nothing was changed.

        Crash: The order tells the next start the same.
        """
        reason = None if self.executor is None else await self.executor.entered()
        self.writer.check()
        if reason is None or not (self.window.candles or candle):
            return None
        last, price = (self.window.candles[-1], self.window.price()) if self.window.candles else (candle, candle[4])  # type: ignore[index]
        transition = withdraw(self.state, self.spec, cast("Candle", last), price, reason)
        if transition is not None:
            self.gate.look_anew()
            await self._commit(transition, {})
        return transition

    async def orders_quiet(self) -> None:
        """Wait until no order is under way and nothing is left to close but what is open."""
        if self.executor is not None:
            await self.executor.quiet()

    async def stop_scheduled(self) -> Transition | None:
        """Cancel the waiting signal because the run is stopped; None when none waits or no candle was seen yet."""
        return await self._end(stop_scheduled)

    async def end_signal(self, reason: CloseReason) -> Transition | None:
        """Close what is open at the newest price, or cancel what waits, because somebody decided so; None: neither.

        Raises:
            UnavailableError: Not now; nothing was changed.

        Crash: It is ended or not; whoever decided finds out at the next start.
        """
        return await self._end(lambda state, spec, candle, price: ended(state, spec, candle, price, reason))

    async def _end(self, rule: Callable[[State, Spec, Candle, float], Transition | None]) -> Transition | None:
        """Commit what a rule makes of the newest candle, though it was stepped already."""
        self.writer.check()
        candles = self.window.candles
        transition = rule(self.state, self.spec, candles[-1], self.window.price()) if candles else None
        if transition is not None:
            await self._commit(transition, {})
        return transition

    async def note(self, rows: dict[Key, Row | None]) -> None:
        """Commit rows that belong to no transition, such as a recovery plan, under the owner row.

        Raises:
            FencedError, FailedError: As :meth:`step`.
            UnavailableError: Not now; nothing was changed.
        """
        self.writer.check()
        await self.writer.send(rows, {}, exits=may_be_kept(rows))

    def tick(self) -> Tick:
        """Return the news of a candle that changed nothing."""
        return tick_of(self.context, self.state, self.window)

    async def _settle(self, outcome: Transition | Question, candle: Candle, reply: Any) -> Transition | None:
        self.gate.look_anew()  # whatever comes of it
        try:
            return await self.decider.carry_out(outcome, candle, reply, before=self.state, commit=self._commit)
        except UnavailableError as error:
            self._behind.append(candle)
            await self._report("store", error, candle)
            return None
        except HoldfastError as error:
            self.writer.give_up(error)
            raise
        except BaseException as error:
            # Cancelled, or a fault of ours: whether the commit was applied is not known here.
            broken = FailedError(f"{self.context}: interrupted ({error!r}): recover with a new session")
            self.writer.give_up(broken)
            if isinstance(error, Exception):
                raise broken from error
            raise

    async def _report(self, where: str, error: Exception, candle: Candle) -> None:
        at_ms = candle[0] + MINUTE_MS
        await self._listeners.report(Failure(where=where, error=error, context=self.context, at_ms=at_ms))

    async def _commit(self, transition: Transition, checked: Mapping[Key, Loaded[Guard] | None]) -> None:
        """Persist a transition, then change memory."""
        await self.writer.commit(self.state, transition, checked)
        self.state = transition.state

    # ------------------------------------------------------------------ telling

    def delivered(self) -> None:
        """Count that event as delivered; its row is deleted with the next commit, or within a second."""
        self.outbox.delivered()
        self.flush_soon()

    async def deliver(self) -> list[Event]:
        """Tell of every event that was not delivered, and return them; for drivers without an iterator.

        Raises:
            UnavailableError: The ledger cannot be written now; call again later.
        """
        told = []
        while (event := await self.outbox.tell_next()) is not None:
            self.delivered()
            told.append(event)
        return told

    def flush_soon(self) -> None:
        """Commit within a second what waits for a commit to go along with."""
        self.writer.background.soon()

    async def flush(self) -> None:
        """Delete the rows of delivered events and record outages now.

        Raises:
            FencedError, FailedError: As :meth:`step`.
            UnavailableError: Not now; they wait for the next commit.

        Crash: Delivered events may be told again.
        """
        await self.writer.flush()

    def _tell_trouble(self, trouble: Trouble) -> None:
        self.health.tell(self._listeners, "trouble", trouble)

    async def close(self) -> None:
        """Commit what waits for it, let go of a context that others may want, and stop every task. Repeatable.

        Crash: Delivered events may be told again.
        """
        was_open = self.writer.is_open
        self.writer.close()
        try:
            if self.executor is not None:
                await self.executor.close()
            await self.writer.flush_last()
            if self._sign is not None:
                await self.writer.let_go()
                await self._sign.leave(self)
        finally:
            await self.health.leave(self)
            if was_open:
                self.writer.give_up(FailedError(f"{self.context}: the session was closed: recover anew"))
