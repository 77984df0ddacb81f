"""The simulated venue: the paper venue's books in simulated time, and one process's broker for them.

:class:`SharedVenue` keeps one account, which outlives every process. :class:`SimulatedBroker` is one life's way to it;
what goes wrong on that way is up to its line, and what the venue itself does with a request to the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from ...brokers.paper_book import PaperBook, cancelled, submitted
from ...brokers.paper_wire import Fault as PaperFault
from ...engine.broker import Features, OrderReport, OrderRequest, VenuePosition
from ...errors import UnavailableError
from .loop import Scheduler
from .market import START_MS
from .plan import VENUE, Fault, Plan
from .storage import Line

PART = 0.4
"""How much fills of what fills in part."""
_FAULTS: dict[str, PaperFault] = {
    "rejected": "reject", "partial": "partial", "part_only": "part_only", "resting": "resting",
}  # fmt: skip
_SOON_SECONDS = 2.0
"""After at most so long comes what crosses something else: the second of two, a fill after a cancellation."""


class Watcher(Protocol):
    """Who watches what is asked of the venue, before it is on its way."""

    def submitting(self, sender: Any, request: OrderRequest) -> None:
        """A life sends an order."""
        ...

    def unsent(self, request: OrderRequest) -> None:
        """What was to be sent was not: that is certain."""
        ...

    def cancelling(self, sender: Any, symbol: str, client_order_id: str) -> None:
        """A life sends a cancellation."""
        ...


class SharedVenue:
    """One account at a venue.

    Args:
        plan: What it promises, and what it does with which request, counted as they arrive.
        note: Puts a line on the record.
    """

    def __init__(self, plan: Plan, scheduler: Scheduler, note: Callable[[str], None]) -> None:
        assert plan.venue is not None
        self._scheduler, self._note = scheduler, note
        self.features = plan.venue.features
        self.book = PaperBook(self.features, lambda: START_MS + int(scheduler.now_seconds * 1000))
        self._deeds: dict[tuple[str, int], Fault] = {
            (one.call, int(one.at)): one for one in plan.faults if one.process == VENUE
        }
        self._arrived: Counter[str] = Counter()
        self.came_too_late: set[str] = set()
        """Orders that it refused because their time was over."""
        self.refused: Counter[str] = Counter()
        """How often it refused each order."""
        self.rested_seconds = 0.0
        """How long after its expiry an order filled that had rested until then."""

    def _deed(self, call: str) -> Fault | None:
        self._arrived[call] += 1
        return self._deeds.get((call, self._arrived[call]))

    def submit(self, request: OrderRequest) -> OrderReport:
        """Take or refuse an order that has arrived."""
        deed = self._deed("submit")
        kind = "" if deed is None else deed.kind
        report = submitted(self.book, request, _FAULTS.get(kind, ""), PART)
        self._note(f"venue: {kind or 'submit'} {_told(report)}")
        self.refused[request.client_order_id] += report.state in ("rejected", "expired")
        if report.state == "expired":
            self.came_too_late.add(request.client_order_id)
        if deed is not None and kind in ("resting", "partial"):
            self._later(deed.seconds, self._fill_at_last, request)
        elif deed is not None and kind == "twice":
            self._later(min(deed.seconds, _SOON_SECONDS), self._again, request)
        return report

    def cancel(self, client_order_id: str) -> OrderReport | None:
        """Cancel what rests."""
        deed = self._deed("cancel")
        report = cancelled(self.book, client_order_id, "fill_first" if deed and deed.kind == "fill_first" else "")
        if deed is not None and deed.kind == "fill_after" and report is not None and report.state == "cancelled":
            self._later(min(deed.seconds, _SOON_SECONDS), self._fill, client_order_id)
        self._note(f"venue: cancel {client_order_id if report is None else _told(report)}")
        return report

    def _later(self, seconds: float, act: Callable[..., None], *arguments: Any) -> None:
        self._scheduler.at(self._scheduler.now_seconds + seconds, act, *arguments)

    def _fill_at_last(self, request: OrderRequest) -> None:
        found = self.book.find(request.client_order_id)
        if found is not None and found.state in ("open", "partial"):
            late_seconds = self._scheduler.now_seconds - (request.expires_at_ms - START_MS) / 1000
            self.rested_seconds = max(self.rested_seconds, late_seconds)
            self._fill(request.client_order_id)

    def _fill(self, client_order_id: str) -> None:
        report = self.book.fill(client_order_id)
        self._note(f"venue: fill {_told(cast('OrderReport', report))}")

    def _again(self, request: OrderRequest) -> None:
        self._note(f"venue: again {_told(self.book.submit(request))}")


class SimulatedBroker:
    """One life's broker.

    Args:
        venue: Where the orders go.
        line: What may go wrong on the way.
        watcher: Told of each request before it is sent.
        sender: Whose it is.
    """

    account = "simulated"

    def __init__(self, venue: SharedVenue, line: Line, watcher: Watcher, *, sender: Any) -> None:
        self._venue, self._line, self._watcher, self._sender = venue, line, watcher, sender

    @property
    def features(self) -> Features:
        """What the venue promises."""
        return self._venue.features

    async def submit(self, request: OrderRequest) -> OrderReport:
        """Send an order once; as :class:`~holdfast.engine.broker.Broker`."""
        self._watcher.submitting(self._sender, request)
        venue, told = self._venue, f"{request.side} {request.quantity:g} {request.client_order_id}"
        try:
            report: OrderReport = await self._line.call("submit", lambda: venue.submit(request), told)
        except UnavailableError:
            self._watcher.unsent(request)
            raise
        return report

    async def find(self, symbol: str, client_order_id: str) -> OrderReport | None:
        """Return what the venue knows of an order."""
        book = self._venue.book
        report: OrderReport | None = await self._line.call("ask", lambda: book.find(client_order_id), client_order_id)
        return report

    async def cancel(self, symbol: str, client_order_id: str) -> OrderReport | None:
        """Ask to cancel an order."""
        self._watcher.cancelling(self._sender, symbol, client_order_id)
        venue = self._venue
        report: OrderReport | None = await self._line.call(
            "cancel", lambda: venue.cancel(client_order_id), client_order_id
        )
        return report

    async def open_orders(self, symbol: str | None = None) -> Sequence[OrderReport]:
        """Return what rests."""
        book = self._venue.book
        reports: list[OrderReport] = await self._line.call("ask", lambda: book.open_orders(symbol), "open orders")
        return reports

    async def history(self, symbol: str, since_ms: int) -> Sequence[OrderReport]:
        """Return what the venue took or changed since then."""
        book = self._venue.book
        reports: list[OrderReport] = await self._line.call("ask", lambda: book.history(symbol, since_ms), "history")
        return reports

    async def positions(self) -> Sequence[VenuePosition]:
        """Return what the account holds."""
        book = self._venue.book
        held: list[VenuePosition] = await self._line.call("ask", book.positions, "positions")
        return held

    async def close(self) -> None:
        """Nothing is held between two requests."""


def _told(report: OrderReport) -> str:
    return f"{report.side} {report.filled_quantity:g}/{report.quantity or 0:g} {report.client_order_id} {report.state}"
