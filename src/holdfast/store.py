"""The typed view of one or more backends: rows in, rows out, nothing thrown away.

Invariants:

* Nothing above the store sees bytes; nothing below it knows what a row is.
* A row that cannot be trusted is moved to quarantine by one commit (its exact bytes kept) and only its key stops:
  asking for it raises ``CorruptedError`` until it is released or a new row stands there.
* The home backend holds every domain that is not routed elsewhere, and decides: a commit that spans backends is first
  an ``Intent`` there (see :mod:`holdfast.spans`).
* A lane (:class:`Writer`) has one commit in flight, and settles one whose outcome is unknown before it sends the next.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar, cast

from .bulk import without_collections
from .contract import Backend, Guarantees, Head, Key, KeyPrefix, Op, Record, Survives
from .copying import require_whole
from .domains import decode
from .errors import (
    ConflictError,
    CorruptedError,
    FailedError,
    HoldfastError,
    InvalidInputError,
    NewerFormatError,
    NotFoundError,
    UnavailableError,
    UnsafeSettingError,
)
from .quarantine import is_released, kept_rows, released_key, stopped_key
from .rows import Quarantined, Row
from .spans import Place, Span, is_context_lane, roll_forward
from .writer import ASIDE, Writer

R = TypeVar("R", bound=Row, covariant=True)
Observer = Callable[[str, int, Mapping[Key, Row | None]], None]

_SCOPE = re.compile(r"[A-Za-z0-9._-]{1,57}")
_OFTEN = 8
"""How many times a quarantine commit is tried while others write the same key."""


_make = tuple.__new__  # what Loaded() comes to, without a call in Python for each of thousands of rows


class Loaded(NamedTuple, Generic[R]):
    """A row as it was stored, and the number of the commit that wrote it."""

    row: R
    version: int


class Store:
    """Typed reads and commits over a home backend, with some domains routed to others.

    Args:
        backend: The home backend; owner, session, outbox and whatever is not routed lie here.
        routes: Backend for each domain that lies elsewhere: ``signal``, ``schedule``, ``risk``, ``partial``; and
            ``ledger``, which only grows: where a scope is one document or object it belongs on a file or a table.
        scope: Names the set of contexts and risk profiles that commit together.
        require: Weakest promise to accept at open; pass ``Survives.NOTHING`` for a store in memory.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        routes: Mapping[str, Backend] | None = None,
        scope: str = "main",
        require: Survives = Survives.PROCESS,
    ) -> None:
        if not _SCOPE.fullmatch(scope):
            raise InvalidInputError(f"the scope {scope!r:.80} must be 1 to 57 characters from A-Z a-z 0-9 . _ -")
        for domain in routes or {}:
            if domain != "ledger":
                _require_routable(domain)
        self.scope = scope
        self.observers: list[Observer] = []
        """Called after each acknowledged commit with (scope, number, changes); must be quick and must not raise."""
        self.damaged: dict[Key, str] = {}
        """Keys that stopped, and why: found by this store, or in quarantine when it was opened."""
        self._require = require
        self.home = Place(backend, scope)
        elsewhere = dict(routes or {})
        self.ledger = Place(elsewhere.pop("ledger", backend), f"{scope}.ledger")
        self.aside = {
            "ledger": self.ledger,
            "worker": Place(backend, f"{scope}.beats"),
            "account": Place(backend, "holdfast.accounts"),  # of all scopes: one account belongs to one of them
        }
        """Domains of the home backend that lie in a scope of their own: what is written there delays no trade."""
        self.routes: dict[str, Place] = {domain: Place(other, scope) for domain, other in elsewhere.items()}
        """Where each domain that does not lie at home lies."""
        self._stopped: dict[Key, str] = {}
        self._left: set[str] = set()
        """Lanes of contexts whose intents were found at open and left to the context's next owner."""
        self._guarantees: Guarantees | None = None
        self._parts: dict[int, Guarantees] = {}
        self.read_only = False
        self.unfinished: list[Span] = []
        """Commits over several backends that were decided but not carried out."""
        self.aliases: dict[Key, tuple[int, int]] = {}
        """For a routed key that a span wrote: (number that its commit returned, version in its own backend)."""
        self.attached: dict[str, Any] = {}
        """What else lives as long as this store does, each under its own name."""
        self.turn = asyncio.Lock()
        self._keeper = Writer(self, "store")

    # ------------------------------------------------------------------ opening

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Open every backend, check the promise, finish what a crash left between backends.

        Args:
            read_only: Take no lock and change nothing; the promise is not checked.

        Returns:
            What holds for all backends together.

        Raises:
            UnsafeSettingError: The promise is weaker than ``require``; the message names the remedy.
            HeldError: Another process holds a backend.
            InvalidInputError: A ``holdfast copy`` to this store was not finished; the message names its source.

        Crash: Leaves what was there; opening again finishes.
        """
        self.turn, self._keeper = asyncio.Lock(), Writer(self, "store")
        opened: list[Backend] = []
        try:
            self._parts = {}
            for backend in self._backends():
                opened.append(backend)
                self._parts[id(backend)] = await backend.open(read_only=read_only)
            found = Guarantees.weakest(list(self._parts.values()))
            if not read_only:
                self._require_promise(self._parts.values())
                await require_whole(self.home.backend)
            self._guarantees, self.read_only = found, read_only
            self.damaged.clear()
            await self._find_stopped()
            if not read_only:
                # On a shared store a context's commit may be under way in another process: its next owner goes on.
                self._left = await roll_forward(self, lambda lane: not (found.shared and is_context_lane(lane)))
        except BaseException:
            self._guarantees = None
            for backend in reversed(opened):
                await backend.close()
            raise
        return found

    def may_be_unfinished(self, lane: str) -> bool:
        """Whether a commit of the lane may stand half done: it takes routes, or one that was found at open."""
        return bool(self.routes) or lane in self._left

    def _require_promise(self, parts: Iterable[Guarantees]) -> None:
        weak = min(parts, key=lambda part: part.survives)
        if weak.survives < self._require:
            raise UnsafeSettingError(
                f"a commit to {weak.backend} survives {weak.survives.name}, below the required "
                f"{self._require.name}: use a safer backend, or pass require=Survives.{weak.survives.name}",
                backend=weak.backend,
            )

    @property
    def guarantees(self) -> Guarantees:
        """What a returned commit survives, found at open."""
        if self._guarantees is None:
            raise FailedError("the store is not open: await store.open() first")
        return self._guarantees

    @property
    def is_open(self) -> bool:
        """Whether the store is open."""
        return self._guarantees is not None

    async def close(self) -> None:
        """Close every backend, even where one of them fails. Repeatable.

        Crash: As before the call: nothing acknowledged depends on close.
        """
        self._guarantees = None
        failure: BaseException | None = None
        for backend in reversed(self._backends()):
            try:
                await backend.close()
            except BaseException as error:  # the other backends must still let go of their locks
                failure = failure or error
        if failure is not None:
            raise failure

    def _backends(self) -> list[Backend]:
        unique = {id(place.backend): place.backend for place in (self.home, self.ledger, *self.routes.values())}
        return list(unique.values())

    async def _find_stopped(self) -> None:
        self._stopped.clear()
        for place in (self.home, self.ledger):
            async for key in place.backend.keys(place.scope, KeyPrefix("quarantine")):
                if not is_released(key):
                    self._stopped[stopped_key(key)] = f"{stopped_key(key)}: in quarantine: look at it, then release it"
        self.damaged.update(self._stopped)

    def route(self, domain: str, backend: Backend | None, guarantees: Guarantees | None) -> None:
        """Have ``backend`` hold ``domain`` from the next call on; None: the home backend does.

        Args:
            domain: ``signal``, ``schedule``, ``risk`` or ``partial``.
            backend: Open if this store is; the one before is left to the caller to close.
            guarantees: What its open returned; None if this store will open it.

        Raises:
            UnsafeSettingError: It promises less than ``require``; nothing was changed.
        """
        _require_routable(domain)
        if guarantees is not None:
            self._require_promise([guarantees])
        old = self.routes.pop(domain, None)
        if backend is not None:
            self.routes[domain] = Place(backend, self.scope)
        if self._guarantees is None:
            return
        if old is not None and all(place.backend is not old.backend for place in self.routes.values()):
            self._parts.pop(id(old.backend), None)
        if backend is not None and guarantees is not None:
            self._parts[id(backend)] = guarantees
        self._guarantees = Guarantees.weakest(list(self._parts.values()))

    def unrouted(self) -> Store:
        """Return a view of the open home backend that ignores the routes. Close this store, not the view."""
        view = Store(self.home.backend, scope=self.scope, require=self._require)
        view._guarantees, view._parts, view.read_only = self.guarantees, self._parts, self.read_only
        view.ledger, view.aside = self.ledger, self.aside
        view._stopped, view.damaged, view.observers = self._stopped, self.damaged, self.observers
        return view

    def place(self, key: Key) -> Place:
        """Return where ``key`` lies: the backend and the scope."""
        if key.domain == "quarantine" and key.entity_name.startswith("ledger_"):
            return self.ledger
        return self.aside.get(key.domain) or self.routes.get(key.domain, self.home)

    # ------------------------------------------------------------------ reading

    async def load(self, *keys: Key) -> dict[Key, Loaded[Row]]:
        """Return the rows of ``keys``, checked; absent keys are absent. One read for each backend.

        Raises:
            CorruptedError: A row of these is damaged (and now in quarantine), or its key was stopped before; all of
                them are in :attr:`damaged`. Other keys can still be loaded.
        """
        found, damaged = await self.salvage(*keys)
        for key, reason in damaged.items():
            raise CorruptedError(reason, key=key, backend=self.guarantees.backend)
        return found

    async def get(self, key: Key) -> Loaded[Row] | None:
        """Return the row of ``key``, or None; raises as :meth:`load` does."""
        return (await self.load(key)).get(key)

    async def salvage(self, *keys: Key) -> tuple[dict[Key, Loaded[Row]], dict[Key, str]]:
        """Return the good rows of ``keys``, and for each damaged key why it is; never raises ``CorruptedError``.

        Crash: A damaged row is where it was, or in quarantine.
        """
        if not keys:
            return {}, {}
        groups: Iterable[tuple[Place, list[Key]]]
        domains = {key[0] for key in keys}
        if len(domains) == 1 and "quarantine" not in domains:  # a scan of thousands: one place holds a whole domain
            groups = ((self.place(keys[0]), list(keys)),)
        elif not self.routes and domains.isdisjoint(ASIDE):
            groups = ((self.home, list(keys)),)
        else:
            sorted_out: dict[Place, list[Key]] = {}
            for key in keys:
                sorted_out.setdefault(self.place(key), []).append(key)
            groups = sorted_out.items()
        found: dict[Key, Loaded[Row]] = {}
        damaged: dict[Key, str] = {}
        for place, members in groups:
            records, broken = await self._read(place, members)
            with without_collections(len(records)):
                for key, record in records.items():
                    try:
                        found[key] = _make(Loaded, (decode(key, record.payload), record.version))
                    except CorruptedError as error:
                        broken[key] = (record, error)
            for key, (kept, cause) in broken.items():
                damaged[key] = await self._set_aside(key, kept, cause)
        if self._stopped:
            damaged.update({key: self._stopped[key] for key in keys if key in self._stopped and key not in found})
        return found, damaged

    async def _read(
        self, place: Place, keys: list[Key]
    ) -> tuple[dict[Key, Record], dict[Key, tuple[Record | None, CorruptedError]]]:
        """Read ``keys``; those that the backend itself finds damaged are left out and named."""
        broken: dict[Key, tuple[Record | None, CorruptedError]] = {}
        while True:
            try:
                return await place.backend.read(place.scope, keys), broken
            except CorruptedError as error:
                if error.key not in keys:
                    raise
                for one in (error, *error.more):
                    broken[cast("Key", one.key)] = (cast("Record | None", one.record), one)
                keys = [key for key in keys if key not in broken]

    async def scan(self, domain: str, entity_name: str = "") -> dict[Key, Loaded[Row]]:
        """Return the good rows of a domain, or of one entity of it, in byte order of their keys.

        Damaged rows are set aside as in :meth:`load`, left out, and named in :attr:`damaged`.
        """
        keys = await self.keys(KeyPrefix(domain, entity_name))
        found, _ = await self.salvage(*keys)
        return {key: found[key] for key in keys if key in found} if len(found) < len(keys) else found

    async def keys(self, prefix: KeyPrefix = KeyPrefix()) -> list[Key]:
        """Return the stored keys under ``prefix``, in byte order, wherever their domain lies."""
        if prefix.domain and prefix.domain not in ("ledger", "quarantine"):
            place = self.aside.get(prefix.domain) or self.routes.get(prefix.domain, self.home)
            return [key async for key in place.backend.keys(place.scope, prefix)]
        found = [key async for key in self.home.backend.keys(self.scope, prefix) if key.domain not in self.routes]
        found += [key async for key in self.ledger.backend.keys(self.ledger.scope, prefix)]
        if not prefix.domain:
            for domain, place in self.routes.items():
                found += [key async for key in place.backend.keys(place.scope, KeyPrefix(domain))]
        return sorted(found)

    async def head(self) -> Head:
        """Return where the home scope stands."""
        return await self.home.backend.head(self.scope)

    def enforces(self, place: Place) -> bool:
        """Whether the backend there refuses by itself what does not hold, whoever asks."""
        part = self._parts.get(id(place.backend))
        return part is not None and part.fenced

    def writer(self, name: str) -> Writer:
        """Return a new lane for commits; ``name`` is for people (a context, a tool)."""
        return Writer(self, name)

    # ------------------------------------------------------------------ quarantine

    async def quarantined(self, domain: str, entity_name: str) -> dict[Key, Loaded[Quarantined]]:
        """Return the unreleased quarantine rows of one entity, under their own keys; not empty: open nothing there."""
        prefix = KeyPrefix("quarantine", f"{domain}_{entity_name}")
        keys = [key for key in await self.keys(prefix) if not is_released(key)]
        found, damaged = await self.salvage(*keys)
        for key, reason in damaged.items():  # its record is damaged too, which frees nothing
            found[key] = Loaded(Quarantined(reason=reason, version=0, at_ms=0), 0)
        return cast("dict[Key, Loaded[Quarantined]]", found)

    async def quarantine(self, key: Key, reason: str) -> None:
        """Move the row of ``key`` to quarantine, its exact bytes kept, and stop the key.

        Raises:
            NotFoundError: There is no such row.

        Crash: The row is where it was, or in quarantine.
        """
        place = self.place(key)
        record = (await place.backend.read(place.scope, [key])).get(key)
        if record is None:
            raise NotFoundError(f"{key}: no such row: nothing to move to quarantine", key=key)
        await self._move(key, record, reason)
        self._stop(key, reason)

    async def release(self, key: Key) -> int:
        """Let ``key`` be used again; its bytes stay in quarantine, marked as released. The operator's hand.

        Returns:
            How many quarantine rows were marked.

        Crash: All are marked or none.
        """
        changes, expect = await self.release_changes(key)
        if not changes:
            raise NotFoundError(f"{key}: nothing of it is in quarantine", key=key)
        await self._keeper.commit(changes, expect)
        self.released(key)
        return len(expect)

    async def release_changes(self, key: Key) -> tuple[dict[Key, Row | None], dict[Key, int]]:
        """Return what a commit must change and expect to release ``key``, so that a new row can come with it."""
        changes: dict[Key, Row | None] = {}
        expect: dict[Key, int] = {}
        for kept, loaded in (await self.quarantined(key.domain, key.entity_name)).items():
            if stopped_key(kept) == key and loaded.version:
                changes |= {kept: None, released_key(kept): loaded.row}
                expect[kept] = loaded.version
        return changes, expect

    def released(self, key: Key) -> None:
        """Take note that a commit has released ``key``."""
        self._stopped.pop(key, None)
        self.damaged.pop(key, None)

    def is_stopped(self, key: Key) -> bool:
        """Whether unreleased bytes of ``key`` are in quarantine."""
        return key in self._stopped

    def _stop(self, key: Key, reason: str) -> None:
        self._stopped[key] = self.damaged[key] = f"{key}: {reason}" if not reason.startswith(str(key)) else reason

    async def _set_aside(self, key: Key, record: Record | None, error: CorruptedError) -> str:
        """Move a damaged row to quarantine where that is possible; return what to tell."""
        reason = str(error)
        # A newer version's row is whole: it stays, for that version. A quarantine row is where it belongs.
        if self.read_only or key.domain == "quarantine" or isinstance(error, NewerFormatError):
            self.damaged[key] = reason
            return reason
        try:
            await self._move(key, record, reason)
            reason += ": moved to quarantine"
        except HoldfastError as failure:
            reason += f": left where it is ({failure})"
        self._stop(key, reason)
        return self._stopped[key]

    async def _move(self, key: Key, record: Record | None, reason: str) -> None:
        place = self.place(key)
        home = self.ledger if place is self.ledger else self.home
        for attempt in range(_OFTEN):
            number = record.version if record and place is home else (await home.backend.head(home.scope)).number
            kept = kept_rows(key, record, reason, number + attempt if record is None else number)
            changes: dict[Key, Row | None] = {**kept}
            expect = dict.fromkeys(kept, 0)
            if place is home:
                changes[key] = None
                if record is not None:
                    expect[key] = record.version
            try:
                await self._keeper.commit(changes, expect)
                break
            except ConflictError as error:
                if key in error.keys or attempt == _OFTEN - 1:  # somebody replaced the row meanwhile
                    raise UnavailableError(f"{key} changes too often to be moved: {error}", key=key) from error
        if place is not home and record is not None:
            op = Op(f"quarantine@{secrets.token_hex(4)}", 1)
            await place.backend.commit(place.scope, {key: None}, {key: record.version}, op=op)


def _require_routable(domain: str) -> None:
    if domain not in ("signal", "schedule", "risk", "partial"):
        raise InvalidInputError(f"the domain {domain!r} cannot be routed: only signal, schedule, risk, partial, ledger")


__all__ = ["Loaded", "Observer", "Store", "Writer"]
