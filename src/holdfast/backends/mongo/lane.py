"""How the commits of one scope wait, are judged on what its document holds, and are written as one update.

Invariants:

* One update of a scope is under way at a time; what arrives meanwhile makes the next one.
* An update applies to exactly the state that its commits were judged on (number and tip are its filter). So a lane
  that nobody interferes with needs one round trip, and of several processes one wins; the others look again.
* Conflicts and repetitions are told only on a state that was read after the commit had arrived here.
* "Nothing was written" is said only of an op that was not sent, or whose update did not match; never of one whose
  earlier try may still be under way.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Iterable
from typing import Any

from ...contract import MAX_PAYLOAD_BYTES, Key, WriterOp
from ...errors import (
    CorruptedError,
    FailedError,
    HoldfastError,
    NewerFormatError,
    UnavailableError,
    UnknownOutcomeError,
)
from ..waiting import copy_of
from .document import (
    ABSENT,
    FORMAT,
    Asked,
    Known,
    Plan,
    RowState,
    field_of,
    key_of,
    rows_asked,
    writer_of,
)
from .link import DUPLICATE, Link, RefusedError

MAX_GROUP = 512
"""How many commits share one update at most; fewer than a scope remembers writers."""
MAX_GROUP_BYTES = MAX_PAYLOAD_BYTES
"""After so many payload bytes a group is closed: the command itself must fit the server's limit."""
BARRIER = "~barrier"
"""The document that is written where something that was read has to be made durable first."""
_log = logging.getLogger(__name__)


