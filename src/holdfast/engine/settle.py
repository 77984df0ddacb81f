"""Settling: the step's questions are put to the user's code, the same way in live and in backtest."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ..cancellation import no_stray_cancellation
from ..errors import UnavailableError
from ..rows import RiskPosition
from ..rules.params import Params
from ..rules.risk import RiskPayload, RiskProfile, RiskRejection, check, payload_for
from ..rules.signals import AskBothHit, AskRisk, AskStrategy, InvalidSignalError, Question, Transition, answer
from .context import Moment, Sleep, at
from .listeners import Failure, Listeners, Mode
from .registry import ExchangeSpec, StrategySpec


class Settled(NamedTuple):
    """How a question ended: what to commit, if anything, and what to tell once it is committed."""

    transition: Transition | None
    rejection: RiskRejection | None = None
    allowed: tuple[tuple[RiskProfile, RiskPayload], ...] = ()


class Settler:
    """Puts one context's questions to its strategy, its risk profiles and its callbacks.

    Args:
        profiles: The risk profiles by name; those that the strategy names must be among them.
        listeners: Told when a strategy raises (error) or proposes what breaks rules (validation).
        sleep: Takes seconds; pauses between attempts to fetch candles.
    """

    def __init__(
        self,
        strategy: StrategySpec,
        exchange: ExchangeSpec,
        *,
        mode: Mode,
        params: Params,
        profiles: Mapping[str, RiskProfile],
        listeners: Listeners,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.strategy, self.exchange = strategy, exchange
        self.mode, self.params, self.profiles = mode, params, profiles
        self.listeners, self._sleep = listeners, sleep
        self.failed_ms = 0
        """Close time of the last candle at which the strategy raised or took too long."""
        self.replies: dict[tuple[str, int], str] = {}
        """What was said of a candle that held both: it is asked about once, for a plan and for what is done by it."""

    async def settle(self, question: Question, positions: Callable[[str], Iterable[RiskPosition]]) -> Settled:
        """Ask until there is a transition, or nothing.

        Args:
            positions: Gives the slots held in a risk profile, by its name, as of now.

        Returns:
            With ``transition`` None when the strategy wanted nothing, raised, or proposed what breaks rules:
            nothing changes then, and it is asked again at its next slot.
        """
        outcome: Transition | Question | None = question
        rejection: RiskRejection | None = None
        allowed: tuple[tuple[RiskProfile, RiskPayload], ...] = ()
        while isinstance(outcome, Question):
            if isinstance(outcome, AskStrategy):
                outcome = await self.propose(outcome)
            elif isinstance(outcome, AskRisk):
                rejection, allowed = await self.judge(outcome, positions)
                outcome = answer(outcome, None if rejection is None else rejection.note)
            elif isinstance(outcome, AskBothHit):
                outcome = answer(outcome, await self.first_hit(outcome))
        return Settled(outcome, rejection, allowed)

    async def tell_risk(self, settled: Settled) -> None:
        """Tell ``on_rejected`` / ``on_allowed`` and the risk listeners; call it after the transition was recorded."""
        if settled.rejection is not None:
            rejection = settled.rejection
            callback = self.profiles[rejection.risk_name].on_rejected
            if callback is not None:
                await self._call(callback, rejection.payload, rejection.note)
            await self.listeners.emit("risk", rejection)
        for profile, payload in settled.allowed:
            if profile.on_allowed is not None:
                await self._call(profile.on_allowed, payload)

    def ask_now(self, question: AskStrategy) -> Any:
        """Call the strategy and return what it returned: its reply, or what must be awaited for one."""
        with at(self._moment(question)), no_stray_cancellation:
            return self.strategy.get_signal(question.symbol, question.now_ms)

    def failed(self, question: AskStrategy, error: Exception) -> Awaitable[None]:
        """Report that the strategy raised; await what this returns."""
        return self.listeners.report(
            Failure(where="strategy", error=error, context=question.spec.context, at_ms=question.now_ms)
        )

    async def propose(self, question: AskStrategy, reply: Any = None) -> Transition | Question | None:
        """Ask the strategy and go on from its reply; what it does wrong is reported, and gives None.

        Args:
            reply: What :meth:`ask_now` returned; None asks now.
        """
        topic = "error"
        try:
            reply = await self._ask(question, reply)
            if reply is None:
                return None
            topic = "validation"
            return answer(question, reply)
        except Exception as error:  # a strategy's mistake must not stop the watching of other signals
            failure = Failure(where="strategy", error=error, context=question.spec.context, at_ms=question.now_ms)
        if topic == "error":
            self.failed_ms = question.now_ms
        if topic == "validation" and isinstance(failure.error, InvalidSignalError) and self.listeners.has("validation"):
            await self.listeners.emit("validation", failure)
        else:
            await self.listeners.report(failure)
        return None

    def _moment(self, question: AskStrategy) -> Moment:
        return Moment(self.exchange, self.mode, question.now_ms, self.params, self._sleep)

    async def _ask(self, question: AskStrategy, reply: Any) -> Any:
        with at(self._moment(question)), no_stray_cancellation:
            if reply is None:
                reply = self.strategy.get_signal(question.symbol, question.now_ms)
            if reply is None or not inspect.isawaitable(reply):
                return reply
            seconds = self.params.max_signal_generation_seconds
            try:
                async with asyncio.timeout(seconds) as deadline:
                    with no_stray_cancellation:
                        return await reply
            except TimeoutError as error:
                if not deadline.expired():
                    raise  # the strategy's own
                name = self.strategy.strategy_name
                raise UnavailableError(
                    f"strategy {name!r} took longer than {seconds} s: no signal this slot"
                ) from error

    async def judge(
        self, question: AskRisk, positions: Callable[[str], Iterable[RiskPosition]]
    ) -> tuple[RiskRejection | None, tuple[tuple[RiskProfile, RiskPayload], ...]]:
        """Ask the risk profiles in order; the first rejection ends it, and is the reply to the question."""
        allowed = []
        for name in question.spec.risk_names:
            profile = self.profiles[name]
            payload = payload_for(question, positions(name))
            note = await check(profile, payload)
            if note is not None:
                rejection = RiskRejection(risk_name=name, note=note, payload=payload, activation=question.activation)
                return rejection, ()
            allowed.append((profile, payload))
        return None, tuple(allowed)

    async def first_hit(self, question: AskBothHit) -> str:
        """Ask ``on_both_hit``, once about one candle; a strategy that cannot say is taken to have been stopped out."""
        asked = (question.signal.id, question.candle[0])
        if asked not in self.replies:
            self.replies[asked] = await self._ask_first_hit(question)
        return self.replies[asked]

    async def _ask_first_hit(self, question: AskBothHit) -> str:
        callback = self.strategy.callbacks.on_both_hit
        try:
            if callback is None:
                raise UnavailableError("there is no on_both_hit to ask")
            with no_stray_cancellation:
                reply = callback(question.signal, question.candle)
                if inspect.isawaitable(reply):
                    reply = await reply
            if reply in ("take_profit", "stop_loss"):
                return str(reply)
            raise UnavailableError(f"on_both_hit must return 'take_profit' or 'stop_loss', not {reply!r:.80}")
        except Exception as error:  # the candle cannot wait: assume the worse, and say so
            await self.listeners.report(
                Failure(where="on_both_hit", error=error, context=question.spec.context, at_ms=question.now_ms)
            )
            return "stop_loss"

    async def _call(self, callback: Callable[..., Any], payload: RiskPayload, *more: str) -> None:
        await self.listeners.call(
            callback, payload, *more, where="risk callback", context=payload.pending_signal.context,
            at_ms=payload.timestamp_ms,
        )  # fmt: skip
