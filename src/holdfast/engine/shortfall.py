"""Shortfall: what a refused exit was to close and the account no longer holds."""

from __future__ import annotations

from ..rows import Order, Signal
from ..store import Store
from .answers import elsewhere, missing, refused_enough
from .order_news import OrderNews
from .orders import EXITS, Book, replaced
from .venue import Venue


async def less_what_is_gone(order: Order, book: Book, *, store: Store, venue: Venue, news: OrderNews) -> Order:
    """Return an order just answered; a refused exit with what the account no longer has to close.

    Args:
        order: As the answer left it; not on record yet.
        book: The other orders of its context.

    Raises:
        HoldfastError: The store or the venue cannot tell now.
    """
    book = Book([*book.orders.values(), order])
    if order.action not in EXITS or not order.reduce_only or not refused_enough(order, book):
        return order
    before = await _elsewhere(order, store)
    positions = await venue.held(order.context[1])
    others = await _elsewhere(order, store)
    if positions is None:
        return replaced(order, note=f"{order.note}; the broker cannot tell what the account holds of it")
    if others is None or others != before:
        return order  # an order of another context is under way: the next refusal looks again
    gone = missing(order, book, positions, others)
    if gone:
        return replaced(order, missing_quantity=gone, note=f"{order.note}: the account holds no more of it")
    if others:
        news.netted(order, others)
    return order


async def _elsewhere(order: Order, store: Store) -> float | None:
    orders = (loaded.row for loaded in (await store.scan("order")).values())
    signals = (loaded.row for loaded in (await store.scan("signal")).values())
    open_ids = {signal.id for signal in signals if isinstance(signal, Signal)}
    return elsewhere(order, [one for one in orders if isinstance(one, Order)], open_ids)
