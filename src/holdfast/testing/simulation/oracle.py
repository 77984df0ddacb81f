"""What must be true of every history, judged at each accepted commit, at each event that is told, and at the end.

The oracle sits at the storage and at the listeners: it believes nothing that a session says of itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from ...contract import Key, Op, Record
from ...domains import context_key, decode, event_key, ledger_key
from ...engine.outbox import trade_of
from ...engine.ownership import OnConflict
from ...invariants import check
from ...rows import Event, Outage, Owner, Row, SessionRow, Trade
from .market import SimulatedMarket, context_of
from .plan import Plan
from .pure import pure_rows
from .trades import TradeOracle

_OWNED = frozenset(("signal", "schedule", "partial", "session", "outbox", "outage", "order"))
_YIELDED = frozenset(("opened", "closed", "cancelled"))


class Sender(Protocol):
    """One life of a process, as the oracle knows it."""

    name: str
    on_conflict: OnConflict
    looked_seconds: float
    """When it last read the signs of life of others."""

    def clock_ms(self) -> int:
        """Its wall clock."""
        ...


class Oracle:
    """Judges one history.

    Args:
        plan: What is played.
        market: The candles.
        now: Tells the time in seconds.
        violate: Told the first thing that must not be, and every other.
    """

    def __init__(
        self, plan: Plan, market: SimulatedMarket, now: Callable[[], float], violate: Callable[[str], None]
    ) -> None:
        self._plan, self._market, self._now, self._violate = plan, market, now, violate
        self.rows: dict[Key, Row] = {}
        """What is stored, decoded."""
        self.trades: TradeOracle | None = None
        """Judges the orders, where there are any."""
        self._contexts = {self._name(one.number): context_of(one.number) for one in plan.contexts}
        self._is_calm = len(plan.processes) == 1 and not plan.faults and plan.lag_seconds < 0.1
        self._writers: dict[str, str] = {}
        """For each context, the lane that wrote its owner row."""
        self._beats: dict[str, list[tuple[float, bool]]] = defaultdict(list)
        """When the storage took each sign of life of a process; False: its deletion, as it ended in good order."""
        self._events: dict[str, dict[int, Event]] = defaultdict(dict)
        """Every event that was ever committed."""
        self._kept: dict[Key, Event] = {}
        """Events that lie, or lay, in an emergency journal."""
        self._told: Counter[str] = Counter()
        self._done: set[tuple[Sender, str, int]] = set()
        """Events that a process has told to the end."""
        self._handled: set[tuple[Sender, str, int]] = set()
        """Events that the user of a process's iterator has had, to the end."""

    @staticmethod
    def _name(number: int) -> str:
        return context_key("owner", context_of(number)).entity_name

    # ------------------------------------------------------------------ commits

    def accepted(self, scope: str, number: int, op: Op, changes: Mapping[Key, Record | None], sender: Any) -> None:
        """Judge a commit that the storage is about to apply."""
        decoded = {key: None if record is None else decode(key, record.payload) for key, record in changes.items()}
        if scope == "main":
            self._at_home(op, decoded, sender)
            if self.trades is not None:
                self.trades.accepted(op, decoded, sender)
        elif scope == "main.ledger":
            for key in decoded:
                if key in self.rows:
                    self._violate(f"{key}: a trade of the ledger was changed")
        for key, row in decoded.items():
            if row is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = row
            if key.domain == "worker":
                self._beats[key.entity_name].append((self._now(), row is not None))
        if scope == "main" and any(key.domain not in ("owner", "outage") for key in decoded):
            for broken in check(self.rows):
                self._violate(f"after a commit of {op.writer}: {broken}")
            held = Counter(key.entity_name for key in self.rows if key.domain == "risk")
            for risk_name, count in held.items():
                if count > self._plan.limit:
                    self._violate(f"{count} signals are open under {risk_name}, whose limit is {self._plan.limit}")

    def _at_home(self, op: Op, decoded: Mapping[Key, Row | None], sender: Sender) -> None:
        for key, row in decoded.items():
            if key.domain == "owner":
                self._owned(key, cast("Owner | None", row), op, sender)
        for key, row in decoded.items():
            name = key.entity_id if key.domain == "risk" else key.entity_name
            if key.domain not in _OWNED and key.domain != "risk":
                continue
            owner = cast("Owner | None", self.rows.get(Key("owner", name, "owner")))
            if owner is None or self._writers.get(name) != op.writer or owner.released:
                self._violate(f"{key}: {op.writer} of {sender.name} wrote it, though it does not own {name}")
            if key.domain == "outbox":
                self._event(key, cast("Event | None", row), sender)
            elif key.domain == "outage" and self._is_calm and sender.name.startswith("p0."):
                outage, symbol = cast("Outage", row), self._contexts[name].symbol
                missed = [one for one in self._market.candles[symbol] if outage.from_ms <= one[0] <= outage.to_ms]
                if outage.from_ms and missed:
                    self._violate(f"{key}: an outage was recorded in a run without a fault")
            elif key.domain == "session":
                before = cast("SessionRow | None", self.rows.get(key))
                after = cast("SessionRow | None", row)
                if after is None or (before is not None and after.last_candle_ms < before.last_candle_ms):
                    self._violate(f"{key}: the session went back in time")

    def _owned(self, key: Key, row: Owner | None, op: Op, sender: Sender) -> None:
        name, before = key.entity_name, cast("Owner | None", self.rows.get(key))
        if row is None:
            self._violate(f"{key}: an owner row was deleted")
            return
        if before is not None and row.epoch == before.epoch:
            is_same = row == before or (row.released and row.holder == before.holder)  # written anew as a proof; let go
            if not (is_same and self._writers.get(name) == op.writer):
                self._violate(f"{key}: {op.writer} wrote epoch {row.epoch} again")
        elif row.epoch != (0 if before is None else before.epoch) + 1:
            self._violate(f"{key}: epoch {row.epoch} came after {0 if before is None else before.epoch}")
        else:
            self._writers[name] = op.writer
        if self.trades is not None and not row.released:
            self.trades.owned(name, op, sender)
        if before is None or before.released or row.holder == before.holder or sender.on_conflict == "takeover":
            return
        seen = [beat for beat in self._beats[before.holder] if beat[0] <= sender.looked_seconds]
        if Key("worker", before.holder, "beat") in self.rows and seen and seen[-1][1]:  # it may have woken since
            unseen = sender.looked_seconds - seen[-1][0]
            if unseen < self._plan.lease_seconds - 1e-6:
                self._violate(f"{name}: {sender.name} replaced {before.holder} {unseen:.3f} s after its sign of life")

    def _event(self, key: Key, row: Event | None, sender: Sender) -> None:
        name, number = key.entity_name, int(key.entity_id)
        events = self._events[name]
        if row is not None:
            if number != len(events) + 1:
                self._violate(f"{key}: event {len(events) + 1} should come next")
            events[number] = row
            return
        if (sender, name, number) not in self._done:
            self._violate(f"{key}: {sender.name} deleted an event that it had not told to the end")
        event = events.get(number)
        if event is not None and event.kind in _YIELDED and (sender, name, number) not in self._handled:
            self._violate(f"{key}: {sender.name} deleted an event that its user had not handled")
        if event is not None and event.kind == "closed":
            context = self._contexts[name]
            if self.rows.get(ledger_key(context, event.signal.id)) != trade_of(event):
                self._violate(f"{key}: the closing event was deleted before its trade was in the ledger")

    def refused(self, sender: Sender, told: str) -> None:
        """Take note that a process was told that a commit of its is refused."""
        if self.trades is not None:
            self.trades.refused(sender, told, self._writers)

    def beat_seconds(self, holder: str) -> float | None:
        """Return when the storage took a process's last sign of life; None: never."""
        return max((when for when, lives in self._beats[holder] if lives), default=None)

    def fenced(self, sender: Sender, number: int) -> None:
        """Judge that a process was told that somebody else owns a context."""
        owner = cast("Owner | None", self.rows.get(context_key("owner", context_of(number))))
        if owner is not None and owner.holder == sender.name and not owner.released:
            self._violate(f"{sender.name} was told that it is fenced, though it owns {context_of(number)}")

    # ------------------------------------------------------------------ events

    def kept(self, rows: Mapping[Key, Row | None]) -> None:
        """Take note of a commit that was written to an emergency journal."""
        for key, row in rows.items():
            if key.domain == "outbox" and row is not None:
                self._kept[key] = cast("Event", row)
        if self.trades is not None:
            self.trades.kept(rows)

    def telling(self, sender: Sender, event: Event) -> None:
        """Judge an event that listeners are about to be told."""
        name = context_key("owner", event.signal.context).entity_name
        stored = self._events[name].get(event.number) or self._kept.get(event_key(event.signal.context, event.number))
        if stored is None:
            self._violate(f"{event.id}: {sender.name} told it before it was committed")
        elif stored != event:
            self._violate(f"{event.id}: {sender.name} told another event than the one that was committed")
        if event.number > self._told[name] + 1:
            self._violate(f"{event.id}: {sender.name} told it before event {self._told[name] + 1}")
        self._told[name] = max(self._told[name], event.number)

    def told(self, sender: Sender, event: Event) -> None:
        """Note that every listener has returned."""
        self._done.add((sender, context_key("owner", event.signal.context).entity_name, event.number))

    def handled(self, sender: Sender, event: Event) -> None:
        """Note that the user of an iterator has asked for the next event."""
        self._handled.add((sender, context_key("owner", event.signal.context).entity_name, event.number))

    def count(self) -> int:
        """Return how many different events were committed."""
        return sum(map(len, self._events.values()))

    # ------------------------------------------------------------------ the end

    def judge_end(self) -> None:
        """Judge what is left when every context was run to the end of the market without a fault."""
        for name, context in self._contexts.items():
            session = cast("SessionRow | None", self.rows.get(context_key("session", context)))
            if session is None:
                self._violate(f"{context} never began")
                continue
            if self._told[name] != len(self._events[name]) or session.last_event != len(self._events[name]):
                self._violate(f"{context}: {len(self._events[name])} events, of which {self._told[name]} were told")
            left = [event_key(context, n) for n in self._events[name] if event_key(context, n) in self.rows]
            if left:
                self._violate(f"{left[0]}: it was told and is still there")
            closed = {
                ledger_key(context, e.signal.id): trade_of(e) for e in self._events[name].values() if e.kind == "closed"
            }
            trades = {k: r for k, r in self.rows.items() if isinstance(r, Trade) and k.entity_name == name}
            if closed != trades:
                self._violate(f"{context}: the ledger has {len(trades)} trades, of {len(closed)} that were closed")
        if self.trades is not None:
            self.trades.judge_end()
        self._compare()

    def _compare(self) -> None:
        """The pure step with entries forbidden in the recorded outages must come to the same rows."""
        binding = 0 < self._plan.limit < sum(bool(one.risk_name) for one in self._plan.contexts)
        for one in self._plan.contexts:
            if one.risk_name and binding:
                continue  # who comes first under a limit is decided by time, not by candles
            context = context_of(one.number)
            name = self._name(one.number)
            outages = [r for k, r in self.rows.items() if isinstance(r, Outage) and k.entity_name == name]
            withdrawn = {
                event.signal.id: event for event in self._events[name].values()
                if event.kind == "cancelled" and str(event.reason).startswith("order_")
            }  # fmt: skip
            wanted = pure_rows(self._market, context, one.interval, outages, withdrawn)
            found = {
                key: row for key, row in self.rows.items()
                if key.entity_name == name and key.domain in ("signal", "schedule", "ledger")
            }  # fmt: skip
            if wanted != found:
                odd = sorted(str(key) for key in {*wanted, *found} if wanted.get(key) != found.get(key))
                self._violate(f"{context}: not what the pure step comes to: {', '.join(odd[:3])}")
