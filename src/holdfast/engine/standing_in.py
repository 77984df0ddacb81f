"""Standing in: a start while the store can be read and not written.

Taking a context over is a commit, so a bot that is started again with its disk full could not even sell. Where nobody
else can own the context (the store belongs to one process, which its medium's lock says) it goes on all the same, from
what is stored and what is in the emergency journal: exits go to the journal, nothing begins, and the commit that takes
the context over is made up for before what is kept is merged.

Invariants:

* Only on a store of one process and in one place, with a journal that has room; elsewhere another owner may live, and
  only the commit that is missing could tell.
* Only for an exposure: something is open, or its orders are not settled. Else the start waits for the store.
* It goes on only from what is sound: nothing in quarantine, nothing to reconcile, and a journal that builds on the
  stored session row.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from ..contract import Key
from ..domains import context_key
from ..names import Context
from ..rows import Event, Order, Owner, PartialLevels, RiskPosition, Row, ScheduledSignal, SessionRow, Signal
from ..store import Loaded, Store
from .emergency import Kept, remaining, together
from .orders import Book
from .reconcile import Found, reconcile
from .recovery import Recovered, RecoveryReport, look, stopped_reasons


class StandIn(NamedTuple):
    """What a session goes on from, and the owner row that is still to be replaced."""

    recovered: Recovered
    """As if the context had been taken over; its session row is the stored one, before what is kept."""
    predecessor: Loaded[Owner]


async def stand_in(
    store: Store, context: Context, kept: Sequence[Kept], risk_names: tuple[str, ...], *,
    holder: str, now_ms: int, lifetime_ms: int,
) -> StandIn | None:  # fmt: skip
    """Work out what to go on from without owning; None where that is not possible or not needed. Writes nothing.

    Args:
        kept: What the emergency journal holds of the context.

    Raises:
        UnavailableError: The store cannot be read either.
    """
    if not belongs_to_one(store):
        return None
    owner_key = context_key("owner", context)
    found, _ = await store.salvage(owner_key)
    owner = cast("Loaded[Owner] | None", found.get(owner_key))
    if owner is None:
        return None  # it never ran: there is nothing to close
    looked = await look(store, context, risk_names, now_ms=now_ms, lifetime_ms=lifetime_ms)
    stored = looked.found.session
    todo = remaining(kept, stored)
    if looked.plan.changes or looked.plan.repairs or stored is None or todo is None or stopped_reasons(store, context):
        return None
    changes, _ = together(todo)
    with_kept = _with(context, looked.found, changes)
    plan = reconcile(context, with_kept, risk_names)
    orders = {key: loaded.row for key, loaded in (await store.scan("order", owner_key.entity_name)).items()}
    if plan.changes or not (plan.state.signal or _unsettled(orders | {k: r for k, r in changes.items() if r})):
        return None
    row = Owner(
        holder=holder, epoch=owner.row.epoch + 1, host=socket.gethostname(), pid=os.getpid(), since_ms=now_ms
    )  # fmt: skip
    recovered = Recovered(
        plan.state, plan.risk_names, Loaded(row, owner.version),
        Loaded(stored, looked.versions.get(context_key("session", context), 0)), with_kept.events,
        RecoveryReport(
            context=context, epoch=row.epoch, signal_id=None if plan.state.signal is None else plan.state.signal.id,
            scheduled_id=None if plan.state.scheduled is None else plan.state.scheduled.id,
            events_waiting=len(with_kept.events),
        ), None, looked.outages,
    )  # fmt: skip
    return StandIn(recovered, owner)


def belongs_to_one(store: Store) -> bool:
    """Whether no other process can own anything there, and one read shows all of it."""
    name = store.guarantees.backend
    return not store.guarantees.shared and not store.routes and name.startswith(("file:", "memory"))


def _with(context: Context, found: Found, changes: Mapping[Key, Row | None]) -> Found:
    """Return what would be found if the store had what is kept."""
    rows: dict[str, Row | None] = {
        "signal": found.signal, "schedule": found.scheduled, "partial": found.partial, "session": found.session
    }  # fmt: skip
    slots, events = dict(found.slots), {event.number: event for event in found.events}
    for key, row in changes.items():
        if key.domain in rows:
            rows[key.domain] = row
        elif isinstance(row, Event):
            events[row.number] = row
        elif isinstance(row, RiskPosition):
            slots[key] = row
        elif row is None and key.domain == "risk":
            slots.pop(key, None)
    return found._replace(
        signal=cast("Signal | None", rows["signal"]), scheduled=cast("ScheduledSignal | None", rows["schedule"]),
        partial=cast("PartialLevels | None", rows["partial"]), session=cast("SessionRow | None", rows["session"]),
        slots=slots, events=tuple(events[number] for number in sorted(events)),
    )  # fmt: skip


def _unsettled(rows: Mapping[Key, Row]) -> list[str]:
    return Book(row for row in rows.values() if isinstance(row, Order)).unsettled()
