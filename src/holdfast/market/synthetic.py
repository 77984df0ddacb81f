"""A generated market. It is synthetic: nothing in it ever happened, and no strategy should be judged by it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from ..errors import InvalidInputError
from ..rules.candles import Candle
from .history import History
from .protocol import MINUTE_MS

DEFAULT_START_MS = 1_704_067_200_000
"""2024-01-01 00:00 UTC."""

_WELL_KNOWN = {"BTCUSDT": 43_000.0, "ETHUSDT": 2_300.0, "SOLUSDT": 100.0, "XRPUSDT": 0.62, "BNBUSDT": 310.0}
# Standard deviation of one minute's return, and how likely the regime ends at any minute.
_REGIMES = ((0.0004, 1 / 240), (0.0010, 1 / 120), (0.0025, 1 / 40))
_MISSING = 1 / 700
_JUMP = 1 / 400


class SyntheticMarket(History):
    """A random walk for each symbol, with calm and wild regimes, wicks, jumps and a few missing minutes.

    The same arguments give the same candles, bit for bit, on every Python version
    and machine: only ``random.Random(int).random()``, ``+ - * /`` and ``round`` are used. The
    first minute of a symbol is never missing, nor is the last.

    Args:
        seed: Any int.
        symbols: At least one, each once.
        start_ms: Open time of the first candle; a full minute, epoch milliseconds.
        minutes: How many minutes there are; 2 to 5,000,000.

    Raises:
        InvalidInputError: An argument is out of range.
    """

    def __init__(
        self,
        seed: int,
        symbols: Sequence[str] = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT"),
        start_ms: int = DEFAULT_START_MS,
        minutes: int = 7 * 1440,
    ) -> None:
        if not 2 <= minutes <= 5_000_000:
            raise InvalidInputError(f"a synthetic market of {minutes} minutes: choose 2 to 5000000")
        if start_ms < 0 or start_ms % MINUTE_MS:
            raise InvalidInputError(f"start_ms is {start_ms}: choose a full minute in epoch milliseconds")
        if len(set(symbols)) != len(symbols) or not all(symbols):
            raise InvalidInputError(f"the symbols {', '.join(symbols)!r:.80} must not be empty or repeated")
        self.seed = seed
        super().__init__({symbol: _walk(seed, symbol, start_ms, minutes) for symbol in symbols})


def _walk(seed: int, symbol: str, start_ms: int, minutes: int) -> list[Candle]:
    digest = hashlib.sha256(f"{seed}/{symbol}".encode()).digest()
    chance = random.Random(int.from_bytes(digest)).random
    price = _WELL_KNOWN.get(symbol) or round(0.5 + 200 * chance(), 2)
    digits = 2 if price >= 50 else 4
    # Pulled back towards where it began, so that a long market does not wander off to zero.
    anchor, regime, out = price, 0, []
    for minute in range(minutes):
        deviation, ends = _REGIMES[regime]
        if chance() < ends:
            regime = int(chance() * len(_REGIMES))
        # The sum of four uniforms is near enough to a normal; log and cos differ between machines.
        drift = (chance() + chance() + chance() + chance() - 2.0) * 1.7320508 * deviation
        if chance() < _JUMP:
            drift += (chance() - 0.5) * 16 * deviation
        drift += (anchor - price) / anchor * 0.0002
        opened, closed = round(price, digits), round(price * (1 + drift), digits)
        top, bottom = max(opened, closed), min(opened, closed)
        high = round(top * (1 + chance() * chance() * deviation * 1.6), digits)
        low = round(bottom * (1 - chance() * chance() * deviation * 1.6), digits)
        turnover = 2_000_000 * (0.2 + chance() + 400 * abs(drift)) / anchor
        missing = chance() < _MISSING and 0 < minute < minutes - 1
        if not missing:
            opens_ms = start_ms + minute * MINUTE_MS
            out.append(Candle(opens_ms, opened, max(high, top), min(low, bottom), closed, round(turnover, 4)))
        price = max(closed, anchor * 0.02)
    return out
