"""Any exchange of the ``ccxt`` package as an exchange of ours. An extra: ``pip install 'holdfast[ccxt]'``."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import HoldfastError, InvalidInputError, UnavailableError
from ..rules.candles import INTERVALS_MS, Candle
from ..rules.contracts import written

_MAX_PAGES = 100
# Recognised by name along the class's ancestors, so that this module never imports the driver itself.
_CALLER_ERRORS = frozenset(("BadSymbol", "BadRequest", "ArgumentsRequired", "NotSupported", "AuthenticationError"))


class CcxtExchange:
    """Adapts an exchange object of ``ccxt.async_support``.

    Args:
        client: The exchange, set up as you need it; it stays yours, and :meth:`close` closes it.
        now: Seconds since the epoch; tells which candle is still forming.

    Example::

        exchange = CcxtExchange.named("binance", enableRateLimit=True)
        add_exchange(exchange_name="binance", get_candles=exchange.get_candles,
                     format_price=exchange.format_price, format_quantity=exchange.format_quantity)
    """

    def __init__(self, client: Any, *, now: Callable[[], float] = time.time) -> None:
        self.client = client
        self._now = now
        self._loading: asyncio.Lock | None = None
        self._loaded = False

    @classmethod
    def named(cls, exchange_id: str, **options: Any) -> CcxtExchange:
        """Make the exchange that ccxt calls ``exchange_id``, with ccxt's own options.

        Raises:
            InvalidInputError: ccxt is not installed, or knows no such exchange.
        """
        try:
            module = importlib.import_module("ccxt.async_support")
        except ImportError as error:
            raise InvalidInputError("this exchange needs ccxt: pip install 'holdfast[ccxt]'") from error
        kind = getattr(module, exchange_id, None)
        if not isinstance(kind, type) or exchange_id not in getattr(module, "exchanges", ()):
            raise InvalidInputError(f"ccxt knows no exchange {exchange_id!r:.60}: see ccxt.exchanges")
        return cls(kind(options))

    async def get_candles(self, symbol: str, interval: str, since_ms: int, limit: int) -> Sequence[Candle]:
        """As :class:`~holdfast.market.protocol.Exchange`; asks page after page, leaves the forming candle out.

        Raises:
            InvalidInputError: The exchange knows no such symbol or interval.
            UnavailableError: The exchange cannot be reached, or failed; try again.
        """
        interval_ms = INTERVALS_MS.get(interval)
        if interval_ms is None:
            raise InvalidInputError(f"unknown interval {interval!r:.40}: choose one of {', '.join(INTERVALS_MS)}")
        await self._load()
        out: list[Candle] = []
        from_ms = since_ms
        for _ in range(_MAX_PAGES):
            page = await self._call(self.client.fetch_ohlcv, symbol, interval, from_ms, limit - len(out))
            newest_ms = from_ms - 1
            for row in page:
                opens_ms = int(row[0])
                # Pages overlap on some exchanges, and some ignore `since`.
                if opens_ms < from_ms or opens_ms <= newest_ms:
                    continue
                newest_ms = opens_ms
                if opens_ms + interval_ms > self._now() * 1000 or len(out) >= limit:
                    return out[:limit]
                if None not in row[1:5]:
                    opened, high, low, closed = map(float, row[1:5])
                    out.append(Candle(opens_ms, opened, high, low, closed, float(row[5] or 0.0)))
            if newest_ms < from_ms or len(out) >= limit:
                break
            from_ms = newest_ms + 1
        return out

    def format_price(self, symbol: str, price: float) -> str:
        """Return the price in the exchange's own precision. Needs one ``get_candles`` before."""
        return str(self.client.price_to_precision(symbol, price))

    def format_quantity(self, symbol: str, quantity: float) -> str:
        """Return the quantity cut to what the exchange can trade; of contracts too in units of the base currency.

        Needs one ``get_candles`` before.
        """
        return written(self.client, symbol, quantity)

    async def close(self) -> None:
        """Close the client's connections."""
        await self._call(self.client.close)

    async def _load(self) -> None:
        if self._loading is None:
            self._loading = asyncio.Lock()
        async with self._loading:
            if not self._loaded:
                await self._call(self.client.load_markets)
                self._loaded = True

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return await function(*arguments)
        except HoldfastError:
            raise
        except Exception as error:
            names = {kind.__name__ for kind in type(error).__mro__}
            said = f"{type(error).__name__}: {error!s:.200}"
            if names & _CALLER_ERRORS:
                raise InvalidInputError(f"the exchange refused the request: {said}") from error
            raise UnavailableError(f"the exchange cannot be asked now: {said}") from error