class Lane:
    """The commits of one scope of one opened backend.

    Args:
        scope: Whose.
        link: Where they are sent.
        floors: Each scope's highest number that was acknowledged here.
        limit_bytes: How large the document may become.
        deadline_seconds: How long a call may take.
    """

    def __init__(
        self, scope: str, link: Link, floors: dict[str, int], limit_bytes: int, deadline_seconds: float
    ) -> None:
        self._scope = scope
        self._link = link
        self._shown = link.shown
        self._floors = floors
        self._limit = limit_bytes
        self._deadline_seconds = deadline_seconds
        self._known: Known | None = None
        self._queue: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None
        self._in_doubt: dict[str, int] = {}
        """Each writer's op whose outcome is not known."""

    async def commit(self, asked: Asked) -> int:
        """Write it, together with all that wait at that moment, and return its number.

        Cancellation: Not yet sent, it is not sent any more; sent, it may be applied.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._deadline_seconds
        waiting = _Waiting(asked, loop.create_future(), deadline)
        timer = loop.call_at(deadline, self._expire, waiting)
        self._queue.append(waiting)
        if self._task is None:
            self._task = loop.create_task(self._serve())
        try:
            return await waiting.future
        finally:
            timer.cancel()

    async def idle(self) -> None:
        """Wait until nothing is under way."""
        while self._task is not None:
            await asyncio.wait({self._task})

    def _expire(self, waiting: _Waiting) -> None:
        late = f"{self._shown}: no answer in time"
        if waiting.sent:
            self._refuse(waiting, UnknownOutcomeError(f"{late}; send the same op again", backend=self._shown))
        else:
            self._refuse(waiting, UnavailableError(f"{late}; nothing was written", backend=self._shown))

    async def _serve(self) -> None:
        """Write group after group until nobody waits."""
        try:
            while self._queue:
                group = self._next_group()
                if group:
                    await self._write(group)
        finally:
            self._task = None

    def _next_group(self) -> list[_Waiting]:
        group: list[_Waiting] = []
        size = taken = 0
        for waiting in self._queue:
            if not waiting.future.done():  # it may have been cancelled, or have expired
                if group and (len(group) == MAX_GROUP or size + waiting.asked.size > MAX_GROUP_BYTES):
                    break
                group.append(waiting)
                size += waiting.asked.size
            taken += 1
        del self._queue[:taken]
        return group

    async def _write(self, group: list[_Waiting]) -> None:
        try:
            await self._decide(group)
        except HoldfastError as error:
            self._known = None
            for waiting in group:
                self._refuse(waiting, _not_sent(error) if not waiting.sent else error)
        except Exception as error:  # a defect of ours: nobody may wait for ever
            self._known = None
            _log.exception("a group of commits failed")
            for waiting in group:
                told = f"{self._shown}: {type(error).__name__} in a group of commits"
                self._refuse(waiting, UnknownOutcomeError(told, backend=self._shown))
        except BaseException:
            for waiting in group:  # cancelled with the loop: whoever still waits must not wait for ever
                ending = f"{self._shown}: this process is ending"
                self._refuse(waiting, UnknownOutcomeError(ending, backend=self._shown))
            raise

    async def _decide(self, group: list[_Waiting]) -> None:
        """Judge a group and write what is granted, again and again until nobody else was faster."""
        fresh, lost = False, 0
        deadline = max(waiting.deadline for waiting in group)
        while group := [waiting for waiting in group if not waiting.future.done()]:
            known = self._known
            if known is None:
                known, fresh = await self._look(group, deadline), True
            elif known.lacks(waiting.asked for waiting in group):
                # Nobody else writes here, and new keys keep coming: know them all, and never look again.
                known, fresh = await self._look_at_all(deadline), True
            plan = Plan(known, secrets.token_hex(8), self._limit, self._shown)
            granted = [plan.judge(waiting.asked) for waiting in group]
            if not all(granted) and not fresh:
                self._known = None  # what is remembered may be out of date, and then so would be the refusal
                continue
            for waiting, answer in zip(group, plan.answers, strict=True):
                waiting.sent = isinstance(answer, int)
            if not plan.grants:
                await self._barrier(plan, deadline)
            elif not await self._apply(plan, known, deadline):
                for waiting in group:
                    waiting.sent = False
                self._known, fresh, lost = None, False, lost + 1
                if lost > 1:  # several processes at it: who waits a little, by chance, lets another one through
                    await asyncio.sleep(random.uniform(0, 0.001 * 2 ** min(lost, 6)))
                continue
            for waiting, answer in zip(group, plan.answers, strict=True):
                self._settle(waiting, answer)
            return

    async def _look(self, group: list[_Waiting], deadline: float) -> Known:
        """Read what must be known to judge a group; remember it."""
        keys: set[Key] = set()
        for waiting in group:
            keys.update(waiting.asked.expect, waiting.asked.texts)
        parts = {"format": 1, "number": 1, "tip": 1, "bytes": 1, "writers": 1}
        asked = rows_asked(keys, ".version", ".bytes")
        # Level "local": whatever is decided on it counts only if the update then matches this very state; a refusal
        # tells the caller to read again, and that reads what is durable.
        floor = self._floor
        found = await self._link.find(self._scope, {**parts, **asked}, deadline)
        return self._remember(known_of(found, keys, self._scope, self._shown), floor)

    async def _look_at_all(self, deadline: float) -> Known:
        """Read the versions of all rows, without the rows; remember them."""
        floor = self._floor
        found = await self._link.aggregate(all_versions(self._scope), deadline, level="local")
        return self._remember(all_known_of(found[0] if found else None, self._scope, self._shown), floor)

    @property
    def _floor(self) -> int:
        """Ask for it before the question: what is read meanwhile of others' commits may raise it."""
        return self._floors.get(self._scope, 0)

    def _remember(self, known: Known, floor: int) -> Known:
        if known.number < floor:
            raise taken_back(self._shown, self._scope, known.number, floor)
        self._known = known
        return known

    async def _apply(self, plan: Plan, known: Known, deadline: float) -> bool:
        """Write what a plan grants; False if the document is not in the state that it was judged on."""
        command: dict[str, Any]
        if known.number:
            command = {"update": self._link.collection, "updates": [plan.update(self._scope)]}
        else:
            command = {"insert": self._link.collection, "documents": [plan.document(self._scope)]}
        try:
            matched = await self._link.write(command, deadline)
        except RefusedError as refused:
            assert refused.code == DUPLICATE, refused  # another process made the document first
            return False
        if not matched:
            return False
        known.advance(plan)
        self._floors[self._scope] = max(plan.number, self._floors.get(self._scope, 0))
        return True

    async def _barrier(self, plan: Plan, deadline: float) -> None:
        """Make durable what a repeated op is answered with: perhaps nobody has waited for it yet."""
        if plan.repeats:
            await barrier(self._link, deadline)

    def _settle(self, waiting: _Waiting, answer: int | HoldfastError) -> None:
        if isinstance(answer, UnavailableError):
            self._refuse(waiting, answer)
            return
        self._in_doubt.pop(waiting.asked.op.writer, None)
        if isinstance(answer, HoldfastError):
            self._refuse(waiting, answer)
        elif not waiting.future.done():
            waiting.future.set_result(answer)

    def _refuse(self, waiting: _Waiting, error: HoldfastError) -> None:
        """Tell a caller; "nothing was written" is not said of an op whose earlier try may still be under way."""
        op = waiting.asked.op
        if isinstance(error, UnknownOutcomeError):
            self._in_doubt[op.writer] = op.n
        elif self._in_doubt.get(op.writer) == op.n and isinstance(error, UnavailableError):
            error = UnknownOutcomeError(f"{error} (an earlier try may have been)", backend=self._shown)
        if not waiting.future.done():
            waiting.future.set_exception(error if error.__traceback__ is None else copy_of(error))


