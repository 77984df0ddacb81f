"""Moving a store to another backend: every scope and row, verified, so that it can be interrupted and run again.

Payloads are copied byte for byte; versions and commit numbers begin anew at the target. What is under way lies in the
target beside the rows, in a scope of its own, until everything has been compared: a target with other data is
refused, one with an unfinished copy of the same source is gone on with.

Signs of life are not copied; owner rows are, so that epochs go on rising.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from typing import NamedTuple

import msgspec

from .contract import MAX_PAYLOAD_BYTES, Backend, Key, KeyPrefix, Op, Record
from .errors import ConflictError, CorruptedError, InvalidInputError, UnavailableError, UnknownOutcomeError

SCOPE = "holdfast.copy"
_MARK = Key("copy", "state", "unfinished")
_NOT_COPIED = (".beats",)
"""Endings of scopes that hold nothing to keep."""
_BATCH_ROWS = 200
_BATCH_BYTES = 1024 * 1024
_MAX_RESENDS = 12

Progress = Callable[[int, int], None]


class ScopeSum(NamedTuple):
    """What one scope holds."""

    rows: int
    checksum: str
    """SHA-256 over each key and payload in byte order."""


class Copied(NamedTuple):
    """What a copy did."""

    scopes: dict[str, ScopeSum]
    """As read back from the target, and the same at the source."""
    written: int
    """Rows that this run wrote; the others lay there already."""

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(one.rows for one in self.scopes.values())


class _Mark(msgspec.Struct):
    source: str


async def copy(
    source: Backend,
    target: Backend,
    *,
    name: str,
    sound: Callable[[Key, bytes], object] = lambda key, payload: None,
    progress: Progress = lambda done, total: None,
) -> Copied:
    """Copy every row of ``source`` to ``target``; both are open, the target for writing, and nobody else writes.

    Args:
        name: What the source is called, without credentials: a copy goes on only with the same one.
        sound: Raises ``CorruptedError`` for a row that cannot be trusted.
        progress: Told how many rows are done, of how many.

    Returns:
        What the target holds, opened anew and compared with the source by count and checksum.

    Raises:
        InvalidInputError: The source is empty, or the target holds other data; nothing was written.
        UnavailableError: A side cannot be used now, or the source changed meanwhile: run it again.
        CorruptedError: A row of the source is damaged, or one came back from the target with other bytes.

    Crash: The target is marked as unfinished and refuses to be taken for a store's copy; running again finishes it.
    """
    heads = {scope: (await source.head(scope)).number async for scope in _scopes(source)}
    plan = {scope: [key async for key in source.keys(scope)] for scope in heads}
    total = sum(map(len, plan.values()))
    if not total:
        raise InvalidInputError(f"there is nothing in {name}: name the store that the bot wrote to")
    writer = _Writer(target)
    await _begin(source, target, writer, name)
    done = written = 0
    progress(0, total)
    for scope, keys in plan.items():
        for page in _pages(keys):
            done += len(page)
            written += await _copy_page(source, target, writer, scope, page, sound)
            progress(done, total)
        await _remove_others(target, writer, scope, set(keys))
    sums = {scope: await _sum(source, scope) for scope in plan}
    if {scope: (await source.head(scope)).number async for scope in _scopes(source)} != heads:
        raise UnavailableError(f"{name} changed while it was copied: end what writes to it, then run this again")
    await target.close()
    await target.open()  # what it remembers is not what lies there: a cache, or rows that a backend keeps in memory
    for scope, expected in sums.items():
        if await _sum(target, scope) != expected:
            raise CorruptedError(f"the scope {scope} came back from the target with other bytes: it cannot be trusted")
    await writer.commit(SCOPE, {_MARK: None})
    return Copied(sums, written)


async def require_whole(backend: Backend) -> None:
    """Refuse a store that is the target of an unfinished copy.

    Raises:
        InvalidInputError: It is; the message names the remedy.
    """
    if (found := (await backend.read(SCOPE, [_MARK])).get(_MARK)) is not None:
        raise InvalidInputError(
            f"the copy of {_source_of(found)} to this store was not finished: run the same holdfast copy again"
        )


def _source_of(mark: Record) -> str:
    try:
        return msgspec.json.decode(mark.payload, type=_Mark).source
    except msgspec.MsgspecError as error:
        raise CorruptedError(f"{_MARK}: the mark of an unfinished copy is damaged: {error}", key=_MARK) from error


async def _scopes(backend: Backend) -> AsyncIterator[str]:
    async for scope in backend.scopes():
        if scope != SCOPE and not scope.endswith(_NOT_COPIED):
            yield scope


async def _begin(source: Backend, target: Backend, writer: _Writer, name: str) -> None:
    """Mark an empty target, or find the mark of the same copy; or that it is the same already."""
    found = (await target.read(SCOPE, [_MARK])).get(_MARK)
    if found is not None:
        earlier = _source_of(found)
        if earlier != name:
            raise InvalidInputError(
                f"the target holds an unfinished copy of {earlier}: finish that, or use another one"
            )
        return
    async for scope in _scopes(target):
        async for _ in target.keys(scope):
            if await _are_equal(source, target):
                return
            raise InvalidInputError("the target is not empty, and no copy of this store: name an empty place")
    # Expected as it was looked for: of two copies that begin here at once one goes on.
    await writer.commit(SCOPE, {_MARK: msgspec.json.encode(_Mark(name))}, {_MARK: 0})


async def _are_equal(source: Backend, target: Backend) -> bool:
    ours = {scope: await _sum(source, scope) async for scope in _scopes(source)}
    theirs = {scope: await _sum(target, scope) async for scope in _scopes(target)}
    return {s: v for s, v in ours.items() if v.rows} == {s: v for s, v in theirs.items() if v.rows}


def _pages(keys: list[Key]) -> list[list[Key]]:
    return [keys[at : at + _BATCH_ROWS] for at in range(0, len(keys), _BATCH_ROWS)]


async def _read(backend: Backend, scope: str, keys: list[Key]) -> dict[Key, Record]:
    found = await backend.read(scope, keys)
    if missing := [key for key in keys if key not in found]:
        raise UnavailableError(f"{missing[0]} was deleted while it was copied: end what writes to it, run this again")
    return found


async def _copy_page(
    source: Backend,
    target: Backend,
    writer: _Writer,
    scope: str,
    keys: list[Key],
    sound: Callable[[Key, bytes], object],
) -> int:
    """Write the rows of a page that the target lacks or has otherwise; return how many."""
    wanted = await _read(source, scope, keys)
    there = await target.read(scope, keys)
    batch: dict[Key, bytes | None] = {}
    size = written = 0
    for key in keys:
        payload = wanted[key].payload
        sound(key, payload)
        if key in there and there[key].payload == payload:
            continue
        if batch and size + len(payload) > min(_BATCH_BYTES, MAX_PAYLOAD_BYTES):
            await writer.commit(scope, batch)
            batch, size = {}, 0
        batch[key] = payload
        size += len(payload)
        written += 1
    if batch:
        await writer.commit(scope, batch)
    return written


async def _remove_others(target: Backend, writer: _Writer, scope: str, keys: set[Key]) -> None:
    """Delete what an earlier, interrupted run wrote and the source has deleted since."""
    for page in _pages([key async for key in target.keys(scope) if key not in keys]):
        await writer.commit(scope, dict.fromkeys(page))


async def _sum(backend: Backend, scope: str) -> ScopeSum:
    digest, rows = sha256(), 0
    for page in _pages([key async for key in backend.keys(scope, KeyPrefix())]):
        found = await _read(backend, scope, page)
        for key in page:
            payload = found[key].payload
            digest.update(f"{key}\n{len(payload)}\n".encode())
            digest.update(payload)
        rows += len(page)
    return ScopeSum(rows, digest.hexdigest())


class _Writer:
    """Commits one after another, each until its outcome is known."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._name, self._n = backend, f"copy@{secrets.token_hex(4)}", 0

    async def commit(
        self, scope: str, changes: dict[Key, bytes | None], expect: dict[Key, int] | None = None
    ) -> None:  # fmt: skip
        """Write rows that nobody else writes; without ``expect`` over what lies there now.

        Crash: All of them or none; the next run writes what is missing.
        """
        self._n += 1
        op = Op(self._name, self._n)
        if expect is None:
            there = await self._backend.read(scope, list(changes))
            expect = {key: there[key].version if key in there else 0 for key in changes}
        delay_seconds = 0.05
        for _ in range(_MAX_RESENDS):
            try:
                await self._backend.commit(scope, changes, expect, op=op)
                return
            except UnknownOutcomeError:
                await asyncio.sleep(delay_seconds)
                delay_seconds = min(2 * delay_seconds, 5.0)
            except ConflictError as error:
                raise UnavailableError(
                    f"somebody else writes to the target: end that, then run this again: {error}"
                ) from error
        raise UnavailableError("the target does not answer: mend it, then run this again")
