"""Kills around orders: a bot is killed at a numbered step, again and again, and its venue is the witness.

``python tests/order_kills.py [--runs N] [--seed S] [--time-cap SECONDS] [--resume FILE]`` prints what it found as JSON.

A step is either side of a call of the store or of the broker. The venue is a process of its own that lives on, and
loses answers and requests, delays them, refuses, fills in part, fills after a cancellation, as each run's plan says.
After the kill (in every second run after another one, during the recovery) the bot is started once more and runs to
its market's end; then what the venue holds is compared with the rows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

sys.path.insert(0, str(Path(__file__).parent))

from fakes import START_MS, FakeMarket, candle

import holdfast
from holdfast.backends.file import FileBackend
from holdfast.brokers.paper import PaperBroker
from holdfast.brokers.paper_venue import VenueProcess
from holdfast.brokers.paper_wire import Fault, Faults
from holdfast.domains import context_key
from holdfast.engine.broker import Features, OrderReport, OrderRequest, RepeatedIds
from holdfast.engine.listeners import Listeners
from holdfast.engine.live import Live
from holdfast.engine.orders import Book, is_ended
from holdfast.engine.registry import Registry
from holdfast.invariants import check_store
from holdfast.names import Context
from holdfast.rows import Order, Trade
from holdfast.store import Store
from holdfast.testing.killer import Countdown, KillerBackend

QUANTITY = 2.0
SIGNALS = 2
LAST_MINUTE = 10
MOST_SECONDS = 60.0
"""A run that takes longer is stuck."""
SUBMITS: list[list[Fault]] = [
    [], ["lost_answer"], ["lost_request"], ["late"], ["", "lost_answer"], ["", "lost_request"], ["", "late"],
    ["partial"], ["part_only"], ["resting"], ["reject"], ["", "reject"], ["", "partial"], ["", "part_only"],
    ["slow"], ["lost_answer"] * 6, ["late", "late", "late"], ["", "resting"], ["reject", "", "lost_answer"],
]  # fmt: skip
CANCELS: list[list[Fault]] = [[], ["lost_answer"], ["lost_request"], ["late"], ["fill_first"], ["fill_after"]]
MODES: list[RepeatedIds] = ["always", "while_open", "never"]


class Plan(NamedTuple):
    """One run: on which venue, with which faults, killed at which steps."""

    number: int
    mode: RepeatedIds
    submits: list[Fault]
    cancels: list[Fault]
    delay_seconds: float
    kills: list[int]


class KillerBroker:
    """A broker with two steps to each call: before it is made, and after its answer came."""

    def __init__(self, broker: PaperBroker, countdown: Countdown) -> None:
        self._broker, self._countdown = broker, countdown
        self.account, self.features = broker.account, broker.features

    async def _stepped(self, name: str, *arguments: Any) -> Any:
        self._countdown.step()
        try:
            return await getattr(self._broker, name)(*arguments)
        finally:
            self._countdown.step()

    async def submit(self, request: OrderRequest) -> OrderReport:
        return await self._stepped("submit", request)  # type: ignore[no-any-return]

    async def find(self, symbol: str, client_order_id: str) -> Any:
        return await self._stepped("find", symbol, client_order_id)

    async def cancel(self, symbol: str, client_order_id: str) -> Any:
        return await self._stepped("cancel", symbol, client_order_id)

    async def open_orders(self, symbol: str | None = None) -> Any:
        return await self._stepped("open_orders", symbol)

    async def history(self, symbol: str, since_ms: int) -> Any:
        return await self._stepped("history", symbol, since_ms)

    async def positions(self) -> Any:
        return await self._stepped("positions")

    async def close(self) -> None:
        await self._broker.close()


def symbol_of(plan: Plan) -> str:
    """Return the run's own symbol: no two runs share orders or positions."""
    return f"S{plan.number}USDT"


def candles() -> list[Any]:
    """Return a market in which a long reaches its target at minute 4 and a short its stop at the end."""
    rises = {4, LAST_MINUTE}
    return [candle(n, 43000, high=44100 if n in rises else 43000) for n in range(-10, LAST_MINUTE + 2)]


class PatientMarket(FakeMarket):
    """A market that lets no minute close while an earlier signal's orders are not settled: they block entries."""

    context = Context("", "", "")

    async def wait_closed(self, participant: str, after_ms: int | None) -> int:
        session = Live._entries[self.context].driver.session
        while session and session.executor and session.executor.blocks_entries:  # noqa: ASYNC110 -- others settle them
            await asyncio.sleep(0.002)
        return await super().wait_closed(participant, after_ms)


def proposals(when_ms: int) -> dict[str, Any] | None:
    """Propose a long at minute 1, and a short at minute 6."""
    minute = (when_ms - START_MS) // 60_000
    common = {"minuteEstimatedTime": 60, "quantity": QUANTITY}
    if minute == 1:
        return {"position": "long", "priceTakeProfit": 44000, "priceStopLoss": 42000, **common}
    if minute == 6:
        return {"position": "short", "priceTakeProfit": 42000, "priceStopLoss": 44000, **common}
    return None


