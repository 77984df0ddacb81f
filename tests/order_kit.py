"""What the tests of orders share: a broker over a paper book in this process, faults by name, a clock by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from fakes import Bot, FakeMarket, candle, flat, minute_ms, proposal

from holdfast.brokers.paper_book import PaperBook
from holdfast.domains import context_key
from holdfast.engine.broker import Features, OrderReport, OrderRequest, RepeatedIds, VenuePosition
from holdfast.engine.executor import Executor
from holdfast.engine.live import Live, LiveRun
from holdfast.engine.orders import Book
from holdfast.engine.session import Session
from holdfast.errors import UnavailableError, UnknownOutcomeError
from holdfast.names import Context
from holdfast.rows import Event, Order
from holdfast.rules.candles import Candle
from holdfast.rules.params import Params
from holdfast.store import Store

CONTEXT = Context("binance", "BTCUSDT", "my-strategy")


def features(
    repeated: RepeatedIds = "always", *, refuses_expired: bool = True, reduce_only: bool = True
) -> Features:  # fmt: skip
    """Return what a venue promises."""
    return Features(refuses_repeated_ids=repeated, refuses_expired=refuses_expired, reduce_only=reduce_only)


class Time:
    """A wall clock that sleeping moves."""

    def __init__(self) -> None:
        self.now_ms = minute_ms(0)

    def __call__(self) -> int:
        return self.now_ms

    async def sleep(self, seconds: float) -> None:
        """Let the others run, then let the time pass."""
        for _ in range(5):
            await asyncio.sleep(0)
        self.now_ms += max(1, round(seconds * 1000))


class BookBroker:
    """A broker whose venue is a paper book in this process.

    ``faults`` are taken one for each submission, ``cancel_faults`` one for each cancellation: ``lost answer`` (done),
    ``lost request`` (not done), ``late`` (done when :meth:`arrive` is called), ``down`` (nothing sent), ``twice``,
    ``reject``, ``resting``, ``partial``, ``part only``; of a cancellation also ``fill first`` and ``fill after``.
    """

    def __init__(self, time: Time, promised: Features | None = None) -> None:
        self.account, self.features = "acc", promised or features()
        self.book = PaperBook(self.features, time)
        self.faults: list[str] = []
        self.cancel_faults: list[str] = []
        self.read_faults = 0
        """How many questions from now on go unanswered."""
        self.calls: list[str] = []
        self.sent: list[OrderRequest] = []
        self.on_its_way: list[OrderRequest] = []
        self.held: asyncio.Event | None = None
        """Set: a submission waits for it before it reaches the venue."""
        self.expired_exits = 0
        """How many exits from now on come too late, by the venue's clock."""
        self.exit_delay_seconds = 0.0
        """How long what closes is under way."""
        self._time = time

    async def submit(self, request: OrderRequest) -> OrderReport:
        self.calls.append("submit")
        self.sent.append(request)
        fault = self.faults.pop(0) if self.faults else ""
        if self.held is not None:
            await self.held.wait()
        if request.reduce_only:
            self._time.now_ms += round(1000 * self.exit_delay_seconds)
        if request.reduce_only and self.expired_exits:
            self.expired_exits -= 1
            return self.book.submit(msgspec.structs.replace(request, expires_at_ms=0))
        match fault:
            case "down":
                raise UnavailableError("the venue cannot be reached")
            case "lost request":
                raise UnknownOutcomeError("no answer")
            case "late":
                self.on_its_way.append(request)
                raise UnknownOutcomeError("no answer")
            case "broken":
                raise ValueError("a fault in the broker's code, after the request was sent")
            case "reject":
                return self.book.refuse(request)
        part = {"partial": 0.4, "part only": 0.4, "resting": 0.0}.get(fault, 1.0)
        report = self.book.submit(request, part=part, rests=fault != "part only")
        if fault == "twice":
            self.book.submit(request)
        if fault in ("lost answer", "broken after"):
            raise UnknownOutcomeError("no answer")
        return report

    def arrive(self) -> list[OrderReport]:
        """Let what was on its way reach the venue."""
        late, self.on_its_way = self.on_its_way, []
        return [self.book.submit(request) for request in late]

    async def find(self, symbol: str, client_order_id: str) -> OrderReport | None:
        self._read("find")
        return self.book.find(client_order_id)

    async def cancel(self, symbol: str, client_order_id: str) -> OrderReport | None:
        self.calls.append("cancel")
        fault = self.cancel_faults.pop(0) if self.cancel_faults else ""
        if fault == "down":
            raise UnavailableError("the venue cannot be reached")
        if fault == "fill first":
            self.book.fill(client_order_id)
        report = self.book.cancel(client_order_id)
        if fault == "fill after":
            self.book.fill(client_order_id)
        if fault == "lost answer":
            raise UnknownOutcomeError("no answer")
        return report

    async def open_orders(self, symbol: str | None = None) -> Sequence[OrderReport]:
        self._read("open orders")
        return self.book.open_orders(symbol)

    async def history(self, symbol: str, since_ms: int) -> Sequence[OrderReport]:
        self._read("history")
        return self.book.history(symbol, since_ms)

    async def positions(self) -> Sequence[VenuePosition]:
        self._read("positions")
        return self.book.positions()

    async def close(self) -> None:
        pass

    def _read(self, what: str) -> None:
        self.calls.append(what)
        if self.read_faults:
            self.read_faults -= 1
            raise UnavailableError("the venue cannot be asked")

    @property
    def held_quantity(self) -> float:
        """What the account holds of BTCUSDT; below 0 is short."""
        return self.book.holdings.get("BTCUSDT", 0.0)


