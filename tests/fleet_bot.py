"""A bot for tests of ownership: a market whose clock several processes share, and a record of what each one committed.

The environment says which market (``HOLDFAST_TEST_MARKET``, JSON of :class:`Market`) and where this process writes its
record (``HOLDFAST_TEST_RECORD``, a directory). A record outlives SIGKILL: each line is written as it happens.

Where the market names a venue, orders go there. A file ``stop-PID`` in the record's directory then tells the process to
stop itself, as SIGSTOP does, at the place that the file names: right after an intent was committed (``committed``), or
right before it is sent (``sending``).

``HOLDFAST_TEST_HOME`` (JSON of :class:`Home`) lets a process believe that it lives on another machine.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from holdfast import add_exchange, add_strategy, get_candles, set_config
from holdfast.brokers.paper import ALL, PaperBroker
from holdfast.contract import Guarantees, Key
from holdfast.engine import tenure, worker
from holdfast.engine.broker import Features, OrderReport, OrderRequest
from holdfast.engine.executor import Executor
from holdfast.engine.listeners import default_listeners
from holdfast.engine.session import wall_clock_ms
from holdfast.errors import ConflictError
from holdfast.market.pace import RunningPace
from holdfast.market.protocol import MINUTE_MS
from holdfast.market.replay import LocalMarket
from holdfast.market.synthetic import SyntheticMarket
from holdfast.rows import Event, Order, Owner, Row
from holdfast.store import Store, Writer

EXCHANGE, STRATEGY = "shared", "swift"
HISTORY_MINUTES = 30
"""Candles before the clock begins."""
QUANTITY = 1.0
SLOW_SECONDS = 0.25
"""A commit that takes longer is put on record, whatever became of it."""
GRACE_SECONDS = 0.1
"""How far clocks may be apart."""


class Begun:
    """Seconds since the moment that a file names; 0 until it is there.

    Args:
        path: Holds a time of ``time.monotonic``.
    """

    def __init__(self, path: str) -> None:
        self._path, self._began = Path(path), 0.0

    def __call__(self) -> float:
        if not self._began:
            if not self._path.exists():
                return 0.0
            self._began = float(self._path.read_text())
        return time.monotonic() - self._began


class Home(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that a process believes to live on."""

    host: str
    boot_seconds: int = 0
    """How much longer it has been running than the real one."""
    wall_seconds: int = 0
    """How far its wall clock is ahead."""
    is_namespace: bool = False
    """The kernel keeps name and boot clock apart (``unshare --uts --time``), so only the wall clock is told a lie."""

    def command(self) -> list[str]:
        """Return what starts a command there."""
        if not self.is_namespace:
            return []
        return ["unshare", "--uts", "--time", "--boottime", str(self.boot_seconds), "--fork", "--kill-child"]

    def move_in(self) -> None:
        """Believe it from now on."""
        time_ns, clock_gettime = time.time_ns, time.clock_gettime
        time.__dict__["time_ns"] = lambda: time_ns() + self.wall_seconds * 1_000_000_000
        if self.is_namespace:
            socket.sethostname(self.host)
            return
        shifts = {time.CLOCK_BOOTTIME: self.boot_seconds}
        time.__dict__["clock_gettime"] = lambda clock: clock_gettime(clock) + shifts.get(clock, 0)
        socket.__dict__["gethostname"] = lambda: self.host
        worker.__dict__["machine"] = lambda: self.host


class Market(msgspec.Struct, frozen=True, kw_only=True):
    """A market: the same candles at the same moments in every process of this machine."""

    seed: int
    symbols: tuple[str, ...]
    minutes: int
    began: float = 0.0
    """When its clock began, on ``time.monotonic``; or where :attr:`begins` tells it, 0."""
    begins: str = ""
    """A file that will say when its clock begins; until it is there, the clock stands still."""
    minute_seconds: float
    elsewhere: bool = False
    """Each process believes that it is on a machine of its own: no pid tells the others that it is gone."""
    venue: str = ""
    """Address of a paper venue to which orders go; empty for none."""
    features: Features = ALL
    """What it promises."""
    valid_seconds: float = 0.5
    """How long an order is valid."""

    def exchange(self) -> LocalMarket:
        """Return it as an exchange."""
        history = SyntheticMarket(self.seed, self.symbols, minutes=HISTORY_MINUTES + self.minutes)
        start_ms = history.first_ms + HISTORY_MINUTES * MINUTE_MS
        now = Begun(self.begins) if self.begins else time.monotonic
        pace = RunningPace(start_ms, history.last_ms, speed=60 / self.minute_seconds, now=now)
        pace._began = self.began
        return LocalMarket(history, pace)


async def swift(symbol: str, when_ms: int) -> dict[str, Any] | None:
    """Open something at every chance, and hold it for three minutes at most: many commits, decided by candles alone."""
    candles = await get_candles(symbol, "1m", limit=1)
    if not candles:
        return None
    price = candles[-1].close
    side = 1 if candles[-1].close >= candles[-1].open else -1
    return {
        "position": "long" if side > 0 else "short",
        "priceTakeProfit": price * (1 + side * 0.02),
        "priceStopLoss": price * (1 - side * 0.02),
        "minuteEstimatedTime": 3,
    } | ({"quantity": QUANTITY} if TRADES else {})