async def bot(place: Path, broker: PaperBroker, symbol: str, kill_at: int) -> int:
    """Run the bot once; return how many steps it took."""
    countdown = Countdown(kill_at)
    backend = KillerBackend(FileBackend(place), 0)
    backend.countdown = countdown
    registry, listeners = Registry(), Listeners()
    market = PatientMarket({symbol: candles()})
    market.context = Context("paper", symbol, "twice")
    listeners.listen("error", lambda failure: None)
    registry.add_exchange(market, exchange_name="paper", broker=KillerBroker(broker, countdown))
    registry.add_strategy(lambda symbol, when_ms: proposals(when_ms), strategy_name="twice", interval="1m")
    store = Store(backend)
    await store.open()
    try:
        run = Live.run(
            symbol, strategy_name="twice", exchange_name="paper", store=store, registry=registry, listeners=listeners,
            sleep=lambda seconds: asyncio.sleep(min(seconds, 0.01)),
        )  # fmt: skip
        async for _ in run:
            pass
    finally:
        await store.close()
    return countdown.steps


def forked(place: Path, broker: PaperBroker, symbol: str, kill_at: int) -> int:
    """Run the bot in a process of its own; return its end: steps taken, or minus the signal that ended it."""
    return forked_in(lambda: bot(place, broker, symbol, kill_at), symbol)


