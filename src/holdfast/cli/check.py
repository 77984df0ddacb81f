"""``holdfast check``: read everything, verify it, and test every rule, beside a running bot."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any, cast

import msgspec

from ..contract import Guarantees
from ..domains import context_key, order_key
from ..engine.orders import Book, is_ended
from ..invariants import check_store
from ..names import Context
from ..rows import Order, Signal
from ..store import Store
from .exits import LOSS, OK
from .opening import add_route_option, reading
from .tables import print_json, print_table


class Finding(msgspec.Struct, frozen=True):
    """Something that is not as it should be."""

    rule: str
    """Short and fixed, such as ``slot-without-signal``; ``quarantined`` for bytes that were set aside."""
    key: str
    message: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found."""

    ok: bool
    rows: int
    commits: int
    backend: str
    survives: str
    warnings: tuple[str, ...]
    findings: list[Finding]


async def examine(store: Store) -> Verdict:
    """Read every row of an open store and judge it."""
    violations = await check_store(store)
    findings = [Finding(found.rule, str(found.key), found.message) for found in violations]
    seen = {found.key for found in findings}
    # Stopped keys are no broken rule, but somebody has to look: their contexts do not trade.
    findings += [
        Finding("quarantined", str(key), reason)
        for key, reason in sorted(store.damaged.items())
        if str(key) not in seen
    ]
    findings += await _left_open(store)
    promise: Guarantees = store.guarantees
    return Verdict(
        ok=not findings,
        rows=len(await store.keys()),
        commits=(await store.head()).number,
        backend=promise.backend,
        survives=f"{promise.survives.name} ({promise.survives_how})",
        warnings=promise.warnings,
        findings=findings,
    )


async def _left_open(store: Store) -> list[Finding]:
    """Find positions that stand at a venue while no signal is open for them and no order is to close them.

    That is no broken rule: the next run with the broker sends the exit. But until then nobody watches them.
    """
    signals = [cast("Signal", loaded.row) for loaded in (await store.scan("signal")).values()]
    open_ids = {(signal.context, signal.id) for signal in signals}
    books: dict[str, list[Order]] = {}
    for key, loaded in (await store.scan("order")).items():
        order = cast("Order", loaded.row)
        if not store.is_stopped(context_key("signal", Context(*order.context))):
            books.setdefault(key.entity_name, []).append(order)
    found = []
    for book in map(Book, books.values()):
        for signal_id in book.unsettled():
            orders, left = book.of(signal_id), book.position(signal_id)
            context = Context(*orders[0].context)
            if left and all(map(is_ended, orders)) and (context, signal_id) not in open_ids:
                message = (
                    f"{left:g} of {context.symbol} were entered for signal {signal_id!r:.80}, which is over, and no "
                    "order is to close them: start the bot with its broker"
                )
                key = order_key(context, orders[0].client_order_id)
                found.append(Finding("position-left-open", str(key), message))
    return found


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "check",
        help="verify every stored row and every rule; exit code 1 when one is broken",
        description="Read every stored row, verify its checksum and test every rule. Changes nothing.",
    )
    parser.add_argument("store", nargs="?", metavar="STORE", help="folder or URL (default: ./dump/data)")
    add_route_option(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--plain", action="store_true", help="no colours, no frames")
    parser.set_defaults(command=_check)


def _check(options: argparse.Namespace) -> int:
    async def read() -> Verdict:
        async with reading(options.store, options.route) as store:
            return await examine(store)

    verdict = asyncio.run(read())
    if options.json:
        plain: Any = msgspec.to_builtins(verdict)
        print_json(plain)
    else:
        lines = [[found.rule, found.key, found.message] for found in verdict.findings]
        print(f"{verdict.backend}: {verdict.rows} rows, commit {verdict.commits}, survives {verdict.survives}")
        for warning in verdict.warnings:
            print(f"warning: {warning}")
        print_table("Findings", ("rule", "key", "what"), lines, plain=options.plain)
    return OK if verdict.ok else LOSS
