"""The outbox: events that were committed with the state, delivered in order, at least once.

An event is *told* to the strategy's callbacks and to the listeners, then its trade is written to
the ledger, then it is handed to the iterator; when the iterator's next item is asked for it counts
as *delivered*, and its row is deleted with the next commit, or at most a second later.

Invariants:

* Events of a context are told in the order of their numbers; none is passed over.
* The row of an event is deleted only after everybody was told and its trade is in the ledger. A crash
  before that tells the event again, with the same id, before anything new.
* A listener that raises does not stop delivery: it had its chance, the error listeners know of it, and
  telling it the same event for ever would hold back the news of every later exit.
* At most ``CAP_ROWS`` events wait. Entries are refused from half of that on, so that exits always fit:
  an open signal can make at most 21 more (20 levels and its closing).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable

from ..contract import Key
from ..domains import event_key, ledger_key
from ..errors import ConflictError, CorruptedError
from ..names import Context
from ..rows import Event, Trade
from ..store import Store
from .lanes import Sleep, commit_surely
from .listeners import Failure, Listeners
from .registry import Callbacks

_log = logging.getLogger("holdfast")

CAP_ROWS = 1000
"""Most event rows of one context, delivered ones that are not yet deleted included."""


def trade_of(event: Event) -> Trade:
    """Return the ledger's row of a ``closed`` event."""
    signal = event.signal
    assert event.price_close is not None and event.pnl_percent is not None and event.reason is not None
    return Trade(
        id=signal.id,
        event_id=event.id,
        symbol=signal.symbol,
        exchange_name=signal.exchange_name,
        strategy_name=signal.strategy_name,
        position=signal.position,
        note=signal.note,
        price_open=signal.price_open,
        price_close=event.price_close,
        price_take_profit=signal.price_take_profit,
        price_stop_loss=signal.price_stop_loss,
        scheduled_at=signal.scheduled_at,
        pending_at=signal.pending_at,
        closed_at=event.at_ms,
        reason=event.reason,
        pnl_percent=event.pnl_percent,
        both_hit=event.both_hit,
    )


class Outbox:
    """The committed events of one context that are on their way.

    Args:
        context: Whose events they are.
        callbacks: The strategy's, told first.
        listeners: Told second: levels, then the live stream, then the combined one.
        store: Where the ledger lies.
        cap_rows: Most rows that may wait.
        sleep: Takes seconds; a seam for tests.
    """

    def __init__(
        self,
        context: Context,
        callbacks: Callbacks,
        listeners: Listeners,
        store: Store,
        *,
        cap_rows: int = CAP_ROWS,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.context = context
        self._callbacks = callbacks
        self._listeners = listeners
        self._store = store
        self._writer = store.writer(f"{context} ledger")
        self._cap_rows = cap_rows
        self._sleep = sleep
        self._waiting: deque[Event] = deque()
        self._told = 0
        """Number of the newest event that was told in this process."""
        self._delivered: list[Key] = []
        self.kept: set[int] = set()
        """Numbers of events that lie in the emergency journal: the store has neither them nor their trades yet."""
        self._unrecorded = 0
        """Number of the newest event that was told while it lay there, so that its trade is not on record yet."""
        self._early: list[Event] = []
        """Delivered while they were there, oldest first; their trades are still to be recorded."""

    def fresh(self) -> Outbox:
        """Return an empty one for the same context."""
        fresh = Outbox(
            self.context, self._callbacks, self._listeners, self._store, cap_rows=self._cap_rows, sleep=self._sleep
        )
        fresh._early = self._early
        return fresh

    def __len__(self) -> int:
        """How many events have not been delivered, or are not on record yet."""
        return len(self._waiting) + len(self._early)

    @property
    def waiting(self) -> tuple[Event, ...]:
        """The events that have not been delivered, oldest first."""
        return tuple(self._waiting)

    @property
    def crowded(self) -> bool:
        """Whether half of the rows are taken, so that no new signal may begin."""
        return 2 * (len(self._waiting) + len(self._delivered)) >= self._cap_rows

    def add(self, events: Iterable[Event]) -> None:
        """Take events that have just been committed, or were found at recovery, oldest first."""
        early = {event.number for event in self._early}
        self._waiting.extend(event for event in events if event.number not in early)

    async def tell_next(self) -> Event | None:
        """Tell of the oldest event and write its trade; return it for the iterator, or None when none waits.

        The event stays the oldest until :meth:`delivered` is called; calling again tells nobody twice.

        Raises:
            UnavailableError: The ledger cannot be written now; nothing is lost, call again later.

        Crash: The event is told again, with the same id.
        """
        if not self._waiting:
            return None
        event = self._waiting[0]
        if event.number > self._told:
            await self._listeners.tell(event, self._callbacks, "live")
            self._told = event.number
        if event.number in self.kept:
            self._unrecorded = event.number
        elif event.kind == "closed":
            await self._record(event)
        return event

    def delivered(self) -> None:
        """Count the oldest event as delivered; its row goes with the next deletion."""
        event = self._waiting.popleft()
        if event.number == self._unrecorded or self._early:  # rows go in the order of their numbers
            self._early.append(event)
        else:
            self._delivered.append(event_key(self.context, event.number))

    @property
    def has_early(self) -> bool:
        """Whether the store has by now what was delivered before it had it: :meth:`catch_up`."""
        return bool(self._early) and self._early[0].number not in self.kept

    async def catch_up(self) -> None:
        """Record the trades of events that were delivered before the store had them.

        Raises:
            UnavailableError: The ledger cannot be written now; call again later.

        Crash: Those events are told again, with the same ids.
        """
        while self.has_early:
            event = self._early[0]
            if event.kind == "closed":
                await self._record(event)
            self._early.pop(0)
            self._delivered.append(event_key(self.context, event.number))

    def take_delivered(self) -> list[Key]:
        """Return the rows to delete with the commit that is about to be made; :meth:`put_back` if it fails."""
        taken, self._delivered = self._delivered, []
        return taken

    def put_back(self, keys: list[Key]) -> None:
        """The commit that should have deleted ``keys`` did not happen."""
        self._delivered = keys + self._delivered

    async def record_trades(self) -> None:
        """Write the trades of events that nobody was told of yet; telling them later writes nothing twice.

        Raises:
            UnavailableError: The ledger cannot be written now; call again later.

        Crash: Some are written; the rest when they are told.
        """
        for event in self._waiting:
            if event.kind == "closed" and event.number not in self.kept:
                await self._record(event)

    async def _record(self, event: Event) -> None:
        trade, key = trade_of(event), ledger_key(self.context, event.signal.id)
        try:
            await commit_surely(self._writer, {key: trade}, {key: 0}, sleep=self._sleep)
        except ConflictError:
            await self._compare(key, trade, event)  # delivered before a crash, most likely

    async def _compare(self, key: Key, trade: Trade, event: Event) -> None:
        problem: Exception
        try:
            found = await self._store.get(key)
        except CorruptedError as error:
            problem = error
        else:
            if found is not None and found.row == trade:
                return
            problem = CorruptedError(f"the ledger holds another trade for {event.id}: compare both", key=key)
        await self._listeners.report(Failure(where="ledger", error=problem, context=self.context, at_ms=event.at_ms))
