"""``holdfast promote``: another copy becomes the first, or other copies count."""

from __future__ import annotations

import argparse
import asyncio

from ..errors import InvalidInputError
from ..urls import open_backend, parse_store
from ..wrappers.replicated import Replicated
from ..wrappers.replicated.promotion import promote
from .exits import OK
from .tables import print_json


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "promote",
        help="another copy becomes the first; copies are added, replaced, dropped",
        description="After the loss of the first of several copies, make the newest of those that answer the first. "
        "The copies that are named count from then on: a new empty one is filled, one that is left out is dropped. "
        "Bots that are running go on with the new first copy by themselves.",
    )
    parser.add_argument("store", metavar="STORE", help="the URLs of all copies, separated by blanks, as one argument")
    parser.add_argument(
        "--force",
        action="store_true",
        help="also while the first copy answers, or when too few copies do: what only the others hold is lost",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.set_defaults(command=_promote)


def _promote(options: argparse.Namespace) -> int:
    name = parse_store(options.store)
    quorum = [] if name.quorum is None else [f"quorum={name.quorum}"]
    # Without the wrappers around all copies: no key is needed to say which copy is the first.
    store = open_backend(" ".join([*name.places, *quorum]))
    if not isinstance(store, Replicated):
        raise InvalidInputError("this names one place: give the URLs of all copies, separated by blanks, in quotes")
    done = asyncio.run(promote(store, force=options.force))
    if options.json:
        print_json(done._asdict())
        return OK
    print(f"{done.first} is the first of {done.copies} copies, in generation {done.generation}; quorum {done.quorum}")
    if done.was_first and done.was_first != done.first:
        print(f"before: {done.was_first}")
    for scope in done.scopes:
        print(f"begins anew: scope {scope}")
    for warning in done.warnings:
        print(f"warning: {warning}")
    return OK
