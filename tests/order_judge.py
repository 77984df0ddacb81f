"""What must be true when a bot that was killed around its orders has come to its end: rows against the venue.

At a venue that refuses expired requests nothing may be twice, forgotten or without a row. At one that does not, a late
request can turn up after it was given up, and where ids may repeat one can be there twice: then the bot must have said
so, by the order's id, whenever it was killed.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from order_bot import QUANTITY, SIGNALS, context_of

from holdfast.brokers.paper_wire import Books, Heard
from holdfast.contract import Survives
from holdfast.domains import context_key
from holdfast.engine.broker import Features, OrderReport
from holdfast.engine.orders import Book, is_ended
from holdfast.invariants import check_store
from holdfast.rows import Order, Outage, Trade
from holdfast.store import Store
from holdfast.urls import open_backend

_ORDER = re.compile(r"\border ([a-z2-7]{32})\b")
_ENTRIES_MS = (1_700_000_100_000, 1_700_000_100_000 + 5 * 60_000)
"""Open times of the candles that open something."""


def lines(place: Path) -> list[dict[str, Any]]:
    """Return what the lives of a run left on record."""
    whole = b"".join(file.read_bytes() for file in sorted(place.glob("log-*")))
    return [json.loads(line) for line in whole.splitlines()]


def told_of(record: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the orders that users were told may turn up, or be there twice."""
    warnings = (line["text"] for line in record if line["kind"] == "told")
    return {
        name for text in warnings if "may still turn up" in text or " times: " in text for name in _ORDER.findall(text)
    }


def after_refusal(record: Sequence[Mapping[str, Any]], heard: Sequence[Heard]) -> list[str]:
    """Return what a process sent after its first refused commit: by its own record, and by the venue's."""
    wrong = []
    refused: dict[int, float] = {}
    for line in record:
        if line["kind"] == "refused":
            refused[line["pid"]] = min(line["at"], refused.get(line["pid"], math.inf))
    for pid, at in refused.items():
        sent = [line for line in record if line["kind"] == "sends" and line["pid"] == pid]
        wrong += [f"zombie: {pid} sent {one['order']} after its refused commit" for one in sent if one["at"] > at]
        before = Counter(one["order"] for one in sent if one["at"] <= at)
        late = [one for one in heard if one.sender == pid and one.at_seconds > at]
        wrong += [
            f"zombie: the venue heard {one.request.client_order_id} of {pid} after its refused commit"
            for one in late
            if not before[one.request.client_order_id]
        ]
    return wrong


async def judged(
    url: str, symbol: str, features: Features, told: set[str], faults: set[str], books: Books
) -> tuple[list[str], int]:
    """Compare the rows of a run with what the venue holds; return what is wrong, and how many surprises were told."""
    context = context_of(symbol)
    store = Store(open_backend(url), require=Survives.NOTHING)
    await store.open(read_only=True)
    try:
        wrong = [str(one) for one in await check_store(store)]
        name = context_key("session", context).entity_name
        rows = [loaded.row for loaded in (await store.scan("order", name)).values()]
        trades = [loaded.row for loaded in (await store.scan("ledger", name)).values()]
        outages = [loaded.row for loaded in (await store.scan("outage", name)).values()]
        signals = await store.scan("signal", name)
    finally:
        await store.close()
    book = Book(row for row in rows if isinstance(row, Order))
    taken: dict[str, list[OrderReport]] = defaultdict(list)
    for report in books.orders:
        if report.symbol == symbol:
            taken[report.client_order_id].append(report)
    once = features.refuses_repeated_ids == "always" or (features.refuses_expired and "twice" not in faults)
    for one, those in taken.items():
        if len(those) > 1 and (once or one not in told):
            wrong.append(f"twice: {one} was taken {len(those)} times{'' if once else ', and nobody was told'}")
    surprises = [text for one, those in taken.items() if (text := _surprise(one, those, book.orders.get(one)))]
    excused = not features.refuses_expired
    wrong += [text for one, text in surprises if not (excused and one in told)]
    wrong += [f"forgotten: {o.client_order_id} is {o.state}" for o in book.orders.values() if not is_ended(o)]
    wrong += [
        f"twice: {o.client_order_id} filled too much"
        for o in book.orders.values()
        if o.action == "open" and o.filled_quantity > QUANTITY and (once or o.client_order_id not in told)
    ]
    for signal_id in book.signal_ids():
        opened, closed = (
            sum(o.filled_quantity for o in book.of(signal_id) if (o.action == "open") == opens)
            for opens in (True, False)
        )
        if closed > opened + 1e-9 and not (excused and surprises):
            wrong.append(f"twice: {signal_id} opened {opened} and closed {closed}")
    opens = Counter(order.signal_id for order in book.orders.values() if order.action == "open")
    wrong += [f"twice: {signal_id} has {n} entries" for signal_id, n in opens.items() if n > 1]
    held = sum(p.quantity * (1 if p.side == "long" else -1) for p in books.positions if p.symbol == symbol)
    if (held and not (excused and surprises)) or signals:
        wrong.append(f"position: {held} is held, {len(signals)} signals are open at the end")
    wrong += [f"position: {signal_id} leaves {book.position(signal_id)}" for signal_id in book.unsettled()]
    traded = {trade.id for trade in trades if isinstance(trade, Trade)}
    late = "fill_after" in faults or excused
    for signal_id in book.signal_ids():
        entry = book.entry(signal_id)
        filled = entry is not None and entry.filled_quantity > 0
        if filled and signal_id not in traded and late:
            continue  # nothing was filled when the signal was cancelled; what came later was closed
        if filled != (signal_id in traded):
            wrong.append(f"ledger: {signal_id} is {'' if signal_id in traded else 'not '}in it, its entry is {entry}")
    missed = sum(any(isinstance(o, Outage) and o.from_ms <= ms <= o.to_ms for o in outages) for ms in _ENTRIES_MS)
    if len(opens) < SIGNALS - missed:
        wrong.append(f"forgotten: {len(opens)} of {SIGNALS} signals have an order: {sorted(opens)}")
    twice = {one for one, those in taken.items() if len(those) > 1}
    return wrong, len(twice | {one for one, _ in surprises})


def _surprise(name: str, those: list[OrderReport], row: Order | None) -> tuple[str, str] | None:
    """Return what the venue has of an order and its row does not say."""
    filled = sum(one.filled_quantity for one in those)
    if row is None:
        return name, f"forgotten: the venue took {name}, which has no row"
    if not math.isclose(row.filled_quantity, filled, abs_tol=1e-9):
        return name, f"forgotten: {name} is filled {filled}, its row says {row.filled_quantity}"
    if those[-1].state in ("open", "partial"):
        return name, f"forgotten: {name} rests at the venue"
    return None
