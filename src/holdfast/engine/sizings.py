"""Sizings by name: how they are added, and how a quantity is written as the exchange wants it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ..errors import HoldfastError, InvalidInputError
from ..rules.sizing import Quote, Sizing, SizingMethod, checked_sizing, position_size
from .specs import ExchangeSpec, checked_name

T = TypeVar("T")


class Sizings:
    """The part of the registry that holds sizings."""

    _sizings: dict[str, Sizing]

    def add_sizing(
        self,
        *,
        sizing_name: str,
        method: SizingMethod,
        risk_percentage: float | None = None,
        kelly_multiplier: float | None = None,
        atr_multiplier: float | None = None,
        max_position_percentage: float | None = None,
        min_position_size: float | None = None,
        max_position_size: float | None = None,
        note: str = "",
    ) -> Sizing:
        """Add a way to find how much to trade.

        Args:
            method: ``fixed-percentage``, ``kelly-criterion`` or ``atr-based``.
            risk_percentage: Percent of the balance to lose at the stop; needed for all but Kelly; over 0, at most 100.
            kelly_multiplier: What part of the Kelly fraction to stake; over 0, at most 1; 0.25 if left out.
            atr_multiplier: How many average true ranges away the stop is thought to be; over 0; 2 if left out.
            max_position_percentage: Most that a position may cost, as percent of the balance; applied first.
            min_position_size: Least quantity, base currency; applied second, and so may pass the first.
            max_position_size: Greatest quantity, base currency; applied last.

        Raises:
            InvalidInputError: The name is taken, or a parameter is missing, out of range or of another method; one
                message lists every failure.
        """
        given = {
            "risk_percentage": risk_percentage, "kelly_multiplier": kelly_multiplier, "atr_multiplier": atr_multiplier,
            "max_position_percentage": max_position_percentage, "min_position_size": min_position_size,
            "max_position_size": max_position_size,
        }  # fmt: skip
        sizing = checked_sizing(checked_name("sizing_name", sizing_name), method, given, note)
        add_once(self._sizings, "sizing", sizing.name, sizing)
        return sizing

    def sizing(self, name: str) -> Sizing:
        """Return the sizing called ``name``; raises InvalidInputError if there is none."""
        return find(self._sizings, "sizing", name)

    def list_sizings(self) -> list[Sizing]:
        """Return all sizings in the order in which they were added."""
        return list(self._sizings.values())


def sized_quantity(sizing: Sizing, quote: Quote, exchange: ExchangeSpec, symbol: str) -> float:
    """Return how much of ``symbol`` to trade, rounded as the exchange writes quantities; 0.0 means do not trade.

    Raises:
        InvalidInputError: The quote lacks what the method needs, or the exchange's ``format_quantity`` failed, gave
            no number, or gave another quantity than it was asked to write.
    """
    exact = position_size(sizing, quote)
    if exact == 0.0:
        return exact  # some exchanges refuse to write it
    try:
        text = exchange.format_quantity(symbol, exact)
        written = float(text)
    except HoldfastError:
        raise
    except Exception as error:
        raise InvalidInputError(
            f"exchange {exchange.exchange_name!r}: format_quantity({symbol!r}, {exact}) failed ({error!s:.80}): "
            "it must return a plain number as text"
        ) from error
    # NaN fails this too. Rounding to a whole lot may lose up to all of it, but never doubles it.
    if not 0.0 <= written <= 2 * exact:
        raise InvalidInputError(
            f"exchange {exchange.exchange_name!r}: format_quantity({symbol!r}, {exact}) gave {text!r:.40}: "
            "it must return the quantity as text, rounded"
        )
    return written


def add_once(table: dict[str, T], what: str, name: str, spec: T) -> None:
    """Add to a table of names; raises InvalidInputError if the name is taken."""
    if name in table:
        article = "an" if what[0] in "aeiou" else "a"
        raise InvalidInputError(f"there is {article} {what} {name!r} already: use another name")
    table[name] = spec


def find(table: Mapping[str, T], what: str, name: str) -> T:
    """Return what a table of names has under ``name``; raises InvalidInputError if there is nothing."""
    found = table.get(name)
    if found is None:
        known = ", ".join(map(repr, table)) or "none was added"
        raise InvalidInputError(f"there is no {what} {name!r}: add it first, or use one of: {known}")
    return found
