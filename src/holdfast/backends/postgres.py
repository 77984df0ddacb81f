"""PostgreSQL: all commits of a scope that wait go to the server as one statement, with one flush there.

The contract is here. The SQL, and why one statement is enough, is in ``postgres_statements.py``; connections,
deadlines and what errors mean in ``postgres_connections.py``; what is asked of the server at open in
``postgres_attestation.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from ..contract import Guarantees, Head, Key, KeyPrefix, Op, Record, Survives, WriterOp
from ..errors import (
    ConflictError,
    FailedError,
    HoldfastError,
    InvalidInputError,
    UnavailableError,
    UnknownOutcomeError,
    UnsafeSettingError,
)
from .postgres_attestation import Attested, prepare
from .postgres_connections import Connection, Connections
from .postgres_place import Place
from .postgres_statements import Asked, statements, take_group
from .sql import require_commit

_MANY = 32
"""From so many keys on, reading a range is tried first."""
_TRIES = 3
"""The first two may find that another process was faster; the third waits for its turn."""


class PostgresBackend:
    """Keeps rows in a schema of a PostgreSQL database, which several processes may share.

    Args:
        url: ``postgresql://user@host:port/database?schema=holdfast``, with whatever else libpq takes; the password
            is better left to ``PGPASSWORD`` or ``~/.pgpass``. The schema is made if it is missing.
        deadline_seconds: For every call, 0.2 to 60. No transaction outlives it on the server either.
        max_connections: How many connections at once, 1 to 100. Scopes commit side by side.
    """

    def __init__(self, url: str, *, deadline_seconds: float = 5.0, max_connections: int = 4) -> None:
        if not 0.2 <= deadline_seconds <= 60:
            raise InvalidInputError(f"deadline_seconds is {deadline_seconds!r}: use 0.2 to 60")
        if not 1 <= max_connections <= 100:
            raise InvalidInputError(f"max_connections is {max_connections!r}: use 1 to 100")
        self._place = Place(url, deadline_seconds)
        self._name = self._place.name
        self._deadline_seconds = deadline_seconds
        self._max_connections = max_connections
        self._sql = statements(self._place.schema)
        self._connections: Connections | None = None
        self._read_only = False
        self._attested: Attested
        self._lanes: dict[str, _Lane] = {}
        self._in_doubt: dict[tuple[str, str], int] = {}
        """Ops whose outcome is not known, by scope and writer."""
        self._suspect = False
        """What can be read may not have reached the standby yet."""

    def __repr__(self) -> str:
        return f"PostgresBackend({self._name!r})"

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Connect, make what is missing, attest; see :meth:`holdfast.contract.Backend.open`.

        Raises:
            UnsafeSettingError: A setting of the server voids the promise; the message names it.
            UnavailableError: The server cannot be reached or used; the message says why.
            NotFoundError: ``read_only``, and there is no store.

        Crash: Leaves what was there; opening again finishes.
        """
        if self._connections is not None:
            raise FailedError(f"{self._name} is open already: close it first", backend=self._name)
        connections = self._connections = Connections(
            self._place.conninfo(read_only=read_only),
            self._name,
            limit=self._max_connections,
            deadline_seconds=self._deadline_seconds,
        )
        try:
            self._attested = await prepare(connections, self._sql, self._name, read_only=read_only)
            self._read_only = read_only
            if not read_only:
                await self._flush(connections)
        except BaseException:
            self._connections = None
            await asyncio.shield(connections.close())
            raise
        return self._attested.guarantees

    async def _flush(self, connections: Connections) -> None:
        """Wait until all that can be seen is as durable as a commit: another's commit may still await its standby."""
        await connections.use(
            lambda connection: connection.execute(self._sql.barrier, [self._attested.synchronous_commit])
        )
        self._suspect = False

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys``; see :meth:`holdfast.contract.Backend.read`."""
        if not keys:
            self._opened()
            return {}
        wanted = {key: key for key in keys}
        if len(wanted) >= _MANY:
            # Most often they are all that lie between the first and the last, and then this is much quicker.
            limit = 2 * len(wanted) + 100
            found = await self._fetch(self._sql.read_range, scope, *min(wanted), *max(wanted), limit)
            if len(found) < limit:
                return _records(wanted, found)
        return _records(wanted, await self._fetch(self._sql.read, scope, _recordset(("d", "e", "i"), list(wanted))))

    async def head(self, scope: str) -> Head:
        """Return the scope's commit number and its writers' last ops."""
        found = await self._fetch(self._sql.head, scope)
        writers = {writer: WriterOp(n, number) for _, writer, n, number in found if writer is not None}
        return Head(found[0][0] if found else 0, writers)

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """Yield the scope's keys under ``prefix`` in byte order, a page at a time."""
        narrower, parts = "", []
        for column, part in zip(("domain", "entity_name"), prefix, strict=True):
            if part:
                parts.append(part)
                narrower += f" AND {column} = ${4 + len(parts)}"
        statement, last = self._sql.keys.format(narrower), Key("", "", "")
        while page := await self._fetch(statement, scope, *last, *parts):
            for found in page:
                last = Key(*found)
                yield last

    async def scopes(self) -> AsyncIterator[str]:
        """Yield the names of the scopes that have had a commit, in byte order."""
        for (scope,) in await self._fetch(self._sql.scopes):
            yield scope

    async def _fetch(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        connections = self._opened()
        if self._suspect:
            await self._flush(connections)

        async def fetch(connection: Connection) -> list[tuple[Any, ...]]:
            return await (await connection.execute(statement, values, prepare=True)).fetchall()

        return await connections.use(fetch)

    async def commit(
        self,
        scope: str,
        changes: Mapping[Key, bytes | None],
        expect: Mapping[Key, int],
        *,
        op: Op,
    ) -> int:
        """Apply ``changes`` if ``expect`` holds; see :meth:`holdfast.contract.Backend.commit`.

        Raises:
            ConflictError: Some ``expect`` does not hold; nothing was changed.
            InvalidInputError: A key, payload, op or scope cannot be used; nothing was changed.
            UnavailableError: Nothing was written: no connection, a full disk, a lock held for too long.
            UnknownOutcomeError: The answer was lost or late; send the same op again.
            UnsafeSettingError: A setting was changed since open; nothing was written.
            FailedError: Not open, or opened read-only.

        Crash: Before the return, all of the changes or none; after it, all, as attested at open.
        Cancellation: If it was sent, it goes on.
        """
        self._opened()
        if self._read_only:
            raise FailedError(
                f"{self._name} was opened read-only: nothing was written; open it for writing", backend=self._name
            )
        op = Op(*op)
        texts, size = require_commit(scope, changes, expect, op)
        lane = self._lanes.get(scope)
        if lane is None:
            lane = self._lanes[scope] = _Lane(scope)
        loop = asyncio.get_running_loop()
        waiting = _Waiting(Asked(op, dict(expect), texts, size), loop.create_future())
        lane.queue.append(waiting)
        if lane.task is None:
            lane.task = loop.create_task(self._serve(lane))
        timer = loop.call_later(self._deadline_seconds, self._expire, lane, waiting)
        try:
            return await waiting.future
        finally:
            timer.cancel()

    def _expire(self, lane: _Lane, waiting: _Waiting) -> None:
        late = f"{self._name} did not answer within {self._deadline_seconds} s"
        if waiting.sent:
            self._refuse(lane, waiting, UnknownOutcomeError(late, backend=self._name))
        else:
            self._refuse(lane, waiting, UnavailableError(f"{late}: nothing was written", backend=self._name))

    async def _serve(self, lane: _Lane) -> None:
        """Send group after group until nobody waits."""
        try:
            while lane.queue:
                live = [waiting for waiting in lane.queue if not waiting.future.done()]
                taken = set(take_group([waiting.asked for waiting in live])) if live else set()
                group = [waiting for at, waiting in enumerate(live) if at in taken]
                lane.queue = [waiting for at, waiting in enumerate(live) if at not in taken]
                if group:
                    await self._send(lane, group)
        finally:
            lane.task = None

    async def _send(self, lane: _Lane, group: list[_Waiting]) -> None:
        try:
            connections = self._opened()
            if not lane.known:
                await connections.use(lambda connection: connection.execute(self._sql.add_scope, [lane.scope]))
                lane.known = True
            for waiting in group:
                waiting.sent = True
            await self._decide(connections, lane, group)
        except InvalidInputError as error:
            if len(group) == 1:
                self._refuse(lane, group[0], error)
            else:  # one of them is to blame, and the others must not suffer
                for waiting in group:
                    await self._send(lane, [waiting])
        except HoldfastError as error:
            if isinstance(error, FailedError):
                lane.known = False  # the tables are gone, and so is the scope
            for waiting in group:
                self._refuse(lane, waiting, error)
        except Exception as error:  # a defect of ours: nobody may wait for ever
            for waiting in group:
                self._refuse(lane, waiting, UnknownOutcomeError(f"{self._name}: {error!r:.200}", backend=self._name))

    async def _decide(self, connections: Connections, lane: _Lane, group: list[_Waiting]) -> None:
        if len(group) == 1 and await self._commit_one(connections, lane, group[0]):
            return
        values = (lane.scope, *_documents(group), self._attested.synchronous_commit, self._attested.needs_standby)
        for attempt in range(1, _TRIES + 1):
            sending = _Sending(self._sql.commit, values, self._sql.lock_scope if attempt == _TRIES else None)
            found = await connections.use(sending, writes=True)
            due = any(verdict in ("granted", "repeated") for _, verdict, *_ in found)
            _, _, _, raised, safe, _ = found[0]
            if not due or raised:
                break
            if not safe:
                raise UnsafeSettingError(
                    f"{self._name}: fsync, full_page_writes or synchronous_standby_names was changed since open: "
                    "nothing was written; set it back, or open anew",
                    backend=self._name,
                )
        else:
            lane.known = False  # its row must be gone: make it anew next time
            raise UnavailableError(f"{self._name}: nothing was written: try again", backend=self._name)
        for at, verdict, number, _, _, detail in found:
            self._settle(lane, group[at], verdict, number, detail, warned=sending.warned)

    async def _commit_one(self, connections: Connections, lane: _Lane, waiting: _Waiting) -> bool:
        """Send a single commit the short way; False if nothing was written, and the long way must tell why."""
        op, expect, texts, _ = waiting.asked
        if None in texts.values():
            return False
        values = (
            lane.scope,
            op.writer,
            _recordset(("d", "e", "i", "v"), [(*key, version) for key, version in expect.items()]),
            _recordset(("d", "e", "i", "r"), [(*key, text) for key, text in texts.items()]),
            self._attested.synchronous_commit,
            self._attested.needs_standby,
            str(op.n),  # as text, lest small and large numbers are prepared apart
        )
        sending = _Sending(self._sql.commit_one, values, None)
        try:
            found = await connections.use(sending, writes=True)
        except InvalidInputError:
            return False
        if found:
            self._settle(lane, waiting, "granted", found[0][0], None, warned=sending.warned)
        return bool(found)

    def _settle(
        self, lane: _Lane, waiting: _Waiting, verdict: str, number: int, detail: str | None, *, warned: bool
    ) -> None:
        op = waiting.asked.op
        if verdict in ("granted", "repeated"):
            if warned:  # the server stopped waiting for its standby
                why = f"{self._name}: the server could not tell whether its standby has it"
                self._refuse(lane, waiting, UnknownOutcomeError(why, backend=self._name))
                return
            self._in_doubt.pop((lane.scope, op.writer), None)
            if not waiting.future.done():
                waiting.future.set_result(number)
            return
        self._in_doubt.pop((lane.scope, op.writer), None)
        self._refuse(lane, waiting, _refusal(verdict, detail, lane.scope, op, self._name))

    def _refuse(self, lane: _Lane, waiting: _Waiting, error: HoldfastError) -> None:
        """Tell a caller; "nothing was written" is not said of an op whose earlier try may still be under way."""
        op = waiting.asked.op
        doubted = self._in_doubt.get((lane.scope, op.writer)) == op.n
        if isinstance(error, UnknownOutcomeError):
            self._in_doubt[lane.scope, op.writer] = op.n
            self._suspect = self._suspect or self._attested.guarantees.survives >= Survives.SERVER
        elif doubted and isinstance(error, UnavailableError):
            error = UnknownOutcomeError(f"{error} (an earlier try may have been)", backend=self._name)
        if not waiting.future.done():
            told = error if error.__traceback__ is None else _copy(error)
            waiting.future.set_exception(told)

    async def close(self) -> None:
        """Wait for the commits under way, then close the connections. Repeatable.

        Crash: As before the call: nothing acknowledged depends on close.
        """
        connections = self._connections
        if connections is None:
            return
        while tasks := [lane.task for lane in self._lanes.values() if lane.task is not None]:
            await asyncio.wait(tasks)
        self._connections = None
        self._lanes.clear()
        await asyncio.shield(connections.close())

    def _opened(self) -> Connections:
        if self._connections is None:
            raise FailedError(f"{self._name} is not open: open it first", backend=self._name)
        return self._connections


class _Waiting:
    """One call of ``commit``."""

    __slots__ = ("asked", "future", "sent")

    def __init__(self, asked: Asked, future: asyncio.Future[int]) -> None:
        self.asked = asked
        self.future = future
        self.sent = False


class _Lane:
    """The commits of one scope that wait; one group of them is under way at a time."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.known = False
        """Its row exists."""
        self.queue: list[_Waiting] = []
        self.task: asyncio.Task[None] | None = None


class _Sending:
    """Sends a group of commits as one statement, after a lock if need be, and tells whether the server warned."""

    def __init__(self, statement: str, values: Sequence[object], lock: str | None) -> None:
        self._statement = statement
        self._values = values
        self._lock = lock
        self.warned = False

    async def __call__(self, connection: Connection) -> list[tuple[Any, ...]]:
        connection.add_notice_handler(self._noticed)
        try:
            if self._lock is None:
                return await (await connection.execute(self._statement, self._values, prepare=True)).fetchall()
            async with connection.transaction():
                await connection.execute(self._lock, self._values[:1])
                return await (await connection.execute(self._statement, self._values)).fetchall()
        finally:
            connection.remove_notice_handler(self._noticed)

    def _noticed(self, notice: Any) -> None:
        # "canceling wait for synchronous replication": the commit is here, and perhaps only here.
        self.warned = self.warned or notice.severity_nonlocalized == "WARNING"


def _records(wanted: dict[Key, Key], lines: Iterable[tuple[Any, ...]]) -> dict[Key, Record]:
    """Return the lines that are wanted as records."""
    find: Callable[[tuple[str, str, str]], Key | None] = wanted.get  # type: ignore[assignment]  # a Key is such a tuple
    ops: dict[tuple[str, int], Op] = {}
    found: dict[Key, Record] = {}
    for domain, entity_name, entity_id, row, version, writer, n in lines:
        key = find((domain, entity_name, entity_id))
        if key is not None:
            op = ops.get((writer, n))
            if op is None:
                op = ops[writer, n] = Op(writer, n)
            found[key] = Record(row.encode(), version, op)
    return found


def _recordset(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return msgspec.json.encode([dict(zip(names, row, strict=True)) for row in rows]).decode()


def _documents(group: list[_Waiting]) -> tuple[str, str, str]:
    """Return ops, expected versions and changes as the statement takes them."""
    asked = [(at, waiting.asked) for at, waiting in enumerate(group)]
    return (
        _recordset(("at", "w", "n"), [(at, *one.op) for at, one in asked]),
        _recordset(("at", "d", "e", "i", "v"), [(at, *key, v) for at, one in asked for key, v in one.expect.items()]),
        _recordset(("at", "d", "e", "i", "r"), [(at, *key, r) for at, one in asked for key, r in one.texts.items()]),
    )


def _refusal(verdict: str, detail: str | None, scope: str, op: Op, name: str) -> HoldfastError:
    if verdict == "behind":
        return ConflictError(
            f"op {op.n} of writer {op.writer} comes after a later one: that writer has moved on", backend=name
        )
    parts = msgspec.json.decode(detail or "[]")
    if verdict == "clash":
        keys = [Key(*key) for key in parts]
        return ConflictError(
            f"{', '.join(map(str, keys[:3]))}: not at the expected version: read again, then decide again",
            keys=keys,
            backend=name,
        )
    other, *key = parts
    return InvalidInputError(
        f"{Key(*key)} lies in the scope {other!r}, so {scope!r} cannot hold it: a key has one scope", backend=name
    )


def _copy(error: HoldfastError) -> HoldfastError:
    """Return the same error for another caller, since each gets a traceback of its own."""
    twin = type(error)(str(error), backend=error.backend)
    with contextlib.suppress(AttributeError):
        twin.__cause__ = error.__cause__
    return twin
