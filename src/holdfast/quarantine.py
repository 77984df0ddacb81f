"""Quarantine: how untrusted bytes are kept as rows, and which keys they stop.

A row that cannot be trusted becomes one or more ``quarantine`` rows, under a key that tells whose bytes they are:
``quarantine/<domain>_<entity name>/<entity id>.<number>``, with ``-2``, ``-3``, … for the further pieces of a long
one. Releasing it moves them to ``….<number>.released``: kept, but no longer stopping the key.
"""

from __future__ import annotations

import base64
import time

from .contract import Key, Record
from .domains import quarantine_key
from .rows import Quarantined

_RELEASED = ".released"
_PIECE_BYTES = 4 * 1024 * 1024
_TEXT_BYTES = 1024 * 1024
"""Longer bytes are kept in base64, because text may grow sixfold in JSON."""


def kept_rows(key: Key, record: Record | None, reason: str, number: int) -> dict[Key, Quarantined]:
    """Return the rows that keep the exact bytes of ``record`` (None: the backend keeps them itself).

    Args:
        key: Whose bytes they are.
        record: The record as it was read.
        reason: Why it is not trusted, for people.
        number: Makes the keys unique: the record's version, or the scope's commit number.
    """
    payload = b"" if record is None else record.payload
    first = quarantine_key(key, number)
    rows = {}
    for at in range(0, max(1, len(payload)), _PIECE_BYTES):
        piece = payload[at : at + _PIECE_BYTES]
        place = at // _PIECE_BYTES + 1
        kept_key = first if place == 1 else first._replace(entity_id=f"{first.entity_id}-{place}")
        text, coded = _as_text(piece)
        rows[kept_key] = Quarantined(
            reason=reason.encode(errors="replace").decode(),
            text=text,
            base64=coded,
            version=0 if record is None else record.version,
            at_ms=time.time_ns() // 1_000_000,
        )
    return rows


def kept_bytes(rows: list[Quarantined]) -> bytes:
    """Return the bytes that ``rows`` keep, given in the order of their pieces."""
    return b"".join(base64.b64decode(row.base64) if row.base64 else row.text.encode() for row in rows)


def stopped_key(kept: Key) -> Key:
    """Return the key whose bytes the quarantine row ``kept`` holds."""
    domain, _, name = kept.entity_name.partition("_")
    entity_id = kept.entity_id.removesuffix(_RELEASED)
    return Key(domain, name, entity_id.rpartition(".")[0])


def is_released(kept: Key) -> bool:
    """Whether the quarantine row ``kept`` no longer stops its key."""
    return kept.entity_id.endswith(_RELEASED)


def released_key(kept: Key) -> Key:
    """Return the key under which ``kept`` stays after its release."""
    return kept._replace(entity_id=kept.entity_id + _RELEASED)


def _as_text(piece: bytes) -> tuple[str, str]:
    if len(piece) <= _TEXT_BYTES:
        try:
            return piece.decode(), ""
        except UnicodeDecodeError:
            pass
    return "", base64.b64encode(piece).decode()
