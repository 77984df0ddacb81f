"""``holdfast torture``: kill a live run again and again, and compare with one that was never killed."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from ..contract import Key
from ..domains import context_key
from ..engine.registry import default_registry
from ..errors import FailedError, InvalidInputError
from ..market.pace import Pace
from ..market.serve import build_market
from ..rows import Outage
from ..rules.params import get_config
from ..testing.desk import with_quantities
from ..testing.places import derived
from ..testing.pure import pure_rows
from ..testing.torture import Plan, Round, torture
from ..urls import open_backend, parse_store
from .exits import LOSS, OK
from .loading import load_bot
from .plan import Plan as RunPlan
from .plan import make_plan
from .tables import fancy, print_json, print_table

_MINUTES = 3000


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "torture",
        help="kill a run again and again, and compare with one that was never killed",
        description="Run BOT.py over a market that waits for it, kill the process with SIGKILL at random instants and "
        "at numbered steps, also while it recovers, and compare what is stored at the end, byte for byte, with a run "
        "over the same candles that was never killed. Exit code 1 on any loss.",
    )
    parser.add_argument("bot", metavar="BOT.py", help="a Python file that adds strategies")
    parser.add_argument(
        "--store", default="", metavar="PATH|URL",
        help="beside which store each run gets a place of its own, removed afterwards (default: temporary files)",
    )  # fmt: skip
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="how many random kills (default: 100)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="for the market and the kills (default: 1)")
    parser.add_argument("--symbols", default="", metavar="A,B", help="run on these (default: each strategy's own)")
    parser.add_argument("--market", metavar="FILE[,FILE…]", help="candle files (default: a synthetic market)")
    parser.add_argument("--minutes", type=int, metavar="N", help=f"of market in a round of 100 kills ({_MINUTES})")
    parser.add_argument(
        "--speed", type=float, metavar="N",
        help="a market that does not wait, N times real time; the trades are then compared with the pure step over the "
        "same candles, entries forbidden in the outages that were recorded",
    )  # fmt: skip
    parser.add_argument(
        "--every-step", "--steps", dest="steps", action="store_true", help="first kill at every numbered step"
    )
    parser.add_argument("--server-kills", type=int, default=0, metavar="N", help="also kill the server so often")
    parser.add_argument(
        "--server", default="", metavar="COMMAND",
        help="kills the store's server with SIGKILL, starts it again and returns when it answers",
    )  # fmt: skip
    parser.add_argument(
        "--orders", action="store_true",
        help="trade at a paper venue that loses answers and requests, and compare what it holds with the rows at the "
        "end; what a strategy proposes without a quantity gets one",
    )  # fmt: skip
    parser.add_argument(
        "--takeovers", type=int, default=0, metavar="N",
        help="so often a second process waits when the first is killed, and goes on (stores that processes share)",
    )  # fmt: skip
    parser.add_argument(
        "--pauses", type=int, default=0, metavar="N",
        help="so often the first is stopped past its lease, replaced and woken: it must end by itself (same stores)",
    )  # fmt: skip
    parser.add_argument("--resume", metavar="DIR", help="keep results there, and go on where an earlier call stopped")
    parser.add_argument("--time-cap", type=float, default=0.0, metavar="SECONDS", help="begin no round after so long")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--plain", action="store_true", help="no colours, no bar")
    parser.set_defaults(command=_torture)


def _torture(options: argparse.Namespace) -> int:
    if options.kills < 1 and not options.steps:
        raise InvalidInputError(f"--kills is {options.kills}: without --steps at least 1 is needed, to prove something")
    for name, value in (("--minutes", options.minutes), ("--time-cap", options.time_cap), ("--speed", options.speed)):
        if value is not None and (value < 0 or (value == 0 and name != "--time-cap")):
            raise InvalidInputError(f"{name} is {value:g}: give a number above 0")
    if bool(options.server) != (options.server_kills > 0):
        raise InvalidInputError("--server-kills N and --server COMMAND belong together: give both, or neither")
    if options.takeovers < 0 or options.pauses < 0:
        raise InvalidInputError("--takeovers and --pauses count: give 0 or more")
    if options.takeovers or options.pauses:
        _require_shared(options.store)
    server = None
    if command := shlex.split(options.server):
        server = partial(_run_hook, command)
    with tempfile.TemporaryDirectory(prefix="holdfast-torture-") as scratch:
        plan = torture_plan(options, work=options.resume or scratch)
        with _progress(plain=options.plain or options.json) as progress:
            found = torture(plan, progress, server=server)
    if options.json:
        plain: Any = msgspec.to_builtins(found)
        print_json(plain | {"ok": found.ok})
    else:
        _print(found, plan, plain=options.plain)
    return OK if found.ok else LOSS


def _require_shared(store: str) -> None:
    if (
        not store
        or any(place.partition(":")[0] in ("file", "memory") for place in parse_store(store).places)
        or any(parse_store(store).folders)
    ):
        raise InvalidInputError(
            "--takeovers and --pauses need a store that processes share: give --store a URL of sqlite, redis, "
            "postgresql, mongodb or s3 (a folder belongs to one process)"
        )


def _run_hook(command: Sequence[str]) -> None:
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise FailedError(f"--server {command[0]} ended with {done.returncode}: it must bring the server back")


def torture_plan(options: argparse.Namespace, *, work: str) -> Plan:
    """Return what the options of the command ask for; loads the bot into this process.

    Raises:
        InvalidInputError: The bot, the market or the store cannot be used.
    """
    load_bot(options.bot)
    if options.orders:
        with_quantities(default_registry)
    symbols = [symbol for symbol in options.symbols.split(",") if symbol]
    minutes = options.minutes or (None if options.market else _MINUTES)
    if options.store:
        open_backend(derived(options.store, "torture").store)  # complains now, not in the middle

    def planned(seed: int) -> RunPlan:
        return make_plan(
            default_registry, symbols=symbols, market=options.market or f"synthetic:{seed}",
            speed="wait" if options.speed is None else f"{options.speed:g}", minutes=minutes,
        )  # fmt: skip

    first = planned(options.seed)  # complains now, not in the middle

    async def expected(seed: int, outages: Mapping[str, Sequence[Outage]]) -> dict[Key, bytes]:
        """What the killed run must have stored, by the pure step."""
        offered = list(dict.fromkeys(context.symbol for context in first.contexts))
        market, _ = build_market(
            synthetic=None if options.market else seed, candles=options.market.split(",") if options.market else (),
            symbols=() if options.market else offered, speed=options.speed, minutes=minutes,
        )  # fmt: skip
        market.pace = _Ended(market.pace)
        default_registry.remove_exchange(first.exchange_name)
        default_registry.add_exchange(market, exchange_name=first.exchange_name)
        by_context = {one: outages.get(context_key("outage", one).entity_name, ()) for one in first.contexts}
        return await pure_rows(market, default_registry, get_config(), by_context)

    return Plan(
        bot=str(Path(options.bot).resolve()), kills=options.kills, seed=options.seed, steps=options.steps,
        server_kills=options.server_kills, work=work, store=options.store, time_cap_seconds=options.time_cap,
        market=lambda seed: planned(seed).server, run=("--symbols", options.symbols) if symbols else (),
        waits=options.speed is None, expected=expected,
        orders=options.orders, takeovers=options.takeovers, pauses=options.pauses,
        shares_limits=any(one.risk_names for one in default_registry.list_strategies()),
        run_seconds=(minutes or _MINUTES) * 60 / options.speed if options.speed else 1.0,
    )  # fmt: skip


class _Ended:
    """The clock of a market whose every candle has closed."""

    def __init__(self, pace: Pace) -> None:
        self.start_ms, self.end_ms, self.present_ms = pace.start_ms, pace.end_ms, pace.end_ms

    async def wait_closed(self, participant: str, after_ms: int | None) -> int:
        return self.end_ms

    def leave(self, participant: str) -> None:
        pass


@contextmanager
def _progress(*, plain: bool) -> Iterator[Callable[[Round, int], None]]:
    if not fancy(plain=plain):
        yield _plain_progress
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("kills"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tail]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("kills", total=None, tail="")

        def show(so_far: Round, kills: int) -> None:
            tail = f"{so_far.commits} commits acknowledged, {len(so_far.lost)} lost"
            bar.update(task, completed=so_far.kills, total=kills, tail=tail)

        yield show


def _plain_progress(so_far: Round, kills: int) -> None:
    if so_far.kills % 25 == 0 and so_far.kills:
        print(f"{so_far.kills}/{kills} kills, {so_far.commits} commits, {len(so_far.lost)} lost", file=sys.stderr)


def _compared(found: Round) -> str:
    if not found.lives:
        return "not compared: no round was run"
    if not found.identical or found.broken:
        return "no"
    if found.uncompared:
        return "not compared where another process took over contexts that share limits: who asks first decides"
    return "yes" if found.trades else "yes, but the bot never traded: nothing much was proved"


def _of(done: int, asked: int) -> str:
    """Say how many of what was asked for were done: the time may be up, or each market too short."""
    return f"{done}" if done >= asked else f"{done} of {asked}"


def _print(found: Round, plan: Plan, *, plain: bool) -> None:
    during = ", ".join(f"{phase} {count}" for phase, count in sorted(found.during.items(), key=lambda item: -item[1]))
    rows = [
        ("kills", _of(found.kills, plan.kills)),
        *([("kills of the server", _of(found.server_kills, plan.server_kills))] if plan.server_kills else []),
        ("during", during or "-"),
        ("twice in a row", f"{found.twice_in_a_row}"),
        *([("taken over by one that waited", _of(found.takeovers, plan.takeovers))] if plan.takeovers else []),
        *([("paused, replaced and woken", _of(found.pauses, plan.pauses))] if plan.pauses else []),
        *([("paused with a lock of the store's", f"{found.blocked}")] if found.blocked else []),
        *(
            [
                ("kills around orders", f"{found.order_kills}"),
                ("orders at the venue", f"{found.orders}"),
                ("requests or answers lost or late", f"{found.answers_lost}"),
            ]
            if found.orders
            else []
        ),
        ("recoveries", f"{found.recoveries}"),
        ("commits acknowledged", f"{found.commits}"),
        ("lost", f"{len(found.lost)}"),
        ("duplicated", f"{len(found.duplicated)}"),
        ("invariants broken", f"{len(found.broken)}"),
        ("events repeated", f"{found.events_repeated} (same id: a consumer drops them)"),
        ("trades", f"{found.trades}"),
        ("ledger identical", _compared(found)),
        ("seconds", f"{found.seconds:.1f}"),
    ]
    print_table("Torture", ("what", "count"), [list(row) for row in rows], plain=plain)
    for name in found.kept:
        print(f"kept: {name}")
    for text in (*found.lost, *found.duplicated, *found.broken, *found.differences)[:10]:
        print(text)
