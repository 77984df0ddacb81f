"""The audited commit: what an operator changes by hand, together with who did it, when, why, and what was there before.

Invariants:

* A context that a live process owns is left alone: the commit expects the owner row, raises its epoch and lets go of
  it, so that whoever owned it and only slept is fenced.
* The change and its ``audit`` row are one commit, and what was read for it is expected by it.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import msgspec

from ..contract import Key, KeyPrefix
from ..domains import context_key, risk_key, to_mapping
from ..errors import ConflictError, HeldError, UnavailableError
from ..names import Context, unquote
from ..rows import Audit, Event, Guard, Owner, Row, SessionRow, Signal
from ..rules.candles import MINUTE_MS
from ..rules.params import Params
from ..rules.signals import Spec
from ..store import Loaded, Store
from .lanes import Sleep, commit_surely
from .recovery import Looked, look
from .retention import Retention
from .worker import Life, Watch, describe

MAX_ATTEMPTS = 20

_NOT_TOLD = ("guard", "owner", "audit", "quarantine")


class Done(NamedTuple):
    """What a hand did."""

    audit: Audit
    event: Event | None = None


class Wanted(NamedTuple):
    """What is to be committed, worked out from what was read."""

    changes: dict[Key, Row | None]
    expect: dict[Key, int]
    event: Event | None = None
    released: Key | None = None


class Audited:
    """One operator's commits to one store.

    Args:
        store: Open for writing.
        operator: user@host.
        why: For the record.
        params: Fees and slippage, for the PnL of what is closed.
        risk_names: Profiles of each strategy; for one that is missing, those in which it holds slots.
        clock, sleep: Seams for tests.
        watch: Judges whether an owner lives; None where the store belongs to one process.
    """

    def __init__(
        self,
        store: Store,
        *,
        operator: str,
        why: str,
        params: Params,
        risk_names: Mapping[str, tuple[str, ...]],
        clock: Callable[[], int],
        sleep: Sleep,
        watch: Watch | None,
    ) -> None:
        self._store, self._operator, self._why = store, operator, why
        self._params, self._risk_names = params, dict(risk_names)
        self._clock, self._sleep, self._watch = clock, sleep, watch
        self._writer = store.writer("operator")
        self.retention = Retention.of(params)
        self.names: tuple[str, ...] = ()
        """Risk profiles of the context that was looked at last."""

    async def commit(
        self,
        action: Literal["adopt", "close", "clear"],
        target: str,
        name: str,
        context: Context | None,
        wanted: Callable[[Any], Awaitable[Wanted]],
    ) -> Done:
        """Commit what ``wanted`` makes of what is stored, with the audit, under the owner row; again where it moved.

        Args:
            target: What was named.
            name: Entity name under which the owner row and the audit lie.
            context: Whose rows are looked at; None where that cannot be told.
            wanted: Told what is stored, or None without a context.

        Raises:
            HeldError: A live process owns the context.
            UnavailableError: It changes too often, or the store cannot be used now.

        Crash: All of it is done, or nothing.
        """
        owner_key = Key("owner", name, "owner")
        for _ in range(MAX_ATTEMPTS):
            owner = await self._unowned(owner_key, name if context is None else str(context))
            seen = None if context is None else await self._look(context)
            want: Wanted = await wanted(seen)
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
            rows |= dict.fromkeys(await self._surplus(audit_key, audit.at_ms, seen, want))
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

    async def _surplus(self, new: Key, now_ms: int, seen: Looked | None, want: Wanted) -> list[Key]:
        """Return which older audit rows go with a new one; none that tells of a signal that is open or waits."""
        if any(key.entity_name == new.entity_name for key in self._store.damaged):
            return []  # what stands there cannot be told
        keys = await self._store.keys(KeyPrefix("audit", new.entity_name))
        ends = {key: int(key.entity_id.partition("-")[0]) for key in (*keys, new)}
        surplus = self.retention.surplus(ends, now_ms)
        if not surplus:
            return []
        standing = [] if seen is None else [seen.plan.state.signal, seen.plan.state.scheduled]
        rows = [*standing, *want.changes.values()]
        ids = {row.id for row in rows if isinstance(row, Signal)}
        found, _ = await self._store.salvage(*surplus)
        return [key for key, loaded in found.items() if ids.isdisjoint(_signal_ids(cast("Audit", loaded.row)))]

    # ------------------------------------------------------------------ what is there

    async def _look(self, context: Context) -> Looked:
        names = self._risk_names.get(context.strategy_name)
        if names is None:
            names = await self._held_names(context)
        self.names = names
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

    def spec(self, seen: Looked) -> Spec:
        """Return what a transition of the context is worked out under."""
        return Spec(seen.context, MINUTE_MS, self._params, self.names)

    async def guards(self, profiles: tuple[str, ...], expect: dict[Key, int]) -> dict[Key, Row]:
        """Return the next guard of each profile (by its quoted name), and expect the present one."""
        keys = [Key("guard", profile, "guard") for profile in profiles]
        found, _ = await self._store.salvage(*keys)
        expect |= {key: found[key].version if key in found else 0 for key in keys}
        return {key: Guard(changes=cast("Guard", found[key].row).changes + 1 if key in found else 1) for key in keys}


def _plain(row: Row) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(to_mapping(row)))  # as it lies on the medium
    return plain


def _signal_ids(audit: Audit) -> set[str]:
    """Return the signals that an audit row tells of."""
    rows = [row for row in (*audit.before.values(), *audit.after.values()) if isinstance(row, dict)]
    return {row[name] for row in rows for name in ("id", "signalId") if name in row}
