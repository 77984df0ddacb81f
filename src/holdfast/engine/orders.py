"""Orders as plain functions: which ones a context wants, and what each answer, or silence, makes of them; no I/O.

``next_step`` looks at the rows alone and says the one thing to do now. It is asked again after each thing that was
done, and after a restart it is asked the same: recovery has no rules of its own.

Invariants:

* An order is committed before it is sent. What this process did not commit itself may have been sent by another.
* An order whose fate is unknown is asked about. It counts as never having come only when its expiry, and the grace
  after it, are over and the venue knows nothing of it; never, once the venue has given it a number. It is sent again
  only where the venue refuses repeated ids for good, and then it is the same request.
* An entry is never made up for; an exit is made until nothing is left to close. The next exit is intended only when
  what became of the entry and of every earlier exit is known, so no quantity is closed twice.
* The client order id follows from context, signal, action and number: whoever comes later derives the same.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal
from typing import NamedTuple

import msgspec

from ..names import Context
from ..rows import CancelReason, Order, OrderAction, OrderState, Signal
from .broker import Features, OrderRequest

ENDS: frozenset[OrderState] = frozenset(("filled", "rejected", "cancelled", "expired"))
"""States in which nothing more is expected of the venue."""
EXITS: frozenset[OrderAction] = frozenset(("close", "reduce"))
KEPT_SIGNALS = 5
"""Of so many ended signals the orders stay; older ones go with the next entry."""
MOST_BACKOFF_MS = 60_000
_LATER_EXITS = 32
"""After a refusal the next exit waits twice as long, a minute at most: more are not made within a lease."""
DUST = 1e-9
"""Part of an order's quantity that counts as rounding."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What orders are made and judged under."""

    account: str
    """Fingerprint of the venue account."""
    features: Features
    entry_validity_ms: int
    """How long an entry may take to be sent and filled; what is not filled then is cancelled."""
    exit_validity_ms: int
    """The same for one attempt of an exit; the next one follows."""
    grace_ms: int
    """How long after its expiry an order that nobody knows may still turn up: the lease, and the clocks' difference."""
    poll_ms: int = 1000
    """How often an order is asked about."""


def client_order_id(context: Context, signal_id: str, action: OrderAction, n: int, length: int = 32) -> str:
    """Return the id of an order: a letter and characters of a-z and 2-7, the same whoever asks.

    Args:
        length: How many of them; a shorter one is the beginning of a longer one.
    """
    exact = msgspec.json.encode([*context, signal_id, action, n])
    digest = hashlib.blake2b(exact, digest_size=19).digest()
    return ("h" + base64.b32encode(digest).decode().lower().rstrip("="))[:length]


def is_ended(order: Order) -> bool:
    """Whether the venue has nothing more to do with it."""
    return order.state in ENDS


def request_of(order: Order) -> OrderRequest:
    """Return what is sent for an order: the same for the same row."""
    return OrderRequest(
        symbol=order.context[1], client_order_id=order.client_order_id, side=order.side, quantity=order.quantity,
        price=order.price, reduce_only=order.reduce_only, closes=order.action in EXITS,
        expires_at_ms=order.expires_at_ms, reference_price=order.reference_price,
    )  # fmt: skip


def replaced(order: Order, **changes: object) -> Order:
    """Return the order with some members changed."""
    return msgspec.structs.replace(order, **changes)


