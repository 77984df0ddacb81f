"""Executing: the orders of one context are sent, asked about and recorded, one thing at a time.

What is to be done is decided by :mod:`holdfast.engine.orders` from the rows alone. Here it is done: intents are
committed by the session together with the transition that wants them; then this sends, and commits each answer under
the session's tenure before it does anything else.

Invariants:

* Nothing is sent that was not committed before, and nothing at all without the context and, on a shared store, the
  lease. After a refused commit nothing more is sent.
* An answer that could not be committed yet is committed before the next thing is done.
* No candle is decided for an open signal before it is known what became of its entry.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import msgspec

from ..contract import Key
from ..domains import context_key, order_key
from ..errors import (
    FailedError,
    HoldfastError,
    InvalidInputError,
    UnavailableError,
    UnknownOutcomeError,
)
from ..names import Context
from ..rows import CancelReason, Order, Row
from ..rules.params import Params
from ..rules.signals import State, Transition
from .account import AccountRecord
from .answers import answered
from .broker import Broker, OrderReport
from .lanes import Sleep
from .listeners import Listeners
from .order_news import OrderNews
from .orders import (
    EXITS,
    MOST_BACKOFF_MS,
    Ask,
    Book,
    Cancel,
    Put,
    Send,
    Step,
    Terms,
    Wait,
    is_ended,
    later_exits,
    may_turn_up,
    next_step,
    replaced,
    superseded,
    unfound,
    wanted,
    withdrawal,
)
from .shortfall import less_what_is_gone
from .tending import refuse_foreign
from .venue import Venue, quantity_of
from .worker import SignOfLife

if TYPE_CHECKING:
    from .session import Session

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 30.0
_COMMITS_PER_VALIDITY = 4
"""An exit's validity is at least so many commits long: it begins with one, and must be sent after it."""
_LATE_AT_ONCE = 3
"""After so many exits in a row that came too late the next one waits a little."""


