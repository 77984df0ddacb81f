"""What the processes of a history say to each other: orders to a client, and the lines that it writes.

Times are nanoseconds of ``CLOCK_MONOTONIC``, which on Linux is one clock for all processes of a machine.
"""

from __future__ import annotations

import msgspec

from ...contract import Key

KEYS = 5
"""How many keys a scope has: few, so that operations meet."""


def keys_of(scope: str) -> list[Key]:
    """Return the keys of one scope; a key lives in one scope only."""
    return [Key("history", scope, f"k{at}") for at in range(KEYS)]


class Orders(msgspec.Struct, omit_defaults=True):
    """What one client process is to do."""

    store: str
    log: str
    """Its file of lines; appended."""
    scopes: list[str]
    operations: int
    """How many, over all its hands."""
    hands: list[str]
    """A task each, with this name as the writer of its commits. A writer has one commit in flight."""
    first_n: int
    """Number of the writers' first op; higher than any that these writers used before."""
    seed: int
    unknowns: int
    """How many commits without ``expect`` may be left with an unknown outcome; after them none is sent."""
    opener: str = ""
    """``module:callable`` that takes ``store`` and returns the backend; by default it is named by its URL."""
    look_first: bool = False
    """Note what is stored before anything else."""
    look_last: bool = False
    """Note what is stored when the hands are done."""
    sweep: bool = False
    """At the very end delete the rows, unrecorded."""


class Seen(msgspec.Struct, array_like=True):
    """A row as it was read."""

    key: int
    version: int
    writer: str
    n: int
    payload: str


class Ready(msgspec.Struct, tag="ready"):
    """The store is open."""


class Read(msgspec.Struct, tag="read"):
    """A read and its answer; keys that were asked for and are not in it were absent."""

    begun: int
    ended: int
    by: str
    scope: str
    asked: list[int]
    found: list[Seen]


class Looked(msgspec.Struct, tag="head"):
    """A question for the head and its answer: each writer's last op and number."""

    begun: int
    ended: int
    by: str
    scope: str
    number: int
    writers: dict[str, tuple[int, int]]


class Sent(msgspec.Struct, tag="sent"):
    """A commit is about to be sent; ``again``: it has been before, and its outcome is unknown."""

    begun: int
    scope: str
    writer: str
    n: int
    changes: dict[int, str | None] = {}
    expect: dict[int, int] = {}
    again: bool = False


class Answered(msgspec.Struct, tag="answered"):
    """How a commit ended: ``number`` above 0, or refused by ``clashes``, or ``unavailable`` (nothing was written)."""

    ended: int
    writer: str
    n: int
    number: int = 0
    clashes: list[int] | None = None
    unavailable: bool = False
    why: str = ""
    """What the error said."""


class Repeated(msgspec.Struct, tag="repeated"):
    """An op that had been acknowledged was sent again, and this is the number that it got."""

    begun: int
    ended: int
    scope: str
    writer: str
    n: int
    number: int


class Troubled(msgspec.Struct, tag="troubled"):
    """A call ended in an error that the contract allows, or was cancelled; counted only."""

    what: str


class Broken(msgspec.Struct, tag="broken"):
    """Something that the contract does not allow: a foreign exception, a call that does not return."""

    what: str


Line = Ready | Read | Looked | Sent | Answered | Repeated | Troubled | Broken

_DECODER: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)
_ENCODER = msgspec.json.Encoder()


def encode(line: Line) -> bytes:
    """Return a line as bytes, with its end."""
    return _ENCODER.encode(line) + b"\n"


def decode(raw: bytes) -> Line | None:
    """Return a line; None if a kill tore it, and then its process did not go on to act on it."""
    try:
        return _DECODER.decode(raw)
    except msgspec.DecodeError:
        return None
