"""The bot that is killed around its orders: one life of it, in a process forked off one that has everything loaded.

The process that forks keeps no thread and no event loop; whatever needs one is done in a child.
"""

from __future__ import annotations

import asyncio
import json
import logging
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fakes import START_MS, FakeMarket, candle

from holdfast.brokers.paper import PaperBroker
from holdfast.contract import Backend, Key, Op, Survives
from holdfast.engine import worker
from holdfast.engine.broker import OrderReport, OrderRequest
from holdfast.engine.listeners import Failure, Listeners
from holdfast.engine.live import Live
from holdfast.engine.registry import Registry
from holdfast.errors import ConflictError, FencedError, OrderError, UnavailableError
from holdfast.names import Context
from holdfast.store import Store
from holdfast.testing.killer import Countdown, KillerBackend
from holdfast.urls import open_backend

QUANTITY = 2.0
SIGNALS = 2
LAST_MINUTE = 10
MOST_SECONDS = 60.0
"""A life that takes longer is stuck."""
_NOTE_BYTES = 64


class Life(NamedTuple):
    """One process of a run."""

    number: int
    url: str
    place: Path
    """Of the run: where it leaves word."""
    broker: PaperBroker
    symbol: str
    kill_at: int
    """At which step it ends; 0: never. Of a process that waits: counted from when it owns the context."""
    stops: bool = False
    """At that step it is paused and not killed."""
    lease_seconds: float = 0.0
    """On a store that processes share; 0 for one that belongs to one process."""
    elsewhere: bool = False
    """Its neighbours must think that it ran on another machine: they cannot see that its process is gone."""
    holds: bool = False
    """Once it owns the context it waits until it is told to go on."""

    def word(self, name: str) -> Path:
        """Return a file by which this life and the process that started it tell each other something."""
        return self.place / f"{name}-{self.number}"


class Steps(Countdown):
    """Counts steps, and leaves the name of the newest where it outlives the process."""

    def __init__(self, life: Life, note: mmap.mmap) -> None:
        super().__init__(life.kill_at)
        self._stops, self._note = life.stops, note
        self.name = ""

    def step(self) -> None:
        """Die, or stop, if it is time."""
        caller = sys._getframe(1).f_code.co_name
        self._note[:_NOTE_BYTES] = (self.name if caller == "_step" else caller).encode().ljust(_NOTE_BYTES)
        if self._stops:
            self.steps += 1
            if self.steps == self.kill_at:
                os.kill(os.getpid(), signal.SIGSTOP)
        else:
            super().step()


