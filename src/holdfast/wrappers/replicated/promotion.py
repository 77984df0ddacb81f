"""``promote``: after the loss of the first copy another one decides; also how copies are added, replaced or dropped.

Steps, each of which can be repeated: so many copies take on a new agreement that no older quorum is left; then its
generation begins in every scope; then, if other copies were named than before, they are brought level, and a second
agreement has them count. Processes that are running find the new agreement by themselves: the copies refuse them
under the old one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from ...errors import HoldfastError, InvalidInputError, UnavailableError
from .backend import Replicated
from .copies import Config, Copy, StaleGenerationError
from .election import begin, best_of, newest_config, scopes_of, standings
from .repair import bring_level
from .standing import Standing, count_of, next_generation


class Promotion(NamedTuple):
    """What a promote did."""

    generation: int
    first: str
    """The copy that decides now."""
    was_first: str
    """The copy that decided before; empty if it was not named, or could not be reached."""
    copies: int
    quorum: int
    scopes: tuple[str, ...]
    """Those that begin anew."""
    warnings: tuple[str, ...]


class _Ground(NamedTuple):
    """What was found at the beginning."""

    config: Config
    members: list[Copy]
    """Those that answer and count."""
    others: list[Copy]
    """Those that answer and do not count yet."""
    scopes: list[str]


async def promote(store: Replicated, *, force: bool = False) -> Promotion:
    """Make the newest of the copies that answer the first one, and have the copies that ``store`` names count.

    Args:
        store: The copies, not open.
        force: Also when the first copy answers, or when too few copies do; what only the others hold may be lost.

    Raises:
        InvalidInputError: The first copy answers and nothing else was asked for, or there are no copies here.
        UnavailableError: Too few copies answer; nothing was changed, or running it again finishes it.
        HeldError: A copy belongs to a process that runs; end it first.

    Crash: Done or not; running it again finishes it.
    """
    try:
        await store.open_copies(read_only=False)
        return await _promote(store, force=force)
    except StaleGenerationError:
        raise UnavailableError("somebody else promotes at the same time: look, then run it again") from None
    finally:
        await asyncio.shield(_close(store.copies))


async def _close(copies: Sequence[Copy]) -> None:
    for copy in copies:
        with suppress(HoldfastError):
            await copy.close()


async def _promote(store: Replicated, *, force: bool) -> Promotion:
    config, answered = await newest_config(store.copies)
    if config is None:
        raise InvalidInputError("these are not copies of each other yet: a bot that opens them makes them so")
    members = [copy for copy in answered if copy.id in config.members]
    others = [copy for copy in answered if copy.id not in config.members]
    ground = _Ground(config, members, others, await scopes_of(members))
    wanted, quorum = _wanted(store, ground)
    warnings: list[str] = []
    changes = set(wanted) != set(config.members) or bool(others) or quorum != config.quorum
    was_first = next((copy.name for copy in members if copy.id == config.first), "")
    done: list[str] = []
    if force or not await _stands(ground):
        if len(members) < config.election:
            text = (
                f"{len(members)} of {len(config.members)} copies answer, and {config.election} must, so that one of "
                "them surely has every acknowledged commit"
            )
            if not force:
                raise UnavailableError(f"{text}: bring another one back, or use --force and lose what only they hold")
            warnings.append(f"{text}: commits that only the others hold are lost")
        ground = ground._replace(config=await _elect(ground, warnings, force=force))
        done = ground.scopes
    else:
        done = [scope for scope in ground.scopes if await _is_unfinished(scope, ground)]
    for scope in ground.scopes:
        await begin(scope, ground.config, ground.members, insist=force)
    await _level(ground, ground.members)
    if changes:
        ground = ground._replace(config=await _admit(ground, wanted, quorum, force=force))
        done = ground.scopes
    elif not done and ground.config is config:
        first = next(copy for copy in members if copy.id == config.first)
        raise InvalidInputError(
            f"{first.name} is the first and answers: nothing was changed; --force makes another copy the first"
        )
    config = ground.config
    there = [copy for copy in answered if copy.id in config.members]
    if len(there) < config.quorum:
        warnings.append(
            f"{len(there)} copies answer, and a commit needs {config.quorum}: nothing can be committed until another "
            "one is back, or is replaced: holdfast promote with the copies that shall count from now on"
        )
    first = next(copy for copy in there if copy.id == config.first)
    return Promotion(
        count_of(config.generation),
        first.name,
        was_first,
        len(config.members),
        config.quorum,
        tuple(done),
        tuple(warnings),
    )


def _wanted(store: Replicated, ground: _Ground) -> tuple[list[str], int]:
    """Return the ids of the copies that shall count, new ones left out, and the quorum."""
    config = ground.config
    here = {copy.id for copy in ground.members}
    unseen = [member for member in config.members if member not in here]
    silent = [copy for copy in store.copies if copy not in ground.members and copy not in ground.others]
    if len(silent) > len(unseen):
        raise UnavailableError(f"{silent[-1].name} is new and cannot be reached: a copy is added while it answers")
    if silent and len(silent) < len(unseen):
        raise InvalidInputError(
            "some of the copies that count are not named, and others do not answer: it cannot be told which; "
            "name all of them, or only those that answer"
        )
    wanted = [member for member in config.members if member in here or silent]
    number = len(wanted) + len(ground.others)
    same = number == len(config.members)
    quorum = store.quorum or (config.quorum if same else number // 2 + 1)
    return wanted, quorum


async def _stands(ground: _Ground) -> bool:
    """Whether the first copy answers and no other has more than it."""
    first = next((copy for copy in ground.members if copy.id == ground.config.first), None)
    if first is None:
        return False
    for scope in ground.scopes:
        found = await standings(scope, ground.members)
        best = best_of(found)
        if best is None or first not in found or found[first].rank < found[best].rank:
            return False
    return True


async def _is_unfinished(scope: str, ground: _Ground) -> bool:
    first = next(copy for copy in ground.members if copy.id == ground.config.first)
    found = await first.standing(scope)
    return bool(found.charter_version) and found.generation < ground.config.generation


async def _elect(ground: _Ground, warnings: list[str], *, force: bool) -> Config:
    """Have the copies that answer agree on the newest of them as the first."""
    config = ground.config
    newest = config.generation
    best: dict[Copy, int] = dict.fromkeys(ground.members, 0)
    for scope in ground.scopes:
        found: dict[Copy, Standing] = await standings(scope, ground.members)
        newest = max([newest, *(standing.promised for standing in found.values())])
        leader = best_of(found)
        if leader is None:
            whole = [copy for copy, standing in found.items() if standing.is_whole]
            if not force:
                raise UnavailableError(
                    f"scope {scope}: the newest of the copies that answer was under repair; bring another one back, "
                    "or use --force and keep what there is"
                )
            leader = max(whole or found, key=lambda copy: (found[copy].is_whole, found[copy].rank))
            if not whole:
                warnings.append(f"scope {scope}: {leader.name} was under repair: its rows are of different moments")
        for copy, standing in found.items():
            best[copy] += copy is leader or (standing.is_whole and standing.rank == found[leader].rank)
    # The copy that was the first is taken again only if nothing else is there: it answers, and is not wanted.
    first = max(ground.members, key=lambda copy: (copy.id != config.first, best[copy], -copy.at))
    generation = next_generation(newest, config.members.index(first.id))
    agreed = Config(generation, first.id, config.members, config.quorum)
    taken = await _take_on(agreed, ground.members)
    if first not in taken or (len(taken) < config.election and not force):
        raise UnavailableError("somebody else promotes at the same time: look, then run it again")
    return agreed


async def _take_on(config: Config, copies: Sequence[Copy]) -> list[Copy]:
    """Return the copies that took on an agreement; one that went away meanwhile did not."""
    taken = []
    for copy in copies:
        with suppress(UnavailableError):
            if await copy.agree(config):
                taken.append(copy)
    return taken


async def _admit(ground: _Ground, wanted: list[str], quorum: int, *, force: bool) -> Config:
    """Bring new copies level, and have exactly those count that were named."""
    config = ground.config
    for copy in ground.others:
        if not copy.id:
            await copy.name_itself(must_be_empty=True)
    members = (*wanted, *(copy.id for copy in ground.others))
    if not 1 <= quorum <= len(members) or config.first not in members:
        raise InvalidInputError(f"quorum={quorum} of {len(members)} copies cannot be, or the first one is not named")
    await _level(ground, ground.others, must=True)
    generation = next_generation(config.generation, members.index(config.first))
    agreed = Config(generation, config.first, members, quorum)
    taken = await _take_on(agreed, ground.members)
    if len(taken) < config.election and not force:
        raise UnavailableError("somebody else promotes at the same time: look, then run it again")
    await _take_on(agreed, ground.others)
    for scope in ground.scopes:
        await begin(scope, agreed, [*ground.members, *ground.others], insist=force)
    await _level(ground._replace(config=agreed), [*ground.members, *ground.others])
    return agreed


async def _level(ground: _Ground, copies: Sequence[Copy], *, must: bool = False) -> None:
    """Bring copies level with the first, so that the quorum is complete at once; the rest is repaired when used."""
    first = next(copy for copy in ground.members if copy.id == ground.config.first)
    for scope in ground.scopes:
        for copy in copies:
            if copy is first:
                continue
            try:
                await bring_level(scope, first, copy, generation=ground.config.generation)
            except HoldfastError:
                if must:
                    raise