class Record:
    """What one process did, a JSON object a line.

    Args:
        directory: Holds the file, named after the process.
    """

    def __init__(self, directory: str) -> None:
        path = Path(directory) / f"{os.getpid()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._stop = path.with_name(f"stop-{os.getpid()}")
        self.line(
            "home", host=socket.gethostname(), boot=worker.boot_seconds(), wall_ms=wall_clock_ms(),
            machine=worker.machine(),
        )  # fmt: skip

    def line(self, kind: str, **what: Any) -> None:
        """Write a line."""
        os.write(self._file, json.dumps({"kind": kind, "t": time.monotonic(), **what}).encode() + b"\n")

    def committed(self, scope: str, number: int, changes: Mapping[Key, Row | None]) -> None:
        """Write a line for an acknowledged commit of a context."""
        if scope != "main":
            return
        owner = next((row for row in changes.values() if isinstance(row, Owner)), None)
        names = {key.entity_name for key in changes if key.domain in ("owner", "session", "outbox", "outage")}
        slots = {f"{key.entity_name}/{key.entity_id}": row is not None for key, row in changes.items()
                 if key.domain == "risk"}  # fmt: skip
        self.line(
            "commit", n=number, context=names.pop() if names else None, slots=slots,
            owner=None if owner is None else {"epoch": owner.epoch, "released": owner.released},
            events=[row.number for row in changes.values() if isinstance(row, Event)],
        )  # fmt: skip
        if any(isinstance(row, Order) and row.state == "intended" for row in changes.values()):
            self.stop_here("committed", under_way=1)

    def stop_here(self, place: str, *, under_way: int = 0) -> None:
        """Stop this process if it was told to do so at this place, from within so many of its commits."""
        is_calm = not IS_CALM or len(UNDER_WAY) <= under_way
        if is_calm and self._stop.exists() and self._stop.read_text() == place:
            self._stop.unlink()
            os.kill(os.getpid(), signal.SIGSTOP)

    def told(self, news: object) -> None:
        """Write a line for an event that somebody was told."""
        if isinstance(news, Event):
            self.line("told", event=news.id, number=news.number, candle_ms=news.candle_ms)


def watch_stores(record: Record) -> None:
    """Have every store that this process opens for writing tell the record of its commits."""
    really_open = Store.open

    async def open_watched(store: Store, *, read_only: bool = False) -> Guarantees:
        found = await really_open(store, read_only=read_only)
        store.observers.append(record.committed)
        return found

    Store.open = open_watched  # type: ignore[method-assign, assignment]


def watch_refusals(record: Record) -> None:
    """Have the record told of every commit of a context that is refused, the moment that it is."""
    surely: Any = tenure.__dict__["commit_surely"]

    async def watched(writer: Writer, *arguments: Any, **more: Any) -> int:
        try:
            number: int = await surely(writer, *arguments, **more)
            return number
        except ConflictError:
            record.line("refused", context=writer.lane)
            raise

    tenure.__dict__["commit_surely"] = watched


def watch_leases() -> None:
    """Know when each context's executor saw last that the lease was held."""
    seen: Any = vars(Executor)["_has_lease"]

    def watched(executor: Executor) -> bool:
        at = time.monotonic()
        held: bool = seen.fget(executor)
        if held and executor._session is not None:
            HELD_AT[executor._session.context.symbol] = at
        return held

    Executor._has_lease = property(watched)  # type: ignore[method-assign, assignment]


def watch_writers() -> None:
    """Know how many commits are under way, and which of them take long."""
    really = Writer.commit

    async def counted(writer: Writer, *arguments: Any, **more: Any) -> int:
        UNDER_WAY.append(writer.name)
        began = time.monotonic()
        try:
            return await really(writer, *arguments, **more)
        finally:
            UNDER_WAY.remove(writer.name)
            if RECORD is not None and (took := time.monotonic() - began) > SLOW_SECONDS:
                RECORD.line("slow", seconds=took)

    Writer.commit = counted  # type: ignore[method-assign, assignment]


class WatchedBroker(PaperBroker):
    """A broker that puts on record what it is about to send."""

    async def submit(self, request: OrderRequest) -> OrderReport:
        """Send an order once."""
        if RECORD is not None:
            held_at = HELD_AT.pop(request.symbol, None)
            RECORD.line("sending", symbol=request.symbol, order=request.client_order_id, held_at=held_at)
            RECORD.stop_here("sending")
        return await super().submit(request)


def set_up() -> Record | None:
    """Do what the environment says; return the record, if there is to be one."""
    global TRADES
    if text := os.environ.get("HOLDFAST_TEST_HOME"):
        msgspec.json.decode(text, type=Home).move_in()
    if text := os.environ.get("HOLDFAST_TEST_MARKET"):
        market = msgspec.json.decode(text, type=Market)
        TRADES = bool(market.venue)
        broker = WatchedBroker(market.venue, features=market.features) if TRADES else None
        add_exchange(market.exchange(), exchange_name=EXCHANGE, broker=broker)
        add_strategy(swift, strategy_name=STRATEGY, interval="1m", symbols=market.symbols)
        set_config(
            entry_validity_seconds=market.valid_seconds, exit_validity_seconds=market.valid_seconds,
            order_grace_seconds=GRACE_SECONDS,
        )  # fmt: skip
        if market.elsewhere:
            worker.machine = lambda: f"elsewhere/{os.getpid()}"
    if directory := os.environ.get("HOLDFAST_TEST_RECORD"):
        record = Record(directory)
        watch_stores(record)
        watch_refusals(record)
        watch_leases()
        watch_writers()
        default_listeners.listen("signal_live", record.told)
        return record
    return None


TRADES = False
HELD_AT: dict[str, float] = {}
"""Of each symbol: when its executor saw last that the lease is held, while nothing was sent on that."""
UNDER_WAY: list[str] = []
IS_CALM = bool(os.environ.get("HOLDFAST_TEST_CALM"))
"""Stop only while no commit is under way: on SQLite it may hold a lock that keeps everybody else out."""
RECORD = set_up()
