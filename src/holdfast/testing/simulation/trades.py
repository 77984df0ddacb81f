"""What must be true of orders, judged at each commit, at each request that leaves a process, and at the end.

Like the rest of the oracle it sits at the storage and at the venue, and believes nothing that a session says of itself.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, cast

from ...contract import Key, Op
from ...domains import context_key, order_key
from ...engine.broker import OrderRequest
from ...engine.orders import ENDS, EXITS, client_order_id, request_of
from ...engine.worker import MARGIN
from ...names import Context
from ...rows import Event, Order, Row, Signal
from .market import PARAMS, context_of
from .plan import VENUE, Plan
from .venue import SharedVenue

_ROUNDING = 1e-9
_CANCELLED_SECONDS = 30.0
"""How long after its expiry an order rests at the most, where nothing but the venue is in trouble."""
_TRUSTED_STEP_SECONDS = PARAMS.order_grace_seconds
"""A wall clock that is off by less is what the grace is for."""


class Sender(Protocol):
    """One life of a process, as the oracle knows it."""

    name: str

    def clock_ms(self) -> int:
        """Its wall clock."""
        ...


class Books(Protocol):
    """What the oracle of the storage knows."""

    rows: dict[Key, Row]

    def beat_seconds(self, holder: str) -> float | None:
        """When the storage took a process's last sign of life."""
        ...


