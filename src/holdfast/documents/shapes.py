"""The documents' plain values and our rows: one value for each entity there, one row for each thing here.

======== ================================= ==========================================
domain   the documents' value              rows
======== ================================= ==========================================
signal   an object, or null                one ``Signal``
schedule an object, or null                one ``ScheduledSignal``
partial  an object: signal id to levels    one ``PartialLevels``
risk     a list of pairs ``[key, object]`` one ``RiskPosition`` for each pair
======== ================================= ==========================================

Null, an empty object, an empty list and an absent value all mean nothing.
"""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgspec

from ..contract import Key
from ..domains import from_mapping, require_plain, risk_slot_key, to_mapping
from ..errors import CorruptedError, InvalidInputError
from ..names import quote, unquote
from ..rows import Levels, RiskPosition, Row

DOCUMENT_DOMAINS = ("signal", "schedule", "risk", "partial")
"""The domains that the documents have, and that a user's class may hold."""

_NOT_PLAIN = (
    bytes,
    bytearray,
    memoryview,
    decimal.Decimal,
    uuid.UUID,
    datetime.datetime,
    datetime.date,
    datetime.time,
    datetime.timedelta,
)
"""What msgspec would turn into text in silence."""


def document_id(key: Key) -> str:
    """Return the id under which the documents keep the entity of ``key``."""
    return "positions" if key.domain == "risk" else key.entity_id


def empty_value(domain: str) -> Any:
    """Return the documents' value for nothing."""
    return {"risk": [], "partial": {}}.get(domain)


def value_of(domain: str, rows: Iterable[Row]) -> Any:
    """Return the documents' plain value for the rows of one entity."""
    if domain == "risk":
        return [[pair_name(row), _listed(row)] for row in in_list_order(cast("Iterable[RiskPosition]", rows))]
    for row in rows:
        plain = to_mapping(row)
        return {name: _with_lists(item) for name, item in plain["levels"].items()} if domain == "partial" else plain
    return empty_value(domain)


def row_of(key: Key, value: Any) -> Row | None:
    """Build the row of ``key`` (not of the risk domain) from the documents' value, or from a row.

    What the documents may leave out is filled in: ``note``, ``pendingAt``, ``_isScheduled``, and the names that the
    key tells.

    Raises:
        InvalidInputError: It has the wrong shape; the message names the member.
    """
    if isinstance(value, Row):
        value = plain_mapping(value)
        value = value.get("levels", value) if key.domain == "partial" else value
    if value is None or (key.domain == "partial" and value == {}):
        return None
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"{key.domain} takes a row, a mapping or None, not {type(value).__name__}")
    if key.domain == "partial":
        return _checked("partial", {"levels": {name: _with_lists(item) for name, item in value.items()}})
    return _checked(key.domain, _filled(key, value))


def _with_lists(levels: Any) -> Any:
    plain = plain_mapping(levels) if isinstance(levels, Levels) else levels
    if not isinstance(plain, Mapping):
        return plain
    return {name: list(item) if isinstance(item, tuple) else item for name, item in plain.items()}


def plain_mapping(row: msgspec.Struct) -> dict[str, Any]:
    """Return a row's members under the documents' names, wrong values as they are, so that they can be refused."""
    try:
        plain = cast("dict[str, Any]", msgspec.to_builtins(row, builtin_types=_NOT_PLAIN))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"this {type(row).__name__} cannot be stored: {error}") from error
    extra = plain.pop("extra", None)
    return {**plain, **extra} if isinstance(extra, dict) else plain


def _checked(domain: str, plain: Mapping[str, Any]) -> Row:
    for name, value in plain.items():  # Struct and convert() would let a Decimal or 2**70 pass
        require_plain(value, f"{domain}.{name}")
    return from_mapping(domain, plain)


def _filled(key: Key, value: Mapping[str, Any]) -> dict[str, Any]:
    plain = dict(value)
    for name, text in zip(("symbol", "strategyName", "exchangeName"), _parts(key), strict=False):
        if text is not None and plain.get(name) is None:
            plain[name] = text
        elif text is not None and name == "exchangeName" and plain[name] == "":
            plain[name] = text  # the documents leave it empty; the key knows better
    if plain.get("exchangeName") is None:
        plain["exchangeName"] = ""
    if plain.get("note", "") is None:
        del plain["note"]
    if plain.get("scheduledAt") is not None and plain.get("pendingAt") is None:
        plain["pendingAt"] = plain["scheduledAt"]
    if plain.get("pendingAt") is not None and plain.get("scheduledAt") is None:
        plain["scheduledAt"] = plain["pendingAt"]
    return plain


