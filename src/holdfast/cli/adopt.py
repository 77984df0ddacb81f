"""``holdfast adopt``: the operator takes a row in quarantine, or a position from elsewhere, as it is."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from ..contract import Key
from ..domains import context_key
from ..engine.audited import Done
from ..engine.hands import Hands
from ..engine.holdings import Holdings
from ..engine.registry import default_registry
from ..engine.salvaging import named
from ..errors import InvalidInputError, NotFoundError
from ..names import Context
from ..rows import Order, SessionRow, Signal
from ..rules.candles import MINUTE_MS
from ..store import Store
from .by_hand import add_options, hands, load, moment_of, price_of, row_key, tell
from .exits import OK, complain
from .recover import opened, operator

_NEEDED = ("position", "open", "take_profit", "stop_loss", "minutes")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "adopt",
        help="take a row in quarantine, or a position from elsewhere, as it is",
        description="Release the row that lies in quarantine and take it as the context's own; or, with --position and "
        "the others, put a position that came about elsewhere under the bot's watch; or, with --at-venue, give an open "
        "signal that has no order the one that its exits follow from; or, with --account, take its orders to the "
        "account of the bot's new key. Where the file of --bot has a broker, the venue is asked how much it holds. "
        "Refused while a bot owns it.",
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
    parser.add_argument(
        "--at-venue", action="store_true", help="the signal is open here and has no order: take what the venue holds"
    )
    parser.add_argument(
        "--quantity", type=float, metavar="Q", help="how much of what the venue holds (default: all that is nobody's)"
    )
    parser.add_argument(
        "--without-order", action="store_true", help="watch it only: its exit is told, and nothing is sent"
    )
    parser.add_argument(
        "--account", action="store_true", help="the bot has a new key: its orders belong to the account of that one"
    )
    add_options(parser)
    parser.set_defaults(command=_adopt)


def _adopt(options: argparse.Namespace) -> int:
    given = [name for name in _NEEDED if getattr(options, name) is not None]
    missing = [f"--{name.replace('_', '-')}" for name in _NEEDED if name not in given]
    if given and missing:
        raise InvalidInputError(f"a position from elsewhere needs {', '.join(missing)} too")
    if given and row_key(options.target) is not None:
        raise InvalidInputError(f"{options.target} is a key: name the context whose position it is")
    if options.account and (given or options.at_venue or options.without_order or row_key(options.target) is not None):
        raise InvalidInputError("--account moves the orders of a context: name that, and leave out the position")
    _require_sense(options, at_venue=options.at_venue, described=bool(given))
    load(options)

    async def adopt() -> Done:
        async with opened(options.store, options.route, read_only=False) as store:
            if given or options.at_venue or options.account:
                return await _at_venue(store, await named(store, options.target), options)
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


def _require_sense(options: argparse.Namespace, *, at_venue: bool, described: bool) -> None:
    """Refuse options that say nothing together."""
    price_of("quantity", options.quantity, "quantity")
    if at_venue and described:
        raise InvalidInputError("--at-venue is for a signal that is open here already: leave out --position and others")
    if at_venue and row_key(options.target) is not None:
        raise InvalidInputError(f"{options.target} is a key: name the context whose position it is")
    if options.without_order and (at_venue or options.quantity is not None):
        raise InvalidInputError("--without-order asks no venue: leave out --at-venue and --quantity")
    if not described and (options.without_order or (options.quantity is not None and not at_venue)):
        raise InvalidInputError("of which position? Give --position and the others, or --at-venue")
    if options.bot is None and (at_venue or options.account or options.quantity is not None):
        raise InvalidInputError("the venue is asked through the bot's broker: give --bot BOT.py")


async def _at_venue(store: Store, context: Context, options: argparse.Namespace) -> Done:
    """Adopt with the venue's word for it, where the bot's file has a broker."""
    await _require_known(store, context, options.bot)
    worker = hands(store, options)
    exchange = next((e for e in default_registry.list_exchanges() if e.exchange_name == context.exchange_name), None)
    if exchange is None or exchange.broker is None or options.without_order:
        if options.at_venue or options.account or options.quantity is not None:
            raise InvalidInputError(f"{options.bot} adds no exchange {context.exchange_name!r} with a broker")
        if not options.without_order:
            await _require_no_orders(store, context)
        return await _position(worker, context, options, None)
    holdings = Holdings(
        store, exchange.broker, exchange.exchange_name, format_quantity=exchange.format_quantity, operator=operator(),
        clock=lambda: worker.now_ms,
    )  # fmt: skip
    try:
        if options.account:
            return await worker.move(context, holdings)
        if options.at_venue:
            return await worker.adopt_at_venue(context, holdings, quantity=options.quantity)
        return await _position(worker, context, options, holdings)
    finally:
        await exchange.broker.close()


async def _require_known(store: Store, context: Context, bot: str | None) -> None:
    """Refuse a context that the bot's file does not run, and warn of one that nothing here has run: nobody watches it.

    A market of the command line stands in for the exchange of a file that adds none.
    """
    if bot is None:
        rows = [loaded.row for loaded in (await store.scan("session")).values()]
        ran = {Context(*row.context)[::2] for row in rows if isinstance(row, SessionRow)}
        if context[::2] not in ran:
            exchange, strategy = context[::2]
            complain(
                f"no bot has run {strategy!r:.60} on {exchange!r:.60} with this store: unless one does, nobody watches "
                f"{context} (give --bot BOT.py to be sure)"
            )
        return
    exchanges = [one.exchange_name for one in default_registry.list_exchanges()]
    strategies = [one.strategy_name for one in default_registry.list_strategies()]
    for what, name, known in (
        ("exchange", context.exchange_name, exchanges), ("strategy", context.strategy_name, strategies),
    ):  # fmt: skip
        if name not in known and (known or what == "strategy"):
            raise InvalidInputError(
                f"{bot} adds no {what} {name!r:.60}, so nobody would watch {context}: it has "
                f"{', '.join(known) or 'none'}; name one of these, or give the file that runs it"
            )


async def _require_no_orders(store: Store, context: Context) -> None:
    """Where orders are stored there is a broker, and a position without an order would be a surprise."""
    orders = [loaded.row for loaded in (await store.scan("order")).values()]
    if any(isinstance(order, Order) and order.context[0] == context.exchange_name for order in orders):
        raise InvalidInputError(
            f"{context.exchange_name} is traded with a broker: give --bot BOT.py, so that the exit can be sent, or "
            "--without-order to be told of it only"
        )


async def _position(
    worker: Hands, context: Context, options: argparse.Namespace, holdings: Holdings | None
) -> Done:  # fmt: skip
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
    return await worker.take_over(context, signal, at_ms=at_ms, holdings=holdings, quantity=options.quantity)
