"""What a backend that holds its rows in memory knows, and how a commit is decided: once, for memory and file.

Invariants:

* A scope's ``number`` is the number of its last applied commit; applying takes ``number + 1`` only.
* The writer that wrote longest ago is the first to be forgotten.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..contract import MAX_PAYLOAD_BYTES, MAX_WRITERS, Head, Key, KeyPrefix, Op, Record, WriterOp
from ..errors import ConflictError, InvalidInputError

_PART = re.compile(r"[A-Za-z0-9_\-%~=][A-Za-z0-9._\-%~=]{0,249}")
_SCOPE = re.compile(r"[A-Za-z0-9._\-]{1,64}")
_MAX_WRITER = 250


def require_key(key: object) -> None:
    """Refuse a key that was not quoted: what passes can be a path component on any file system.

    Raises:
        InvalidInputError: Names the key and the remedy.
    """
    # The type first: a plain tuple of three would be stored, and then fail far away from here.
    if not isinstance(key, Key) or not all(map(_is_part, key)):
        raise InvalidInputError(
            f"{key!r:.300} is not a storage key: its three parts must be 1 to 250 characters "
            "from A-Z a-z 0-9 . _ - % ~ = and not begin with a dot (quote names with holdfast.names.quote)"
        )


def _is_writer(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= _MAX_WRITER and name.isprintable()


def _is_part(part: object) -> bool:
    return isinstance(part, str) and _PART.fullmatch(part) is not None


def require_scope(scope: object) -> None:
    """Refuse a scope name that is not 1 to 64 characters from ``A-Z a-z 0-9 . _ -``."""
    if not isinstance(scope, str) or not _SCOPE.fullmatch(scope):
        raise InvalidInputError(f"{scope!r:.80} is not a scope: use 1 to 64 characters from A-Z a-z 0-9 . _ -")


class Scope:
    """One scope's rows, commit number and writers."""

    __slots__ = ("damaged", "number", "rows", "writers")

    def __init__(self) -> None:
        self.number = 0
        self.rows: dict[Key, Record] = {}
        self.writers: dict[str, WriterOp] = {}
        self.damaged: set[Key] = set()
        """Keys whose stored bytes do not match their checksum; ``rows`` holds those bytes."""

    def copy(self) -> Scope:
        """Return an independent copy that shares the records."""
        twin = Scope()
        twin.number = self.number
        twin.rows = self.rows.copy()
        twin.writers = self.writers.copy()
        twin.damaged = self.damaged.copy()
        return twin

    def apply(self, number: int, writer: str, last: WriterOp, changes: Mapping[Key, Record | None]) -> None:
        """Apply commit ``number`` of ``writer``; it follows the scope's last one."""
        assert number == self.number + 1, (number, self.number)
        self.number = number
        rows = self.rows
        for key, record in changes.items():
            if record is not None:
                rows[key] = record
            elif key in rows:
                del rows[key]
        if self.damaged:
            self.damaged.difference_update(changes)
        writers = self.writers
        writers[writer] = last
        if len(writers) > MAX_WRITERS:
            del writers[min(writers, key=lambda name: writers[name].number)]


class State:
    """All scopes of one backend."""

    __slots__ = ("scopes",)

    def __init__(self) -> None:
        self.scopes: dict[str, Scope] = {}

    def copy(self) -> State:
        """Return an independent copy that shares the records."""
        twin = State()
        twin.scopes = {name: scope.copy() for name, scope in self.scopes.items()}
        return twin

    def scope(self, name: str) -> Scope:
        """Return the scope, made empty if it had no commit yet."""
        found = self.scopes.get(name)
        if found is None:
            found = self.scopes[name] = Scope()
        return found

    def decide(
        self, name: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], op: Op
    ) -> tuple[int, bool]:
        """Check a commit without applying it; return its number, and whether it repeats one that was applied.

        Raises:
            ConflictError: Some ``expect`` does not hold, or a later op of this writer was applied.
            InvalidInputError: A key, payload, op or scope cannot be used.
        """
        scope = self.scopes.get(name)
        if scope is None:
            require_scope(name)
            scope = _NONE
        writer, n = op
        last = scope.writers.get(writer)
        if last is None:
            if not _is_writer(writer):
                raise InvalidInputError(f"op.writer is {writer!r:.80}: use 1 to {_MAX_WRITER} printable characters")
        elif n == last[0]:
            return last[1], True
        elif n < last[0]:
            raise ConflictError(f"op {n} of writer {writer} comes after its op {last.n}: that writer has moved on")
        if type(n) is not int or not 0 <= n < 2**63:
            raise InvalidInputError(f"op.n is {n!r:.40}: use an int from 0 to 2**63 - 1")
        rows = scope.rows
        for key, version in expect.items():
            found = rows.get(key)
            if (0 if found is None else found.version) != version:
                raise _conflict([key for key, version in expect.items() if _version(rows.get(key)) != version])
        for key, payload in changes.items():
            if key not in rows:
                require_key(key)
                self._require_home(name, key)
            if payload is not None and (type(payload) is not bytes or len(payload) > MAX_PAYLOAD_BYTES):
                raise _refused_payload(key, payload)
        return scope.number + 1, False

    def _require_home(self, name: str, key: Key) -> None:
        for other, scope in self.scopes.items():
            if other != name and key in scope.rows:
                raise InvalidInputError(
                    f"{key} lies in the scope {other!r}, so {name!r} cannot hold it: a key has one scope"
                )

    def number(self, name: str) -> int:
        """Return the number of the scope's last commit; 0 if it had none."""
        return self.scopes.get(name, _NONE).number

    def head(self, name: str) -> Head:
        """Return where the scope stands."""
        scope = self.scopes.get(name, _NONE)
        return Head(scope.number, scope.writers.copy())

    def keys(self, name: str, prefix: KeyPrefix) -> list[Key]:
        """Return the scope's keys under ``prefix`` in byte order."""
        rows = self.scopes.get(name, _NONE).rows
        domain, entity_name = prefix
        if domain and not entity_name:
            return sorted([key for key in rows if key[0] == domain])
        return sorted(filter(prefix.matches, rows) if domain or entity_name else rows)

    def names(self) -> list[str]:
        """Return the scopes that have had a commit, in byte order."""
        return sorted(name for name, scope in self.scopes.items() if scope.number)


_NONE = Scope()  # never changed: stands for a scope without commits


def _version(record: Record | None) -> int:
    return 0 if record is None else record.version


def _conflict(keys: list[Key]) -> ConflictError:
    names = ", ".join(map(str, keys[:3]))
    return ConflictError(f"{names}: not at the expected version: read again, then decide again", keys=keys)


def _refused_payload(key: Key, payload: object) -> InvalidInputError:
    if isinstance(payload, bytes):
        return InvalidInputError(
            f"the payload of {key} has {len(payload)} bytes; at most {MAX_PAYLOAD_BYTES} can be stored: split it"
        )
    return InvalidInputError(f"the payload of {key} is a {type(payload).__name__}: give bytes, or None to delete")