class Book:
    """The orders of one context, as they are stored.

    Args:
        orders: Every row that there is.
    """

    def __init__(self, orders: Iterable[Order] = ()) -> None:
        self.orders: dict[str, Order] = {}
        for order in sorted(orders, key=lambda one: (one.intended_at_ms, one.action in EXITS, one.n)):
            self.put(order)

    def put(self, order: Order) -> None:
        """Take note of what an order has become."""
        self.orders[order.client_order_id] = order

    def drop(self, client_order_id: str) -> None:
        """Take note that a row was deleted."""
        self.orders.pop(client_order_id, None)

    def of(self, signal_id: str) -> list[Order]:
        """Return the orders of a signal, oldest first."""
        return [order for order in self.orders.values() if order.signal_id == signal_id]

    def signal_ids(self) -> list[str]:
        """Return whose orders there are, oldest first."""
        return list(dict.fromkeys(order.signal_id for order in self.orders.values()))

    def entry(self, signal_id: str) -> Order | None:
        """Return the order that opened, or is to open, a signal."""
        return next((order for order in self.of(signal_id) if order.action == "open"), None)

    def position(self, signal_id: str) -> float:
        """Return what of a signal is filled and not closed, in units of the base currency; rounding is 0."""
        entered, closed = self._sums(signal_id)
        gone = sum(Decimal(repr(order.missing_quantity)) for order in self.of(signal_id) if order.action in EXITS)
        left = float(entered - closed - gone)
        return left if left > float(entered) * DUST else 0.0

    def excess(self, signal_id: str) -> float:
        """Return how much more of a signal was closed than was open; 0 where the venue knows reduce-only."""
        entered, closed = self._sums(signal_id)
        over = float(closed - entered)
        return over if over > float(entered) * DUST else 0.0

    def _sums(self, signal_id: str) -> tuple[Decimal, Decimal]:
        """Return what of a signal was filled and what was closed: in decimals, for a float's rounding costs a step."""
        sums = [Decimal(0), Decimal(0)]
        for order in self.of(signal_id):
            sums[order.action in EXITS] += Decimal(repr(float(order.filled_quantity)))
        return sums[0], sums[1]

    def is_settled(self, signal_id: str) -> bool:
        """Whether no order of a signal is under way and nothing is left to close."""
        return all(map(is_ended, self.of(signal_id))) and self.position(signal_id) == 0

    def is_entered(self, signal_id: str) -> bool:
        """Whether it is known what became of a signal's entry: something was filled, or it ended."""
        entry = self.entry(signal_id)
        return entry is None or is_ended(entry) or entry.filled_quantity > 0

    def unsettled(self, *, but: str | None = None) -> list[str]:
        """Return the signals whose orders are under way or leave something to close, ``but`` left out."""
        return [signal_id for signal_id in self.signal_ids() if signal_id != but and not self.is_settled(signal_id)]


# ---------------------------------------------------------------------- what a context wants


def entry_order(signal: Signal, quantity: float, terms: Terms, *, now_ms: int, epoch: int) -> Order:
    """Return the order that opens a signal, to be committed with it."""
    return Order(
        client_order_id=client_order_id(signal.context, signal.id, "open", 1, terms.features.id_length),
        context=(signal.exchange_name, signal.symbol, signal.strategy_name),
        account=terms.account, signal_id=signal.id, action="open", quantity=quantity,
        side="buy" if signal.position == "long" else "sell", reference_price=signal.price_open,
        state="intended", epoch=epoch, intended_at_ms=now_ms, expires_at_ms=now_ms + terms.entry_validity_ms,
    )  # fmt: skip


def exit_order(
    book: Book, signal_id: str, terms: Terms, *, now_ms: int, epoch: int, price: float | None = None
) -> Order | None:
    """Return the order that closes what is left of a signal; None when nothing is, or when that is not known yet.

    Args:
        price: At which it was decided, if that is known.
    """
    entry, left = book.entry(signal_id), book.position(signal_id)
    if entry is None or left == 0 or not all(map(is_ended, book.of(signal_id))):
        return None
    n = max((order.n for order in book.of(signal_id) if order.action == "close"), default=0) + 1
    name = client_order_id(Context(*entry.context), signal_id, "close", n, terms.features.id_length)
    return Order(
        client_order_id=name, context=entry.context,
        account=terms.account, signal_id=signal_id, action="close", n=n,
        side="sell" if entry.side == "buy" else "buy", quantity=left, reference_price=price or entry.reference_price,
        reduce_only=terms.features.reduce_only, state="intended", epoch=epoch,
        intended_at_ms=now_ms, expires_at_ms=now_ms + terms.exit_validity_ms,
    )  # fmt: skip


