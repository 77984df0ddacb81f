"""The registry: what can be added, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from holdfast.engine import registry as module
from holdfast.engine.registry import Callbacks, Registry, StrategySpec
from holdfast.errors import InvalidInputError
from holdfast.rules.params import Params
from holdfast.rules.risk import Validation


def nothing(symbol: str, when_ms: int) -> None:
    """Propose nothing."""


def candles(symbol: str, interval: str, since_ms: int, limit: int) -> list[Any]:
    """Give one raw candle."""
    return [(since_ms, 1, 2, 0.5, 1.5, 7)]


@pytest.fixture
def registry() -> Registry:
    return Registry()


def strategy(registry: Registry, name: str = "trend", **more: Any) -> StrategySpec:
    registry.add_strategy(nothing, strategy_name=name, interval="5m", **more)
    return registry.strategy(name)


async def test_an_exchange_is_added_by_its_functions_and_may_be_sync(registry: Registry) -> None:
    spec = registry.add_exchange(
        exchange_name="binance", get_candles=candles, format_price=lambda s, p: f"{p:.2f}", format_quantity=None
    )
    assert registry.exchange("binance") is spec
    assert await spec.get_candles("X", "1m", 60_000, 1) == [(60_000, 1, 2, 0.5, 1.5, 7)]
    assert spec.format_price("X", 1.005) == "1.00"
    assert spec.format_quantity("X", 0.10000000) == "0.1"
    assert spec.format_quantity("X", 0.0) == "0"


async def test_an_exchange_is_added_as_an_object_or_a_decorated_class(registry: Registry) -> None:
    @registry.add_exchange(exchange_name="paper")
    class Paper:
        async def get_candles(self, symbol: str, interval: str, since_ms: int, limit: int) -> list[Any]:
            return [symbol]

        async def wait_closed(self, participant: str, after_ms: int | None) -> int:
            return 7

        def format_price(self, symbol: str, price: float) -> str:
            return "p"

    assert isinstance(Paper, type), "a decorated class stays a class"
    paper = registry.exchange("paper")
    assert await paper.get_candles("X", "1m", 0, 1) == ["X"]
    assert paper.wait_closed is not None
    assert await paper.wait_closed("me", None) == 7
    assert paper.format_price("X", 1.0) == "p"
    one = Paper()
    assert registry.add_exchange(one, exchange_name="second") is one
    assert registry.exchange("second").source is one


def test_a_strategy_is_added_as_a_function_or_as_a_decorator(registry: Registry) -> None:
    @registry.add_strategy(strategy_name="decorated", interval="1h", symbols=["A", "B"], on_open=print)
    async def think(symbol: str, when_ms: int) -> None:
        return None

    spec = registry.strategy("decorated")
    assert spec.get_signal is think
    assert (spec.interval_ms, spec.symbols, spec.callbacks.on_open) == (3_600_000, ("A", "B"), print)
    assert strategy(registry).callbacks == Callbacks()
    assert [one.strategy_name for one in registry.list_strategies()] == ["decorated", "trend"]


def test_risk_names_are_merged_name_first_and_unique(registry: Registry) -> None:
    assert strategy(registry, risk_name="b", risk_list=["a", "b"]).risk_names == ("b", "a")
    with pytest.raises(InvalidInputError, match="twice"):
        strategy(registry, "other", risk_list=["a", "a"])


def test_callbacks_come_together_or_one_by_one(registry: Registry) -> None:
    together = strategy(registry, "one", callbacks={"on_open": print}, on_close=repr).callbacks
    assert (together.on_open, together.on_close) == (print, repr)
    struct = strategy(registry, "two", callbacks=Callbacks(on_tick=print)).callbacks
    assert struct.on_tick is print


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"interval": "2m"}, "5m"),
        ({"on_opened": print}, "on_open"),
        ({"on_open": 7}, "callable"),
        ({"strategy_name": ""}, "strategy_name"),
        ({"strategy_name": "\ud800"}, "surrogate"),
        ({"risk_list": "abc"}, "list of names"),
        ({"risk_name": 7}, "risk_name"),
        ({"symbols": "BTCUSDT"}, "list of names"),
        ({"get_signal": 7}, "callable"),
    ],
)
def test_a_strategy_that_cannot_work_is_refused(registry: Registry, more: dict[str, Any], told: str) -> None:
    given = {"get_signal": nothing, "strategy_name": "x", "interval": "5m", **more}
    with pytest.raises(InvalidInputError, match=told):
        registry.add_strategy(given.pop("get_signal"), **given)
    assert registry.list_strategies() == []


def test_a_frame_takes_milliseconds_text_or_a_moment(registry: Registry) -> None:
    moment = datetime(2024, 1, 2, tzinfo=UTC)
    by_text = registry.add_frame(frame_name="a", interval="1m", start="2024-01-01", end="2024-01-02T00:00:00+00:00")
    by_number = registry.add_frame(frame_name="b", interval="1m", start=1_704_067_200_000, end=moment)
    assert (by_text.start_ms, by_text.end_ms) == (by_number.start_ms, by_number.end_ms)
    assert registry.list_frames() == [by_text, by_number]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"interval": "2m"}, "use one of"),
        ({"start": "soon"}, "ISO"),
        ({"start": -1}, "start"),
        ({"end": 0}, "before it starts"),
        ({"end": True}, "end"),
        ({"frame_name": ""}, "frame_name"),
    ],
)
def test_a_frame_that_cannot_be_is_refused(registry: Registry, more: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInputError, match=told):
        registry.add_frame(**{"frame_name": "x", "interval": "1m", "start": 60_000, "end": 120_000, **more})


def test_a_risk_profile_takes_functions_mappings_objects_and_validations(registry: Registry) -> None:
    class WithNote:
        note = "object"

        def validate(self, payload: Any) -> bool:
            return True

    profile = registry.add_risk(
        risk_name="limit",
        validations=[print, {"validate": print, "note": "mapping"}, WithNote(), Validation(validate=print)],
    )
    assert [validation.note for validation in profile.validations] == ["", "mapping", "object", ""]

    @registry.add_risk(risk_name="decorated", note="why")
    def check(payload: Any) -> bool:
        return True

    assert registry.risk("decorated").validations == (Validation(validate=check, note="why"),)
    assert [one.name for one in registry.list_risks()] == ["limit", "decorated"]
    with pytest.raises(InvalidInputError, match="validate"):
        registry.add_risk(risk_name="bad", validations=[7])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"validation": nothing, "validations": [nothing]}, "one validation or validations=, not both"),
        ({"validations": 5}, "validations is a list, not 5"),
        ({"validations": "limit"}, "validations is a list, not 'limit'"),
        ({"validations": [Validation(validate=5)]}, "a validation is a function"),  # type: ignore[arg-type]
        ({"validations": [{"note": "no function"}]}, "a validation is a function"),
    ],
)
def test_a_risk_profile_that_would_check_nothing_is_refused(
    registry: Registry, given: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidInputError, match=told):
        registry.add_risk(risk_name="limit", **given)
    assert registry.list_risks() == []


def test_a_decorator_refuses_what_is_no_function(registry: Registry) -> None:
    decorate: Any = registry.add_risk(risk_name="limit")
    with pytest.raises(InvalidInputError, match="a validation is a function"):
        decorate(5)


def test_a_name_is_given_once(registry: Registry) -> None:
    strategy(registry)
    registry.add_exchange(exchange_name="x", get_candles=candles)
    registry.add_frame(frame_name="x", interval="1m", start=0, end=0)
    registry.add_risk(risk_name="x", validations=[])
    for again in (
        lambda: strategy(registry),
        lambda: registry.add_exchange(exchange_name="x", get_candles=candles),
        lambda: registry.add_frame(frame_name="x", interval="1m", start=0, end=0),
        lambda: registry.add_risk(risk_name="x", validations=[]),
    ):
        with pytest.raises(InvalidInputError, match="already"):
            again()


def test_a_removed_exchange_makes_room_for_another(registry: Registry) -> None:
    first = registry.add_exchange(exchange_name="x", get_candles=candles)
    registry.remove_exchange("x")
    registry.remove_exchange("never added")
    second = registry.add_exchange(exchange_name="x", get_candles=candles)
    assert registry.exchange("x") is second is not first


def test_an_unknown_name_is_refused_with_those_there_are(registry: Registry) -> None:
    strategy(registry)
    with pytest.raises(InvalidInputError, match="'trend'"):
        registry.strategy("trned")
    for find in (registry.exchange, registry.frame, registry.risk):
        with pytest.raises(InvalidInputError, match="none was added"):
            find("x")


def test_an_exchange_without_candles_is_refused(registry: Registry) -> None:
    with pytest.raises(InvalidInputError, match="get_candles"):
        registry.add_exchange(object(), exchange_name="x")
    with pytest.raises(InvalidInputError, match="callable"):
        registry.add_exchange(exchange_name="x", get_candles=candles, format_price="2")  # type: ignore[call-overload]
    with pytest.raises(InvalidInputError, match="exchange_name"):
        registry.add_exchange(get_candles=candles)  # type: ignore[call-overload]


def test_an_exchange_class_that_needs_arguments_is_refused_with_the_remedy(registry: Registry) -> None:
    class Keyed:
        def __init__(self, key: str) -> None: ...

    with pytest.raises(InvalidInputError, match=r"Keyed\(\) could not be made .*: add an instance of it instead"):
        registry.add_exchange(Keyed, exchange_name="keyed")


def test_what_a_strategy_needs_is_checked_when_it_starts_and_by_validate(registry: Registry) -> None:
    strategy(registry, "one", risk_name="missing")
    strategy(registry, "two", risk_name="gone")
    with pytest.raises(InvalidInputError, match="missing"):
        registry.check_start("one", Params())
    with pytest.raises(InvalidInputError, match=r"missing.*gone"):
        registry.validate(Params())
    for name in ("missing", "gone"):
        registry.add_risk(risk_name=name, validations=[])
    registry.validate(Params())


def test_undecided_needs_somebody_who_decides(registry: Registry) -> None:
    strategy(registry)
    strategy(registry, "knows", on_both_hit=lambda signal, candle: "stop_loss")
    undecided = Params(both_hit="undecided")
    registry.check_start("knows", undecided)
    with pytest.raises(InvalidInputError, match="on_both_hit"):
        registry.check_start("trend", undecided)


def test_the_modules_functions_use_one_registry_that_can_be_emptied() -> None:
    module.reset()
    try:
        module.add_strategy(nothing, strategy_name="mine", interval="1m")
        module.add_exchange(exchange_name="e", get_candles=candles)
        module.add_frame(frame_name="f", interval="1m", start=0, end=0)
        module.add_risk(risk_name="r", validations=[])
        assert [one.strategy_name for one in module.list_strategies()] == ["mine"]
        assert len(module.list_exchanges()) == len(module.list_frames()) == len(module.list_risks()) == 1
        module.validate()
    finally:
        module.reset()
    assert module.list_strategies() == []
