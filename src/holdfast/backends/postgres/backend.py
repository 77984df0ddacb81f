"""PostgreSQL: all commits of a scope that wait go to the server as one statement, with one flush there.

The contract is here. How commits wait and are sent is in ``lane.py``; the SQL, and why one statement is enough, in
``statements.py``; connections, deadlines and what errors mean in ``connections.py``; what is asked of the server at
open in ``attestation.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ...contract import Guarantees, Head, Key, KeyPrefix, Op, Record, WriterOp
from ...errors import FailedError, InvalidInputError
from ..sql import Doorman, records
from .attestation import Attested, prepare
from .connections import Connection, Connections
from .lane import Lane
from .place import Place
from .statements import Asked, recordset, statements

_MANY = 32
"""From so many keys on, reading a range is tried first."""


class PostgresBackend:
    """Keeps rows in a schema of a PostgreSQL database, which several processes may share.

    Args:
        url: ``postgresql://user@host:port/database?schema=holdfast``, with whatever else libpq takes; the password
            is better left to ``PGPASSWORD`` or ``~/.pgpass``. The schema is made if it is missing.
        deadline_seconds: For every call, 0.2 to 60. No transaction outlives it on the server either. Can also be given
            in the URL (``&deadline_seconds=2``), which goes first.
        max_connections: How many connections at once, 1 to 100. Scopes commit side by side.
    """

    def __init__(self, url: str, *, deadline_seconds: float = 5.0, max_connections: int = 4) -> None:
        if not 1 <= max_connections <= 100:
            raise InvalidInputError(f"max_connections is {max_connections!r}: use 1 to 100")
        self._place = Place(url, deadline_seconds)
        self._name = self._place.name
        self._doorman = Doorman()
        self._deadline_seconds = self._place.deadline_seconds
        self._max_connections = max_connections
        self._sql = statements(self._place.schema)
        self._connections: Connections | None = None
        self._read_only = False
        self._attested: Attested
        self._lanes: dict[str, Lane] = {}

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
        for lane in self._lanes.values():
            lane.suspect = False

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys``; see :meth:`holdfast.contract.Backend.read`."""
        if not keys:
            self._opened()
            return {}
        if len(keys) >= _MANY:
            # Most often they are all that lie between the first and the last, and then this is much quicker.
            limit = 2 * len(keys) + 100
            found = await self._fetch(self._sql.read_range, scope, *min(keys), *max(keys), limit)
            if len(found) < limit:
                return records(keys, found)[1]
        wanted = recordset(("d", "e", "i"), list(dict.fromkeys(keys)))
        return records(keys, await self._fetch(self._sql.read, scope, wanted))[1]

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
        if any(lane.suspect for lane in self._lanes.values()):
            await self._flush(connections)  # else what is read might be lost with the primary

        async def fetch(connection: Connection) -> list[tuple[Any, ...]]:
            # Binary, so that a row's bytes come as bytes.
            return await (await connection.execute(statement, values, prepare=True, binary=True)).fetchall()

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
        connections = self._opened()
        if self._read_only:
            raise FailedError(
                f"{self._name} was opened read-only: nothing was written; open it for writing", backend=self._name
            )
        if type(op) is not Op:
            op = Op(*op)
        texts, size = self._doorman.admit(scope, changes, expect, op)
        lane = self._lanes.get(scope)
        if lane is None:
            lane = Lane(scope, connections, self._sql, self._attested, self._name, self._deadline_seconds)
            self._lanes[scope] = lane
        return await lane.commit(Asked(op, dict(expect), texts, size))

    async def close(self) -> None:
        """Wait for the commits under way, then close the connections. Repeatable.

        Crash: As before the call: nothing acknowledged depends on close.
        """
        connections = self._connections
        if connections is None:
            return
        self._connections = None
        await asyncio.shield(self._settle(connections))

    async def _settle(self, connections: Connections) -> None:
        for lane in self._lanes.values():
            await lane.idle()
        self._lanes.clear()
        await connections.close()

    def _opened(self) -> Connections:
        if self._connections is None:
            raise FailedError(f"{self._name} is not open: open it first", backend=self._name)
        return self._connections
