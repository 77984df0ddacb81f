"""Connections to a PostgreSQL server: few, made when needed, each use bounded by a deadline; and what errors mean.

A connection is taken for one statement or one short transaction at a time. One that was lost, or that did not answer
in time, is thrown away and the next use makes a new one, so that a restart of the server needs none of the bot.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import psycopg
from psycopg.pq import TransactionStatus

from ...errors import (
    CorruptedError,
    FailedError,
    FullError,
    HoldfastError,
    InvalidInputError,
    UnavailableError,
    UnknownOutcomeError,
)

T = TypeVar("T")
Connection = psycopg.AsyncConnection[tuple[Any, ...]]


class Connections:
    """A few connections with the same settings.

    Args:
        conninfo: What libpq is given; it may hold a password, and is never shown.
        name: How errors call the server.
        limit: How many at once.
        deadline_seconds: For each use, including waiting for a free connection and making one.
    """

    def __init__(self, conninfo: dict[str, Any], name: str, *, limit: int, deadline_seconds: float) -> None:
        self._conninfo = conninfo
        self._name = name
        self._deadline_seconds = deadline_seconds
        self._free = asyncio.Semaphore(limit)
        self._idle: list[Connection] = []
        self._closing: set[asyncio.Task[None]] = set()

    async def use(self, work: Callable[[Connection], Awaitable[T]], *, writes: bool = False) -> T:
        """Run ``work`` with a connection in autocommit mode.

        Args:
            work: Sends statements; must leave no transaction open.
            writes: An answer that does not come leaves it unknown whether something was written.

        Raises:
            UnavailableError: Nothing was sent, or the server refused it, or (``writes`` is False) did not answer.
            UnknownOutcomeError: ``writes``, and the answer was lost.
            HoldfastError: As :func:`mapped` says.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self._deadline_seconds
        await self._wait_for_a_turn(end)
        connection: Connection | None = None
        late: list[bool] = []
        try:
            connection = await self._take(end)
            # Not by cancelling: psycopg would ask the server to cancel, and wait for its answer without a bound.
            timer = loop.call_at(end, _cut, connection, late)
            try:
                return await work(connection)
            finally:
                timer.cancel()
        except psycopg.Error as error:
            if late:
                raise self._late(writes) from None
            raise mapped(error, self._name, writes=writes) from (None if error.sqlstate else error)
        finally:
            if connection is not None:
                self._put_back(connection)
            self._free.release()

    async def _wait_for_a_turn(self, end: float) -> None:
        if not self._free.locked():
            await self._free.acquire()
            return
        try:
            async with asyncio.timeout_at(end):
                await self._free.acquire()
        except TimeoutError:
            raise UnavailableError(
                f"{self._name}: all connections were busy for {self._deadline_seconds} s", backend=self._name
            ) from None

    async def _take(self, end: float) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not _has_news(connection):
                return connection
            self._discard(connection)  # the server closed it meanwhile, or says that it will
        try:
            async with asyncio.timeout_at(end):
                return await psycopg.AsyncConnection.connect(
                    **self._conninfo, autocommit=True, cursor_factory=psycopg.AsyncRawCursor
                )
        except TimeoutError:
            raise self._late(False) from None
        except psycopg.Error as error:
            raise mapped(error, self._name, writes=False) from None

    def _late(self, writes: bool) -> HoldfastError:
        kind = UnknownOutcomeError if writes else UnavailableError
        return kind(f"{self._name} did not answer within {self._deadline_seconds} s", backend=self._name)

    def _put_back(self, connection: Connection) -> None:
        if not connection.closed and connection.pgconn.transaction_status == TransactionStatus.IDLE:
            self._idle.append(connection)
        else:
            self._discard(connection)

    def _discard(self, connection: Connection) -> None:
        if connection.closed:
            return
        task = asyncio.ensure_future(connection.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close what is idle; uses under way must be over. Repeatable."""
        while self._idle:
            self._discard(self._idle.pop())
        if self._closing:
            await asyncio.wait(set(self._closing))


def _has_news(connection: Connection) -> bool:
    """Whether an idle connection has something to say, which can only be that it is over."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _cut(connection: Connection, late: list[bool]) -> None:
    """Make whoever waits for the server's answer see the end of the connection, now."""
    late.append(True)
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as twin:
        twin.shutdown(socket.SHUT_RDWR)


def mapped(error: psycopg.Error, name: str, *, writes: bool) -> HoldfastError:
    """Return what to raise for an error of psycopg's.

    Only the server's first line is repeated: its details may hold a row.
    """
    state = error.sqlstate or ""
    if not state or state.startswith("08") or state in ("57P01", "57P02"):
        # 57P01 also ends a backend that has committed and waits for its standby.
        if writes:
            return UnknownOutcomeError(f"{name}: the connection was lost before the answer came", backend=name)
        why = "the connection was lost" if state else _first_line(error)
        return UnavailableError(f"{name}: {why}", backend=name)
    said = error.diag.message_primary or type(error).__name__
    for start, kind, remedy in _MEANINGS:
        if state.startswith(start):
            return kind(f"{name}: {said} ({state}){remedy}", backend=name)
    return UnavailableError(f"{name}: nothing was written: {said} ({state})", backend=name)


def _first_line(error: psycopg.Error) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


_MEANINGS: tuple[tuple[str, type[HoldfastError], str], ...] = (
    ("55P03", UnavailableError, ": another transaction kept the scope locked; nothing was written: try again"),
    ("57014", UnavailableError, ": it took longer than the deadline; nothing was written: try again"),
    ("25006", UnavailableError, ": nothing was written; the server takes no writes (a standby?)"),
    ("53100", FullError, ": nothing was written; make room on the server's disk"),
    ("42501", UnavailableError, ": nothing was written; grant that right to the user"),
    ("42P01", FailedError, ": the tables are gone: close it, and open it again"),
    ("3F000", FailedError, ": the schema is gone: close it, and open it again"),
    ("XX001", CorruptedError, ": the server found damaged data: stop, and restore it from a copy"),
    ("XX002", CorruptedError, ": the server found a damaged index: REINDEX it"),
    ("54", InvalidInputError, ": the payload is nested too deep or too large; nothing was written"),
    ("22", InvalidInputError, ": the payload is not JSON that PostgreSQL takes; nothing was written"),
    ("23502", InvalidInputError, ": a key was written in another scope at that moment; nothing was written"),
)
"""What a state, or a class of states, means for the caller."""