class Log:
    """What a life leaves on record of itself: whole lines, whatever kills it."""

    def __init__(self, life: Life) -> None:
        self._fd = os.open(life.word("log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def tell(self, kind: str, **more: Any) -> None:
        """Append a line."""
        line = {"kind": kind, "at": time.monotonic(), "pid": os.getpid(), **more}
        os.write(self._fd, json.dumps(line).encode() + b"\n")


class KillerBroker:
    """A broker with two steps to each call: before it is made, and after its answer came."""

    def __init__(self, broker: PaperBroker, countdown: Countdown) -> None:
        self._broker, self._countdown = broker, countdown
        self.account, self.features = broker.account, broker.features

    async def _stepped(self, name: str, *arguments: Any) -> Any:
        self._step(name)
        try:
            return await getattr(self._broker, name)(*arguments)
        finally:
            self._step(name)

    def _step(self, name: str) -> None:
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


class ToldBroker(KillerBroker):
    """A broker that is killed at steps, and puts on record what it is about to send."""

    def __init__(self, broker: PaperBroker, steps: Steps, log: Log) -> None:
        super().__init__(broker, steps)
        self._steps, self._log = steps, log

    def _step(self, name: str) -> None:
        self._steps.name = name
        self._steps.step()

    async def submit(self, request: OrderRequest) -> OrderReport:
        self._log.tell("sends", order=request.client_order_id)
        return await super().submit(request)


class ToldBackend(KillerBackend):
    """A backend that is killed at steps, and puts on record when a commit of the session was refused."""

    def __init__(self, backend: Backend, steps: Steps, log: Log) -> None:
        super().__init__(backend, 0)
        self.countdown, self._log = steps, log

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        """Commit, killed before or after it if it is time."""
        try:
            return await super().commit(scope, changes, expect, op=op)
        except ConflictError:
            if any(key.domain == "owner" and key not in changes for key in expect):
                self._log.tell("refused")
            raise


class PatientMarket(FakeMarket):
    """A market that lets no minute close while an earlier signal's orders are not settled: they block entries."""

    context = Context("", "", "")
    life: Life | None = None

    async def wait_closed(self, participant: str, after_ms: int | None) -> int:
        life, self.life = self.life, None
        if life is not None:
            life.word("owns").touch()
            while life.holds and not life.word("goes").exists():  # noqa: ASYNC110 -- another process
                await asyncio.sleep(0.002)
        session = Live._entries[self.context].driver.session
        while session and session.executor and session.executor.blocks_entries:  # noqa: ASYNC110 -- others settle them
            await asyncio.sleep(0.002)
        return await super().wait_closed(participant, after_ms)


def candles() -> list[Any]:
    """Return a market in which a long reaches its target at minute 4 and a short its stop at the end."""
    rises = {4, LAST_MINUTE}
    return [candle(n, 43000, high=44100 if n in rises else 43000) for n in range(-10, LAST_MINUTE + 2)]


def proposals(when_ms: int) -> dict[str, Any] | None:
    """Propose a long at minute 1, and a short at minute 6."""
    minute = (when_ms - START_MS) // 60_000
    common = {"minuteEstimatedTime": 60, "quantity": QUANTITY}
    if minute == 1:
        return {"position": "long", "priceTakeProfit": 44000, "priceStopLoss": 42000, **common}
    if minute == 6:
        return {"position": "short", "priceTakeProfit": 42000, "priceStopLoss": 44000, **common}
    return None


def context_of(symbol: str) -> Context:
    """Return the bot's context."""
    return Context("paper", symbol, "twice")


class _Waiting(logging.Handler):
    """Leaves word when the life waits for another, and arms its kill when it has taken over."""

    def __init__(self, life: Life, steps: Steps) -> None:
        super().__init__()
        self._life, self._steps = life, steps

    def emit(self, record: logging.LogRecord) -> None:
        """Look at a line that the engine logs."""
        text = record.getMessage()
        if ": waiting for " in text:
            self._life.word("waits").touch()
        if ": taken over from " in text:
            self._life.word("took").touch()
            if self._life.kill_at and self._steps.kill_at < 0:
                self._steps.arm(self._life.kill_at)


async def lived(life: Life, note: mmap.mmap, *, waits: bool) -> tuple[str, int]:
    """Run the bot once; return how it ended and how many steps it took."""
    steps, log = Steps(life, note), Log(life)
    if waits:
        steps.kill_at = -1
    handler = _Waiting(life, steps)
    logger = logging.getLogger("holdfast")
    logger.addHandler(handler)
    logger.propagate = False

    async def sleep(seconds: float) -> None:
        task = asyncio.current_task()
        beats = task is not None and task.get_name() == "holdfast sign of life"
        await asyncio.sleep(seconds if beats else min(seconds, 0.02))

    def told(failure: Failure) -> None:
        if isinstance(failure.error, OrderError):
            log.tell("told", text=str(failure.error))

    registry, listeners = Registry(), Listeners()
    market = PatientMarket({life.symbol: candles()})
    market.context, market.life = context_of(life.symbol), life
    listeners.listen("error", told)
    registry.add_exchange(market, exchange_name="paper", broker=ToldBroker(life.broker, steps, log))
    registry.add_strategy(lambda symbol, when_ms: proposals(when_ms), strategy_name="twice", interval="1m")
    store = Store(ToldBackend(open_backend(life.url), steps, log), require=Survives.NOTHING)
    while True:
        try:
            await store.open()
            break
        except UnavailableError:  # one that is stopped may hold a lock of the store's
            await asyncio.sleep(0.05)
    shared: dict[str, Any] = {"on_conflict": "wait", "lease_seconds": life.lease_seconds} if life.lease_seconds else {}
    end = "done"
    try:
        run = Live.run(
            life.symbol, strategy_name="twice", exchange_name="paper", store=store, registry=registry,
            listeners=listeners, sleep=sleep, **shared,
        )  # fmt: skip
        async for _ in run:
            pass
    except FencedError:
        end = "fenced"
    finally:
        await store.close()
    return end, steps.steps


def forked(life: Life, note: mmap.mmap, *, waits: bool = False) -> int:
    """Start a life in a process of its own; return its id. How it ended stands in its ``end`` file."""

    def run() -> None:
        signal.alarm(round(MOST_SECONDS))
        if life.elsewhere:
            worker.machine = lambda: f"machine {os.getpid()}"
        end, steps = asyncio.run(lived(life, note, waits=waits))
        life.word("end").write_text(f"{end} {steps}")

    return child(run, str(life.word("words")))


def forked_in(life: Callable[[], Coroutine[Any, Any, int]], name: str) -> int:
    """Run something that counts steps in a process of its own; return its steps, or minus the signal that ended it."""
    with tempfile.TemporaryDirectory(prefix="holdfast-forked-") as place:
        told, words = Path(place, "told"), Path(place, "words")

        def run() -> None:
            signal.alarm(round(MOST_SECONDS))
            told.write_text(str(asyncio.run(life())))

        _, status = os.waitpid(child(run, str(words)), 0)
        if os.WIFSIGNALED(status):
            return -os.WTERMSIG(status)
        if status:
            print(f"{name}: {words.read_text()}", file=sys.stderr, flush=True)
            return -1000 - os.WEXITSTATUS(status)
        return int(told.read_text())


def child(do: Callable[[], None], log: str) -> int:
    """Do something in a forked process, whose words go to a file; return its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        words = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(words, 2)
        random.seed()  # what a fresh interpreter would draw anew must not be inherited
        do()
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def answer(asked: Callable[[], Awaitable[Any]], place: Path, name: str) -> Any:
    """Return what a coroutine, run in a child, comes to; it must be plain."""
    told = place / name

    def run() -> None:
        told.write_text(json.dumps(asyncio.run(asked())))  # type: ignore[arg-type]

    _, status = os.waitpid(child(run, str(place / f"{name}.words")), 0)
    if status:
        raise RuntimeError(f"{name} ended with {status}: {(place / f'{name}.words').read_text()[-500:]}")
    return json.loads(told.read_text())
