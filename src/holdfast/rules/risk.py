"""Risk: profiles of validations that a signal must pass before it opens.

There is no built-in limit; a limit is a validation, such as
``lambda payload: payload.active_position_count < 3``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from ..cancellation import no_stray_cancellation
from ..rows import RiskPosition, Signal
from .signals import AskRisk

NO_NOTE = "N/A"
"""The note of a rejection by a validation that has none."""


class RiskPayload(msgspec.Struct, frozen=True, kw_only=True):
    """What a validation is shown. Times are epoch milliseconds."""

    symbol: str
    pending_signal: Signal
    """What would open, or be scheduled."""
    strategy_name: str
    exchange_name: str
    current_price: float
    timestamp_ms: int
    active_position_count: int
    """How many slots of the profile are held now."""
    active_positions: tuple[RiskPosition, ...]


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    """One check: raising or returning False rejects; anything else allows. May be async."""

    validate: Callable[[RiskPayload], Any]
    note: str = ""
    """Why, for whoever reads the rejection."""


class RiskProfile(msgspec.Struct, frozen=True, kw_only=True):
    """A named list of validations and the slots that its open signals hold."""

    name: str
    validations: tuple[Validation, ...]
    on_rejected: Callable[[RiskPayload, str], Any] | None = None
    """Called with the payload and the note after a rejection was recorded."""
    on_allowed: Callable[[RiskPayload], Any] | None = None
    """Called with the payload after an allowed signal was recorded."""


class RiskRejection(msgspec.Struct, frozen=True, kw_only=True):
    """What ``listen_risk`` is told: which profile rejected what, and why."""

    risk_name: str
    note: str
    payload: RiskPayload
    activation: bool = False
    """A waiting signal was rejected at its activation, and so cancelled."""


def payload_for(question: AskRisk, positions: Iterable[RiskPosition]) -> RiskPayload:
    """Build what the validations of one profile are shown, from its slots."""
    held = tuple(positions)
    context = question.spec.context
    return RiskPayload(
        symbol=context.symbol,
        pending_signal=question.signal,
        strategy_name=context.strategy_name,
        exchange_name=context.exchange_name,
        current_price=question.price,
        timestamp_ms=question.now_ms,
        active_position_count=len(held),
        active_positions=held,
    )


async def check(profile: RiskProfile, payload: RiskPayload) -> str | None:
    """Run a profile's validations in order; the first that raises or returns False rejects.

    Returns:
        None when all allow, else the note of the one that rejected, ``N/A`` if it has none.
    """
    for validation in profile.validations:
        try:
            with no_stray_cancellation:
                verdict = validation.validate(payload)
                if inspect.isawaitable(verdict):
                    verdict = await verdict
        except Exception:  # raising is how a validation says no
            verdict = False
        if verdict is False:
            return validation.note or NO_NOTE
    return None
