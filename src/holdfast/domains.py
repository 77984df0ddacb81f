"""The table of domains, the key of each row, and how a row becomes bytes and a row again.

A stored payload is the row's own JSON object, field names as in the documents
(camelCase), with two more members at its end::

    {"id":"…","priceOpen":43000.0,…,"_schema":1,"_sum":"9a3c01ff"}

so that ``cat``, ``jq .priceOpen`` or ``row->>'priceOpen'`` read it. ``_sum`` is
the CRC-32 of the key and of every byte before ``,"_sum"``: a torn, flipped,
truncated, emptied or swapped record is found at read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, NamedTuple, cast
from zlib import crc32

import msgspec
from msgspec import UNSET

from .contract import MAX_PAYLOAD_BYTES, Key
from .errors import CorruptedError, InvalidInputError, LockedError, NewerFormatError
from .names import Context, entity_name, quote
from .rows import (
    Account,
    Audit,
    Decision,
    Entity,
    Event,
    GapPlan,
    Guard,
    Intent,
    Order,
    Outage,
    Owner,
    PartialLevels,
    Quarantined,
    RiskPosition,
    Row,
    ScheduledSignal,
    SessionRow,
    Signal,
    Span,
    Trade,
    Worker,
)


class Domain(NamedTuple):
    """One kind of row: its type, its schema number and the steps up from older schemas."""

    name: str
    row: type[Row]
    schema: int = 1
    steps: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
    """``steps[n]`` turns a row of schema ``n`` into one of schema ``n + 1``."""


DOMAINS: dict[str, Domain] = {
    domain.name: domain
    for domain in (
        Domain("signal", Signal),
        Domain("schedule", ScheduledSignal),
        Domain("risk", RiskPosition),
        Domain("partial", PartialLevels),
        Domain("guard", Guard),
        Domain("session", SessionRow),
        Domain("owner", Owner),
        Domain("worker", Worker),
        Domain("outage", Outage),
        Domain("order", Order),
        Domain("account", Account),
        Domain("outbox", Event),
        Domain("ledger", Trade),
        Domain("plan", GapPlan),
        Domain("decision", Decision),
        Domain("audit", Audit),
        Domain("entity", Entity),
        Domain("intent", Intent),
        Domain("span", Span),
        Domain("quarantine", Quarantined),
    )
}


def context_key(domain: str, context: Context) -> Key:
    """Return the key of a context's one row in ``domain`` (signal, schedule, partial, session, owner)."""
    name = entity_name(context.symbol, context.strategy_name, context.exchange_name)
    entity_id = "levels" if domain == "partial" else domain if domain in ("session", "owner") else quote(context.symbol)
    return Key(domain, name, entity_id)


def risk_key(risk_name: str, context: Context) -> Key:
    """Return the key of the slot that ``context`` holds in the profile ``risk_name``."""
    entity = quote(risk_name, keep_underscore=True)
    return risk_slot_key(entity, context.symbol, context.strategy_name, context.exchange_name)


def risk_slot_key(risk_entity: str, symbol: str, strategy_name: str, exchange_name: str | None) -> Key:
    """Return the key of a slot in the profile whose quoted name is ``risk_entity``; the documents know no exchange."""
    return Key("risk", risk_entity, entity_name(symbol, strategy_name, exchange_name))


def guard_key(risk_name: str) -> Key:
    """Return the key of the guard row of ``risk_name``."""
    return Key("guard", quote(risk_name, keep_underscore=True), "guard")


def event_key(context: Context, number: int) -> Key:
    """Return the key of a context's event; byte order is the order of the numbers."""
    return Key("outbox", entity_name(context.symbol, context.strategy_name, context.exchange_name), f"{number:012d}")


def plan_key(domain: str, context: Context, number: int) -> Key:
    """Return the key of a recovery plan, or of the ``decision`` about it: named by the first event that it foresees."""
    return Key(domain, entity_name(context.symbol, context.strategy_name, context.exchange_name), f"{number:012d}")


def ledger_key(context: Context, signal_id: str) -> Key:
    """Return the key of a closed trade."""
    name = entity_name(context.symbol, context.strategy_name, context.exchange_name)
    return Key("ledger", name, quote(signal_id, keep_underscore=True))


def order_key(context: Context, client_order_id: str) -> Key:
    """Return the key of an order."""
    return Key("order", entity_name(context.symbol, context.strategy_name, context.exchange_name), client_order_id)


def account_key(fingerprint: str) -> Key:
    """Return the key of a venue account's record."""
    return Key("account", quote(fingerprint, keep_underscore=True), "account")


def worker_key(holder: str) -> Key:
    """Return the key of a worker's sign of life."""
    return Key("worker", holder, "beat")