class _Waiting:
    """One call of ``commit``."""

    __slots__ = ("asked", "deadline", "future", "sent")

    def __init__(self, asked: Asked, future: asyncio.Future[int], deadline: float) -> None:
        self.asked = asked
        self.future = future
        self.deadline = deadline
        self.sent = False
        """It may be applied: it is in an update that was sent, or was found there."""


async def barrier(link: Link, deadline: float) -> None:
    """Return when everything that the primary had at this moment is in the journals of a majority.

    Raises:
        UnknownOutcomeError, UnavailableError: It is not known to be.
    """
    update = {"q": {"_id": BARRIER}, "u": {"$inc": {"n": 1}}, "upsert": True}
    for _ in range(3):
        try:
            await link.write({"update": link.collection, "updates": [update]}, deadline)
            return
        except RefusedError:  # two processes made the document at once; the next one finds it
            continue


def known_of(found: dict[str, Any] | None, keys: Iterable[Key], scope: str, shown: str) -> Known:
    """Return what a scope's document says of itself and of these rows.

    Raises:
        CorruptedError: Another hand wrote it.
    """
    known = _head_of(found, scope, shown)
    rows = {} if found is None else found.get("rows", {})
    try:
        for key in keys:
            row = rows.get(field_of(key))
            known.rows[key] = ABSENT if row is None else RowState(int(row["version"]), int(row["bytes"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise foreign(shown, f"the document of scope {scope}") from None
    return known


def all_versions(scope: str) -> list[dict[str, Any]]:
    """Return the pipeline that brings a document with the versions of all its rows, but not the rows."""
    part = {"k": "$$this.k", "v": "$$this.v.version", "b": "$$this.v.bytes"}
    rows = {"$map": {"input": {"$objectToArray": "$rows"}, "in": part}}
    return [
        {"$match": {"_id": scope}},
        {"$project": {"format": 1, "number": 1, "tip": 1, "bytes": 1, "writers": 1, "rows": rows}},
    ]


def all_known_of(found: dict[str, Any] | None, scope: str, shown: str) -> Known:
    """Return what :func:`all_versions` brought.

    Raises:
        CorruptedError: Another hand wrote it.
    """
    known = _head_of(found, scope, shown)
    try:
        for row in () if found is None else found["rows"]:
            known.rows[key_of(row["k"])] = RowState(int(row["v"]), int(row["b"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise foreign(shown, f"the document of scope {scope}") from None
    known.complete = True
    return known


def _head_of(found: dict[str, Any] | None, scope: str, shown: str) -> Known:
    if found is None:
        known = Known(0, "", 0, {})
        known.complete = True
        return known
    require_format(found, scope, shown)
    try:
        number, tip, size = int(found["number"]), str(found["tip"]), int(found["bytes"])
        writers = {writer_of(name): WriterOp(int(w["n"]), int(w["number"])) for name, w in found["writers"].items()}
        if number < 1:
            raise ValueError(number)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise foreign(shown, f"the document of scope {scope}") from None
    return Known(number, tip, size, writers)


def require_format(found: dict[str, Any], scope: str, shown: str) -> None:
    """Refuse a scope's document that another version than this one has to read.

    Raises:
        NewerFormatError: A newer one wrote it.
        CorruptedError: Another hand did.
    """
    made_by = found.get("format")
    if not isinstance(made_by, int):
        raise foreign(shown, f"the document of scope {scope}")
    if made_by > FORMAT:
        raise NewerFormatError(
            f"{shown}: scope {scope} has format {made_by}; this version reads up to {FORMAT}: upgrade", backend=shown
        )


def foreign(shown: str, what: str, key: Key | None = None) -> CorruptedError:
    """Return the error for what is not as we write it."""
    return CorruptedError(f"{shown}: {what} was changed by another hand", key=key, backend=shown)


def taken_back(shown: str, scope: str, number: int, floor: int) -> FailedError:
    """Return the error for a server that lost commits which it had acknowledged."""
    return FailedError(
        f"{shown}: scope {scope} stands at commit {number}, though commit {floor} was acknowledged: the server lost "
        "commits (a failover, a restore, or its data were removed); stop, look into it, then open again",
        backend=shown,
    )


def _not_sent(error: HoldfastError) -> HoldfastError:
    """Return what an error means for a commit that was not in the update."""
    text = str(error).partition("; send")[0]
    if isinstance(error, UnknownOutcomeError | UnavailableError) and "nothing was written" not in text:
        return UnavailableError(f"{text}; nothing was written", backend=error.backend)
    return error
