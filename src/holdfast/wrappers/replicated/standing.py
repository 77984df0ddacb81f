"""What a copy of a scope says about itself, and how two copies compare: pure, no I/O.

Each copy of a scope holds two reserved rows. ``number`` is rewritten by every commit, so its version is the scope's
number, read in the same moment as any row. ``generation`` is rewritten only when a generation begins, is promised, or
a repair begins or ends; every commit expects its version, so whoever believes in an older state is refused.

Words: a *generation* has one first copy, chosen by ``promote``. A copy *promises* a generation before it begins, and
takes commits of no older one from then on; the promise is a commit of that copy alone, so the copy's *data* ends
before it. A generation *begins* in a scope by one commit on its first copy.

Invariants:

* A generation has one first copy, and begins at most once in a scope: there, by a compare-and-set.
* A copy that is *whole* holds exactly what the first copy of its newest begun generation held at its data number.
* Of two whole copies the one with the higher rank (generation, data number) holds all that the other holds and that
  a quorum ever acknowledged, or no quorum acknowledged what it lacks.
"""

from __future__ import annotations

import enum
import re
import secrets
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

import msgspec

from ...contract import Key
from ...errors import CorruptedError, InvalidInputError, NewerFormatError
from ...names import quote

DOMAIN = "replica"
"""Domain of the wrapper's own rows, on every copy; callers never see it."""
STORE_SCOPE = "holdfast.replicas"
"""Scope in which each copy keeps what it knows about the whole store; not itself copied."""
OWN_WRITERS = "~replica:"
"""How the names of the wrapper's own writers begin."""
FILLER = f"{OWN_WRITERS}fill"
"""Writer of a number whose op is no longer known."""
FORMAT = 1
"""Number of the layout of a charter and of what the copies agreed on."""
NEVER = 1 << 62
"""A repair that is under way is whole from this number on."""

_COUNT_SHIFT = 32
"""Generations are counted in the bits above; below them are the first copy's place and chance, so that two promotes
at the same time never mean different things by one number."""
FIRST_GENERATION = 1 << _COUNT_SHIFT

_SCOPE = re.compile(r"[A-Za-z0-9._\-]{1,64}")
_REBUILT = re.compile(r".*\.[0-9a-f]{8}\.copy[0-9]+")
_KEPT_GENERATIONS = 200
"""How many generations' beginnings a scope remembers; a copy that was away for longer is rebuilt."""


class Begun(NamedTuple):
    """A generation that began in a scope."""

    generation: int
    data: int
    """The last number of the generations before it."""
    start: int
    """The number of the commit that began it; what lies between are promises, and no data."""


class Promise(NamedTuple):
    """A generation that a copy has promised to, and the number that this took."""

    generation: int
    number: int


class Rank(NamedTuple):
    """How new a copy's data are; of two whole copies the higher one decides."""

    generation: int
    data: int


class Charter(msgspec.Struct, frozen=True, omit_defaults=True):
    """The ``generation`` row of one copy of a scope."""

    scope: str = ""
    history: tuple[Begun, ...] = ()
    promises: tuple[Promise, ...] = ()
    whole_from: int = 0
    """A repair ends at this number; before it the rows are of different moments."""
    floor: int = 0
    """A generation that was promised under another name of this scope."""
    was: Rank | None = None
    """What the copy held before the repair that made its rows be of different moments."""
    along: tuple[Begun, ...] = ()
    """The history of the copy that a repair under way copies from; its numbers are those of that history."""
    along_promises: tuple[Promise, ...] = ()
    """The promises of that copy."""
    spoilt: bool = False
    """A promise was made in the middle of a repair, which has to begin anew."""
    moved_to: str = ""
    """The copy was rebuilt under this physical scope; nothing is read or written here any more."""
    kept: int = -1
    """How many rows and deletions that were dropped are kept here; -1: not kept yet."""
    cleared: bool = False
    """The rows have gone from here, so that they can lie in the new scope."""
    format: int = 1
    """:data:`FORMAT` of who wrote it; raised with every change that an older version must not overlook."""