def quarantine_key(key: Key, version: int) -> Key:
    """Return where the bytes that ``key`` had at ``version`` are kept when they cannot be trusted."""
    return Key("quarantine", f"{key.domain}_{key.entity_name}", f"{key.entity_id}.{version}")


class _Codec(NamedTuple):
    row: type[Row]
    decode: Callable[[bytes], Row]
    floats: Callable[[Row], tuple[float, ...]]
    known: frozenset[str]
    suffix: bytes
    require_storable: Callable[[Any], None] | None
    """Looks into members that no field of a plain type covers, where the row has some."""


def _floats_of(row: type[Row]) -> Callable[[Row], tuple[float, ...]]:
    names = [f.name for f in msgspec.structs.fields(row) if f.type is float]
    if not names:
        return lambda _: ()
    if len(names) == 1:
        one = operator.attrgetter(names[0])
        return lambda r: (one(r),)
    return cast("Callable[[Row], tuple[float, ...]]", operator.attrgetter(*names))


_MAX_DEPTH = 100
_TAIL = len(',"_sum":"01234567"}')


def _checksum(key: Key, text: bytes) -> int:
    domain, entity, entity_id = key
    return crc32(text, crc32(f"{domain}/{entity}/{entity_id}\n".encode()))


def require_plain(value: Any, path: str = "value", depth: int = 0) -> None:
    """Refuse what JSON would not give back exactly as it was.

    Allowed: None, bool, int of 64 bits, finite float, text, list, and dict with text keys, nested at most
    100 deep.

    Raises:
        InvalidInputError: Names the path, the value and the remedy.
    """
    if depth > _MAX_DEPTH:
        raise InvalidInputError(f"{path[:80]} is nested more than {_MAX_DEPTH} deep: flatten it")
    match value:
        case None | bool():
            return
        case str():
            if not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    raise InvalidInputError(f"{path} holds a lone surrogate: use valid Unicode text") from error
        case int():
            if not -(2**63) <= value < 2**64:
                raise InvalidInputError(f"{path} is {value!r:.40}, over 64 bits: store it as text")
        case float():
            if not isfinite(value):
                raise InvalidInputError(f"{path} is {value!r}: a stored number must be finite")
        case list():
            for at, item in enumerate(value):
                require_plain(item, f"{path}[{at}]", depth + 1)
        case dict():
            for name, item in value.items():
                if not isinstance(name, str):
                    raise InvalidInputError(f"{path} has the key {name!r:.40}: keys must be text")
                require_plain(name, f"{path} key", depth)
                require_plain(item, f"{path}.{name}", depth + 1)
        case _:
            raise InvalidInputError(
                f"{path} is a {type(value).__name__}, which JSON cannot give back as it was: "
                "convert it to text, a number, a list or a dict first"
            )


def to_mapping(row: Row) -> dict[str, Any]:
    """Return the row as a plain mapping with the documents' camelCase names, unknown members included."""
    plain: dict[str, Any] = msgspec.to_builtins(row)
    extra = plain.pop("extra", None)
    if extra:
        plain.update(extra)
    return plain


def from_mapping(domain: str, plain: Mapping[str, Any]) -> Row:
    """Build a row from a plain mapping with camelCase names; unknown members go into ``extra``.

    Raises:
        InvalidInputError: A member is missing or of the wrong type; the message names it.
    """
    codec, spec = _CODECS[domain], DOMAINS[domain]
    known = {name: value for name, value in plain.items() if name in codec.known and name != "extra"}
    extra = {name: value for name, value in plain.items() if name not in known}
    if extra:
        known["extra"] = extra
    try:
        row = msgspec.convert(known, spec.row)
    except msgspec.ValidationError as error:
        raise InvalidInputError(f"not a {domain} row: {error}") from error
    return row


def _require_entity(row: Entity) -> None:
    require_plain(row.value)


def _require_event(row: Event) -> None:
    require_plain([row.price_close, row.pnl_percent, *_CODECS["signal"].floats(row.signal)], "event")


def _require_order(row: Order) -> None:
    require_plain([row.price, row.reference_price, row.average_price], "order")


_REQUIRE_STORABLE: dict[type[Row], Callable[[Any], None]] = {
    Entity: _require_entity,
    Event: _require_event,
    Order: _require_order,
}


def _require_audit(row: Audit) -> None:
    require_plain([row.before, row.after], "audit")


def _require_plan(row: GapPlan) -> None:
    require_plain([one.price for one in row.events], "plan")


_REQUIRE_STORABLE |= {Audit: _require_audit, GapPlan: _require_plan}


