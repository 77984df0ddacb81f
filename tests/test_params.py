"""Parameters: the shipped ones, and which changes are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from holdfast.errors import InvalidInputError
from holdfast.rules.params import Params, get_config, get_default_config, reset_config, set_config


@pytest.fixture(autouse=True)
def _shipped_again() -> Iterator[None]:
    yield
    reset_config()


def test_the_shipped_values_are_the_documents() -> None:
    shipped = get_default_config()
    assert shipped == get_config() == Params()
    assert (shipped.schedule_await_minutes, shipped.avg_price_candles_count) == (120, 5)
    assert (shipped.percent_slippage, shipped.percent_fee) == (0.1, 0.1)
    assert (shipped.min_takeprofit_distance_percent, shipped.min_stoploss_distance_percent) == (0.5, 0.5)
    assert (shipped.max_stoploss_distance_percent, shipped.max_signal_lifetime_minutes) == (20.0, 1440)
    assert (shipped.max_signal_generation_seconds, shipped.get_candles_retry_count) == (180, 3)
    assert (shipped.get_candles_retry_delay_ms, shipped.get_candles_price_anomaly_threshold_factor) == (5000, 1000)
    assert (shipped.get_candles_min_candles_for_median, shipped.report_show_signal_note) == (5, False)
    assert shipped.both_hit == "take_profit"


def test_a_change_takes_either_spelling_and_keeps_the_rest() -> None:
    assert set_config({"CC_PERCENT_FEE": 0.05}, percent_slippage=0.02).percent_fee == 0.05
    assert get_config().percent_slippage == 0.02
    assert get_config().schedule_await_minutes == 120


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schedule_await_minutes": 0}, "schedule_await_minutes"),
        ({"avg_price_candles_count": -1}, "avg_price_candles_count"),
        ({"avg_price_candles_count": 1001}, "avg_price_candles_count"),
        ({"percent_slippage": -0.1}, "percent_slippage"),
        ({"percent_fee": 0.2}, "min_takeprofit_distance_percent"),
        ({"min_takeprofit_distance_percent": 0.39}, "min_takeprofit_distance_percent"),
        ({"min_stoploss_distance_percent": 20.0}, "min_stoploss_distance_percent"),
        ({"max_stoploss_distance_percent": 0.0}, "max_stoploss_distance_percent"),
        ({"max_signal_lifetime_minutes": 0}, "max_signal_lifetime_minutes"),
        ({"max_signal_lifetime_minutes": 1.5}, "int"),
        ({"max_signal_generation_seconds": 0}, "max_signal_generation_seconds"),
        ({"get_candles_retry_count": -1}, "get_candles_retry_count"),
        ({"get_candles_retry_delay_ms": -1}, "get_candles_retry_delay_ms"),
        ({"get_candles_price_anomaly_threshold_factor": 0}, "get_candles_price_anomaly_threshold_factor"),
        ({"percent_fee": float("nan")}, "percent_fee"),
        ({"max_stoploss_distance_percent": float("inf")}, "max_stoploss_distance_percent"),
        ({"percent_fee": "0.1"}, "float"),
        ({"both_hit": "maybe"}, "maybe"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_a_change_that_breaks_a_rule_is_refused_and_nothing_changes(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInputError, match=told):
        set_config({"schedule_await_minutes": 60, **change})
    assert get_config() == get_default_config()


def test_all_broken_rules_are_told_at_once() -> None:
    with pytest.raises(InvalidInputError, match=r"schedule_await_minutes.*percent_fee"):
        set_config(schedule_await_minutes=0, percent_fee=-1.0)


def test_rounding_does_not_refuse_a_distance_that_equals_the_costs() -> None:
    assert set_config(percent_fee=0.2, min_takeprofit_distance_percent=0.6).percent_fee == 0.2


def test_unsafe_skips_the_rules_but_not_the_types() -> None:
    assert set_config(unsafe=True, min_takeprofit_distance_percent=0.0).min_takeprofit_distance_percent == 0.0
    with pytest.raises(InvalidInputError, match="int"):
        set_config(unsafe=True, schedule_await_minutes="long")


def test_parameters_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="a mapping of names to values, not 5"):
        set_config(5)  # type: ignore[arg-type]
