"""Deciding: the step's questions are settled on what the store holds at that moment."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from ..contract import Key
from ..domains import guard_key, ledger_key, risk_key
from ..errors import UnavailableError
from ..rows import Guard, RiskPosition
from ..rules.candles import MINUTE_MS, Candle
from ..rules.drafts import InvalidSignalError
from ..rules.risk import RiskPayload, RiskProfile, RiskRejection
from ..rules.signals import AskBothHit, AskRisk, AskStrategy, Question, Spec, State, Transition, answer
from ..store import Loaded, Store
from .commits import begins
from .gate import Gate
from .listeners import Failure
from .settle import Settled, Settler
from .tenure import GuardMovedError

if TYPE_CHECKING:
    from .executor import Executor

MAX_CHECKS = 100
"""How often a risk check is repeated while others change the profile."""
Commit: TypeAlias = Callable[[Transition, Mapping[Key, Loaded[Guard] | None]], Awaitable[None]]


class Decider:
    """Settles the questions of one live context.

    Args:
        spec: The context and its profiles.
        store: Where slots, guards and the ledger lie.
        settler: Puts the questions to the user's code.
        gate: Whether anything may begin, and the record of where it could not.
        executor: Of its orders, which may refuse an entry; None without a broker.
    """

    def __init__(self, spec: Spec, store: Store, settler: Settler, gate: Gate, executor: Executor | None) -> None:
        self._spec, self._store, self._settler = spec, store, settler
        self._gate, self._executor = gate, executor

    def remember_replies(self, replies: Mapping[tuple[str, int], str]) -> None:
        """Take what was said before of candles that held both stop and target, so that nobody is asked again."""
        self._settler.replies.update(replies)

    async def carry_out(
        self, outcome: Transition | Question | None, candle: Candle, reply: Any, *, before: State, commit: Commit
    ) -> Transition | None:
        """Settle what a candle's step came to, and have it committed.

        Args:
            outcome: Of the step.
            candle: That was stepped.
            reply: What the strategy replied, if it was asked; None: ask it now.
            before: The state that was stepped.
            commit: Persists a transition, under the guards of the profiles that were asked.

        Returns:
            What was committed; None when nothing came of it.

        Raises:
            UnavailableError: Nothing was committed; carry it out later.
            FencedError, FailedError: As ``commit``.

        Crash: As ``commit``.
        """
        if isinstance(outcome, AskStrategy):
            outcome = await self.propose(outcome, reply)
            if self._settler.failed_ms == candle[0] + MINUTE_MS:
                self._gate.forbid(candle[0])  # what it would have proposed is not known
        for _ in range(MAX_CHECKS):
            decided, checked = await self.decide(outcome)
            if decided.transition is None:
                return None
            if begins(before, decided.transition.state) and not await self._may_begin(decided.transition, candle):
                self._gate.forbid(candle[0])
                return None
            try:
                await commit(decided.transition, checked)
            except GuardMovedError:
                continue
            await self._settler.tell_risk(decided)
            return decided.transition
        raise UnavailableError(f"{self._spec.context}: its risk profiles change too often for a check")

    async def _may_begin(self, transition: Transition, candle: Candle) -> bool:
        if not self._gate.may_enter(candle[0]):
            return False  # stopped while its user's code was thinking, or a late fill of an earlier signal turned up
        refusal = None if self._executor is None else self._executor.refusal(transition.state)
        if refusal is not None:
            told = Failure(
                where="strategy", error=refusal, context=self._spec.context, at_ms=candle[0] + MINUTE_MS
            )  # fmt: skip
            await self._settler.listeners.report(told)
        return refusal is None

    async def propose(self, question: AskStrategy, reply: Any) -> Transition | Question | None:
        """Go on from what the strategy replied (None: ask it now); None when nothing comes of it."""
        outcome = await self._settler.propose(question, reply)
        if outcome is None or await self._was_closed(outcome):
            return None
        return outcome

    async def decide(self, outcome: Transition | Question | None) -> tuple[Settled, dict[Key, Loaded[Guard] | None]]:
        """Settle what the rules cannot know; with the guards of the profiles that were asked."""
        rejection: RiskRejection | None = None
        allowed: tuple[tuple[RiskProfile, RiskPayload], ...] = ()
        checked: dict[Key, Loaded[Guard] | None] = {}
        while isinstance(outcome, Question):
            if isinstance(outcome, AskRisk):
                positions, checked = await self._positions()
                rejection, allowed = await self._settler.judge(outcome, positions.__getitem__)
                outcome = answer(outcome, None if rejection is None else rejection.note)
            elif isinstance(outcome, AskBothHit):
                outcome = answer(outcome, await self._settler.first_hit(outcome))
        return Settled(outcome, rejection, allowed), checked

    async def _positions(self) -> tuple[dict[str, list[RiskPosition]], dict[Key, Loaded[Guard] | None]]:
        """Read the slots of every profile; the guards are read first, so that a slot that changes meanwhile shows."""
        names = self._spec.risk_names
        found, _ = await self._store.salvage(*(guard_key(name) for name in names))
        guards = {guard_key(name): cast("Loaded[Guard] | None", found.get(guard_key(name))) for name in names}
        positions: dict[str, list[RiskPosition]] = {}
        for name in names:
            mine = risk_key(name, self._spec.context)
            slots = await self._store.scan("risk", mine.entity_name)
            lost = [key for key in self._store.damaged if key.domain == "risk" and key.entity_name == mine.entity_name]
            if lost:
                raise UnavailableError(f"nothing can open under {name!r}: {lost[0]} is in quarantine", key=lost[0])
            positions[name] = [cast("RiskPosition", loaded.row) for key, loaded in slots.items() if key != mine]
        return positions, guards

    async def _was_closed(self, outcome: Transition | Question) -> bool:
        """Refuse an id that the ledger knows; the state remembers only the newest hundred."""
        if isinstance(outcome, Transition):
            signal = outcome.state.signal or outcome.state.scheduled
        else:
            signal = outcome.signal if isinstance(outcome, AskRisk) else None
        if signal is None:
            return False
        key = ledger_key(self._spec.context, signal.id)
        found, damaged = await self._store.salvage(key)
        if not found and not damaged:
            return False
        told = "was used before, and a closed id never opens again: use a new one"
        failure = Failure(
            where="strategy", error=InvalidSignalError([f"id {signal.id!r:.80} {told}"]), context=self._spec.context
        )
        if self._settler.listeners.has("validation"):
            await self._settler.listeners.emit("validation", failure)
        else:
            await self._settler.listeners.report(failure)
        return True
