"""``holdfast run``: every strategy of a user's file on its symbols, live, in one event loop."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from ..contract import Backend, Guarantees, Key, Survives
from ..documents.adapters import current_routes, default_store, use_store
from ..documents.default import close_stores, location
from ..domains import context_key
from ..engine.broker import Broker
from ..engine.listeners import Failure, Tick, default_listeners
from ..engine.live import Live
from ..engine.modes import TroublePolicy
from ..engine.registry import default_registry
from ..errors import HoldfastError, InvalidInputError
from ..market.process import MarketProcess
from ..market.replay import ReplayMarket
from ..names import Context
from ..rows import Event, Row, SessionRow
from ..store import Store
from ..urls import open_backend, parse_store
from .exits import OK, UNAVAILABLE, exit_code
from .loading import load_bot
from .opening import add_route_option, reading, routes_of
from .owning import add_conflict_option, add_lease_option, when_free
from .plan import DEFAULT_SPEED, Plan, make_plan
from .screen import Board, Line, LiveScreen, PlainScreen, describe
from .tables import fancy, moment

_REDRAW_SECONDS = 0.25


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "run",
        help="run the strategies of a Python file, live",
        description="Run every strategy that BOT.py adds, on its symbols, until the market ends or Ctrl-C. "
        "Open positions stay in the store, and the next run goes on with them. A second Ctrl-C ends at once.",
    )
    parser.add_argument("bot", metavar="BOT.py", help="a Python file that adds strategies")
    parser.add_argument("--symbols", default="", metavar="A,B", help="run on these (default: each strategy's own)")
    parser.add_argument("--strategy", action="append", default=[], metavar="NAME", help="run only this one; repeatable")
    parser.add_argument("--exchange", metavar="NAME", help="which exchange, where the file adds several")
    parser.add_argument("--store", metavar="PATH|URL", help="where state is kept (default: ./dump/data)")
    add_route_option(parser)
    add_conflict_option(parser)
    add_lease_option(parser)
    parser.add_argument(
        "--market",
        metavar="MARKET",
        help="a paper market instead of the file's exchange: synthetic:SEED, candle FILE[,FILE…], or tcp://host:port",
    )
    parser.add_argument(
        "--speed", metavar="N|wait", help=f"N times real time, or wait for the bot (default: {DEFAULT_SPEED})"
    )
    parser.add_argument(
        "--emergency", metavar="FILE", help="keep exits here while the store cannot be written (set aside at the start)"
    )
    parser.add_argument("--minutes", type=int, metavar="N", help="end after so many minutes of the market")
    parser.add_argument(
        "--until-end", action="store_true", help="run until the market ends (with --market it always does)"
    )
    parser.add_argument("--plain", action="store_true", help="one line for each event, no table")
    parser.add_argument("--json", action="store_true", help="one JSON object for each event, and a summary")
    # For the proof kit, which watches and kills this process from outside.
    parser.add_argument("--witness-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--kill-at", help=argparse.SUPPRESS)
    parser.add_argument("--venue", help=argparse.SUPPRESS)
    parser.set_defaults(command=_run_command)


def _run_command(options: argparse.Namespace) -> int:
    if options.minutes is not None and options.minutes < 1:
        raise InvalidInputError(f"--minutes is {options.minutes}: at least 1 is needed")
    if options.store == "":
        raise InvalidInputError("--store is empty: name a folder, or leave it out for ./dump/data")
    symbols = [symbol for symbol in options.symbols.split(",") if symbol]
    if options.symbols and not symbols:
        raise InvalidInputError(f"--symbols {options.symbols!r:.40} names none: write them as A,B")
    load_bot(options.bot)
    plan = make_plan(
        default_registry,
        symbols=symbols,
        strategies=options.strategy,
        exchange=options.exchange,
        market=options.market,
        speed=options.speed,
        minutes=options.minutes,
    )
    with ExitStack() as stack:
        market: ReplayMarket | None = None
        if plan.server:
            decided_ms = asyncio.run(_decided_ms(options.store, plan.contexts))
            server = MarketProcess((*plan.server, "--resume", str(decided_ms)))
            market = ReplayMarket(stack.enter_context(server).address)
            if decided_ms:
                plan = plan._replace(market=f"{plan.market}, from {moment(server.info.start_ms)}")
        elif plan.address:
            market = ReplayMarket(plan.address)
        if market is not None:
            given = [one for one in default_registry.list_exchanges() if one.exchange_name == plan.exchange_name]
            default_registry.remove_exchange(plan.exchange_name)
            broker = _tortured_at(options.venue) if options.venue else None
            if broker is None and any(one.broker is not None for one in given):
                told = "takes the place of the bot's exchange and of its broker: events are told, no orders are sent"
                print(f"--market {options.market} {told}", file=sys.stderr)
            default_registry.add_exchange(market, exchange_name=plan.exchange_name, broker=broker)
        return asyncio.run(_Run(options, plan, market).until_end())


def _tortured_at(address: str) -> Broker:
    from ..testing.desk import WatchedBroker, with_quantities

    with_quantities(default_registry)
    return WatchedBroker(address)


async def _decided_ms(where: str | None, contexts: Sequence[Context]) -> int:
    """Return the newest candle that the store has decided on for one of ``contexts``; 0 where there is none.

    A paper market of ours goes on there. From its beginning it would show a bot that was started again only what
    that bot has decided already.
    """
    if where is not None and parse_store(where).in_memory:
        return 0
    keys = [context_key("session", context) for context in contexts]
    try:
        async with reading(str(location()) if where is None else where) as store:
            rows = [loaded.row for loaded in (await store.load(*keys)).values()]
    except HoldfastError:
        return 0  # no store yet; or one that cannot be used, and the opening for writing says so better
    return max((row.last_candle_ms for row in rows if isinstance(row, SessionRow)), default=0)


class _Run:
    """One run, from the opened store to the last event."""

    def __init__(self, options: argparse.Namespace, plan: Plan, market: ReplayMarket | None) -> None:
        self._options, self._plan, self._market = options, plan, market
        self._code = OK
        self._interrupted = asyncio.Event()

    async def until_end(self) -> int:
        """Run until the market ends or somebody interrupts, and return the exit code."""
        try:
            async with self._open_store() as store:
                self._catch_signals()
                board = Board(self._plan.contexts, self._title(store.guarantees))
                store.observers.append(board.committed)
                table = fancy(plain=self._options.plain or self._options.json)
                screen = LiveScreen(board) if table else PlainScreen(board, json=self._options.json)
                try:
                    await self._follow(store, board, screen)
                finally:
                    screen.close()
        finally:
            if self._market is not None:
                await self._market.close()
        return self._code

    def _title(self, promise: Guarantees) -> str:
        count = len(self._plan.contexts)
        where = promise.backend.replace(f"{Path.cwd()}{os.sep}", f".{os.sep}")
        what = f"{count} context{'s' if count != 1 else ''}, {self._plan.market}"
        return f"{what}, store {where}, a commit survives {promise.survives.name}"

    async def _follow(self, store: Store, board: Board, screen: LiveScreen | PlainScreen) -> None:
        def told(news: Event | Tick) -> None:
            board.take(news)
            if isinstance(news, Event):
                screen.show(news)

        failing: set[Context | None] = set()

        def failed(failure: Failure) -> None:
            if failure.where == "store":
                failing.add(failure.context)
            screen.fail(describe(failure))

        def stored(scope: str, number: int, changes: Mapping[Key, Row | None]) -> None:
            # Only what a context decided ends its failure: on a full disk a small commit may pass where that did not.
            decided = {context for context in failing if not context or context_key("session", context) in changes}
            failing.difference_update(decided)

        store.observers.append(stored)
        unsubscribe = [
            default_listeners.listen("signal_live", told),
            default_listeners.listen("error", failed),
            default_listeners.listen("validation", failed),
            default_listeners.listen("mode", screen.tell_mode),
            default_listeners.listen("trouble", screen.tell_trouble),
        ]
        on_trouble = TroublePolicy(emergency=self._options.emergency)
        board.at_risk = Live.status
        # All are set up before the first one runs: contexts that share a risk profile take turns by name.
        runs = [
            (context, Live.run(context.symbol, strategy_name=context.strategy_name,
                               exchange_name=context.exchange_name, store=store,
                               on_conflict=self._options.on_conflict, lease_seconds=self._options.lease,
                               on_trouble=on_trouble))
            for context in self._plan.contexts
        ]  # fmt: skip
        tasks = [asyncio.create_task(self._one(board.lines[context], events)) for context, events in runs]
        stop = asyncio.create_task(self._interrupted.wait())
        loop = asyncio.get_running_loop()
        limited = self._options.minutes is not None and self._options.market is None
        ends_at = loop.time() + self._options.minutes * 60 if limited else None
        try:
            while not stop.done() and not all(task.done() for task in tasks):
                waiting = [stop, *(task for task in tasks if not task.done())]
                await asyncio.wait(waiting, timeout=_REDRAW_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                screen.redraw()
                if ends_at is not None and loop.time() >= ends_at:
                    break
        finally:
            for task in (stop, *tasks):
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            for end in unsubscribe:
                end()
        if failing:
            self._code = max(self._code, UNAVAILABLE)  # it ended with something undecided for want of a store
        for outcome in ends:
            if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
                raise outcome

    async def _one(self, line: Line, events: AsyncIterator[Event]) -> None:
        try:
            async for _ in events:
                pass
            line.ended = "ended"
        except HoldfastError as error:
            # Told by the error listeners already. The other contexts go on: one that was taken over must not
            # stop the rest.
            line.ended = type(error).__name__
            self._code = max(self._code, exit_code(error))

    def _catch_signals(self) -> None:
        def interrupt() -> None:
            if self._interrupted.is_set():
                os._exit(130)  # asked twice: at once, and the store is built for that
            self._interrupted.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)

    @asynccontextmanager
    async def _open_store(self) -> AsyncIterator[Store]:
        where = self._options.store
        watched = self._options.kill_at is not None or self._options.witness_fd is not None
        if where is None and not self._options.route and not watched:
            try:
                yield await when_free(default_store, self._options.on_conflict)
            finally:
                await close_stores()
            return
        where = where or "./dump/data"
        require = Survives.NOTHING if parse_store(where).in_memory else Survives.PROCESS
        routes = {**current_routes(), **routes_of(self._options.route)}
        store = Store(self._backend(where), routes=routes, require=require)
        await when_free(store.open, self._options.on_conflict)
        use_store(store)  # what the user's file reads and writes through the adapters lies there too
        try:
            yield store
        finally:
            use_store(None)
            await store.close()

    def _backend(self, where: str) -> Backend:
        if self._options.kill_at is None and self._options.witness_fd is None:
            return open_backend(where)
        from ..testing.watched import watched_backend

        return watched_backend(where, witness_fd=self._options.witness_fd, kill_at=self._options.kill_at)
