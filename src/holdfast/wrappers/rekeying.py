"""Bringing every row of an encrypted store under the current key, beside a bot that goes on trading.

Each row is rewritten by a commit that expects the version that was read, so nothing that a bot writes meanwhile is
lost: where it came first, its row is looked at again. Every state in between is readable by a keyring that holds both
keys, and a second run finds what is left by looking: nothing is kept about how far the first one came.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import cast

import msgspec

from ..contract import Key, Op, Record
from ..errors import ConflictError, CorruptedError, LockedError, UnavailableError, UnknownOutcomeError
from .encrypted import Encrypted, is_plain, sealed_row

_BATCH_ROWS = 64
_BATCH_BYTES = 1024 * 1024
_MAX_PASSES = 4
_MAX_ATTEMPTS = 10
_FIRST_DELAY_SECONDS = 0.05
_FIRST, _LAST = "owner", "session"
"""Domains that go before and after the others. A bot cannot own a context whose owner row it cannot read, and cannot
recover one without its session row: so on a store that is half encrypted none starts, with the keys or without."""

Progress = Callable[[int, int], None]
"""Told how many rows were looked at, and of how many."""


class Rekeyed(msgspec.Struct):
    """What a run found and did."""

    key: str
    """Id of the current key."""
    rows: int = 0
    """In the last pass."""
    rewritten: int = 0
    left: dict[str, str] = {}
    """Rows that cannot be read, and why. They were left where they are."""
    settled: bool = False
    """A whole pass found no row under another key; else somebody goes on writing such rows."""

    @property
    def ok(self) -> bool:
        """Every row is under the current key."""
        return self.settled and not self.left


class _Run:
    def __init__(
        self,
        store: Encrypted,
        accept_plain: Callable[[Key, bytes], object] | None,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self.store, self.accept_plain, self.sleep = store, accept_plain, sleep
        self.result = Rekeyed(store.keyring.current.id)
        self._writer, self._n = f"rekey@{secrets.token_hex(4)}", 0

    async def do_batch(self, scope: str, keys: list[Key]) -> int:
        """Rewrite those of ``keys`` that are not under the current key; return how many were not."""
        stale = 0
        for _ in range(_MAX_ATTEMPTS):
            rows = await self._stale(scope, keys)
            stale = max(stale, len(rows))
            try:
                for some in _by_size(rows):
                    await self._rewrite(scope, some)
                return stale
            except ConflictError:
                keys = list(rows)  # a bot came first; most likely it used the current key, or deleted the row
        return stale

    async def _stale(self, scope: str, keys: list[Key]) -> dict[Key, Record]:
        """Return those of ``keys`` that are not under the current key, decrypted."""
        while True:
            try:
                good, wrong = await self.store.examine(scope, keys)
                break
            except CorruptedError as damage:  # of the medium itself
                if damage.key not in keys:
                    raise
                self._leave(damage)
                keys = [one for one in keys if one != damage.key]
        stale = {}
        for key, (raw, plain) in good.items():
            if sealed_row(key, raw.payload).key != self.result.key:
                stale[key] = plain
        for error in wrong:
            record = self._plain_record(error)
            if record is None:
                self._leave(error)
            else:
                stale[cast("Key", error.key)] = record
        return stale

    def _plain_record(self, error: CorruptedError) -> Record | None:
        """Return the plain row that is to be encrypted, if that is all that is wrong."""
        key, record = cast("Key", error.key), cast("Record", error.record)
        if self.accept_plain is None or not isinstance(error, LockedError) or not is_plain(record.payload):
            return None
        try:
            self.accept_plain(key, record.payload)
        except CorruptedError:
            return None
        return record

    def _leave(self, error: CorruptedError) -> None:
        self.result.left[str(error.key)] = str(error)

    async def _rewrite(self, scope: str, rows: dict[Key, Record]) -> None:
        """Commit rows under the current key if they are as they were read."""
        self._n += 1
        op = Op(self._writer, self._n)
        changes = {key: record.payload for key, record in rows.items()}
        expect = {key: record.version for key, record in rows.items()}
        delay_seconds = _FIRST_DELAY_SECONDS
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            try:
                await self.store.commit(scope, changes, expect, op=op)
                self.result.rewritten += len(rows)
                return
            except (UnavailableError, UnknownOutcomeError):
                # The same op with the same expect: applied once, whatever became of the first.
                if attempt == _MAX_ATTEMPTS:
                    raise
                await self.sleep(delay_seconds)
                delay_seconds = min(2 * delay_seconds, 2.0)


async def rekey(
    store: Encrypted,
    *,
    accept_plain: Callable[[Key, bytes], object] | None = None,
    progress: Progress = lambda done, total: None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Rekeyed:
    """Rewrite every row of an open store that is not under the current key, in all scopes.

    Args:
        store: Open for writing; its keyring holds the old keys behind the current one.
        accept_plain: Encrypt plain rows too: called with each, raises ``CorruptedError`` for one that is no sound row.
            Only while no bot writes plain rows: what it writes later would stay plain.
        progress: Told after each batch; begins anew with each pass.
        sleep: Takes seconds; a seam for tests.

    Returns:
        What was done; ``ok`` if every row is under the current key.

    Raises:
        UnavailableError, UnknownOutcomeError: The store cannot be used now. Run it again: it goes on with what is left.

    Crash: Each row is under its old key or under the current one; run it again.
    """
    run = _Run(store, accept_plain, sleep)
    for _ in range(_MAX_PASSES):
        run.result.left.clear()
        stale = run.result.rows = done = 0
        scopes = {scope: [key async for key in store.keys(scope)] async for scope in store.scopes()}
        run.result.rows = sum(map(len, scopes.values()))
        listed = [
            (scope, [key for key in keys if _turn(key) == turn]) for turn in range(3) for scope, keys in scopes.items()
        ]
        for scope, keys in listed:
            for at in range(0, len(keys), _BATCH_ROWS):
                batch = keys[at : at + _BATCH_ROWS]
                stale += await run.do_batch(scope, batch)
                done += len(batch)
                progress(done, run.result.rows)
        if not stale:
            run.result.settled = True
            break
    return run.result


def _turn(key: Key) -> int:
    return 0 if key.domain == _FIRST else 2 if key.domain == _LAST else 1


def _by_size(rows: dict[Key, Record]) -> Iterator[dict[Key, Record]]:
    """Yield ``rows`` in parts that are no burden for one commit."""
    part: dict[Key, Record] = {}
    size = 0
    for key, record in rows.items():
        if part and size + len(record.payload) > _BATCH_BYTES:
            yield part
            part, size = {}, 0
        part[key] = record
        size += len(record.payload)
    if part:
        yield part


def encrypted_in(backend: object) -> Encrypted | None:
    """Return the wrapper that encrypts, in a stack of wrappers; None if there is none."""
    found = backend
    while found is not None and not isinstance(found, Encrypted):
        found = getattr(found, "backend", None)
    return found


__all__: Sequence[str] = ("Progress", "Rekeyed", "encrypted_in", "rekey")
