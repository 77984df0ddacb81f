"""The gap of one context: its plan is made, decided about and put on record before the first missed candle is stepped.

Invariants:

* The plan and the decision are one commit under the owner row, made before anything of the plan is.
* A plan that was recorded and only half carried out is not made anew: whoever goes on finds it, and its decision.
* With the policy ``ask`` nothing is decided until an operator has: the context stops with ``UndecidedError``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from ..contract import Key
from ..domains import context_key, plan_key
from ..errors import UndecidedError
from ..rows import CloseReason, Decision, GapPlan, Row
from ..rules.candles import MINUTE_MS, Candle, Window
from ..rules.signals import Question
from .plan import Outlook, RecoveryPolicy, What, closing, covers, foresee, recorded, replies
from .retention import Retention

if TYPE_CHECKING:
    from .session import Session

MAX_AT_ONCE = 200_000
"""How many missed candles one plan covers: some four and a half months."""


class Gap:
    """What is planned about the missed candles of one session that has just recovered.

    Args:
        session: Recovered, or loaded without being owned.
        policy: The strategy's.
        clock: Tells the time in epoch milliseconds.
        operator: Who sits in front of it, as user@host; None where nobody does.
        wanted: What that operator decided; None: nothing.
    """

    def __init__(
        self,
        session: Session,
        policy: RecoveryPolicy,
        *,
        clock: Callable[[], int],
        operator: str | None = None,
        wanted: What | None = None,
    ) -> None:
        self._session, self._policy, self._clock = session, policy, clock
        self._operator, self._wanted = operator, wanted
        self._to_ms: int | None = None
        """Open time of the newest minute that had closed when the session recovered; None: not known yet."""
        self._planned_ms = -1
        """Open time of the newest candle that a plan covers."""
        self._reason: CloseReason | None = None
        """Why what is still open after the missed candles is closed; None: it is not."""
        self._over = session.state.signal is None and session.state.scheduled is None

    # ------------------------------------------------------------------ for the driver

    @property
    def is_closing(self) -> bool:
        """Whether what is open is closed when the gap is over: nothing may begin before that."""
        return self._reason is not None

    def wants_more(self, queue: Sequence[Candle], newest_ms: int | None, more: bool) -> bool:
        """Whether candles must be fetched before the first of ``queue`` may be stepped: a plan sees the whole gap."""
        if self._over or newest_ms is None or not queue:
            return False
        if self._to_ms is None:
            self._to_ms = newest_ms
        return more and self._planned_ms < queue[0][0] <= self._to_ms and len(queue) < MAX_AT_ONCE

    @property
    def is_over(self) -> bool:
        """Whether everything that was missed has been decided."""
        return self._over

    async def plan(self, queue: Sequence[Candle], entries_from_ms: int | None) -> None:
        """Plan for the candles that are about to be stepped, as far as they were missed, and put it on record.

        Raises:
            UndecidedError: The strategy's policy is to ask, and nobody has decided.
            UnavailableError, FencedError: As a commit; call it again after the former.

        Crash: The plan and its decision are on record or not; nothing of it was done.
        """
        if self._over or self._planned_ms >= queue[0][0]:
            return
        if self._to_ms is None or queue[0][0] > self._to_ms:
            self._over = self._reason is None  # all that was missed has been decided, but perhaps not yet closed
            return
        missed = [candle for candle in queue if candle[0] <= self._to_ms]
        outlook = await self.foresee(missed, entries_from_ms)
        if outlook is not None:
            await self.decide(outlook)
        self._planned_ms = missed[-1][0]

    async def passed(self, candle: Candle) -> bool:
        """Do what was decided about the end of the gap, once its last candle was stepped; tell whether anything was.

        Raises:
            UnavailableError: Not now; it is tried again after the next candle.
        """
        if self._reason is None or self._to_ms is None or candle[0] < min(self._to_ms, self._planned_ms):
            return False
        return await self.finish()

    async def finish(self) -> bool:
        """Close what is still open where that was decided, once every missed candle was stepped; tell if it was."""
        done = None if self._reason is None else await self._session.end_signal(self._reason)
        self._reason, self._over = None, True
        return done is not None

    # ------------------------------------------------------------------ the plan

    async def foresee(self, candles: Sequence[Candle], entries_from_ms: int | None) -> Outlook | None:
        """Return what ``candles`` do to what was restored, and what the policy or the operator adds; None: nothing was.

        Changes nothing.
        """
        session = self._session
        plans, decisions = self._about_restored(*await self._stored())
        session.decider.remember_replies(replies(plans.values()))
        window = Window(session.spec.params.avg_price_candles_count)
        for candle in session.window.candles:
            window.push(candle)
        walk = foresee(session.state, candles, window, session.spec, entries_from_ms=entries_from_ms)
        try:
            question: Question = next(walk)
            while True:
                settled, _ = await session.decider.decide(question)
                question = walk.send(settled.transition)
        except StopIteration as end:
            outlook = cast("Outlook | None", end.value)
        reason = self._closing_reason(decisions)
        return outlook if outlook is None or reason is None else closing(outlook, session.spec, reason)

    async def undecided(self, outlook: Outlook) -> str:
        """Return why :meth:`decide` would ask an operator; empty where it would not. Changes nothing."""
        _, decisions = self._about_restored(*await self._stored())
        return _asks(outlook) if outlook.events and self._decided(outlook, decisions) is None else ""

    async def decide(self, outlook: Outlook) -> What:
        """Put the plan and what was decided about it on record, and return that.

        Raises:
            UndecidedError: The policy is to ask, nobody has decided, and the plan would change something.
        """
        if not outlook.events:
            return self._wanted or "step"  # nothing comes of it, so there is nothing to decide
        stored = await self._stored()
        plans, decisions = self._about_restored(*stored)
        last = self._session.state.last_event
        known = next((key for key, plan in plans.items() if covers(plan, outlook, last)), None)
        key = known or plan_key("plan", outlook.context, outlook.events[0].number)
        decision_key = key._replace(domain="decision")
        decision = self._decided(outlook, decisions)
        changes: dict[Key, Row | None] = {}
        if known is None:
            changes[key] = recorded(outlook, by=self._operator or "engine", at_ms=self._clock())
        if decision is not None and not _same(decision, decisions.get(decision_key)):
            changes[decision_key] = decision
        if changes:
            await self._session.note({**self._surplus(outlook, key, *stored), **changes})
        if decision is None:
            raise UndecidedError(_asks(outlook), key=key)
        if decision.what == "close":
            self._reason = "policy" if decision.by == "policy" else "operator"
        return decision.what

    def _closing_reason(self, decisions: Mapping[Key, Decision]) -> CloseReason | None:
        if self._wanted is not None:
            return "operator" if self._wanted == "close" else None
        standing = _newest(decisions)
        if standing is not None:
            return "operator" if standing.what == "close" else None
        return "policy" if self._policy == "close_at_market" else None

    def _decided(self, outlook: Outlook, decisions: Mapping[Key, Decision]) -> Decision | None:
        standing = _newest(decisions)
        what: What
        if self._wanted is not None:
            what, by = self._wanted, self._operator or "operator"
        elif standing is not None and (standing.what == "close" or _stands(standing, outlook)):
            return standing  # an operator decided, and whoever began to carry it out did not end
        elif self._policy == "ask":
            return None
        else:
            what, by = "close" if self._closing_reason(decisions) == "policy" else "step", "policy"
        return Decision(
            signal_id=outlook.signal.id, what=what, by=by, until_ms=outlook.until_ms, at_ms=self._clock()
        )  # fmt: skip

    def _about_restored(
        self, plans: Mapping[Key, GapPlan], decisions: Mapping[Key, Decision]
    ) -> tuple[dict[Key, GapPlan], dict[Key, Decision]]:
        restored = self._session.state.signal or self._session.state.scheduled
        mine = None if restored is None else restored.id
        return (
            {key: row for key, row in plans.items() if row.signal_id == mine},
            {key: row for key, row in decisions.items() if row.signal_id == mine},
        )

    async def _stored(self) -> tuple[dict[Key, GapPlan], dict[Key, Decision]]:
        session = self._session
        name = context_key("plan", session.context).entity_name
        plans = await session.store.scan("plan", name)
        decisions = await session.store.scan("decision", name)
        return (
            {key: one.row for key, one in plans.items() if isinstance(one.row, GapPlan)},
            {key: one.row for key, one in decisions.items() if isinstance(one.row, Decision)},
        )

    def _surplus(
        self, outlook: Outlook, new: Key, plans: Mapping[Key, GapPlan], decisions: Mapping[Key, Decision]
    ) -> dict[Key, Row | None]:
        """Return the deletions that go with a new plan: of older ones and their decisions, about other signals."""
        known: dict[str, GapPlan | Decision] = {key.entity_id: row for key, row in decisions.items()}
        known |= {key.entity_id: row for key, row in plans.items()}
        ends = {name: known[name].until_ms for name in sorted(known)} | {new.entity_id: outlook.until_ms}
        gone = Retention.of(self._session.spec.params).surplus(ends, outlook.until_ms)
        old = {name for name in gone if known[name].signal_id != outlook.signal.id}
        return dict.fromkeys(key for key in (*plans, *decisions) if key.entity_id in old)


def _asks(outlook: Outlook) -> str:
    """Say what an operator has to decide."""
    return (
        f"{outlook.context}: the missed candles decide about {outlook.signal.id!r} ({outlook.verdict}), and "
        "the strategy's recovery is 'ask': look with `holdfast recover BOT.py --plan`, then decide with "
        "`holdfast recover BOT.py --decide step` or `--decide close`"
    )


def _newest(decisions: Mapping[Key, Decision]) -> Decision | None:
    """Return what an operator decided last about the signal; a policy is asked anew instead, as it may have changed."""
    return next((decisions[key] for key in sorted(decisions, reverse=True) if decisions[key].by != "policy"), None)


def _same(decision: Decision, old: Decision | None) -> bool:
    """Whether it is on record already; a repetition does not count as a new one."""
    return old is not None and (old.what, old.by) == (decision.what, decision.by) and old.until_ms >= decision.until_ms


def _stands(decision: Decision, outlook: Outlook) -> bool:
    """A decision covers what its operator had seen: nothing that later candles decide."""
    return all(event.at_ms - MINUTE_MS <= decision.until_ms for event in outlook.events)
