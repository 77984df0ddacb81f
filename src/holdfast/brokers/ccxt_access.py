"""The way to one of ccxt's exchanges: set up for a broker, asked only when it may be, its errors told as ours."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from ..cancellation import no_stray_cancellation
from ..errors import HoldfastError
from .ccxt_markets import Markets
from .ccxt_pause import Pause
from .ccxt_words import UNKNOWN_VENUE, VENUES, Venue, as_ours, meaning_of, only_json, what_was_said

_log = logging.getLogger("holdfast.ccxt")
_log.setLevel(logging.INFO)
_CLOCK_SECONDS = 3600.0
_FUTURES = frozenset(("future", "swap", "linear"))
_SECRETS = ("apiKey", "secret", "password", "token", "privateKey")


class Access:
    """What whoever asks an exchange shares: its markets, the clocks' difference, and until when it is left alone.

    Args:
        client: ccxt's exchange, which is set up here.
        symbols: As the strategies write them.
        now: Seconds since the epoch.
        elapsed: Seconds by a clock that never goes back.
    """

    def __init__(
        self, client: Any, symbols: Iterable[str], *, now: Callable[[], float], elapsed: Callable[[], float]
    ) -> None:
        self.client = client
        self.venue = venue_of(client)
        self.markets = Markets(client, symbols)
        self.now = now
        self._secrets = tuple(text for name in _SECRETS if (text := str(getattr(client, name, None) or "")))
        self._loading: asyncio.Lock | None = None
        self._loaded = False
        self._clock_until_s = 0.0  # until when the difference of the clocks is taken to hold
        client.options["warnOnFetchOpenOrdersWithoutSymbol"] = False  # or to ask for all is an error
        # ccxt would repeat a failed request by itself where the client is set so: what comes after a lost answer is
        # not its to decide. As a parameter of each request it goes to some venues as one of the order's.
        client.options["maxRetriesOnFailure"] = 0
        client.fetch = only_json(client.fetch)
        self._pause = Pause(client, elapsed)
        client.logger = _log  # ccxt's own tells the headers, where the key is, to whoever listens at DEBUG

    def has(self, ability: str) -> bool:
        """Whether ccxt can do it at this exchange; by ccxt's name of it."""
        return bool(self.client.has.get(ability))

    async def asked(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """Call the client for something that changes nothing."""
        self._pause.require_over()
        try:
            with no_stray_cancellation:
                return await function(*arguments)
        except Exception as error:
            raise self.raised(error, changing=False) from None

    def raised(self, error: Exception, *, changing: bool) -> HoldfastError:
        """Return the error of ours to raise, from None: the driver's own text may hold the signed request."""
        self._pause.note(error)
        if meaning_of(error) in ("late", "unsent"):
            self._clock_until_s = 0.0  # the clocks may have drifted apart
        return error if isinstance(error, HoldfastError) else as_ours(error, changing=changing, secrets=self._secrets)

    def said(self, error: Exception) -> str:
        """Return an error as one line without secrets."""
        return what_was_said(error, self._secrets)

    async def market(self, symbol: str) -> Mapping[str, Any]:
        """Return ccxt's market of a symbol."""
        await self.ready()
        return self.markets.named(symbol)

    async def ready(self) -> None:
        """Load the markets once, and the difference of the clocks each hour and after a doubt."""
        self._pause.require_over()
        if self._loading is None:
            self._loading = asyncio.Lock()
        async with self._loading:
            now_s = self.now()
            if not now_s < self._clock_until_s <= now_s + _CLOCK_SECONDS and self.venue.window_ms is not None:
                await self.asked(self.client.load_time_difference)
                self._clock_until_s = now_s + _CLOCK_SECONDS
            if not self._loaded:
                await self.asked(self.client.load_markets)
                self.markets.loaded()
                self._loaded = True


def is_spot(client: Any) -> bool:
    """Whether the client is set to a spot account."""
    return client.options.get("defaultType", "spot") in ("spot", "margin")


def venue_of(client: Any) -> Venue:
    """Return what is known of the client's exchange."""
    exchange = str(getattr(client, "id", ""))
    if exchange == "binance" and client.options.get("defaultType") in _FUTURES:
        exchange = "binanceusdm"
    return VENUES.get(exchange, UNKNOWN_VENUE)
