"""Live: run strategies on closed candles as they come, each context by a driver of its own."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import ClassVar, Literal

import msgspec

from ..errors import InvalidInputError
from ..names import Context
from ..rows import Event
from ..rules.params import get_config
from ..store import Store
from .driver import Driver
from .lanes import Sleep
from .listeners import Done, Failure, Listeners, default_listeners
from .modes import TroublePolicy
from .ownership import ON_CONFLICT, OnConflict
from .registry import Registry, default_registry
from .session import Session, wall_clock_ms
from .turns import Turns
from .worker import LEASE_SECONDS

Status = Literal["pending", "fulfilled", "rejected"]


class LiveStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``Live.list()``."""

    symbol: str
    strategy_name: str
    exchange_name: str
    status: Status
    """Under way; ended; failed."""


class AtRisk(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``Live.status()``: what a run has at stake, and how its store is doing."""

    context: Context
    mode: str
    """Name of a :class:`~holdfast.engine.modes.Mode`: what may still be done."""
    why: str
    """Why it is not ``NORMAL``; empty when it is."""
    commit_age_seconds: float | None
    """How long ago the last commit of the store succeeded; None before the first."""
    unsaved: int
    """Decisions that are in the emergency journal and not in the store yet."""
    signal_id: str | None = None
    """The open position; None when there is none."""
    position: str | None = None
    quantity: float | None = None
    """In units of the base currency, where a broker or the strategy names it."""
    price: float | None = None
    """The newest one seen."""
    notional: float | None = None
    """Quantity times price, in quote currency."""


class _Entry:
    """What :meth:`Live.list` knows of a run; the run itself may be dropped by its user."""

    __slots__ = ("driver", "status")

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.status: Status = "pending"


class LiveRun(AsyncIterator[Event]):
    """One live run: an async iterator of its opened, closed and cancelled events.

    An event counts as delivered when the next one is asked for; one that was not is yielded again after a
    restart, with the same id. Leaving the loop early leaves the context unwatched: an open position is found
    again by the next run.
    """

    def __init__(self, entry: _Entry, listeners: Listeners) -> None:
        self._entry, self._listeners = entry, listeners
        self.context = entry.driver.context
        self._events: AsyncGenerator[Event, None] = _watched(entry, listeners)

    def __aiter__(self) -> LiveRun:
        return self

    async def __anext__(self) -> Event:
        return await self._events.__anext__()

    async def aclose(self) -> None:
        """End the run now; an open position stays stored, and unwatched until the next run."""
        await self._events.aclose()
        self._end()

    def stop(self) -> None:
        """Let nothing more open: a waiting signal is cancelled, an open one is watched to its close, then it ends."""
        self._entry.driver.stop()

    def leave(self) -> None:
        """End it between two candles, whatever is open: another process is to go on with it. Repeatable."""
        self._entry.driver.leave()

    @property
    def is_leaving(self) -> bool:
        """Whether it was told to :meth:`leave`."""
        return self._entry.driver.is_leaving

    def stand_aside(self) -> None:
        """Those that share its risk profiles need not wait for it before its first candle; they run already."""
        self._entry.driver.turn.stand_aside()

    def _end(self) -> None:
        self._entry.driver.turn.leave()
        if self._entry.status == "pending":
            self._entry.status = "fulfilled"

    def __del__(self) -> None:
        # Dropped, perhaps never iterated: nobody that shares its risk profiles may wait for it.
        self._end()


async def _watched(entry: _Entry, listeners: Listeners) -> AsyncGenerator[Event, None]:
    context = entry.driver.context
    try:
        async with aclosing(entry.driver.events()) as events:
            async for event in events:
                yield event
    except GeneratorExit:
        entry.status = "fulfilled"  # the caller has seen enough
        raise
    except BaseException as error:
        entry.status = "rejected"
        if isinstance(error, Exception):
            await listeners.report(Failure(where="live", error=error, context=context))
        raise
    entry.status = "fulfilled"
    await listeners.emit("done_live", Done(context=context, mode="live"))


def _at_risk(session: Session) -> AtRisk:
    health, signal = session.health, session.state.signal
    quantity = None
    if signal is not None:
        extra = signal.extra if isinstance(signal.extra, dict) else {}
        named = extra.get("quantity")
        quantity = float(named) if isinstance(named, int | float) and not isinstance(named, bool) else None
        if session.executor is not None:
            quantity = session.executor.book.position(signal.id)
    price = session.window.price() if session.window.candles else None
    return AtRisk(
        context=session.context, mode=health.mode.name, why=health.why, commit_age_seconds=health.commit_age_seconds,
        unsaved=session.unsaved, signal_id=None if signal is None else signal.id,
        position=None if signal is None else signal.position, quantity=quantity, price=price,
        notional=None if quantity is None or price is None else quantity * price,
    )  # fmt: skip


class Cancel:
    """What ``Live.background`` returns: call it to stop the run, await ``wait()`` for its end."""

    def __init__(self, run: LiveRun, task: asyncio.Task[None]) -> None:
        self._run, self._task = run, task

    def __call__(self) -> None:
        """Stop as :meth:`Live.stop` does; repeatable."""
        self._run.stop()

    async def wait(self) -> None:
        """Return when the run has ended, however it ended; cancelling this wait does not cancel the run."""
        await asyncio.wait((self._task,))

    async def abort(self) -> None:
        """End the run now, without watching an open position to its close; the next run finds it again."""
        self._task.cancel()
        await self.wait()


class Live:
    """Runs strategies live. Each (exchange, symbol, strategy) runs once at a time in a process."""

    _entries: ClassVar[dict[Context, _Entry]] = {}
    _tasks: ClassVar[set[asyncio.Task[None]]] = set()
    _turns: ClassVar[Turns] = Turns()

    @classmethod
    def run(
        cls,
        symbol: str,
        *,
        strategy_name: str,
        exchange_name: str,
        store: Store | None = None,
        on_conflict: OnConflict = "refuse",
        lease_seconds: float = LEASE_SECONDS,
        on_trouble: TroublePolicy = TroublePolicy(),
        registry: Registry = default_registry,
        listeners: Listeners = default_listeners,
        clock: Callable[[], int] = wall_clock_ms,
        sleep: Sleep = asyncio.sleep,
    ) -> LiveRun:
        """Set up a live run; iterate over what is returned to run it.

        Yields opened, closed and cancelled events, endlessly, until the market ends or the run is stopped. What
        was open when the last process ended is found again first.

        Args:
            store: An open store; default: the process's own, ``./dump/data`` unless ``use_store`` says otherwise.
            registry, listeners: Default: the process's own.
            on_conflict: Where another live process owns the context on a shared store: ``refuse`` raises
                ``HeldError``, ``wait`` takes over within the lease when that process dies or lets go, ``takeover``
                does so at once: the other's next write is refused, and the run goes on when that one has noticed, or
                its lease is over. A file or memory store belongs to one process.
            lease_seconds: After so long without a sign of life a process may be replaced; the same for all runs on
                one store, and at least four times the longest call of the store.
            on_trouble: What to do about a store that is slow, full or lost; the same for all runs on one store.
            clock: Tells the time in epoch milliseconds.
            sleep: Takes seconds; a seam for tests.

        Raises:
            InvalidInputError: A name is unknown, or this context is already running (both at once).
            FencedError, FailedError, CorruptedError, HeldError: While iterating: nobody watches the context any more.

        Crash: Running it again goes on from what is stored.
        """
        return cls._made(
            symbol, strategy_name, exchange_name, store, on_conflict, lease_seconds, on_trouble, registry, listeners,
            clock, sleep,
        )  # fmt: skip

    @classmethod
    def background(
        cls,
        symbol: str,
        *,
        strategy_name: str,
        exchange_name: str,
        store: Store | None = None,
        on_conflict: OnConflict = "refuse",
        lease_seconds: float = LEASE_SECONDS,
        on_trouble: TroublePolicy = TroublePolicy(),
        registry: Registry = default_registry,
        listeners: Listeners = default_listeners,
        clock: Callable[[], int] = wall_clock_ms,
        sleep: Sleep = asyncio.sleep,
    ) -> Cancel:
        """Run as a task of the running event loop; callbacks and listeners tell what happens.

        Returns:
            A function that stops it as :meth:`stop` does. If the run fails, ``listen_error`` and ``listen_exit``
            are told, and :meth:`list` shows it as rejected.

        Raises:
            InvalidInputError: As :meth:`run`.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError as error:
            raise InvalidInputError("background() needs a running event loop: call it from async code") from error
        run = cls._made(
            symbol, strategy_name, exchange_name, store, on_conflict, lease_seconds, on_trouble, registry, listeners,
            clock, sleep,
        )  # fmt: skip

        async def consume() -> None:
            try:
                async with aclosing(run):
                    async for _ in run:
                        pass
            except Exception as error:  # already told to the error listeners
                await listeners.emit("exit", Failure(where="live", error=error, context=run.context))

        task = loop.create_task(consume(), name=f"live {run.context}")
        cls._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(cls._tasks.discard)
        task.add_done_callback(lambda _: run._end())  # also of a task that was cancelled before it began
        return Cancel(run, task)

    @classmethod
    def stop(cls, symbol: str, strategy_name: str, exchange_name: str | None = None) -> int:
        """Let nothing more open: a waiting signal is cancelled, an open one is watched to its close, then the run ends.

        Works before the first candle too. Starting again trades again.

        Args:
            exchange_name: None stops the pair on every exchange.

        Returns:
            How many runs were told to stop.
        """
        told = 0
        for context, entry in cls._entries.items():
            same = context.symbol == symbol and context.strategy_name == strategy_name
            if same and exchange_name in (None, context.exchange_name) and entry.status == "pending":
                entry.driver.stop()
                told += 1
        return told

    @classmethod
    def list(cls) -> list[LiveStatus]:
        """Return the newest run of each context of this process: pending, fulfilled or rejected."""
        return [
            LiveStatus(
                symbol=context.symbol, strategy_name=context.strategy_name, exchange_name=context.exchange_name,
                status=entry.status,
            )
            for context, entry in cls._entries.items()
        ]  # fmt: skip

    @classmethod
    def status(cls) -> builtins.list[AtRisk]:
        """Return what each run under way has at stake, and how old the last durable commit of its store is.

        Call it where the runs run: in their event loop.
        """
        sessions = (entry.driver.session for entry in cls._entries.values() if entry.status == "pending")
        return [_at_risk(session) for session in sessions if session is not None]

    @classmethod
    def clear(cls) -> None:
        """Forget the runs that have ended."""
        for context in [context for context, entry in cls._entries.items() if entry.status != "pending"]:
            del cls._entries[context]

    @classmethod
    def _made(
        cls,
        symbol: str,
        strategy_name: str,
        exchange_name: str,
        store: Store | None,
        on_conflict: OnConflict,
        lease_seconds: float,
        on_trouble: TroublePolicy,
        registry: Registry,
        listeners: Listeners,
        clock: Callable[[], int],
        sleep: Sleep,
    ) -> LiveRun:
        if type(symbol) is not str or symbol == "":
            raise InvalidInputError(f"symbol is {symbol!r:.80}: must be text of at least one character")
        if on_conflict not in ON_CONFLICT:
            raise InvalidInputError(f"on_conflict is {on_conflict!r:.80}: use {', '.join(ON_CONFLICT)}")
        if store is not None and not isinstance(store, Store):
            raise InvalidInputError(f"store is {store!r:.80}: open one, Store(open_backend(URL)), or leave it out")
        if not isinstance(on_trouble, TroublePolicy):
            raise InvalidInputError(f"on_trouble is {on_trouble!r:.80}: use holdfast.TroublePolicy(...)")
        params = get_config()
        strategy = registry.check_start(strategy_name, params)
        exchange = registry.exchange(exchange_name)
        context = Context(exchange_name, symbol, strategy_name)
        under_way = cls._entries.get(context)
        if under_way is not None and under_way.status == "pending":
            raise InvalidInputError(f"{context} is already running in this process: stop it first")
        driver = Driver(
            context, strategy, exchange, cls._turns.join(context, strategy.risk_names), store=store,
            profiles={name: registry.risk(name) for name in strategy.risk_names}, listeners=listeners,
            params=params, clock=clock, sleep=sleep,
            on_conflict=on_conflict, lease_seconds=lease_seconds, on_trouble=on_trouble,
        )  # fmt: skip
        entry = cls._entries[context] = _Entry(driver)
        return LiveRun(entry, listeners)
