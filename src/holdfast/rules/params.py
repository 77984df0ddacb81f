"""Parameters: every number that the rules use, with its unit and its rule.

Names are the documents' without their prefix: ``CC_PERCENT_FEE`` is ``percent_fee``;
:func:`set_config` takes either spelling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from ..errors import InvalidInputError

BothHit = Literal["take_profit", "stop_loss", "undecided"]


class Params(msgspec.Struct, frozen=True, kw_only=True):
    """One complete set of parameters. Percents are percent units: 0.1 is 0.1 %."""

    schedule_await_minutes: int = 120
    """How long a scheduled signal waits for its price; over 0."""
    avg_price_candles_count: int = 5
    """How many minutes of one-minute candles make a price; over 0, at most 1000 (one request)."""
    percent_slippage: float = 0.1
    """Percent lost to slippage on each side; 0 or more."""
    percent_fee: float = 0.1
    """Percent of fee on each side; 0 or more."""
    min_takeprofit_distance_percent: float = 0.5
    """Least distance entry to target; over 0 and at least twice slippage plus fee."""
    min_stoploss_distance_percent: float = 0.5
    """Least distance entry to stop; over 0 and below the greatest."""
    max_stoploss_distance_percent: float = 20.0
    """Greatest distance entry to stop; over 0."""
    max_signal_lifetime_minutes: int = 1440
    """Longest holding time that a signal may ask for; over 0."""
    max_signal_generation_seconds: int = 180
    """How long an async strategy may think; over 0."""
    get_candles_retry_count: int = 3
    """How often candles are asked for before giving up; 0 counts as 1."""
    get_candles_retry_delay_ms: int = 5000
    """Pause between two attempts; 0 or more."""
    get_candles_price_anomaly_threshold_factor: int = 1000
    """A price below the reference price divided by this rejects its batch; over 0."""
    get_candles_min_candles_for_median: int = 5
    """From how many candles on the reference price is the median, not the mean; over 0."""
    report_show_signal_note: bool = False
    """Whether reports show notes."""
    both_hit: BothHit = "take_profit"
    """What a candle that holds both stop and target means; ``undecided`` asks ``on_both_hit``."""

    entry_validity_seconds: float = 30.0
    """With a broker: how long an entry may take to be sent and filled; over 0. The rest of it is cancelled then."""
    exit_validity_seconds: float = 10.0
    """With a broker: the same for one attempt of an exit, after which the next follows; over 0."""
    order_grace_seconds: float = 5.0
    """With a broker: how far its clock and this one may be apart, and an order be late; over 0."""

    record_retention_days: int = 90
    """How long recovery plans, outages and what was done by hand stay on record; over 0."""
    record_limit_rows: int = 1000
    """Most rows of each of these kinds in one context; over 0. The newest stays, and what an open signal needs."""


_ABOVE_ZERO = (
    "schedule_await_minutes",
    "avg_price_candles_count",
    "min_takeprofit_distance_percent",
    "min_stoploss_distance_percent",
    "max_stoploss_distance_percent",
    "max_signal_lifetime_minutes",
    "max_signal_generation_seconds",
    "get_candles_price_anomaly_threshold_factor",
    "get_candles_min_candles_for_median",
    "entry_validity_seconds",
    "exit_validity_seconds",
    "order_grace_seconds",
    "record_retention_days",
    "record_limit_rows",
)
_NOT_NEGATIVE = ("percent_slippage", "percent_fee", "get_candles_retry_count", "get_candles_retry_delay_ms")
_ROUNDING = 1e-9  # 2 · (0.1 + 0.2) is 0.6000000000000001: must not refuse 0.6


def check_params(params: Params) -> None:
    """Refuse a set of parameters that breaks a rule.

    Raises:
        InvalidInputError: One message that lists every failure.
    """
    failures = [
        f"{name} is {getattr(params, name)}: must be over 0" for name in _ABOVE_ZERO if getattr(params, name) <= 0
    ]
    failures += [
        f"{name} is {getattr(params, name)}: must be 0 or more" for name in _NOT_NEGATIVE if getattr(params, name) < 0
    ]
    if params.avg_price_candles_count > 1000:
        failures.append(f"avg_price_candles_count is {params.avg_price_candles_count}: must be at most 1000")
    costs = 2 * (params.percent_slippage + params.percent_fee)
    if params.min_takeprofit_distance_percent < costs - _ROUNDING:
        failures.append(
            f"min_takeprofit_distance_percent is {params.min_takeprofit_distance_percent}: must be at least {costs:g}, "
            "twice slippage plus fee, or a trade that hits its target loses money"
        )
    if params.min_stoploss_distance_percent >= params.max_stoploss_distance_percent:
        failures.append(
            f"min_stoploss_distance_percent is {params.min_stoploss_distance_percent}: must be below "
            f"max_stoploss_distance_percent, {params.max_stoploss_distance_percent}"
        )
    if failures:
        raise InvalidInputError("parameters: " + "; ".join(failures))


_FIELDS = frozenset(field.name for field in msgspec.structs.fields(Params))
_DEFAULT = Params()
_current = _DEFAULT


def get_config() -> Params:
    """Return the parameters in force. Runs take them when they start."""
    return _current


def get_default_config() -> Params:
    """Return the parameters as they are shipped."""
    return _DEFAULT


def set_config(partial: Mapping[str, Any] | None = None, *, unsafe: bool = False, **changes: Any) -> Params:
    """Change some parameters and return the set now in force; on an error nothing has changed.

    Args:
        partial: Names and values; ``CC_PERCENT_FEE`` and ``percent_fee`` both name ``percent_fee``.
        unsafe: Skip the rules (types are still checked); for experiments, such as turning a distance check off with 0.
        changes: More names and values.

    Raises:
        InvalidInputError: An unknown name, a wrong type, or the merged whole breaks a rule.
    """
    global _current
    if partial is not None and not isinstance(partial, Mapping):
        raise InvalidInputError(f"parameters come as a mapping of names to values, not {partial!r:.80}")
    values = msgspec.structs.asdict(_current)
    for given, value in {**(partial or {}), **changes}.items():
        name = given.removeprefix("CC_").lower() if given.startswith("CC_") else given
        if name not in _FIELDS:
            raise InvalidInputError(f"there is no parameter {given!r}: use one of {', '.join(sorted(_FIELDS))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidInputError(f"parameter {given} is {value!r}: must be finite")
        values[name] = value
    try:
        merged = msgspec.convert(values, Params)
    except msgspec.ValidationError as error:
        raise InvalidInputError(f"parameters: {error}") from error
    if not unsafe:
        check_params(merged)
    _current = merged
    return merged


def reset_config() -> None:
    """Put the shipped parameters in force again."""
    global _current
    _current = _DEFAULT
