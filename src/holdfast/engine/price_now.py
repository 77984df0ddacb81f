"""The newest price of a symbol: that of its last few closed candles, as the rules see it."""

from __future__ import annotations

import asyncio

from ..errors import HoldfastError, UnavailableError
from ..market.clock import WallClock
from ..names import Context
from ..rules.candles import MINUTE_MS, Window, fetch_candles
from ..rules.params import get_config
from .lanes import Sleep
from .registry import ExchangeSpec


async def newest_price(exchange: ExchangeSpec, context: Context, *, sleep: Sleep = asyncio.sleep) -> tuple[float, int]:
    """Return the price, and the close time of the newest candle that makes it.

    Raises:
        UnavailableError: The exchange gives no candle of the last minutes.
    """
    params = get_config()
    wait_closed = exchange.wait_closed or WallClock().wait_closed
    try:
        newest_ms = await wait_closed(str(context), None)
    except HoldfastError:
        raise
    except Exception as error:
        raise UnavailableError(f"the market cannot tell when a candle closes: {error!r}") from error
    count = params.avg_price_candles_count
    candles = await fetch_candles(
        exchange.get_candles, context.symbol, "1m", since_ms=max(0, newest_ms - (count - 1) * MINUTE_MS), limit=count,
        until_ms=newest_ms + MINUTE_MS, params=params, sleep=sleep,
    )  # fmt: skip
    if not candles:
        raise UnavailableError(f"{context}: the exchange has no candle of the last {count} minutes: give --price")
    window = Window(count)
    for candle in candles:
        window.push(candle)
    return window.price(), candles[-1][0] + MINUTE_MS
