"""Rows: the typed records that are stored, one class each.

Field names on the medium are the documents' camelCase. Times are Unix epoch
milliseconds, durations minutes, percents percent units (0.1 is 0.1 %), prices
floats in quote currency.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from .names import Context

Position = Literal["long", "short"]


class Row(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """A typed record. ``extra`` keeps members that this version does not know."""

    extra: dict[str, Any] | UnsetType = UNSET


class Signal(Row, frozen=True, kw_only=True):
    """An open position ("pending signal"). Times are Unix epoch milliseconds, prices quote currency."""

    id: str
    position: Position
    note: str = ""
    price_open: float
    price_take_profit: float
    price_stop_loss: float
    minute_estimated_time: int
    """Longest holding time in minutes, counted from ``pending_at``."""
    symbol: str
    exchange_name: str
    strategy_name: str
    scheduled_at: int
    """When it was created; base of the activation timeout."""
    pending_at: int
    """When it was opened; equals ``scheduled_at`` until an activation."""
    is_scheduled: bool = msgspec.field(default=False, name="_isScheduled")

    @property
    def context(self) -> Context:
        """The context that the row says it belongs to."""
        return Context(self.exchange_name, self.symbol, self.strategy_name)


class ScheduledSignal(Signal, frozen=True, kw_only=True):
    """A signal that waits for its entry price; same shape as :class:`Signal`."""

    is_scheduled: bool = msgspec.field(default=True, name="_isScheduled")


class RiskPosition(Row, frozen=True, kw_only=True):
    """One slot of a risk profile, held by one open signal. One row per position."""

    strategy_name: str
    exchange_name: str
    symbol: str
    open_timestamp: int
    """When the position was opened, epoch milliseconds."""
    signal_id: str = ""
    position: Position | None = None
    rank: int = 0
    """Place in the documents' list, where the list was written through the adapter."""


