"""``holdfast adopt``: the operator takes a row in quarantine, or a position from elsewhere, as it is."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from ..contract import Key
from ..domains import context_key
from ..engine.hands import Done
from ..engine.salvaging import named
from ..errors import InvalidInputError, NotFoundError
from ..names import Context
from ..rows import Signal
from ..rules.candles import MINUTE_MS
from ..store import Store
from .by_hand import add_options, hands, load, moment_of, price_of, row_key, tell
from .exits import OK
from .recover import opened

_NEEDED = ("position", "open", "take_profit", "stop_loss", "minutes")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "adopt",
        help="take a row in quarantine, or a position from elsewhere, as it is",
        description="Release the row that lies in quarantine and take it as the context's own; or, with --position and "
        "the others, put a position that came about elsewhere under the bot's watch. Refused while a bot owns it.",
    )
    parser.add_argument("target", metavar="CONTEXT|KEY", help="EXCHANGE/SYMBOL/STRATEGY, or a key as `show` tells it")
    parser.add_argument("--position", choices=("long", "short"), help="a position from elsewhere")
    parser.add_argument("--open", type=float, metavar="PRICE", help="its entry price")
    parser.add_argument("--take-profit", type=float, metavar="PRICE")
    parser.add_argument("--stop-loss", type=float, metavar="PRICE")
    parser.add_argument("--minutes", type=int, metavar="N", help="how long it may be held")
    parser.add_argument("--id", metavar="ID", help="its signal id (default: from context and time)")
    parser.add_argument("--since", metavar="TIME", help="when it was opened (default: --at)")
    parser.add_argument("--at", metavar="TIME", help="when it comes under watch (default: now)")
    add_options(parser)
    parser.set_defaults(command=_adopt)


def _adopt(options: argparse.Namespace) -> int:
    given = [name for name in _NEEDED if getattr(options, name) is not None]
    missing = [f"--{name.replace('_', '-')}" for name in _NEEDED if name not in given]
    if given and missing:
        raise InvalidInputError(f"a position from elsewhere needs {', '.join(missing)} too")
    if given and row_key(options.target) is not None:
        raise InvalidInputError(f"{options.target} is a key: name the context whose position it is")
    load(options)

    async def adopt() -> Done:
        async with opened(options.store, options.route, read_only=False) as store:
            if given:
                return await _position(store, await named(store, options.target), options)
            key = row_key(options.target) or await _kept(store, await named(store, options.target))
            return await hands(store, options).adopt(key)

    tell(asyncio.run(adopt()), options)
    return OK


async def _kept(store: Store, context: Context) -> Key:
    """Return the key of the context that has something in quarantine."""
    # A row that contradicts its key is found, and moved there, when it is looked at.
    from ..engine.recovery import look

    await look(store, context, (), now_ms=0, lifetime_ms=0)
    keys = [context_key(domain, context) for domain in ("signal", "schedule", "session", "partial")]
    kept = [key for key in keys if store.is_stopped(key)]
    if not kept:
        raise NotFoundError(f"{context}: nothing that can be adopted is in quarantine (see `holdfast show`)")
    if len(kept) > 1:
        raise InvalidInputError(f"{context} has several in quarantine: name one of {', '.join(map(str, kept))}")
    return kept[0]


async def _position(store: Store, context: Context, options: argparse.Namespace) -> Done:
    worker = hands(store, options)
    at_ms = moment_of("at", options.at)
    since_ms = moment_of("since", options.since)
    begun_ms = since_ms if since_ms is not None else worker.now_ms if at_ms is None else at_ms
    begun_ms -= begun_ms % MINUTE_MS
    prices: dict[str, Any] = {
        name: price_of(name.replace("_", "-"), getattr(options, name)) for name in ("open", "take_profit", "stop_loss")
    }
    signal = Signal(
        id=options.id or f"{context.exchange_name}:{context.symbol}:{context.strategy_name}:{begun_ms}",
        position=options.position, note="adopted", price_open=prices["open"],
        price_take_profit=prices["take_profit"], price_stop_loss=prices["stop_loss"],
        minute_estimated_time=options.minutes, symbol=context.symbol, exchange_name=context.exchange_name,
        strategy_name=context.strategy_name, scheduled_at=begun_ms, pending_at=begun_ms,
    )  # fmt: skip
    return await worker.take_over(context, signal, at_ms=at_ms)
