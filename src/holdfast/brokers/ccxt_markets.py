"""The markets of one of ccxt's exchanges: how we write each, and how much its amounts are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from ..errors import InvalidInputError
from ..rules.contracts import ONE, unit_of


def is_too_small(client: Any, market: Mapping[str, Any], amount: float) -> bool:
    """Whether an amount of ccxt's is below the market's step or its least amount."""
    least = ((market.get("limits") or {}).get("amount") or {}).get("min")
    try:
        written = float(client.amount_to_precision(market["symbol"], amount))
    except Exception as error:
        if "InvalidOrder" in {kind.__name__ for kind in type(error).__mro__}:
            return True  # ccxt's way to say that nothing is left of it
        raise
    return written <= 0 or (least is not None and written < float(least))


class Markets:
    """What a client knows of its markets, once they are loaded.

    Args:
        client: ccxt's exchange.
        symbols: As the strategies write them; reports that nobody asked for by symbol name them so.
    """

    def __init__(self, client: Any, symbols: Iterable[str]) -> None:
        self._client = client
        self._wanted = tuple(symbols)
        self._spelling: dict[str, str] = {}  # ccxt's name of a market: ours

    def loaded(self) -> None:
        """Take note that the client knows them now."""
        for symbol in self._wanted:
            self.named(symbol)

    def named(self, symbol: str) -> Mapping[str, Any]:
        """Return ccxt's market of a symbol, however that is written.

        Raises:
            InvalidInputError: There is none, or one whose quantities cannot be told in the base currency.
        """
        try:
            market: Mapping[str, Any] = self._client.market(symbol)
        except Exception as error:
            raise InvalidInputError(f"the exchange has no market {symbol!r:.60}: use its own name of it") from error
        unit_of(market)
        self._spelling.setdefault(str(market["symbol"]), symbol)
        return market

    def spelt(self, unified: str, otherwise: str | None = None) -> str:
        """Return how we write a market that ccxt calls ``unified``: as it was given to us, else as the exchange."""
        known = self._spelling.get(unified)
        if known is None:
            market = (self._client.markets or {}).get(unified)
            known = str(market["id"]) if market else otherwise or unified
        return known

    def unit(self, unified: str) -> Decimal:
        """Return how much of the base currency ccxt's 1 is; of a market that is not traded here, just 1."""
        try:
            return unit_of((self._client.markets or {}).get(unified) or {})
        except InvalidInputError:
            return ONE