def later_exits(order: Order, terms: Terms) -> list[Order]:
    """Return the exits that would follow ``order`` if each before were refused: another owner may have come to one."""
    context, length = Context(*order.context), terms.features.id_length
    numbers = range(order.n + 1, order.n + 1 + _LATER_EXITS)
    names = {n: client_order_id(context, order.signal_id, order.action, n, length) for n in numbers}
    return [replaced(order, n=n, client_order_id=name) for n, name in names.items()]


def superseded(book: Book, order: Order, doubtful: Collection[str] = ()) -> list[str]:
    """Return the ids of rows that may go when ``order`` is committed: old failed exits, signals long settled.

    The newest exit always stays, so that its number is never used again.

    Args:
        doubtful: Ended orders of which the venue is yet to be asked once more; they stay.
    """
    if order.action in EXITS:
        # What the venue took may fill yet, whatever it said when it was cancelled: that row stays.
        failed = [
            one
            for one in book.of(order.signal_id)
            if one.action == order.action and one.n < order.n - 1 and one.client_order_id not in doubtful
            and one.state in ("rejected", "expired") and not one.venue_id and not one.missing_quantity
        ]  # fmt: skip
        return [one.client_order_id for one in failed]
    settled = [signal_id for signal_id in book.signal_ids() if book.is_settled(signal_id)]
    return [one.client_order_id for signal_id in settled[:-KEPT_SIGNALS] for one in book.of(signal_id)]


def wanted(
    book: Book, before: Signal | None, after: Signal | None, terms: Terms, *,
    quantity: float | None, now_ms: int, epoch: int, price: float | None = None,
) -> list[Order]:  # fmt: skip
    """Return the orders that a transition wants, to be committed with it.

    Args:
        before, after: What was open, and what then is.
        quantity: Of the entry; None where nothing opens.
        price: The price that decided.
    """
    orders = []
    if before is not None and (after is None or after.id != before.id):
        orders.append(exit_order(book, before.id, terms, now_ms=now_ms, epoch=epoch, price=price))
    if after is not None and (before is None or after.id != before.id) and quantity is not None:
        orders.append(entry_order(after, quantity, terms, now_ms=now_ms, epoch=epoch))
    return [order for order in orders if order is not None]


# ---------------------------------------------------------------------- what to do now


class Send(NamedTuple):
    """Send it: for the first time, or the same request again."""

    order: Order
    again: bool = False


class Ask(NamedTuple):
    """Ask the venue what became of it."""

    order: Order


class Cancel(NamedTuple):
    """Ask the venue to cancel what rests there."""

    order: Order


class Put(NamedTuple):
    """Commit a changed or a new order."""

    order: Order


class Wait(NamedTuple):
    """Nothing to do before ``until_ms``; None: nothing at all, until something changes."""

    until_ms: int | None


Step = Send | Ask | Cancel | Put | Wait


def next_step(
    book: Book,
    open_id: str | None,
    terms: Terms,
    *,
    now_ms: int,
    epoch: int,
    unsent: Collection[str] = (),
    asked: Mapping[str, int] | None = None,
    doubtful: Mapping[str, int] | None = None,
    suspect: Collection[str] = (),
) -> Step:
    """Say the one thing to do now.

    Args:
        open_id: The signal that is open; what is left of any other is to be closed.
        now_ms: By this machine's wall clock.
        epoch: Of the owner, for a new order.
        unsent: Orders that this process committed and certainly has not sent.
        asked: When each order was last asked about or sent.
        doubtful: When each ended order that may yet change is to be looked at once more.
        suspect: Ended orders that are to be looked at before anything else is done.
    """
    asked, doubtful = asked or {}, doubtful or {}
    waits: list[int] = []
    for order in filter(is_ended, book.orders.values()):
        due_ms = doubtful.get(order.client_order_id)
        if order.client_order_id in suspect or (due_ms is not None and now_ms >= due_ms):
            return Ask(order)
        if due_ms is not None:
            waits.append(due_ms)
    steps = [
        _under_way(order, order.signal_id == open_id, terms, now_ms, unsent, asked.get(order.client_order_id))
        for order in sorted(book.orders.values(), key=lambda one: one.action not in EXITS)  # exits first
        if not is_ended(order)
    ]
    due = (_exit_due(book, signal_id, terms, now_ms, epoch) for signal_id in book.unsettled(but=open_id))
    steps += [step for step in due if step is not None]
    for step in steps:
        if not isinstance(step, Wait):
            return step
        if step.until_ms is not None:
            waits.append(step.until_ms)
    return Wait(min(waits, default=None))


