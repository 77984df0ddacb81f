"""Risk profiles: which signals they let through, and what they are shown."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from rule_kit import CONTEXT, LONG, T0, at, spec

from holdfast.rows import RiskPosition
from holdfast.rules.candles import MINUTE_MS, Window
from holdfast.rules.risk import RiskPayload, RiskProfile, Validation, check, payload_for
from holdfast.rules.signals import AskRisk, AskStrategy, State, answer, step


def question() -> AskRisk:
    """Return the question of a market entry under one profile."""
    window = Window(5)
    window.push(at(0))
    asked = step(State(), at(0), window, spec(risk_names=("limit",)))
    assert isinstance(asked, AskStrategy)
    risk = answer(asked, LONG)
    assert isinstance(risk, AskRisk)
    return risk


def slot(symbol: str) -> RiskPosition:
    """Return a held slot."""
    return RiskPosition(strategy_name="trend", exchange_name="binance", symbol=symbol, open_timestamp=T0)


def profile(*validations: Any) -> RiskProfile:
    """Return a profile of functions, each with its place as note."""
    return RiskProfile(
        name="limit",
        validations=tuple(Validation(validate=one, note=f"note {n}") for n, one in enumerate(validations)),
    )


PAYLOAD = payload_for(question(), [slot("ETHUSDT"), slot("XRPUSDT")])


def test_a_validation_is_shown_the_signal_and_the_slots() -> None:
    assert (PAYLOAD.symbol, PAYLOAD.exchange_name, PAYLOAD.strategy_name) == (
        CONTEXT.symbol, CONTEXT.exchange_name, CONTEXT.strategy_name,
    )  # fmt: skip
    assert (PAYLOAD.current_price, PAYLOAD.timestamp_ms) == (43_000.0, T0 + MINUTE_MS)
    assert PAYLOAD.active_position_count == 2
    assert [position.symbol for position in PAYLOAD.active_positions] == ["ETHUSDT", "XRPUSDT"]
    assert PAYLOAD.pending_signal.price_take_profit == 44_000.0


async def test_an_empty_profile_allows() -> None:
    assert await check(profile(), PAYLOAD) is None


@pytest.mark.parametrize("verdict", [None, True, 0, "yes", ()])
async def test_only_false_and_raising_reject(verdict: Any) -> None:
    assert await check(profile(lambda payload: verdict), PAYLOAD) is None


async def test_the_first_that_rejects_gives_its_note_and_the_rest_are_not_asked() -> None:
    asked = []

    def full(payload: RiskPayload) -> None:
        asked.append("full")
        if payload.active_position_count >= 2:
            raise ValueError("full")

    def never(payload: RiskPayload) -> None:
        asked.append("never")

    assert await check(profile(lambda payload: True, full, never), PAYLOAD) == "note 1"
    assert asked == ["full"]


async def test_a_rejection_without_a_note_says_so() -> None:
    assert await check(RiskProfile(name="x", validations=(Validation(validate=lambda p: False),)), PAYLOAD) == "N/A"


async def test_validations_may_be_async() -> None:
    async def no(payload: RiskPayload) -> bool:
        await asyncio.sleep(0)
        return False

    async def fails(payload: RiskPayload) -> None:
        await asyncio.sleep(0)
        raise RuntimeError

    assert await check(profile(no), PAYLOAD) == "note 0"
    assert await check(profile(fails), PAYLOAD) == "note 0"


async def test_a_check_that_is_cancelled_is_no_rejection() -> None:
    async def slow(payload: RiskPayload) -> None:
        await asyncio.Event().wait()

    task = asyncio.create_task(check(profile(slow), PAYLOAD))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
