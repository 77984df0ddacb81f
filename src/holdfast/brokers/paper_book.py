"""The books of a paper venue: accounts, orders, fills, positions; plain and in memory, no I/O and no clock of its own.

A market order fills at once, at the last price that was set or else at the price the request was decided at; a limit
order fills when the price that was set reaches it. Each account nets what it holds of a symbol into one position.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ..engine.broker import Features, OrderReport, OrderRequest, VenuePosition
from .paper_wire import Fault

_DUST = 1e-12


class PaperOrder(msgspec.Struct, kw_only=True):
    """One order that the venue took."""

    venue_id: str
    request: OrderRequest
    state: str
    filled: float = 0.0
    spent: float = 0.0
    """Quote currency of all its fills."""
    at_ms: int
    note: str = ""

    @property
    def is_open(self) -> bool:
        """Whether it rests."""
        return self.state in ("open", "partial")

    def report(self) -> OrderReport:
        """Return what the venue says of it."""
        request = self.request
        return OrderReport(
            client_order_id=request.client_order_id, symbol=request.symbol, state=self.state,  # type: ignore[arg-type]
            filled_quantity=self.filled, average_price=self.spent / self.filled if self.filled else None,
            venue_id=self.venue_id, side=request.side, quantity=request.quantity, reduce_only=request.reduce_only,
            at_ms=self.at_ms, note=self.note,
        )  # fmt: skip


class PaperBook:
    """One account.

    Args:
        features: What it refuses.
        clock: Tells the time in epoch milliseconds.
    """

    def __init__(self, features: Features, clock: Callable[[], int]) -> None:
        self.features, self._clock = features, clock
        self.orders: list[PaperOrder] = []
        self.holdings: dict[str, float] = {}
        """Of each symbol: above 0 long, below 0 short."""
        self.costs: dict[str, float] = {}
        """Of each symbol: the average price at which what is held was come by."""
        self.prices: dict[str, float] = {}
        self.refused = {"repeated": 0, "expired": 0, "reduce_only": 0, "told to": 0}

    def submit(self, request: OrderRequest, *, part: float = 1.0, rests: bool = True) -> OrderReport:
        """Take an order, or refuse it.

        Args:
            part: How much of it fills at once, 0 to 1; below 1 is a fault that was asked for.
            rests: Whether what does not fill stays; else it is cancelled.
        """
        same = [one for one in self.orders if one.request.client_order_id == request.client_order_id]
        mode = self.features.refuses_repeated_ids
        if (mode == "always" and same) or (mode == "while_open" and any(one.is_open for one in same)):
            self.refused["repeated"] += 1
            return self._refusal(request, "rejected", "there is an order with this client order id", repeated=True)
        if self.features.refuses_expired and self._clock() >= request.expires_at_ms:
            self.refused["expired"] += 1
            return self._refusal(request, "expired", "the request came after its expiry")
        if request.reduce_only and self.features.reduce_only and self._reducible(request) <= _DUST:
            self.refused["reduce_only"] += 1
            return self._refusal(request, "rejected", "reduce only: there is nothing to reduce")
        order = PaperOrder(
            venue_id=f"p{len(self.orders) + 1}", request=request, state="open", at_ms=self._clock()
        )  # fmt: skip
        self.orders.append(order)
        if request.price is None or self._reached(request):
            self._fill(order, part * request.quantity)
            if order.is_open and not rests:
                order.state = "cancelled"
        return order.report()

    def refuse(self, request: OrderRequest) -> OrderReport:
        """Refuse an order because somebody wants that."""
        self.refused["told to"] += 1
        return self._refusal(request, "rejected", "told to refuse it")

    def find(self, client_order_id: str) -> OrderReport | None:
        """Return the newest order with this id, one that rests before all others."""
        same = [one for one in self.orders if one.request.client_order_id == client_order_id]
        same.sort(key=lambda one: one.is_open)
        return same[-1].report() if same else None

    def cancel(self, client_order_id: str) -> OrderReport | None:
        """Cancel what rests under this id."""
        for order in self.orders:
            if order.request.client_order_id == client_order_id and order.is_open:
                order.state, order.at_ms = "cancelled", self._clock()
        return self.find(client_order_id)

    def fill(self, client_order_id: str, quantity: float | None = None) -> OrderReport | None:
        """Fill what rests under this id, or of it ``quantity``; a cancelled one too, as some venues do."""
        for order in self.orders:
            if order.request.client_order_id == client_order_id and order.state in ("open", "partial", "cancelled"):
                self._fill(order, order.request.quantity - order.filled if quantity is None else quantity)
        return self.find(client_order_id)

    def set_price(self, symbol: str, price: float) -> None:
        """Set the last price; limit orders that it reaches are filled."""
        self.prices[symbol] = price
        for order in self.orders:
            if order.is_open and order.request.symbol == symbol and self._reached(order.request):
                self._fill(order, order.request.quantity - order.filled)

    def open_orders(self, symbol: str | None) -> list[OrderReport]:
        """Return what rests."""
        return [one.report() for one in self.orders if one.is_open and symbol in (None, one.request.symbol)]

    def history(self, symbol: str, since_ms: int) -> list[OrderReport]:
        """Return what was taken or changed since then."""
        return [one.report() for one in self.orders if one.request.symbol == symbol and one.at_ms >= since_ms]

    def positions(self) -> list[VenuePosition]:
        """Return what the account holds."""
        return [
            VenuePosition(
                symbol=symbol, side="long" if held > 0 else "short", quantity=abs(held),
                entry_price=self.costs.get(symbol),
            )
            for symbol, held in self.holdings.items()
            if abs(held) > _DUST
        ]  # fmt: skip

    def _refusal(self, request: OrderRequest, state: str, note: str, *, repeated: bool = False) -> OrderReport:
        return OrderReport(
            client_order_id=request.client_order_id, symbol=request.symbol, state=state,  # type: ignore[arg-type]
            side=request.side, quantity=request.quantity, reduce_only=request.reduce_only, at_ms=self._clock(),
            repeated=repeated, note=note,
        )  # fmt: skip

    def _reducible(self, request: OrderRequest) -> float:
        held = self.holdings.get(request.symbol, 0.0)
        return max(0.0, held if request.side == "sell" else -held)

    def _reached(self, request: OrderRequest) -> bool:
        price = self.prices.get(request.symbol)
        if price is None or request.price is None:
            return False
        return price <= request.price if request.side == "buy" else price >= request.price

    def _fill(self, order: PaperOrder, quantity: float) -> None:
        request = order.request
        if request.reduce_only and self.features.reduce_only:
            quantity = min(quantity, self._reducible(request))
        if quantity > 0:
            price = request.price or self.prices.get(request.symbol) or request.reference_price or 1.0
            order.filled += quantity
            order.spent += quantity * price
            self._hold(request, quantity, price)
        order.at_ms = self._clock()
        if order.filled >= request.quantity - _DUST:
            order.state = "filled"
        elif request.reduce_only and self._reducible(request) <= _DUST:
            order.state, order.note = "cancelled", "reduce only: there was no more to reduce"
        elif order.filled and order.state == "open":
            order.state = "partial"

    def _hold(self, request: OrderRequest, quantity: float, price: float) -> None:
        symbol, signed = request.symbol, quantity if request.side == "buy" else -quantity
        held = self.holdings.get(symbol, 0.0)
        now = held + signed
        if held == 0 or held * signed > 0:
            self.costs[symbol] = (abs(held) * self.costs.get(symbol, 0.0) + quantity * price) / abs(now)
        elif held * now < 0:
            self.costs[symbol] = price
        self.holdings[symbol] = 0.0 if abs(now) <= _DUST else now


def submitted(book: PaperBook, request: OrderRequest, fault: Fault, part: float) -> OrderReport:
    """Submit an order to a book, as far as a fault of the venue lets it; see :data:`~.paper_wire.Fault`.

    Args:
        part: How much fills of what fills in part.
    """
    if fault == "reject":
        return book.refuse(request)
    filled = {"partial": part, "part_only": part, "resting": 0.0}.get(fault, 1.0)
    return book.submit(request, part=filled, rests=fault != "part_only")


def cancelled(book: PaperBook, client_order_id: str, fault: Fault) -> OrderReport | None:
    """Cancel an order in a book; with a fault of the venue it fills before that, or after."""
    if fault == "fill_first":
        book.fill(client_order_id)
    report = book.cancel(client_order_id)
    if fault == "fill_after":
        book.fill(client_order_id)
    return report
