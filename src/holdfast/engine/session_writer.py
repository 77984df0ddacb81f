"""What one session commits, and how: a transition, notes, deletions of what was told, outages; and letting go.

Invariants:

* Every commit is made under the tenure, in its turn; whoever takes the context over ends both.
* What was taken along (deletions of delivered events, outages) is put back when its commit fails.
* After a commit whose end is not known here nothing more is committed: ``broken`` says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..contract import Key
from ..domains import guard_key
from ..errors import FailedError, FencedError, HoldfastError
from ..names import Context
from ..rows import Guard, Owner, Row, ScheduledSignal
from ..rules.signals import State, Transition
from ..store import Loaded, Store
from .background import Background
from .commits import begins, changes, vacancies
from .gate import Gate
from .lifeline import Lifeline
from .listeners import Trouble
from .outbox import Outbox
from .tenure import GuardMovedError, Tenure

if TYPE_CHECKING:
    from .executor import Executor
    from .health import Health

_log = logging.getLogger("holdfast")


class SessionWriter:
    """Commits what one session decides.

    Args:
        context: Whose.
        store: Where its rows lie.
        risk_names: The profiles in which a signal that opens takes a slot.
        outbox: Its events.
        gate: Holds its outages.
        health: How the store has been answering.
        executor: Of its orders, whose intents go along; None without a broker.
        has_lease: Whether what cannot be taken back may be done.
        tell: Tells the user's hook of trouble.
        ended: Told why it cannot go on, where no step is there to raise it.
    """

    def __init__(
        self,
        context: Context,
        store: Store,
        *,
        risk_names: tuple[str, ...],
        outbox: Outbox,
        gate: Gate,
        health: Health,
        executor: Executor | None,
        has_lease: Callable[[], bool],
        tell: Callable[[Trouble], None],
        ended: Callable[[HoldfastError], None],
    ) -> None:
        self._context, self._risk_names, self._gate = context, risk_names, gate
        self._health, self._executor, self._tell = health, executor, tell
        self.outbox = outbox
        self.lane = store.writer(str(context))
        self.lifeline = Lifeline(context, store, self.lane, health, has_lease)
        self.background = Background(self.flush, ended)
        self.tenure: Tenure | None = None
        """Under which it commits; None before the context is owned."""
        self.broken: HoldfastError | None = None
        """Why nothing more can be committed; the next step raises it."""
        self.held: tuple[str, ...] = ()
        """The profiles in which the open signal holds a slot."""
        self._letting_go = False
        """The tenure ends by this session's own doing."""

    def own_anew(self) -> None:
        """The context is about to be owned once more, which ends the tenure: nothing is committed under it now."""
        self._letting_go = True

    def recovered(
        self,
        tenure: Tenure,
        outbox: Outbox,
        *,
        held: tuple[str, ...],
        ignored: Loaded[ScheduledSignal] | None = None,
    ) -> None:
        """Begin anew, under a new tenure.

        Args:
            tenure: The context was taken with it.
            outbox: The events that are to be delivered.
            held: The profiles in which the open signal holds a slot.
            ignored: A row in the schedule domain that does not wait, and so was ignored.
        """
        tenure.ignored = ignored
        self.tenure, self.outbox, self.held = tenure, outbox, held
        self.broken, self._letting_go = None, False
        self.lifeline.predecessor = None

    def stand_in(self, predecessor: Loaded[Owner]) -> None:
        """Go on though the store could not be written: own it before anything else is committed.

        Args:
            predecessor: The owner row that is to be replaced.
        """
        self.lifeline.predecessor = predecessor
        self.outbox.kept.update(event.number for event in self.outbox.waiting)  # no trade can be recorded yet
        self.background.soon()

    async def merge_kept(self, tenure: Tenure) -> Loaded[Owner]:
        """Merge what an earlier run left in the emergency journal; returns the owner row as it then stands.

        Raises:
            FencedError, UnavailableError: As :meth:`Lifeline.merge`.

        Crash: As :meth:`Lifeline.merge`.
        """
        await self.lifeline.merge(tenure, recovering=True)
        for kept in self.lifeline.overtaken:
            why = f"commit {kept.number} of the emergency journal was left out: another owner has gone on"
            self._tell(Trouble(kind="emergency", context=self._context, why=why))
        return tenure.loaded

    @property
    def owner(self) -> Owner | None:
        """The owner row under which it commits; None before it owns, and once it lets go or cannot go on."""
        over = self.tenure is None or self.broken is not None or self._letting_go
        return None if over or self.tenure is None else self.tenure.owner

    @property
    def is_open(self) -> bool:
        """Whether it owns and can go on."""
        return self.broken is None and self.tenure is not None

    def check(self) -> None:
        """Raise what it cannot go on for.

        Raises:
            FencedError, FailedError: See :attr:`broken`.
        """
        if self.broken is not None:
            raise self.broken

    def give_up(self, error: HoldfastError) -> None:
        """Commit nothing more: the context is somebody else's, or cannot go on."""
        if isinstance(error, FencedError) and not isinstance(self.broken, FencedError):
            self._tell(Trouble(kind="fenced", context=self._context, why=str(error)))
        self.broken = error
        self._gate.look_anew()

    # ------------------------------------------------------------------ committing

    async def commit(self, before: State, transition: Transition, checked: Mapping[Key, Loaded[Guard] | None]) -> None:
        """Persist a transition; its events lie in the outbox afterwards, and its orders are sent.

        Args:
            before: The state that was committed last.
            transition: What was decided.
            checked: The guard rows of the profiles that were asked, as they were then.

        Raises:
            FencedError: Another owner has taken over.
            GuardMovedError: Nothing was written; ask the profiles again.
            UnavailableError: Nothing was written.

        Crash: Before it returns, all of the transition or nothing is stored; after it, all.
        """
        after = transition.state
        exits = before.signal is not None and not begins(before, after)
        guards = {key: loaded.row for key, loaded in checked.items() if loaded is not None}
        if (after.signal and after.signal.id) != (before.signal and before.signal.id) and not checked:
            # A slot that is given back needs no check, and so no version: nothing was decided on it.
            guards = await self.lifeline.guards(tuple(guard_key(name) for name in self.held), exits=exits)
        rows, held = changes(
            self._context, before, transition, held=self.held, risk_names=self._risk_names, guards=guards
        )
        orders: dict[Key, Row | None] = {}

        def with_orders() -> dict[Key, Row | None]:
            # In its turn: an answer that is being recorded just now may change what an exit has to close.
            if self._executor is not None:
                if begins(before, after) and self._executor.blocks_entries:
                    raise GuardMovedError(f"{self._context}: a late fill of an earlier signal turned up: decide anew")
                orders.update(self._executor.intents(before, transition))
            return rows | orders

        expect = {key: 0 if loaded is None else loaded.version for key, loaded in checked.items()}
        ignored = None if self.tenure is None else self.tenure.ignored
        expect |= vacancies(self._context, before, after, 0 if ignored is None else ignored.version)
        if not await self._send(with_orders, expect, exits=exits):
            self._tell_kept(transition)
        self.held = held
        self.outbox.add(transition.events)
        if after.scheduled is not None and self.tenure is not None:
            self.tenure.ignored = None
        if self._executor is not None:
            self._executor.committed(orders)

    def _tell_kept(self, transition: Transition) -> None:
        self.outbox.kept.update(event.number for event in transition.events)
        for event in transition.events:
            if event.kind == "closed":
                because = self._health.why or "the store does not take it"
                why = f"the exit of {event.signal.id!r:.80} is in the emergency journal: {because}"
                self._tell(Trouble(kind="emergency", context=self._context, why=why))

    async def send(self, rows: dict[Key, Row | None], guards: Mapping[Key, int], *, exits: bool = False) -> bool:
        """Commit rows, and with them the deletion of delivered events and the outages not yet on record.

        Args:
            rows: May be empty.
            guards: As :meth:`Tenure.commit` has them.
            exits: The rows may go to the emergency journal.

        Returns:
            Whether all is in the store; else the rows are in the journal.

        Raises:
            FencedError, FailedError, GuardMovedError, UnavailableError: As :meth:`commit`.

        Crash: As :meth:`commit`.
        """
        return await self._send(lambda: rows, guards, exits=exits)

    async def _send(
        self, rows_of: Callable[[], dict[Key, Row | None]], guards: Mapping[Key, int], *, exits: bool
    ) -> bool:  # fmt: skip
        if self.tenure is None:
            raise FailedError(f"{self._context}: recover() must come before the first step")
        outages = self._gate.outages
        async with self.tenure.turn:
            rows = rows_of()
            delivered, forbidden = self.outbox.take_delivered(), outages.take()
            proof = self.tenure.proof()
            if not (rows or delivered or forbidden or proof or self.lifeline.owes):
                return True
            more = {**dict.fromkeys(delivered), **forbidden, **proof}
            try:
                stored = await self.lifeline.commit(self.tenure, rows, more, guards, exits=exits)
            except BaseException as error:
                self.outbox.put_back(delivered)
                outages.put_back(forbidden)
                if not isinstance(error, HoldfastError):
                    # Cancelled, say: whether it was applied is not known here.
                    told = f"{self._context}: interrupted in a commit ({error!r}): recover with a new session"
                    self.give_up(FailedError(told))
                raise
            if stored:
                self.outbox.kept.clear()
            else:
                self.outbox.put_back(delivered)
                outages.put_back(forbidden)
                self.background.soon()
            return stored

    async def flush(self) -> None:
        """Delete the rows of delivered events and record outages now.

        Raises:
            FencedError, FailedError: As :meth:`commit`.
            UnavailableError: Not now; they wait for the next commit.

        Crash: Delivered events may be told again.
        """
        self.background.cancel()
        self.check()
        await self._send_all()

    async def _send_all(self) -> None:
        await self.send({}, {})
        if self.outbox.has_early:
            await self.outbox.catch_up()
            await self.send({}, {})

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Wait no longer for a store that cannot be used."""
        if self.tenure is not None:
            self.tenure.closing = True

    async def flush_last(self) -> None:
        """End the background task, and commit what waits for a commit if that is possible.

        Crash: As :meth:`flush`.
        """
        await self.background.finish()
        if self.is_open:
            try:
                await self._send_all()
            except HoldfastError as error:
                _log.warning("%s: at its end: %s", self._context, error)
        await self.lifeline.settle()

    async def let_go(self) -> None:
        """Release the context, so that others need not wait for the lease to end.

        Crash: It is let go of, or will be when the lease is over.
        """
        if not self.is_open or self.tenure is None:
            return
        self._letting_go = True  # from now on others may have it at any moment
        # A flush that a lapse of the lease began meanwhile would write the owner row anew, and the context would stay
        # owned, by a process that lives and does not run it.
        await self.background.finish()
        await self.lifeline.settle()
        try:
            async with self.tenure.turn:
                await self.tenure.release()
        except HoldfastError as error:
            _log.warning("%s: it stays owned until the lease is over: %s", self._context, error)
