"""What ``adopt``, ``close`` and ``clear`` share: their options, whom they name, and how they tell what they did."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..contract import Key
from ..domains import DOMAINS, to_mapping
from ..engine.audited import Done
from ..engine.hands import Hands
from ..engine.registry import default_registry
from ..engine.specs import as_moment_ms
from ..errors import InvalidInputError
from ..store import Store
from .loading import load_bot
from .opening import add_route_option
from .recover import operator
from .tables import print_json, print_table


def add_options(parser: argparse.ArgumentParser, *, bot: bool = True) -> None:
    """Add what every one of the commands takes."""
    parser.add_argument("--store", metavar="PATH|URL", help="where state is kept (default: ./dump/data)")
    parser.add_argument("--why", default="", metavar="TEXT", help="for the record")
    if bot:
        parser.add_argument(
            "--bot", metavar="BOT.py", help="the bot's file: its fees, its risk profiles, and its exchange's price"
        )
    add_route_option(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--plain", action="store_true", help="no colours, no frames")


def hands(store: Store, options: argparse.Namespace) -> Hands:
    """Return the operator's hands on an open store."""
    names = {one.strategy_name: one.risk_names for one in default_registry.list_strategies()}
    return Hands(store, operator=operator(), why=options.why, risk_names=names)


def load(options: argparse.Namespace) -> None:
    """Run the bot's file where one was given, so that its parameters hold."""
    if options.bot is not None:
        load_bot(options.bot)


def row_key(text: str) -> Key | None:
    """Return the key that ``domain/entity/id`` names; None where it is no key."""
    parts = text.split("/")
    return Key(*parts) if len(parts) == 3 and parts[0] in DOMAINS and all(parts) else None


def moment_of(name: str, text: str | None) -> int | None:
    """Return the epoch milliseconds of a time option; None where it was not given.

    Raises:
        InvalidInputError: It is no time.
    """
    if text is None:
        return None
    return as_moment_ms(f"--{name}", int(text) if text.isascii() and text.isdigit() else text)


def price_of(name: str, value: float | None, what: str = "price") -> float | None:
    """Return an option that is a price, or another number above 0, if it can be one.

    Raises:
        InvalidInputError: It is 0 or less, or not finite.
    """
    if value is not None and not (math.isfinite(value) and value > 0):
        raise InvalidInputError(f"--{name} is {value!r}: give a {what} above 0")
    return value


def tell(done: Done, options: argparse.Namespace) -> None:
    """Print what was changed."""
    audit = done.audit
    if options.json:
        plain: dict[str, Any] = to_mapping(audit)
        plain["event"] = None if done.event is None else to_mapping(done.event)
        print_json(plain)
        return
    lines = [[name, brief(audit.before.get(name)), brief(audit.after.get(name))] for name in audit.before]
    print_table(f"{audit.action} {audit.target}, by {audit.by}", ("row", "before", "after"), lines, plain=options.plain)
    for kept in audit.after.get("kept", ()):
        print(f"kept: {kept}")


def brief(row: Any) -> str:
    """Return a row in few words."""
    if row is None:
        return "-"
    shown = (
        "id",
        "position",
        "priceOpen",
        "reason",
        "priceClose",
        "kind",
        "lastCandleMs",
        "lastEvent",
        "fromMs",
        "toMs",
        "action",
        "account",
        "state",
        "filledQuantity",
        "missingQuantity",
    )
    told = [f"{name} {row[name]}" for name in shown if name in row]
    return ", ".join(told) or "there"
