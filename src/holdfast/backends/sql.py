"""What the SQL backends share: how a commit is checked before it is sent, how many share one transaction, and how
lines become records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from ..bulk import without_collections
from ..contract import MAX_PAYLOAD_BYTES, Key, Op, Record
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
        size = 0
        texts: dict[Key, str | None] = {}
        for key, payload in changes.items():
            if payload is None:
                texts[key] = None
                continue
            try:
                texts[key] = text = payload.decode()
            except UnicodeDecodeError:
                text = "\0"
            if "\0" in text:  # JSON text has none, and SQL databases end a text there
                # Without the cause: it holds the payload.
                raise InvalidInputError(f"the payload of {key} is not JSON text in UTF-8: encode it first") from None
            size += len(payload)
        return texts, size


def records(keys: Iterable[Key], lines: Iterable[tuple[Any, ...]]) -> tuple[int, dict[Key, Record]]:
    """Return how many lines there were, and those of ``keys`` as records.

    Args:
        keys: Which are wanted.
        lines: Of one scope, each with the parts of its key, its row as bytes, its version and its op; no key twice.
    """
    found: dict[Any, Any] = dict.fromkeys(keys)
    wanted, seen = len(found), 0
    new = tuple.__new__  # what Record(…) does in the end, in half the time
    ops: dict[int, Op] = {}  # by version, for a version is one commit's and so one op's
    with without_collections():
        for domain, entity_name, entity_id, row, version, writer, n in lines:
            seen += 1
            op = ops.get(version)
            if op is None:
                op = ops[version] = Op(writer, n)
            # Taken without asking whether it is wanted: if it is, the caller's key stays, if not, it comes after them.
            found[domain, entity_name, entity_id] = new(Record, (row, version, op))
        if seen == wanted == len(found):
            return seen, found
        return seen, {key: record for key, record in islice(found.items(), wanted) if record is not None}
