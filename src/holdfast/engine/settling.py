"""What an operator's word makes of orders: settled, or those of another account; plain functions over rows, no I/O."""

from __future__ import annotations

from ..names import Context
from ..rows import Order
from .orders import Book, client_order_id, is_ended, replaced


def settled(book: Book, *, now_ms: int, by: str) -> list[Order]:
    """Return the rows by which nothing is under way or left to close any more, changed ones and new ones.

    What was not closed counts as gone from the venue. Nobody asks the venue about any of it again: a fill that is found
    later was closed by the hand that settled it.

    Args:
        book: Every order of the context.
        by: The operator.
    """
    rows: list[Order] = []
    for signal_id in book.unsettled():
        for order in book.of(signal_id):
            if not is_ended(order):
                rows.append(replaced(order, state="cancelled", adopted=True, note=f"settled by {by}"))
            elif not order.adopted:
                rows.append(replaced(order, adopted=True))
        left = book.position(signal_id)
        if left:
            rows.append(_gone(book, signal_id, left, now_ms, by))
    return rows


def _gone(book: Book, signal_id: str, left: float, now_ms: int, by: str) -> Order:
    entry = next(order for order in book.of(signal_id) if order.action == "open")
    n = max((order.n for order in book.of(signal_id) if order.action == "close"), default=0) + 1
    return Order(
        client_order_id=client_order_id(Context(*entry.context), signal_id, "close", n), context=entry.context,
        account=entry.account, signal_id=signal_id, action="close", n=n,
        side="sell" if entry.side == "buy" else "buy", quantity=left, reduce_only=True, state="cancelled",
        missing_quantity=left, adopted=True, epoch=0, intended_at_ms=now_ms, expires_at_ms=now_ms,
        note=f"settled by {by}",
    )  # fmt: skip


def moved(book: Book, account: str) -> list[Order]:
    """Return the rows by which all that is not settled belongs to ``account``."""
    return [
        replaced(order, account=account)
        for signal_id in book.unsettled() for order in book.of(signal_id) if order.account != account
    ]  # fmt: skip
