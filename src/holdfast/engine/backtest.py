"""Backtest: the same step over history, in memory alone; no storage is called, or even imported."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import ClassVar, Literal, NamedTuple

import msgspec

from ..errors import InvalidInputError
from ..rows import Event
from ..rules.params import get_config
from .context import Sleep
from .frame_run import FrameRun
from .listeners import Done, Failure, Listeners, default_listeners
from .registry import Registry, default_registry


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``Backtest.list()``."""

    symbol: str
    strategy_name: str
    exchange_name: str
    frame_name: str
    status: Literal["pending", "fulfilled", "rejected"]
    """Under way; ended; failed."""


class _Which(NamedTuple):
    symbol: str
    strategy_name: str
    exchange_name: str
    frame_name: str


class _Entry:
    __slots__ = ("run", "status")

    def __init__(self, run: FrameRun) -> None:
        self.run = run
        self.status: Literal["pending", "fulfilled", "rejected"] = "pending"


class Backtest:
    """Runs strategies over history. All of it lives in this process's memory."""

    _entries: ClassVar[dict[_Which, _Entry]] = {}
    _tasks: ClassVar[set[asyncio.Task[None]]] = set()

    @classmethod
    def run(
        cls,
        symbol: str,
        *,
        strategy_name: str,
        exchange_name: str,
        frame_name: str,
        registry: Registry = default_registry,
        listeners: Listeners = default_listeners,
        sleep: Sleep = asyncio.sleep,
    ) -> AsyncIterator[Event]:
        """Step a strategy through a frame; yields closed and cancelled events.

        An open signal at the frame's end is watched on until it closes or the data ends; then it closes as
        ``time_expired`` at the last price.

        Raises:
            InvalidInputError: A name is unknown (raised at once), or this backtest is already under way.
            UnavailableError: The exchange gave no candles that can be trusted.
        """
        which = _Which(symbol, strategy_name, exchange_name, frame_name)
        entry = _Entry(_made(which, registry, listeners, sleep))

        async def events() -> AsyncIterator[Event]:
            cls._enter(which, entry)
            async with aclosing(_driven(entry)) as running:
                async for event in running:
                    yield event

        return events()

    @classmethod
    def background(
        cls,
        symbol: str,
        *,
        strategy_name: str,
        exchange_name: str,
        frame_name: str,
        registry: Registry = default_registry,
        listeners: Listeners = default_listeners,
        sleep: Sleep = asyncio.sleep,
    ) -> Callable[[], None]:
        """Run without yielding; listeners and callbacks tell what happens, ``listen_done_backtest`` the end.

        Returns:
            A function that stops it as :meth:`stop` does. If the run itself fails, ``listen_exit`` is told.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError as error:
            raise InvalidInputError("background() needs a running event loop: call it from async code") from error
        which = _Which(symbol, strategy_name, exchange_name, frame_name)
        entry = _Entry(_made(which, registry, listeners, sleep))
        cls._enter(which, entry)

        async def consume() -> None:
            try:
                async with aclosing(_driven(entry)) as running:
                    async for _ in running:
                        pass
            except Exception as error:
                failure = Failure(where="backtest", error=error, context=entry.run.context)
                if listeners.has("exit"):
                    await listeners.emit("exit", failure)
                else:
                    await listeners.report(failure)

        task = loop.create_task(consume(), name=f"backtest {entry.run.context}")
        cls._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(cls._tasks.discard)

        def cancel() -> None:
            entry.run.stopping = True

        return cancel

    @classmethod
    def stop(
        cls, symbol: str, strategy_name: str, exchange_name: str | None = None, frame_name: str | None = None
    ) -> int:
        """Let nothing more open: a waiting signal is cancelled, an open one runs to its close, then the run ends.

        Returns:
            How many runs were told to stop.
        """
        told = 0
        for which, entry in cls._entries.items():
            same = which.symbol == symbol and which.strategy_name == strategy_name
            same = same and exchange_name in (None, which.exchange_name) and frame_name in (None, which.frame_name)
            if same and entry.status == "pending":
                entry.run.stopping = True
                told += 1
        return told

    @classmethod
    def list(cls) -> list[RunStatus]:
        """Return every backtest of this process: pending, fulfilled or rejected."""
        return [RunStatus(**which._asdict(), status=entry.status) for which, entry in cls._entries.items()]

    @classmethod
    def clear(cls) -> None:
        """Forget the backtests that have ended."""
        for which in [which for which, entry in cls._entries.items() if entry.status != "pending"]:
            del cls._entries[which]

    @classmethod
    def _enter(cls, which: _Which, entry: _Entry) -> None:
        under_way = cls._entries.get(which)
        if under_way is not None and under_way.status == "pending":
            raise InvalidInputError(f"the backtest {'/'.join(which)} is already under way: wait for it, or stop it")
        cls._entries[which] = entry


def _made(which: _Which, registry: Registry, listeners: Listeners, sleep: Sleep) -> FrameRun:
    if type(which.symbol) is not str or which.symbol == "":
        raise InvalidInputError(f"symbol is {which.symbol!r:.80}: must be text of at least one character")
    params = get_config()
    strategy = registry.check_start(which.strategy_name, params)
    return FrameRun(
        which.symbol, strategy=strategy, exchange=registry.exchange(which.exchange_name),
        frame=registry.frame(which.frame_name), params=params, listeners=listeners, sleep=sleep,
        profiles={name: registry.risk(name) for name in strategy.risk_names},
    )  # fmt: skip


async def _driven(entry: _Entry) -> AsyncGenerator[Event, None]:
    run = entry.run
    try:
        async with aclosing(run.events()) as events:
            async for event in events:
                yield event
    except GeneratorExit:
        entry.status = "fulfilled"  # the caller has seen enough
        raise
    except BaseException:
        entry.status = "rejected"
        raise
    entry.status = "fulfilled"
    done = Done(context=run.context, mode="backtest", frame_name=run.frame.frame_name)
    await run.listeners.emit("done_backtest", done)
