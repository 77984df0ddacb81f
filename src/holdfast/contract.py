"""Every storage interface, in one file.

A *backend* keeps payload bytes under keys, grouped in scopes. It knows nothing
of signals; the store above it knows nothing of disks. One primitive, ``commit``,
gives compare-and-set, atomicity over several rows, idempotence and fencing.

Invariants that every backend keeps:

* Each scope counts its commits: 1, 2, 3, … A record's ``version`` is the number
  of the commit that wrote it; 0 means absent. A version never comes back, not
  even when a key is deleted and made again.
* A key lives in one scope only, and is unique across scopes: memory, files, SQLite and PostgreSQL refuse a second
  scope; Redis, MongoDB and S3 cannot see it in one request, and there the caller keeps to it.
* What ``read`` returns has been acknowledged, or is as durable as if it had.
* When ``commit`` returns, the change survives what ``open`` reported.
* No exception but those of :mod:`holdfast.errors` (and cancellation) escapes.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import msgspec

from .errors import InvalidInputError

MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
"""Largest payload that a commit takes for one row, in bytes."""

MAX_WRITERS = 4096
"""How many writers' last ops a scope remembers; the one that wrote longest ago goes first.

A writer that was dropped loses only the shortcut: its re-sent op meets its own
``expect``, and is refused with ``ConflictError`` instead of being applied twice.
"""


class Key(NamedTuple):
    """Which row: a domain, an entity name and an entity id, each already quoted.

    Parts are 1 to 250 characters from ``A-Z a-z 0-9 . _ - % ~ =`` and do not
    begin with a dot: :func:`holdfast.domains.quote` makes them so. Ordered by
    their bytes.
    """

    domain: str
    entity_name: str
    entity_id: str

    def __str__(self) -> str:
        return f"{self.domain}/{self.entity_name}/{self.entity_id}"


class KeyPrefix(NamedTuple):
    """Which keys: all, those of one domain, or those of one entity of a domain."""

    domain: str = ""
    entity_name: str = ""

    def matches(self, key: Key) -> bool:
        """Tell whether ``key`` lies under this prefix; an empty part matches anything."""
        return (not self.domain or key.domain == self.domain) and (
            not self.entity_name or key.entity_name == self.entity_name
        )


class Op(NamedTuple):
    """One commit of one writer: ``n`` grows with every commit of that writer in a scope.

    A writer has at most one commit in flight. An op whose ``n`` equals the
    writer's last one is a repetition and is answered with its number; a lower
    ``n`` raises :class:`~holdfast.errors.ConflictError`.
    """

    writer: str
    n: int


class Record(NamedTuple):
    """One stored row: its payload, the number of the commit that wrote it, and that commit's op."""

    payload: bytes
    version: int
    op: Op


class WriterOp(NamedTuple):
    """A writer's last op in a scope (``n``) and the number of its commit."""

    n: int
    number: int


class Head(NamedTuple):
    """Where a scope stands: its commit number (0: none yet) and each remembered writer's last op."""

    number: int
    writers: Mapping[str, WriterOp]


class Survives(enum.IntEnum):
    """What a returned commit survives."""

    NOTHING = 0
    """Not even the end of this process."""
    PROCESS = 1
    """The death of this process (SIGKILL), but not of the machine."""
    HOST = 2
    """A power cut of the machine that holds the data."""
    SERVER = 3
    """The loss of one machine that holds the data."""


class How(enum.StrEnum):
    """How a guarantee was established."""

    ATTESTED = "attested"
    """Read from the medium's own settings, or probed, at open."""
    ASSUMED = "assumed"
    """Follows from the medium's documentation; not checked."""
    UNKNOWN = "unknown"
    """Nothing is known."""


