"""Recovery: own, load, check, reconcile. (The gap is stepped over by whoever feeds the session candles.)

Every part can be killed and run again, because each is either a read or one commit that is worked out
from what was read and guarded by it: recovering twice gives what recovering once gives.

Reconciling works towards the signal row, the source of truth. A store that commits all or nothing never
needs it; a user's four-method class, or domains on different backends, may.

Which candles are forbidden to entries. A candle that changes nothing is not stored, so the store alone
cannot tell which candles after ``last_candle_ms`` the last process still saw. It does not have to: on those
that it saw, it declined (an entry would have been stored), and the pure step declines again. So all
candles after ``last_candle_ms`` but the newest are stepped with entries forbidden, and exactly those are
recorded as an :class:`~holdfast.rows.Outage`: the pure step over the same candles, with entries forbidden
in the recorded outages, gives the same trades, whether or not the last process saw them.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import NamedTuple, cast

import msgspec

from ..contract import Key, KeyPrefix
from ..domains import context_key, guard_key, risk_key
from ..errors import ConflictError, NotFoundError, UnavailableError
from ..names import Context
from ..rows import (
    Event,
    Guard,
    Outage,
    Owner,
    PartialLevels,
    RiskPosition,
    Row,
    ScheduledSignal,
    SessionRow,
    Signal,
    Trade,
)
from ..rules.drafts import stored_failures
from ..rules.signals import State
from ..spans import roll_forward
from ..store import Loaded, Store, Writer
from .commits import Recorded
from .lanes import Sleep, commit_surely
from .ownership import Claim, own, refuse_newer
from .reconcile import Found, Plan, Repair, nameless_slot, reconcile

_log = logging.getLogger("holdfast")

MAX_ATTEMPTS = 20
"""How often recovery reads again when other contexts change a shared profile meanwhile."""

_STOPPING_DOMAINS = ("signal", "schedule", "partial", "session", "outbox", "order")


class RecoveryReport(msgspec.Struct, frozen=True, kw_only=True):
    """What recovery found and did."""

    context: Context
    epoch: int
    signal_id: str | None = None
    scheduled_id: str | None = None
    events_waiting: int = 0
    repairs: tuple[Repair, ...] = ()
    stopped: tuple[str, ...] = ()
    """What is in quarantine, and why; while anything is, nothing opens for this context."""


class Recovered(NamedTuple):
    """What a session goes on from."""

    state: State
    risk_names: tuple[str, ...]
    """Profiles in which the open signal holds a slot."""
    owner: Loaded[Owner]
    session: Loaded[SessionRow] | None
    events: tuple[Event, ...]
    report: RecoveryReport
    ignored: Loaded[ScheduledSignal] | None
    """A schedule row that is there but does not wait."""
    outages: Recorded
    """Where entries were forbidden, as far as it is on record."""


def stopped_reasons(store: Store, context: Context) -> tuple[str, ...]:
    """Return why nothing may open for ``context``; empty when nothing of it is in quarantine."""
    if not store.damaged:
        return ()
    name = context_key("signal", context).entity_name
    return tuple(
        reason for key, reason in store.damaged.items() if key.entity_name == name and key.domain in _STOPPING_DOMAINS
    )


class Looked(NamedTuple):
    """What is stored of a context, and what recovery would make of it."""

    context: Context
    found: Found
    versions: Mapping[Key, int]
    plan: Plan
    outages: Recorded


async def look(store: Store, context: Context, risk_names: tuple[str, ...], *, now_ms: int, lifetime_ms: int) -> Looked:
    """Load and check one context as recovery does, and work out what reconciling would write; owns and writes nothing.

    On a store that was opened for writing, a row that contradicts its key is moved to quarantine.
    """
    found, versions = await _load(store, context, risk_names, now_ms=now_ms, lifetime_ms=lifetime_ms)
    plan = reconcile(context, found, risk_names)
    return Looked(context, found, versions, plan, await _recorded_outages(store, context))


async def recover(
    store: Store,
    writer: Writer,
    context: Context,
    *,
    holder: str,
    risk_names: tuple[str, ...],
    lifetime_ms: int,
    clock: Callable[[], int],
    sleep: Sleep,
    claim: Claim = Claim(),
    merge: Callable[[Loaded[Owner]], Awaitable[Loaded[Owner]]] | None = None,
) -> Recovered:
    """Own, merge, load, check and reconcile one context.

    Args:
        risk_names: The profiles that its strategy has now.
        lifetime_ms: Longest life of a signal; older slots of others without a signal are pruned.
        clock: Tells the time in epoch milliseconds.
        claim: What to do about an owner that may be alive.
        merge: Commits what an emergency journal keeps of it, under the owner row, and returns that row. It comes before
            anything is repaired: what is repaired first would look like the work of another owner.

    Raises:
        HeldError: Another process owns it and lives; the message names it.
        UnavailableError: The store cannot be used now; call again.

    Crash: Any part may be done or not; recovering again does the rest.
    """
    owner = await own(store, writer, context, holder=holder, now_ms=clock(), sleep=sleep, claim=claim)
    if store.may_be_unfinished(str(context)):  # what the last owner had decided, and nobody else may carry out
        await roll_forward(store, lambda lane: lane == str(context))
    if merge is not None:
        owner = await merge(owner)
    for _ in range(MAX_ATTEMPTS):
        found, versions = await _load(store, context, risk_names, now_ms=clock(), lifetime_ms=lifetime_ms)
        plan = reconcile(context, found, risk_names)
        session = found.session
        session_key = context_key("session", context)
        session_version = versions.get(session_key, 0)
        if plan.changes:
            guards = {Key("guard", name, "guard") for name in plan.profiles}
            changes = plan.changes | {key: _next_guard(versions_row) for key, versions_row in _rows(versions, guards)}
            expect = {context_key("owner", context): owner.version, session_key: session_version}
            expect |= {key: versions.get(key, 0) for key in guards}
            try:
                number = await commit_surely(writer, changes, expect, sleep=sleep)
            except ConflictError:
                continue  # another context changed a shared profile meanwhile: look again
            if session_key in plan.changes:
                session, session_version = cast("SessionRow", plan.changes[session_key]), number
        for repair in plan.repairs:
            _log.warning("%s: recovery: %s: %s", context, repair.what, repair.message)
        report = RecoveryReport(
            context=context,
            epoch=owner.row.epoch,
            signal_id=None if plan.state.signal is None else plan.state.signal.id,
            scheduled_id=None if plan.state.scheduled is None else plan.state.scheduled.id,
            events_waiting=len(found.events),
            repairs=plan.repairs,
            stopped=stopped_reasons(store, context),
        )
        loaded = None if session is None else Loaded(session, session_version)
        outages = await _recorded_outages(store, context)
        schedule_key = context_key("schedule", context)
        stands = plan.state.scheduled is None and schedule_key not in plan.changes
        ignored = None
        if stands and found.scheduled is not None:
            ignored = Loaded(found.scheduled, versions[schedule_key])
        return Recovered(plan.state, plan.risk_names, owner, loaded, found.events, report, ignored, outages)
    raise UnavailableError(f"{context}: its risk profiles change too often to be reconciled: start it again")


class _Versions(dict[Key, int]):
    """Versions of what was read, and the guard rows beside them."""

    guards: dict[Key, Guard]


def _rows(versions: _Versions, guards: Iterable[Key]) -> list[tuple[Key, Guard | None]]:
    return [(key, versions.guards.get(key)) for key in sorted(guards)]


def _next_guard(row: Guard | None) -> Guard:
    return Guard(changes=1 if row is None else row.changes + 1)


async def _load(
    store: Store, context: Context, risk_names: tuple[str, ...], *, now_ms: int, lifetime_ms: int
) -> tuple[Found, _Versions]:
    """Read what belongs to the context; a row that contradicts its key goes to quarantine."""
    keys = {domain: context_key(domain, context) for domain in ("signal", "schedule", "partial", "session")}
    found, damaged = await store.salvage(*keys.values())
    refuse_newer(store, damaged)
    for domain, key in keys.items():
        if key in found and (reason := _contradiction(domain, found[key].row, context)):
            if store.read_only:
                store.damaged[key] = f"{key}: {reason}"
                del found[key]
                continue
            try:
                await store.quarantine(key, reason)
            except NotFoundError:
                pass  # cleared meanwhile
            _log.error("%s: %s: %s: moved to quarantine: nothing opens until it is released", context, key, reason)
            del found[key]
    session = cast("SessionRow | None", found[keys["session"]].row if keys["session"] in found else None)
    events = cast("dict[Key, Loaded[Event]]", await store.scan("outbox", keys["session"].entity_name))
    trades: Mapping[Key, Loaded[Trade]] = {}
    if session is None:
        trades = cast("dict[Key, Loaded[Trade]]", await store.scan("ledger", keys["session"].entity_name))
    names = tuple(dict.fromkeys((*risk_names, *(session.risk_names if session else ()))))
    guards, _ = await store.salvage(*(guard_key(name) for name in names))  # before the slots, which they guard
    slots = await _slots(
        store, context, names, oldest_ms=now_ms - lifetime_ms, is_open=_is_open(found.get(keys["signal"]))
    )
    versions = _Versions({key: loaded.version for key, loaded in (found | guards).items()})
    versions.guards = {key: cast("Guard", loaded.row) for key, loaded in guards.items()}
    rows = {domain: found[key].row if key in found else None for domain, key in keys.items()}
    return (
        Found(
            signal=cast("Signal | None", rows["signal"]),
            scheduled=cast("ScheduledSignal | None", rows["schedule"]),
            partial=cast("PartialLevels | None", rows["partial"]),
            session=session,
            events=tuple(loaded.row for loaded in events.values()),
            trades=tuple(loaded.row for loaded in trades.values()),
            slots=slots,
            signal_stopped=store.is_stopped(keys["signal"]) and rows["signal"] is None,
            session_lost=store.is_stopped(keys["session"]) and session is None,
        ),
        versions,
    )


async def _slots(
    store: Store, context: Context, names: Iterable[str], *, oldest_ms: int, is_open: bool
) -> dict[Key, RiskPosition]:
    """Return the own slots in ``names``, and those of others that outlived every signal and have none.

    With a signal open, a slot of its symbol and strategy that names no exchange (the documents' rows never do) is its
    own, unless it has one already.
    """
    slots: dict[Key, RiskPosition] = {}
    for name in names:
        mine = risk_key(name, context)
        listed = await store.scan("risk", mine.entity_name)
        nameless = nameless_slot(mine, context) if is_open and mine not in listed else mine
        for key, loaded in listed.items():
            row = cast("RiskPosition", loaded.row)
            if key in (mine, nameless):
                slots[key] = row
            elif row.open_timestamp <= oldest_ms:
                signal_key = context_key("signal", Context(row.exchange_name or "-", row.symbol, row.strategy_name))
                signal_key = signal_key._replace(entity_name=key.entity_id)
                found, damaged = await store.salvage(signal_key)
                if not found and not damaged:
                    slots[key] = row
    return slots


async def _recorded_outages(store: Store, context: Context) -> Recorded:
    keys = await store.keys(KeyPrefix("outage", context_key("outage", context).entity_name))
    if not keys:
        return Recorded()
    found, _ = await store.salvage(keys[-1])  # byte order is the order of time
    newest = next((cast("Outage", loaded.row) for loaded in found.values()), None)
    whole = keys if newest is not None else keys[:-1]  # what cannot be read is not to be replaced
    return Recorded(tuple(int(key.entity_id) for key in whole), newest)


def _is_open(loaded: Loaded[Row] | None) -> bool:
    return loaded is not None and not cast("Signal", loaded.row).is_scheduled


def _contradiction(domain: str, row: Row, context: Context) -> str | None:
    """Return how a row contradicts the key it was found under, or what makes it impossible; None when it is sound."""
    if isinstance(row, Signal):
        if row.context != context:
            return f"it says that it belongs to {row.context}, not to {context}"
        failures = stored_failures(row)
        if failures:
            return "it cannot be watched: " + "; ".join(failures)
    elif isinstance(row, SessionRow) and Context(*row.context) != context:
        return f"it says that it belongs to {Context(*row.context)}, not to {context}"
    return None