class Standing(NamedTuple):
    """Where one copy of a scope stands, as read in one moment."""

    physical: str
    """The scope's name on this copy."""
    number: int
    charter: Charter
    charter_version: int
    """Version of the ``generation`` row; 0: there is none."""
    moved_from: Standing | None = None
    """The scope that this one replaces, while it is not cleared."""
    kept: int = 0
    """Rows of dropped commits that are kept on this copy."""

    @property
    def is_whole(self) -> bool:
        """Whether its rows are those of one moment of the store."""
        return self.moved_from is None and self.charter.moved_to == "" and self.number >= self.charter.whole_from

    @property
    def data(self) -> int:
        """The number of the last commit that is not a promise."""
        promises = self.charter.promises
        return min(self.number, promises[0].number - 1) if promises else self.number

    @property
    def generation(self) -> int:
        """The newest generation that began here; 0: none."""
        return self.charter.history[-1].generation if self.charter.history else 0

    @property
    def promised(self) -> int:
        """The newest generation that it knows of: older ones cannot write here."""
        newest = self.charter.promises[-1].generation if self.charter.promises else 0
        return max(self.generation, newest, self.charter.floor)

    @property
    def rank(self) -> Rank:
        """What it holds, or held when it was last whole."""
        if not self.is_whole and self.charter.was is not None:
            return self.charter.was
        return Rank(self.generation, self.data) if self.is_whole else Rank(0, 0)


class Relation(enum.Enum):
    """How a copy stands to the first copy, or to the one that it is repaired from."""

    LEVEL = "level"
    """It holds a beginning of the same commits and takes the next one."""
    BEHIND = "behind"
    """It holds a beginning of the same commits, but must be repaired before it can take the next one."""
    DIVERGED = "diverged"
    """It holds commits that the other does not, and never will."""
    AHEAD = "ahead"
    """It holds later commits of the same generation: the other has lost some."""


def relation(copy: Standing, other: Standing) -> Relation:
    """Return how ``copy`` stands to ``other``, which must be whole."""
    mine, theirs = copy.charter.history, other.charter.history
    if copy.charter.moved_to or copy.moved_from is not None or copy.charter.spoilt:
        return Relation.DIVERGED
    if copy.charter.whole_from == NEVER:
        return Relation.BEHIND if _goes_on(copy, other) else Relation.DIVERGED
    behind = Relation.BEHIND
    if mine == theirs:
        if copy.data > other.data:
            return Relation.AHEAD if copy.is_whole else Relation.DIVERGED
        if copy.number == copy.data:
            return Relation.LEVEL if copy.charter_version or not other.charter_version else behind
        if copy.charter.promises == other.charter.promises and copy.number == other.number:
            return Relation.LEVEL
        return behind if copy.data == other.data and copy.number < other.number else Relation.DIVERGED
    if len(mine) < len(theirs) and theirs[: len(mine)] == mine:
        following = theirs[len(mine)]
        if copy.number == copy.data:
            return behind if copy.data <= following.data else Relation.DIVERGED
        # Promises use up numbers; where the other has no data at these numbers, nothing is in the way.
        return behind if copy.data == following.data and copy.number < following.start else Relation.DIVERGED
    return Relation.DIVERGED


def _goes_on(torn: Standing, other: Standing) -> bool:
    """Whether a repair that stopped can go on from ``other``: all numbers so far are those of its commits."""
    if torn.number >= other.number:
        return False  # no number is left to write what is missing
    if not torn.number:
        return True
    along, promises, theirs = torn.charter.along, torn.charter.along_promises, other.charter.history
    if theirs[: len(along)] != along or not (along or promises):
        return False
    if len(along) == len(theirs):
        return torn.number <= other.data or other.charter.promises[: len(promises)] == promises != ()
    following = theirs[len(along)]
    if torn.number <= following.data:
        return True
    # As above: where there are promises on one side, there must be no data on the other.
    return promises != () and promises[0].number - 1 == following.data and torn.number < following.start


