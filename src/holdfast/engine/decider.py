"""Deciding: the step's questions are settled on what the store holds at that moment."""

from __future__ import annotations

from typing import Any, cast

from ..contract import Key
from ..domains import guard_key, ledger_key, risk_key
from ..errors import UnavailableError
from ..rows import Guard, RiskPosition
from ..rules.drafts import InvalidSignalError
from ..rules.risk import RiskPayload, RiskProfile, RiskRejection
from ..rules.signals import AskBothHit, AskRisk, AskStrategy, Question, Spec, Transition, answer
from ..store import Loaded, Store
from .listeners import Failure
from .settle import Settled, Settler


class Decider:
    """Settles the questions of one live context.

    Args:
        spec: The context and its profiles.
        store: Where slots, guards and the ledger lie.
        settler: Puts the questions to the user's code.
    """

    def __init__(self, spec: Spec, store: Store, settler: Settler) -> None:
        self._spec, self._store, self._settler = spec, store, settler

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
