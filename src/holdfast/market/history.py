"""Candles of several symbols, served as of a moment: nothing that had not closed by then is ever shown."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from ..errors import InvalidInputError
from ..rules.candles import INTERVALS_MS, Candle
from .protocol import MINUTE_MS

MAX_LIMIT = 10_000
"""Most candles that one call of ``get_candles`` may ask for."""


def infer_interval(candles: Sequence[Candle], source: str = "the candles") -> str:
    """Return the interval of ``candles``: the smallest distance between two of them.

    Raises:
        InvalidInputError: There are fewer than two, or their times fit no known interval.
    """
    if len(candles) < 2:
        raise InvalidInputError(f"{source}: {len(candles)} candles do not tell their interval: give at least 2")
    step_ms = min(b.open_time_ms - a.open_time_ms for a, b in itertools.pairwise(candles))
    for name, interval_ms in INTERVALS_MS.items():
        if interval_ms == step_ms:
            odd = next((c.open_time_ms for c in candles if c.open_time_ms % interval_ms), None)
            if odd is not None:
                raise InvalidInputError(f"{source}: the time {odd} is not a multiple of {name}: align the candles")
            return name
    raise InvalidInputError(
        f"{source}: the candles are {step_ms} ms apart, which is none of {', '.join(INTERVALS_MS)}: use one of these"
    )


class History:
    """One-minute candles of some symbols, and what was given of longer intervals.

    Args:
        one_minute: The candles of each symbol, times ascending; minutes may be missing.
        longer: Candles of longer intervals by (symbol, interval), served as they are; intervals
            that are not here are made from the one-minute candles.

    Raises:
        InvalidInputError: There is no symbol, or a symbol has no candle.
    """

    def __init__(
        self,
        one_minute: Mapping[str, Sequence[Candle]],
        longer: Mapping[tuple[str, str], Sequence[Candle]] | None = None,
    ) -> None:
        if not one_minute:
            raise InvalidInputError("a market needs at least one symbol with one-minute candles")
        for symbol, candles in one_minute.items():
            if not candles:
                raise InvalidInputError(f"{symbol} has no candles: leave the symbol out, or give it some")
        self._series: dict[tuple[str, str], Sequence[Candle]] = {(s, "1m"): c for s, c in one_minute.items()}
        self._series.update(longer or {})
        self._times = {at: [c.open_time_ms for c in candles] for at, candles in self._series.items()}
        self.symbols = tuple(one_minute)
        self.first_ms = max(candles[0].open_time_ms for candles in one_minute.values())
        """Open time of the first minute from which every symbol has candles."""
        self.last_ms = min(candles[-1].open_time_ms for candles in one_minute.values())
        """Open time of the last minute to which every symbol has candles."""

    def candles(self, symbol: str, interval: str, since_ms: int, limit: int, *, closed_ms: int) -> list[Candle]:
        """Return at most ``limit`` candles that open at ``since_ms`` or later and have closed, oldest first.

        Args:
            closed_ms: Open time of the newest closed minute: nothing that ends later is returned.

        Raises:
            InvalidInputError: The symbol or interval is unknown, or the limit is not 1 to 10,000.
        """
        if symbol not in self.symbols:
            raise InvalidInputError(f"the market has no symbol {symbol!r:.80}: it has {', '.join(self.symbols)}")
        interval_ms = INTERVALS_MS.get(interval)
        if interval_ms is None:
            raise InvalidInputError(f"unknown interval {interval!r:.40}: choose one of {', '.join(INTERVALS_MS)}")
        if not 1 <= limit <= MAX_LIMIT:
            raise InvalidInputError(f"limit is {limit!r:.40}: ask for 1 to {MAX_LIMIT} candles")
        end_ms = closed_ms + MINUTE_MS
        series = self._series.get((symbol, interval))
        if series is None:
            return self._resampled(symbol, interval_ms, since_ms, limit, end_ms)
        times = self._times[symbol, interval]
        first = bisect_left(times, since_ms)
        return list(series[first : min(first + limit, bisect_left(times, end_ms - interval_ms + 1))])

    def _resampled(self, symbol: str, interval_ms: int, since_ms: int, limit: int, end_ms: int) -> list[Candle]:
        series, times = self._series[symbol, "1m"], self._times[symbol, "1m"]
        # A longer candle whose first minutes lie before the data would be a wrong one: begin after it.
        since_ms = max(since_ms, times[0])
        opens_ms = since_ms + -since_ms % interval_ms
        out: list[Candle] = []
        at = bisect_left(times, opens_ms)
        while at < len(times) and len(out) < limit:
            opens_ms = times[at] - times[at] % interval_ms
            if opens_ms + interval_ms > end_ms:
                break
            after = bisect_left(times, opens_ms + interval_ms, at)
            if after == len(times) and times[-1] + MINUTE_MS < opens_ms + interval_ms:
                break  # the data end inside it
            part = series[at:after]
            out.append(
                Candle(
                    opens_ms,
                    part[0].open,
                    max(c.high for c in part),
                    min(c.low for c in part),
                    part[-1].close,
                    math.fsum(c.volume for c in part),  # sum() rounds otherwise from Python 3.12 on
                )
            )
            at = after
        return out
