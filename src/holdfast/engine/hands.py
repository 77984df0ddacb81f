"""The operator's hands: adopt, close and clear, each one commit that says who did it, when, and what it changed.

Invariants:

* A context that a live process owns is left alone: the commit expects the owner row, raises its epoch and lets go of
  it, so that whoever owned it and only slept is fenced.
* What a hand does to one row is completed by the same reconciling that recovery does, in the same commit: every
  invariant holds afterwards.
* No byte is thrown away: what is cleared stays in quarantine, marked as released.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import msgspec

from ..contract import Key, KeyPrefix
from ..domains import context_key, guard_key, ledger_key, risk_key, to_mapping
from ..errors import ConflictError, HeldError, InvalidInputError, NotFoundError, UnavailableError
from ..names import Context, unquote
from ..quarantine import kept_rows, released_key
from ..rows import Audit, Event, Guard, Outage, Owner, Row, SessionRow, Signal
from ..rules.candles import MINUTE_MS, Candle
from ..rules.drafts import stored_failures
from ..rules.params import Params, get_config
from ..rules.signals import Spec, State, Transition, take_over
from ..store import Loaded, Store
from .commits import changes, outage_key
from .lanes import Sleep, commit_surely
from .outbox import trade_of
from .plan import ended
from .reconcile import Plan, reconcile
from .recovery import Looked, look
from .salvaging import context_of, readable
from .session import wall_clock_ms
from .worker import Life, Watch, describe

MAX_ATTEMPTS = 20
FARTHEST_MS = 7 * 1440 * MINUTE_MS
"""How far from the last decision the present may be before a time has to be named: a paper market has its own."""

_NOT_TOLD = ("guard", "owner", "audit", "quarantine")


class Done(NamedTuple):
    """What a hand did."""

    audit: Audit
    event: Event | None = None


class _Wanted(NamedTuple):
    """What is to be committed, worked out from what was read."""

    changes: dict[Key, Row | None]
    expect: dict[Key, int]
    event: Event | None = None
    released: Key | None = None


class Hands:
    """One operator at one store.

    Args:
        store: Open for writing.
        operator: user@host.
        why: For the record.
        params: Fees and slippage, for the PnL of what is closed.
        risk_names: Profiles of the strategy concerned, by its name; without it, those in which it holds slots.
        clock, sleep: Seams for tests.
        watch: Judges whether an owner lives; default: where the store may be shared.
    """

    def __init__(
        self,
        store: Store,
        *,
        operator: str,
        why: str = "",
        params: Params | None = None,
        risk_names: Mapping[str, tuple[str, ...]] | None = None,
        clock: Callable[[], int] = wall_clock_ms,
        sleep: Sleep = asyncio.sleep,
        watch: Watch | None = None,
    ) -> None:
        self._store, self._operator, self._why = store, operator, why
        self._params = get_config() if params is None else params
        self._risk_names = dict(risk_names or {})
        self._clock, self._sleep = clock, sleep
        self._watch = watch or (Watch(store) if store.guarantees.shared else None)
        self._writer = store.writer("operator")
        self._names: tuple[str, ...] = ()
        """Risk profiles of the context that was looked at last."""

    @property
    def now_ms(self) -> int:
        """The present, in epoch milliseconds."""
        return self._clock()

    # ------------------------------------------------------------------ adopt

    async def adopt(self, key: Key) -> Done:
        """Take the row that lies in quarantine for ``key`` as this context's own, and let the context trade again.

        Raises:
            NotFoundError: Nothing of it is in quarantine.
            InvalidInputError: Its bytes cannot be read, or it cannot be true: clear it.
            HeldError: A live process owns the context.

        Crash: All of it is done, or nothing.
        """
        context = await context_of(self._store, key.entity_name)
        if context is None or key.domain not in ("signal", "schedule", "partial", "session"):
            raise InvalidInputError(
                f"{key} cannot be adopted, only a signal, schedule, partial or session row: clear it"
            )
        return await self._do("adopt", str(key), key.entity_name, context, lambda seen: self._adopted(key, seen))

    async def _adopted(self, key: Key, seen: Looked) -> _Wanted:
        held = await self._store.quarantined(key.domain, key.entity_name)
        row = readable(key, seen.context, held)
        domain = {"schedule": "scheduled"}.get(key.domain, key.domain)
        if getattr(seen.found, domain) is not None:
            raise InvalidInputError(f"{key}: another row stands there: clear the one in quarantine")
        if isinstance(row, Signal) and (failures := stored_failures(row)):
            raise InvalidInputError(f"{key} cannot be watched: {'; '.join(failures)}: clear it")
        more: dict[str, Any] = {domain: row, "signal_stopped": False}
        if key.domain == "session":
            more = {domain: row, "session_lost": False, "signal_stopped": seen.found.signal_stopped}
        elif key.domain != "signal":
            more = {domain: row}
        plan = reconcile(seen.context, seen.found._replace(**more), self._names)
        if key in plan.changes and plan.changes[key] is None:
            reason = next(repair.message for repair in plan.repairs if repair.key == key)
            raise InvalidInputError(f"{key}: {reason}: clear it")
        freed, expect = await self._store.release_changes(key)
        return _Wanted(
            {**freed, key: row, **plan.changes, **await self._guards(plan.profiles, expect)},
            {**expect, key: 0}, released=key,
        )  # fmt: skip

    async def take_over(self, context: Context, signal: Signal, *, at_ms: int | None = None) -> Done:
        """Put a position that came about elsewhere under the context's watch, with an ``opened`` event.

        Args:
            signal: As it is; its context is ``context``.
            at_ms: When it was put there; default: now.

        Raises:
            InvalidInputError: It cannot be true, or something is open, waits or is in quarantine there already.
            HeldError: A live process owns the context.

        Crash: All of it is done, or nothing.
        """
        if failures := stored_failures(signal):
            raise InvalidInputError(f"the position cannot be watched: {'; '.join(failures)}")

        async def wanted(seen: Looked) -> _Wanted:
            state = seen.plan.state
            stands = state.signal or state.scheduled
            self._require_free(seen, context)
            if stands is not None:
                raise InvalidInputError(f"{context}: {stands.id!r} is there already: close it first")
            if signal.id in state.closed_ids or await self._store.get(ledger_key(context, signal.id)):
                raise InvalidInputError(f"the id {signal.id!r} was used before: name another with --id")
            candle = self._candle(state, at_ms, signal.price_open)
            return await self._moved(seen, take_over(state, self._spec(seen), candle, signal))

        name = context_key("signal", context).entity_name
        return await self._do("adopt", str(context), name, context, wanted)

    # ------------------------------------------------------------------ close

    async def close(self, context: Context, price: float, *, at_ms: int | None = None) -> Done:
        """Close what is open at ``price``, or cancel what waits: a transition with its event and its trade.

        Nothing is sent to a venue.

        Args:
            at_ms: When; default: now.

        Raises:
            NotFoundError: Nothing is open and nothing waits.
            InvalidInputError: Its row is in quarantine, or the time is far from the last decision.
            HeldError: A live process owns the context.

        Crash: All of it is done, or nothing; the trade is written a moment later, or by the next run.
        """

        async def wanted(seen: Looked) -> _Wanted:
            state = seen.plan.state
            if state.signal is None and state.scheduled is None:
                self._require_free(seen, context)
                raise NotFoundError(f"{context}: nothing is open and nothing waits")
            candle = self._candle(state, at_ms, price)
            transition = ended(state, self._spec(seen), candle, price, "operator")
            assert transition is not None
            return await self._moved(seen, transition)

        done = await self._do("close", str(context), context_key("signal", context).entity_name, context, wanted)
        if done.event is not None and done.event.kind == "closed":
            await self._record(context, done.event)
        return done

    async def _record(self, context: Context, event: Event) -> None:
        key, trade = ledger_key(context, event.signal.id), trade_of(event)
        try:
            await commit_surely(self._store.writer("operator ledger"), {key: trade}, {key: 0}, sleep=self._sleep)
        except ConflictError:
            pass  # the event is told by the next run, which compares

    # ------------------------------------------------------------------ clear

    async def clear(self, key: Key) -> Done:
        """Remove a row that means nothing; its bytes stay in quarantine, marked as released.

        Raises:
            NotFoundError: There is no such row, nor one in quarantine.
            InvalidInputError: It means something: a position, or what belongs to one.
            HeldError: A live process owns the context.

        Crash: All of it is done, or nothing.
        """
        owner = key.entity_id if key.domain == "risk" else key.entity_name
        context = await context_of(self._store, owner)

        async def wanted(seen: Looked | None) -> _Wanted:
            if self._store.is_stopped(key):
                return await self._released(key, seen)
            return await self._removed(key, seen)

        return await self._do("clear", str(key), owner, context, wanted)

    async def _released(self, key: Key, seen: Looked | None) -> _Wanted:
        freed, expect = await self._store.release_changes(key)
        plan: Plan | None = None
        if seen is not None:
            # While its session row is in quarantine, reconciling leaves a hole in the numbers: keep it so.
            stopped = seen.found.signal_stopped and key.domain != "signal"
            plan = reconcile(seen.context, seen.found._replace(signal_stopped=stopped), self._names)
        profiles = () if plan is None else plan.profiles
        if key.domain == "risk":
            profiles = tuple({*profiles, key.entity_name})
        guards = await self._guards(profiles, expect)
        return _Wanted({**freed, **(plan.changes if plan else {}), **guards}, expect, released=key)

    async def _removed(self, key: Key, seen: Looked | None) -> _Wanted:
        if key.domain not in ("partial", "risk"):
            remedy = "close it" if key.domain in ("signal", "schedule") else "the engine keeps it in order by itself"
            raise InvalidInputError(f"{key} is not in quarantine, and means something: {remedy}")
        place = self._store.place(key)
        record = (await place.backend.read(place.scope, [key])).get(key)
        if record is None:
            raise NotFoundError(f"{key}: there is no such row, nor one in quarantine", key=key)
        if seen is not None and (seen.plan.state.signal is not None or seen.found.signal_stopped):
            raise InvalidInputError(f"{key} belongs to what is open (or in quarantine) there: close or clear that")
        number = (await self._store.head()).number
        kept = kept_rows(key, record, f"cleared by {self._operator}", number)
        expect = {**{released_key(one): 0 for one in kept}, key: record.version}
        plan_changes = {} if seen is None else seen.plan.changes
        profiles = set(() if seen is None else seen.plan.profiles) | (
            {key.entity_name} if key.domain == "risk" else set()
        )
        return _Wanted(
            {**plan_changes, key: None, **{released_key(one): row for one, row in kept.items()},
             **await self._guards(tuple(profiles), expect)},
            expect,
        )  # fmt: skip

    # ------------------------------------------------------------------ the commit

    async def _do(
        self, action: Any, target: str, name: str, context: Context | None, wanted: Callable[[Any], Any]
    ) -> Done:
        """Commit what ``wanted`` makes of what is stored, with the audit, under the owner row; again where it moved."""
        owner_key = Key("owner", name, "owner")
        for _ in range(MAX_ATTEMPTS):
            owner = await self._unowned(owner_key, name if context is None else str(context))
            seen = None if context is None else await self._look(context)
            want: _Wanted = await wanted(seen)
            expect = {owner_key: 0 if owner is None else owner.version, **want.expect}
            rows = dict(want.changes)
            if seen is not None:
                for domain in ("session", "signal", "schedule"):
                    key = context_key(domain, cast("Context", context))
                    expect.setdefault(key, seen.versions.get(key, 0))
            audit = await self._audit(action, target, rows)
            audit_key = Key("audit", name, f"{audit.at_ms:015d}-{secrets.token_hex(4)}")
            rows[audit_key] = audit
            expect[audit_key] = 0
            if owner is not None:
                rows[owner_key] = self._next_owner(owner.row)
            try:
                await commit_surely(self._writer, rows, expect, sleep=self._sleep)
            except ConflictError:
                continue
            if want.released is not None:
                self._store.released(want.released)
            return Done(audit, want.event)
        raise UnavailableError(f"{target}: it changes too often: end the bot that writes it")

    async def _unowned(self, owner_key: Key, what: str) -> Loaded[Owner] | None:
        """Return the owner row, once it is certain that nobody alive stands behind it; takes up to a lease."""
        while True:
            found, _ = await self._store.salvage(owner_key)
            loaded = cast("Loaded[Owner] | None", found.get(owner_key))
            if loaded is None or self._watch is None or loaded.row.released:
                return loaded
            holder = loaded.row.holder
            life, beat = (await self._watch.look(holder))[holder]
            if life is Life.DEAD or beat is None:
                return loaded
            if life is Life.ALIVE:
                raise HeldError(
                    f"{what} is owned by {describe(loaded.row)}, which is alive: end it first", key=owner_key
                )
            await self._sleep(min(beat.lease_seconds / 20, 1.0))

    def _next_owner(self, owner: Owner) -> Owner:
        return msgspec.structs.replace(
            owner, holder="operator", epoch=owner.epoch + 1, host=socket.gethostname(), pid=os.getpid(),
            since_ms=self._clock(), released=True,
        )  # fmt: skip

    async def _audit(self, action: Any, target: str, rows: Mapping[Key, Row | None]) -> Audit:
        told = [key for key in rows if key.domain not in _NOT_TOLD]
        found, _ = await self._store.salvage(*told)
        before = {str(key): _plain(found[key].row) if key in found else None for key in told}
        after: dict[str, Any] = {}
        for key in told:
            row = rows[key]
            after[str(key)] = None if row is None else _plain(row)
        kept = sorted(str(key) for key, row in rows.items() if key.domain == "quarantine" and row is not None)
        if kept:
            after["kept"] = kept
        return Audit(
            action=action, target=target, by=self._operator, at_ms=self._clock(), why=self._why, before=before,
            after=after,
        )  # fmt: skip

    # ------------------------------------------------------------------ what is there

    async def _look(self, context: Context) -> Looked:
        names = self._risk_names.get(context.strategy_name)
        if names is None:
            names = await self._held_names(context)
        self._names = names
        return await look(self._store, context, names, now_ms=self._clock(), lifetime_ms=self._lifetime_ms())

    async def _held_names(self, context: Context) -> tuple[str, ...]:
        """Return the profiles in which it holds slots: which others its strategy has is not known here."""
        session_key = context_key("session", context)
        found, _ = await self._store.salvage(session_key)
        if session_key in found:
            return cast("SessionRow", found[session_key].row).risk_names
        mine = risk_key("-", context).entity_id
        held = [key.entity_name for key in await self._store.keys(KeyPrefix("risk")) if key.entity_id == mine]
        return tuple(name for name in map(unquote, held) if isinstance(name, str))

    def _lifetime_ms(self) -> int:
        return self._params.max_signal_lifetime_minutes * MINUTE_MS

    def _spec(self, seen: Looked) -> Spec:
        return Spec(seen.context, MINUTE_MS, self._params, self._names)

    def _require_free(self, seen: Looked, context: Context) -> None:
        for domain in ("signal", "schedule", "session"):
            key = context_key(domain, context)
            if self._store.is_stopped(key):
                raise InvalidInputError(f"{key} is in quarantine: adopt or clear it first")

    def _candle(self, state: State, at_ms: int | None, price: float) -> Candle:
        """Return a candle that stands for the moment of what is done by hand."""
        now_ms = self._clock() if at_ms is None else at_ms
        opened_ms = now_ms - now_ms % MINUTE_MS - MINUTE_MS
        if at_ms is None and state.last_candle_ms and abs(opened_ms - state.last_candle_ms) > FARTHEST_MS:
            raise InvalidInputError(
                "the last decision is more than a week from now: say when this happened, with --at TIME"
            )
        return Candle(max(opened_ms, state.last_candle_ms), price, price, price, price, 0.0)

    async def _moved(self, seen: Looked, transition: Transition) -> _Wanted:
        """Return the rows of a transition, and of what had to be reconciled before it."""
        context, state = seen.context, seen.plan.state
        held, names = seen.plan.risk_names, self._names
        keys = {guard_key(name) for name in (*held, *names)} | {Key("guard", n, "guard") for n in seen.plan.profiles}
        found, _ = await self._store.salvage(*keys)
        guards = {key: cast("Guard", loaded.row) for key, loaded in found.items()}
        rows, _ = changes(context, state, transition, held=held, risk_names=names, guards=guards)
        merged = {**seen.plan.changes, **rows}
        for profile in seen.plan.profiles:
            key = Key("guard", profile, "guard")
            merged.setdefault(key, Guard(changes=guards[key].changes + 1 if key in guards else 1))
        expect = {key: found[key].version if key in found else 0 for key in keys if key in merged}
        first_ms, last_ms = state.last_candle_ms + MINUTE_MS, transition.state.last_candle_ms
        if state.last_candle_ms and first_ms <= last_ms:  # nobody was asked on these
            row_key = outage_key(context_key("outage", context).entity_name, first_ms)
            merged[row_key] = Outage(from_ms=first_ms, to_ms=last_ms)
        return _Wanted(merged, expect, event=transition.events[-1])

    async def _guards(self, profiles: tuple[str, ...], expect: dict[Key, int]) -> dict[Key, Row]:
        """Return the next guard of each profile (by its quoted name), and expect the present one."""
        keys = [Key("guard", profile, "guard") for profile in profiles]
        found, _ = await self._store.salvage(*keys)
        expect |= {key: found[key].version if key in found else 0 for key in keys}
        return {key: Guard(changes=cast("Guard", found[key].row).changes + 1 if key in found else 1) for key in keys}


def _plain(row: Row) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(to_mapping(row)))  # as it lies on the medium
    return plain
