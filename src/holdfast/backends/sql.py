"""What the SQL backends share: how a commit is checked before it is sent, and how many share one transaction."""

from __future__ import annotations

from collections.abc import Mapping

from ..contract import MAX_PAYLOAD_BYTES, Key, Op
from ..errors import InvalidInputError
from . import limits

FORMAT = 1
"""Number of the layout of our tables; raised with every change that an older version could not read."""
MAX_GROUP = 256
"""How many commits share one transaction at most."""
MAX_GROUP_BYTES = 2 * MAX_PAYLOAD_BYTES
"""How many payload bytes share one transaction, about."""
PAGE = 1000
"""How many keys are listed in one round trip."""


class Doorman:
    """Looks at each commit before it is queued, and remembers the keys that were found good, up to a limit."""

    _MOST = 50_000

    def __init__(self) -> None:
        self._good: set[Key] = set()

    def admit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], op: Op
    ) -> tuple[dict[Key, str | None], int]:
        """Refuse what no scope could take, and return the payloads as text with their size in bytes.

        Raises:
            InvalidInputError: Names the value and the remedy; nothing was sent.
        """
        good = self._good
        limits.require_commit(scope, changes, expect, op, known=good)
        if len(good) > self._MOST:
            good.clear()
        good.update(changes)
        texts: dict[Key, str | None] = {}
        size = 0
        for key, payload in changes.items():
            if payload is None:
                texts[key] = None
            else:
                texts[key] = _text(key, payload)
                size += len(payload)
        return texts, size


def _text(key: Key, payload: bytes) -> str:
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # JSON text has none, and SQL databases end a text there
        # Without the cause: it holds the payload.
        raise InvalidInputError(f"the payload of {key} is not JSON text in UTF-8: encode it first") from None
    return text
