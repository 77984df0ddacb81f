"""``holdfast show``: what is stored, beside a running bot."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from ..contract import Key
from ..domains import context_key, to_mapping
from ..errors import InvalidInputError
from ..names import Context, unquote
from ..rows import (
    Event,
    Order,
    Outage,
    Owner,
    PartialLevels,
    Quarantined,
    RiskPosition,
    Row,
    ScheduledSignal,
    SessionRow,
    Signal,
    Trade,
)
from ..store import Store
from . import audit
from .exits import OK
from .opening import add_route_option, reading
from .tables import moment, number, percent, print_json, print_table

_DOMAINS = (
    "session",
    "signal",
    "schedule",
    "partial",
    "risk",
    "order",
    "outbox",
    "ledger",
    "outage",
    "owner",
    "quarantine",
)


class Picture:
    """Everything that is stored, read once and sorted by context."""

    def __init__(self, rows: dict[Key, Row], damaged: dict[Key, str], number: int) -> None:
        self.rows, self.damaged, self.commits = rows, damaged, number
        named = {Context(*row.context) for row in rows.values() if isinstance(row, SessionRow)}
        named |= {row.context for row in rows.values() if isinstance(row, Signal)}
        self.contexts = sorted(named)

    @staticmethod
    async def of(store: Store) -> Picture:
        """Read every row that a person may want to see."""
        rows: dict[Key, Row] = {}
        for domain in _DOMAINS:
            rows.update({key: loaded.row for key, loaded in (await store.scan(domain)).items()})
        return Picture(rows, dict(store.damaged), (await store.head()).number)

    def row(self, domain: str, context: Context) -> Any:
        """Return a context's one row of a domain, or None."""
        return self.rows.get(context_key(domain, context))

    def of_context(self, domain: str, context: Context) -> list[Any]:
        """Return a context's rows of a domain, in the order of their keys."""
        name = context_key("session", context).entity_name
        return [row for key, row in self.rows.items() if key.domain == domain and key.entity_name == name]

    def all(self, kind: type[Row]) -> list[Any]:
        """Return every row of one type, in the order of their keys."""
        return [row for row in self.rows.values() if type(row) is kind]


def _levels(row: PartialLevels | None) -> dict[str, Any] | None:
    return None if row is None or not row.levels else to_mapping(row)["levels"]


def as_json(picture: Picture, trades: int) -> dict[str, Any]:
    """Return the picture as plain values; rows have the names they have on the medium."""
    contexts = []
    for context in picture.contexts:
        session: SessionRow | None = picture.row("session", context)
        signal: Signal | None = picture.row("signal", context)
        scheduled: ScheduledSignal | None = picture.row("schedule", context)
        owner: Owner | None = picture.row("owner", context)
        contexts.append(
            {
                "exchange": context.exchange_name,
                "symbol": context.symbol,
                "strategy": context.strategy_name,
                "lastCandle": session.last_candle_ms if session else None,
                "events": session.last_event if session else None,
                "open": to_mapping(signal) if signal else None,
                "scheduled": to_mapping(scheduled) if scheduled else None,
                "levels": _levels(picture.row("partial", context)),
                "orders": [to_mapping(row) for row in _orders(picture, context)],
                "undelivered": len(picture.of_context("outbox", context)),
                "outages": [to_mapping(row) for row in picture.of_context("outage", context)],
                "owner": to_mapping(owner) if owner else None,
            }
        )
    slots: dict[str, list[Any]] = {}
    for key, row in picture.rows.items():
        if isinstance(row, RiskPosition):
            slots.setdefault(str(unquote(key.entity_name) or key.entity_name), []).append(to_mapping(row))
    return {
        "commits": picture.commits,
        "contexts": contexts,
        "risk": slots,
        "undelivered": [to_mapping(row) for row in picture.all(Event)],
        "trades": [to_mapping(row) for row in _newest(picture, trades)],
        "tradesInAll": len(picture.all(Trade)),
        "quarantine": [
            {"key": str(key), "reason": row.reason, "version": row.version, "atMs": row.at_ms}
            for key, row in picture.rows.items()
            if isinstance(row, Quarantined)
        ],
        "damaged": [{"key": str(key), "reason": reason} for key, reason in sorted(picture.damaged.items())],
    }


def _orders(picture: Picture, context: Context) -> list[Order]:
    return sorted(picture.of_context("order", context), key=lambda row: (row.intended_at_ms, row.n))


def _newest(picture: Picture, count: int) -> list[Trade]:
    trades = sorted(picture.all(Trade), key=lambda trade: (trade.closed_at, trade.event_id))
    return trades[-count:] if count else []


