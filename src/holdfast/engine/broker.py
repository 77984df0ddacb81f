"""Brokers: what the engine asks of a venue, and the values that go to and fro.

A broker sends one request and tells what the venue answered. It decides nothing, repeats nothing and keeps nothing
that matters: client order ids, expiries and what to do about a lost answer are the engine's.

Errors answer the store's question, what may the caller do now:

* ``UnavailableError``: nothing reached the venue; try again.
* ``UnknownOutcomeError``: the request may have arrived, and may arrive yet; ask before anything else is done.
* ``InvalidInputError``, ``FailedError``: it can never work (a wrong key, an unknown symbol); tell somebody.

A venue that says no has answered: that is a report with ``rejected`` or ``expired``, not an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import msgspec

from ..errors import InvalidInputError
from ..rows import Position, Side

ReportState = Literal["sent", "open", "partial", "filled", "rejected", "cancelled", "expired"]
"""``sent``: taken, and nothing more is known. ``expired``: refused because it came too late; the others as in
:class:`~holdfast.rows.Order`."""
RepeatedIds = Literal["always", "while_open", "never"]


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """What the venue promises; the engine relies on nothing else."""

    refuses_repeated_ids: RepeatedIds
    """Whether a second order with a client order id is refused for good, only while the first one is open, or never."""
    refuses_expired: bool
    """Whether a request that comes after its expiry is refused."""
    reduce_only: bool
    """Whether an order can be held to closing what is open."""
    id_length: int = 32
    """How many characters of a client order id it takes, 16 to 32; 18 still are 85 bits."""

    def __post_init__(self) -> None:
        """Refuse a length with which two orders could have one id, or that is longer than there is."""
        if not 16 <= self.id_length <= 32:
            raise InvalidInputError(f"id_length is {self.id_length!r:.20}: use 16 to 32")


class OrderRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One order, as it is sent; the same order is always the same request."""

    symbol: str
    client_order_id: str
    """At most 32 characters of a-z and 0-9, the first a letter."""
    side: Side
    quantity: float
    """In units of the base currency."""
    price: float | None = None
    """Limit; None takes the market's."""
    reduce_only: bool = False
    closes: bool = False
    """It is an exit: it may only close what is open, however the venue is told so."""
    expires_at_ms: int
    """Epoch milliseconds from which the venue should refuse it, where it can; how long it rests is not meant."""
    reference_price: float | None = None
    """The price at which it was decided, for venues that want to know what a market order may cost."""


class OrderReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the venue says about one order."""

    client_order_id: str
    symbol: str
    state: ReportState
    filled_quantity: float = 0.0
    average_price: float | None = None
    venue_id: str = ""
    side: Side | None = None
    quantity: float | None = None
    reduce_only: bool = False
    at_ms: int = 0
    """When the venue took it or changed it last, by its own clock; 0: it did not say."""
    repeated: bool = False
    """``rejected``, because there is or was an order with this client order id: ``find`` tells what became of that."""
    too_small: bool = False
    """``rejected``, because the venue trades no such small quantity at all: what is left of an exit stays there."""
    note: str = ""
    """The venue's own words, such as why it rejected."""


class VenuePosition(msgspec.Struct, frozen=True, kw_only=True):
    """What the account holds of one symbol, whoever opened it."""

    symbol: str
    side: Position
    quantity: float
    """Above 0, in units of the base currency."""
    entry_price: float | None = None


@runtime_checkable
class Broker(Protocol):
    """One account at one venue. Each method raises as the module says."""

    @property
    def account(self) -> str:
        """A fingerprint of the API key, never the key; the same for the same account."""
        ...

    @property
    def features(self) -> Features:
        """What the venue promises."""
        ...

    async def submit(self, request: OrderRequest) -> OrderReport:
        """Send an order once.

        Returns:
            What the venue said; a refusal is a report too.
        """
        ...

    async def find(self, symbol: str, client_order_id: str) -> OrderReport | None:
        """Return what the venue knows of an order, open or ended; None where it knows none."""
        ...

    async def cancel(self, symbol: str, client_order_id: str) -> OrderReport | None:
        """Ask to cancel an order, and return what then is known of it; None where the venue knows none.

        An order that had ended before is reported as it ended: a cancellation that comes too late is no error.
        """
        ...

    async def open_orders(self, symbol: str | None = None) -> Sequence[OrderReport]:
        """Return the orders that rest at the venue, of one symbol or of all, also those of others."""
        ...

    async def history(self, symbol: str, since_ms: int) -> Sequence[OrderReport]:
        """Return the orders of a symbol that the venue took at ``since_ms`` or later, open and ended, oldest first."""
        ...

    async def positions(self) -> Sequence[VenuePosition]:
        """Return what the account holds; a symbol that is not in it counts as not held, unless it :class:`Holds`."""
        ...

    async def close(self) -> None:
        """Let go of connections. Repeatable; the broker may be used again."""
        ...


@runtime_checkable
class Numbered(Protocol):
    """A broker that can also be asked by the venue's number of an order; each method raises as the module says.

    Some venues repeat the client order id in their first answer only, or forget it: the number is what stays.
    """

    async def find_numbered(self, symbol: str, venue_id: str, client_order_id: str) -> OrderReport | None:
        """Return what the venue knows of an order; None where it knows none."""
        ...

    async def cancel_numbered(self, symbol: str, venue_id: str, client_order_id: str) -> OrderReport | None:
        """Ask to cancel an order, and return what then is known of it; None where the venue knows none."""
        ...


@runtime_checkable
class Holds(Protocol):
    """A broker that can be asked what is held of one symbol, where ``positions`` does not cover all that is traded."""

    async def holding(self, symbol: str) -> Sequence[VenuePosition] | None:
        """Return what the account holds of a symbol, named as it was asked for; None where that cannot be told."""
        ...