def _codec(domain: Domain) -> _Codec:
    return _Codec(
        domain.row,
        msgspec.json.Decoder(domain.row).decode,
        _floats_of(domain.row),
        frozenset(f.encode_name for f in msgspec.structs.fields(domain.row)),
        b',"_schema":%d' % domain.schema,
        _REQUIRE_STORABLE.get(domain.row),
    )


_CODECS: dict[str, _Codec] = {name: _codec(domain) for name, domain in DOMAINS.items()}
_encode = msgspec.json.Encoder().encode


def encode(key: Key, row: Row) -> bytes:
    """Turn a row into its payload for ``key``.

    Raises:
        InvalidInputError: A number is not finite, a value is not plain JSON, or the payload is over 8 MiB.
    """
    row_type, _, floats, known, suffix, require_storable = _CODECS[key[0]]
    if type(row) is not row_type and not isinstance(row, row_type):
        raise InvalidInputError(f"{key} takes a {row_type.__name__}, not a {type(row).__name__}")
    try:
        finite = isfinite(sum(floats(row)))
    except TypeError:
        finite = False
    if not finite:  # or their sum is not, which is no fault
        _require_floats(key.domain, row)
    try:
        if row.extra is UNSET:
            if require_storable is not None:
                require_storable(row)
            body = _encode(row)
        else:
            clash = sorted(name for name in row.extra if name in known or name in ("_schema", "_sum"))
            if clash:
                raise InvalidInputError(f"{key.domain} rows use the name {clash[0]!r}: rename the member")
            require_plain(row.extra, f"{key.domain}.extra")
            body = _encode(to_mapping(row))
    except (OverflowError, UnicodeEncodeError, RecursionError, TypeError) as error:
        raise InvalidInputError(f"the row for {key} cannot be stored: {error}") from error
    text = body[:-1] + suffix
    if len(text) > MAX_PAYLOAD_BYTES - _TAIL:
        raise InvalidInputError(
            f"the row for {key} has {len(text) + _TAIL} bytes; at most {MAX_PAYLOAD_BYTES} can be stored: split it"
        )
    return b'%b,"_sum":"%08x"}' % (text, _checksum(key, text))


def _require_floats(domain: str, row: Row) -> None:
    for field in msgspec.structs.fields(row):
        if field.type is float:
            value = getattr(row, field.name)
            if not isinstance(value, int | float):
                raise InvalidInputError(f"{domain}.{field.name} is a {type(value).__name__}: give a float")
            require_plain(value, f"{domain}.{field.name}")


def decode(key: Key, payload: bytes) -> Row:
    """Turn a payload back into its row, checking checksum, schema and shape.

    Raises:
        CorruptedError: It is damaged, belongs to another key, is of a newer schema or of the wrong shape.
    """
    text = payload[:-_TAIL]
    if payload[-_TAIL:] != b',"_sum":"%08x"}' % _checksum(key, text):
        if payload.startswith(b'{"_encrypted":'):
            raise LockedError(f"{key}: encrypted: name the store as encrypted+URL, and give its keys", key=key)
        if payload[-_TAIL:][:9] != b',"_sum":"' or payload[-2:] != b'"}':
            raise CorruptedError(f"{key}: not a Holdfast record (no checksum at its end)", key=key)
        raise CorruptedError(f"{key}: the checksum does not match: damaged, or another key's record", key=key)
    codec = _CODECS.get(key[0])
    if codec is None:
        raise NewerFormatError(f"{key}: unknown domain {key.domain!r}: written by a newer version?", key=key)
    if text.endswith(codec.suffix):
        try:
            return codec.decode(text[: -len(codec.suffix)] + b"}")
        except msgspec.ValidationError:
            pass  # members of another version, or a wrong shape: the slow path tells which
    return _decode_slowly(key, text)


def _decode_slowly(key: Key, text: bytes) -> Row:
    spec = DOMAINS[key.domain]
    try:
        plain = msgspec.json.decode(text + b"}")
        schema = plain.pop("_schema")
    except (msgspec.DecodeError, AttributeError, KeyError) as error:
        raise CorruptedError(f"{key}: not a Holdfast record: {error}", key=key) from error
    if not isinstance(schema, int) or schema < 1:
        raise CorruptedError(f"{key}: the schema number is {schema!r:.40}", key=key)
    if schema > spec.schema:
        raise NewerFormatError(
            f"{key}: schema {schema} is newer than {spec.schema}, the newest this version reads: upgrade holdfast",
            key=key,
        )
    try:
        for number in range(schema, spec.schema):
            plain = spec.steps[number](plain)
        return from_mapping(key.domain, plain)
    except (LookupError, TypeError, ValueError) as error:
        raise CorruptedError(f"{key}: wrong shape: {error}", key=key) from error
