"""How a generation begins: promises from so many copies that no older quorum is left, then one commit on its first.

A quorum is ``quorum`` of the members; ``members - quorum + 1`` of them share at least one with every quorum. When so
many have promised, no older generation can acknowledge anything more, and what it has acknowledged lies on one of
them. Every step can be repeated, by anybody; two at once do no harm.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress

import msgspec

from ...errors import ConflictError, HoldfastError, UnavailableError
from .copies import Config, Copy, StaleGenerationError
from .repair import bring_level
from .standing import Relation, Standing, begun, count_of, is_physical_only, relation

_logger = logging.getLogger("holdfast.replicated")
_OFTEN = 20


async def newest_config(copies: Iterable[Copy]) -> tuple[Config | None, list[Copy]]:
    """Return the newest agreement that the copies know of, and those of them that answered."""
    answered: list[Copy] = []
    newest: Config | None = None
    asked = [copy for copy in copies if copy.is_open]
    found = await asyncio.gather(*(copy.config() for copy in asked), return_exceptions=True)
    for copy, answer in zip(asked, found, strict=True):
        if isinstance(answer, HoldfastError):
            copy.trouble = answer
            continue
        if isinstance(answer, BaseException):
            raise answer
        answered.append(copy)
        config, _ = answer
        if config is not None and (newest is None or config.generation > newest.generation):
            newest = config
    return newest, answered


async def scopes_of(copies: Iterable[Copy]) -> list[str]:
    """Return the scopes that any of the copies has had a commit in."""
    found: set[str] = set()
    for copy in copies:
        found |= {scope async for scope in copy.backend.scopes() if not is_physical_only(scope)}
    return sorted(found)


async def standings(scope: str, copies: Sequence[Copy]) -> dict[Copy, Standing]:
    """Return where a scope stands on each copy that answers."""
    asked = [copy for copy in copies if copy.is_open]
    answers = await asyncio.gather(*(copy.standing(scope) for copy in asked), return_exceptions=True)
    found = {}
    for copy, answer in zip(asked, answers, strict=True):
        if isinstance(answer, HoldfastError):
            copy.trouble = answer
        elif isinstance(answer, BaseException):
            raise answer
        else:
            copy.trouble = None
            found[copy] = answer
    return found


def best_of(found: dict[Copy, Standing]) -> Copy | None:
    """Return the whole copy with the highest rank, if no other had a higher one before it was torn."""
    whole = [copy for copy, standing in found.items() if standing.is_whole]
    if not whole:
        return None
    best = max(whole, key=lambda copy: (found[copy].rank, -copy.at))
    return best if found[best].rank >= max(standing.rank for standing in found.values()) else None


async def begin(scope: str, config: Config, copies: Sequence[Copy], *, insist: bool = False) -> Standing:
    """Let the agreed generation begin in a scope, and return where its first copy stands then.

    Args:
        config: What was agreed on.
        copies: All that are open.
        insist: The operator accepts the loss of what only copies hold that do not answer.

    Raises:
        StaleGenerationError: There is a newer generation.
        UnavailableError: Not enough copies answer, or those that answer do not hold all that was acknowledged.

    Crash: It has begun, or can be begun again.
    """
    first = next((copy for copy in copies if copy.id == config.first and copy.is_open), None)
    if first is None:
        raise UnavailableError("the first copy cannot be reached: run holdfast promote if it is lost")
    for _ in range(_OFTEN):
        found = await standings(scope, copies)
        if first not in found:
            raise first.trouble or UnavailableError(f"{first.name} does not answer")
        if max(standing.promised for standing in found.values()) > config.generation:
            raise StaleGenerationError
        if found[first].generation == config.generation and found[first].is_whole:
            return found[first]
        try:
            await _level_before(scope, config, found)
            return await _begin(scope, config, copies, first, insist=insist)
        except ConflictError:
            await asyncio.sleep(0)  # somebody else is at it too: look again
    raise UnavailableError(
        f"scope {scope} changes too often for generation {count_of(config.generation)} to begin: try again"
    )


async def _level_before(scope: str, config: Config, found: dict[Copy, Standing]) -> None:
    """Bring level what can be before promises are made: afterwards a copy that was behind has to be rebuilt."""
    best = best_of(found)
    if best is None:
        return
    for copy, standing in found.items():
        if copy is not best and not standing.charter.promises and not found[best].charter.promises:
            how = relation(standing, found[best])
            if how is Relation.BEHIND or (how is Relation.LEVEL and standing.number < found[best].number):
                with suppress(HoldfastError):
                    await bring_level(scope, best, copy, generation=config.generation)


async def _begin(scope: str, config: Config, copies: Sequence[Copy], first: Copy, *, insist: bool) -> Standing:
    generation = config.generation
    asked = [copy for copy in copies if copy.is_open and copy.id in config.members]
    answers = await asyncio.gather(*(copy.promise(scope, generation) for copy in asked), return_exceptions=True)
    found: dict[Copy, Standing] = {}
    for copy, answer in zip(asked, answers, strict=True):
        if isinstance(answer, Standing):
            found[copy] = answer
        elif not isinstance(answer, HoldfastError):
            raise answer
    if first not in found:
        raise UnavailableError(f"{first.name} does not answer")
    if len(found) < config.election and not insist:
        raise UnavailableError(
            f"generation {count_of(generation)} cannot begin in {scope}: {config.election} of {len(config.members)} "
            f"copies must answer, {len(found)} do: bring another one back (or insist, and lose what only they hold)"
        )
    if found[first].generation == generation and found[first].is_whole:
        return found[first]
    best = best_of(found)
    if best is None and insist:
        whole = [copy for copy, standing in found.items() if standing.is_whole]
        best = max(whole or found, key=lambda copy: (found[copy].rank, -copy.at))
    if best is None:
        raise UnavailableError(
            f"no copy that answers is whole and holds all of {scope}: a repair was under way there; bring another one "
            "back (or insist, and keep what there is)"
        )
    if best is not first and (found[first].rank < found[best].rank or not found[first].is_whole):
        found[first] = await bring_level(scope, best, first, generation=generation)
    return await _start(scope, generation, first, found[first])


async def _start(scope: str, generation: int, first: Copy, standing: Standing) -> Standing:
    start = standing.number + 1
    charter = msgspec.structs.replace(
        standing.charter,
        history=begun(standing.charter.history, generation, standing.data, start),
        promises=(),
        whole_from=0,
        floor=0,
        was=None,
        along=(),
        along_promises=(),
        spoilt=False,
    )
    version = await first.rewrite(standing, charter)
    if version != start:
        raise ConflictError(f"{first.name} took commit {start} as {version}: somebody else writes it")
    _logger.info("generation %d of scope %s begins at commit %d on %s", count_of(generation), scope, start, first.name)
    return standing._replace(charter=charter, charter_version=version, number=version)