class TradeOracle:
    """Judges the orders of one history.

    Args:
        plan: What is played.
        venue: Where the orders go.
        books: What is stored.
        violate: Told what must not be.
    """

    def __init__(
        self, plan: Plan, venue: SharedVenue, books: Books, now: Callable[[], float], violate: Callable[[str], None]
    ) -> None:
        self._plan, self._venue, self._books, self._now, self._violate = plan, venue, books, now, violate
        self._contexts = {context_of(one.number).symbol: context_of(one.number) for one in plan.contexts}
        self.orders: dict[str, Order] = {}
        """Every order that ever had a row, as it was stored last."""
        self._gone: set[str] = set()
        """Those whose rows were deleted since."""
        self._kept: dict[str, Order] = {}
        """Orders as an emergency journal has, or had, them."""
        self._unfilled: set[str] = set()
        """Those that an emergency journal had as ended with nothing filled, whatever came of them since."""
        self._sent_seconds: dict[str, float] = {}
        """When it was sent last."""
        self._requests: dict[str, OrderRequest] = {}
        """As it was sent last."""
        self._sent: Counter[str] = Counter()
        """How often an order may have reached the venue: it left a process, which was not told that it did not."""
        self._lanes: dict[tuple[Sender, str], str] = {}
        """For each life and context: the lane that wrote its newest owner row."""
        self._fenced: dict[tuple[Sender, str], str] = {}
        """For each life and context: the lane of the commit that was refused, and answered."""
        self._clocks_stand = all(fault.kind != "clock" for fault in plan.faults)

        kinds = {fault.kind for fault in plan.faults}
        self._may_cross = not venue.features.refuses_expired or bool(kinds & {"twice", "fill_after"})
        """The venue may do more than it says, so that an exit is there twice, or is netted with another's order."""

    # ------------------------------------------------------------------ commits

    def owned(self, name: str, op: Op, sender: Sender) -> None:
        """Take note of who wrote an owner row."""
        self._lanes[sender, name] = op.writer
        self._fenced.pop((sender, name), None)

    def refused(self, sender: Sender, told: str, writers: Mapping[str, str]) -> None:
        """Take note that a life was told that its commit is refused: a lane that owned no longer does."""
        lane = told.rpartition(" ")[2].partition("#")[0]
        for (life, name), newest in self._lanes.items():
            if life is sender and newest == lane != writers.get(name):  # that of an older session is nobody's any more
                self._fenced[sender, name] = lane

    def accepted(self, op: Op, decoded: Mapping[Key, Row | None], sender: Sender) -> None:
        """Judge a commit of the main scope, before the rows of the storage follow."""
        orders = {key: row for key, row in decoded.items() if key.domain == "order"}
        events = [row for row in decoded.values() if isinstance(row, Event)]
        for key, row in orders.items():
            if row is None:
                self._deleted(key, op)
            else:
                self._written(key, cast("Order", row), events, op, sender)
        for event in events:
            self._event(event, op)

    def _deleted(self, key: Key, op: Op) -> None:
        old, kept = cast("Order | None", self._books.rows.get(key)), self._kept.get(key.entity_id)
        if kept is not None and kept.state in ENDS and (old is None or old.epoch <= kept.epoch):
            old = self.orders[key.entity_id] = kept  # what became of it and its deletion are merged as one commit
        if old is not None and (old.state not in ENDS or (self._position(old.signal_id) and not _came_to_nothing(old))):
            self._violate(f"{key}: {op.writer} deleted an order that is {old.state}, or whose signal is not closed")
        self._gone.add(key.entity_id)

    def _written(self, key: Key, order: Order, events: Iterable[Event], op: Op, sender: Sender) -> None:
        name, old = order.client_order_id, self.orders.get(order.client_order_id)
        if key != order_key(Context(*order.context), name):
            self._violate(f"{key}: it is the order {name} of {order.context}")
        if name != client_order_id(Context(*order.context), order.signal_id, order.action, order.n):
            self._violate(f"{key}: {name} is not the id that follows from signal, action and number")
        if old is None or name in self._gone:
            if name in self._gone:
                self._violate(f"{key}: the number of an order that was deleted is used again")
            self._intended(key, order, events, op)
        else:
            if order.filled_quantity < old.filled_quantity - _ROUNDING:
                self._violate(f"{key}: {old.filled_quantity:g} was filled, and now {order.filled_quantity:g}")
            if order.state == "expired" != old.state:
                self._given_up(key, order, sender)
            # A journal that is merged may know better how it was sent than a successor who found it at the venue.
            if old.state != "intended" and request_of(order) not in (request_of(old), self._requests.get(name)):
                self._violate(f"{key}: it was sent, and is another order now")
        self.orders[name] = order

    def _given_up(self, key: Key, order: Order, sender: Sender) -> None:
        """An order that may have been sent counts as never having come only when it can come no more."""
        over_ms = order.expires_at_ms + round(1000 * (PARAMS.order_grace_seconds + self._plan.lease_seconds))
        answered = order.client_order_id in self._venue.came_too_late
        if (
            self._may_be_there(order.client_order_id)
            and not answered
            and self._clocks_stand
            and sender.clock_ms() < over_ms
        ):
            self._violate(f"{key}: {sender.name} gave it up {over_ms - sender.clock_ms()} ms too early")

    def _intended(self, key: Key, order: Order, events: Iterable[Event], op: Op) -> None:
        if order.state != "intended" and order.client_order_id not in self._kept:
            self._violate(f"{key}: {op.writer} wrote it as {order.state}, though no intent was on record")
        if order.reduce_only != (order.action in EXITS and self._venue.features.reduce_only):
            self._violate(f"{key}: {order.action}, reduce only: {order.reduce_only}")
        others = [one for one in self.orders.values() if one.signal_id == order.signal_id]
        if order.action == "open":
            if not any(event.kind == "opened" and event.signal.id == order.signal_id for event in events):
                self._violate(f"{key}: an entry was intended without its signal")
            open_else = {one.signal_id for one in self.orders.values() if one.context == order.context}
            left = [signal_id for signal_id in open_else if self._position(signal_id)]
            if left or any(one.state not in ENDS for one in self.orders.values() if one.context == order.context):
                self._violate(f"{key}: an entry was intended before {left or 'an earlier order'} was settled")
            if others:
                self._violate(f"{key}: {order.signal_id} has an entry already")
        elif order.client_order_id not in self._kept or all(one.epoch <= order.epoch for one in others):
            # Else another owner has gone on, and what is merged may have been sent before that.
            if any(one.state not in ENDS for one in others):
                self._violate(f"{key}: an exit was intended before what became of the others was on record")
            if not math.isclose(order.quantity, self._position(order.signal_id), rel_tol=_ROUNDING):
                left_over = self._position(order.signal_id)
                self._violate(f"{key}: an exit of {order.quantity:g} was intended, and {left_over:g} is left")

    def _event(self, event: Event, op: Op) -> None:
        signal_id = event.signal.id
        entry = next((o for o in self.orders.values() if o.signal_id == signal_id and o.action == "open"), None)
        if event.kind == "opened" and entry is None:
            self._violate(f"{event.id}: {op.writer} opened a signal without an order")
        elif event.kind in ("closed", "partial_profit", "partial_loss"):
            if entry is None or not entry.filled_quantity:
                self._violate(f"{event.id}: {event.kind}, before it was on record that its entry came to be")
        elif (
            event.kind == "cancelled" and str(event.reason).startswith("order_")
            and (entry is None or entry.state not in ENDS or entry.filled_quantity)
            and not (entry is not None and self._was_unfilled(entry))
        ):  # fmt: skip
            self._violate(f"{event.id}: {event.reason}, and its entry is {entry and entry.state}")

    def _was_unfilled(self, entry: Order) -> bool:
        """Whether it had ended with nothing filled before what is merged now filled it after all."""
        before = self._stored(entry.context[1], entry.client_order_id)
        ended = before is not None and before.state in ENDS and not before.filled_quantity
        return ended or entry.client_order_id in self._unfilled

    def _position(self, signal_id: str) -> float:
        """Return what of a signal is filled and not closed, by the rows."""
        entered = closed = 0.0
        for order in self.orders.values():
            if order.signal_id == signal_id and order.action in EXITS:
                closed += order.filled_quantity + order.missing_quantity
            elif order.signal_id == signal_id:
                entered += order.filled_quantity
        return entered - closed if entered - closed > entered * _ROUNDING else 0.0

    def kept(self, rows: Mapping[Key, Row | None]) -> None:
        """Take note of what was written to an emergency journal."""
        for row in rows.values():
            if isinstance(row, Order):
                self._kept[row.client_order_id] = row
                if row.state in ENDS and not row.filled_quantity:
                    self._unfilled.add(row.client_order_id)

    # ------------------------------------------------------------------ requests

    def submitting(self, sender: Sender, request: OrderRequest) -> None:
        """Judge an order that a life is about to send."""
        name = request.client_order_id
        self._may_act(sender, request.symbol, f"sent {name}")
        stored, kept = self._stored(request.symbol, name), self._kept.get(name)
        row = stored if kept is None or (stored is not None and request == request_of(stored)) else kept
        if row is None:
            self._violate(f"{sender.name} sent {name}, whose intent is not on record")
            return
        if request != request_of(row):
            self._violate(f"{sender.name} sent {name} otherwise than it is on record")
        if row.state in ENDS:
            self._violate(f"{sender.name} sent {name}, which is {row.state} already")
        if row.action == "open" and sender.clock_ms() >= row.expires_at_ms:
            self._violate(f"{sender.name} sent the entry {name}, whose validity is over")
        if self._clocks_stand and row.expires_at_ms - sender.clock_ms() > 1000 * 600:
            self._violate(f"{sender.name} sent {name}, which is valid for too long")
        # What was sent by another before, and is not shown now, is over by its expiry and the clocks' difference.
        over_seconds = (
            self._sent_seconds.get(name, -math.inf) + PARAMS.exit_validity_seconds + PARAMS.order_grace_seconds
        )
        if (
            self._may_be_there(name)
            and self._now() < over_seconds
            and self._venue.features.refuses_repeated_ids != "always"
        ):
            self._violate(f"{sender.name} sent {name} again, where an id may repeat")
        self._sent[name] += 1
        self._sent_seconds[name] = self._now()
        self._requests[name] = request

    def _may_be_there(self, name: str) -> bool:
        """Whether the venue may have taken an order, or yet take it: a refusal settles that."""
        return self._sent[name] > self._venue.refused[name]

    def unsent(self, request: OrderRequest) -> None:
        """Take note that an order certainly did not leave, this time."""
        self._sent[request.client_order_id] -= 1

    def cancelling(self, sender: Sender, symbol: str, client_order_id: str) -> None:
        """Judge a cancellation that a life is about to send."""
        self._may_act(sender, symbol, f"cancelled {client_order_id}")

    def _stored(self, symbol: str, name: str) -> Order | None:
        return cast("Order | None", self._books.rows.get(order_key(self._contexts[symbol], name)))

    def _may_act(self, sender: Sender, symbol: str, what: str) -> None:
        context = self._contexts[symbol]
        entity_name = context_key("owner", context).entity_name
        if (sender, entity_name) in self._fenced:
            self._violate(f"{sender.name} {what} after its commit was refused: it is fenced")
        beat_seconds = self._books.beat_seconds(sender.name)
        held_seconds = self._plan.lease_seconds * (1 - MARGIN)
        if beat_seconds is None or self._now() - beat_seconds >= held_seconds:
            self._violate(f"{sender.name} {what} without a lease")

    # ------------------------------------------------------------------ the end

    def judge_end(self) -> None:
        """Compare what the venue holds with the rows, when everything has come to its end."""
        taken = defaultdict(list)
        for order in self._venue.book.orders:
            taken[order.request.client_order_id].append(order)
        features = self._venue.features
        excused: set[str] = set()
        """Symbols of which the rows say that the venue may hold what they do not know."""
        for name, those in taken.items():
            row, filled = self.orders.get(name), sum(one.filled for one in those)
            if row is None:
                self._violate(f"forgotten: the venue took {name}, which has no row")
                continue
            if len(those) > 1 and features.refuses_repeated_ids == "always":
                self._violate(f"twice: the venue took {name} {len(those)} times")
            resting = [one for one in those if one.is_open]
            if resting and (features.refuses_expired or any(one.at_ms < self._over_ms(row) for one in resting)):
                self._violate(f"forgotten: {name} rests at the venue")
            if math.isclose(row.filled_quantity, filled, abs_tol=_ROUNDING):
                continue
            if not features.refuses_expired and all(one.at_ms >= self._over_ms(row) for one in those[-1:]):
                excused.add(row.context[1])  # it came when it could no longer be waited for, as the row says
                continue
            self._violate(f"forgotten: {name} is filled {filled:g}, and its row says {row.filled_quantity:g}")
        for name, row in self.orders.items():
            if row.state not in ENDS:
                self._violate(f"forgotten: {name} is {row.state}")
            if row.filled_quantity and name not in taken:
                self._violate(f"{name} is {row.state} with {row.filled_quantity:g}, and the venue never took it")
        rested = self._venue.rested_seconds
        if len(self._plan.processes) > 1:
            rested -= self._plan.lease_seconds  # the next owner waits for it
        if rested > _CANCELLED_SECONDS and all(fault.process == VENUE for fault in self._plan.faults):
            self._violate(f"an order rested {rested:.0f} s past its expiry, and nobody cancelled it")
        for symbol, context in self._contexts.items():
            if symbol not in excused:
                self._judge_position(symbol, context)

    def _is_surplus(self, orders: Iterable[Order]) -> bool:
        """Whether the venue took an exit among them twice, or when it could no longer be waited for, as it may."""
        exits = {one.client_order_id: one for one in orders if one.action in EXITS}
        taken = [one for one in self._venue.book.orders if one.request.client_order_id in exits]
        late = any(one.at_ms >= self._over_ms(exits[one.request.client_order_id]) for one in taken)
        return late or len({one.request.client_order_id for one in taken}) < len(taken)

    def _over_ms(self, row: Order) -> int:
        """Return from when on the venue is not asked about an order any more."""
        grace_ms = 1000 * (PARAMS.order_grace_seconds + self._plan.lease_seconds)
        return row.expires_at_ms + round(grace_ms - 1000 * _TRUSTED_STEP_SECONDS)

    def _judge_position(self, symbol: str, context: Context) -> None:
        signal = cast("Signal | None", self._books.rows.get(context_key("signal", context)))
        of_signal: dict[str, list[Order]] = defaultdict(list)
        for order in self.orders.values():
            if order.context[1] == symbol:
                of_signal[order.signal_id].append(order)
        expected = 0.0
        for signal_id, orders in of_signal.items():
            long = next((one.side == "buy" for one in orders if one.action == "open"), True)
            left = sum(one.filled_quantity * (-1 if one.action in EXITS else 1) for one in orders)
            expected += left if long else -left
            missing = sum(one.missing_quantity for one in orders)
            if signal is not None and signal_id == signal.id:
                continue
            if self._position(signal_id):
                self._violate(f"position: {self._position(signal_id):g} of {signal_id} is left, which is not open")
            if missing and not self._may_cross:
                self._violate(f"position: {missing:g} of {signal_id} is on record as missing, and nobody took it")
            # Reduce-only does not help where an exit is there twice and the next signal's position is open already.
            excused = self._may_cross and (not self._venue.features.reduce_only or self._is_surplus(orders))
            if left < -_ROUNDING and not excused:
                self._violate(f"twice: {-left:g} more of {signal_id} was closed than was open")
        held = self._venue.book.holdings.get(symbol, 0.0)
        if not math.isclose(held, expected, abs_tol=_ROUNDING):
            self._violate(f"position: {held:g} of {symbol} is held, and {expected:g} is what the rows explain")


def _came_to_nothing(order: Order) -> bool:
    """Whether an exit may be forgotten though its signal is not closed: nothing of it was ever filled."""
    return order.action in EXITS and not (order.filled_quantity or order.missing_quantity)
