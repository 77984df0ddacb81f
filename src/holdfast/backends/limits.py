"""What every server backend checks before it sends a commit, so that nothing unusable leaves the process."""

from __future__ import annotations

from collections.abc import Container, Mapping

from ..contract import MAX_PAYLOAD_BYTES, Key, Op
from ..errors import InvalidInputError
from .state import require_key, require_scope

MAX_WRITER_CHARACTERS = 250
"""Longest name of a writer."""


def require_commit(
    scope: str,
    changes: Mapping[Key, bytes | None],
    expect: Mapping[Key, int],
    op: Op,
    *,
    known: Container[Key] = (),
) -> None:
    """Refuse a commit that no backend could keep.

    Args:
        scope, changes, expect, op: What ``commit`` was given.
        known: Keys that were found good before; they are not looked at again.

    Raises:
        InvalidInputError: Names the scope, key, payload, version or op, and the remedy.
    """
    require_scope(scope)
    writer, n = op
    if not _is_writer(writer):
        raise InvalidInputError(f"op.writer is {writer!r:.80}: use 1 to {MAX_WRITER_CHARACTERS} printable characters")
    if type(n) is not int or not 0 <= n < 2**63:
        raise InvalidInputError(f"op.n is {n!r:.40}: use an int from 0 to 2**63 - 1")
    for key, payload in changes.items():
        if key not in known:
            require_key(key)
        if payload is not None and (type(payload) is not bytes or len(payload) > MAX_PAYLOAD_BYTES):
            raise _refused_payload(key, payload)
    for key, version in expect.items():
        if key not in known:
            require_key(key)
        if type(version) is not int:
            raise InvalidInputError(f"the expected version of {key} is {version!r:.40}: use an int, 0 for absent")


def _is_writer(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= MAX_WRITER_CHARACTERS and name.isprintable()


def _refused_payload(key: Key, payload: object) -> InvalidInputError:
    if isinstance(payload, bytes):
        return InvalidInputError(
            f"the payload of {key} has {len(payload)} bytes; at most {MAX_PAYLOAD_BYTES} can be stored: split it"
        )
    return InvalidInputError(f"the payload of {key} is a {type(payload).__name__}: give bytes, or None to delete")