def _print(picture: Picture, trades: int, plain: bool) -> None:
    lines = []
    for context in picture.contexts:
        session, signal = picture.row("session", context), picture.row("signal", context)
        scheduled, levels = picture.row("schedule", context), _levels(picture.row("partial", context))
        reached = [f"+{n}" for one in (levels or {}).values() for n in one["profitLevels"]]
        reached += [f"-{n}" for one in (levels or {}).values() for n in one["lossLevels"]]
        lines.append(
            [
                str(context),
                _position(signal),
                _position(scheduled),
                " ".join(reached) or "-",
                moment(session.last_candle_ms) if session else "-",
                str(session.last_event) if session else "-",
                str(len(picture.of_context("outbox", context))),
            ]
        )
    columns = ("context", "open", "waiting", "levels", "last decided", "events", "undelivered")
    print_table(f"Contexts (commit {picture.commits})", columns, lines, plain=plain)
    risk = [
        [
            str(unquote(key.entity_name) or key.entity_name),
            f"{row.exchange_name or '?'}/{row.symbol}/{row.strategy_name}",
            row.signal_id,
            moment(row.open_timestamp),
        ]
        for key, row in picture.rows.items()
        if isinstance(row, RiskPosition)
    ]
    print_table("Risk slots", ("profile", "context", "signal", "since"), risk, plain=plain)
    _print_orders(picture, plain)
    waiting = [[event.id, event.kind, moment(event.at_ms), number(event.price)] for event in picture.all(Event)]
    print_table("Undelivered events", ("event", "kind", "at", "price"), waiting, plain=plain)
    closed = [
        [
            moment(trade.closed_at),
            f"{trade.exchange_name}/{trade.symbol}/{trade.strategy_name}",
            trade.position,
            number(trade.price_open),
            number(trade.price_close),
            trade.reason,
            percent(trade.pnl_percent),
        ]
        for trade in _newest(picture, trades)
    ]
    count = len(picture.all(Trade))
    columns = ("closed", "context", "side", "in", "out", "why", "PnL")
    print_table(f"Newest trades (of {count})", columns, closed, plain=plain)
    names = {context_key("session", context).entity_name: str(context) for context in picture.contexts}
    outages = [
        [names.get(key.entity_name, key.entity_name), moment(row.from_ms), moment(row.to_ms)]
        for key, row in picture.rows.items()
        if isinstance(row, Outage) and row.from_ms  # one that begins at 0 is the time before the first start
    ]
    if outages:
        print_table("Outages (no entries)", ("context", "from", "to"), outages, plain=plain)
    kept = [[str(key), row.reason] for key, row in picture.rows.items() if isinstance(row, Quarantined)]
    kept += [[str(key), reason] for key, reason in sorted(picture.damaged.items())]
    print_table("Quarantine", ("key", "why"), kept, plain=plain)


def _print_orders(picture: Picture, plain: bool) -> None:
    orders = [
        [
            str(context),
            f"{row.action} {row.n}",
            row.side,
            number(row.quantity),
            row.state,
            number(row.filled_quantity),
            number(row.average_price),
            row.client_order_id,
            row.note,
        ]
        for context in picture.contexts
        for row in _orders(picture, context)
    ]
    if orders:
        columns = ("context", "order", "side", "quantity", "state", "filled", "at", "client order id", "note")
        print_table("Orders", columns, orders, plain=plain)


def _position(signal: Signal | None) -> str:
    if signal is None:
        return "-"
    prices = f"{number(signal.price_open)} → {number(signal.price_take_profit)} | {number(signal.price_stop_loss)}"
    return f"{signal.position} {prices}"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "show",
        help="what is stored: contexts, positions, risk slots, events, trades",
        description="Show what is stored. Reads only, so it works beside a running bot.",
    )
    parser.add_argument("store", nargs="?", metavar="STORE", help="folder or URL (default: ./dump/data)")
    add_route_option(parser)
    parser.add_argument("--trades", type=int, default=10, metavar="N", help="how many trades to show (default: 10)")
    parser.add_argument("--audit", action="store_true", help="what was done by hand, and the recovery plans, instead")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    parser.add_argument("--plain", action="store_true", help="no colours, no frames")
    parser.set_defaults(command=_show)


async def _show_audit(options: argparse.Namespace) -> None:
    async with reading(options.store, options.route) as store:
        await audit.show(store, json=options.json, plain=options.plain)


def _show(options: argparse.Namespace) -> int:
    if options.trades < 0:
        raise InvalidInputError(f"--trades is {options.trades}: at least 0 is needed")

    if options.audit:
        asyncio.run(_show_audit(options))
        return OK

    async def read() -> Picture:
        async with reading(options.store, options.route) as store:
            return await Picture.of(store)

    picture = asyncio.run(read())
    if options.json:
        print_json(as_json(picture, options.trades))
    else:
        _print(picture, options.trades, options.plain)
    return OK
