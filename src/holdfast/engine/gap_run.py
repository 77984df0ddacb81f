"""``holdfast recover``: what was missed is planned; or planned, decided and carried out. Nothing is entered.

The same driver, session and step as a live run's, so that the run that comes next finds nothing left to decide. Events
stay in the outbox for it: its listeners are told, by the run that has them. Trades go to the ledger at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from ..errors import UnavailableError, UndecidedError, UnknownOutcomeError
from ..names import Context
from ..rows import Event
from ..rules.candles import Candle
from ..rules.params import get_config
from ..store import Store
from .driver import Driver
from .gap import Gap
from .lanes import Sleep
from .listeners import Listeners, default_listeners
from .plan import Outlook, What
from .recovery import stopped_reasons
from .registry import Registry, default_registry
from .session import Session, wall_clock_ms
from .tending import require_account
from .turns import Turns
from .venue_plan import VenueVerdict, ask_venue
from .worker import LEASE_SECONDS


class GapReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan, or a recovery, says of one context."""

    context: Context
    outlook: Outlook | None = None
    """None when nothing is open and nothing waits."""
    decided: What | None = None
    """None when nothing was decided: it was a plan alone, or nobody has."""
    undecided: str = ""
    """Why nothing was done, or will be, where the strategy wants to be asked."""
    failed: str = ""
    """Why it could not be planned, or recovered; what else stands here is what could be told all the same."""
    unasked: str = ""
    """Why the venue could not be asked."""
    stopped: tuple[str, ...] = ()
    """What is in quarantine, and why: nothing opens until it is adopted or cleared."""
    events: tuple[Event, ...] = ()
    """What recovery committed."""
    venue: tuple[VenueVerdict, ...] = ()
    """What the venue says of its orders; after a recovery, what is left to say."""


class GapRun:
    """Plans and carries out what was missed, one context after another.

    Args:
        store: Open; for :meth:`plan` read-only is enough.
        operator: Who asks for it, as user@host.
        wanted: What that operator decided; None leaves it to each strategy's policy.
        registry, listeners: Default: the process's own.
        clock: Tells the time in epoch milliseconds.
        sleep: Takes seconds; a seam for tests.
    """

    def __init__(
        self,
        store: Store,
        *,
        operator: str,
        wanted: What | None = None,
        registry: Registry = default_registry,
        listeners: Listeners = default_listeners,
        clock: Callable[[], int] = wall_clock_ms,
        sleep: Sleep = asyncio.sleep,
        lease_seconds: float = LEASE_SECONDS,
        holder: str = "",
    ) -> None:
        self._store, self._operator, self._wanted = store, operator, wanted
        self._registry, self._listeners, self._clock, self._sleep = registry, listeners, clock, sleep
        self._lease_seconds, self._holder = lease_seconds, holder

    async def plan(self, context: Context) -> GapReport:
        """Return what recovering ``context`` would do; owns, changes and records nothing.

        Raises:
            InvalidInputError: Its orders are not settled, and the broker is another account's, or there is none.
            UnavailableError: The store cannot be read now. Of exchange and venue the report says it.
            CorruptedError: A newer version wrote a row of it.
        """
        driver, session = self._begun(context)
        stopped = await session.look()
        broker = session.exchange.broker
        await require_account(self._store, context, None if broker is None else broker.account)
        outlook, undecided, failed = None, "", ""
        if session.state.signal is not None or session.state.scheduled is not None:
            try:
                candles = await driver.fetch_missed(session)
            except (UnavailableError, UnknownOutcomeError) as error:
                failed = str(error)
            else:
                gap = self._gap(session)
                outlook = await gap.foresee(candles, None)
                undecided = "" if outlook is None else await gap.undecided(outlook)
        venue, unasked = await self._ask_venue(session)
        return GapReport(
            context=context, outlook=outlook, undecided=undecided, failed=failed, stopped=stopped, venue=venue,
            unasked=unasked,
        )  # fmt: skip

    async def recover(self, context: Context) -> GapReport:
        """Own ``context``, put the plan and the decision on record, do it, and let go.

        Raises:
            HeldError: Another process owns it and lives; the message names it.
            InvalidInputError: Its orders are not settled, and the broker is another account's, or there is none.
            UnavailableError: The store or the exchange cannot be used now; call again.
            FencedError: Somebody else has taken it over.

        Crash: Recovering again does the rest, with the plan and the decision that are on record.
        """
        driver, session = self._begun(context)
        try:
            await session.recover()
            await driver.require_broker(session)
            restored = session.state.signal or session.state.scheduled
            outlook, decided, undecided = None, None, ""
            before = session.state.last_event
            if restored is not None:
                candles = await driver.fetch_missed(session)
                if candles:
                    await session.settle_orders(candles[0])  # an entry that came to nothing takes its signal with it
                gap = self._gap(session)
                outlook = await gap.foresee(candles, None)
                try:
                    decided = await gap.decide(outlook) if outlook is not None else None
                except UndecidedError as error:
                    undecided = str(error)
                else:
                    await self._step(session, candles)
                    await gap.finish()
            await session.outbox.record_trades()
            await session.orders_quiet()
            venue, unasked = await self._ask_venue(session)
            stopped = stopped_reasons(self._store, context)
            events = tuple(event for event in session.outbox.waiting if event.number > before)
        finally:
            await session.close()
        return GapReport(
            context=context, outlook=outlook, decided=decided, undecided=undecided, stopped=stopped, events=events,
            venue=venue, unasked=unasked,
        )  # fmt: skip

    async def _ask_venue(self, session: Session) -> tuple[tuple[VenueVerdict, ...], str]:
        """Return what the venue says; or nothing, and why it says nothing."""
        broker = session.exchange.broker
        if broker is None or session.executor is None:
            return (), ""
        open_id = None if session.state.signal is None else session.state.signal.id
        try:
            return await ask_venue(
                self._store, session.context, broker, session.executor.terms, open_id, now_ms=self._clock()
            ), ""  # fmt: skip
        except (UnavailableError, UnknownOutcomeError) as error:
            return (), str(error)

    async def _step(self, session: Session, candles: list[Candle]) -> None:
        for candle in candles:
            if session.state.signal is None and session.state.scheduled is None:
                return  # the rest is nobody's past; the next run puts it on record as an outage
            changed = session.step(candle, entries=False)
            if changed is not None:
                await changed
            if session.is_behind:
                raise UnavailableError(f"{session.context}: the store cannot be used now: recover again")

    def _gap(self, session: Session) -> Gap:
        return Gap(
            session, session.strategy.recovery, clock=self._clock, operator=self._operator, wanted=self._wanted
        )  # fmt: skip

    def _begun(self, context: Context) -> tuple[Driver, Session]:
        params = get_config()
        strategy = self._registry.check_start(context.strategy_name, params)
        driver = Driver(
            context, strategy, self._registry.exchange(context.exchange_name),
            Turns().join(context, strategy.risk_names), store=self._store,
            profiles={name: self._registry.risk(name) for name in strategy.risk_names},
            listeners=self._listeners, params=params, holder=self._holder, clock=self._clock, sleep=self._sleep,
            lease_seconds=self._lease_seconds,
        )  # fmt: skip
        return driver, driver.new_session(self._store)
