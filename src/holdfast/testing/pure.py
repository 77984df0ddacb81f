"""What a run would have traded: the pure step over a market's candles, without any storage.

A market that does not wait goes on while a killed bot is down, and nothing is opened for the past. So its trades
are not those of a run that was never killed, but they must be those of the pure step over the same candles with
entries forbidden in the outages that were recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..contract import Key
from ..domains import context_key, encode, ledger_key
from ..engine.listeners import Listeners
from ..engine.outbox import trade_of
from ..engine.reconcile import slot_of
from ..engine.registry import Registry
from ..engine.settle import Settler
from ..market.replay import LocalMarket
from ..names import Context
from ..rows import Outage, RiskPosition
from ..rules.candles import MINUTE_MS, Candle, Window
from ..rules.params import Params
from ..rules.signals import Question, Spec, State, Transition, step

_PAGE = 5000


class _Pure:
    """One context without a store."""

    def __init__(self, context: Context, registry: Registry, params: Params, outages: Sequence[Outage]) -> None:
        strategy = registry.strategy(context.strategy_name)
        self.context = context
        self.spec = Spec(context, strategy.interval_ms, params, strategy.risk_names)
        self.settler = Settler(
            strategy, registry.exchange(context.exchange_name), mode="live", params=params, listeners=Listeners(),
            profiles={name: registry.risk(name) for name in strategy.risk_names},
        )  # fmt: skip
        self.state, self.window = State(), Window(params.avg_price_candles_count)
        self.outages = outages
        self.rows: dict[Key, bytes] = {}

    async def step(self, candle: Candle, others: Sequence[_Pure]) -> None:
        self.window.push(candle)
        entries = not any(outage.from_ms <= candle[0] <= outage.to_ms for outage in self.outages)
        outcome = step(self.state, candle, self.window, self.spec, entries=entries)
        if isinstance(outcome, Question):

            def positions(name: str) -> Iterable[RiskPosition]:
                return [slot_of(one.state.signal) for one in others if one.state.signal and name in one.spec.risk_names]

            outcome = (await self.settler.settle(outcome, positions)).transition
        if isinstance(outcome, Transition):
            self.state = outcome.state
            for event in outcome.events:
                if event.kind == "closed":
                    key = ledger_key(self.context, event.signal.id)
                    self.rows[key] = encode(key, trade_of(event))

    def stored(self) -> dict[Key, bytes]:
        """Return the rows of the ledger, of what is open and of what waits, as a store would hold them."""
        rows = dict(self.rows)
        for domain, row in (("signal", self.state.signal), ("schedule", self.state.scheduled)):
            if row is not None:
                key = context_key(domain, self.context)
                rows[key] = encode(key, row)
        return rows


async def pure_rows(
    market: LocalMarket, registry: Registry, params: Params, outages: Mapping[Context, Sequence[Outage]]
) -> dict[Key, bytes]:
    """Return what the contexts' ledger, signal and schedule rows must be at the end of the market.

    Args:
        market: All of its candles; registered in ``registry`` as the contexts' exchange.
        registry: Knows the strategies and risk profiles.
        params: The parameters of the run.
        outages: Of each context: where entries were forbidden, as the run recorded it.
    """
    contexts = [_Pure(context, registry, params, outages[context]) for context in sorted(outages)]
    history = market.history
    candles: dict[str, dict[int, Candle]] = {}
    for symbol in {one.context.symbol for one in contexts}:
        found: dict[int, Candle] = {}
        for since_ms in range(history.first_ms, history.last_ms + 1, _PAGE * MINUTE_MS):
            page = history.candles(symbol, "1m", since_ms, _PAGE, closed_ms=history.last_ms)
            found.update((candle[0], candle) for candle in page)
        candles[symbol] = found
    for at_ms in range(history.first_ms, market.pace.end_ms + MINUTE_MS, MINUTE_MS):
        for one in contexts:
            candle = candles[one.context.symbol].get(at_ms)
            if candle is not None:
                await one.step(candle, contexts)
    return {key: row for one in contexts for key, row in one.stored().items()}
