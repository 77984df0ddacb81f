"""Bringing a copy level, from what another copy holds now: there is no log.

A copy that is behind at number m is brought to number h by the commits m+1 … h: each writes the rows that the source
holds with that version, under the op that wrote them, and is empty where nothing of it is left. So numbers, versions
and ops end equal. In between its rows are of different moments, which its charter says (``whole_from``), so it is
neither promoted nor counted meanwhile.

Rows that are written while the source is read come with later numbers, by those who commit them, or by the next
repair: the copy counts as whole only from the highest number that the source had when the last row was read.

A copy that holds commits which the source will never hold is set aside first: the rows of those commits, and the
deletions, are kept in reserved rows, the others go, and the scope is built anew under another name on that copy.

Crash: A repair goes on where it stopped, whoever continues it; of two at once each commit lets one win.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from ...contract import MAX_PAYLOAD_BYTES, Key, Op, Record
from ...errors import ConflictError, UnavailableError, UnknownOutcomeError
from .copies import Copy, StaleGenerationError
from .standing import (
    DOMAIN,
    FILLER,
    NEVER,
    OWN_WRITERS,
    Charter,
    Relation,
    Standing,
    charter_key,
    common,
    dropped_key,
    encode,
    number_key,
    rebuilt_name,
    relation,
)

PAGE = 500
"""How many rows are read or deleted at once."""
WINDOW = 256
"""How many commits of a repair are under way at once; each expects the one before it."""
_KEPT_TEXT = MAX_PAYLOAD_BYTES // 16
"""How much text one reserved row keeps, about; escaping may make it six times as long. Longer rows are cut in parts."""
_logger = logging.getLogger("holdfast.replicated")


class _Seen:
    """What was read of the source, for the commits from ``after`` + 1 to ``until``."""

    def __init__(self, after: int, until: int) -> None:
        self.after = after
        self.until = until
        self.newest = until
        """The number that the source had reached when the last row was read."""
        self.rows: dict[int, dict[Key, bytes]] = {}
        self.ops: dict[int, Op] = {}
        self.keys: set[Key] = set()


async def pages(copy: Copy, physical: str) -> AsyncIterator[list[Key]]:
    """Yield the keys of callers' rows in a copy's scope, some at a time."""
    page: list[Key] = []
    async for key in copy.backend.keys(physical):
        if key.domain != DOMAIN:
            page.append(key)
            if len(page) == PAGE:
                yield page
                page = []
    if page:
        yield page


async def bring_level(scope: str, source: Copy, target: Copy, *, generation: int) -> Standing:
    """Bring ``target`` to where ``source`` stands, setting aside what it alone holds; return where it stands then.

    Args:
        generation: The newest generation that the caller knows of.

    Raises:
        StaleGenerationError: One of them has promised a newer generation.
        ConflictError: Somebody else wrote to the target meanwhile: look again.
        UnavailableError: The source is not whole, or has lost commits that the target holds.
    """
    found, other = await target.standing(scope), await source.standing(scope)
    if max(found.promised, other.promised) > generation:
        raise StaleGenerationError
    if not other.is_whole:
        raise UnavailableError(f"{source.name} is itself under repair in {scope}: nothing can be copied from it")
    how = relation(found, other)
    if how is Relation.AHEAD:
        raise lost(scope, source, target, found, other)
    if how is Relation.DIVERGED:
        await _set_aside(scope, target, found, source, other)
        found = await target.standing(scope)
        if relation(found, other) is not Relation.BEHIND:
            raise ConflictError(f"{target.name}: somebody else is repairing scope {scope} too: look again")
    if found.number < other.number:
        await _copy(scope, source, other, target, found)
    return await target.standing(scope)


class LostCommitsError(UnavailableError):
    """The first copy has lost commits that another copy holds: nothing may be read or written until a promote."""


def lost(scope: str, source: Copy, target: Copy, found: Standing, other: Standing) -> LostCommitsError:
    """Return the error for a first copy that went back in time."""
    return LostCommitsError(
        f"{source.name} stands at commit {other.number} of scope {scope}, {target.name} at {found.number} of the same "
        "generation: the first copy has lost commits; stop it and run holdfast promote"
    )


async def _copy(scope: str, source: Copy, other: Standing, target: Copy, found: Standing) -> None:
    seen = await _look(source, other, found.number)
    gone = [key async for page in pages(target, found.physical) for key in page if key not in seen.keys]
    final = msgspec.structs.replace(
        other.charter,
        whole_from=seen.newest if seen.newest > seen.until else 0,
        was=found.rank if seen.newest > seen.until else None,
        floor=0,
    )
    torn = msgspec.structs.replace(
        found.charter,
        whole_from=NEVER,
        floor=found.promised,
        was=found.rank,
        along=other.charter.history,
        along_promises=other.charter.promises,
    )
    guard, number_row = charter_key(found.physical), number_key(found.physical)
    guard_version = found.charter_version
    batch: list[Any] = []
    for number in range(found.number + 1, seen.until + 1):
        changes: dict[Key, bytes | None] = {**seen.rows.get(number, {}), number_row: b"{}"}
        expect = {guard: guard_version, number_row: number - 1}
        if number == seen.until:
            changes |= dict.fromkeys(gone)
            changes[guard] = encode(final)
        elif number == found.number + 1:
            changes[guard] = encode(torn)
            guard_version = number
        op = seen.ops.get(number) or Op(FILLER, number)
        batch.append((number, target.backend.commit(found.physical, changes, expect, op=op)))
        # The first one alone: it tells everybody that the rows are of different moments from now on.
        if len(batch) == WINDOW or number in (found.number + 1, seen.until):
            await _all(batch, target)
            batch = []
    if seen.until - found.number > 1:
        _logger.info("%s: scope %s was repaired from %d to %d", target.name, scope, found.number, seen.until)


async def _all(batch: list[Any], target: Copy) -> None:
    answers = await asyncio.gather(*(call for _, call in batch), return_exceptions=True)
    for (number, _), answer in zip(batch, answers, strict=True):
        if isinstance(answer, UnknownOutcomeError):
            # Not what a caller's own commit came to: whoever goes on looks at what is there.
            raise UnavailableError(f"{target.name}: commit {number} of a repair: {answer}") from answer
        if isinstance(answer, BaseException):
            raise answer
        if answer != number:
            raise ConflictError(f"{target.name} took commit {number} of a repair as {answer}: somebody else writes it")


async def _look(source: Copy, standing: Standing, after: int) -> _Seen:
    """Read what the commits after ``after`` left on the source."""
    physical = standing.physical
    guard, number_row = charter_key(physical), number_key(physical)
    head = await source.backend.head(physical)
    seen = _Seen(after, head.number)
    for writer, last in head.writers.items():
        if last.number > after:
            seen.ops[last.number] = Op(writer, last.n)

    def take(found: dict[Key, Record]) -> None:
        if (found[guard].version if guard in found else 0) != standing.charter_version:
            raise StaleGenerationError  # a generation was promised or begun there meanwhile
        if number_row in found:  # else it was in use before it had copies, and nobody has written to it since
            seen.newest = max(seen.newest, found[number_row].version)
        for key, record in found.items():
            if key.domain == DOMAIN:
                continue
            seen.keys.add(key)
            if after < record.version <= seen.until:
                seen.rows.setdefault(record.version, {})[key] = record.payload
                seen.ops[record.version] = record.op

    async for page in pages(source, physical):
        take(await source.backend.read(physical, [*page, guard, number_row]))
    take(await source.backend.read(physical, [guard, number_row]))
    for number, op in list(seen.ops.items()):
        if op.writer.startswith(OWN_WRITERS):
            seen.ops[number] = Op(FILLER, number)  # their own numbers need not grow from copy to copy
    return seen


async def _set_aside(scope: str, target: Copy, found: Standing, source: Copy, other: Standing) -> None:
    """Keep what ``target`` alone holds, take its rows away, and let its scope begin anew under another name."""
    before = found.moved_from or found
    if not before.charter.moved_to:
        name = rebuilt_name(scope, _count(before.physical) + 1)
        charter = msgspec.structs.replace(before.charter, moved_to=name, was=before.rank)
        version = await target.rewrite(before, charter)
        before = before._replace(charter=charter, charter_version=version, number=version)
    if before.charter.kept < 0:
        count = await _keep(scope, target, before, source, other)
        before = await _mark(target, before, msgspec.structs.replace(before.charter, kept=count))
    async for page in pages(target, before.physical):
        await target.write(before.physical, dict.fromkeys(page), {charter_key(before.physical): before.charter_version})
    at = (await target._stands(scope, before.physical)).number
    before = before._replace(number=at)
    await _mark(target, before, msgspec.structs.replace(before.charter, cleared=True))


def _count(physical: str) -> int:
    _, mark, count = physical.rpartition(".copy")
    return int(count) if mark and count.isdecimal() else 0


async def _mark(target: Copy, standing: Standing, charter: Charter) -> Standing:
    version = await target.rewrite(standing, charter)
    return standing._replace(charter=charter, charter_version=version, number=version)


async def _keep(scope: str, target: Copy, before: Standing, source: Copy, other: Standing) -> int:
    """Write what the dropped commits left into reserved rows; return how many rows and deletions that are."""
    level = common(before, other)
    theirs: dict[Key, Record] = {}
    async for page in pages(source, other.physical):
        theirs |= await source.backend.read(other.physical, page)
    dropped: list[dict[str, Any]] = []
    mine: set[Key] = set()
    async for page in pages(target, before.physical):
        for key, record in (await target.backend.read(before.physical, page)).items():
            mine.add(key)
            same = theirs.get(key)
            if record.version > level and same != record:
                text = record.payload.decode(errors="backslashreplace")
                pieces = [text[at : at + _KEPT_TEXT] for at in range(0, max(1, len(text)), _KEPT_TEXT)]
                dropped += [{"key": key, "version": record.version, "op": record.op, "payload": p} for p in pieces]
    if not before.charter.spoilt and before.charter.whole_from <= before.number:  # else they had not come yet
        dropped += [
            {"key": key, "deleted": True} for key, r in theirs.items() if r.version <= level and key not in mine
        ]
    at, size, part = 0, 0, []
    for one in dropped:
        part.append(one)
        size += len(one.get("payload", ""))
        if size >= _KEPT_TEXT:
            await _keep_part(scope, target, before, at, part)
            at, size, part = at + 1, 0, []
    if part:
        await _keep_part(scope, target, before, at, part)
    if dropped:
        _logger.warning(
            "%s held commits of scope %s that never reached the quorum: %d rows of them are kept under %s",
            target.name, scope, len(dropped), dropped_key(before.physical, 0),
        )  # fmt: skip
    return len(dropped)


async def _keep_part(scope: str, target: Copy, before: Standing, at: int, rows: list[dict[str, Any]]) -> None:
    row = {"scope": scope, "rank": before.rank, "rows": rows}
    await target.write(
        before.physical,
        {dropped_key(before.physical, at): msgspec.json.encode(row)},
        {charter_key(before.physical): before.charter_version},
    )
