"""How the commits of one scope wait, are sent group by group, and are answered within their deadline.

Invariants:

* One group of a scope is under way at a time; what arrives meanwhile makes the next one.
* "Nothing was written" is said only of an op that was not sent, or that the server refused; never of one whose
  earlier try may still be under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from ...contract import Key, Op, Survives
from ...errors import (
    ConflictError,
    FailedError,
    HoldfastError,
    InvalidInputError,
    UnavailableError,
    UnknownOutcomeError,
    UnsafeSettingError,
)
from ..waiting import copy_of
from .attestation import Attested
from .connections import Connection, Connections
from .statements import Asked, Statements, recordset, take_group

_TRIES = 3
"""The first two may find that another process was faster; the third waits for its turn."""


class Lane:
    """The commits of one scope of one opened backend."""

    def __init__(
        self,
        scope: str,
        connections: Connections,
        sql: Statements,
        attested: Attested,
        name: str,
        deadline_seconds: float,
    ) -> None:
        self.suspect = False
        """What can be read may not have reached the standby yet."""
        self._scope = scope
        self._connections = connections
        self._sql = sql
        self._attested = attested
        self._name = name
        self._deadline_seconds = deadline_seconds
        self._known = False
        """The scope's row exists."""
        self._queue: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None
        self._in_doubt: dict[str, int] = {}
        """Each writer's op whose outcome is not known."""

    async def commit(self, asked: Asked) -> int:
        """Send it, together with all that wait at that moment, and return its number."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(asked, loop.create_future())
        self._queue.append(waiting)
        if self._task is None:
            self._task = loop.create_task(self._serve())
        timer = loop.call_later(self._deadline_seconds, self._expire, waiting)
        try:
            return await waiting.future
        finally:
            timer.cancel()

    async def idle(self) -> None:
        """Wait until nothing is under way."""
        while self._task is not None:
            await asyncio.wait({self._task})

    def _expire(self, waiting: _Waiting) -> None:
        late = f"{self._name} did not answer within {self._deadline_seconds} s"
        if waiting.sent:
            self._refuse(waiting, UnknownOutcomeError(late, backend=self._name))
        else:
            self._refuse(waiting, UnavailableError(f"{late}: nothing was written", backend=self._name))

    async def _serve(self) -> None:
        """Send group after group until nobody waits."""
        try:
            while self._queue:
                live = [waiting for waiting in self._queue if not waiting.future.done()]
                taken = set(take_group([waiting.asked for waiting in live])) if live else set()
                group = [waiting for at, waiting in enumerate(live) if at in taken]
                self._queue = [waiting for at, waiting in enumerate(live) if at not in taken]
                if group:
                    await self._send(group)
        finally:
            self._task = None

    async def _send(self, group: list[_Waiting]) -> None:
        try:
            if not self._known:
                await self._connections.use(lambda connection: connection.execute(self._sql.add_scope, [self._scope]))
                self._known = True
            for waiting in group:
                waiting.sent = True
            await self._decide(group)
        except InvalidInputError as error:
            if len(group) == 1:
                self._refuse(group[0], error)
            else:  # one of them is to blame, and the others must not suffer
                for waiting in group:
                    await self._send([waiting])
        except HoldfastError as error:
            if isinstance(error, FailedError):
                self._known = False  # the tables are gone, and so is the scope
            for waiting in group:
                self._refuse(waiting, error)
        except Exception as error:  # a defect of ours: nobody may wait for ever
            for waiting in group:
                self._refuse(waiting, UnknownOutcomeError(f"{self._name}: {error!r:.200}", backend=self._name))

    async def _decide(self, group: list[_Waiting]) -> None:
        if len(group) == 1 and await self._commit_one(group[0]):
            return
        values = (self._scope, *_documents(group), self._attested.synchronous_commit, self._attested.needs_standby)
        for attempt in range(1, _TRIES + 1):
            sending = _Sending(self._sql.commit, values, self._sql.lock_scope if attempt == _TRIES else None)
            found = await self._connections.use(sending, writes=True)
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
            self._known = False  # its row must be gone: make it anew next time
            raise UnavailableError(f"{self._name}: nothing was written: try again", backend=self._name)
        for at, verdict, number, _, _, detail in found:
            self._settle(group[at], verdict, number, detail, warned=sending.warned)

    async def _commit_one(self, waiting: _Waiting) -> bool:
        """Send a single commit the short way; False if nothing was written, and the long way must tell why."""
        op, expect, texts, _ = waiting.asked
        if None in texts.values():
            return False
        values = (
            self._scope,
            op.writer,
            recordset(("d", "e", "i", "v"), [(*key, version) for key, version in expect.items()]),
            recordset(("d", "e", "i", "r"), [(*key, text) for key, text in texts.items()]),
            self._attested.synchronous_commit,
            self._attested.needs_standby,
            str(op.n),  # as text, lest small and large numbers are prepared apart
        )
        sending = _Sending(self._sql.commit_one, values, None)
        try:
            found = await self._connections.use(sending, writes=True)
        except InvalidInputError:
            return False
        if found:
            self._settle(waiting, "granted", found[0][0], None, warned=sending.warned)
        return bool(found)

    def _settle(self, waiting: _Waiting, verdict: str, number: int, detail: str | None, *, warned: bool) -> None:
        op = waiting.asked.op
        if verdict in ("granted", "repeated"):
            if warned:  # the server stopped waiting for its standby
                why = f"{self._name}: the server could not tell whether its standby has it"
                self._refuse(waiting, UnknownOutcomeError(why, backend=self._name))
                return
            self._in_doubt.pop(op.writer, None)
            if not waiting.future.done():
                waiting.future.set_result(number)
            return
        self._in_doubt.pop(op.writer, None)
        self._refuse(waiting, _refusal(verdict, detail, self._scope, op, self._name))

    def _refuse(self, waiting: _Waiting, error: HoldfastError) -> None:
        """Tell a caller; "nothing was written" is not said of an op whose earlier try may still be under way."""
        op = waiting.asked.op
        doubted = self._in_doubt.get(op.writer) == op.n
        if isinstance(error, UnknownOutcomeError):
            self._in_doubt[op.writer] = op.n
            self.suspect = self.suspect or self._attested.guarantees.survives >= Survives.SERVER
        elif doubted and isinstance(error, UnavailableError):
            error = UnknownOutcomeError(f"{error} (an earlier try may have been)", backend=self._name)
        if not waiting.future.done():
            told = error if error.__traceback__ is None else copy_of(error)
            waiting.future.set_exception(told)


class _Waiting:
    """One call of ``commit``."""

    __slots__ = ("asked", "future", "sent")

    def __init__(self, asked: Asked, future: asyncio.Future[int]) -> None:
        self.asked = asked
        self.future = future
        self.sent = False


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


def _documents(group: list[_Waiting]) -> tuple[str, str, str]:
    """Return ops, expected versions and changes as the statement takes them."""
    asked = [(at, waiting.asked) for at, waiting in enumerate(group)]
    return (
        recordset(("at", "w", "n"), [(at, *one.op) for at, one in asked]),
        recordset(("at", "d", "e", "i", "v"), [(at, *key, v) for at, one in asked for key, v in one.expect.items()]),
        recordset(("at", "d", "e", "i", "r"), [(at, *key, r) for at, one in asked for key, r in one.texts.items()]),
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
