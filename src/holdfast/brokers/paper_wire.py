"""What a paper venue and its clients say to each other: one JSON line each way, one connection for each request."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from ..engine.broker import Features, OrderReport, OrderRequest, VenuePosition
from ..errors import InvalidInputError

LONGEST_LINE_BYTES = 16 * 1024 * 1024

Op = Literal[
    "submit", "find", "cancel", "open_orders", "history", "positions", "price", "fill", "faults", "witness", "heard"
]  # fmt: skip
Fault = Literal[
    "",
    "lost_answer",
    "lost_request",
    "late",
    "slow",
    "twice",
    "reject",
    "partial",
    "part_only",
    "resting",
    "fill_first",
    "fill_after",
]
"""``lost_answer``: done, but not answered. ``lost_request``: neither. ``late``: not answered, and done after the delay.
``slow``: done and answered after the delay. ``twice``: the request arrives twice. ``reject``: refused. ``partial``: a
part fills, the rest rests. ``part_only``: a part fills, the rest is cancelled. ``resting``: nothing fills. Of a
cancellation: ``fill_first``: the order fills before it comes. ``fill_after``: cancelled, and filled all the same."""
ON_CANCEL: frozenset[str] = frozenset(("lost_answer", "lost_request", "late", "slow", "fill_first", "fill_after"))


class Faults(msgspec.Struct, kw_only=True):
    """Which faults a venue has: first those of ``next``, one for each request, then by chance."""

    next: list[Fault] = []
    """For the next submissions, in this order."""
    next_cancel: list[Fault] = []
    """For the next cancellations."""
    chances: dict[str, float] = {}
    """Of each fault, 0 to 1; together at most 1."""
    seed: int = 0
    delay_seconds: float = 0.05
    part: float = 0.4
    """How much fills of what fills in part."""
    down_seconds: float = 0.0
    """For so long from now on every connection is dropped."""


def check_faults(faults: Faults) -> None:
    """Refuse faults that no venue has.

    Raises:
        InvalidInputError: The message names the first of them.
    """
    known = get_args(Fault)
    for one in (*faults.next, *faults.next_cancel, *faults.chances):
        if one not in known:
            raise InvalidInputError(f"there is no fault {one!r:.40}: use one of {', '.join(filter(None, known))}")
    if not (all(chance >= 0 for chance in faults.chances.values()) and sum(faults.chances.values()) <= 1):
        raise InvalidInputError(f"the chances are {faults.chances}: use 0 or more, together at most 1")


class Ask(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A request."""

    op: Op
    account: str = ""
    sender: int = 0
    """The process that asks."""
    features: Features | None = None
    """What the client thinks that the venue promises."""
    symbol: str | None = None
    client_order_id: str = ""
    request: OrderRequest | None = None
    since_ms: int = 0
    price: float = 0.0
    quantity: float | None = None
    faults: Faults | None = None


class Books(msgspec.Struct, kw_only=True):
    """Everything that a venue knows of one account, for tests: the witness."""

    orders: list[OrderReport]
    """Every order that it took, oldest first."""
    positions: list[VenuePosition]
    refused: dict[str, int]
    """How many requests it refused, by reason."""
    lost: int = 0
    """How many requests were lost or late, or their answers."""


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """One submission, as it reached the venue: in its own words, whatever the sender thinks."""

    at_seconds: float
    """``CLOCK_MONOTONIC`` of the venue's machine."""
    at_ms: int
    """Its wall clock."""
    sender: int
    account: str
    request: OrderRequest
    report: OrderReport
    """What it made of it there and then."""


class Tell(msgspec.Struct, kw_only=True, omit_defaults=True):
    """An answer."""

    report: OrderReport | None = None
    reports: list[OrderReport] = []
    positions: list[VenuePosition] = []
    books: dict[str, Books] = {}
    heard: list[Heard] = []
    error: str = ""
