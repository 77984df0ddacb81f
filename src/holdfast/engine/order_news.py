"""What is told of orders: to the error listeners, each thing once, and never awaited by whoever sends them.

A listener that hangs (a message to a chat, without a time limit) must not keep the next exit from being sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import HoldfastError, OrderError
from ..rows import Order
from .listeners import Failure, Listeners
from .orders import EXITS, Terms, may_turn_up

if TYPE_CHECKING:
    from .session import Session


class OrderNews:
    """Tells what happens to the orders of one session.

    Args:
        session: Whose; its health starts the telling, and waits for it at the end, not for ever.
        listeners: Who is told.
        clock: Tells the time in epoch milliseconds.
    """

    def __init__(self, session: Session, listeners: Listeners, clock: Callable[[], int]) -> None:
        self._session, self._listeners, self._clock = session, listeners, clock
        self._told: set[tuple[str, str]] = set()

    def failure(self, error: HoldfastError) -> None:
        """Something failed that somebody should hear of."""
        told = Failure(where="orders", error=error, context=self._session.context, at_ms=self._clock())
        self._session.health.report(self._listeners, told)

    def ended(self, order: Order, terms: Terms) -> None:
        """It was rejected, or has expired."""
        what = f"the {order.action} order {order.client_order_id} of signal {order.signal_id!r:.80}"
        told = f"{what} was {order.state}: {order.note or 'the venue gave no reason'}"
        if may_turn_up(order, terms):
            told += "; the venue refuses no late request, so it may still turn up, and an exit may be there twice"
        self._once("ended", order.client_order_id, told)

    def lacking(self, signal_id: str) -> None:
        """A signal is open, and has no order."""
        self._once(
            "lacking", signal_id,
            f"signal {signal_id!r:.80} is open and has no order (opened without a broker, or adopted without one), so "
            "its exit will be told and not sent: end this run and adopt what the venue holds of it, with "
            "`holdfast adopt CONTEXT --at-venue --bot BOT.py`",
        )  # fmt: skip

    def orderless(self, signal_id: str) -> None:
        """A signal was closed that had no order."""
        self._once(
            "orderless", signal_id,
            f"signal {signal_id!r:.80} was closed without an order: it has none (opened without a broker, or adopted); "
            "look at the venue, and close there what it holds",
        )  # fmt: skip

    def netted(self, order: Order, others: float) -> None:
        """An exit is refused because other contexts hold the reverse on the same account."""
        self._once(
            "netted", order.signal_id,
            f"the venue refuses to close signal {order.signal_id!r:.80}, and not because its position is gone: other "
            f"contexts hold {others:+g} of {order.context[1]} on its account, which nets it with theirs; it is tried "
            "again and again: close it by hand, and give strategies that may oppose each other accounts of their own",
        )  # fmt: skip

    def twice(self, order: Order, count: int) -> None:
        """The venue has it more than once."""
        then = "all of it will be closed" if order.action not in EXITS else "no more is sent for it"
        self._once(
            "twice", order.client_order_id, f"order {order.client_order_id} is at the venue {count} times: {then}"
        )  # fmt: skip

    def hidden(self, order: Order) -> None:
        """The venue took it, and shows nothing of it."""
        self._once(
            "hidden", order.client_order_id,
            f"order {order.client_order_id} was taken by the venue as {order.venue_id!r:.60}, which shows nothing of "
            "it now: it is asked about until it does, and nothing else is done for its signal; look there",
        )  # fmt: skip

    def excess(self, order: Order, quantity: float) -> None:
        """More was closed than was open; told each time that it grows."""
        self.failure(
            OrderError(
                f"{quantity:g} more was closed of signal {order.signal_id!r:.80} than was open: the account may hold "
                f"the reverse; look at {order.context[1]} there, and close that"
            )
        )

    def _once(self, what: str, name: str, told: str) -> None:
        if (what, name) not in self._told:
            self._told.add((what, name))
            self.failure(OrderError(told))