def _parts(key: Key) -> list[str | None]:
    if "~" in key.entity_name:
        return [cast("str | None", unquote(key.entity_id))]
    return [cast("str | None", unquote(part)) for part in key.entity_name.split("_")]


def in_list_order(rows: Iterable[RiskPosition]) -> list[RiskPosition]:
    """Sort positions as the documents' list has them; those never listed by the time they were opened."""
    return sorted(rows, key=lambda row: (row.rank, row.open_timestamp, row.strategy_name, row.symbol))


def pair_name(row: Row) -> str:
    """Return the first half of the documents' pair: ``strategyName:symbol``."""
    position = cast("RiskPosition", row)
    return f"{position.strategy_name}:{position.symbol}"


def _listed(row: Row) -> dict[str, Any]:
    plain = to_mapping(row)
    del plain["rank"]
    return plain


def positions_of(risk_entity: str, value: Any) -> dict[Key, RiskPosition]:
    """Build the rows of a profile from the documents' list of pairs.

    Args:
        risk_entity: The profile's quoted name.
        value: Pairs ``(key, position)``; the position a row or a mapping.

    Raises:
        InvalidInputError: It is not such a list, or two pairs are the same position.
    """
    if value is None:
        return {}
    if isinstance(value, Mapping | str | bytes) or not isinstance(value, Iterable):
        raise InvalidInputError(f"risk takes a list of (key, position) pairs, not {type(value).__name__}")
    rows: dict[Key, RiskPosition] = {}
    for rank, pair in enumerate(value):
        key, row = position_of(risk_entity, pair, rank)
        if key in rows:
            raise InvalidInputError(f"the position {pair_name(row)!r} is in the list twice: leave one out")
        rows[key] = row
    return rows


def position_of(risk_entity: str, pair: Any, rank: int) -> tuple[Key, RiskPosition]:
    """Build one row from one of the documents' pairs; ``rank`` is its place in the list."""
    if isinstance(pair, str | bytes | Mapping) or not isinstance(pair, Iterable) or len(pair := list(pair)) != 2:
        raise InvalidInputError(f"item {rank} of the risk list is not a pair (key, position)")
    name, position = pair
    if isinstance(position, RiskPosition):
        plain = plain_mapping(position)
    elif isinstance(position, Mapping):
        plain = dict(position)
    else:
        raise InvalidInputError(f"item {rank} of the risk list: the position is a {type(position).__name__}")
    strategy = plain.get("strategyName")
    if not isinstance(name, str) or not isinstance(strategy, str) or not name.startswith(f"{strategy}:"):
        raise InvalidInputError(
            f"item {rank} of the risk list: the key {name!r:.80} must be 'strategyName:symbol' with the position's "
            f"own strategyName ({strategy!r:.80})"
        )
    # The row's own strategy name tells where it ends: both halves may hold a colon.
    symbol = name[len(strategy) + 1 :]
    if plain.setdefault("symbol", symbol) != symbol:
        raise InvalidInputError(f"item {rank} of the risk list: key {name!r:.80} and symbol disagree")
    plain.setdefault("exchangeName", "")
    plain["rank"] = rank
    row = cast("RiskPosition", _checked("risk", plain))
    return risk_slot_key(risk_entity, row.symbol, row.strategy_name, row.exchange_name or None), row


def damaged_position_key(risk_entity: str, pair: Any, rank: int) -> Key:
    """Return a key by which a pair that is not one can be reported."""
    name = pair[0] if isinstance(pair, list | tuple) and pair and isinstance(pair[0], str) and pair[0] else f"#{rank}"
    return Key("risk", risk_entity, "damaged." + quote(name))


def trusted_row(key: Key, value: Any) -> Row | None:
    """As :func:`row_of`, for a value that was stored.

    Raises:
        CorruptedError: It has the wrong shape.
    """
    try:
        return row_of(key, value)
    except InvalidInputError as error:
        raise CorruptedError(f"{key}: wrong shape: {error}", key=key) from error
