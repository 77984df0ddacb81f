"""The venue of a bot that is tortured: a process of its own that loses answers and requests, and is the witness.

The bot's file need not know of it: its market gets a broker, and what its strategies propose without a quantity gets
one. The venue refuses repeated ids and expired requests, so nothing may be there twice, forgotten or without a row.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import msgspec

from ..brokers.paper import PaperBroker
from ..brokers.paper_wire import Books, Faults
from ..engine.broker import OrderReport, OrderRequest
from ..engine.orders import Book, is_ended
from ..engine.registry import Registry
from ..rows import Order, Row, Signal
from . import watched

QUANTITY = 1.0
"""Of what a strategy proposes without one."""
_DUST = 1e-9


def faults(seed: int) -> Faults:
    """Return what goes wrong at the venue: a third of all requests, and none of them changes what is traded."""
    chances = {"lost_answer": 0.12, "lost_request": 0.08, "late": 0.05, "slow": 0.05, "twice": 0.05}
    return Faults(chances=chances, seed=seed, delay_seconds=0.03)


class WatchedBroker(PaperBroker):
    """A paper broker whose submissions are steps at which the process may be told to die."""

    async def submit(self, request: OrderRequest) -> OrderReport:
        """Send an order once, and die before it or after its answer if it is time."""
        watched.began("submitting")
        watched.step()
        try:
            return await super().submit(request)
        finally:
            watched.step()


def with_quantities(registry: Registry) -> None:
    """Give what the strategies propose without a quantity one."""
    for spec in registry.list_strategies():
        registry._strategies[spec.strategy_name] = msgspec.structs.replace(spec, get_signal=_sized(spec.get_signal))


def _sized(get_signal: Callable[[str, int], Any]) -> Callable[[str, int], Any]:
    def named(reply: Any) -> Any:
        return {"quantity": QUANTITY, **reply} if isinstance(reply, Mapping) else reply

    async def later(reply: Awaitable[Any]) -> Any:
        return named(await reply)

    def ask(symbol: str, when_ms: int) -> Any:
        reply = get_signal(symbol, when_ms)
        return later(reply) if inspect.isawaitable(reply) else named(reply)

    return ask


def compared(rows: Iterable[Row], books: Books) -> list[str]:
    """Compare what the venue holds at a market's end with the rows; return what is wrong.

    The orders of signals that ended long ago have no rows any more: together they must have left nothing.
    """
    by_context: dict[tuple[str, str, str], list[Order]] = defaultdict(list)
    open_ids: set[str] = set()
    for row in rows:
        if isinstance(row, Order):
            by_context[row.context].append(row)
        elif isinstance(row, Signal) and not row.is_scheduled:
            open_ids.add(row.id)
    orders = {one.client_order_id: one for those in by_context.values() for one in those}
    taken = Counter(report.client_order_id for report in books.orders)
    wrong = [f"twice: the venue took {name} {n} times" for name, n in taken.items() if n > 1]
    should: dict[str, float] = defaultdict(float)
    for context, those in by_context.items():
        book = Book(those)
        wrong += [f"forgotten: {one.client_order_id} is {one.state}" for one in those if not is_ended(one)]
        wrong += [f"position: {signal_id} leaves something to close" for signal_id in book.unsettled(but=None)
                  if signal_id not in open_ids]  # fmt: skip
        for signal_id in open_ids & set(book.signal_ids()):
            entry = book.entry(signal_id)
            assert entry is not None
            should[context[1]] += book.position(signal_id) * (1 if entry.side == "buy" else -1)
    for report in books.orders:
        order = orders.get(report.client_order_id)
        if order is not None and not math.isclose(order.filled_quantity, report.filled_quantity, abs_tol=_DUST):
            told = f"its row says {order.filled_quantity:g}"
            wrong.append(f"forgotten: {report.client_order_id} is filled {report.filled_quantity:g}, {told}")
    held = {one.symbol: one.quantity * (1 if one.side == "long" else -1) for one in books.positions}
    for symbol in {*held, *should}:
        if not math.isclose(held.get(symbol, 0.0), should.get(symbol, 0.0), abs_tol=_DUST):
            wrong.append(f"position: the venue holds {held.get(symbol, 0):g} {symbol}, the rows say {should[symbol]:g}")
    return wrong