def forked_in(life: Callable[[], Coroutine[Any, Any, int]], name: str) -> int:
    """Run something that counts steps in a process of its own; return its end as :func:`forked`."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.close(reading)
            signal.alarm(round(MOST_SECONDS))
            steps = asyncio.run(life())
            os.write(writing, b"%d" % steps)
            code = 0
        except BaseException as error:
            print(f"{name}: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(writing)
    told = os.read(reading, 100)
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return -os.WTERMSIG(status)
    return int(told) if told and os.WEXITSTATUS(status) == 0 else -1000 - os.WEXITSTATUS(status)


async def judge(place: Path, plan: Plan, venue: VenueProcess) -> list[str]:
    """Compare what the venue holds with the rows; return what is wrong."""
    symbol = symbol_of(plan)
    context = Context("paper", symbol, "twice")
    store = Store(FileBackend(place))
    await store.open(read_only=True)
    try:
        wrong = [str(one) for one in await check_store(store)]
        name = context_key("session", context).entity_name
        rows = [loaded.row for loaded in (await store.scan("order", name)).values()]
        trades = [loaded.row for loaded in (await store.scan("ledger", name)).values()]
        signals = await store.scan("signal", name)
    finally:
        await store.close()
    book = Book(row for row in rows if isinstance(row, Order))
    witness = venue.witness()
    taken: dict[str, list[OrderReport]] = defaultdict(list)
    for report in witness.orders:
        if report.symbol == symbol:
            taken[report.client_order_id].append(report)
    wrong += [f"twice: {name} was taken {len(those)} times" for name, those in taken.items() if len(those) > 1]
    for name, those in taken.items():
        row = book.orders.get(name)
        if row is None:
            wrong.append(f"forgotten: the venue took {name}, which has no row")
        elif not math.isclose(row.filled_quantity, sum(one.filled_quantity for one in those), abs_tol=1e-9):
            wrong.append(f"forgotten: {name} is filled {those[0].filled_quantity}, its row says {row.filled_quantity}")
        elif those[-1].state in ("open", "partial"):
            wrong.append(f"forgotten: {name} rests at the venue")
    wrong += [f"forgotten: {o.client_order_id} is {o.state}" for o in book.orders.values() if not is_ended(o)]
    wrong += [
        f"twice: {o.client_order_id} filled too much" for o in book.orders.values() if o.filled_quantity > QUANTITY
    ]
    opens = Counter(order.signal_id for order in book.orders.values() if order.action == "open")
    wrong += [f"twice: {signal_id} has {n} entries" for signal_id, n in opens.items() if n > 1]
    held = sum(p.quantity * (1 if p.side == "long" else -1) for p in witness.positions if p.symbol == symbol)
    if held or signals:
        wrong.append(f"position: {held} is held, {len(signals)} signals are open at the end")
    wrong += [f"position: {signal_id} leaves {book.position(signal_id)}" for signal_id in book.unsettled()]
    traded = {trade.id for trade in trades if isinstance(trade, Trade)}
    for signal_id in book.signal_ids():
        entry = book.entry(signal_id)
        filled = entry is not None and entry.filled_quantity > 0
        if filled and signal_id not in traded and "fill_after" in plan.cancels:
            continue  # nothing was filled when the signal was cancelled; what came later was closed
        if filled != (signal_id in traded):
            wrong.append(f"ledger: {signal_id} is {'' if signal_id in traded else 'not '}in it, its entry is {entry}")
    if len(opens) != SIGNALS:
        wrong.append(f"forgotten: {len(opens)} of {SIGNALS} signals have an order: {sorted(opens)}")
    return wrong


class Found(msgspec.Struct, kw_only=True):
    """What the runs have come to."""

    runs: int = 0
    kills: int = 0
    restarts: int = 0
    venue_orders: int = 0
    lost: int = 0
    """Requests whose answer, or which themselves, were lost or late."""
    during: dict[str, int] = {}
    twice: list[str] = []
    forgotten: list[str] = []
    without_row: list[str] = []
    other: list[str] = []

    @property
    def wrong(self) -> list[str]:
        """Everything that was wrong."""
        return [*self.twice, *self.forgotten, *self.without_row, *self.other]


def plans(runs: int, seed: int, steps: int) -> list[Plan]:
    """Return the plans: every step of an undisturbed run is killed at in turn, with each kind of fault."""
    made = []
    for number in range(runs):
        chance = random.Random(f"{seed}/{number}")
        submits = SUBMITS[number % len(SUBMITS)] if number < 2 * steps else chance.choice(SUBMITS)
        first = 1 + (number * 7) % (steps + 6)  # 7 and steps + 6 share no factor, most likely: all come in turn
        kills = [first] if number % 2 == 0 else [first, chance.randint(1, steps)]
        resting = "resting" in submits or "partial" in submits
        made.append(
            Plan(
                number,
                MODES[chance.randrange(3)],
                list(submits),
                list(chance.choice(CANCELS)) if resting else [],
                chance.choice([0.02, 0.08, 0.25]),
                kills,
            )
        )
    return made


def run_one(plan: Plan, venue: VenueProcess, place: Path, found: Found) -> None:
    """Kill, restart, and judge."""
    symbol, broker = symbol_of(plan), venue.broker()
    venue.set_faults(Faults(next=plan.submits, next_cancel=plan.cancels, delay_seconds=plan.delay_seconds))
    ends = []
    for kill_at in [*plan.kills, 0]:
        ended = forked(place, broker, symbol, kill_at)
        ends.append(ended)
        if ended == -signal.SIGKILL:
            found.kills += 1
            found.restarts += 1
            continue
        if ended < 0:
            found.other.append(f"run {plan.number}: ended with {ended}: {plan}")
            return
    time.sleep(plan.delay_seconds + 0.05 if "late" in plan.submits + plan.cancels else 0)
    wrong = asyncio.run(judge(place, plan, venue))
    found.runs += 1
    found.lost += sum(one in ("lost_answer", "lost_request", "late") for one in plan.submits + plan.cancels)
    for text in wrong:
        where = {"twice": found.twice, "forgotten": found.forgotten, "position": found.without_row}
        where.get(text.partition(":")[0], found.other).append(f"run {plan.number}: {text}; {plan} {ends}")


def hunt(
    runs: int, *, seed: int = 1, time_cap: float = math.inf, resume: Path | None = None, only: int = -1,
    part: tuple[int, int] = (0, 1),
) -> Found:  # fmt: skip
    """Do one of so many parts of ``runs`` runs; with ``resume`` go on where that file stopped."""
    holdfast.set_config(entry_validity_seconds=0.15, exit_validity_seconds=0.1, order_grace_seconds=0.05)
    found, ends = Found(), time.monotonic() + time_cap
    if resume is not None and resume.exists():
        found = msgspec.json.decode(resume.read_bytes(), type=Found)
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-order-kills-")))
        venues = {
            mode: stack.enter_context(
                VenueProcess(Features(refuses_repeated_ids=mode, refuses_expired=True, reduce_only=True))
            )
            for mode in MODES
        }
        steps = forked(top / "steps", venues["always"].broker(), "STEPS", 0)
        assert steps > 20, steps
        for plan in plans(runs, seed, steps)[part[0] :: part[1]][found.runs :]:
            if only not in (-1, plan.number):
                continue
            if time.monotonic() > ends or found.wrong:
                break
            place = top / str(plan.number)
            run_one(plan, venues[plan.mode], place, found)
            shutil.rmtree(place, ignore_errors=True)
            if resume is not None:
                resume.write_bytes(msgspec.json.encode(found))
        found.venue_orders += sum(len(venue.witness().orders) for venue in venues.values())
    return found


def main(argv: Sequence[str]) -> int:
    """Hunt, print what was found, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, default=-1, metavar="RUN", help="this one alone")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="part I of N, counted from 0")
    parser.add_argument("--time-cap", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--resume", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    this, _, all_parts = options.part.partition("/")
    found = hunt(
        options.runs, seed=options.seed, time_cap=options.time_cap, resume=options.resume, only=options.only,
        part=(int(this), int(all_parts)),
    )  # fmt: skip
    print(json.dumps(msgspec.to_builtins(found)))
    return int(bool(found.wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
