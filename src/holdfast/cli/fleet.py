"""``holdfast fleet``: one worker of a fleet; start as many as you like, on any number of machines."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec

from ..contract import Survives
from ..documents.adapters import current_routes, use_store
from ..engine.fleet import Fleet
from ..engine.journals import JournalFolder
from ..engine.listeners import Failure, Tick, default_listeners
from ..engine.live import Live, LiveRun
from ..engine.modes import TroublePolicy
from ..engine.registry import default_registry
from ..engine.session import wall_clock_ms
from ..names import Context
from ..rows import Event
from ..store import Store
from ..urls import open_backend
from .contexts import read_contexts
from .exits import OK
from .loading import load_bot
from .opening import add_route_option, routes_of
from .owning import add_lease_option
from .screen import Board, PlainScreen, describe, describe_mode, describe_trouble
from .tables import visible


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "fleet",
        help="run contexts spread over any number of processes, each taken over when its process dies",
        description="Be one worker of a fleet: the contexts of FILE are spread over all workers that live, with no "
        "coordinator besides the store. When a worker dies the others take over what it ran, within twice the lease; "
        "one that is ended by SIGTERM or Ctrl-C hands its contexts over, open positions and all. A second Ctrl-C ends "
        "it at once.",
    )
    parser.add_argument("bot", metavar="BOT.py", help="a Python file that adds exchanges and strategies")
    parser.add_argument(
        "--contexts", required=True, metavar="FILE", help="what to run: one 'exchange symbol strategy' a line, or JSON"
    )
    parser.add_argument("--store", required=True, metavar="URL", help="a store that several processes may share")
    add_route_option(parser)
    add_lease_option(parser)
    parser.add_argument(
        "--emergency",
        metavar="DIR",
        help="keep exits here while the store cannot be written: a folder of this machine, the same for all of its "
        "workers; each takes a file of its own in it, and what one left when it ended goes to the next",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.set_defaults(command=_fleet)


def _fleet(options: argparse.Namespace) -> int:
    load_bot(options.bot)
    contexts = read_contexts(options.contexts, default_registry)
    return asyncio.run(_work(options, contexts))


async def _work(options: argparse.Namespace, contexts: Sequence[Context]) -> int:
    async with _opened(options) as store:
        folder = None if options.emergency is None else JournalFolder(options.emergency)
        on_trouble = TroublePolicy() if folder is None else await folder.claim(store, TroublePolicy())

        def start(context: Context) -> LiveRun:
            return Live.run(
                context.symbol, strategy_name=context.strategy_name, exchange_name=context.exchange_name,
                store=store, lease_seconds=options.lease, on_trouble=on_trouble,
            )  # fmt: skip

        def told(context: Context, what: str) -> None:
            if options.json:
                line = {"fleet": {"context": "/".join(context), "what": what, "atMs": wall_clock_ms()}}
                print(msgspec.json.encode(line).decode(), flush=True)
            else:
                print(visible(f"{context}: {what}"), flush=True)

        fleet = Fleet(
            store, contexts, start, lease_seconds=options.lease, clock=wall_clock_ms, told=told, on_trouble=on_trouble,
            folder=folder,
        )  # fmt: skip
        _catch_signals(fleet)
        title = f"fleet of {len(contexts)} contexts, store {store.guarantees.backend}, lease {options.lease:g} s"
        board = Board(contexts, title)
        store.observers.append(board.committed)
        screen = PlainScreen(board, json=options.json)

        def heard(news: Event | Tick) -> None:
            board.take(news)
            if isinstance(news, Event):
                screen.show(news)

        def failed(failure: Failure) -> None:
            screen.fail(describe(failure))

        unsubscribe = [
            default_listeners.listen("signal_live", heard),
            default_listeners.listen("error", failed),
            default_listeners.listen("validation", failed),
            default_listeners.listen("mode", lambda change: screen.fail(describe_mode(change))),
            default_listeners.listen("trouble", lambda trouble: screen.fail(describe_trouble(trouble))),
        ]
        try:
            await fleet.work()
        finally:
            for end in unsubscribe:
                end()
            screen.close()
    return OK


def _catch_signals(fleet: Fleet) -> None:
    told = False

    def interrupt() -> None:
        nonlocal told
        if told:
            os._exit(130)  # asked twice: at once, and the store is built for that
        told = True
        print("holdfast: leaving: the contexts are handed over", file=sys.stderr, flush=True)
        fleet.leave()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)


@asynccontextmanager
async def _opened(options: argparse.Namespace) -> AsyncIterator[Store]:
    routes = {**current_routes(), **routes_of(options.route)}
    store = Store(open_backend(options.store), routes=routes, require=Survives.PROCESS)
    await store.open()
    use_store(store)  # what the user's file reads and writes through the adapters lies there too
    try:
        yield store
    finally:
        use_store(None)
        await store.close()
