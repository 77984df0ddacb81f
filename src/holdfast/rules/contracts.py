"""How much of the base currency ccxt's amounts are: contracts are counted, everything else is measured.

Of a market of contracts ccxt takes and gives a number of contracts; everywhere here a quantity is in units of the base
currency. All of it is done in decimals: a float's rounding would cost one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from ..errors import InvalidInputError

ONE = Decimal(1)


def unit_of(market: Mapping[str, Any]) -> Decimal:
    """Return how much of the base currency one unit of ccxt's amounts is: the size of a contract, else 1.

    Raises:
        InvalidInputError: The market's contracts are not counted in the base currency, or ccxt does not know how
            large one is: it cannot be traded here.
    """
    if not market.get("contract"):
        return ONE
    named = f"market {market.get('symbol')!r:.60}"
    if market.get("inverse") or not market.get("linear"):
        raise InvalidInputError(
            f"{named} is no linear one: its contracts are not amounts of {market.get('base')!r:.20}, in which "
            "quantities are told here; use the market that is settled in its quote currency"
        )
    size = market.get("contractSize")
    if not isinstance(size, int | float) or not 0 < size < float("inf"):
        raise InvalidInputError(f"{named}: ccxt does not say how large a contract is, so no order can be made of it")
    return Decimal(repr(size))


def amount_of(quantity: float, unit: Decimal) -> float:
    """Return ccxt's amount for a quantity."""
    return quantity if unit == ONE else float(Decimal(repr(quantity)) / unit)


def quantity_in(amount: float | str, unit: Decimal) -> float:
    """Return the quantity that ccxt's amount is."""
    return float(Decimal(str(amount)) * unit)


def written(client: Any, symbol: str, quantity: float) -> str:
    """Return a quantity as the exchange can trade it, cut to its step; still in units of the base currency.

    Raises:
        InvalidInputError: As :func:`unit_of`.
    """
    unit = unit_of(client.market(symbol))
    text = str(client.amount_to_precision(symbol, amount_of(quantity, unit)))
    return text if unit == ONE else f"{(Decimal(text) * unit).normalize():f}"
