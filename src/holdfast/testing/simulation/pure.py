"""What one context must come to: the pure step over its candles, without storage, processes or time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec

from ...contract import Key
from ...domains import context_key, ledger_key
from ...engine.outbox import trade_of
from ...names import Context
from ...rows import Event, Outage, Row
from ...rules.candles import INTERVALS_MS, MINUTE_MS, Window
from ...rules.drafts import InvalidSignalError
from ...rules.signals import AskStrategy, Question, Spec, State, Transition, answer, step, withdraw
from .market import PARAMS, SimulatedMarket


def pure_rows(
    market: SimulatedMarket,
    context: Context,
    interval: str,
    outages: Iterable[Outage],
    withdrawn: Mapping[str, Event] = MappingProxyType({}),
) -> dict[Key, Row]:
    """Return the ledger, signal and schedule rows that there must be, with entries forbidden in ``outages``.

    Args:
        withdrawn: For each signal whose entry never came to be at the venue: the event that says so.
    """
    spec = Spec(context, INTERVALS_MS[interval], PARAMS)
    forbidden = [(one.from_ms, one.to_ms) for one in outages]
    state, window = State(), Window(PARAMS.avg_price_candles_count)
    rows: dict[Key, Row] = {}
    for candle in market.candles[context.symbol]:
        window.push(candle)
        entries = not any(start <= candle[0] <= end for start, end in forbidden)
        outcome: Transition | Question | None = step(state, candle, window, spec, entries=entries)
        if isinstance(outcome, AskStrategy):
            try:
                outcome = answer(outcome, market.proposal(context.symbol, candle[0] + MINUTE_MS))
            except InvalidSignalError:
                outcome = None
        if isinstance(outcome, Transition):
            state = outcome.state
            gone = None if state.signal is None else withdrawn.get(state.signal.id)
            if gone is not None:
                cancelled = withdraw(state, spec, candle, window.price(), "order_cancelled")
                assert cancelled is not None
                last_ms = max(candle[0], gone.candle_ms)  # it may have been decided with the next candle in view
                state = msgspec.structs.replace(cancelled.state, last_candle_ms=last_ms)
            for event in outcome.events:
                if event.kind == "closed":
                    rows[ledger_key(context, event.signal.id)] = trade_of(event)
    for domain, row in (("signal", state.signal), ("schedule", state.scheduled)):
        if row is not None:
            rows[context_key(domain, context)] = row
    return rows
