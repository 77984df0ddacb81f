"""What the SQL backends share: how a commit is checked before it is sent, and how many share one transaction."""

from __future__ import annotations

from collections.abc import Mapping

from ..contract import MAX_PAYLOAD_BYTES, Key, Op
from ..errors import InvalidInputError
from .state import require_key, require_scope

FORMAT = 1
"""Number of the layout of our tables; raised with every change that an older version could not read."""
MAX_GROUP = 256
"""How many commits share one transaction at most."""
MAX_GROUP_BYTES = 2 * MAX_PAYLOAD_BYTES
"""How many payload bytes share one transaction, about."""
PAGE = 1000
"""How many keys are listed in one round trip."""
_MAX_WRITER = 250


def require_commit(
    scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], op: Op
) -> tuple[dict[Key, str | None], int]:
    """Refuse what no scope could take, and return the payloads as text with their size in bytes.

    Raises:
        InvalidInputError: Names the value and the remedy; nothing was sent.
    """
    require_scope(scope)
    writer, n = op
    if not isinstance(writer, str) or not 0 < len(writer) <= _MAX_WRITER or not writer.isprintable():
        raise InvalidInputError(f"op.writer is {writer!r:.80}: use 1 to {_MAX_WRITER} printable characters")
    if type(n) is not int or not 0 <= n < 2**63:
        raise InvalidInputError(f"op.n is {n!r:.40}: use an int from 0 to 2**63 - 1")
    for key, version in expect.items():
        require_key(key)
        if type(version) is not int or not 0 <= version < 2**63:
            raise InvalidInputError(f"the expected version of {key} is {version!r:.40}: use an int from 0 to 2**63 - 1")
    texts: dict[Key, str | None] = {}
    size = 0
    for key, payload in changes.items():
        require_key(key)
        if payload is None:
            texts[key] = None
        else:
            texts[key] = _text(key, payload)
            size += len(payload)
    return texts, size


def _text(key: Key, payload: bytes) -> str:
    if type(payload) is not bytes:
        raise InvalidInputError(f"the payload of {key} is a {type(payload).__name__}: give bytes, or None to delete")
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InvalidInputError(
            f"the payload of {key} has {len(payload)} bytes; at most {MAX_PAYLOAD_BYTES} can be stored: split it"
        )
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # JSON text has none, and SQL databases end a text there
        # Without the cause: it holds the payload.
        raise InvalidInputError(f"the payload of {key} is not JSON text in UTF-8: encode it first") from None
    return text
