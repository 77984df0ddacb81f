"""What must be true of the stored rows at every moment: one list, used by recovery, ``holdfast check`` and every test.

* A row lies under the key that its own contents name.
* At most one open and one scheduled signal for each context; the open one is not marked scheduled.
* A risk slot exists exactly for each open signal that has a risk profile.
* Partial levels exist only for the open signal.
* A schedule and an open signal never have the same id.
* No closed id is open, waits, or is closed twice.
* No event number of a context is missing: those that wait are the newest, without holes.
* A signal has one entry order at most, and an order that closes only once it is no longer open; that one closes no
  more than was filled, on the other side, and no two of them are intended at once.
* An order that is not settled belongs to a signal that its context knows.
* A trade that a candle decided, and that had an entry order, was filled.

A context with something in quarantine is judged mildly: its slots and levels are kept until its
owner has decided about the quarantined bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .contract import Key
from .domains import context_key, event_key, guard_key, ledger_key, order_key, risk_key
from .names import Context, entity_name
from .quarantine import is_released, stopped_key
from .rows import Event, Order, Outage, PartialLevels, RiskPosition, Row, ScheduledSignal, SessionRow, Signal, Trade
from .store import Store

_CHUNK_KEYS = 500
_ENDED = ("filled", "rejected", "cancelled", "expired")
_BY_CANDLE = ("take_profit", "stop_loss", "time_expired")
_DUST = 1e-9
"""Part of a quantity that counts as rounding."""


class Violation(NamedTuple):
    """One broken rule."""

    rule: str
    """A short fixed name, such as ``slot-without-signal``."""
    key: Key
    message: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.key}: {self.message}"


class _Books:
    """The rows of one store, sorted by what they are and by whom they belong to."""

    def __init__(self, rows: Mapping[Key, Row]) -> None:
        self.rows = rows
        self.signals: dict[str, list[tuple[Key, Signal]]] = defaultdict(list)
        self.schedules: dict[str, list[tuple[Key, Signal]]] = defaultdict(list)
        self.sessions: dict[str, tuple[Key, SessionRow]] = {}
        self.events: dict[str, list[tuple[Key, Event]]] = defaultdict(list)
        self.trades: dict[str, list[tuple[Key, Trade]]] = defaultdict(list)
        self.slots: list[tuple[Key, RiskPosition]] = []
        self.levels: list[tuple[Key, PartialLevels]] = []
        self.orders: dict[str, dict[str, list[tuple[Key, Order]]]] = defaultdict(lambda: defaultdict(list))
        """Of each context, by signal."""
        self.held_back: set[str] = set()
        """Entity names with something in quarantine."""
        for key, row in rows.items():
            self._sort_in(key, row)

    def _sort_in(self, key: Key, row: Row) -> None:
        match row:
            case ScheduledSignal():
                self.schedules[key.entity_name].append((key, row))
            case Signal():
                self.signals[key.entity_name].append((key, row))
            case SessionRow():
                self.sessions[key.entity_name] = (key, row)
            case Event():
                self.events[key.entity_name].append((key, row))
            case Trade():
                self.trades[key.entity_name].append((key, row))
            case RiskPosition():
                self.slots.append((key, row))
            case PartialLevels():
                self.levels.append((key, row))
            case Order():
                self.orders[key.entity_name][row.signal_id].append((key, row))
            case _:
                if key.domain == "quarantine" and not is_released(key):
                    self.held_back.add(stopped_key(key).entity_name)


def check(rows: Mapping[Key, Row]) -> list[Violation]:
    """Judge the rows of one store, all domains together, and return what is wrong; an empty list is good.

    Args:
        rows: Every row, by its key; rows of domains that carry no rule may be left out.
    """
    books = _Books(rows)
    return [
        *_misplaced(books),
        *_signals(books),
        *_slots(books),
        *_partial(books),
        *_closed(books),
        *_numbers(books),
        *_orders(books),
    ]


async def check_store(store: Store) -> list[Violation]:
    """Read every row of an open store and judge it; works beside a running bot on a read-only store.

    A row that cannot be read is a violation of the rule ``unreadable``.
    """
    rows: dict[Key, Row] = {}
    found: list[Violation] = []
    keys = await store.keys()
    for at in range(0, len(keys), _CHUNK_KEYS):
        good, damaged = await store.salvage(*keys[at : at + _CHUNK_KEYS])
        rows.update({key: loaded.row for key, loaded in good.items()})
        found += [Violation("unreadable", key, reason) for key, reason in damaged.items()]
    rows.update(await _asked_for(store, rows))
    return found + check(rows)


async def _asked_for(store: Store, rows: Mapping[Key, Row]) -> dict[Key, Row]:
    """Return the rows of routed domains that belong to known contexts: a four-method class cannot list its own."""
    asked: dict[Key, Row] = {}
    if not store.routes:
        return asked
    for session in [row for row in rows.values() if isinstance(row, SessionRow)]:
        keys = [context_key(domain, Context(*session.context)) for domain in ("signal", "schedule", "partial")]
        good, _ = await store.salvage(*keys)
        for name in session.risk_names:
            good |= await store.scan("risk", guard_key(name).entity_name)
        asked.update({key: loaded.row for key, loaded in good.items()})
    return asked


def _owner_name(row: Signal | RiskPosition) -> str:
    return entity_name(row.symbol, row.strategy_name, row.exchange_name)


def _home_keys(domain: str, row: Signal) -> set[Key]:
    """Where such a row may lie: under its context's key, or under the documents' key without the exchange."""
    full = context_key(domain, row.context)
    return {full, full._replace(entity_name=entity_name(row.symbol, row.strategy_name))}


def _misplaced(books: _Books) -> Iterator[Violation]:
    for domain, group in (("signal", books.signals), ("schedule", books.schedules)):
        for pairs in group.values():
            for key, row in pairs:
                if key not in _home_keys(domain, row):
                    yield Violation("wrong-key", key, f"the row says that it belongs to {row.context}")
    for key, session in books.sessions.values():
        if context_key("session", Context(*session.context)) != key:
            yield Violation("wrong-key", key, f"the row says that it belongs to {session.context}")
    for key, other in books.rows.items():
        if isinstance(other, Outage) and other.from_ms > other.to_ms:
            yield Violation("outage-reversed", key, f"from {other.from_ms} to {other.to_ms}")


def _signals(books: _Books) -> Iterator[Violation]:
    open_by_owner: dict[Context, list[Key]] = defaultdict(list)
    waiting_by_owner: dict[Context, list[Key]] = defaultdict(list)
    for pairs in books.signals.values():
        for key, row in pairs:
            open_by_owner[row.context].append(key)
            if row.is_scheduled:
                yield Violation("scheduled-as-open", key, f"signal {row.id} is marked as scheduled")
    for pairs in books.schedules.values():
        for key, row in pairs:
            waiting_by_owner[row.context].append(key)
            for other, signal in books.signals.get(key.entity_name, ()):
                if signal.id == row.id:
                    yield Violation("open-and-scheduled", other, f"signal {row.id} is open and waits at once")
    for what, owners in (("open", open_by_owner), ("scheduled", waiting_by_owner)):
        for context, keys in owners.items():
            if len(keys) > 1:
                yield Violation(f"two-{what}", keys[1], f"{context} has {len(keys)} {what} signals")


def _slots(books: _Books) -> Iterator[Violation]:
    for key, slot in books.slots:
        owner = _owner_name(slot) if slot.exchange_name else key.entity_id
        if owner in books.held_back:
            continue
        signals = books.signals.get(owner) or books.signals.get(entity_name(slot.symbol, slot.strategy_name)) or []
        if not signals:
            yield Violation("slot-without-signal", key, f"{owner} has no open signal")
        elif slot.signal_id and all(slot.signal_id != signal.id for _, signal in signals):
            yield Violation("slot-of-other-signal", key, f"the slot names {slot.signal_id!r}")
        else:
            held = books.sessions.get(owner)
            if held is not None and not any(
                guard_key(name).entity_name == key.entity_name for name in held[1].risk_names
            ):
                yield Violation("slot-not-held", key, f"the session row of {owner} does not name this profile")
    for owner, (key, session) in books.sessions.items():
        if owner in books.held_back:
            continue
        if session.risk_names and not books.signals.get(owner):
            yield Violation("held-without-signal", key, f"slots in {', '.join(session.risk_names)} but nothing is open")
        for name in session.risk_names:
            slot_key = risk_key(name, Context(*session.context))
            if slot_key not in books.rows:
                yield Violation("signal-without-slot", slot_key, f"the open signal of {owner} has no slot in {name!r}")


def _partial(books: _Books) -> Iterator[Violation]:
    for key, row in books.levels:
        if key.entity_name in books.held_back:
            continue
        open_ids = {signal.id for _, signal in books.signals.get(key.entity_name, ())}
        for signal_id in row.levels:
            if signal_id not in open_ids:
                yield Violation("levels-without-signal", key, f"levels of {signal_id!r}, which is not open")


def _closed(books: _Books) -> Iterator[Violation]:
    for owner in {*books.signals, *books.schedules}:
        session = books.sessions.get(owner)
        closed = set(session[1].closed_ids) if session is not None else set()
        for key, row in (*books.signals.get(owner, ()), *books.schedules.get(owner, ())):
            if row.id in closed or ledger_key(row.context, row.id) in books.rows:
                yield Violation("closed-id-open", key, f"signal {row.id} was closed before")
    for owner, events in books.events.items():
        closing: dict[str, str] = {}
        for key, trade in books.trades.get(owner, ()):
            if trade.id in closing:
                yield Violation("closed-twice", key, f"signal {trade.id} has two trades")
            closing[trade.id] = trade.event_id
        for key, event in events:
            if event.kind == "closed" and closing.setdefault(event.signal.id, event.id) != event.id:
                yield Violation("closed-twice", key, f"signal {event.signal.id} was closed by another event already")


def _numbers(books: _Books) -> Iterator[Violation]:
    for owner, pairs in books.events.items():
        pairs.sort(key=lambda pair: pair[1].number)
        session = books.sessions.get(owner)
        last = session[1].last_event if session is not None else pairs[-1][1].number
        first = pairs[0][1].number
        for (key, event), expected in zip(pairs, range(first, first + len(pairs)), strict=True):
            context = event.signal.context
            if event_key(context, event.number) != key or event.id != f"{context}#{event.number}":
                yield Violation("wrong-key", key, f"the event says that it is {event.id}")
            if event.number != expected and owner not in books.held_back:
                yield Violation("event-missing", key, f"event {expected} of {owner} is missing")
                break
        if pairs[-1][1].number != last and owner not in books.held_back:
            yield Violation("event-missing", pairs[-1][0], f"the newest event of {owner} should be number {last}")
        if session is not None and pairs[-1][1].candle_ms > session[1].last_candle_ms:
            yield Violation("session-behind", session[0], f"{pairs[-1][1].id} is of a later candle")
    for trades in books.trades.values():
        seen: set[str] = set()
        for key, trade in trades:
            if trade.event_id in seen:
                yield Violation("closed-twice", key, f"event {trade.event_id} made two trades")
            seen.add(trade.event_id)


def _orders(books: _Books) -> Iterator[Violation]:
    for owner, by_signal in books.orders.items():
        open_ids = {signal.id for _, signal in books.signals.get(owner, ())}
        session = books.sessions.get(owner)
        known = {*open_ids, *(trade.id for _, trade in books.trades.get(owner, ()))}
        known |= set(session[1].closed_ids) if session is not None else set()
        judged = session is not None and owner not in books.held_back
        for signal_id, pairs in by_signal.items():
            for key, order in pairs:
                if order_key(Context(*order.context), order.client_order_id) != key:
                    yield Violation("wrong-key", key, f"the row says that it is {order.client_order_id}")
            entries = [order for _, order in pairs if order.action == "open"]
            if len(entries) > 1:
                yield Violation("two-entries", pairs[0][0], f"signal {signal_id} has {len(entries)} orders that open")
            if judged and signal_id not in known and not _is_settled([order for _, order in pairs]):
                yield Violation("order-without-signal", pairs[0][0], f"nobody knows its signal {signal_id}")
            yield from _exits(pairs, entries, is_open=signal_id in open_ids)
        for key, trade in books.trades.get(owner, ()):
            entry = next((one for _, one in by_signal.get(trade.id, ()) if one.action == "open"), None)
            if entry is not None and not entry.filled_quantity and trade.reason in _BY_CANDLE:
                yield Violation(
                    "trade-without-fill", key, f"{entry.client_order_id}, which opened it, was never filled"
                )


def _is_settled(orders: list[Order]) -> bool:
    """Whether none of a signal's orders is under way, and nothing is left to close."""
    entered = sum(order.filled_quantity for order in orders if order.action == "open")
    left = entered - sum(order.filled_quantity + order.missing_quantity for order in orders if order.action != "open")
    return all(order.state in _ENDED for order in orders) and left <= entered * _DUST


def _exits(pairs: list[tuple[Key, Order]], entries: list[Order], *, is_open: bool) -> Iterator[Violation]:
    exits = [(key, order) for key, order in pairs if order.action != "open"]
    for key, order in exits:
        if not entries:
            yield Violation("exit-without-entry", key, f"signal {order.signal_id} has no order that opened it")
            continue
        entry = entries[0]
        if is_open:
            yield Violation("exit-of-open-signal", key, f"signal {order.signal_id} is still open")
        if order.quantity > entry.filled_quantity * (1 + _DUST):
            yield Violation("exit-too-large", key, f"{order.quantity:g} of {entry.filled_quantity:g} that were filled")
        if order.side == entry.side:
            yield Violation(
                "exit-adds", key, f"it is a {order.side}, as the order that opened signal {order.signal_id}"
            )
    intended = [key for key, order in exits if order.state == "intended"]
    if len(intended) > 1:
        yield Violation("two-exits", intended[1], f"{len(intended)} orders are to close the same at once")
