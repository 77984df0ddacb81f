"""What an exchange must offer, and what it may offer besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ..errors import HoldfastError
from ..rules.candles import Candle

MINUTE_MS = 60_000
"""One minute in milliseconds: the step of every market's clock."""


class MarketEnded(HoldfastError):
    """The market has no candle after the present one, and never will. End the run."""


@runtime_checkable
class Exchange(Protocol):
    """Where candles come from. Any object with these three works; nothing needs to be inherited."""

    async def get_candles(self, symbol: str, interval: str, since_ms: int, limit: int) -> Sequence[Candle]:
        """Return at most ``limit`` candles that open at ``since_ms`` or later, oldest first.

        Args:
            symbol: As the exchange writes it, such as ``BTCUSDT``.
            interval: One of :data:`holdfast.rules.candles.INTERVALS_MS`.
            since_ms: Epoch milliseconds.
            limit: At least 1.
        """
        ...

    def format_price(self, symbol: str, price: float) -> str:
        """Return ``price`` as the exchange writes prices of ``symbol``."""
        ...

    def format_quantity(self, symbol: str, quantity: float) -> str:
        """Return ``quantity`` as the exchange writes quantities of ``symbol``."""
        ...


@runtime_checkable
class WaitingExchange(Exchange, Protocol):
    """An exchange that tells by itself when a minute has closed."""

    async def wait_closed(self, participant: str, after_ms: int | None) -> int:
        """Wait until a minute newer than ``after_ms`` has closed, and return the newest closed one.

        By asking, the participant says that it is done with every minute up to
        ``after_ms``. A symbol may have no candle in the minute returned: thin
        markets have gaps.

        Args:
            participant: Who waits; one name for each context.
            after_ms: Open time of the newest minute already seen; None to return at once.

        Returns:
            The open time of the newest closed minute, epoch milliseconds.

        Raises:
            MarketEnded: There will be no newer one.
        """
        ...
