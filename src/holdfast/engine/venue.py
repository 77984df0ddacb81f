"""Asking a venue: the broker's calls, bounded in time and with their outcome named, and what is traded there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TypeVar

from ..errors import HoldfastError, InvalidInputError, UnknownOutcomeError
from ..rows import Order, Signal
from .answers import together
from .broker import Broker, Holds, Numbered, OrderReport, VenuePosition
from .orders import DUST, Terms, request_of

T = TypeVar("T")

CALL_SECONDS = 15.0
"""After so long without an answer a call of the broker counts as lost."""
_STEPS_DOWN = 64
_HISTORY_MARGIN_MS = 60_000
"""How far the venue's clock may be behind when its history is asked for."""


def quantity_of(signal: Signal, format_quantity: Callable[[str, float], str]) -> float:
    """Return how much a signal trades, as the exchange writes quantities; never more than it names.

    Raises:
        InvalidInputError: The signal names no quantity, or none that can be traded; the message names the remedy.
    """
    extra = signal.extra if isinstance(signal.extra, dict) else {}
    named = extra.get("quantity")
    if isinstance(named, bool) or not isinstance(named, int | float) or not 0 < named < float("inf"):
        shown = "missing" if named is None else f"{named!r:.40}"
        raise InvalidInputError(
            f"signal {signal.id!r:.80}: quantity is {shown}: with a broker a strategy returns a quantity above 0 "
            "(get_position_size finds one)"
        )
    first = written = _written(signal.symbol, float(named), format_quantity)
    below = max(written - named, named * DUST)
    for _ in range(_STEPS_DOWN):
        if written <= named * (1 + DUST):
            break
        # It rounds up, to the nearest step or to the least quantity: ask for less, until what comes is no more.
        lower, below = named - below, 2 * below
        written = _written(signal.symbol, lower, format_quantity) if lower > 0 else 0.0
    if not 0 < written <= named * (1 + DUST):
        raise InvalidInputError(
            f"signal {signal.id!r:.80}: quantity {named} becomes {first:g} at the exchange: nothing can be traded"
        )
    return written


def _written(symbol: str, quantity: float, format_quantity: Callable[[str, float], str]) -> float:
    try:
        return float(format_quantity(symbol, quantity))
    except Exception as error:
        raise InvalidInputError(f"format_quantity({symbol!r:.40}, {quantity}) failed: {error!s:.80}") from error


class Venue:
    """One broker, as the executor sees it. What comes out of a call is an answer or a ``HoldfastError``.

    Args:
        broker: Where the calls go.
        terms: What the venue promises.
    """

    def __init__(self, broker: Broker, terms: Terms) -> None:
        self._broker, self._terms = broker, terms

    async def submit(self, order: Order) -> OrderReport:
        """Send an order once."""
        return _report("submit", await bounded(self._broker.submit(request_of(order))))

    async def cancel(self, order: Order) -> OrderReport | None:
        """Ask to cancel an order."""
        symbol, name, broker = order.context[1], order.client_order_id, self._broker
        if order.venue_id and isinstance(broker, Numbered):
            given = await bounded(broker.cancel_numbered(symbol, order.venue_id, name))
        else:
            given = await bounded(broker.cancel(symbol, name))
        return None if given is None else _report("cancel", given)

    async def resting(self, symbol: str) -> Sequence[OrderReport]:
        """Return the orders of a symbol that rest at the venue, also those of others."""
        return _each("open_orders", await bounded(self._broker.open_orders(symbol)), OrderReport)

    async def held(self, symbol: str) -> Sequence[VenuePosition] | None:
        """Return what the account holds of a symbol, and perhaps of others; None where that cannot be told."""
        return await held_of(self._broker, symbol)

    async def known(self, order: Order) -> tuple[OrderReport | None, int]:
        """Return what the venue knows of an order, by every way there is, and how many times it has it.

        It is known by our id, and by the number that the venue gave it: not every venue repeats the id.
        """
        symbol, name, number = order.context[1], order.client_order_id, order.venue_id
        found = None
        if number and isinstance(self._broker, Numbered):
            found = await bounded(self._broker.find_numbered(symbol, number, name))
        if found is None:
            found = await bounded(self._broker.find(symbol, name))
        reports = [] if found is None else [_report("find", found)]
        if found is None or self._terms.features.refuses_repeated_ids != "always":
            reports += await self._listed(symbol, order.intended_at_ms)
        return together([one for one in reports if one.client_order_id == name or (number and one.venue_id == number)])

    async def shown(self, symbol: str, since_ms: int, names: Collection[str]) -> list[OrderReport]:
        """Return what the venue shows under ids of which nobody here has a row, one report for each id.

        Args:
            since_ms: How far back to look.
            names: The ids.
        """
        reports = await self._listed(symbol, since_ms)
        found = (together([one for one in reports if one.client_order_id == name])[0] for name in names)
        return [one for one in found if one is not None]

    async def _listed(self, symbol: str, since_ms: int) -> list[OrderReport]:
        """Return what rests, and what the venue took or changed since then by a clock that may be behind."""
        resting = await self.resting(symbol)
        asked = self._broker.history(symbol, since_ms - _HISTORY_MARGIN_MS)
        return [*resting, *_each("history", await bounded(asked), OrderReport)]


async def held_of(broker: Broker, symbol: str) -> Sequence[VenuePosition] | None:
    """Return what an account holds of a symbol, and perhaps of others; None where the broker cannot tell."""
    if not isinstance(broker, Holds):
        return _each("positions", await bounded(broker.positions()), VenuePosition)
    given = await bounded(broker.holding(symbol))
    return None if given is None else _each("holding", given, VenuePosition)


def _report(call: str, given: object) -> OrderReport:
    """Return an answer of a user's broker if it is one; what else it is says nothing of what was done."""
    if isinstance(given, OrderReport):
        return given
    raise UnknownOutcomeError(f"the broker's {call} returned {given!r:.80}: it must return an OrderReport")


def _each(call: str, given: object, kind: type[T]) -> list[T]:
    if isinstance(given, Sequence) and all(isinstance(one, kind) for one in given):
        return list(given)
    raise UnknownOutcomeError(f"the broker's {call} returned {given!r:.80}: it must return a list of {kind.__name__}")


async def bounded(asked: Awaitable[T]) -> T:
    """Wait for a call of a broker, not for ever; whatever else comes out of it leaves the outcome unknown.

    Raises:
        UnknownOutcomeError: It gave no answer, or none that a broker gives.
    """
    try:
        async with asyncio.timeout(CALL_SECONDS):
            return await asked
    except HoldfastError:
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise UnknownOutcomeError("CancelledError came out of the broker") from error
    except Exception as error:
        raise UnknownOutcomeError(f"the broker gave no answer: {error!r:.120}") from error
