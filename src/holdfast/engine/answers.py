"""What an answer of the venue makes of an order: plain functions, no I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import msgspec

from ..rows import Order, OrderState
from .broker import OrderReport, VenuePosition
from .orders import DUST, ENDS, EXITS, Book, is_ended, replaced

GONE_AFTER = 2
"""How many exits of a signal must be refused before the account's positions are believed to show nothing to close."""


def answered(order: Order, report: OrderReport, *, resent: bool = False, late: bool = False) -> Order:
    """Return what an order has become.

    Args:
        resent: The report answers a request that was not the order's first: a refusal says nothing of the first.
        late: Expiry and grace are over: nothing is to be hoped of the first any more.
    """
    refused = report.state in ("rejected", "expired")
    if refused and report.filled_quantity == 0 and resent and late and not report.repeated:
        return replaced(order, state="expired", note=f"unknown at the venue; sent again it was refused: {report.note}")
    if refused and report.filled_quantity == 0 and (report.repeated or resent):
        return replaced(order, state="unknown", note=report.note)
    filled = max(order.filled_quantity, report.filled_quantity)
    # What is left to close and cannot be traded is the venue's: more exits would be refused for ever.
    is_dust = report.too_small and refused and order.action in EXITS and filled == 0
    state: OrderState = report.state
    if state == "sent" and order.state in ("open", "partial"):
        state = order.state
    if state in ("sent", "open") and filled > 0:
        state = "partial"
    if state in ("open", "partial") and filled >= order.quantity * (1 - DUST):
        state = "filled"
    return replaced(
        order, state=state, filled_quantity=filled, venue_id=report.venue_id or order.venue_id,
        average_price=order.average_price if report.average_price is None else report.average_price,
        note=report.note, missing_quantity=order.quantity if is_dust else order.missing_quantity,
    )  # fmt: skip


def together(reports: Sequence[OrderReport]) -> tuple[OrderReport | None, int]:
    """Put what the venue says of one client order id into one report, and count the orders that it has under it.

    More than one is an order twice: the fills add up, so that an exit closes all of it.
    """
    newest: dict[str, OrderReport] = {}
    for report in reports:
        known = newest.get(report.venue_id)
        if known is None or (report.filled_quantity, report.state in ENDS) >= (
            known.filled_quantity,
            known.state in ENDS,
        ):
            newest[report.venue_id] = report
    if not newest:
        return None, 0
    orders = list(newest.values())
    # One that still rests decides what is to be done; then one that was filled tells more than a refusal.
    orders.sort(key=lambda one: (one.state in ENDS, one.filled_quantity == 0))
    filled = sum(one.filled_quantity for one in orders)
    return msgspec.structs.replace(orders[0], filled_quantity=filled), len(orders)


def refused_enough(order: Order, book: Book) -> bool:
    """Whether exits of a signal were refused often enough for the account's positions to be believed."""
    refusals = [one for one in book.of(order.signal_id) if one.action in EXITS and one.state == "rejected"]
    return order.state == "rejected" and len(refusals) >= GONE_AFTER


def missing(order: Order, book: Book, positions: Sequence[VenuePosition], elsewhere: float = 0.0) -> float:
    """Return how much of a refused exit the venue no longer has to close, by what the account holds.

    Args:
        elsewhere: What the open signals of other contexts hold of the symbol, below 0 short. An account has one
            position of a symbol, into which all of them are netted: theirs is taken off it.
    """
    if not refused_enough(order, book):
        return 0.0
    mine = [one for one in positions if one.symbol == order.context[1]]
    sign = 1 if order.side == "sell" else -1
    if elsewhere:
        net = sum(one.quantity if one.side == "long" else -one.quantity for one in mine)
        held = max(0.0, sign * (net - elsewhere))
    else:
        held = sum(one.quantity for one in mine if (one.side == "long") == (sign > 0))
    left = book.position(order.signal_id)
    return max(0.0, left - held) if left > held * (1 + DUST) else 0.0


def elsewhere(order: Order, orders: Iterable[Order], open_ids: Collection[str]) -> float | None:
    """Return what the open signals of other contexts hold of an order's account and symbol, below 0 short.

    Args:
        orders: Of all contexts.
        open_ids: Of the signals that are open; what others are closing is theirs no more.

    Returns:
        None while one of their orders is under way: what is whose cannot be told then.
    """
    exchange_name, symbol, _ = order.context
    others = [
        one
        for one in orders
        if one.context != order.context and (*one.context[:2], one.account) == (exchange_name, symbol, order.account)
    ]
    if not all(map(is_ended, others)):
        return None
    held = 0.0
    for book in (Book(one for one in others if one.context == context) for context in {one.context for one in others}):
        for signal_id in book.signal_ids():
            entry = book.entry(signal_id)
            if entry is not None and signal_id in open_ids:
                held += book.position(signal_id) * (1 if entry.side == "buy" else -1)
    return held
