"""What a replay server and its clients say to each other: one JSON object a line.

A client numbers its requests; answers carry the number and may come in any order.
A dropped connection takes its waits with it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ..errors import InvalidInputError
from ..rules.candles import Candle

LONGEST_LINE_BYTES = 4 * 1024 * 1024


class Request(msgspec.Struct, omit_defaults=True):
    """One request. ``cancel`` names the request whose answer is no longer wanted."""

    id: int
    op: Literal["info", "candles", "wait", "leave", "cancel"]
    symbol: str = ""
    interval: str = ""
    since: int = 0
    limit: int = 0
    participant: str = ""
    after: int | None = None
    cancel: int = 0


class Info(msgspec.Struct, kw_only=True):
    """What a replay server serves."""

    symbols: list[str]
    start_ms: int
    """Open time of the minute that has just closed at the beginning."""
    end_ms: int
    """Open time of the last minute."""
    synthetic: bool
    mode: str
    """Such as ``speed 60`` or ``wait 4``."""


class Answer(msgspec.Struct, omit_defaults=True):
    """The answer to the request ``id``."""

    id: int
    candles: list[Candle] | None = None
    present: int | None = None
    info: Info | None = None
    error: Literal["", "input", "ended"] = ""
    message: str = ""


class Ready(msgspec.Struct):
    """The line that a server prints when it can be reached."""

    address: str
    info: Info


def split_address(address: str) -> tuple[str, int] | str:
    """Return (host, port) of ``tcp://host:port``, or the path of ``unix:/path``.

    Raises:
        InvalidInputError: It is neither.
    """
    if address.startswith("unix:") and len(address) > 5:
        return address[5:]
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidInputError(f"{address!r:.120} is no market address: write tcp://host:port or unix:/path")
    return host.strip("[]"), int(port)
