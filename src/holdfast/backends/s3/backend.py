"""The contract over S3: one object for each scope, read with conditions and replaced with conditions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

from ...contract import Guarantees, Head, Key, KeyPrefix, Op, Record
from ...errors import FailedError
from ..limits import require_commit
from ..state import require_scope
from . import attest
from .address import parse
from .document import Snapshot, require_text
from .lane import Lane
from .service import Service

_MOST_KNOWN_KEYS = 50_000


class S3Backend:
    """Keeps each scope as one JSON object in a bucket. Several processes may share it.

    Args:
        url: ``s3://BUCKET/PREFIX?endpoint=https://HOST&region=REGION``; credentials come from the environment
            (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, …). See ``docs/backends/s3.md``.

    Raises:
        InvalidInputError: The URL cannot be used; the message repeats nothing that may be a credential.
    """

    def __init__(self, url: str) -> None:
        self._address = parse(url)
        self._shown = self._address.shown
        self._service: Service | None = None
        self._read_only = False
        self._lanes: dict[str, Lane] = {}
        self._good: set[Key] = set()
        """Keys that were found good before."""

    def __repr__(self) -> str:
        return f"S3Backend({self._shown})"

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Connect and try, concurrently, whether the service refuses writes whose condition does not hold.

        Raises:
            UnsafeSettingError: It does not always, or shows old objects: a second bot would not be kept out.
            UnavailableError: It cannot be reached or used; the message says why.
            InvalidInputError: The environment's ``AWS_…`` variables cannot be used.

        Crash: Leaves what was there, and at most the probe's small objects, which a later open deletes.
        """
        if self._service is not None:
            raise FailedError(f"{self._shown}: is open already: close it first", backend=self._shown)
        service = self._service = Service(self._address)
        try:
            guarantees = await attest.attest(service, self._address, read_only=read_only)
        except BaseException:
            self._service = None
            await asyncio.shield(service.close())
            raise
        self._read_only = read_only
        return guarantees

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys`` as of one moment, by one request."""
        self._opened()
        if not keys:
            return {}
        rows = (await self._current(scope)).scope.rows
        return {key: rows[key] for key in dict.fromkeys(keys) if key in rows}

    async def commit(
        self,
        scope: str,
        changes: Mapping[Key, bytes | None],
        expect: Mapping[Key, int],
        *,
        op: Op,
    ) -> int:
        """Apply ``changes`` if ``expect`` holds, by one conditional write of the scope's object.

        Raises:
            ConflictError: Some ``expect`` does not hold; nothing was changed.
            InvalidInputError: A key, payload, op or scope cannot be used; nothing was changed.
            UnavailableError: Nothing was written: no connection, or no room in the scope's object.
            UnknownOutcomeError: The answer was lost or late; send the same op again.
            FailedError: Not open, opened read-only, or the object was deleted or put back to an older version.
            CorruptedError: The scope's object is damaged; nothing was changed.

        Crash: All of it or nothing: an object is replaced whole.
        Cancellation: If it was sent, it goes on.
        """
        self._opened()
        if self._read_only:
            raise FailedError(f"{self._shown}: was opened read-only: nothing was written", backend=self._shown)
        require_commit(scope, changes, expect, op, known=self._good)
        for key, payload in changes.items():
            if payload is not None:
                require_text(key, payload)
        if len(self._good) > _MOST_KNOWN_KEYS:
            self._good.clear()
        self._good.update(changes)
        return await self._lane(scope).commit(changes, expect, Op(*op))

    async def head(self, scope: str) -> Head:
        """Return the scope's commit number and its writers' last ops."""
        return (await self._current(scope)).head

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """Yield the scope's keys under ``prefix`` in byte order, as of one moment."""
        for key in sorted(filter(prefix.matches, (await self._current(scope)).scope.rows)):
            yield key

    async def scopes(self) -> AsyncIterator[str]:
        """Yield the names of the scopes that have had a commit, in byte order."""
        service = self._opened()
        deadline = asyncio.get_running_loop().time() + self._address.deadline_seconds
        listed = await service.list("", deadline=deadline)
        for name in sorted(one.path.removesuffix(".json") for one in listed if one.path.endswith(".json")):
            yield name

    async def close(self) -> None:
        """Wait for what is under way. Repeatable.

        Crash: As before the call: nothing acknowledged depends on close.
        """
        service, self._service = self._service, None
        if service is not None:
            await asyncio.shield(self._settle(service))

    async def _settle(self, service: Service) -> None:
        for lane in self._lanes.values():
            await lane.idle()
        self._lanes.clear()
        await service.close()

    async def _current(self, scope: str) -> Snapshot:
        self._opened()
        if scope not in self._lanes:
            require_scope(scope)
        return await self._lane(scope).current()

    def _lane(self, scope: str) -> Lane:
        lane = self._lanes.get(scope)
        if lane is None:
            lane = self._lanes[scope] = Lane(scope, self._opened(), self._address.deadline_seconds)
        return lane

    def _opened(self) -> Service:
        if self._service is None:
            raise FailedError(f"{self._shown}: is not open: open it first", backend=self._shown)
        return self._service