def _under_way(
    order: Order, is_open: bool, terms: Terms, now_ms: int, unsent: Collection[str], asked_ms: int | None
) -> Step:  # fmt: skip
    is_exit = order.action in EXITS
    if order.client_order_id in unsent:
        if now_ms < order.expires_at_ms and (is_exit or is_open):
            return Send(order)
        if is_exit:  # it was never sent, so the same order may have a later expiry
            return Put(replaced(order, expires_at_ms=now_ms + terms.exit_validity_ms))
        return Put(replaced(order, state="expired", note=order.note or "never sent"))
    if order.state in ("sent", "open", "partial") and (now_ms >= order.expires_at_ms or not (is_exit or is_open)):
        return _paced(Cancel(order), asked_ms, terms, now_ms)
    return _paced(Ask(order), asked_ms, terms, now_ms)


def _paced(step: Step, asked_ms: int | None, terms: Terms, now_ms: int) -> Step:
    # Before the last time: the clock was set back, and nobody knows how long that is ago.
    if asked_ms is None or not asked_ms <= now_ms < asked_ms + terms.poll_ms:
        return step
    return Wait(asked_ms + terms.poll_ms)


def unfound(order: Order, terms: Terms, *, asked_ms: int, now_ms: int, is_open: bool, left: float) -> Step:
    """Say what to do about an order that the venue knows nothing of, though it may have been sent.

    Args:
        asked_ms: When the venue was asked: the answer may have taken long, and what came meanwhile is not in it.
        is_open: Whether its signal is the one that is open.
        left: How much of that is filled and not closed: another owner may have closed it by an order of its own.
    """
    features, is_exit = terms.features, order.action in EXITS
    in_time = now_ms < order.expires_at_ms
    # Where an id is refused for good the same request can do no harm; an entry that is late would.
    is_due = is_exit and order.quantity <= left * (1 + DUST)
    wanted = (is_open and in_time) or (is_due and (in_time or not features.refuses_expired))
    if wanted and features.refuses_repeated_ids == "always" and order.state in ("intended", "unknown"):
        return Send(order, again=True)
    if order.venue_id:
        return Wait(now_ms + terms.poll_ms)  # the venue took it: that it shows none now does not undo that
    over_ms = order.expires_at_ms + terms.grace_ms
    if asked_ms < over_ms:
        return Wait(max(now_ms, min(now_ms + terms.poll_ms, over_ms)))
    return Put(replaced(order, state="expired", note="unknown at the venue after its expiry"))


def may_turn_up(order: Order, terms: Terms) -> bool:
    """Whether an order that was given up as never having come could still come: the venue refuses no late request."""
    return order.state == "expired" and not terms.features.refuses_expired


def _exit_due(book: Book, signal_id: str, terms: Terms, now_ms: int, epoch: int) -> Step | None:
    order = exit_order(book, signal_id, terms, now_ms=now_ms, epoch=epoch)
    if order is None:
        return None
    before = [one for one in book.of(signal_id) if one.action in EXITS]
    if not before or before[-1].filled_quantity or before[-1].missing_quantity or before[-1].state == "expired":
        return Put(order)
    due = before[-1].intended_at_ms + min(MOST_BACKOFF_MS, terms.exit_validity_ms // 10 * 2 ** min(order.n - 2, 10))
    return Wait(due) if before[-1].intended_at_ms <= now_ms < due else Put(order)


def withdrawal(book: Book, open_id: str | None) -> CancelReason | None:
    """Return why the open signal must go: its entry ended with nothing filled; None where it stands."""
    entry = None if open_id is None else book.entry(open_id)
    if entry is None or open_id is None or not is_ended(entry) or entry.filled_quantity > 0:
        return None
    if entry.state == "rejected":
        return "order_rejected"
    return "order_expired" if entry.state == "expired" else "order_cancelled"
