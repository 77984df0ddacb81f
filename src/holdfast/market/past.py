"""A market that has ended: recorded or generated candles, seen from their end. For looking back at what was missed."""

from __future__ import annotations

from collections.abc import Sequence

from ..rules.candles import Candle
from .history import History
from .protocol import MarketEnded


class PastMarket:
    """Every candle of a history has closed, up to a present that does not go on. An exchange.

    Args:
        history: The candles.
        present_ms: Open time of the newest closed minute.
    """

    def __init__(self, history: History, present_ms: int) -> None:
        self.history, self.present_ms = history, present_ms

    async def get_candles(self, symbol: str, interval: str, since_ms: int, limit: int) -> Sequence[Candle]:
        """As :class:`~holdfast.market.protocol.Exchange`."""
        return self.history.candles(symbol, interval, since_ms, limit, closed_ms=self.present_ms)

    async def wait_closed(self, participant: str, after_ms: int | None) -> int:
        """Return the present; raises MarketEnded where something newer is wanted."""
        if after_ms is not None and after_ms >= self.present_ms:
            raise MarketEnded("a market that has ended goes no further")
        return self.present_ms