class Executor:
    """Executes the orders of one session.

    Args:
        broker: Where they go.
        format_quantity: The exchange's.
        sign: The sign of life of this process, where the store is shared.
        clock: Tells the time in epoch milliseconds.
        sleep: Takes seconds; a seam for tests.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        format_quantity: Callable[[str, float], str],
        params: Params,
        listeners: Listeners,
        sign: SignOfLife | None,
        clock: Callable[[], int],
        sleep: Sleep,
    ) -> None:
        self.book = Book()
        grace_seconds = params.order_grace_seconds + (0.0 if sign is None else sign.lease_seconds)
        self._crossing_ms = round(1000 * params.order_grace_seconds)
        exit_ms = round(1000 * params.exit_validity_seconds)
        self.terms = Terms(
            account=broker.account, features=broker.features, exit_validity_ms=exit_ms,
            entry_validity_ms=round(1000 * params.entry_validity_seconds), grace_ms=round(1000 * grace_seconds),
            poll_ms=max(20, min(1000, exit_ms // 10)),
        )  # fmt: skip
        self._broker, self._venue = broker, Venue(broker, self.terms)
        self._format_quantity, self._listeners = format_quantity, listeners
        self._sign, self._clock, self._sleep = sign, clock, sleep
        self._session: Session | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed, self._moved = asyncio.Event(), asyncio.Event()
        self._exit_validity_ms = exit_ms
        self._over = True
        """Nothing more is sent: closed, fenced or failed."""
        self._forget()

    def _forget(self) -> None:
        self._unsent: set[str] = set()
        self._restored: set[str | None] = set()
        """The signals that were there when this run began: another process may have sent exits of theirs."""
        self._unasked: set[str] = set()
        """Exits that may not be sent before the venue was asked about them."""
        self._orderless = ""
        """The signal that a transition closes though no order of it is known; empty for none."""
        self._untold: list[str] = []
        """What this process committed and certainly has not sent."""
        self._asked: dict[str, int] = {}
        self._doubtful: dict[str, int] = {}
        """Ended orders that the venue is asked about once more, and when."""
        self._suspect: set[str] = set()
        """Ended orders of a signal of which the venue has another twice: it may have these twice, too."""
        self._pause_seconds = 0.0
        self._began_ms = self._commit_ms = 0
        """When the newest commit with an intent began, and how long it took."""
        self.is_leaving = False
        """Nobody waits any longer for what becomes of an order: the run ends between two candles."""
        self._late = 0
        """How many exits in a row the venue has refused because they came too late."""

    # ------------------------------------------------------------------ for the session

    async def recover(self, session: Session) -> None:
        """Read the orders of a session that owns its context, and begin. May be called again.

        Raises:
            InvalidInputError: Orders of another account are under way: start with that account's key.
            HeldError: Another scope of the store trades the account.
            UnavailableError: The store cannot be read now; call again.

        Crash: As before: every order that was sent is in the store.
        """
        await self.close()
        self._forget()
        await AccountRecord(
            session.store, self._broker, session.context.exchange_name, now_ms=self._clock(), sleep=self._sleep,
            holder="" if session.owner is None else session.owner.holder,
        ).check()  # fmt: skip
        rows = await session.store.scan("order", context_key("session", session.context).entity_name)
        kept = session.writer.lifeline.kept_rows("order")  # which the store does not have yet
        self.book = Book(cast("Order", row) for row in ({key: one.row for key, one in rows.items()} | kept).values())
        refuse_foreign(session.context, self.book, self.terms.account)
        for order in self.book.orders.values():
            if self._is_doubtful(order):
                self._doubtful[order.client_order_id] = order.expires_at_ms + self.terms.grace_ms
        self._session, self._over = session, False
        self._restored = {self._open_id, *self.book.signal_ids()}
        if self._may_be_made:  # whoever intended it may have died before it had asked
            under_way = (one for one in self.book.orders.values() if one.action in EXITS and one.state == "intended")
            self._unasked.update(one.client_order_id for one in under_way)
        self._news = OrderNews(session, self._listeners, self._clock)
        if self._open_id is not None and not self.book.of(self._open_id):
            self._news.lacking(self._open_id)
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"orders {session.context}")

    def refusal(self, state: State) -> InvalidInputError | None:
        """Say why what is about to begin cannot be traded; None when it can."""
        signal = state.signal or state.scheduled
        try:
            if signal is not None:
                quantity_of(signal, self._format_quantity)
        except InvalidInputError as error:
            return error
        return None

    def intents(self, before: State, transition: Transition) -> dict[Key, Row | None]:
        """Return the order rows that go into the commit of a transition, deletions of old ones first."""
        after = transition.state
        if (before.signal and before.signal.id) == (after.signal and after.signal.id):
            return {}
        opened, owner = after.signal, None if self._session is None else self._session.owner
        closed = before.signal
        self._orderless = closed.id if closed is not None and not self.book.of(closed.id) else ""
        self._began_ms = self._clock()
        orders = wanted(
            self.book, before.signal, opened, self.terms, now_ms=self._clock(),
            epoch=0 if owner is None else owner.epoch,
            quantity=None if opened is None else quantity_of(opened, self._format_quantity),
            price=next((event.price_close for event in transition.events if event.price_close), None),
        )  # fmt: skip
        return self._rows(*orders)

    def committed(self, rows: dict[Key, Row | None]) -> None:
        """Take note that intents were committed; they are sent from now on. Call it once memory has followed."""
        if self._orderless:
            self._untold.append(self._orderless)
            self._orderless = ""
        if rows:
            self._commit_ms = self._clock() - self._began_ms
            self._allow_time()
        for key, row in rows.items():
            if isinstance(row, Order):
                self.book.put(row)
                self._unsent.add(row.client_order_id)
                if row.action in EXITS and row.signal_id in self._restored and self._may_be_made:
                    self._unasked.add(row.client_order_id)
            else:
                self.book.drop(key.entity_id)
                self._doubtful.pop(key.entity_id, None)  # nobody could ask about it, and a run that ends would wait
        self._tell()

    @property
    def holds_candles(self) -> bool:
        """Whether it is not known yet what became of the open signal's entry, or that nothing did."""
        if self._session is None or self._session.state.signal is None:
            return False
        signal_id = self._session.state.signal.id
        return not self.book.is_entered(signal_id) or withdrawal(self.book, signal_id) is not None

    @property
    def blocks_entries(self) -> bool:
        """Whether an earlier signal's orders are not settled yet."""
        return bool(self.book.unsettled(but=self._open_id))

    async def entered(self) -> CancelReason | None:
        """Wait until it is known what became of the open signal's entry; return why the signal must go, or None."""
        await self._until(lambda: self._open_id is None or self.book.is_entered(self._open_id))
        return None if self._over or self.is_leaving else withdrawal(self.book, self._open_id)

    async def quiet(self) -> None:
        """Wait until no order is under way and nothing is left to close but what is open."""
        await self._until(
            lambda: not self._doubtful and all(map(is_ended, self.book.orders.values())) and not self.blocks_entries
        )

    def leave(self) -> None:
        """Let nobody wait for an order any longer; orders are sent and asked about until :meth:`close`. Repeatable."""
        self.is_leaving = True
        self._tell()

    async def close(self) -> None:
        """Send nothing more, wait for the answer that is under way, and end. Repeatable.

        Crash: What is under way is asked about by the next run.
        """
        self._over = True
        self._tell()
        task, self._task = self._task, None
        if task is not None:
            await asyncio.gather(task, return_exceptions=True)

    # ------------------------------------------------------------------ the loop

    @property
    def _open_id(self) -> str | None:
        signal = None if self._session is None else self._session.state.signal
        return None if signal is None else signal.id

    @property
    def _has_lease(self) -> bool:
        held = self._sign is None or self._sign.is_held
        return held and self._session is not None and self._session.has_lease

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not (self._over or self.is_leaving or condition()):
            await self._moved.wait()

    def _tell(self) -> None:
        self._changed.set()
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def _run(self) -> None:
        assert self._session is not None
        try:
            while not self._over and self._session.owner is not None:
                self._changed.clear()
                while self._untold:
                    self._news.orderless(self._untold.pop(0))
                step = next_step(
                    self.book, self._open_id, self.terms, now_ms=self._clock(), epoch=self._session.owner.epoch,
                    unsent=self._unsent, asked=self._asked, doubtful=self._doubtful, suspect=self._suspect,
                )  # fmt: skip
                await self._do(step)
        except HoldfastError as error:
            self._session.fence(error)
        except Exception as error:  # a fault of ours: somebody must hear of it, and nothing more may be sent
            self._session.fence(FailedError(f"{self._session.context}: its orders stopped: {error!r}"))
            raise
        finally:
            self._over = True
            self._tell()

    async def _do(self, step: Step) -> None:
        match step:
            case Wait():
                await self._rest(None if step.until_ms is None else (step.until_ms - self._clock()) / 1000)
            case Put():
                await self._record(step.order)
            case Send():
                await self._send(step)
            case Ask():
                await self._ask(step.order)
            case Cancel():
                await self._cancel(step.order)

    async def _rest(self, seconds: float | None) -> None:
        """Sleep, or until something has changed."""
        changed = asyncio.ensure_future(self._changed.wait())
        waits: set[asyncio.Future[Any]] = {changed}
        if seconds is not None:
            waits.add(asyncio.ensure_future(self._sleep(max(seconds, 0.001))))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    # ------------------------------------------------------------------ doing

    async def _send(self, step: Send) -> None:
        order = step.order
        assert self._session is not None
        if self._over or self._session.owner is None:
            return  # closed or replaced while the venue was asked
        if order.client_order_id in self._unasked:
            await self._ask_first(order)
            return
        needs_lease = order.action not in EXITS or not self._session.exits_without_lease
        if needs_lease and not self._has_lease:
            await self._rest(self.terms.poll_ms / 1000)  # others may own it already: that shows with the next commit
            return
        if not step.again:
            self._unsent.discard(order.client_order_id)
        sent_ms = self._asked[order.client_order_id] = self._clock()
        try:
            report = await self._venue.submit(order)
        except UnavailableError as error:
            if not step.again:
                self._unsent.add(order.client_order_id)
            await self._trouble(error)
        except UnknownOutcomeError as error:
            self._asked.pop(order.client_order_id, None)
            if order.state != "unknown":
                await self._record(replaced(order, state="unknown", note=str(error)[:200]))
        except HoldfastError as error:  # it can never work
            if step.again:
                await self._trouble(error)
            else:
                await self._record(replaced(order, state="rejected", note=str(error)[:200]))
        else:
            self._pause_seconds = 0.0
            if order.action in EXITS:
                self._late = min(self._late + 1, 16) if report.state == "expired" else 0
                self._allow_time()
            late = sent_ms >= order.expires_at_ms + self.terms.grace_ms
            now = answered(order, report, resent=step.again, late=late)
            if now.state == "unknown" and not step.again:
                self._asked.pop(order.client_order_id, None)
            await self._record(await self._looked_for(now))
            if self._late > _LATE_AT_ONCE:  # clocks that differ by minutes, say: nothing is gained by haste
                self._changed.clear()
                await self._rest(min(self.terms.exit_validity_ms / 1000, _LONGEST_PAUSE_SECONDS))

    @property
    def _repeats_ids(self) -> bool:
        return self.terms.features.refuses_repeated_ids != "always"

    @property
    def _may_be_made(self) -> bool:
        """Whether an exit that is not on record may be at the venue, out of the journal of a process that is gone.

        Where the store belongs to one process that journal is here, and merged.
        """
        return self._repeats_ids or (self._session is not None and self._session.store.guarantees.shared)

    async def _ask_first(self, order: Order) -> None:
        """Ask about an exit that this process has not sent: one that is dead may have, out of a journal that died too.

        Its id is the same, or, where the venue refused that one first, the id of one of the next numbers.
        """
        entry = self.book.entry(order.signal_id)
        later: dict[str, Order] = {}
        shown: list[OrderReport] = []
        try:
            report, count = await self._venue.known(order)
            if report is None and entry is not None:
                later = {one.client_order_id: one for one in later_exits(order, self.terms)}
                shown = await self._venue.shown(order.context[1], entry.intended_at_ms, later)
        except HoldfastError as error:
            await self._trouble(error)
            return
        self._unasked.discard(order.client_order_id)
        if report is not None:
            self._unsent.discard(order.client_order_id)
            if count > 1:
                self._news.twice(order, count)
            await self._record(await self._looked_for(answered(order, report)))
        elif shown:
            self._unsent.discard(order.client_order_id)
            await self._record(replaced(order, state="expired", note="never sent: another exit is at the venue"))
            for one in shown:
                made = later[one.client_order_id]
                await self._record(answered(replaced(made, quantity=one.quantity or one.filled_quantity), one))

    async def _ask(self, order: Order) -> None:
        asked_ms = self._asked[order.client_order_id] = self._clock()
        try:
            report, count = await self._venue.known(order)
        except HoldfastError as error:
            await self._trouble(error)
            return
        self._pause_seconds = 0.0
        if count > 1:
            self._news.twice(order, count)
        if report is not None:
            now = answered(order, report)
            if now != order:
                if count > 1:  # before anything more is closed
                    self._suspect.update(one.client_order_id for one in self.book.of(order.signal_id) if is_ended(one))
                await self._record(await self._looked_for(now))
        elif not is_ended(order):
            step = unfound(
                order, self.terms, asked_ms=asked_ms, now_ms=self._clock(), is_open=order.signal_id == self._open_id,
                left=self.book.position(order.signal_id),
            )  # fmt: skip
            if isinstance(step, Send | Put):
                await self._do(step)
            elif order.venue_id and asked_ms >= order.expires_at_ms + self.terms.grace_ms:
                self._news.hidden(order)
        if is_ended(order):  # only now: what was found must be on record before anybody takes this for the end
            if report is None and may_turn_up(order, self.terms):
                # Whoever put that on record may have been killed before it told anybody.
                self._news.ended(order, self.terms)
            self._suspect.discard(order.client_order_id)
            if asked_ms >= self._doubtful.get(order.client_order_id, 0):
                self._doubtful.pop(order.client_order_id, None)
        self._tell()

    async def _cancel(self, order: Order) -> None:
        self._asked[order.client_order_id] = self._clock()
        if not self._has_lease:
            await self._rest(self.terms.poll_ms / 1000)
            return
        try:
            report = await self._venue.cancel(order)
        except HoldfastError as error:
            await self._trouble(error)
            return
        if report is None:
            await self._ask(order)
        elif (now := answered(order, report)) != order:
            await self._record(now)

    async def _looked_for(self, order: Order) -> Order:
        """Return a refused exit with what the account no longer has to close."""
        assert self._session is not None
        try:
            return await less_what_is_gone(
                order, self.book, store=self._session.store, venue=self._venue, news=self._news
            )  # fmt: skip
        except HoldfastError as error:
            await self._trouble(error)
            return order

    def _allow_time(self) -> None:
        """Let exits be valid for as long as store and venue need: one that is always late would never be made."""
        needed_ms = max(self._exit_validity_ms * 2**self._late, _COMMITS_PER_VALIDITY * self._commit_ms)
        validity_ms = min(needed_ms, max(self._exit_validity_ms, MOST_BACKOFF_MS))
        self.terms = msgspec.structs.replace(self.terms, exit_validity_ms=max(self._exit_validity_ms, validity_ms))

    # ------------------------------------------------------------------ recording and telling

    def _rows(self, *orders: Order) -> dict[Key, Row | None]:
        """Return the rows of a commit: of a new order also the deletions that go with it."""
        rows: dict[Key, Row | None] = {}
        for order in orders:
            context = Context(*order.context)
            if order.client_order_id not in self.book.orders:
                rows |= {order_key(context, name): None for name in superseded(self.book, order, self._doubtful)}
            rows[order_key(context, order.client_order_id)] = order
        return rows

    async def _record(self, order: Order) -> None:
        """Commit what an order has become, however long that takes: nothing may be done on what is not on record."""
        assert self._session is not None
        is_new, rows = order.client_order_id not in self.book.orders, self._rows(order)
        while True:
            self._began_ms = self._clock()
            try:
                await self._session.note(rows)
                break
            except UnavailableError as error:
                if self._over:
                    return  # whoever comes next asks the venue
                await self._trouble(error)
        was = self.book.orders.get(order.client_order_id)
        if is_new and order.state == "intended":
            self.committed(rows)
            return
        if order.client_order_id in self._unsent:  # its new validity has begun with this commit
            self._commit_ms = self._clock() - self._began_ms
            self._allow_time()
        self.book.put(order)
        if is_ended(order):
            self._asked.pop(order.client_order_id, None)
            if self._is_doubtful(order):
                # However late it was cancelled: a fill may have crossed that.
                crossed_ms = self._clock() + self._crossing_ms
                self._doubtful[order.client_order_id] = max(order.expires_at_ms + self.terms.grace_ms, crossed_ms)
        self._tell()
        if order.state in ("rejected", "expired") and (was is None or was.state != order.state):
            self._news.ended(order, self.terms)
        more = order.filled_quantity > (0.0 if was is None else was.filled_quantity)
        if more and order.action in EXITS and self.book.excess(order.signal_id):
            self._news.excess(order, self.book.excess(order.signal_id))

    def _is_doubtful(self, order: Order) -> bool:
        """Whether the venue must be asked once more when an ended order can no longer change."""
        if order.adopted:
            return False  # it was never sent
        if self._repeats_ids:
            return is_ended(order)
        return order.state in ("cancelled", "expired")

    async def _trouble(self, error: HoldfastError) -> None:
        """Report the first of a row of failures, and pause longer after each."""
        if not self._pause_seconds:
            self._news.failure(error)
        self._pause_seconds = min(max(2 * self._pause_seconds, _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
        if not self._over:
            self._changed.clear()
            await self._rest(min(self._pause_seconds, self.terms.exit_validity_ms / 1000))
