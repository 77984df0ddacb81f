"""Holdings: what a venue account holds of a symbol, and how much of it no order of the store tells of.

An operator who adopts a position gives it the order that it lacks: one that stands as filled, though nobody here sent
it. Everything that follows, the exits first of all, comes of it as of any other.

Invariants:

* Nothing is adopted twice: what the filled orders of all contexts come to is taken off what the venue shows, and only
  one at a time acts on an account (:class:`~holdfast.engine.account.AccountRecord`).
* The rows and the account are compared only while no order of the symbol is under way: a fill that is not on record
  yet would look like a position of somebody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import msgspec

from ..contract import Key
from ..errors import InvalidInputError, UnavailableError
from ..names import Context
from ..rows import Order, Position, Signal
from ..store import Loaded, Store
from .account import AccountRecord
from .answers import answered
from .broker import Broker, VenuePosition
from .lanes import Sleep
from .orders import DUST, Book, client_order_id, is_ended
from .venue import bounded, held_of

_FEES = 0.01
"""The part of what was bought that a spot venue may have kept as its fee."""


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """A position at a venue, or the part of it that no order tells of."""

    account: str
    side: Position
    quantity: float
    entry_price: float | None = None


def told(orders: Iterable[Order], symbol: str, account: str) -> dict[Position, float]:
    """Return what the filled orders of all contexts say that an account holds of a symbol, by side.

    Under whatever exchange name: it is the account that holds it.
    """
    by_context: dict[tuple[str, str, str], list[Order]] = {}
    for order in orders:
        if (order.context[1], order.account) == (symbol, account):
            by_context.setdefault(order.context, []).append(order)
    sums: dict[Position, float] = {"long": 0.0, "short": 0.0}
    for book in map(Book, by_context.values()):
        for signal_id in book.signal_ids():
            entry = book.entry(signal_id)
            if entry is not None:
                sums["long" if entry.side == "buy" else "short"] += book.position(signal_id)
    return sums


def held(positions: Iterable[VenuePosition], symbol: str, side: Position) -> float:
    """Return what the venue shows of one side."""
    return sum(one.quantity for one in positions if one.symbol == symbol and one.side == side)


def order_of(signal: Signal, holding: Holding, *, now_ms: int, by: str) -> Order:
    """Return the order that stands for a position which nobody here opened."""
    return Order(
        client_order_id=client_order_id(signal.context, signal.id, "open", 1),
        context=(signal.exchange_name, signal.symbol, signal.strategy_name),
        account=holding.account, signal_id=signal.id, action="open",
        side="buy" if holding.side == "long" else "sell", quantity=holding.quantity,
        reference_price=signal.price_open, state="filled", filled_quantity=holding.quantity,
        average_price=holding.entry_price, adopted=True, epoch=0, intended_at_ms=now_ms, expires_at_ms=now_ms,
        note=f"adopted by {by}",
    )  # fmt: skip


class Holdings:
    """What an operator may adopt from one account.

    Args:
        store: Open for writing.
        broker: Whose account it is.
        exchange_name: Under which it was added.
        format_quantity: The exchange's.
        operator: Who asks, as user@host.
        clock: Tells the time in epoch milliseconds.
        sleep: Takes seconds; a seam for tests.
    """

    def __init__(
        self,
        store: Store,
        broker: Broker,
        exchange_name: str,
        *,
        format_quantity: Callable[[str, float], str],
        operator: str,
        clock: Callable[[], int],
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._store, self._broker, self._format_quantity = store, broker, format_quantity
        self._record = AccountRecord(store, broker, exchange_name, holder=operator, now_ms=clock(), sleep=sleep)

    async def foreign(self, context: Context, side: Position, quantity: float | None = None) -> Holding:
        """Return what the account holds of one side that no order tells of; of it ``quantity``, where that is named.

        Raises:
            InvalidInputError: It holds none, or less; the message says what it holds.
            HeldError: Another scope of the store trades the account.
            FencedError: Somebody else has begun to act on the account: run it again.
            UnavailableError: Orders of the symbol are under way, or the venue or the store cannot be asked now.

        Crash: The account's record is there, or its epoch is raised; nothing was adopted.
        """
        await self._record.act()
        before = await self._orders()
        positions = await held_of(self._broker, context.symbol)
        if positions is None:
            raise InvalidInputError(f"{context}: the broker cannot tell what the account holds of {context.symbol}")
        after = await self._orders()
        orders = [loaded.row for loaded in after.values()]
        mine = (context.symbol, self._broker.account)
        moving = [order for order in orders if (order.context[1], order.account) == mine and not is_ended(order)]
        if moving or {k: one.version for k, one in before.items()} != {k: one.version for k, one in after.items()}:
            where = Context(*moving[0].context) if moving else context
            raise UnavailableError(
                f"{where}: an order of {context.symbol} is under way, so what of the position is whose cannot be "
                "told: let its bot run until it is settled, then adopt"
            )
        ours = told(orders, context.symbol, self._broker.account)[side]
        shown = held(positions, context.symbol, side)
        left = shown - ours
        if left <= max(shown, ours) * DUST:
            raise InvalidInputError(
                f"{context}: the venue holds no {side} {context.symbol} that no order tells of: it shows "
                f"{_listed(positions, context.symbol)}, and the orders come to {side} {ours:g}"
            )
        if quantity is not None:
            self._require(context, side, quantity, left)
            left = min(quantity, left)
        await self._record.still()
        entry = next((one.entry_price for one in positions if (one.symbol, one.side) == (context.symbol, side)), None)
        return Holding(account=self._broker.account, side=side, quantity=left, entry_price=entry)

    @property
    def account(self) -> str:
        """The account's fingerprint."""
        return self._broker.account

    async def require_held(self, context: Context, orders: Sequence[Order]) -> None:
        """Refuse to take orders over that the account does not hold.

        Args:
            orders: As they would be stored; those under way are asked about, so that a lost answer counts.

        Raises:
            InvalidInputError: It holds less than they come to; the message says what it holds.
            HeldError: Another scope of the store trades the account.
            FencedError: Somebody else has begun to act on the account: run it again.
            UnavailableError: The venue or the store cannot be asked now.

        Crash: The account's record is there, or its epoch is raised.
        """
        await self._record.act()
        named = {order.client_order_id: order for order in orders}
        for order in orders:
            if not is_ended(order):
                report = await bounded(self._broker.find(context.symbol, order.client_order_id))
                named[order.client_order_id] = order if report is None else answered(order, report)
        positions = await held_of(self._broker, context.symbol) or []
        stored = {loaded.row.client_order_id: loaded.row for loaded in (await self._orders()).values()}
        rows = (stored | named).values()
        accounts = {self.account, *(stored[name].account for name in named if name in stored)}
        both = [told(rows, context.symbol, account) for account in accounts]
        net = sum(sides["long"] - sides["short"] for sides in both)  # other contexts may net a part away
        shown_net = held(positions, context.symbol, "long") - held(positions, context.symbol, "short")
        for side, ours in told(rows, context.symbol, self.account).items():
            shown = held(positions, context.symbol, side)
            if shown < ours * (1 - _FEES) and abs(shown_net - net) > ours * _FEES:
                raise InvalidInputError(
                    f"{context}: the account {self.account!r} shows {_listed(positions, context.symbol)} of "
                    f"{context.symbol}, and the orders come to {side} {ours:g}: give the key of the account that holds "
                    f"it; or, where it was closed at the venue, `holdfast close {context} --settled`"
                )
        await self._record.still()

    def _require(self, context: Context, side: Position, quantity: float, left: float) -> None:
        if not 0 < quantity <= left * (1 + DUST):
            raise InvalidInputError(
                f"{context}: quantity is {quantity:g}, and the venue holds {side} {left:g} that no order tells of: "
                "name at most that, and above 0"
            )
        written = float(self._format_quantity(context.symbol, quantity))
        if abs(written - quantity) > quantity * DUST:
            raise InvalidInputError(
                f"{context}: the exchange writes the quantity {quantity:g} as {written:g}: name that"
            )

    async def _orders(self) -> Mapping[Key, Loaded[Order]]:
        return cast("Mapping[Key, Loaded[Order]]", await self._store.scan("order"))


def _listed(positions: Iterable[VenuePosition], symbol: str) -> str:
    return " and ".join(f"{one.side} {one.quantity:g}" for one in positions if one.symbol == symbol) or "nothing"