class Desk:
    """A bot with a broker: by default it opens a long of 2 at minute 1, whose target minute 5 reaches."""

    def __init__(
        self, signals: Any = None, *, candles: Sequence[Candle] | None = None, promised: Features | None = None,
        hold: bool = False, **more: Any,
    ) -> None:  # fmt: skip
        self.time = Time()
        self.broker = BookBroker(self.time, promised)
        if candles is None:
            candles = [*flat(43000, -10, 4), candle(5, 43000, high=44100), *flat(43000, 6, 9)]
        self.market = FakeMarket({"BTCUSDT": candles}, hold=hold)
        self.market.broker = self.broker  # type: ignore[attr-defined]
        self.bot = Bot(self.market, {1: proposal(quantity=2)} if signals is None else signals, **more)

    def again(self) -> Desk:
        """Return another process's view: the same market, venue and clock, nothing else."""
        desk = Desk.__new__(Desk)
        desk.time, desk.broker, desk.market = self.time, self.broker, self.market
        desk.bot = Bot(self.market, {1: proposal(quantity=2)})
        return desk

    def run(self, store: Store, **more: Any) -> LiveRun:
        """Set up a live run; sleeping moves the clock."""
        return Live.run(
            "BTCUSDT", strategy_name=self.bot.strategy, exchange_name=self.bot.exchange, store=store,
            registry=self.bot.registry, listeners=self.bot.listeners, sleep=self.time.sleep, clock=self.time, **more,
        )  # fmt: skip

    async def live(self, store: Store) -> list[Event]:
        """Run until the market ends."""
        return [event async for event in self.run(store)]

    async def session(self, store: Store, *, holder: str = "test", params: Params | None = None) -> Session:
        """Return a recovered session with an executor, as the driver makes one."""
        params = params or Params()
        strategy = self.bot.registry.check_start(self.bot.strategy, params)
        exchange = self.bot.registry.exchange(self.bot.exchange)
        executor = Executor(
            self.broker, format_quantity=exchange.format_quantity, params=params, listeners=self.bot.listeners,
            sign=None, clock=self.time, sleep=self.time.sleep,
        )  # fmt: skip
        session = Session(
            self.bot.context, strategy, exchange, store, listeners=self.bot.listeners, params=params,
            risk_profiles={}, holder=holder, clock=self.time, sleep=self.time.sleep, executor=executor,
        )  # fmt: skip
        await session.recover()
        for minute in range(-10, 0):
            session.window.push(candle(minute, 43000))
        if session.state.last_candle_ms == 0:
            await session.begin(minute_ms(0))
        return session


async def orders_in(store: Store, context: Context = CONTEXT) -> Book:
    """Return the orders that are stored."""
    rows = await store.scan("order", context_key("session", context).entity_name)
    return Book(loaded.row for loaded in rows.values() if isinstance(loaded.row, Order))
