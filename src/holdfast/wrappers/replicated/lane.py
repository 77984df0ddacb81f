"""One scope of an opened store: the first copy decides, the others follow in order, the quorum is waited for.

Invariants:

* A commit returns only when ``quorum`` members, the first among them, hold it and all before it.
* What is read is held by the quorum before it is returned, so no later ``promote`` takes it back.
* "Nothing was written" is said only of an op that this process has not left in doubt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, TypeVar

import msgspec

from ...contract import Key, Op
from ...errors import ConflictError, UnavailableError, UnknownOutcomeError
from .copies import Config, Copy, StaleGenerationError
from .election import begin, standings
from .follower import Entry, Follower
from .repair import LostCommitsError, lost
from .standing import DOMAIN, Charter, Relation, Standing, begun, charter_key, count_of, encode, number_key, relation

T = TypeVar("T")
_TRIES = 6
"""How often a call is made again because the agreement has changed, before the caller is told to."""


class Ground(NamedTuple):
    """What lanes share: the copies, what they agreed on, and the limits."""

    copies: tuple[Copy, ...]
    config: Config
    deadline_seconds: float
    retry_seconds: float
    queue_bytes: int
    read_only: bool

    @property
    def first(self) -> Copy:
        """The copy that decides and numbers."""
        for copy in self.copies:
            if copy.id == self.config.first:
                return copy
        raise UnavailableError("the first copy is not among those that answer: run holdfast promote if it is lost")


class Lane:
    """Commits to and reads of one scope, in one generation at a time.

    Args:
        scope: Its name, as callers know it.
        ground: Returns what all lanes share, as it is now.
        renew: Looks anew at what the copies agreed on.
    """

    def __init__(self, scope: str, ground: Callable[[], Ground], renew: Callable[[], Awaitable[None]]) -> None:
        self.scope = scope
        self.ground = ground
        self._renew = renew
        self.standing: Standing | None = None
        """Where the first copy stood when this generation was entered; None: not entered."""
        self.config: Config = ground().config
        self.seen = 0
        """Highest number that the first copy is known to have."""
        self.followers: list[Follower] = []
        self._entering = asyncio.Lock()
        self._bearing = asyncio.Lock()
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._in_doubt: dict[str, int] = {}
        self.lost: LostCommitsError | None = None
        """The first copy went back in time: nothing goes on here in this generation."""

    # ------------------------------------------------------------------ the generation

    async def enter(self) -> Standing:
        """Make sure that the agreed generation has begun here, and that the others follow; return the first's state."""
        if self.standing is not None and self.config is self.ground().config:
            return self.standing
        async with self._entering:
            for _ in range(_TRIES):
                ground = self.ground()
                if self.standing is not None and self.config is ground.config:
                    return self.standing
                await self.leave()
                try:
                    found = await standings(self.scope, ground.copies)
                    self._take(ground, await self._led(ground, found), found)
                except StaleGenerationError:
                    await self._renew()
            if self.standing is None:
                raise UnavailableError(f"what the copies agreed on changes too often for scope {self.scope}: try again")
            return self.standing

    async def _led(self, ground: Ground, found: dict[Copy, Standing]) -> Standing:
        """Return where the first copy stands in the agreed generation, which begins now if need be."""
        first, config = ground.first, ground.config
        if first not in found:
            raise first.trouble or UnavailableError(f"{first.name} does not answer")
        if max(standing.promised for standing in found.values()) > config.generation:
            raise StaleGenerationError
        stands = found[first]
        if (stands.generation == config.generation and stands.is_whole) or ground.read_only:
            return stands if ground.read_only else await self._not_behind(first, stands, found)
        if stands.charter_version or count_of(config.generation) > 1:
            return await begin(self.scope, config, ground.copies)
        if stands.number:  # it was in use before it had copies
            start = stands.number + 1
            charter = Charter(scope=self.scope, history=begun((), config.generation, stands.number, start))
            try:
                version = await first.rewrite(stands, charter)
            except ConflictError:
                raise StaleGenerationError from None
            return stands._replace(charter=charter, charter_version=version, number=version)
        return stands

    async def _not_behind(self, first: Copy, stands: Standing, found: dict[Copy, Standing]) -> Standing:
        """Refuse a first copy that lacks what another has of its own generation: it was restored, or lost a write."""
        for copy, standing in found.items():
            if relation(standing, stands) is Relation.AHEAD:
                stands = await first.standing(self.scope)  # it may have gone on while the others were asked
                if relation(standing, stands) is Relation.AHEAD:
                    raise lost(self.scope, first, copy, standing, stands)
        return stands

    def _take(self, ground: Ground, stands: Standing, found: dict[Copy, Standing]) -> None:
        self.config, self.standing, self.seen, self.lost = ground.config, stands, stands.number, None
        if ground.read_only:
            return
        self.followers = [Follower(self, copy) for copy in ground.copies if copy.id != ground.config.first]
        for follower in self.followers:
            if follower.copy in found:
                follower.take(found[follower.copy])
            follower.start()

    async def leave(self) -> None:
        """End what follows; whoever still waits does not learn whether the quorum has its commit."""
        self.standing = None
        followers, self.followers = self.followers, []
        for follower in followers:
            await follower.stop()
        self.fail("the copies agreed on another first copy meanwhile")

    def fail(self, why: str) -> None:
        """Tell those who wait for the quorum that it is not known whether it has their commit."""
        waiters, self._waiters = self._waiters, []
        for _, future in waiters:
            if not future.done():
                future.set_exception(self.unknown(why))

    def unknown(self, why: str) -> UnknownOutcomeError:
        """Return the error for a commit that the first copy has and the quorum may not have."""
        return UnknownOutcomeError(f"scope {self.scope}: {why}; send the same op again")

    async def _tried(self, call: Callable[[Standing], Awaitable[T]]) -> T:
        """Make a call in the present generation; when that has ended, once more in the next one."""
        for _ in range(_TRIES):
            standing = await self.enter()
            if self.lost is not None:
                raise LostCommitsError(str(self.lost))
            try:
                return await call(standing)
            except StaleGenerationError:
                if not standing.charter_version:
                    async with self._bearing:  # the scope's first commit may be under way: it is what was seen
                        pass
                if self.standing is not standing:
                    continue  # it was looked at anew meanwhile, or the scope's first commit was made
                self.standing = None
                await self._renew()
            except UnavailableError:
                if not await self._superseded():
                    raise
        raise UnavailableError(f"the first copy of scope {self.scope} changes too often: try again")

    async def _superseded(self) -> bool:
        """Whether another copy was made the first since: looked at when the first copy cannot be used."""
        before = self.ground().config
        await self._renew()
        return self.ground().config.generation > before.generation

    # ------------------------------------------------------------------ commits

    async def commit(self, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], op: Op) -> int:
        """Commit on the first copy, and return when the quorum has it."""
        deadline = asyncio.get_running_loop().time() + self.ground().deadline_seconds
        try:
            number, config = await self._tried(lambda standing: self._decide(standing, changes, expect, op))
            await self.hold(number, config, deadline)
        except UnknownOutcomeError:
            if len(self._in_doubt) > 10_000:
                self._in_doubt.clear()
            self._in_doubt[op.writer] = op.n
            raise
        except UnavailableError as error:
            if self._in_doubt.get(op.writer) == op.n:
                raise self.unknown(f"{error} (an earlier try may have been written)") from error
            raise
        except ConflictError:
            self._in_doubt.pop(op.writer, None)
            raise
        self._in_doubt.pop(op.writer, None)
        return number

    async def _decide(
        self, standing: Standing, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], op: Op
    ) -> tuple[int, Config]:
        self._require_quorum()
        if standing.charter_version:
            return await self._send(standing, changes, expect, op)
        async with self._bearing:  # the scope's first commit brings its charter
            if self.standing is not standing:
                raise StaleGenerationError
            charter = msgspec.structs.replace(standing.charter, history=begun((), self.config.generation, 0, 1))
            birth = {**changes, charter_key(standing.physical): encode(charter)}
            number, config = await self._send(standing, birth, expect, op)
            if number != 1:
                self.standing = None  # a repeated op, or somebody writes past us: look again
                self._in_doubt[op.writer] = op.n  # it is there: if the next look fails, nobody may be told otherwise
                raise StaleGenerationError
            self.standing = standing._replace(charter=charter, charter_version=number, number=number)
            return number, config

    async def _send(
        self, standing: Standing, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], op: Op
    ) -> tuple[int, Config]:
        ground, physical, config = self.ground(), standing.physical, self.config
        if ground.config is not config:  # of its first copy ``standing`` says nothing, and it is among the followers
            raise StaleGenerationError
        guard = charter_key(physical)
        changes = {**changes, number_key(physical): b"{}"}
        try:
            number = await ground.first.backend.commit(
                physical, changes, {**expect, guard: standing.charter_version}, op=op
            )
        except ConflictError as error:
            if guard in error.keys:
                raise StaleGenerationError from error
            raise
        if self.standing is None or self.config is not config:
            # Never offered in another generation: there its number may belong to another commit.
            raise self.unknown("the copies agreed on another first copy meanwhile")
        self.seen = max(self.seen, number)
        entry = Entry(number, op, changes, sum(len(p) for p in changes.values() if p) + 200)
        for follower in self.followers:
            follower.offer(entry)
        return number, config

    def _require_quorum(self) -> None:
        """Refuse to begin what surely cannot be finished: nothing was written yet.

        Raises:
            UnavailableError: Too few copies answer.
        """
        usable = 1 + sum(follower.copy.id in self.config.members and follower.is_up for follower in self.followers)
        if usable < self.config.quorum:
            away = [f"{f.copy.name}: {f.state}" for f in self.followers if not f.is_up]
            raise UnavailableError(
                f"{usable} of {self.config.quorum} copies that a commit needs can be reached; nothing was written "
                f"({'; '.join(away) or 'no other copy was named'})"
            )

    # ------------------------------------------------------------------ the quorum

    @property
    def confirmed(self) -> int:
        """Highest number that the quorum is known to hold."""
        needed = self.config.quorum - 1
        if not needed:
            return self.seen
        held = sorted((f.held for f in self.followers if f.copy.id in self.config.members), reverse=True)
        return held[needed - 1] if len(held) >= needed else 0

    def noticed(self) -> None:
        """Wake those who wait for the quorum, as far as it got."""
        confirmed = self.confirmed
        left = []
        for number, future in self._waiters:
            if number > confirmed:
                left.append((number, future))
            elif not future.done():
                future.set_result(None)
        self._waiters = left

    async def hold(self, number: int, config: Config, deadline: float) -> None:
        """Return when the quorum holds commit ``number`` of the generation that ``config`` began.

        Raises:
            UnknownOutcomeError: It did not by the deadline.
        """
        if self.standing is None or self.config is not config:
            raise self.unknown("the copies agreed on another first copy meanwhile")
        if number <= self.confirmed:
            return
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiters.append((number, future))
        self.seen = max(self.seen, number)
        for follower in self.followers:
            follower.wake()
        try:
            async with asyncio.timeout_at(deadline):
                await future
        except TimeoutError:
            self._waiters = [waiter for waiter in self._waiters if waiter[1] is not future]
            away = "; ".join(f"{f.copy.name} {f.state}, at {f.held}" for f in self.followers)
            raise self.unknown(f"the quorum of {self.config.quorum} did not confirm commit {number} ({away})") from None

    # ------------------------------------------------------------------ reads

    async def settled(self, read: Callable[[Copy, Standing], Awaitable[tuple[int, int, T]]]) -> T:
        """Return what ``read`` finds on the first copy, once the quorum holds it.

        Args:
            read: Returns the charter's version and the number that it found with it, and its result.
        """

        async def once(standing: Standing) -> T:
            ground, config = self.ground(), self.config
            version, number, result = await read(ground.first, standing)
            if ground.read_only:
                return result
            if version != standing.charter_version or self.config is not config:
                raise StaleGenerationError
            if number > self.confirmed:
                try:
                    await self.hold(number, config, asyncio.get_running_loop().time() + ground.deadline_seconds)
                except UnknownOutcomeError as error:
                    raise UnavailableError(f"what was read may not last: {error}") from error
            return result

        return await self._tried(once)

    def hides(self, error: ConflictError) -> ConflictError:
        """Return the error without keys of our own."""
        return ConflictError(str(error), keys=[k for k in error.keys if getattr(k, "domain", "") != DOMAIN])
