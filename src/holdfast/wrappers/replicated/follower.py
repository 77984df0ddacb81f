"""One copy that follows in one scope: it gets each commit after the one before it, and is repaired when one is missing.

Invariants:

* A commit is applied here only after the one before it: each expects the number row of that one.
* It counts as holding a number only while it is whole and belongs to the generation of the first copy.
* What waits for it is bounded in bytes: what does not fit is fetched from the first copy instead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from ...contract import Key, Op
from ...errors import ConflictError, FailedError, HoldfastError, UnavailableError, UnknownOutcomeError
from .copies import Copy, StaleGenerationError
from .repair import LostCommitsError, bring_level
from .standing import Relation, Standing, charter_key, number_key, relation

if TYPE_CHECKING:
    from .lane import Lane

_logger = logging.getLogger("holdfast.replicated")
_PATIENCE_SECONDS = 0.15
"""How long another process is given to send a commit of its own, before it is fetched from the first copy."""
_POLL_SECONDS = 0.005
"""How soon the copy is asked whether that process has sent it, at first."""
_BATCH = 64
"""How many commits are under way to a follower at once, each expecting the one before it."""


class Entry(NamedTuple):
    """One commit of the first copy, as the followers get it."""

    number: int
    op: Op
    changes: Mapping[Key, bytes | None]
    size_bytes: int


class Follower:
    """One copy in one scope of one opened store."""

    def __init__(self, lane: Lane, copy: Copy) -> None:
        self.lane = lane
        self.copy = copy
        self.held = 0
        """Highest number that it is known to hold, as a whole copy of this generation."""
        self.state = "not asked yet"
        """For people."""
        self.is_up = False
        """It answered when it was last asked."""
        self._at = -1
        """The number that it stands at; -1: to be asked."""
        self._standing: Standing | None = None
        self._behind = False
        self._queue: dict[int, Entry] = {}
        self._queue_bytes = 0
        self._failures = 0
        self._missing = (-1, 0.0, 0.0)
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow."""
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def stop(self) -> None:
        """End following, and wait until that is so."""
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])

    def offer(self, entry: Entry) -> None:
        """Queue a commit; beyond the limit the newest are left out, and fetched from the first copy later."""
        if entry.number <= self._at or entry.number in self._queue:
            return
        if self._queue_bytes + entry.size_bytes <= self.lane.ground().queue_bytes or not self._queue:
            self._queue[entry.number] = entry
            self._queue_bytes += entry.size_bytes
        self._news.set()

    def wake(self) -> None:
        """Somebody waits: look."""
        self._news.set()

    @property
    def is_drained(self) -> bool:
        """Whether nothing waits that it could take."""
        return not self.is_up or self._at >= self.lane.seen

    def take(self, standing: Standing) -> None:
        """Take note of where it stands.

        Raises:
            StaleGenerationError: It has promised a newer generation than this lane's.
        """
        lane = self.lane
        if standing.promised > lane.config.generation:
            raise StaleGenerationError
        leader = lane.standing
        assert leader is not None
        self.is_up, self.copy.trouble = True, None
        how = relation(standing, leader._replace(number=max(lane.seen, leader.number)))
        self._standing, self._at = standing, standing.number
        self._behind = how is not Relation.LEVEL
        self.state = how.value if not self._behind else "follows"
        self._drop(self._at)
        if not self._behind:
            self._count()

    def _count(self) -> None:
        standing = self._standing
        assert standing is not None
        if self._at >= standing.charter.whole_from and self._at > self.held:
            self.held = self._at
            self.lane.noticed()

    def _drop(self, until: int) -> None:
        for number in [number for number in self._queue if number <= until]:
            self._queue_bytes -= self._queue.pop(number).size_bytes

    # ------------------------------------------------------------------ following

    async def _follow(self) -> None:
        pause = 0.0
        while True:
            try:
                if pause:
                    await asyncio.sleep(pause)
                await self._step()
                pause = 0.0
            except StaleGenerationError:
                self.lane.standing = None  # the next call looks at what the copies agree on now
                self.state = "has promised a newer generation"
                self.lane.fail("a newer generation has begun")
                return
            except LostCommitsError as error:
                self.state, self.lane.lost = "holds what the first copy has lost", error
                self.lane.fail(str(error))
                return
            except ConflictError:
                self._at = -1  # somebody else wrote to it: look
            except HoldfastError as error:
                pause = min(max(pause * 2, self.lane.ground().retry_seconds), 20 * self.lane.ground().retry_seconds)
                await self._went_away(error)
            except Exception as error:
                _logger.exception("%s: following failed", self.copy.name)
                pause = 20 * self.lane.ground().retry_seconds
                await self._went_away(UnavailableError(f"{error!r:.200}"))

    async def _went_away(self, error: HoldfastError) -> None:
        if self.is_up or not self.state.startswith("away"):
            _logger.warning("%s does not follow in scope %s: %s", self.copy.name, self.lane.scope, error)
        self._at, self.is_up, self.copy.trouble = -1, False, error
        self.state = f"away ({type(error).__name__}: {error!s:.200})"
        if isinstance(error, FailedError):
            with suppress(HoldfastError):
                await self.copy.close()  # it is opened anew before the next try

    async def _step(self) -> None:
        lane = self.lane
        if self._at < 0:
            if not self.copy.is_open:
                await self.copy.open(read_only=False)
            if not self.copy.id:
                await self.copy.name_itself(must_be_empty=True)
            self.take(await self.copy.standing(lane.scope))
        if self._behind:
            await self._repair()
            return
        if self._at + 1 in self._queue:
            await self._apply()
            return
        if max(self._queue, default=lane.seen) > self._at or lane.seen > self._at:
            await self._fetch()
            return
        self._news.clear()
        if self._at + 1 not in self._queue and lane.seen <= self._at:
            await self._news.wait()

    async def _apply(self) -> None:
        """Send the commits that come next, each expecting the one before it."""
        standing, lane = self._standing, self.lane
        assert standing is not None
        leader = lane.standing
        if leader is None:
            raise StaleGenerationError
        guard, number_row = charter_key(standing.physical), number_key(standing.physical)
        leaders = (charter_key(leader.physical), number_key(leader.physical))
        calls: list[Awaitable[int]] = []
        version = standing.charter_version
        until = self._at
        while until + 1 in self._queue and len(calls) < _BATCH:
            entry = self._queue[until + 1]
            changes = entry.changes
            if leader.physical != standing.physical:
                renamed = {leaders[0]: guard, leaders[1]: number_row}
                changes = {renamed.get(key, key): payload for key, payload in changes.items()}
            expect = {guard: version, number_row: until}
            if guard in changes:
                version = entry.number
            calls.append(self.copy.backend.commit(standing.physical, changes, expect, op=entry.op))
            until = entry.number
            if version != standing.charter_version:
                break
        answers = await asyncio.gather(*calls, return_exceptions=True)
        failure: BaseException | None = None
        for answer in answers:
            if isinstance(answer, BaseException):
                failure = answer
                break
            self._failures = 0
            if answer != self._at + 1:
                raise ConflictError(f"{self.copy.name} took commit {self._at + 1} as {answer}: somebody else writes it")
            self._at = answer
        if version != standing.charter_version and self._at == until:
            self._standing = await self.copy.standing(lane.scope)
        self._drop(self._at)
        self._count()
        if isinstance(failure, UnavailableError | UnknownOutcomeError) and not self._failures:
            self._failures += 1
            self._at = -1  # ask it first: only one that does not answer, or fails again, counts as away
        elif failure is not None:
            raise failure

    async def _fetch(self) -> None:
        """A commit is missing that another process made: it sends it, or is gone; then it is fetched."""
        clock = asyncio.get_running_loop().time
        if self._missing[0] != self._at:
            self._missing = (self._at, clock() + _PATIENCE_SECONDS, _POLL_SECONDS)
        at, until, pause = self._missing
        if pause > _POLL_SECONDS or self._queue:
            self._news.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), pause)
            if at + 1 in self._queue:
                return
        self._missing = (at, until, min(2 * pause, 8 * _POLL_SECONDS))
        self.take(await self.copy.standing(self.lane.scope))
        if self._at == at and clock() >= until and not self._behind and at + 1 not in self._queue:
            await self._repair()

    async def _repair(self) -> None:
        self.state = "is being repaired"
        lane, ground = self.lane, self.lane.ground()
        if ground.config is not lane.config:
            raise StaleGenerationError  # another copy is the first by now, perhaps this one
        found = await bring_level(lane.scope, ground.first, self.copy, generation=lane.config.generation)
        lane.seen = max(lane.seen, found.number)  # the first copy has it: it was asked last
        self.take(found)
