"""Reading what lies in quarantine: whose it is, and the row that its bytes still tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import msgspec

from ..contract import Key
from ..domains import context_key, decode, from_mapping
from ..errors import CorruptedError, InvalidInputError, NewerFormatError, NotFoundError
from ..names import Context, unquote
from ..quarantine import kept_bytes, stopped_key
from ..rows import Quarantined, Row, SessionRow, Signal
from ..store import Loaded, Store


async def context_of(store: Store, name: str) -> Context | None:
    """Return the context whose rows lie under the entity name ``name``; None where that cannot be told."""
    parts = [unquote(part) for part in name.split("_")] if "~" not in name else []
    if len(parts) == 3 and all(isinstance(part, str) for part in parts):
        symbol, strategy, exchange = parts
        context = Context(str(exchange), str(symbol), str(strategy))
        if context_key("session", context).entity_name == name:
            return context
    for loaded in (await store.scan("session", name)).values():
        row = cast("SessionRow", loaded.row)
        return Context(*row.context)
    return None


async def named(store: Store, text: str) -> Context:
    """Return the context that ``exchange/symbol/strategy`` names; a symbol may hold slashes of its own.

    Raises:
        InvalidInputError: It names none.
    """
    rows = [loaded.row for loaded in (await store.scan("session")).values()]
    known = {
        str(context): context for context in (Context(*row.context) for row in rows if isinstance(row, SessionRow))
    }
    if text in known:
        return known[text]
    exchange, _, rest = text.partition("/")
    symbol, _, strategy = rest.rpartition("/")
    if not (exchange and symbol and strategy):
        listed = f": the store has {', '.join(sorted(known)[:5])}" if known else ""
        raise InvalidInputError(f"{text!r:.80} names no context: write EXCHANGE/SYMBOL/STRATEGY{listed}")
    return Context(exchange, symbol, strategy)


def readable(key: Key, context: Context, held: Mapping[Key, Loaded[Quarantined]]) -> Row:
    """Return the row of ``key`` that lies in quarantine, as a row of ``context``.

    Its checksum and what it says of whom it belongs to are passed over: that is what an operator who adopts it vouches
    for.

    Raises:
        NotFoundError: Nothing of it is in quarantine.
        InvalidInputError: Its bytes are not a row.
    """
    groups: dict[str, list[tuple[Key, Quarantined]]] = {}
    for kept, loaded in held.items():
        if stopped_key(kept) == key:
            number = kept.entity_id.rpartition(".")[2].partition("-")[0]
            groups.setdefault(number, []).append((kept, loaded.row))
    if not groups:
        raise NotFoundError(f"{key}: nothing of it is in quarantine", key=key)
    newest = max(groups.items(), key=lambda item: int(item[0]) if item[0].isdigit() else -1)[1]
    pieces = sorted(newest, key=lambda pair: int(pair[0].entity_id.rpartition("-")[2]) if _is_piece(pair[0]) else 1)
    payload = kept_bytes([row for _, row in pieces])
    row = _decoded(key, payload)
    if isinstance(row, Signal):
        row = msgspec.structs.replace(
            row, exchange_name=context.exchange_name, symbol=context.symbol, strategy_name=context.strategy_name
        )
    elif isinstance(row, SessionRow):
        row = msgspec.structs.replace(row, context=(context.exchange_name, context.symbol, context.strategy_name))
    return row


def _is_piece(kept: Key) -> bool:
    return "-" in kept.entity_id.rpartition(".")[2]


def _decoded(key: Key, payload: bytes) -> Row:
    try:
        return decode(key, payload)
    except NewerFormatError as error:
        raise InvalidInputError(f"{key} is of a newer version, or encrypted: it cannot be adopted here") from error
    except CorruptedError:
        pass
    try:
        plain = msgspec.json.decode(payload)
        if not isinstance(plain, dict):
            raise InvalidInputError("it is no object")
        plain = {name: value for name, value in plain.items() if name not in ("_schema", "_sum")}
        return from_mapping(key.domain, plain)
    except (msgspec.DecodeError, InvalidInputError) as error:
        raise InvalidInputError(f"{key}: its bytes are no {key.domain} row ({error}): clear it") from error
