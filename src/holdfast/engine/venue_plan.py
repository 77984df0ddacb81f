"""What the venue says of a context's orders, beside what is stored: the other half of a recovery plan.

``judge`` is a plain function of rows and answers; what is done next about an order that the venue does not know, or
about all of them together, is what :mod:`holdfast.engine.orders` says: the executor asks the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import msgspec

from ..domains import context_key
from ..names import Context
from ..rows import Order
from ..store import Store
from .answers import answered
from .broker import Broker, OrderReport, VenuePosition
from .holdings import held, told
from .orders import DUST, Ask, Book, Cancel, Put, Send, Step, Terms, Wait, is_ended, next_step, unfound
from .venue import Venue

Word = Literal["as_stored", "moved_on", "unknown_at_venue", "foreign_at_venue", "twice_at_venue", "without_order"]
"""Of an order: as stored, changed meanwhile, not known there, there and in no row, there more than once. Of a position:
``unknown_at_venue`` where the venue holds less than the orders tell, ``foreign_at_venue`` where it holds more;
``without_order`` for a signal that is open and for which nobody ever sent an order."""


class VenueVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """One verdict from the venue."""

    word: Word
    what: Literal["order", "position"]
    client_order_id: str = ""
    signal_id: str = ""
    stored: str = ""
    """Its stored state; for a position what the orders tell, signed by side."""
    venue: str = ""
    """What the venue says."""
    then: str = ""
    """What recovery does about it first."""


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """What the venue said when it was asked."""

    reports: Mapping[str, tuple[OrderReport | None, int]]
    """For each order that was asked about: what is known of it, and how often it is there."""
    resting: Sequence[OrderReport]
    positions: Sequence[VenuePosition] | None
    """None where the broker cannot tell: then nothing is said of them."""


def judge(
    context: Context, orders: Sequence[Order], open_id: str | None, terms: Terms, said: Answers, *, now_ms: int
) -> tuple[VenueVerdict, ...]:
    """Return a verdict for each order of the context that is not settled, and for what no row tells of.

    Args:
        orders: Every order of the store: another context may trade the same symbol.
        open_id: The signal that is open.
    """
    own = tuple(context)
    book = Book(order for order in orders if order.context == own)
    verdicts = [_order(book, order, open_id, terms, said, now_ms) for order in asked_about(book, open_id)]
    known = {order.client_order_id for order in orders}
    verdicts += [
        VenueVerdict(
            word="foreign_at_venue", what="order", client_order_id=report.client_order_id,
            venue=f"{report.state}, {report.side or '?'} {report.quantity or 0:g}", then="left alone: it is in no row",
        )
        for report in said.resting
        if report.symbol == context.symbol and report.client_order_id not in known
    ]  # fmt: skip
    if open_id is not None and not book.of(open_id):
        then = "its exit is told, not sent: holdfast adopt --at-venue"
        verdicts.append(VenueVerdict(word="without_order", what="position", signal_id=open_id, then=then))
    return (*verdicts, *_positions(context, orders, terms, said))


def asked_about(book: Book, open_id: str | None) -> list[Order]:
    """Return the orders that the venue has to be asked about: under way, or of what is open or not wholly closed."""
    live = {open_id, *book.unsettled()}
    return [order for order in book.orders.values() if order.signal_id in live and not order.adopted]


def _order(
    book: Book, order: Order, open_id: str | None, terms: Terms, said: Answers, now_ms: int
) -> VenueVerdict:  # fmt: skip
    report, count = said.reports.get(order.client_order_id, (None, 0))
    word: Word
    if report is None:
        word, now = "unknown_at_venue", order
        is_open, left = order.signal_id == open_id, book.position(order.signal_id)
        step: Step = Wait(None)
        if not is_ended(order):
            step = unfound(order, terms, asked_ms=now_ms, now_ms=now_ms, is_open=is_open, left=left)
    else:
        now = answered(order, report)
        same = (now.state, now.filled_quantity) == (order.state, order.filled_quantity)
        word = "twice_at_venue" if count > 1 else "as_stored" if same else "moved_on"
        step = next_step(_with(book, now), open_id, terms, now_ms=now_ms, epoch=0)
    return VenueVerdict(
        word=word, what="order", client_order_id=order.client_order_id, signal_id=order.signal_id,
        stored=f"{order.action} {order.state}, {order.filled_quantity:g} of {order.quantity:g} filled",
        venue="" if report is None else f"{now.state}, {now.filled_quantity:g} filled", then=_words(step),
    )  # fmt: skip


def _with(book: Book, order: Order) -> Book:
    other = Book(book.orders.values())
    other.put(order)
    return other


def _positions(
    context: Context, orders: Sequence[Order], terms: Terms, said: Answers
) -> list[VenueVerdict]:  # fmt: skip
    """Compare what the account holds of the symbol with what the filled orders of all its contexts come to."""
    verdicts: list[VenueVerdict] = []
    reports = {name: report for name, (report, _) in said.reports.items() if report is not None}
    now = [answered(one, reports[one.client_order_id]) if one.client_order_id in reports else one for one in orders]
    if said.positions is None:
        return verdicts
    for side, ours in told(now, context.symbol, terms.account).items():
        shown = held(said.positions, context.symbol, side)
        if abs(shown - ours) > max(shown, ours) * DUST:
            verdicts.append(
                VenueVerdict(
                    word="foreign_at_venue" if shown > ours else "unknown_at_venue", what="position",
                    stored=f"{side} {ours:g}", venue=f"{side} {shown:g}",
                    then="left alone: adopt it, or close it at the venue" if shown > ours
                    else "its exit is refused there, and then counts as done: close it here if it is gone",
                )
            )  # fmt: skip
    return verdicts


def _words(step: Step) -> str:
    match step:
        case Send(order, again):
            return f"the {order.action} is sent{' again' if again else ''}"
        case Ask(order):
            return f"the {order.action} is asked about"
        case Cancel(order):
            return f"the {order.action} is cancelled"
        case Put(order):
            return f"the {order.action} becomes {order.state}"
        case Wait():
            return "nothing" if step.until_ms is None else "waited for"


async def ask_venue(
    store: Store, context: Context, broker: Broker, terms: Terms, open_id: str | None, *, now_ms: int
) -> tuple[VenueVerdict, ...]:
    """Ask the venue about a context's orders and judge; sends nothing and changes nothing.

    Raises:
        UnavailableError, UnknownOutcomeError: The venue cannot be asked now.
    """
    rows = {key: cast("Order", loaded.row) for key, loaded in (await store.scan("order")).items()}
    name = context_key("session", context).entity_name
    book = Book(order for key, order in rows.items() if key.entity_name == name)
    venue = Venue(broker, terms)
    reports = {order.client_order_id: await venue.known(order) for order in asked_about(book, open_id)}
    said = Answers(
        reports=reports, resting=await venue.resting(context.symbol), positions=await venue.held(context.symbol)
    )  # fmt: skip
    return judge(context, list(rows.values()), open_id, terms, said, now_ms=now_ms)
