"""Lanes of commits: one in flight at a time, its outcome known before the next is sent."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from .contract import Key, Op
from .domains import encode
from .errors import ConflictError, HoldfastError, InvalidInputError, UnavailableError, UnknownOutcomeError
from .names import quote
from .rows import Row
from .spans import Place, Span

if TYPE_CHECKING:
    from .store import Store

ASIDE = frozenset(("ledger", "quarantine", "worker", "account"))
"""Domains whose rows may lie outside the home scope."""


class _Sent(msgspec.Struct, frozen=True):
    """A commit to one place, as it was sent."""

    place: Place
    payloads: Mapping[Key, bytes | None]
    expect: Mapping[Key, int]
    op: Op
    changes: Mapping[Key, Row | None]

    def send(self) -> Awaitable[int]:
        backend, scope = self.place
        return backend.commit(scope, self.payloads, self.expect, op=self.op)

    async def settle(self) -> int:
        """Find out about a commit whose outcome is unknown; ConflictError if it was not applied."""
        if self.expect:
            return await self.send()
        # Without a guard a late first copy and a second one could both land: only look.
        last = (await self.place.backend.head(self.place.scope)).writers.get(self.op.writer)
        if last is not None and last.n == self.op.n:
            return last.number
        raise ConflictError("the commit had not been applied when looked for: decide again")


class Writer:
    """A lane of commits, one after another. Two lanes may commit at the same time.

    Made by :meth:`Store.writer`. A commit that was cancelled, or whose answer was lost, is settled before the lane
    sends its next one.
    """

    __slots__ = ("_lock", "_n", "_sent", "_store", "lane", "name")

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self.lane = name
        self.name = f"{quote(name, keep_underscore=True)}@{secrets.token_hex(4)}"
        self._n = 0
        self._sent: _Sent | Span | None = None
        self._lock = asyncio.Lock()

    async def commit(self, changes: Mapping[Key, Row | None], expect: Mapping[Key, int] | None = None) -> int:
        """Apply all of ``changes`` if all of ``expect`` hold, and return the commit's number.

        Args:
            changes: Row to write under each key; None deletes it.
            expect: Version that each named key must have now; 0 for absent.

        Raises:
            ConflictError: Some ``expect`` does not hold; nothing was changed.
            UnavailableError: Nothing was changed; try again.
            UnknownOutcomeError: It may have been applied: call :meth:`resend`.
            InvalidInputError: A row cannot be stored, or the commit mixes the ledger with other domains.

        Crash: Before the return, all of the changes or none; after it, all.
        Cancellation: It may still be applied; the lane finds out before its next commit.
        """
        lock = self._lock
        await lock.acquire()
        try:
            if self._sent is not None:
                try:
                    await self._settle()
                except UnknownOutcomeError as error:
                    # Of the earlier one: whoever then called resend() would take its number for that of this one.
                    told = f"an earlier commit of {self.name} is not settled, so this one was not sent"
                    raise UnavailableError(f"{told}: {error}", key=error.key, backend=error.backend) from error
            store = self._store
            if store.read_only:
                raise InvalidInputError("the store was opened read-only: open it for writing to commit")
            payloads = {key: None if row is None else encode(key, row) for key, row in changes.items()}
            expect = {} if expect is None else dict(expect)
            self._n = n = self._n + 1
            if store.routes:
                return await self._commit_routed(changes, payloads, expect)
            place = store.home
            for key in (*payloads, *expect):
                if key[0] in ASIDE:
                    place = self._only_place(payloads, expect)
                    break
            self._sent = sent = _Sent(place, payloads, expect, Op(self.name, n), changes)
            return await self._send(sent)
        finally:
            lock.release()

    async def resend(self) -> int:
        """Send the commit whose outcome is unknown once more and return its number.

        Raises:
            InvalidInputError: Every commit of this lane is settled.
            ConflictError: It had not been applied and cannot be any more: read again, decide again.
            UnknownOutcomeError: Still unknown: call again.
        """
        async with self._lock:
            if self._sent is None:
                raise InvalidInputError(f"the lane {self.name} has nothing to send again: its last commit is settled")
            return await self._finish()

    async def _send(self, sent: _Sent | Span) -> int:
        try:
            number = await sent.send()
        except (ConflictError, InvalidInputError, UnavailableError):
            self._sent = None  # nothing was written
            raise
        self._sent = None
        store = self._store
        if store.observers:
            for observer in store.observers:
                observer(store.scope if isinstance(sent, Span) else sent.place.scope, number, sent.changes)
        return number

    async def _finish(self) -> int:
        sent = self._sent
        assert sent is not None
        try:
            if isinstance(sent, Span):
                async with self._store.turn:  # another lane may be finishing it
                    number = await sent.settle()
            else:
                number = await sent.settle()
        except ConflictError:
            self._sent = None  # a repeated op is answered with its number, so this one never was applied
            raise
        self._sent = None
        for observer in self._store.observers:
            observer(self._store.scope if isinstance(sent, Span) else sent.place.scope, number, sent.changes)
        return number

    async def _settle(self) -> None:
        try:
            await self._finish()
        except ConflictError:
            pass  # not applied, and from now on it cannot be: the lane may go on

    def _only_place(self, payloads: Iterable[Key], expect: Iterable[Key]) -> Place:
        places = {self._store.place(key) for key in (*payloads, *expect)}
        if len(places) > 1:
            raise InvalidInputError("one commit cannot mix the ledger or a worker with other domains: make two commits")
        return places.pop()

    async def _commit_routed(
        self, changes: Mapping[Key, Row | None], payloads: dict[Key, bytes | None], expect: dict[Key, int]
    ) -> int:
        store = self._store
        async with store.turn:  # one at a time: nobody may commit between the parts of a span
            touched = {*payloads, *expect}
            for span in [other for other in store.unfinished if not touched.isdisjoint(other.touched)]:
                try:
                    await span.settle()
                except HoldfastError as error:
                    raise UnavailableError(f"an earlier commit of the same rows is unfinished: {error}") from error
            places = {store.place(key) for key in touched} or {store.home}
            if not places.isdisjoint(store.aside.values()):
                self._only_place(payloads, expect)
            sent: _Sent | Span
            if len(places) == 1:
                sent = _Sent(places.pop(), payloads, expect, Op(self.name, self._n), changes)
            else:
                sent = Span(store, self.name, self.lane, self._n, changes, payloads, expect)
                self._n += 1  # a span takes two ops: the intent and the end
            self._sent = sent
            return await self._send(sent)
