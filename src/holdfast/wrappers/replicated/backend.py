"""Several copies of a store as one backend: the contract is here.

What a copy says about itself is in ``standing.py``; one scope's commits and reads in ``lane.py``; a copy that follows
in ``follower.py``; repair in ``repair.py``; how another copy becomes the first in ``election.py`` and ``promotion.py``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

import msgspec

from ...contract import MAX_WRITERS, Backend, Guarantees, Head, How, Key, KeyPrefix, Op, Record, Survives
from ...errors import (
    ConflictError,
    FailedError,
    HeldError,
    HoldfastError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from .copies import Config, Copy
from .election import newest_config, standings
from .lane import Ground, Lane
from .standing import (
    DOMAIN,
    FIRST_GENERATION,
    OWN_WRITERS,
    Standing,
    charter_key,
    is_physical_only,
    number_key,
    require_scope,
)

T = TypeVar("T")
_PAGE = 500
_HERE = re.compile(r"[a-z]+(\+[a-z]+)?://([^/@]*@)?(localhost|127\.|\[::1\])|(file|sqlite|memory)\b")


class Lag(NamedTuple):
    """How far one copy is."""

    copy: str
    """Its place, without credentials."""
    is_first: bool
    """It decides and numbers."""
    counts: bool
    """The quorum counts it; one that was added later counts after a promote."""
    commits: int | None
    """How many commits it is behind, over all scopes that were used; None: it does not answer."""
    state: str
    """For people."""
    kept: int = 0
    """Rows of commits that it alone held and that a promote dropped; they are kept on it."""


class Replicated:
    """Keeps the same rows on several backends; the first decides, the quorum acknowledges.

    Args:
        first: The copy that decides and numbers, until ``holdfast promote`` names another.
        followers: The others. All must be empty when they are used for the first time; the first may hold a store.
        quorum: How many copies, the first among them, hold a commit when it returns; default: the majority.
        deadline_seconds: How long a commit, or what was read, waits for the quorum.
        retry_seconds: After how long a copy that was away is asked again, at first.
        queue_bytes: How much may wait for one copy in one scope; what is more is fetched from the first copy later.
    """

    def __init__(
        self,
        first: Backend,
        *followers: Backend,
        quorum: int | None = None,
        deadline_seconds: float = 10.0,
        retry_seconds: float = 0.1,
        queue_bytes: int = 32 * 1024 * 1024,
    ) -> None:
        backends = (first, *followers)
        if not followers:
            raise InvalidInputError("Replicated needs at least two copies: name another one, or use the backend alone")
        if len({id(backend) for backend in backends}) < len(backends):
            raise InvalidInputError("the same backend stands twice among the copies: a copy must be a place of its own")
        if quorum is not None and not (type(quorum) is int and 1 <= quorum <= len(backends)):
            raise InvalidInputError(f"quorum is {quorum!r:.20}: use 1 to {len(backends)}, the number of copies")
        if not 0 < deadline_seconds <= 3600 or not 0 < retry_seconds <= 60:
            raise InvalidInputError("deadline_seconds must be over 0 and at most 3600, retry_seconds at most 60")
        self.copies = tuple(Copy(backend, at) for at, backend in enumerate(backends))
        self.quorum = quorum
        self._deadline_seconds = deadline_seconds
        self._retry_seconds = retry_seconds
        self._queue_bytes = queue_bytes
        self._read_only = False
        self._ground: Ground | None = None
        self._lanes: dict[str, Lane] = {}
        self._tasks: set[asyncio.Task[int]] = set()
        self._walk: asyncio.Task[None] | None = None
        self._renewing = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Replicated({', '.join(repr(copy.backend) for copy in self.copies)})"

    # ------------------------------------------------------------------ opening

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Open the copies, learn which is the first, attest; see :meth:`holdfast.contract.Backend.open`.

        Raises:
            HeldError: Another process holds one of the copies.
            UnavailableError: Too few copies answer, or the first does not; the message says what to do.
            InvalidInputError: The copies agreed on something else than what was asked for now.

        Crash: Leaves what was there; opening again finishes.
        """
        if self._ground is not None:
            raise FailedError("the copies are open already: close them first")
        self._read_only = read_only
        self._lanes, self._tasks, self._renewing = {}, set(), asyncio.Lock()
        try:
            await self.open_copies(read_only=read_only)
            config = await self._agreement()
            self._ground = Ground(
                self.copies, config, self._deadline_seconds, self._retry_seconds, self._queue_bytes, read_only
            )
            found = await self._attest(config)
        except BaseException:
            self._ground = None
            await asyncio.shield(self._close_copies())
            raise
        if not read_only:
            self._walk = asyncio.get_running_loop().create_task(self._visit())
        return found

    async def open_copies(self, *, read_only: bool) -> None:
        """Open what can be opened; whatever else is wrong with a copy than being away is raised."""
        answers = await asyncio.gather(
            *(copy.open(read_only=read_only) for copy in self.copies), return_exceptions=True
        )
        away = (UnavailableError, FailedError, NotFoundError) if read_only else (UnavailableError, FailedError)
        for copy, answer in zip(self.copies, answers, strict=True):
            if isinstance(answer, away) and not isinstance(answer, HeldError):
                copy.trouble = answer
            elif isinstance(answer, BaseException):
                raise answer
        if not any(copy.is_open for copy in self.copies):
            raise self.copies[0].trouble or UnavailableError("no copy can be reached")
        ids = [copy.id for copy in self.copies if copy.id]
        if len(set(ids)) < len(ids):
            raise InvalidInputError("two of the copies are the same place: a copy must be a place of its own")

    async def _agreement(self) -> Config:
        config, answered = await newest_config(self.copies)
        if self._read_only and config is None:
            if not self.copies[0].is_open:
                raise self.copies[0].trouble or UnavailableError("the first copy cannot be reached")
            return Config(FIRST_GENERATION, self.copies[0].id, tuple(copy.id for copy in self.copies), 1)
        if config is None:
            config = await self._form()
        elif not self._read_only:
            for copy in answered:
                if not copy.id:
                    await copy.name_itself(must_be_empty=True)
        if self.quorum not in (None, config.quorum):
            raise InvalidInputError(
                f"the copies agreed on quorum={config.quorum}, not {self.quorum}: run holdfast promote to change it"
            )
        there = [copy for copy in answered if copy.id in config.members]
        if not any(copy.id == config.first for copy in there):
            raise UnavailableError(
                f"the first copy cannot be reached ({self._away()}): if it is lost, run holdfast promote"
            )
        if len(there) < config.election and not self._read_only:
            raise UnavailableError(
                f"{len(there)} of {len(config.members)} copies answer, and {config.election} must, lest another copy "
                f"was made the first without our knowing ({self._away()})"
            )
        if not self._read_only:
            for answer in await asyncio.gather(*(copy.agree(config) for copy in there), return_exceptions=True):
                if isinstance(answer, BaseException) and not isinstance(answer, UnavailableError):
                    raise answer
        return config

    def _away(self) -> str:
        return "; ".join(f"{copy.name}: {copy.trouble}" for copy in self.copies if copy.trouble) or "it was not named"

    async def _form(self) -> Config:
        """Make these backends copies of each other; all must be there, and all but the first empty."""
        for copy in self.copies:
            if not copy.is_open:
                raise UnavailableError(
                    f"{copy.name} cannot be reached; at the first opening every copy must be: {copy.trouble}"
                )
        for copy in reversed(self.copies):
            if not copy.id:
                await copy.name_itself(must_be_empty=copy.at > 0)
        ids = tuple(copy.id for copy in self.copies)
        if len(set(ids)) < len(ids):
            raise InvalidInputError("two of the copies are the same place: a copy must be a place of its own")
        quorum = self.quorum or len(ids) // 2 + 1
        config = Config(FIRST_GENERATION | quorum, ids[0], ids, quorum)  # of two such agreements one is the newer
        for copy in self.copies:
            await copy.agree(config)
        # Another process may have made them copies with other words, or promoted one since: what counts is there.
        newest, _ = await newest_config(self.copies)
        return newest or config

    async def renew(self) -> None:
        """Look anew at what the copies agreed on, and at those that were away."""
        before = self._require_open().config
        async with self._renewing:
            ground = self._require_open()
            if ground.config is not before:
                return
            for copy in self.copies:
                if not copy.is_open:
                    with suppress(HoldfastError):
                        await copy.open(read_only=self._read_only)
            config, _ = await newest_config(self.copies)
            if config is not None and config.generation > ground.config.generation:
                self._ground = ground._replace(config=config)

    async def _visit(self) -> None:
        """Enter every scope, so that also those that nobody uses are repaired."""
        with suppress(HoldfastError):
            async for scope in self._names():
                await self._lane(scope).enter()

    async def close(self) -> None:
        """Wait for the commits under way and, for a moment, for the copies that lag; then close them. Repeatable.

        Crash: As before the call: nothing acknowledged depends on close.
        """
        if self._ground is not None:
            await asyncio.shield(self._settle())
        await asyncio.shield(self._close_copies())

    async def _settle(self) -> None:
        if self._walk is not None:
            self._walk.cancel()
            await asyncio.wait([self._walk])
            self._walk = None
        while self._tasks:
            await asyncio.wait(self._tasks)
        end = asyncio.get_running_loop().time() + min(1.0, self._deadline_seconds)
        lanes = list(self._lanes.values())
        followers = [follower for lane in lanes for follower in lane.followers]
        # Once, at the end: no event is worth keeping for it.
        while asyncio.get_running_loop().time() < end and not all(f.is_drained for f in followers):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        self._ground = None
        for lane in lanes:
            await lane.leave()
        self._lanes.clear()

    async def _close_copies(self) -> None:
        for copy in self.copies:
            with suppress(HoldfastError):
                await copy.close()

    # ------------------------------------------------------------------ the promise

    async def _attest(self, config: Config) -> Guarantees:
        opened = [copy for copy in self.copies if copy.guarantees is not None]
        parts = [copy.guarantees for copy in opened if copy.guarantees is not None]
        weakest = Guarantees.weakest(parts)
        here = sum(_HERE.match(part.backend) is not None for part in parts)
        warnings = [*weakest.warnings, *await self._warnings(config, opened)]
        survives, how = weakest.survives, weakest.survives_how
        if config.quorum == 1:
            first = next(copy.guarantees for copy in opened if copy.id == config.first and copy.guarantees)
            survives, how = first.survives, first.survives_how
            warnings.append(
                "quorum=1: a commit returns when the first copy alone has it, and is lost with it; use quorum=2 or more"
            )
        elif survives >= Survives.HOST and config.quorum > here:
            survives, how = Survives.SERVER, How.ASSUMED  # that different names are different machines
        elif survives >= Survives.HOST:
            warnings.append(
                f"{here} copies lie on this machine, and a quorum of {config.quorum} may be theirs alone: "
                "its loss loses commits; put copies on other machines"
            )
        if config.election > len(config.members) // 2 + 1:
            warnings.append(
                f"quorum={config.quorum} of {len(config.members)}: promote needs {config.election} copies that answer; "
                f"with fewer it must be forced, and may lose commits; use quorum={len(config.members) // 2 + 1}"
            )
        return msgspec.structs.replace(
            weakest, survives=survives, survives_how=how, warnings=tuple(dict.fromkeys(warnings))
        )

    async def _warnings(self, config: Config, opened: list[Copy]) -> list[str]:
        """Say which copies are away, do not count, or lag; the lag only to a reader, as a writer repairs it at once."""
        found = [f"{copy.name} cannot be reached: {copy.trouble}" for copy in self.copies if not copy.is_open]
        for copy in (copy for copy in opened if copy.id not in config.members):
            found += [f"{copy.name} does not count towards the quorum: run holdfast promote to have it count"]
        if self._read_only:
            for lag in await self.lag():
                if lag.commits:
                    found.append(f"{lag.copy} is {lag.commits} commits behind ({lag.state})")
                if lag.kept:
                    found.append(f"{lag.copy} keeps {lag.kept} rows of commits that a promote dropped: look at them")
        return found

    async def lag(self) -> list[Lag]:
        """Ask every copy how far it is, in every scope."""
        ground = self._require_open()
        opened = [copy for copy in self.copies if copy.is_open]
        behind: dict[Copy, int] = dict.fromkeys(opened, 0)
        kept: dict[Copy, int] = dict.fromkeys(opened, 0)
        silent: set[Copy] = {copy for copy in self.copies if not copy.is_open}
        states: dict[Copy, str] = {}
        for scope in [name async for name in self._names()]:
            found = await standings(scope, opened)
            silent |= set(opened) - set(found)
            newest = max((standing.number for standing in found.values()), default=0)
            for copy, standing in found.items():
                behind[copy] += newest - standing.number
                kept[copy] += standing.kept
                if not standing.is_whole:
                    states[copy] = "under repair"
        lags = []
        for copy in self.copies:
            first = copy.id == ground.config.first
            state = "away" if copy in silent else states.get(copy, "the first" if first else "follows")
            commits = None if copy in silent else behind[copy]
            lags.append(Lag(copy.name, first, copy.id in ground.config.members, commits, state, kept.get(copy, 0)))
        return lags

    # ------------------------------------------------------------------ reading

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys`` from the first copy, once the quorum holds what it returns."""

        async def ask(first: Copy, standing: Standing) -> tuple[int, int, dict[Key, Record]]:
            guard, number = charter_key(standing.physical), number_key(standing.physical)
            found = await first.backend.read(standing.physical, [*keys, guard, number])
            ours, at = found.pop(guard, None), found.pop(number, None)
            return ours.version if ours else 0, at.version if at else 0, found

        _require_free(keys)
        return await self._lane(scope).settled(ask)

    async def head(self, scope: str) -> Head:
        """Return the scope's commit number and its writers' last ops, once the quorum holds them."""

        async def ask(first: Copy, standing: Standing) -> tuple[int, int, Head]:
            found = await first.backend.head(standing.physical)
            version, number = await _guards(first, standing)
            writers = {name: last for name, last in found.writers.items() if not name.startswith(OWN_WRITERS)}
            return version, max(number, found.number), Head(found.number, dict(list(writers.items())[-MAX_WRITERS:]))

        return await self._lane(scope).settled(ask)

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """Yield the scope's keys under ``prefix`` in byte order, each page once the quorum holds it."""
        lane = self._lane(scope)
        standing = await lane.enter()
        config, page = lane.config, list[Key]()
        async for key in self._require_open().first.backend.keys(standing.physical, prefix):
            if key.domain == DOMAIN:
                continue
            page.append(key)
            if len(page) == _PAGE:
                await self._hold(lane, config)
                for held in page:
                    yield held
                page = []
        await self._hold(lane, config)
        for held in page:
            yield held

    async def _hold(self, lane: Lane, config: Config) -> None:
        async def ask(first: Copy, standing: Standing) -> tuple[int, int, None]:
            return (*await _guards(first, standing), None)

        await lane.settled(ask)
        if lane.config is not config:
            raise UnavailableError("another copy was made the first while keys were listed: list them again")

    async def scopes(self) -> AsyncIterator[str]:
        """Yield the names of the scopes that have had a commit, in byte order."""
        async for scope in self._names():
            if not self._read_only:
                await self._hold(self._lane(scope), (await self._entered(scope)).config)
            yield scope

    async def _entered(self, scope: str) -> Lane:
        lane = self._lane(scope)
        await lane.enter()
        return lane

    async def _names(self) -> AsyncIterator[str]:
        async for scope in self._require_open().first.backend.scopes():
            if not is_physical_only(scope):
                yield scope

    # ------------------------------------------------------------------ writing

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        """Apply ``changes`` if ``expect`` holds on the first copy; return when the quorum has the commit.

        Raises:
            ConflictError: Some ``expect`` does not hold; nothing was changed.
            UnavailableError: Nothing was written: the first copy, or too many others, cannot be reached.
            UnknownOutcomeError: The quorum did not confirm it in time; send the same op again.

        Crash: Before the return all of the changes or none, as the first copy has it; after it, all.
        Cancellation: If it was sent, it goes on.
        """
        self._require_open()
        if self._read_only:
            raise FailedError("the copies were opened read-only: nothing was written; open them for writing")
        _require_free(changes)
        _require_free(expect)
        lane = self._lane(scope)
        # A task of its own: a caller who goes away must not leave the others without what the first copy has.
        task = asyncio.get_running_loop().create_task(lane.commit(changes, expect, Op(*op)))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[int]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # if the caller has gone, nobody else asks

    def _lane(self, scope: str) -> Lane:
        ground = self._require_open()
        lane = self._lanes.get(scope)
        if lane is None:
            require_scope(scope)
            lane = self._lanes[scope] = Lane(scope, self._require_open, self.renew)
            lane.config = ground.config
        return lane

    def _require_open(self) -> Ground:
        if self._ground is None:
            raise FailedError("the copies are not open: open them first")
        return self._ground


async def _guards(first: Copy, standing: Standing) -> tuple[int, int]:
    guard, number = charter_key(standing.physical), number_key(standing.physical)
    found = await first.backend.read(standing.physical, [guard, number])
    return found[guard].version if guard in found else 0, found[number].version if number in found else 0


def _require_free(keys: object) -> None:
    for key in keys:  # type: ignore[attr-defined]
        if key[0] == DOMAIN:
            raise InvalidInputError(f"{key}: the domain {DOMAIN!r} is used by the copies themselves: choose another")


__all__ = ["ConflictError", "Lag", "Replicated"]