def common(copy: Standing, other: Standing) -> int:
    """Return the last number up to which both surely hold the same commits."""
    at = 0
    for mine, theirs in zip(copy.charter.history, other.charter.history, strict=False):
        if mine != theirs:
            return min(mine.data, theirs.data, copy.data)
        at += 1
    ends = [charter.history[at].data for charter in (copy.charter, other.charter) if at < len(charter.history)]
    return min([*ends, copy.data, other.data])


def begun(history: tuple[Begun, ...], generation: int, data: int, start: int) -> tuple[Begun, ...]:
    """Return the history with one more generation."""
    return (*history, Begun(generation, data, start))[-_KEPT_GENERATIONS:]


def next_generation(newest: int, at: int) -> int:
    """Return a generation after ``newest`` whose first copy is member ``at``; no other promote makes the same."""
    return ((newest >> _COUNT_SHIFT) + 1) << _COUNT_SHIFT | at << 24 | secrets.randbits(24)


def count_of(generation: int) -> int:
    """Return a generation's number as people see it: 1, 2, 3, …"""
    return generation >> _COUNT_SHIFT


@lru_cache(4096)
def charter_key(physical: str) -> Key:
    """Return the key of a scope's ``generation`` row; it names the scope, as a key lies in one scope only."""
    return Key(DOMAIN, quote(physical, keep_underscore=True), "generation")


@lru_cache(4096)
def number_key(physical: str) -> Key:
    """Return the key of the row that every commit rewrites."""
    return Key(DOMAIN, quote(physical, keep_underscore=True), "number")


def dropped_key(physical: str, at: int) -> Key:
    """Return the key of a row that keeps what was dropped."""
    return Key(DOMAIN, quote(physical, keep_underscore=True), f"dropped-{at:06d}")


_ENCODER = msgspec.json.Encoder()
_CHARTER = msgspec.json.Decoder(Charter)


def encode(row: Charter) -> bytes:
    """Return a charter as it is stored."""
    return _ENCODER.encode(row)


def decode(key: Key, payload: bytes) -> Charter:
    """Return a stored charter.

    Raises:
        CorruptedError: It is damaged.
        NewerFormatError: A newer version wrote it.
    """
    try:
        found = _CHARTER.decode(payload)
    except msgspec.MsgspecError as error:
        raise CorruptedError(f"{key}: the wrapper's own row is damaged: {error}", key=key) from error
    if found.format > FORMAT:
        raise newer(key, found.format)
    return found


def newer(key: Key, format: int) -> NewerFormatError:
    """Return the error for a row of the wrapper's own that a newer version wrote."""
    return NewerFormatError(f"{key} has format {format}; this version knows {FORMAT}: upgrade holdfast", key=key)


def rebuilt_name(scope: str, count: int) -> str:
    """Return the physical name of a copy's ``count``-th rebuilt scope: at most 64 characters."""
    return f"{scope[:40]}.{sha256(scope.encode()).hexdigest()[:8]}.copy{count}"


def is_physical_only(scope: str) -> bool:
    """Whether a copy's scope is one that callers must not see."""
    return scope == STORE_SCOPE or _REBUILT.fullmatch(scope) is not None


def require_scope(scope: object) -> None:
    """Refuse what is not a scope's name, or is one of the wrapper's own.

    Raises:
        InvalidInputError: Names the remedy.
    """
    if not isinstance(scope, str) or not _SCOPE.fullmatch(scope):
        raise InvalidInputError(f"{scope!r:.80} is not a scope: use 1 to 64 characters from A-Z a-z 0-9 . _ -")
    if is_physical_only(scope):
        raise InvalidInputError(f"the scope {scope!r} is used by the copies themselves: choose another name")
