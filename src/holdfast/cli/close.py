"""``holdfast close``: the operator ends what is open, or waits, in the store."""

from __future__ import annotations

import argparse
import asyncio

from ..engine.audited import Done
from ..engine.price_now import newest_price
from ..engine.registry import default_registry
from ..engine.salvaging import named
from ..errors import InvalidInputError
from .by_hand import add_options, hands, load, moment_of, price_of, tell
from .exits import OK
from .recover import opened


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "close",
        help="close what is stored as open, at a price, with its event and its trade",
        description="Close what is open, or cancel what waits, as a transition of its own: the event, the trade, the "
        "freed risk slots. Sends nothing to a venue. Refused while a bot owns it.",
    )
    parser.add_argument("context", metavar="CONTEXT", help="EXCHANGE/SYMBOL/STRATEGY")
    parser.add_argument("--price", type=float, metavar="PRICE", help="at which (default: the newest, from --bot)")
    parser.add_argument(
        "--settled", action="store_true",
        help="nothing of it is left at the venue, as you have seen there: its orders count as ended, and none follows",
    )  # fmt: skip
    parser.add_argument("--at", metavar="TIME", help="when (default: now, or the newest candle's close with --bot)")
    add_options(parser)
    parser.set_defaults(command=_close)


def _close(options: argparse.Namespace) -> int:
    if options.price is None and options.bot is None and not options.settled:
        raise InvalidInputError("at which price? Give --price, or --bot BOT.py for the newest of its exchange")
    given = price_of("price", options.price)
    at_ms = moment_of("at", options.at)
    load(options)

    async def close() -> Done:
        nonlocal at_ms
        async with opened(options.store, options.route, read_only=False) as store:
            context = await named(store, options.context)
            price = given
            if price is None and options.bot is not None:
                price, now_ms = await newest_price(default_registry.exchange(context.exchange_name), context)
                at_ms = now_ms if at_ms is None else at_ms
            return await hands(store, options).close(context, price, at_ms=at_ms, settled=options.settled)

    tell(asyncio.run(close()), options)
    return OK
