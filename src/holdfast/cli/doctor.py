"""``holdfast doctor``: what a store really promises, how that is known, and which setting to change."""

from __future__ import annotations

import argparse
import asyncio

import msgspec

from ..contract import Guarantees, How, Survives
from .exits import LOSS, OK
from .opening import add_route_option, reading
from .tables import print_json, print_table

_SURVIVES = {
    Survives.NOTHING: "nothing: not even the end of the bot",
    Survives.PROCESS: "the death of the bot, but no power cut",
    Survives.HOST: "a power cut of the machine that holds the data",
    Survives.SERVER: "the loss of one machine that holds the data",
}
_HOW = {How.ATTESTED: "read from the medium", How.ASSUMED: "as documented, not checked", How.UNKNOWN: "unknown"}


def points(promise: Guarantees) -> list[tuple[str, str, str]]:
    """Return each point of a promise as (question, answer, how it is known), for people."""
    fenced = "by the medium, in the step that writes" if promise.fenced else "by this process alone"
    return [
        ("a returned commit survives", _SURVIVES[promise.survives], _HOW[promise.survives_how]),
        ("several rows at once", "whole or not at all" if promise.atomic else "one by one", _HOW[promise.atomic_how]),
        ("a stale writer is refused", fenced, _HOW[promise.fenced_how]),
        ("several processes", "may share it" if promise.shared else "one at a time", ""),
    ]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="what a store really promises, and which setting to change",
        description="Ask a store for its real settings, and tell what a returned commit survives. Changes nothing. "
        "Exit code 1 when that is less than a power cut, 2 when a setting voids the promise.",
    )
    parser.add_argument("store", nargs="?", metavar="STORE", help="folder or URL (default: ./dump/data)")
    add_route_option(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--plain", action="store_true", help="no colours, no frames")
    parser.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    async def ask() -> Guarantees:
        async with reading(options.store, options.route) as store:
            return store.guarantees

    promise = asyncio.run(ask())
    if options.json:
        print_json({**msgspec.to_builtins(promise), "survives": promise.survives.name})
    else:
        print_table(promise.backend, ("what", "answer", "how it is known"), points(promise), plain=options.plain)
        for warning in promise.warnings:
            print(f"warning: {warning}")
    return OK if promise.survives >= Survives.HOST else LOSS
