"""The operator's hands: adopt, close and clear, each one :mod:`audited <holdfast.engine.audited>` commit.

Invariants:

* What a hand does to one row is completed by the same reconciling that recovery does, in the same commit: every
  invariant holds afterwards.
* No byte is thrown away: what is cleared stays in quarantine, marked as released.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec

from ..contract import Key
from ..domains import context_key, guard_key, ledger_key, order_key
from ..errors import ConflictError, InvalidInputError, NotFoundError
from ..names import Context
from ..quarantine import kept_rows, released_key
from ..rows import Event, Guard, Order, Signal
from ..rules.candles import MINUTE_MS, Candle
from ..rules.drafts import stored_failures
from ..rules.params import Params, get_config
from ..rules.signals import State, Transition, take_over
from ..store import Store
from .audited import Audited, Done, Wanted
from .commits import Outages, changes
from .holdings import Holding, Holdings, order_of
from .lanes import Sleep, commit_surely
from .orders import Book
from .outbox import trade_of
from .plan import ended
from .reconcile import Plan, reconcile
from .recovery import Looked
from .salvaging import context_of, readable
from .session import wall_clock_ms
from .settling import moved
from .settling import settled as settled_by_hand
from .worker import Watch

FARTHEST_MS = 7 * 1440 * MINUTE_MS
"""How far from the last decision the present may be before a time has to be named: a paper market has its own."""


class Hands:
    """One operator at one store.

    Args:
        store: Open for writing.
        operator: user@host.
        why: For the record.
        params: Fees and slippage, for the PnL of what is closed.
        risk_names: Profiles of the strategy concerned, by its name; without it, those in which it holds slots.
        clock, sleep: Seams for tests.
        watch: Judges whether an owner lives; default: where the store may be shared.
    """

    def __init__(
        self,
        store: Store,
        *,
        operator: str,
        why: str = "",
        params: Params | None = None,
        risk_names: Mapping[str, tuple[str, ...]] | None = None,
        clock: Callable[[], int] = wall_clock_ms,
        sleep: Sleep = asyncio.sleep,
        watch: Watch | None = None,
    ) -> None:
        self._store, self._operator = store, operator
        self._clock, self._sleep = clock, sleep
        self._audited = Audited(
            store, operator=operator, why=why, params=get_config() if params is None else params,
            risk_names=risk_names or {}, clock=clock, sleep=sleep,
            watch=watch or (Watch(store) if store.guarantees.shared else None),
        )  # fmt: skip

    @property
    def now_ms(self) -> int:
        """The present, in epoch milliseconds."""
        return self._clock()

    # ------------------------------------------------------------------ adopt

    async def adopt(self, key: Key) -> Done:
        """Take the row that lies in quarantine for ``key`` as this context's own, and let the context trade again.

        Raises:
            NotFoundError: Nothing of it is in quarantine.
            InvalidInputError: Its bytes cannot be read, or it cannot be true: clear it.
            HeldError: A live process owns the context.

        Crash: All of it is done, or nothing.
        """
        context = await context_of(self._store, key.entity_name)
        if context is None or key.domain not in ("signal", "schedule", "partial", "session"):
            raise InvalidInputError(
                f"{key} cannot be adopted, only a signal, schedule, partial or session row: clear it"
            )
        return await self._audited.commit(
            "adopt", str(key), key.entity_name, context, lambda seen: self._adopted(key, seen)
        )

    async def _adopted(self, key: Key, seen: Looked) -> Wanted:
        held = await self._store.quarantined(key.domain, key.entity_name)
        row = readable(key, seen.context, held)
        domain = {"schedule": "scheduled"}.get(key.domain, key.domain)
        if getattr(seen.found, domain) is not None:
            raise InvalidInputError(f"{key}: another row stands there: clear the one in quarantine")
        if isinstance(row, Signal) and (failures := stored_failures(row)):
            raise InvalidInputError(f"{key} cannot be watched: {'; '.join(failures)}: clear it")
        more: dict[str, Any] = {domain: row, "signal_stopped": False}
        if key.domain == "session":
            more = {domain: row, "session_lost": False, "signal_stopped": seen.found.signal_stopped}
        elif key.domain != "signal":
            more = {domain: row}
        plan = reconcile(seen.context, seen.found._replace(**more), self._audited.names)
        if key in plan.changes and plan.changes[key] is None:
            reason = next(repair.message for repair in plan.repairs if repair.key == key)
            raise InvalidInputError(f"{key}: {reason}: clear it")
        freed, expect = await self._store.release_changes(key)
        return Wanted(
            {**freed, key: row, **plan.changes, **await self._audited.guards(plan.profiles, expect)},
            {**expect, key: 0}, released=key,
        )  # fmt: skip

    async def take_over(
        self,
        context: Context,
        signal: Signal,
        *,
        at_ms: int | None = None,
        holdings: Holdings | None = None,
        quantity: float | None = None,
    ) -> Done:
        """Put a position that came about elsewhere under the context's watch, with an ``opened`` event.

        Args:
            signal: As it is; its context is ``context``.
            at_ms: When it was put there; default: now.
            holdings: Of the account that holds it: it gets the order that its exits follow from. Without, it has
                none, and a bot with a broker tells of its exit and sends nothing.
            quantity: How much of what the account holds; default: all that no order tells of.

        Raises:
            InvalidInputError: It cannot be true, the account does not hold it, or something is open, waits or is in
                quarantine there already.
            HeldError: A live process owns the context, or another scope trades the account.
            UnavailableError: Orders of the symbol are under way, or somebody cannot be asked now.

        Crash: All of it is done, or nothing.
        """
        if failures := stored_failures(signal):
            raise InvalidInputError(f"the position cannot be watched: {'; '.join(failures)}")

        async def wanted(seen: Looked) -> Wanted:
            state = seen.plan.state
            stands = state.signal or state.scheduled
            self._require_free(seen, context)
            if stands is not None:
                remedy = "" if holdings is None else "; if it is that position, adopt it with --at-venue alone"
                raise InvalidInputError(f"{context}: {stands.id!r} is there already: close it first{remedy}")
            if signal.id in state.closed_ids or await self._store.get(ledger_key(context, signal.id)):
                raise InvalidInputError(f"the id {signal.id!r} was used before: name another with --id")
            candle, adopted, orders = self._candle(state, at_ms, signal.price_open), signal, dict[Key, Order]()
            if holdings is not None:
                holding = await holdings.foreign(context, signal.position, quantity)
                adopted = msgspec.structs.replace(signal, extra={"quantity": holding.quantity})
                orders = self._order(adopted, holding)
            moved = await self._moved(seen, take_over(state, self._audited.spec(seen), candle, adopted))
            return moved._replace(
                changes={**moved.changes, **orders}, expect={**moved.expect, **dict.fromkeys(orders, 0)}
            )

        name = context_key("signal", context).entity_name
        return await self._audited.commit("adopt", str(context), name, context, wanted)

    async def adopt_at_venue(self, context: Context, holdings: Holdings, *, quantity: float | None = None) -> Done:
        """Give the open signal, which has no order, the one that its exits follow from.

        It was opened before there was a broker, or adopted without one.

        Args:
            quantity: How much of what the account holds; default: all that no order tells of.

        Raises:
            NotFoundError: Nothing is open.
            InvalidInputError: It has orders, or the account does not hold it.
            HeldError, UnavailableError: As :meth:`take_over`.

        Crash: All of it is done, or nothing.
        """

        async def wanted(seen: Looked) -> Wanted:
            self._require_free(seen, context)
            signal = seen.plan.state.signal
            if signal is None:
                raise NotFoundError(
                    f"{context}: nothing is open: describe the position, with --position and the others"
                )
            name = context_key("session", context).entity_name
            orders = [cast("Order", loaded.row) for loaded in (await self._store.scan("order", name)).values()]
            if any(order.signal_id == signal.id for order in orders):
                raise InvalidInputError(f"{context}: {signal.id!r} has its order: there is nothing to adopt")
            rows = self._order(signal, await holdings.foreign(context, signal.position, quantity))
            expect: dict[Key, int] = dict.fromkeys(rows, 0)
            guards = await self._audited.guards(seen.plan.profiles, expect)
            return Wanted({**seen.plan.changes, **guards, **rows}, expect)

        name = context_key("signal", context).entity_name
        return await self._audited.commit("adopt", str(context), name, context, wanted)

    async def move(self, context: Context, holdings: Holdings) -> Done:
        """Have the orders that are not settled belong to another account: the same one under a new key.

        Args:
            holdings: Of that account; the venue must show there what the orders come to.

        Raises:
            NotFoundError: Every order is settled.
            InvalidInputError: They belong to it already, or it does not hold what they come to.
            HeldError: A live process owns the context, or another scope trades the account.
            UnavailableError: Somebody cannot be asked now.

        Crash: All of it is done, or nothing.
        """

        async def wanted(seen: Looked) -> Wanted:
            book, versions = await self._orders(context)
            if not book.unsettled():
                raise NotFoundError(f"{context}: every order is settled: there is nothing to move")
            rows = {order_key(context, one.client_order_id): one for one in moved(book, holdings.account)}
            if not rows:
                raise InvalidInputError(f"{context}: its orders belong to the account {holdings.account!r} already")
            await holdings.require_held(context, list(rows.values()))
            guards = await self._audited.guards(seen.plan.profiles, versions)
            return Wanted({**seen.plan.changes, **guards, **rows}, versions)

        name = context_key("signal", context).entity_name
        return await self._audited.commit("adopt", str(context), name, context, wanted)

    def _order(self, signal: Signal, holding: Holding) -> dict[Key, Order]:
        order = order_of(signal, holding, now_ms=self._clock(), by=self._operator)
        return {order_key(signal.context, order.client_order_id): order}

    # ------------------------------------------------------------------ close

    async def close(
        self, context: Context, price: float | None, *, at_ms: int | None = None, settled: bool = False
    ) -> Done:  # fmt: skip
        """Close what is open at ``price``, or cancel what waits: a transition with its event and its trade.

        Nothing is sent to a venue.

        Args:
            at_ms: When; default: now.
            settled: The operator has seen at the venue that nothing of its orders is left: they count as ended, what
                was not closed as gone, and nobody asks about them again. It may be that nothing else is open then.

        Raises:
            NotFoundError: Nothing is open and nothing waits.
            InvalidInputError: Its row is in quarantine, the time is far from the last decision, or a price is missing.
            HeldError: A live process owns the context.

        Crash: All of it is done, or nothing; the trade is written a moment later, or by the next run.
        """

        async def wanted(seen: Looked) -> Wanted:
            state = seen.plan.state
            orders, versions = await self._settled(context) if settled else ({}, {})
            if state.signal is None and state.scheduled is None:
                self._require_free(seen, context)
                if not orders:
                    more = ", and every order is settled" if settled else ""
                    raise NotFoundError(f"{context}: nothing is open and nothing waits{more}")
                guards = await self._audited.guards(seen.plan.profiles, versions)
                return Wanted({**seen.plan.changes, **guards, **orders}, versions)
            if price is None:
                raise InvalidInputError(f"{context}: something is open or waits, so say at which price it ends")
            candle = self._candle(state, at_ms, price)
            transition = ended(state, self._audited.spec(seen), candle, price, "operator")
            assert transition is not None
            ending = await self._moved(seen, transition)
            return ending._replace(changes={**ending.changes, **orders}, expect={**ending.expect, **versions})

        done = await self._audited.commit(
            "close", str(context), context_key("signal", context).entity_name, context, wanted
        )
        if done.event is not None and done.event.kind == "closed":
            await self._record(context, done.event)
        return done

    async def _settled(self, context: Context) -> tuple[dict[Key, Order], dict[Key, int]]:
        """Return the rows that settle every order, and what was read for it."""
        book, versions = await self._orders(context)
        rows = {order_key(context, one.client_order_id): one for one in settled_by_hand(
            book, now_ms=self._clock(), by=self._operator
        )}  # fmt: skip
        return rows, {**dict.fromkeys(rows, 0), **versions}

    async def _orders(self, context: Context) -> tuple[Book, dict[Key, int]]:
        found = await self._store.scan("order", context_key("session", context).entity_name)
        book = Book(cast("Order", loaded.row) for loaded in found.values())
        return book, {key: loaded.version for key, loaded in found.items()}

    async def _record(self, context: Context, event: Event) -> None:
        key, trade = ledger_key(context, event.signal.id), trade_of(event)
        try:
            await commit_surely(self._store.writer("operator ledger"), {key: trade}, {key: 0}, sleep=self._sleep)
        except ConflictError:
            pass  # the event is told by the next run, which compares

    # ------------------------------------------------------------------ clear

    async def clear(self, key: Key) -> Done:
        """Remove a row that means nothing; its bytes stay in quarantine, marked as released.

        Raises:
            NotFoundError: There is no such row, nor one in quarantine.
            InvalidInputError: It means something: a position, or what belongs to one.
            HeldError: A live process owns the context.

        Crash: All of it is done, or nothing.
        """
        owner = key.entity_id if key.domain == "risk" else key.entity_name
        context = await context_of(self._store, owner)

        async def wanted(seen: Looked | None) -> Wanted:
            if self._store.is_stopped(key):
                return await self._released(key, seen)
            return await self._removed(key, seen)

        return await self._audited.commit("clear", str(key), owner, context, wanted)

    async def _released(self, key: Key, seen: Looked | None) -> Wanted:
        freed, expect = await self._store.release_changes(key)
        plan: Plan | None = None
        if seen is not None:
            # While its session row is in quarantine, reconciling leaves a hole in the numbers: keep it so.
            stopped = seen.found.signal_stopped and key.domain != "signal"
            plan = reconcile(seen.context, seen.found._replace(signal_stopped=stopped), self._audited.names)
        profiles = () if plan is None else plan.profiles
        if key.domain == "risk":
            profiles = tuple({*profiles, key.entity_name})
        guards = await self._audited.guards(profiles, expect)
        return Wanted({**freed, **(plan.changes if plan else {}), **guards}, expect, released=key)

    async def _removed(self, key: Key, seen: Looked | None) -> Wanted:
        place = self._store.place(key)
        record = (await place.backend.read(place.scope, [key])).get(key)
        if record is None:
            raise NotFoundError(f"{key}: there is no such row, nor one in quarantine", key=key)
        if key.domain not in ("partial", "risk"):
            remedy = "close it" if key.domain in ("signal", "schedule") else "the engine keeps it in order by itself"
            if key.domain == "order":
                remedy = "settle it with `holdfast close CONTEXT --settled`, once nothing of it is left at the venue"
            raise InvalidInputError(f"{key} is not in quarantine, and means something: {remedy}")
        if seen is not None and (seen.plan.state.signal is not None or seen.found.signal_stopped):
            raise InvalidInputError(f"{key} belongs to what is open (or in quarantine) there: close or clear that")
        number = (await self._store.head()).number
        kept = kept_rows(key, record, f"cleared by {self._operator}", number)
        expect = {**{released_key(one): 0 for one in kept}, key: record.version}
        plan_changes = {} if seen is None else seen.plan.changes
        profiles = set(() if seen is None else seen.plan.profiles) | (
            {key.entity_name} if key.domain == "risk" else set()
        )
        return Wanted(
            {**plan_changes, key: None, **{released_key(one): row for one, row in kept.items()},
             **await self._audited.guards(tuple(profiles), expect)},
            expect,
        )  # fmt: skip

    # ------------------------------------------------------------------ what is there

    def _require_free(self, seen: Looked, context: Context) -> None:
        for domain in ("signal", "schedule", "session"):
            key = context_key(domain, context)
            if self._store.is_stopped(key):
                raise InvalidInputError(f"{key} is in quarantine: adopt or clear it first")

    def _candle(self, state: State, at_ms: int | None, price: float) -> Candle:
        """Return a candle that stands for the moment of what is done by hand."""
        now_ms = self._clock() if at_ms is None else at_ms
        opened_ms = now_ms - now_ms % MINUTE_MS - MINUTE_MS
        if at_ms is None and state.last_candle_ms and abs(opened_ms - state.last_candle_ms) > FARTHEST_MS:
            raise InvalidInputError(
                "the last decision is more than a week from now: say when this happened, with --at TIME"
            )
        return Candle(max(opened_ms, state.last_candle_ms), price, price, price, price, 0.0)

    async def _moved(self, seen: Looked, transition: Transition) -> Wanted:
        """Return the rows of a transition, and of what had to be reconciled before it."""
        context, state = seen.context, seen.plan.state
        held, names = seen.plan.risk_names, self._audited.names
        keys = {guard_key(name) for name in (*held, *names)} | {Key("guard", n, "guard") for n in seen.plan.profiles}
        found, _ = await self._store.salvage(*keys)
        guards = {key: cast("Guard", loaded.row) for key, loaded in found.items()}
        rows, _ = changes(context, state, transition, held=held, risk_names=names, guards=guards)
        merged = {**seen.plan.changes, **rows}
        for profile in seen.plan.profiles:
            key = Key("guard", profile, "guard")
            merged.setdefault(key, Guard(changes=guards[key].changes + 1 if key in guards else 1))
        expect = {key: found[key].version if key in found else 0 for key in keys if key in merged}
        first_ms, last_ms = state.last_candle_ms + MINUTE_MS, transition.state.last_candle_ms
        if state.last_candle_ms and first_ms <= last_ms:  # nobody was asked on these
            outages = Outages(context, seen.outages, self._audited.retention)
            outages.forbid(first_ms, last_ms)
            merged |= outages.take()
        return Wanted(merged, expect, event=transition.events[-1])
