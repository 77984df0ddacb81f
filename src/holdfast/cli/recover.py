"""``holdfast recover``: what was missed while the bot was down, and what comes of it; shown first, or done."""

from __future__ import annotations

import argparse
import asyncio
import getpass
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from ..contract import Survives
from ..documents.adapters import current_routes
from ..domains import context_key, to_mapping
from ..engine.gap_run import GapReport, GapRun
from ..engine.plan import Outlook
from ..engine.registry import default_registry
from ..errors import HoldfastError, InvalidInputError
from ..market.past import PastMarket
from ..market.replay import ReplayMarket
from ..names import Context
from ..rows import Event, SessionRow, Signal
from ..rules.params import get_config
from ..store import Store
from ..urls import open_backend
from .exits import OK, STOPPED, UNAVAILABLE, complain, exit_code
from .loading import load_bot
from .opening import DEFAULT_STORE, add_route_option, require_store, routes_of
from .plan import Plan, make_plan
from .tables import moment, number, percent, print_json, print_table


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "recover",
        help="what was missed while the bot was down, and what comes of it: shown first, or done",
        description="Step the candles that were missed since the last decision, for everything that is open or waits. "
        "With --plan nothing is changed. Nothing is entered: that is for the next run.",
    )
    parser.add_argument("bot", metavar="BOT.py", help="the Python file that the bot runs")
    parser.add_argument("--plan", action="store_true", help="show what would be done, and change nothing")
    parser.add_argument(
        "--decide",
        choices=("step", "close"),
        help="instead of each strategy's own policy: what the rules say; or that, and close what is still open then",
    )
    parser.add_argument("--symbols", default="", metavar="A,B", help="only these (default: each strategy's own)")
    parser.add_argument("--strategy", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    parser.add_argument("--exchange", metavar="NAME", help="which exchange, where the file adds several")
    parser.add_argument("--store", metavar="PATH|URL", help="where state is kept (default: ./dump/data)")
    parser.add_argument(
        "--market",
        metavar="MARKET",
        help="candles from elsewhere than the file's exchange: synthetic:SEED, candle FILE[,FILE…], or tcp://host:port",
    )
    parser.add_argument(
        "--minutes", type=int, metavar="N", help="with --market: N minutes after the newest decision (default: its end)"
    )
    add_route_option(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    parser.add_argument("--plain", action="store_true", help="no colours, no frames")
    parser.set_defaults(command=_recover_command)


def operator() -> str:
    """Return who sits here, as user@host, for what is recorded."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


@asynccontextmanager
async def opened(where: str | None, routes: Sequence[str], *, read_only: bool) -> AsyncIterator[Store]:
    """Open the store that a bot writes to, its routes included; never makes one.

    Raises:
        InvalidInputError: There is none there.
        HeldError: It is open elsewhere, and belongs to one process.
    """
    where = DEFAULT_STORE if where is None else where
    if not where:
        raise InvalidInputError("the store's name is empty: name the folder that the bot writes to")
    require_store(where)
    store = Store(
        open_backend(where), routes={**current_routes(), **routes_of(routes)},
        require=Survives.NOTHING if read_only else Survives.PROCESS,
    )  # fmt: skip
    await store.open(read_only=read_only)
    try:
        yield store
    finally:
        await store.close()


def _recover_command(options: argparse.Namespace) -> int:
    if options.minutes is not None and (options.minutes < 1 or options.market is None):
        raise InvalidInputError(f"--minutes is {options.minutes}: give --market too, and at least 1")
    symbols = [symbol for symbol in options.symbols.split(",") if symbol]
    if options.symbols and not symbols:
        raise InvalidInputError(f"--symbols {options.symbols!r:.40} names none: write them as A,B")
    load_bot(options.bot)
    plan = make_plan(
        default_registry, symbols=symbols, strategies=options.strategy, exchange=options.exchange,
        market=options.market,
    )  # fmt: skip
    return asyncio.run(_recover(options, plan))


async def _recover(options: argparse.Namespace, plan: Plan) -> int:
    async with opened(options.store, options.route, read_only=options.plan) as store:
        client = await _use_market(plan, store, options.minutes)
        run = GapRun(store, operator=operator(), wanted=options.decide)
        reports: list[GapReport] = []
        code = OK
        try:
            for context in plan.contexts:
                try:
                    report = await (run.plan(context) if options.plan else run.recover(context))
                    code = max(code, UNAVAILABLE if report.failed or report.unasked else OK)
                    reports.append(report)
                except HoldfastError as error:  # one that cannot be recovered must not hold up the others
                    reports.append(GapReport(context=context, failed=str(error)))
                    code = max(code, exit_code(error))
        finally:
            if client is not None:
                await client.close()
            for name in {context.exchange_name for context in plan.contexts}:
                broker = default_registry.exchange(name).broker
                if broker is not None:
                    await broker.close()
        others = await _unclaimed(store, plan.contexts)
    for report in reports:
        for said in (report.failed, report.unasked):
            if said:
                complain(said if str(report.context) in said else f"{report.context}: {said}")
    if options.json:
        print_json(as_json(reports, others, planned=options.plan))
    else:
        _print(reports, others, planned=options.plan, plain=options.plain)
    if any(report.stopped or report.undecided for report in reports):
        code = max(code, STOPPED)
    return code


async def _use_market(plan: Plan, store: Store, minutes: int | None) -> ReplayMarket | None:
    """Have the bot's exchange replaced by the market that was named; return what must be closed, if anything."""
    if plan.address:
        client = ReplayMarket(plan.address)
        default_registry.remove_exchange(plan.exchange_name)
        default_registry.add_exchange(client, exchange_name=plan.exchange_name)
        return client
    if plan.server:
        from ..market.serve import build_market

        synthetic = plan.server[0] == "--synthetic"
        decided = [context_key("session", context) for context in plan.contexts]
        rows = [loaded.row for loaded in (await store.salvage(*decided))[0].values()]
        market, info = build_market(
            synthetic=int(plan.server[1]) if synthetic else None,
            candles=() if synthetic else plan.server[1].split(","),
            symbols=plan.server[3].split(",") if synthetic else (),
            speed=1.0, minutes=minutes,
            resume_ms=max((row.last_candle_ms for row in rows if isinstance(row, SessionRow)), default=0),
        )  # fmt: skip
        default_registry.remove_exchange(plan.exchange_name)
        past = PastMarket(market.history, info.end_ms)
        default_registry.add_exchange(past, exchange_name=plan.exchange_name)
    return None


async def _unclaimed(store: Store, known: Sequence[Context]) -> list[Signal]:
    """Return what is open or waits and belongs to no context that was recovered."""
    rows = [
        loaded.row for domain in ("signal", "schedule") for loaded in (await store.scan(domain)).values()
        if isinstance(loaded.row, Signal)
    ]  # fmt: skip
    return [row for row in rows if row.context not in known]


# ---------------------------------------------------------------------- telling


def sentence(outlook: Outlook) -> str:
    """Say what a verdict means, in words."""
    at = moment(outlook.at_ms or 0)
    last = outlook.events[-1] if outlook.events else None
    earned = percent(None if last is None else last.pnl_percent)
    reached = [f"+{level}" for level in outlook.levels.profit_levels] + [f"-{n}" for n in outlook.levels.loss_levels]
    levels = f"; levels {' '.join(reached)}" if reached else ""
    both = ""
    if outlook.both_hit and last is not None:
        both = f": stop and target lie in one candle, and both_hit ({get_config().both_hit}) makes it the {last.reason}"
    what = {
        "hit_stop": f"hit its stop at {at}{both} ({earned})",
        "hit_target": f"hit its target at {at}{both} ({earned})",
        "expired": f"its time was over at {at} ({earned})",
        "closed": f"is closed at {number(None if last is None else last.price_close)} ({earned})",
        "partial": "still valid",
        "still_valid": "still valid",
        "still_waiting": "waits on",
        "activated": f"is entered at {at}",
        "timed_out": f"waited too long at {at}",
        "cancelled": f"is cancelled at {at} ({None if last is None else last.reason})",
        "rejected": f"its entry at {at} was refused by its risk profile",
        "no_candles": "the exchange gives no candle since the last decision: nothing can be said",
    }[outlook.verdict] + levels  # fmt: skip
    if outlook.entry_passed_ms is not None:
        what += (
            f"; its entry price was reached at {moment(outlook.entry_passed_ms)}, and nothing is entered for the past"
        )
    return what


def _print(reports: Sequence[GapReport], others: Sequence[Signal], *, planned: bool, plain: bool) -> None:
    lines = []
    for report in reports:
        outlook = report.outlook
        if outlook is None:
            if report.failed or report.stopped:
                what = f"failed: {report.failed}" if report.failed else "stopped: in quarantine, see below"
                lines.append([str(report.context), "-", "-", "-", "-", what])
            continue
        missed = f"{outlook.candles}" + (f" (and {outlook.missing_minutes} without)" if outlook.missing_minutes else "")
        told = "not yet: somebody must" if report.undecided else report.decided or "-"
        lines.append(
            [str(report.context), outlook.signal.id, f"{moment(outlook.from_ms)} … {moment(outlook.until_ms)}", missed,
             told, f"{outlook.verdict}: {sentence(outlook)}"]
        )  # fmt: skip
    columns = ("context", "signal", "missed", "candles", "decided", "verdict")
    if lines:
        print_table(_title(reports, planned=planned), columns, lines, plain=plain)
    else:
        print(_title(reports, planned=planned))
    words = [
        [str(report.context), one.word, one.what, one.client_order_id or one.signal_id or "-", one.stored or "-",
         one.venue or "-", one.then]
        for report in reports for one in report.venue
    ]  # fmt: skip
    words += [
        [str(report.context), "not_asked", "-", "-", "-", "-", f"it could not be asked: {report.unasked}"]
        for report in reports if report.unasked
    ]  # fmt: skip
    if words:
        heads = ("context", "verdict", "of", "id", "stored", "at the venue", "then")
        print_table("At the venue", heads, words, plain=plain)
    for report in reports:
        for reason in report.stopped:
            print(f"{report.context}: in quarantine: {reason}")
        if report.undecided:
            print(report.undecided)
    for row in others:
        what = "waits" if row.is_scheduled else "is open"
        print(f"{row.context}: {row.id!r} {what}, and no strategy of this file on these symbols watches it")


def _title(reports: Sequence[GapReport], *, planned: bool) -> str:
    """Say what was done, and how much of it there is to see."""
    count = len(reports)
    failed = sum(bool(report.failed) for report in reports)
    done = sum(not (one.failed or one.undecided or (one.stopped and one.outlook is None)) for one in reports)
    quiet = sum(report.outlook is None and not (report.failed or report.stopped) for report in reports)
    title = "Recovery plan (nothing was changed)" if planned else "Recovered" if done else "Not recovered"
    if not planned and 0 < done < count:
        title = f"Recovered {done} of {count} contexts"
    told = [f"{failed} of {count} contexts failed"] if failed else []
    if quiet:
        where = f"{quiet} of {count} contexts" if count > 1 else "the context"
        told.append(f"nothing is open or waits in {where}")
    return "; ".join((title, *told))


def as_json(reports: Sequence[GapReport], others: Sequence[Signal], *, planned: bool) -> dict[str, Any]:
    """Return what was found, and done, as plain values."""
    return {
        "planned": planned,
        "contexts": [_report_json(report) for report in reports],
        "unclaimed": [to_mapping(row) for row in others],
    }


def _report_json(report: GapReport) -> dict[str, Any]:
    context, outlook = report.context, report.outlook
    told: dict[str, Any] = {
        "exchange": context.exchange_name, "symbol": context.symbol, "strategy": context.strategy_name,
        "verdict": None, "decided": report.decided, "undecided": report.undecided or None,
        "failed": report.failed or None, "venueFailed": report.unasked or None,
        "stopped": list(report.stopped), "committed": [event.number for event in report.events],
        "venue": [msgspec.to_builtins(one) for one in report.venue],
    }  # fmt: skip
    if outlook is not None:
        told |= {
            "verdict": outlook.verdict, "text": sentence(outlook), "signal": to_mapping(outlook.signal),
            "waited": outlook.waited, "atMs": outlook.at_ms, "bothHit": outlook.both_hit,
            "fromMs": outlook.from_ms, "untilMs": outlook.until_ms, "candles": outlook.candles,
            "missingMinutes": outlook.missing_minutes, "entryPassedMs": outlook.entry_passed_ms,
            "events": [_event_json(event) for event in outlook.events],
        }  # fmt: skip
    return told


def _event_json(event: Event) -> dict[str, Any]:
    plain = to_mapping(event)
    del plain["signal"]
    return plain
