"""Candles: what the market tells, the price they make, and which batches are refused.

Only *closed* one-minute candles are ever stepped. A candle's *now* is its close
time: open time plus 60 000 ms.
"""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..cancellation import no_stray_cancellation
from ..errors import HoldfastError, InvalidInputError, UnavailableError
from .params import Params

MINUTE_MS = 60_000

INTERVALS_MS: dict[str, int] = {
    "1m": MINUTE_MS,
    "3m": 3 * MINUTE_MS,
    "5m": 5 * MINUTE_MS,
    "15m": 15 * MINUTE_MS,
    "30m": 30 * MINUTE_MS,
    "1h": 60 * MINUTE_MS,
    "2h": 120 * MINUTE_MS,
    "4h": 240 * MINUTE_MS,
    "6h": 360 * MINUTE_MS,
    "8h": 480 * MINUTE_MS,
    "12h": 720 * MINUTE_MS,
    "1d": 1440 * MINUTE_MS,
    "3d": 3 * 1440 * MINUTE_MS,
}
"""Length of each interval in milliseconds."""

STRATEGY_INTERVALS = ("1m", "3m", "5m", "15m", "30m", "1h")
"""The intervals at which a strategy can be asked."""

MAX_FETCH_CANDLES = 1000
"""The most candles that one request asks for."""

_log = logging.getLogger("holdfast")

GetCandles = Callable[[str, str, int, int], Awaitable[Sequence[Any]]]


class CandleError(InvalidInputError):
    """A batch of candles cannot be true; none of it was used. Ask the exchange again."""


class Candle(NamedTuple):
    """One candle: open time in epoch milliseconds, prices in quote currency, volume."""

    open_time_ms: int
    open: float
    high: float
    low: float
    close: float
    volume: float


def interval_ms(interval: str) -> int:
    """Return the length of ``interval`` in milliseconds.

    Raises:
        InvalidInputError: There is no such interval; the message lists those there are.
    """
    found = INTERVALS_MS.get(interval)
    if found is None:
        raise InvalidInputError(f"there is no interval {interval!r}: use one of {', '.join(INTERVALS_MS)}")
    return found


def average_price(candles: Iterable[Candle]) -> float:
    """Return the volume-weighted mean of (high + low + close) / 3; without any volume, the mean close.

    Raises:
        InvalidInputError: There are no candles, so there is no price.
    """
    weighted = total = closes = 0.0
    count = 0
    for _, _, high, low, close, volume in candles:
        weighted += (high + low + close) / 3.0 * volume
        total += volume
        closes += close
        count += 1
    if not count:
        raise InvalidInputError("a price needs at least one candle: fetch candles first")
    if total > 0.0:
        return weighted / total
    return closes / count


class Window:
    """The closed candles of the last few minutes, newest last, and the price they make.

    Bounded by time, not by number: a candle leaves when it opened ``size`` minutes or more before the
    newest one. So the price at a candle depends on the market alone, and a bot that was restarted in a
    thin market sees the price that an uninterrupted one sees. The price is summed afresh, never carried
    along: a running sum would differ in its last bits with where the run began.

    Args:
        size: How many minutes make a price (``Params.avg_price_candles_count``).
    """

    __slots__ = ("_candles", "_price", "_span_ms", "newest_ms", "previous_ms")

    def __init__(self, size: int) -> None:
        self._candles: deque[Candle] = deque()
        self._span_ms = size * MINUTE_MS
        self._price: float | None = None
        self.newest_ms: int | None = None
        """Open time of the newest candle."""
        self.previous_ms: int | None = None
        """Open time of the candle before it, however long ago."""

    def push(self, candle: Candle) -> None:
        """Add the next closed candle; one that is not newer than the newest is ignored."""
        opened_ms, newest_ms = candle[0], self.newest_ms
        candles = self._candles
        if newest_ms is not None:
            if opened_ms <= newest_ms:
                return
            self.previous_ms = newest_ms
            oldest_ms = opened_ms - self._span_ms
            while candles and candles[0][0] <= oldest_ms:
                candles.popleft()
        self.newest_ms = opened_ms
        candles.append(candle)
        self._price = None

    def price(self) -> float:
        """Return the VWAP of the window, computed once for each candle.

        Raises:
            InvalidInputError: No candle was pushed yet.
        """
        found = self._price
        if found is None:
            found = self._price = average_price(self._candles)
        return found

    @property
    def candles(self) -> tuple[Candle, ...]:
        """The candles that make the price, oldest first."""
        return tuple(self._candles)


def preload_from_ms(candle_open_ms: int, interval_ms: int, params: Params) -> int:
    """Return from which open time on candles must be pushed before the one at ``candle_open_ms`` is stepped.

    That covers the price window and the strategy's slot; with less, a restarted bot could see another
    price, or ask its strategy in the middle of a slot.
    """
    return candle_open_ms - max(params.avg_price_candles_count * MINUTE_MS, interval_ms)


def to_candle(value: Any) -> Candle:
    """Turn what an exchange gave into a :class:`Candle`.

    Args:
        value: A Candle; a sequence (open time ms, open, high, low, close, volume, …); or a mapping with
            those names, the time as ``open_time_ms`` or ``timestamp``.

    Raises:
        CandleError: It is none of these, or a member is not a number.
    """
    if type(value) is Candle:
        return value
    try:
        if isinstance(value, Mapping):
            time = value["open_time_ms"] if "open_time_ms" in value else value["timestamp"]
            value = (time, value["open"], value["high"], value["low"], value["close"], value["volume"])
        time, *rest = value[:6]
        first, high, low, close, volume = map(float, rest)
        return Candle(int(time), first, high, low, close, volume)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CandleError(
            f"not a candle: {value!r:.120}: need open time in ms, open, high, low, close, volume"
        ) from error


