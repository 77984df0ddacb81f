"""Names: what a context is called, and how a name becomes part of a key so that different names never meet."""

from __future__ import annotations

import hashlib
import string
from functools import lru_cache
from typing import NamedTuple

import msgspec

from .errors import InvalidInputError


class Context(NamedTuple):
    """What one session of the engine runs: (exchange, symbol, strategy)."""

    exchange_name: str
    symbol: str
    strategy_name: str

    def __str__(self) -> str:
        return f"{self.exchange_name}/{self.symbol}/{self.strategy_name}"


_SAFE = frozenset((string.ascii_letters + string.digits + "-.").encode())
_MAX_QUOTED = 120
_MAX_JOINED = 200


def quote(name: str | int, *, keep_underscore: bool = False) -> str:
    """Quote one name so that different names never meet, on any medium.

    Bytes of its UTF-8 form outside ``A-Z a-z 0-9 - .`` become ``%XX``, as does a
    leading dot; nothing is normalised. An int becomes ``=1`` so that it differs
    from the text ``1``. A quoted form over 120 characters is cut and ends in
    ``~`` and the first 40 hex digits of the name's SHA-256.

    Args:
        name: Any text without lone surrogates, at least one character; or an int.
        keep_underscore: Leave ``_`` as it is (for a name that stands alone).

    Raises:
        InvalidInputError: The name is empty, not text, an int over 64 bits, or has a lone surrogate.
    """
    if type(name) is str and 0 < len(name) <= _MAX_QUOTED:
        return _quoted_once(name, keep_underscore)  # a bot has few names, and needs each at every commit
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise InvalidInputError(f"a name must be text or an int, not {type(name).__name__}: {name!r:.80}")
    if isinstance(name, int):
        if not -(2**63) <= name < 2**64:
            raise InvalidInputError("an int over 64 bits cannot be a name: use text")
        return f"={name}"
    if not name:
        raise InvalidInputError("a name must not be empty: give it at least one character")
    return _quoted(name, keep_underscore)


def _quoted(name: str, keep_underscore: bool) -> str:
    try:
        raw = name.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"the name {name!r:.80} holds a lone surrogate: use valid Unicode text") from error
    out = "".join(
        chr(byte) if (byte in _SAFE or (keep_underscore and byte == 0x5F)) and not (at == 0 and byte == 0x2E)
        else f"%{byte:02X}"
        for at, byte in enumerate(raw)
    )  # fmt: skip
    if len(out) > _MAX_QUOTED:
        out = out[: _MAX_QUOTED - 41] + "~" + hashlib.sha256(raw).hexdigest()[:40]
    return out


_quoted_once = lru_cache(4096)(_quoted)


def unquote(text: str) -> str | int | None:
    """Return the name that :func:`quote` was given, or None where it had to be cut."""
    if "~" in text:
        return None
    if text.startswith("="):
        return int(text[1:])
    raw, at = bytearray(), 0
    while at < len(text):
        if text[at] == "%":
            raw.append(int(text[at + 1 : at + 3], 16))
            at += 3
        else:
            raw.append(ord(text[at]))
            at += 1
    return raw.decode()


def entity_name(symbol: str, strategy_name: str, exchange_name: str | None = None) -> str:
    """Return the documents' ``symbol_strategy``, with ``_exchange`` where it is known.

    Underscores inside a part are quoted, so the parts can always be told apart. A
    joined name over 200 characters is cut and ends in ``~`` and a SHA-256.
    """
    if type(symbol) is str and type(strategy_name) is str and len(symbol) + len(strategy_name) <= _MAX_QUOTED:
        if exchange_name is None:
            return _joined_once(symbol, strategy_name)
        if type(exchange_name) is str and len(exchange_name) <= _MAX_QUOTED:
            return _joined_once(symbol, strategy_name, exchange_name)
    return _joined(symbol, strategy_name) if exchange_name is None else _joined(symbol, strategy_name, exchange_name)


def _joined(*parts: str) -> str:
    joined = "_".join(quote(part) for part in parts)
    if len(joined) <= _MAX_JOINED:
        return joined
    exact = msgspec.json.encode(parts)  # as a list, which a tuple of texts is too
    return joined[: _MAX_JOINED - 41] + "~" + hashlib.sha256(exact).hexdigest()[:40]


_joined_once = lru_cache(4096)(_joined)
