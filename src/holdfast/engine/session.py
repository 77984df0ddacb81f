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
from ..domains import context_key, guard_key
from ..errors import FailedError, FencedError, HoldfastError, UnavailableError
from ..names import Context
from ..rows import CloseReason, Event, Guard, Owner, Row, Signal
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
from .background import Background
from .commits import Outages, begins, changes, vacancies
from .decider import Decider
from .emergency import may_be_kept
from .executor import Executor
from .health import Health, health_of
from .lanes import Sleep
from .lifeline import Lifeline
from .listeners import Failure, Listeners, Tick, Trouble
from .modes import Mode
from .news import tell_restored, tick_of
from .outbox import CAP_ROWS, Outbox
from .ownership import Claim, OnConflict
from .plan import ended
from .reconcile import session_row
from .recovery import Recovered, RecoveryReport, look, recover, stopped_reasons
from .registry import ExchangeSpec, StrategySpec
from .settle import Settler
from .tenure import GuardMovedError, Tenure
from .worker import SignOfLife

_log = logging.getLogger("holdfast")

MAX_BEHIND = 10_000
"""How many candles may wait for a store that cannot be used: about a week."""
MAX_CHECKS = 100
"""How often a risk check is repeated while others change the profile."""


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
        self.outbox = Outbox(context, strategy.callbacks, listeners, store, cap_rows=cap_rows, sleep=sleep)
        self.outages = Outages(context)
        self._stopping = self._letting_go = False
        self._plain = False
        """Nothing stands in the way of an entry: the one thing that a candle which changes nothing has to look at."""
        self._listeners, self._holder = listeners, holder
        self._clock, self._sleep = clock, sleep
        self._sign, self._on_conflict = sign, on_conflict
        self.executor = executor
        self.health = health_of(store) if health is None else health
        self.fenced = asyncio.Event()
        """Set when somebody else has taken the context over, though nothing was to be committed."""
        self._settler = Settler(
            strategy, exchange, mode="live", params=params, profiles=risk_profiles, listeners=listeners, sleep=sleep
        )
        self._decider = Decider(self.spec, store, self._settler)
        self._writer = store.writer(str(context))
        self._lifeline = Lifeline(context, store, self._writer, self.health, lambda: self.has_lease)
        self._tenure: Tenure | None = None
        self._held: tuple[str, ...] = ()
        self._stopped = False
        """Something of the context is in quarantine: nothing may open."""
        self._broken: HoldfastError | None = None
        self._behind: deque[Candle] = deque()
        self.background = Background(self.flush, self._break)
        self._restored: Signal | None = None
        self._outage_to_ms = -1
        self._ignored_version = 0
        """Of a row in the schedule domain that does not wait, and so was ignored at recovery."""

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
        await self._flush_last()  # a deletion under the old tenure must not be taken for a takeover
        self.health.join(self, self._listeners)
        await self.health.emergency.open()
        if self._sign is not None:
            await self._sign.join(self)  # first: an owner without a sign of life may be replaced at once
        found, self._tenure = await self._own()
        if self._lifeline.is_ahead and await self._merge_kept(self._tenure):
            found, self._tenure = await self._own()  # and load what that made of it
        self.state, self._held = found.state, found.risk_names
        self._stopped = bool(found.report.stopped)
        for why in found.report.stopped:
            self._tell_trouble(Trouble(kind="quarantine", context=self.context, why=why))
        self._ignored_version, self._outage_to_ms = found.ignored_version, found.outage_to_ms
        self._broken, self._plain, self._letting_go = None, False, False
        self._behind.clear()
        self.window = Window(self.spec.params.avg_price_candles_count)
        self.outages = Outages(self.context)
        self.outbox = self.outbox.fresh()
        self.outbox.add(found.events)
        self._restored = found.state.signal or found.state.scheduled
        if self.executor is not None:
            await self.executor.recover(self)
            self._stopped = bool(stopped_reasons(self.store, self.context))
        return found.report

    async def _own(self) -> tuple[Recovered, Tenure]:
        claim = Claim(self._on_conflict, None if self._sign is None else self._sign.watch, lambda: self._stopping)
        found = await recover(
            self.store, self._writer, self.context, holder=self._holder, risk_names=self.spec.risk_names,
            lifetime_ms=self.spec.params.max_signal_lifetime_minutes * MINUTE_MS,
            clock=self._clock, sleep=self._sleep, claim=claim,
        )  # fmt: skip
        return found, Tenure(self.store, self._writer, self.context, found.owner, found.session, sleep=self._sleep)

    async def _merge_kept(self, tenure: Tenure) -> bool:
        """Merge what an earlier run left in the emergency journal."""
        merged = await self._lifeline.merge(tenure, recovering=True)
        for kept in self._lifeline.overtaken:
            why = f"commit {kept.number} of the emergency journal was left out: another owner has gone on"
            self._tell_trouble(Trouble(kind="emergency", context=self.context, why=why))
        return merged

    async def look(self) -> tuple[str, ...]:
        """Load what is stored without owning it, to plan on; nothing can be committed afterwards.

        Returns:
            What is in quarantine, and why.
        """
        found = await look(
            self.store, self.context, self.spec.risk_names, now_ms=self._clock(),
            lifetime_ms=self.spec.params.max_signal_lifetime_minutes * MINUTE_MS,
        )  # fmt: skip
        self.state, self._held = found.plan.state, found.plan.risk_names
        reasons = stopped_reasons(self.store, self.context)
        self._stopped, self._outage_to_ms = bool(reasons), found.outage_to_ms
        return reasons

    async def begin(self, candle_ms: int) -> None:
        """Put on record that the context runs for the first time, from the candle that opens at ``candle_ms``.

        Everything before it is an outage: the candles that a run had, and those on which it could enter, can be
        told from the store alone.

        Crash: It begins later.
        """
        state = msgspec.structs.replace(self.state, last_candle_ms=candle_ms - MINUTE_MS)
        self.outages.forbid(0, candle_ms - MINUTE_MS)
        self.outages.allow()
        rows: dict[Key, Row | None] = {
            context_key("session", self.context): session_row(self.context, state, self._held)
        }
        await self._send(rows, {})
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
        if not (self._plain and entries):
            if self._broken is not None or self._behind:
                return self._step_late(candle, entries)
            entries = self._entries(candle, entries)
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
                self._plain = False
                self.outages.forbid(candle[0])
                return self._settler.failed(outcome, error)
            if reply is None:
                return None
        return self._settle(outcome, candle, reply)

    def _entries(self, candle: Candle, entries: bool) -> bool:
        """Decide whether the candle may begin something, and note it where it may not."""
        if self._stopped:
            self._stopped = bool(stopped_reasons(self.store, self.context))
        if entries and self.may_enter(candle[0]):
            self.outages.allow()
            self._plain = True
            return True
        if candle[0] > self.state.last_candle_ms:
            self.outages.forbid(candle[0])
        self._plain = False
        return False

    def may_enter(self, candle_ms: int) -> bool:
        """Whether something may begin on the candle, as far as the session knows."""
        # On record as an outage it stays one, though it may still be the newest candle when the next run begins.
        if (self.executor is not None and self.executor.blocks_entries) or self.health.mode is not Mode.NORMAL:
            return False
        return candle_ms > self._outage_to_ms and not (self._stopping or self._stopped or self.outbox.crowded)

    def forbid(self, from_ms: int, to_ms: int) -> None:
        """Note that nothing may begin on the candles from one open time to another, which will not be stepped."""
        self.outages.forbid(from_ms, to_ms)
        self._plain = False

    @property
    def stopping(self) -> bool:
        """Whether it is being stopped: nothing new begins."""
        return self._stopping

    @stopping.setter
    def stopping(self, stopping: bool) -> None:
        self._stopping, self._plain = stopping, False

    @property
    def owner(self) -> Owner | None:
        """The owner row under which it commits; None before it owns, and once it lets go or cannot go on."""
        over = self._tenure is None or self._broken is not None or self._letting_go
        return None if over or self._tenure is None else self._tenure.owner

    def fence(self, error: HoldfastError) -> None:
        """Stop at once: the context is somebody else's, or its orders cannot go on."""
        self._break(error)
        self.fenced.set()

    def look_anew(self) -> None:
        """Ask again, with the next candle, whether anything may begin."""
        self._plain = False

    @property
    def has_lease(self) -> bool:
        """Whether what cannot be taken back may be done: as far as this process can know, the context is its own."""
        return self._sign is None or self._sign.is_held

    @property
    def exits_without_lease(self) -> bool:
        """Whether its user wants exits to go on without it."""
        return self.health.policy.exit_without_lease

    @property
    def unsaved(self) -> int:
        """How many decisions are in the emergency journal and not in the store yet."""
        return len(self._lifeline.kept)

    @property
    def is_released(self) -> bool:
        """Whether what was in quarantine at recovery has been released: recover, as a new row may stand there."""
        return self._stopped and not stopped_reasons(self.store, self.context)

    @property
    def is_behind(self) -> bool:
        """Whether candles wait for a store that could not be used."""
        return bool(self._behind)

    async def _step_late(self, candle: Candle, entries: bool) -> Transition | None:
        """Decide first the candles that the store was not there for; exits are found late, but where they were."""
        if self._broken is not None:
            raise self._broken
        if len(self._behind) >= MAX_BEHIND:
            self._broken = FailedError(f"{self.context}: the store could not be used for {MAX_BEHIND} candles: mend it")
            raise self._broken
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
        if self._broken is not None:
            raise self._broken
        if reason is None or not (self.window.candles or candle):
            return None
        last, price = (self.window.candles[-1], self.window.price()) if self.window.candles else (candle, candle[4])  # type: ignore[index]
        transition = withdraw(self.state, self.spec, cast("Candle", last), price, reason)
        if transition is not None:
            self._plain = False
            await self._commit(transition, {})
        return transition

    async def orders_quiet(self) -> None:
        """Wait until no order is under way and nothing is left to close but what is open."""
        if self.executor is not None:
            await self.executor.quiet()

    async def stop_scheduled(self) -> Transition | None:
        """Cancel the waiting signal because the run is stopped; None when none waits or no candle was seen yet."""
        if self._broken is not None:
            raise self._broken
        candles = self.window.candles
        if not candles:
            return None
        transition = stop_scheduled(self.state, self.spec, candles[-1], self.window.price())
        if transition is not None:
            await self._commit(transition, {})
        return transition

    async def end_signal(self, reason: CloseReason) -> Transition | None:
        """Close what is open at the newest price, or cancel what waits, because somebody decided so; None: neither.

        Raises:
            UnavailableError: Not now; nothing was changed.

        Crash: It is ended or not; whoever decided finds out at the next start.
        """
        if self._broken is not None:
            raise self._broken
        candles = self.window.candles
        transition = ended(self.state, self.spec, candles[-1], self.window.price(), reason) if candles else None
        if transition is not None:
            await self._commit(transition, {})
        return transition

    async def note(self, rows: dict[Key, Row | None]) -> None:
        """Commit rows that belong to no transition, such as a recovery plan, under the owner row.

        Raises:
            FencedError, FailedError: As :meth:`step`.
            UnavailableError: Not now; nothing was changed.
        """
        if self._broken is not None:
            raise self._broken
        await self._send(rows, {}, exits=may_be_kept(rows))

    @property
    def decider(self) -> Decider:
        """Settles what the rules cannot know."""
        return self._decider

    def remember_replies(self, replies: Mapping[tuple[str, int], str]) -> None:
        """Take what was said before of candles that held both stop and target, so that nobody is asked again."""
        self._settler.replies.update(replies)

    def tick(self) -> Tick:
        """Return the news of a candle that changed nothing."""
        return tick_of(self.context, self.state, self.window)

    async def _settle(self, outcome: Transition | Question, candle: Candle, reply: Any) -> Transition | None:
        self._plain = False  # whatever comes of it, look anew
        try:
            return await self._settle_once(outcome, candle, reply)
        except UnavailableError as error:
            self._behind.append(candle)
            await self._report("store", error, candle)
            return None
        except HoldfastError as error:
            self._break(error)
            raise
        except BaseException as error:
            # Cancelled, or a fault of ours: whether the commit was applied is not known here.
            self._broken = FailedError(f"{self.context}: interrupted ({error!r}): recover with a new session")
            if isinstance(error, Exception):
                raise self._broken from error
            raise

    async def _report(self, where: str, error: Exception, candle: Candle) -> None:
        at_ms = candle[0] + MINUTE_MS
        await self._listeners.report(Failure(where=where, error=error, context=self.context, at_ms=at_ms))

    async def _settle_once(
        self, outcome: Transition | Question | None, candle: Candle, reply: Any
    ) -> Transition | None:
        if isinstance(outcome, AskStrategy):
            outcome = await self._decider.propose(outcome, reply)
            if self._settler.failed_ms == candle[0] + MINUTE_MS:
                self.outages.forbid(candle[0])  # what it would have proposed is not known
        for _ in range(MAX_CHECKS):
            decided, checked = await self._decider.decide(outcome)
            if decided.transition is None:
                return None
            if self._stopping and begins(self.state, decided.transition.state):
                self.outages.forbid(candle[0])  # stopped while its user's code was thinking
                return None
            if self.executor is not None and begins(self.state, decided.transition.state):
                refusal = self.executor.refusal(decided.transition.state)
                if refusal is not None:
                    self.outages.forbid(candle[0])
                    await self._report("strategy", refusal, candle)
                    return None
            try:
                await self._commit(decided.transition, checked)
            except GuardMovedError:
                continue
            await self._settler.tell_risk(decided)
            return decided.transition
        raise UnavailableError(f"{self.context}: its risk profiles change too often for a check")

    # ------------------------------------------------------------------ committing

    async def _commit(self, transition: Transition, checked: Mapping[Key, Loaded[Guard] | None]) -> None:
        """Persist a transition, then change memory; the events lie in the outbox afterwards."""
        before, after = self.state, transition.state
        exits = before.signal is not None and not begins(before, after)
        guards = {key: loaded.row for key, loaded in checked.items() if loaded is not None}
        if (after.signal and after.signal.id) != (before.signal and before.signal.id) and not checked:
            # A slot that is given back needs no check, and so no version: nothing was decided on it.
            guards = await self._lifeline.guards(tuple(guard_key(name) for name in self._held), exits=exits)
        rows, held = changes(
            self.context, before, transition, held=self._held, risk_names=self.spec.risk_names, guards=guards
        )
        orders = {} if self.executor is None else self.executor.intents(before, transition)
        expect = {key: 0 if loaded is None else loaded.version for key, loaded in checked.items()}
        expect |= vacancies(self.context, before, after, self._ignored_version)
        if not await self._send(rows | orders, expect, exits=exits):
            self._tell_kept(transition)
        self.state, self._held = after, held
        self.outbox.add(transition.events)
        if after.scheduled is not None:
            self._ignored_version = 0
        if self.executor is not None:
            self.executor.committed(orders)

    def _tell_kept(self, transition: Transition) -> None:
        self.outbox.kept.update(event.number for event in transition.events)
        for event in transition.events:
            if event.kind == "closed":
                because = self.health.why or "the store does not take it"
                why = f"the exit of {event.signal.id!r:.80} is in the emergency journal: {because}"
                self._tell_trouble(Trouble(kind="emergency", context=self.context, why=why))

    async def _send(
        self, rows: dict[Key, Row | None], guards: Mapping[Key, int], *, exits: bool = False
    ) -> bool:  # fmt: skip
        """Commit rows, and with them the deletion of delivered events and the outages not yet on record.

        Args:
            exits: The rows may go to the emergency journal.

        Returns:
            Whether all is in the store; else the rows are in the journal.
        """
        if self._tenure is None:
            raise FailedError(f"{self.context}: recover() must come before the first step")
        async with self._tenure.turn:
            delivered, outages = self.outbox.take_delivered(), self.outages.take()
            if not (rows or delivered or outages or self._lifeline.owes):
                return True
            more = {**dict.fromkeys(delivered), **outages}
            try:
                stored = await self._lifeline.commit(self._tenure, rows, more, guards, exits=exits)
            except BaseException as error:
                self.outbox.put_back(delivered)
                self.outages.put_back(outages)
                if not isinstance(error, HoldfastError):
                    # Cancelled, say: whether it was applied is not known here.
                    told = f"{self.context}: interrupted in a commit ({error!r}): recover with a new session"
                    self._broken, self._plain = FailedError(told), False
                raise
            if stored:
                self.outbox.kept.clear()
            else:
                self.outbox.put_back(delivered)
                self.outages.put_back(outages)
                self.flush_soon()
            return stored

    # ------------------------------------------------------------------ telling

    async def tell_next(self) -> Event | None:
        """Tell of the oldest event that was not delivered; see :meth:`holdfast.engine.outbox.Outbox.tell_next`."""
        return await self.outbox.tell_next()

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
        self.background.soon()

    async def flush(self) -> None:
        """Delete the rows of delivered events and record outages now.

        Raises:
            FencedError, FailedError: As :meth:`step`.
            UnavailableError: Not now; they wait for the next commit.

        Crash: Delivered events may be told again.
        """
        self.background.cancel()
        if self._broken is not None:
            raise self._broken
        await self._send_all()

    async def _send_all(self) -> None:
        await self._send({}, {})
        if self.outbox.has_early:
            await self.outbox.catch_up()
            await self._send({}, {})

    def _break(self, error: HoldfastError) -> None:
        if isinstance(error, FencedError) and not isinstance(self._broken, FencedError):
            self._tell_trouble(Trouble(kind="fenced", context=self.context, why=str(error)))
        self._broken, self._plain = error, False  # the next step raises it

    def _tell_trouble(self, trouble: Trouble) -> None:
        self.health.tell(self._listeners, "trouble", trouble)

    async def close(self) -> None:
        """Commit what waits for it, let go of a context that others may want, and stop every task. Repeatable.

        Crash: Delivered events may be told again.
        """
        was_open = self._broken is None and self._tenure is not None
        if self._tenure is not None:
            self._tenure.closing = True
        try:
            if self.executor is not None:
                await self.executor.close()
            await self._flush_last()
            await self._let_go()
        finally:
            await self.health.leave(self)
            if was_open:
                self._broken, self._plain = FailedError(f"{self.context}: the session was closed: recover anew"), False

    async def _let_go(self) -> None:
        if self._sign is None:
            return
        if self._broken is None and self._tenure is not None:
            self._letting_go = True  # from now on others may have it at any moment
            try:
                async with self._tenure.turn:
                    await self._tenure.release()
            except HoldfastError as error:
                _log.warning("%s: it stays owned until the lease is over: %s", self.context, error)
        await self._sign.leave(self)

    async def _flush_last(self) -> None:
        """End the background task, and commit what waits for a commit if that is possible."""
        await self.background.finish()
        if self._broken is None and self._tenure is not None:
            try:
                await self._send_all()
            except HoldfastError as error:
                _log.warning("%s: at its end: %s", self.context, error)
        await self._lifeline.settle()
