"""Tenure: holding a context, and committing under it.

Every commit expects the owner row and the session row as they were last seen here, so that whoever takes
the context over ends this tenure: the next commit is refused and raises ``FencedError``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import cast

from ..contract import Key
from ..domains import context_key
from ..errors import ConflictError, FencedError, UnavailableError
from ..names import Context
from ..rows import Owner, Row, ScheduledSignal, SessionRow
from ..store import Loaded, Store, Writer
from .lanes import Sleep, commit_surely
from .worker import fenced, released

_MAX_ADOPTIONS = 20


class GuardMovedError(ConflictError):
    """A slot of a risk profile changed between the check and the commit; nothing was written. Check again."""


class Tenure:
    """The holding of one context by one session.

    Args:
        store: Where the context lies.
        writer: The session's lane.
        context: What is held.
        owner: The owner row that was written to take it, and its version.
        session: The session row as it was read or written last; None while there is none.
        sleep: Takes seconds; a seam for tests.
        lapses: Tells how often the lease had run out when it was taken again.
        proven: What that was before ``owner`` was written.
    """

    def __init__(
        self,
        store: Store,
        writer: Writer,
        context: Context,
        owner: Loaded[Owner],
        session: Loaded[SessionRow] | None,
        *,
        sleep: Sleep,
        lapses: Callable[[], int] = lambda: 0,
        proven: int = 0,
    ) -> None:
        self._store, self._writer, self._context, self._sleep = store, writer, context, sleep
        self._owner_key, self._session_key = context_key("owner", context), context_key("session", context)
        self._schedule_key = context_key("schedule", context)
        self._owner, self._session = owner, session
        self._lapses, self._proven = lapses, proven
        self.turn = asyncio.Lock()
        """One commit at a time: what it expects depends on the one before."""
        self.ignored: Loaded[ScheduledSignal] | None = None
        """A row that stands where a signal may wait, and means nothing; it is expected as it was found."""
        self.is_doubtful = False
        """A commit was refused, and it is not known yet whether that says that somebody else owns the context."""
        self.closing = False
        """Its session ends: it waits no longer for a store that cannot be used."""

    @property
    def owner(self) -> Owner:
        """The owner row under which it commits."""
        return self._owner.row

    @property
    def loaded(self) -> Loaded[Owner]:
        """The owner row with the version that the next commit expects."""
        return self._owner

    @property
    def session(self) -> SessionRow | None:
        """The session row as it was read or written last."""
        return None if self._session is None else self._session.row

    @property
    def is_proven(self) -> bool:
        """Whether the owner row was written since the lease ran out the last time."""
        return self._proven == self._lapses()

    def proof(self) -> dict[Key, Row | None]:
        """Return what a commit must write so that :attr:`is_proven` holds; empty where it does.

        Whoever found this worker silent for its lease may be about to take over. That commit expects the owner row
        unchanged, so writing it anew ends it, or is refused by it.
        """
        return {} if self.is_proven else {self._owner_key: self._owner.row}

    def adopt(self, owner: Loaded[Owner], session: Loaded[SessionRow] | None) -> None:
        """Go on from rows that were just read, once the caller knows whose they are."""
        self._owner, self._session, self.is_doubtful = owner, session, False

    async def release(self) -> None:
        """Let go of the context, so that whoever comes may have it at once; the caller holds :attr:`turn`.

        Raises:
            FencedError: Another owner has taken over already.
            UnavailableError: Nothing was written; others may have it when the lease is over.

        Crash: It is let go of, or will be when the lease is over.
        """
        await self.commit({self._owner_key: released(self._owner.row)}, {})

    async def commit(self, changes: Mapping[Key, Row | None], guards: Mapping[Key, int]) -> int:
        """Commit under this tenure; the caller holds :attr:`turn`.

        Args:
            changes: What to write, the session row included where it changes.
            guards: Version that each guard row had when a risk check was made; and 0 for each place that must
                be vacant.

        Raises:
            FencedError: Another owner has taken over; nothing was written.
            GuardMovedError: Nothing was written; make the check again.
            UnavailableError: Nothing was written; try again later.

        Crash: Before the return, all of the changes or none; after it, all.
        """
        lapses = self._lapses()
        for _ in range(_MAX_ADOPTIONS):
            expect = {
                self._owner_key: self._owner.version,
                self._session_key: 0 if self._session is None else self._session.version,
                **guards,
            }
            if self.ignored is not None and guards.get(self._schedule_key):
                expect[self._schedule_key] = self.ignored.version
            try:
                # Once an answer was lost, a refusal does not say that nothing was written: whoever decided anew then
                # would find its own commit, and take it for that of another owner.
                number = await commit_surely(
                    self._writer, changes, expect, sleep=self._sleep, patient=lambda: not self.closing
                )
            except ConflictError as error:
                self.is_doubtful = True
                await self._look_into(error, guards)
                continue
            self.is_doubtful = False
            if changes.get(self._owner_key) == self._owner.row:
                self._owner, self._proven = Loaded(self._owner.row, number), lapses
            row = changes.get(self._session_key)
            if row is not None:
                self._session = Loaded(cast("SessionRow", row), number)
            return number
        raise UnavailableError(f"{self._context}: its owner row changes too often: is it being moved?")

    async def _look_into(self, error: ConflictError, guards: Mapping[Key, int]) -> None:
        """Find out what a conflict means: taken over, a slot changed, or the same rows under other numbers."""
        found, damaged = await self._store.salvage(self._owner_key, self._session_key, *guards)
        owner = cast("Loaded[Owner] | None", found.get(self._owner_key))
        mine = self._owner.row
        if owner is None or (owner.row.holder, owner.row.epoch) != (mine.holder, mine.epoch):
            raise fenced(self._context, mine, None if owner is None else owner.row) from error
        session = cast("Loaded[SessionRow] | None", found.get(self._session_key))
        if (session and session.row) != (self._session and self._session.row) or self._session_key in damaged:
            raise FencedError(
                f"{self._context}: somebody else wrote its session row: stop trading it, then recover",
                key=self._session_key,
            ) from error
        self.is_doubtful = False
        adopted = self._adopt_ignored(found.get(self._schedule_key))
        moved = [
            key
            for key, version in guards.items()
            if (found[key].version if key in found else 0) != version and not (adopted and key == self._schedule_key)
        ]
        for key in moved:
            if key.domain != "guard":
                raise FencedError(
                    f"{self._context}: somebody else wrote {key}, where a signal was about to go: recover", key=key
                ) from error
        if moved:
            raise GuardMovedError(str(error), keys=error.keys) from error
        same = (owner.version, session and session.version) == (
            self._owner.version, self._session and self._session.version
        )  # fmt: skip
        if same and not adopted:
            raise UnavailableError(f"{self._context}: the store reports a conflict that cannot be found") from error
        # Same holder, same epoch, same row, other numbers: re-keyed or moved, say. Go on with those.
        self._owner, self._session = owner, session

    def _adopt_ignored(self, found: Loaded[Row] | None) -> bool:
        """Go on from the row that means nothing, where it is the same under another number."""
        known = self.ignored
        if known is None or found is None or found.row != known.row or found.version == known.version:
            return False
        self.ignored = Loaded(known.row, found.version)
        return True