def check_candles(batch: Sequence[Candle], params: Params, known: Iterable[Candle] = ()) -> None:
    """Refuse a batch that cannot be true: better no candles than a stop hit by a typo.

    Args:
        known: The candles before the batch, as far as they are at hand. A live run fetches one candle at a time,
            and a price that is absurd throughout shows only beside others.

    Raises:
        CandleError: A number is not finite, a price is 0 or less or absurdly far below the others, a volume
            is negative, a high is below its low, or times are not ascending; the message names the candle.
    """
    if not batch:
        return
    before_ms = None
    for candle in batch:
        opened_ms, first, high, low, close, volume = candle
        # A sum is finite only if all its parts are (or they cancel out, which positive prices cannot).
        if not math.isfinite(first + high + low + close + volume):
            raise CandleError(f"the candle {candle} holds a number that is not finite")
        if first <= 0 or high <= 0 or low <= 0 or close <= 0:
            raise CandleError(f"the candle {candle} holds a price that is not above 0")
        if volume < 0:
            raise CandleError(f"the candle {candle} has a negative volume")
        if high < low:
            raise CandleError(f"the candle {candle} has its high below its low")
        if before_ms is not None and opened_ms <= before_ms:
            raise CandleError(f"the candle {candle} is not newer than the one before it ({before_ms})")
        before_ms = opened_ms
    least = _least_price((*known, *batch), params)
    for candle in batch:
        if min(candle[1:5]) < least:
            raise CandleError(f"the candle {candle} holds a price far under the others: {least:g} is the least")


def _least_price(candles: Sequence[Candle], params: Params) -> float:
    """Return below which price a candle cannot be true beside the others."""
    prices = [price for candle in candles for price in candle[1:5]]
    enough = len(candles) >= params.get_candles_min_candles_for_median
    reference = statistics.median(prices) if enough else sum(prices) / len(prices)
    return reference / params.get_candles_price_anomaly_threshold_factor


def sound_candles(batch: Iterable[Any], params: Params, known: Iterable[Candle] = ()) -> list[Candle]:
    """Return the candles of a batch that can be true, judged as :func:`check_candles` does; the rest is logged."""
    alone: list[Candle] = []
    for value in batch:
        try:
            candle = to_candle(value)
            check_candles([candle], params)
        except CandleError as error:
            _log.warning("left out, as if nothing had been traded: %s", error)
            continue
        if not alone or candle[0] > alone[-1][0]:
            alone.append(candle)
    least = _least_price((*known, *alone), params) if alone else 0.0
    for candle in alone:
        if min(candle[1:5]) < least:
            _log.warning("left out, as if nothing had been traded: %s is far under the others", candle)
    return [candle for candle in alone if min(candle[1:5]) >= least]


async def fetch_candles(
    get_candles: GetCandles,
    symbol: str,
    interval: str,
    *,
    since_ms: int,
    limit: int,
    until_ms: int | None = None,
    known: Iterable[Candle] = (),
    leave_out: bool = False,
    params: Params,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    on_candle_data: Callable[[str, str, int, int, Sequence[Candle]], object] | None = None,
) -> list[Candle]:
    """Ask an exchange for candles, again after a failure, and return those that can be trusted, oldest first.

    Args:
        since_ms: Open time from which on; older ones are dropped.
        limit: At most how many, 1 to 1000.
        until_ms: Drop candles that close after this moment: the forming one, or the future.
        known: Candles before these, for :func:`check_candles`.
        leave_out: Leave out what cannot be true, instead of refusing all for it.
        sleep: Takes seconds; a seam for tests.

    Raises:
        UnavailableError: Every attempt failed; the last reason is the cause.
    """
    length_ms = interval_ms(interval)
    attempts = max(1, params.get_candles_retry_count)
    for attempt in range(attempts):
        try:
            with no_stray_cancellation:
                got = await get_candles(symbol, interval, since_ms, limit)
            if leave_out:
                got = sound_candles(got, params, known)
            batch = [candle if type(candle) is Candle else to_candle(candle) for candle in got]
            if until_ms is not None:
                batch = [candle for candle in batch if candle[0] + length_ms <= until_ms]
            if batch and batch[0][0] < since_ms:
                batch = [candle for candle in batch if candle[0] >= since_ms]
            check_candles(batch, params, known)
            break
        except Exception as error:
            if isinstance(error, HoldfastError) and not isinstance(error, CandleError | UnavailableError):
                raise  # a wrong symbol or a market that has ended is not mended by asking again
            if attempt == attempts - 1:
                raise UnavailableError(f"no candles of {symbol} {interval} from {since_ms}: {error}") from error
            await sleep(params.get_candles_retry_delay_ms / 1000)
    batch = batch[:limit]
    if on_candle_data is not None:
        try:
            with no_stray_cancellation:
                on_candle_data(symbol, interval, since_ms, limit, batch)
        except Exception as error:  # an onlooker must not cost the bot its candles
            _log.error("on_candle_data raised %r for %s %s", error, symbol, interval, exc_info=error)
    return batch
