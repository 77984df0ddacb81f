"""``holdfast clear``: the operator removes a row that means nothing; its bytes are kept."""

from __future__ import annotations

import argparse
import asyncio

from ..engine.audited import Done
from ..errors import InvalidInputError
from .by_hand import add_options, hands, row_key, tell
from .exits import OK
from .recover import opened


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "clear",
        help="remove a row that means nothing; its bytes stay in quarantine",
        description="Let go of what lies in quarantine for a key, or remove risk slots and levels that belong to "
        "nothing. The bytes are kept, marked as released. Refused while a bot owns it.",
    )
    parser.add_argument("key", metavar="KEY", help="DOMAIN/ENTITY/ID, as `holdfast show` and `check` tell it")
    add_options(parser, bot=False)
    parser.set_defaults(command=_clear)


def _clear(options: argparse.Namespace) -> int:
    key = row_key(options.key)
    if key is None:
        raise InvalidInputError(f"{options.key!r:.80} is no key: write DOMAIN/ENTITY/ID, as `holdfast check` tells it")

    async def clear() -> Done:
        async with opened(options.store, options.route, read_only=False) as store:
            return await hands(store, options).clear(key)

    tell(asyncio.run(clear()), options)
    return OK
