"""Whether stored orders may be gone on with: by a broker of the account that they were meant for, and by nobody else.

Without it a position at the venue would be booked as closed, and stand there for ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from ..domains import context_key
from ..errors import InvalidInputError
from ..names import Context
from ..rows import Order, Row
from ..store import Store
from .orders import Book, is_ended


def refuse_foreign(context: Context, book: Book, account: str | None) -> None:
    """Refuse orders that are not settled and that nobody could go on with.

    Args:
        book: Every order of the context.
        account: Of the broker that there is; None: there is none.

    Raises:
        InvalidInputError: Names the orders, their account and the remedy.
    """
    left = [one for one in book.unsettled() if any(order.account != account for order in book.of(one))]
    orders = [order for signal_id in left for order in book.of(signal_id) if order.account != account]
    if not orders:
        return
    theirs = orders[0].account
    settle = f"once you have seen at the venue that nothing of it is left, `holdfast close {context} --settled`"
    what = "; ".join(_told(book, signal_id) for signal_id in left[:3])
    if account is None:
        raise InvalidInputError(
            f"{context}: its orders are not settled in the account {theirs!r} ({what}), and the exchange "
            f"{context.exchange_name!r} is here without a broker, so no exit could be sent: start with the broker of "
            f"that account; or, {settle}"
        )
    raise InvalidInputError(
        f"{context}: its orders are not settled in the account {theirs!r} ({what}), and this broker trades "
        f"{account!r}: start with the key of the first; or, with a new key of the same account, "
        f"`holdfast adopt {context} --account --bot BOT.py`; or, {settle}"
    )


async def require_account(store: Store, context: Context, account: str | None, kept: Iterable[Row] = ()) -> None:
    """Read the orders of a context, and refuse what :func:`refuse_foreign` does; one scan.

    Without a broker, one that cannot be read is refused too: what it holds cannot be told.

    Args:
        account: Of the broker that there is; None: there is none.
        kept: Orders that the store does not have yet.

    Raises:
        InvalidInputError: Names the orders, their account and the remedy.
        UnavailableError: The store cannot be read now.
    """
    book = await orders_of(store, context)
    for row in kept:
        book.put(cast("Order", row))
    refuse_foreign(context, book, account)
    name = context_key("order", context).entity_name
    for key in sorted(store.damaged) if account is None else ():
        if (key.domain, key.entity_name) == ("order", name):
            raise InvalidInputError(
                f"{context}: {key} is in quarantine, so what it holds at the venue cannot be told, and the exchange "
                f"{context.exchange_name!r} is here without a broker: start with its broker; or look at the venue, "
                f"then `holdfast clear {key}`"
            )


async def orders_of(store: Store, context: Context) -> Book:
    """Return the stored orders of a context.

    Raises:
        UnavailableError: The store cannot be read now.
    """
    rows = await store.scan("order", context_key("session", context).entity_name)
    return Book(cast("Order", loaded.row) for loaded in rows.values())


def _told(book: Book, signal_id: str) -> str:
    under_way = [f"{one.action} {one.client_order_id} {one.state}" for one in book.of(signal_id) if not is_ended(one)]
    left = book.position(signal_id)
    names = ", ".join(one.client_order_id for one in book.of(signal_id) if one.action == "open")
    held = [f"{left:g} of {book.of(signal_id)[0].context[1]} held by {names}"] if left else []
    return f"signal {signal_id!r:.80}: {', '.join(under_way + held)}"
