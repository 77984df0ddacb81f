"""Lifeline: how one session commits while the store may be slow, full or lost.

Every commit goes through here and is measured. An exit that the store refuses, or does not answer in time, is kept in
the emergency journal; from then on the session is *ahead* of the store, and everything that it keeps is merged by one
commit as soon as the store takes it.

Invariants:

* While the session is ahead, nothing is committed past what is kept: the merge comes first.
* A commit that was sent and given up may still be applied; it is settled before the merge, which then looks at the
  stored session row and leaves out what is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..contract import Key
from ..domains import context_key
from ..errors import (
    ConflictError,
    FailedError,
    FencedError,
    InvalidInputError,
    UnavailableError,
    UnknownOutcomeError,
)
from ..names import Context
from ..rows import Guard, Owner, Row, SessionRow
from ..store import Loaded, Store, Writer
from .emergency import Kept, beside_others, remaining, together
from .lanes import commit_surely
from .modes import Mode
from .tenure import Tenure
from .worker import fenced

if TYPE_CHECKING:
    from .health import Health

T = TypeVar("T")

NO_STORE = (UnavailableError, UnknownOutcomeError, FailedError)
_PATIENT_TIMES = 10


class Lifeline:
    """How one session commits.

    Args:
        context: Whose.
        store: Where its rows lie.
        writer: The session's lane.
        health: Of the store.
        has_lease: Whether what cannot be taken back may be done.
    """

    def __init__(
        self, context: Context, store: Store, writer: Writer, health: Health, has_lease: Callable[[], bool]
    ) -> None:
        self._context, self._store, self._writer, self._health = context, store, writer, health
        self._has_lease = has_lease
        self._hung: asyncio.Future[int] | None = None
        """A commit that was given up, though it may still be under way."""
        self._merging: asyncio.Task[bool] | None = None
        """A merge under way. It goes on when nobody waits for it any more: a slow store must come to its end too."""
        self._guards_unknown = False
        """The guard rows of the next exit could not be read, so that only a merge can rewrite them."""
        self.predecessor: Loaded[Owner] | None = None
        """The owner row that is still to be replaced: the store could not be written when this session began."""
        self.overtaken: list[Kept] = []
        """What recovery found kept, though another owner has gone on; it was left out."""

    @property
    def owes(self) -> bool:
        """Whether the store is to be asked or told something before anything else."""
        under_way = self._hung is not None or self._merging is not None
        return self.is_ahead or under_way or self.predecessor is not None

    @property
    def kept(self) -> list[Kept]:
        """What the store does not have yet."""
        return self._health.emergency.kept(self._context)

    def kept_rows(self, domain: str) -> dict[Key, Row]:
        """Return what the store does not have yet of a domain, the newest of each key."""
        changes, _ = together(self.kept)
        return {key: row for key, row in changes.items() if key.domain == domain and row is not None}

    @property
    def is_ahead(self) -> bool:
        """Whether something is kept that the store does not have."""
        return bool(self.kept)

    @property
    def can_keep(self) -> bool:
        """Whether an exit may be kept in the journal and acted on."""
        return self._health.emergency.has_room and (self._health.policy.exit_without_lease or self._has_lease())

    @property
    def skips_store(self) -> bool:
        """Whether an exit goes to the journal at once: the store is lost, or is behind already."""
        behind = self._guards_unknown or self.is_ahead or self.predecessor is not None
        return self.can_keep and (behind or self._health.mode >= Mode.CLOSE_ONLY)

    async def guards(self, names: tuple[Key, ...], *, exits: bool) -> dict[Key, Guard]:
        """Return the guard rows of slots that are given back; those of an exit that is kept are read at the merge."""
        self._guards_unknown = False
        if not names or (exits and self.skips_store):
            return {}
        asked = self._store.salvage(*names)
        try:
            found, _ = await (self._in_time(asked) if exits and self.can_keep else asked)
        except UnavailableError:
            if not (exits and self.can_keep):
                raise
            self._guards_unknown = True
            self._health.ended(self._health.began(), UnavailableError("the guard rows cannot be read"))
            return {}
        return {key: cast("Guard", loaded.row) for key, loaded in found.items()}

    async def commit(
        self,
        tenure: Tenure,
        rows: Mapping[Key, Row | None],
        more: Mapping[Key, Row | None],
        expect: Mapping[Key, int],
        *,
        exits: bool,
    ) -> bool:
        """Commit, and merge before it what is kept; the caller holds the tenure's turn.

        Args:
            rows: What was decided.
            more: What goes along where the store takes it: deletions of delivered events, outages.
            exits: ``rows`` may be kept in the journal.

        Returns:
            True once all of it is in the store; False when ``rows`` are kept, and ``more`` is nowhere.

        Raises:
            FencedError, GuardMovedError, UnavailableError, FailedError: As :meth:`Tenure.commit`.

        Crash: Before the return, all of ``rows`` or none are in the store or in the journal; after it, all.
        """
        if exits and self.skips_store:
            self._guards_unknown = False
            await self._keep(tenure, rows)
            return False
        if self._guards_unknown and any(key.domain == "guard" for key in rows):
            raise UnavailableError(f"{self._context}: the guard rows of its risk profiles cannot be read")
        before = self._hung
        try:
            try:
                await self._to_store(tenure, {**more, **rows}, expect, bounded=exits or not rows, exits=exits)
                return True
            except NO_STORE:
                if not (exits and self.can_keep):
                    raise
                await self._keep(tenure, rows)
                return False
        except NO_STORE as error:
            if exits and self._hung is not before:  # it may be applied yet: nothing can be decided on what is known
                told = f"{self._context}: an exit was given up, and can be kept no more: recover with a new session"
                raise FailedError(told) from error
            raise

    async def merge(self, tenure: Tenure, *, recovering: bool = False) -> bool:
        """Commit what is kept; the caller holds the tenure's turn, or is about to recover anew.

        Args:
            recovering: The context was just taken over: what another owner has overtaken is forgotten.

        Returns:
            Whether the store was changed.

        Raises:
            FencedError: Another owner has gone on; what is kept stays in the journal.
            UnavailableError: Not now.

        Crash: All of it is in the store or none; merging again leaves out what is there.
        """
        if self._merging is None:
            self._merging = asyncio.get_running_loop().create_task(self._measured_merge(tenure, recovering))
            self._merging.add_done_callback(_looked_at)
        task, seconds = self._merging, self._health.policy.patience_seconds
        try:
            # Where no exit waits for it, it may take the time that it takes, though not for ever.
            await asyncio.wait((task,), timeout=_PATIENT_TIMES * seconds if recovering else seconds)
        except asyncio.CancelledError:
            await self._give_up_merging()
            raise
        if not task.done():
            raise UnavailableError(f"{self._context}: the merge of the emergency journal takes over {seconds:g} s")
        self._merging = None
        try:
            return task.result()
        except UnknownOutcomeError as error:
            raise UnavailableError(f"{self._context}: what is in the emergency journal waits: {error}") from error

    async def _measured_merge(self, tenure: Tenure, recovering: bool) -> bool:
        number = self._health.began()
        try:
            done = await self._merge(tenure, recovering)
        except BaseException as error:
            self._health.ended(number, error)
            raise
        self._health.ended(number)
        return done

    async def _give_up_merging(self) -> None:
        task, self._merging = self._merging, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # ------------------------------------------------------------------ the store

    async def _to_store(
        self,
        tenure: Tenure,
        changes: Mapping[Key, Row | None],
        expect: Mapping[Key, int],
        *,
        bounded: bool,
        exits: bool,
    ) -> None:
        while self.owes:  # more may have been kept since a merge began that took its time
            await self.merge(tenure)
        if not changes:
            return
        number = self._health.began()
        try:
            # An entry, or what waits for no exit, may take the time that it takes.
            bounded = bounded and self._health.emergency.has_room
            sending = tenure.commit(changes, expect)
            await (self._in_time(sending, hangs=True, exits=exits) if bounded else sending)
        except BaseException as error:
            self._health.ended(number, error)
            raise
        self._health.ended(number)

    async def _in_time(self, work: Awaitable[T], *, hangs: bool = False, exits: bool = False) -> T:
        """Wait for the store as long as the policy says.

        Args:
            hangs: It is a commit that may still be applied afterwards.
            exits: It is given up only while it can be kept: whoever decided anew would meet its own commit.

        Raises:
            UnavailableError: It took longer; it was given up.
        """
        task: asyncio.Future[T] = asyncio.ensure_future(work)
        seconds = self._health.policy.patience_seconds
        try:
            await asyncio.wait((task,), timeout=seconds)
            while exits and not task.done() and not self.can_keep:
                await asyncio.wait((task,), timeout=seconds)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        if task.done():
            return task.result()
        task.cancel()
        task.add_done_callback(_looked_at)
        if hangs:
            self._hung = cast("asyncio.Future[int]", task)
        raise UnavailableError(f"{self._context}: the store gave no answer within {seconds:g} s")

    async def settle(self) -> None:
        """Give up the merge, and wait until no commit is under way; for the end of a session. Raises nothing."""
        await self._give_up_merging()
        if self._hung is not None:
            await asyncio.gather(self._hung, return_exceptions=True)

    async def _merge(self, tenure: Tenure, recovering: bool) -> bool:
        if self._hung is not None:
            await asyncio.wait((self._hung,))
            self._hung = None
        try:
            await self._writer.resend()
        except InvalidInputError:
            pass  # it is settled: there was none under way
        except ConflictError:
            tenure.is_doubtful = True  # it was not applied and cannot be any more: perhaps somebody else owns it
        if self.predecessor is not None:
            await self._take_over(tenure, self.predecessor.row)
        owner_key, session_key = context_key("owner", self._context), context_key("session", self._context)
        kept = list(self.kept)
        slots = tuple(dict.fromkeys(key for one in kept for key in one.guards))
        found, _ = await self._store.salvage(owner_key, session_key, *slots)
        owner = cast("Loaded[Owner] | None", found.get(owner_key))
        mine = tenure.owner
        if owner is None or (owner.row.holder, owner.row.epoch) != (mine.holder, mine.epoch):
            raise fenced(self._context, mine, None if owner is None else owner.row)
        session = cast("Loaded[SessionRow] | None", found.get(session_key))
        if kept:
            todo = remaining(kept, None if session is None else session.row)
            if todo is None:
                if not recovering:
                    raise FencedError(f"{self._context}: somebody else wrote its session row: recover", key=session_key)
                self.overtaken = kept
            tenure.adopt(owner, session)
            if todo:
                changes, _ = together(todo)
                if recovering:
                    orders = await self._store.scan("order", owner_key.entity_name)
                    changes = beside_others(changes, {key: loaded.row for key, loaded in orders.items()})
                for key in slots:
                    old = cast("Guard", found[key].row).changes if key in found else 0
                    changes[key] = Guard(changes=old + 1)
                if changes:
                    await tenure.commit(changes, {})
            await self._health.emergency.done(self._context, kept[-1].number)
            return bool(todo)
        tenure.adopt(owner, session)
        return False

    async def _take_over(self, tenure: Tenure, predecessor: Owner) -> None:
        """Make up for the commit that was missing when this session began to stand in."""
        owner_key, session_key = context_key("owner", self._context), context_key("session", self._context)
        found, _ = await self._store.salvage(owner_key, session_key)
        owner = cast("Loaded[Owner] | None", found.get(owner_key))
        session = cast("Loaded[SessionRow] | None", found.get(session_key))
        mine = tenure.owner
        if owner is None or session is None or session.row != tenure.session:
            raise fenced(self._context, mine, None if owner is None else owner.row)
        if (owner.row.holder, owner.row.epoch) != (mine.holder, mine.epoch):  # else its answer was lost
            if owner.row != predecessor:
                raise fenced(self._context, mine, owner.row)
            expect = {owner_key: owner.version, session_key: session.version}
            try:
                number = await commit_surely(
                    self._writer, {owner_key: mine}, expect, patient=lambda: not tenure.closing
                )  # fmt: skip
            except ConflictError as error:
                raise UnavailableError(f"{self._context}: its rows changed under the takeover: {error}") from error
            owner = Loaded(mine, number)
        tenure.adopt(owner, session)
        self.predecessor = None

    # ------------------------------------------------------------------ the journal

    async def _keep(self, tenure: Tenure, rows: Mapping[Key, Row | None]) -> None:
        kept = self.kept
        base = kept[-1].after if kept else tenure.session
        emergency = self._health.emergency
        new = await emergency.keep(self._context, base, rows, epoch=tenure.owner.epoch)
        if not (self._health.policy.exit_without_lease or self._has_lease()):  # it may have run out meanwhile
            await emergency.withdraw(self._context, new.number)
            raise UnavailableError(f"{self._context}: its lease ran out: whoever owns it now makes the exit")


def _looked_at(done: asyncio.Future[Any]) -> None:
    """Look at how a task ended for which nobody may be waiting any more."""
    if not done.cancelled():
        done.exception()
