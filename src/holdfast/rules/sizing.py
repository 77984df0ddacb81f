"""Sizing: how much to trade, from the balance and the distance to the stop, the edge, or the market's range.

Plain functions of their arguments: no I/O, no clock, no chance. Percents are percent units (2 is 2 %), balances and
prices quote currency, quantities base currency.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, Literal, cast

import msgspec

from ..errors import InvalidInputError
from .candles import Candle, interval_ms

SizingMethod = Literal["fixed-percentage", "kelly-criterion", "atr-based"]
"""How a quantity is found: risk over distance to the stop; the edge; risk over so many average true ranges."""

DEFAULT_KELLY_MULTIPLIER = 0.25
DEFAULT_ATR_MULTIPLIER = 2.0
ATR_PERIOD = 14


class Sizing(msgspec.Struct, frozen=True, kw_only=True):
    """One way to find a quantity, and its bounds. Made by :func:`checked_sizing`, which fills in the defaults."""

    name: str
    method: SizingMethod
    risk_percentage: float | None = None
    """Percent of the balance that is lost if the stop is hit (for ``atr-based``: after so many ranges); over 0."""
    kelly_multiplier: float | None = None
    """What part of the Kelly fraction is staked; over 0, at most 1."""
    atr_multiplier: float | None = None
    """How many average true ranges away the stop is thought to be; over 0."""
    max_position_percentage: float | None = None
    """Most that a position may cost at entry, as percent of the balance; over 0. Above 100 borrows."""
    min_position_size: float | None = None
    """Least quantity; over 0. It is applied after ``max_position_percentage``, and so may pass it."""
    max_position_size: float | None = None
    """Greatest quantity; over 0. It has the last word."""
    note: str = ""


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """What a quantity is found from; a method needs its own members only, besides the first two."""

    account_balance: float
    """Quote currency; 0 or more. What is already in use is for the caller to take off."""
    price_open: float
    """Entry; over 0."""
    price_stop_loss: float | None = None
    """For ``fixed-percentage``: over 0, and not the entry."""
    win_rate: float | None = None
    """For ``kelly-criterion``: the part of all trades that won, between 0 and 1, neither included."""
    win_loss_ratio: float | None = None
    """For ``kelly-criterion``: the average win as a multiple of the average loss; over 0."""
    atr: float | None = None
    """For ``atr-based``: the average true range, quote currency; over 0 (:func:`average_true_range`)."""


_OWN: dict[str, dict[str, float | None]] = {
    # method: its own parameters, with what each is when it is left out (None: must be given)
    "fixed-percentage": {"risk_percentage": None},
    "kelly-criterion": {"kelly_multiplier": DEFAULT_KELLY_MULTIPLIER},
    "atr-based": {"risk_percentage": None, "atr_multiplier": DEFAULT_ATR_MULTIPLIER},
}
_NEEDS: dict[str, tuple[str, ...]] = {
    "fixed-percentage": ("price_stop_loss",),
    "kelly-criterion": ("win_rate", "win_loss_ratio"),
    "atr-based": ("atr",),
}
_MOST = {"risk_percentage": 100.0, "kelly_multiplier": 1.0}
_CAPS = ("max_position_percentage", "min_position_size", "max_position_size")


def checked_sizing(name: str, method: object, given: Mapping[str, object], note: str = "") -> Sizing:
    """Make a :class:`Sizing`, with the defaults of its method.

    Args:
        given: Parameters and caps by name; None counts as not given.

    Raises:
        InvalidInputError: One message that lists every failure.
    """
    if not isinstance(method, str) or method not in _OWN:
        raise InvalidInputError(f"sizing {name!r} has the method {method!r:.40}: use one of {', '.join(_OWN)}")
    own = _OWN[method]
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    failures = [
        f"{key} does not belong to {method}: leave it out" for key in values if key not in own and key not in _CAPS
    ]
    failures += [f"{key} is missing: give it" for key, value in own.items() if value is None and key not in values]
    values = {key: value for key, value in own.items() if value is not None} | values
    failures += [
        f"{key} is {value!r:.40}: must be a number over 0{f', at most {_MOST[key]:g}' if key in _MOST else ''}"
        for key, value in values.items()
        if not _is_above_zero(value) or value > _MOST.get(key, math.inf)
    ]
    least: Any = values.get("min_position_size")
    most: Any = values.get("max_position_size")
    if _is_above_zero(least) and _is_above_zero(most) and least > most:
        failures.append(f"min_position_size is {least}: must be at most max_position_size, {most}")
    if failures:
        raise InvalidInputError(f"sizing {name!r}: " + "; ".join(failures))
    numbers = {key: float(value) for key, value in values.items()}
    return Sizing(name=name, method=cast(SizingMethod, method), note=note, **numbers)


def position_size(sizing: Sizing, quote: Quote) -> float:
    """Return how much to trade, before the exchange's own rounding; 0.0 where there is nothing to stake.

    The caps follow in this order: percent of the account, then the least size, then the greatest. So the least size
    may pass the percent of the account, and turns a quantity of 0 (no edge) into an order: set it with care.

    Raises:
        InvalidInputError: A member that the method needs is missing or out of range; one message lists every failure.
    """
    _check(sizing, quote)
    quantity = _FORMULAS[sizing.method](sizing, quote)
    if sizing.max_position_percentage is not None:
        affordable = quote.account_balance * sizing.max_position_percentage / 100 / quote.price_open
        quantity = min(quantity, affordable)
    if sizing.min_position_size is not None:
        quantity = max(quantity, sizing.min_position_size)
    if sizing.max_position_size is not None:
        quantity = min(quantity, sizing.max_position_size)
    if not math.isfinite(quantity):
        raise InvalidInputError(f"sizing {sizing.name!r}: the quantity is not finite: the distances are too small")
    return quantity


def average_true_range(candles: Iterable[Candle], *, interval: str, now_ms: int, period: int = ATR_PERIOD) -> float:
    """Return the mean true range of the last ``period`` closed candles.

    The plain mean, not Wilder's smoothing: that depends on where the sum began, and so a bot that was restarted
    would size otherwise than one that was not.

    Args:
        candles: Oldest first, all of ``interval``; one that had not closed at ``now_ms`` is left out.
        period: Over 0. One candle more is needed: a range reaches to the close before it.

    Raises:
        InvalidInputError: There are fewer than ``period + 1`` closed candles, or ``period`` is not over 0.
    """
    length_ms = interval_ms(interval)
    if type(period) is not int or period < 1:
        raise InvalidInputError(
            f"the period of the average true range is {period!r:.40}: must be a whole number over 0"
        )
    closed = [candle for candle in candles if candle.open_time_ms + length_ms <= now_ms][-(period + 1) :]
    if len(closed) <= period:
        raise InvalidInputError(
            f"the average true range over {period} needs {period + 1} closed {interval} candles, not {len(closed)}"
        )
    ranges = (max(candle.high, before.close) - min(candle.low, before.close) for before, candle in pairwise(closed))
    return math.fsum(ranges) / period


def _fixed_percentage(sizing: Sizing, quote: Quote) -> float:
    assert sizing.risk_percentage is not None and quote.price_stop_loss is not None
    return quote.account_balance * sizing.risk_percentage / 100 / abs(quote.price_open - quote.price_stop_loss)


def _kelly(sizing: Sizing, quote: Quote) -> float:
    assert sizing.kelly_multiplier is not None and quote.win_rate is not None and quote.win_loss_ratio is not None
    edge = quote.win_rate - (1 - quote.win_rate) / quote.win_loss_ratio
    return quote.account_balance * max(0.0, edge) * sizing.kelly_multiplier / quote.price_open


def _atr_based(sizing: Sizing, quote: Quote) -> float:
    assert sizing.risk_percentage is not None and sizing.atr_multiplier is not None and quote.atr is not None
    return quote.account_balance * sizing.risk_percentage / 100 / (quote.atr * sizing.atr_multiplier)


_FORMULAS = {"fixed-percentage": _fixed_percentage, "kelly-criterion": _kelly, "atr-based": _atr_based}


def _check(sizing: Sizing, quote: Quote) -> None:
    failures = []
    if not _is_number(quote.account_balance) or quote.account_balance < 0:
        failures.append(f"account_balance is {quote.account_balance!r:.40}: must be a number, 0 or more")
    for name in ("price_open", *_NEEDS[sizing.method]):
        value = getattr(quote, name)
        if value is None:
            failures.append(f"{name} is missing: {sizing.method} needs it")
        elif not _is_above_zero(value) or (name == "win_rate" and value >= 1):
            failures.append(f"{name} is {value!r:.40}: must be a number over 0{' and under 1' * (name == 'win_rate')}")
    if sizing.method == "fixed-percentage" and quote.price_stop_loss == quote.price_open:
        failures.append(f"price_stop_loss is {quote.price_stop_loss}: must not be the entry")
    if failures:
        raise InvalidInputError(f"sizing {sizing.name!r}: " + "; ".join(failures))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_above_zero(value: Any) -> bool:
    return _is_number(value) and value > 0