class Levels(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Milestones reached by one signal, in the order reached; each from {10, 20, …, 100}."""

    profit_levels: tuple[int, ...] = ()
    loss_levels: tuple[int, ...] = ()


class PartialLevels(Row, frozen=True, kw_only=True):
    """The documents' map from signal id to its reached milestones."""

    levels: dict[str, Levels]


class Guard(Row, frozen=True, kw_only=True):
    """Rewritten whenever a slot of its risk profile changes, so that two checks conflict."""

    changes: int


class SessionRow(Row, frozen=True, kw_only=True):
    """Where one context stands: rewritten by each of its transitions."""

    context: tuple[str, str, str]
    """(exchange, symbol, strategy), unquoted."""
    last_candle_ms: int
    """Open time of the last candle whose decision is committed; 0: none yet."""
    last_event: int = 0
    """Number of the context's newest event."""
    closed_ids: tuple[str, ...] = ()
    """The most recent closed signal ids, newest last."""
    risk_names: tuple[str, ...] = ()
    """Risk profiles in which the open signal holds a slot; empty when none is open."""


class Owner(Row, frozen=True, kw_only=True, omit_defaults=True):
    """Who may write a context: named in the ``expect`` of every commit of it."""

    holder: str
    """The worker (see :class:`Worker`) that owns it, or owned it last."""
    epoch: int
    """Raised each time it is taken over."""
    host: str
    pid: int
    since_ms: int
    released: bool = False
    """Its owner has let go of it: whoever comes may have it at once."""


class Worker(Row, frozen=True, kw_only=True):
    """A process that owns contexts of a shared store: rewritten again and again, which is its sign of life.

    Nobody compares clocks: whoever wants to know whether it lives watches whether the row changes, for as long as the
    lease that it names.
    """

    holder: str
    """A random text of the process."""
    beat: int
    """Counts how often it has looked who owns its contexts: it does so after each sign of life."""
    lease_seconds: float
    host: str
    pid: int
    machine: str = ""
    """Which running kernel, and which table of its processes: where it is one's own, the pid can be looked up."""
    started: int = 0
    """When the process started, in the kernel's ticks: the pid alone may be another's by now."""
    contexts: int = 0
    """How many it owns."""
    fleet: str = ""
    """Which contexts it offers to run, as a fingerprint; empty for a process that belongs to no fleet."""
    leaving: bool = False
    """It is handing its contexts over and takes no more."""
    at_ms: int
    """By its own wall clock; for people."""


class Outage(Row, frozen=True, kw_only=True):
    """A gap that recovery stepped over: no entry was allowed on candles that open from..to, both included."""

    from_ms: int
    to_ms: int


EventKind = Literal[
    "scheduled", "opened", "partial_profit", "partial_loss", "closed", "cancelled", "rejected"
]  # fmt: skip
CloseReason = Literal["take_profit", "stop_loss", "time_expired", "operator", "policy"]
CancelReason = Literal[
    "timeout", "stop_loss", "stopped", "risk", "order_rejected", "order_expired", "order_cancelled"
]  # fmt: skip


class Event(Row, frozen=True, kw_only=True, omit_defaults=True):
    """Something that was decided, committed together with the state it tells of.

    The same event always has the same ``id``, so a consumer can drop repeats.
    """

    id: str
    """``exchange/symbol/strategy#number``."""
    number: int
    """Counts the events of a context: 1, 2, 3, … without holes."""
    kind: EventKind
    at_ms: int
    """Close time of the candle that decided it."""
    candle_ms: int
    """Open time of the candle that decided it."""
    signal: Signal
    price: float
    """The price at that candle (VWAP)."""
    activated: bool = False
    """``opened`` came from a scheduled signal."""
    level: int | None = None
    """Milestone of ``partial_profit`` / ``partial_loss``."""
    reason: str | None = None
    """Why it closed, was cancelled or was rejected."""
    price_close: float | None = None
    pnl_percent: float | None = None
    both_hit: bool = False
    """The candle held both stop and target; the ``both_hit`` parameter decided."""


class Trade(Row, frozen=True, kw_only=True):
    """One closed trade of the ledger."""

    id: str
    event_id: str
    symbol: str
    exchange_name: str
    strategy_name: str
    position: Position
    note: str = ""
    price_open: float
    price_close: float
    price_take_profit: float
    price_stop_loss: float
    scheduled_at: int
    pending_at: int
    closed_at: int
    reason: str
    pnl_percent: float
    both_hit: bool = False


class Foreseen(Row, frozen=True, kw_only=True, omit_defaults=True):
    """One event that a recovery plan said would come of the missed candles."""

    number: int
    kind: EventKind
    at_ms: int
    """Close time of the candle that decides it."""
    price: float
    """At which it closes or opens; else the price at that candle."""
    reason: str | None = None
    level: int | None = None
    both_hit: bool = False


class GapPlan(Row, frozen=True, kw_only=True, omit_defaults=True):
    """What the missed candles do to one restored signal: recorded before any of it is done."""

    context: tuple[str, str, str]
    """(exchange, symbol, strategy), unquoted."""
    signal_id: str
    verdict: str
    """Short and fixed, such as ``hit_stop``; see :data:`holdfast.engine.plan.Verdict`."""
    from_ms: int
    """Open time of the first missed minute."""
    until_ms: int
    """Open time of the last candle that was looked at."""
    candles: int
    missing_minutes: int = 0
    """Minutes in between that have no candle."""
    events: tuple[Foreseen, ...] = ()
    made_by: str
    made_at_ms: int


class Decision(Row, frozen=True, kw_only=True):
    """What was decided about a plan, by whom; it lies under the plan's id."""

    signal_id: str
    what: Literal["step", "close"]
    """``step``: what the rules say. ``close``: that, and what is still open is closed at the newest price."""
    by: str
    """``policy``, or the operator as user@host."""
    until_ms: int
    """Open time of the newest candle that the plan had seen."""
    at_ms: int


class Audit(Row, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that an operator did by hand, committed together with what it did."""

    action: Literal["adopt", "close", "clear"]
    target: str
    """The context or the key that was named."""
    by: str
    """user@host."""
    at_ms: int
    why: str = ""
    before: dict[str, Any] = {}
    """``domain/entity/id`` → the row's JSON as it was; None where there was none."""
    after: dict[str, Any] = {}
    """The same keys, as they are now."""


class Entity(Row, frozen=True, kw_only=True):
    """A value of the documents' ``PersistBase``: any plain JSON value under the caller's own id."""

    id: str | int
    value: Any


class Intent(Row, frozen=True, kw_only=True, omit_defaults=True):
    """What a commit that spans backends is about to write elsewhere; redone at recovery."""

    writes: dict[str, Any]
    """``domain/entity/id`` → the row's JSON, or None to clear it."""
    guards: dict[str, int] = {}
    """For each domain that lies elsewhere, the version of the lane's :class:`Span` row there before this commit."""
    lane: str = ""
    """Whose commit it is; a context's lane is named after the context, and only its owner goes on with it."""


class Span(Row, frozen=True, kw_only=True):
    """The newest commit of a lane that spans backends, beside what it wrote elsewhere; rewritten, never deleted.

    What a commit writes elsewhere expects the one before: rows come and go there, and absence alone would not tell
    a late request from one in time.
    """

    lane: str
    op: str
    """The op of the commit, ``writer#n``."""


OrderAction = Literal["open", "close", "reduce"]
OrderState = Literal[
    "intended", "sent", "open", "partial", "filled", "rejected", "cancelled", "expired", "unknown"
]  # fmt: skip
Side = Literal["buy", "sell"]


class Order(Row, frozen=True, kw_only=True, omit_defaults=True):
    """One order of a context: committed before it is sent, rewritten with each answer of the venue."""

    client_order_id: str
    """Derived from context, signal, action and ``n``, so that whoever comes later asks for the same one."""
    context: tuple[str, str, str]
    """(exchange, symbol, strategy), unquoted."""
    account: str = ""
    """Fingerprint of the venue account that it was meant for."""
    signal_id: str
    action: OrderAction
    n: int = 1
    """Counts the orders of one action of one signal: a close that ended unfilled is followed by the next."""
    side: Side
    quantity: float
    """In units of the base currency."""
    price: float | None = None
    """Limit; None takes the market's."""
    reference_price: float | None = None
    """The price at which it was decided."""
    reduce_only: bool = False
    state: OrderState
    """``intended``: committed, and perhaps sent. ``sent``: the venue took it and said no more. ``open``, ``partial``:
    it rests there. ``unknown``: sent, and no answer came. The others are ends; ``expired``: it never came to be."""
    filled_quantity: float = 0.0
    average_price: float | None = None
    missing_quantity: float = 0.0
    """What it was to close and the venue no longer had: a stop there, a liquidation or another hand was first."""
    venue_id: str = ""
    epoch: int
    """Of the owner that committed it first; 0 for one that an operator adopted."""
    intended_at_ms: int
    expires_at_ms: int
    """From then on the venue is asked to refuse it."""
    adopted: bool = False
    """By an operator's word: it stands for a position that was put under watch, or was settled by hand; nobody asks."""
    note: str = ""


class Account(Row, frozen=True, kw_only=True, omit_defaults=True):
    """One venue account: which scope trades it, and who may act on the whole of it."""

    fingerprint: str
    """Of the API key; the key itself is stored nowhere."""
    exchange_name: str
    scope: str
    """The scope whose contexts trade it."""
    epoch: int
    """Raised each time somebody begins to act on the whole account."""
    holder: str
    """The worker that did so last, or that came first."""
    host: str
    pid: int
    since_ms: int


class Quarantined(Row, frozen=True, kw_only=True):
    """Bytes that could not be trusted, kept whole."""

    reason: str
    text: str = ""
    """The payload, where it is UTF-8."""
    base64: str = ""
    """The payload, where it is not."""
    version: int
    at_ms: int