class Guarantees(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend promises, and how each point was established."""

    backend: str
    """What was opened, without credentials, such as ``file:/srv/bot/dump/data``."""
    survives: Survives
    survives_how: How
    atomic: bool
    """A commit of several rows becomes visible whole or not at all."""
    atomic_how: How
    fenced: bool
    """``expect`` is enforced by the medium itself, in the same step as the write."""
    fenced_how: How
    shared: bool
    """Several processes may have it open for writing at once."""
    warnings: tuple[str, ...] = ()
    """What weakens the promise, each with the setting to change."""

    @staticmethod
    def weakest(parts: Sequence[Guarantees]) -> Guarantees:
        """Return what holds for all of ``parts`` together (used where a store routes domains)."""
        if not parts:
            raise InvalidInputError("weakest() needs at least one Guarantees")
        first, *rest = parts
        if not rest:
            return first
        low = min(parts, key=lambda part: part.survives)
        tame = min(parts, key=lambda part: part.atomic)
        free = min(parts, key=lambda part: part.fenced)
        return Guarantees(
            backend=" + ".join(dict.fromkeys(part.backend for part in parts)),
            survives=low.survives,
            survives_how=low.survives_how,
            atomic=tame.atomic,
            atomic_how=tame.atomic_how,
            fenced=free.fenced,
            fenced_how=free.fenced_how,
            shared=all(part.shared for part in parts),
            warnings=tuple(dict.fromkeys(w for part in parts for w in part.warnings)),
        )


@runtime_checkable
class Backend(Protocol):
    """One place that keeps payloads under keys. Used by one event loop at a time.

    Payloads are UTF-8 JSON text and come back byte for byte. Every method may
    raise :class:`~holdfast.errors.UnavailableError` (nothing was written: try
    again) and :class:`~holdfast.errors.FailedError` (close and open again).
    """

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Connect, create what is missing, take the lock, make durable what is there, attest.

        Args:
            read_only: Take no lock and change nothing, so that it works beside a running bot.

        Raises:
            HeldError: Another process holds it; the message names that process.
            UnsafeSettingError: A setting voids the promise; the message names it.
            CorruptedError: What is stored cannot be read; nothing was deleted.

        Crash: Leaves what was there; opening again finishes.
        """
        ...

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys`` as of one moment, in one round trip; absent keys are absent.

        Raises:
            CorruptedError: The bytes of a key are damaged; ``error.key`` names it.
        """
        ...

    async def commit(
        self,
        scope: str,
        changes: Mapping[Key, bytes | None],
        expect: Mapping[Key, int],
        *,
        op: Op,
    ) -> int:
        """Apply all of ``changes`` if all of ``expect`` hold, and return the scope's new commit number.

        Args:
            scope: 1 to 64 characters from ``A-Z a-z 0-9 . _ -``.
            changes: Payload for each key to write, None for each to delete. May be empty.
            expect: Version that each named key must have now; 0 for absent. Absence can come back where a version
                cannot: a request that was given up, expects zeros only and still travels is applied if the rows are
                gone again when it arrives. Name one row in it that is never deleted (the engine: the owner row).
            op: Names this commit; a repeated op returns its first number, after a durability barrier.

        Raises:
            ConflictError: Some ``expect`` does not hold; nothing was changed.
            UnknownOutcomeError: The answer was lost; send the same op again.
            InvalidInputError: A payload is over ``MAX_PAYLOAD_BYTES``; nothing was changed.

        Crash: Before the return, all of the changes or none; after it, all.
        Cancellation: The commit may still be applied; read the head to know.
        """
        ...

    async def head(self, scope: str) -> Head:
        """Return the scope's commit number and its writers' last ops."""
        ...

    def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """Yield the scope's keys under ``prefix`` in byte order; commits meanwhile do no harm."""
        ...

    def scopes(self) -> AsyncIterator[str]:
        """Yield the names of the scopes that have had a commit, in byte order."""
        ...

    async def close(self) -> None:
        """Finish what is under way, bring readable copies up to date and let go of the lock. Repeatable.

        Crash: As before the call: nothing acknowledged depends on close.
        """
        ...
