"""A commit that spans backends, ordered so that a crash at any point is repaired by going on.

1. Home: one ``Intent`` row that holds all the changes, guarded by the home part of ``expect``. This decides.
2. Elsewhere: the routed changes, and with them the lane's mark there, which each such commit rewrites and expects
   as it was before the decision: a late request of an owner that was replaced meanwhile changes nothing. (A user's
   four-method class enforces nothing; there the changes are only idempotent.)
3. Home: the home changes and the deletion of the intent, in one commit.

Before 1 nothing has happened; after it the whole must come true, so everything later goes forward only: a failure
is ``UnknownOutcomeError`` and the lane goes on from where it stopped, or the next ``open`` does.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from .contract import Backend, Key, KeyPrefix, Op
from .domains import encode, from_mapping, to_mapping
from .errors import ConflictError, HoldfastError, InvalidInputError, UnavailableError, UnknownOutcomeError
from .names import quote
from .rows import Intent, Row
from .rows import Span as SpanMark

if TYPE_CHECKING:
    from .store import Store


class Place(NamedTuple):
    """Where keys lie: a backend and a scope in it."""

    backend: Backend
    scope: str

    def __hash__(self) -> int:
        return hash((id(self.backend), self.scope))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and other.backend is self.backend and other.scope == self.scope

    def __ne__(self, other: object) -> bool:
        return not self == other


class Span:
    """One commit over several backends, on its way.

    Args:
        store: Whose commit it is.
        writer: The lane's own name, in its ops.
        lane: What the lane is called.
        n: The first of two op numbers that the commit uses.
        changes: All rows.
        payloads: The same, encoded.
        expect: All guards; those of routed keys are compared before the intent is written.
    """

    def __init__(
        self,
        store: Store,
        writer: str,
        lane: str,
        n: int,
        changes: Mapping[Key, Row | None],
        payloads: Mapping[Key, bytes | None],
        expect: Mapping[Key, int],
    ) -> None:
        self.changes = changes
        self.touched = {*payloads, *expect}
        self._store = store
        self._home = store.home
        self._first, self._last = Op(writer, n), Op(writer, n + 1)
        self._intent = Key("intent", quote(writer, keep_underscore=True), "intent")
        self._expect, self._foreign_expect = _by_place(store, expect)
        self._payloads, self._foreign = _by_place(store, payloads)
        self._lane = lane
        self._guards: dict[Place, dict[Key, int]] = {}
        """Elsewhere: the version of the lane's mark, as read before it was decided."""
        self._record = b""
        self._begun = False
        """Whether the intent was sent."""
        self._decided = 0
        """Number of the intent's commit; 0 before it."""
        self._number = 0
        """Number of the last commit; 0 before it."""

    async def send(self) -> int:
        """Decide and carry out. UnavailableError and ConflictError mean that nothing was decided."""
        mark = mark_key(self._lane)
        for place in {**self._foreign_expect, **self._foreign}:
            guards = self._foreign_expect.get(place, {})
            records = await place.backend.read(place.scope, [*guards, mark])
            if self._store.enforces(place) and place in self._foreign:
                self._guards[place] = {mark: records[mark].version if mark in records else 0}
            wrong = [key for key, version in guards.items() if not self._holds(records.get(key), key, version)]
            if wrong:
                raise ConflictError(f"{wrong[0]} has changed: read it again", keys=wrong)
        replaced = {key.domain: self._guards[place][mark] for place, part in self._foreign.items()
                    if place in self._guards for key in part}  # fmt: skip
        intent = Intent(writes=_writes(self.changes), guards=replaced, lane=self._lane)
        self._record = encode(self._intent, intent)
        self._begun = True
        self._store.unfinished.append(self)
        try:
            self._decided = await self._decide()
        except (ConflictError, InvalidInputError, UnavailableError):
            self._store.unfinished.remove(self)  # nothing was decided
            raise
        return await self._carry_out()

    async def settle(self) -> int:
        """Go on from where it stopped; ConflictError if nothing was decided."""
        if self._number:
            return self._number
        if not self._begun:
            raise ConflictError("the commit was given up before it was sent: decide again")
        if not self._decided:
            try:
                self._decided = await self._decide()
            except ConflictError:
                self._store.unfinished.remove(self)
                raise
        return await self._carry_out()

    async def _decide(self) -> int:
        backend, scope = self._home
        return await backend.commit(scope, {self._intent: self._record}, self._expect, op=self._first)

    async def _carry_out(self) -> int:
        try:
            for place, payloads in self._foreign.items():
                number = await _write(place, payloads, self._guards.get(place, {}), self._lane, self._first)
                for key in payloads:
                    self._store.aliases[key] = (0, number)
            changes = {**self._payloads, self._intent: None}
            expect = {**self._expect, self._intent: self._decided}
            self._number = await self._home.backend.commit(self._home.scope, changes, expect, op=self._last)
        except ConflictError as error:
            if not {self._intent, *self._expect} & set(error.keys) and await self._is_decided():
                raise UnknownOutcomeError(f"decided, but not yet carried out: {error}") from error
            self._store.unfinished.remove(self)  # another process has finished it
            raise
        except HoldfastError as error:
            raise UnknownOutcomeError(f"decided, but not yet carried out: {error}", key=error.key) from error
        self._store.unfinished.remove(self)
        for payloads in self._foreign.values():
            for key in payloads:
                self._store.aliases[key] = (self._number, self._store.aliases[key][1])
        return self._number

    async def _is_decided(self) -> bool:
        """Whether the intent still stands, so that somebody has to carry it out."""
        backend, scope = self._home
        try:
            return self._intent in await backend.read(scope, [self._intent])
        except HoldfastError:
            return True

    def _holds(self, record: Any, key: Key, version: int) -> bool:
        found = 0 if record is None else record.version
        alias = self._store.aliases.get(key)
        return found == (alias[1] if alias and alias[0] == version and version else version)


def _writes(changes: Mapping[Key, Row | None]) -> dict[str, Any]:
    return {str(key): None if row is None else to_mapping(row) for key, row in changes.items()}


def _by_place(store: Store, values: Mapping[Key, Any]) -> tuple[dict[Key, Any], dict[Place, dict[Key, Any]]]:
    home: dict[Key, Any] = {}
    foreign: dict[Place, dict[Key, Any]] = {}
    for key, value in values.items():
        place = store.place(key)
        (home if place == store.home else foreign.setdefault(place, {}))[key] = value
    return home, foreign


def mark_key(lane: str) -> Key:
    """Return the key of a lane's mark, beside the rows that it writes elsewhere."""
    return Key("span", quote(lane, keep_underscore=True), "last")


async def _write(
    place: Place, payloads: Mapping[Key, bytes | None], guards: Mapping[Key, int], lane: str, op: Op
) -> int:  # fmt: skip
    """Write the part of a decided commit that lies elsewhere, unless whoever goes on with it too has written it.

    Raises:
        ConflictError: Something else stands there: the commit was finished by somebody, and others came after it.
    """
    marks = {key: encode(key, SpanMark(lane=lane, op=f"{op.writer}#{op.n}")) for key in guards}
    try:
        return await place.backend.commit(place.scope, {**payloads, **marks}, guards, op=op)
    except ConflictError:
        found = await place.backend.read(place.scope, list(payloads))
        if {key: record.payload for key, record in found.items()} != {
            k: v for k, v in payloads.items() if v is not None
        }:
            raise
        return max((record.version for record in found.values()), default=0)


def is_context_lane(lane: str) -> bool:
    """Whether a lane is that of a context: named ``exchange/symbol/strategy``."""
    return "/" in lane


async def roll_forward(store: Store, mine: Callable[[str], bool] = lambda lane: True) -> set[str]:
    """Carry out the intents that a crash left behind; return the lanes of those that were not ``mine``.

    Args:
        mine: Told a lane; whether its intents may be carried out here.

    Crash: The intent is still there, or all of it came true.
    """
    home = store.home
    keys = [key async for key in home.backend.keys(home.scope, KeyPrefix("intent"))]
    found, _ = await store.salvage(*keys)
    left = set()
    for key, loaded in found.items():
        intent = cast("Intent", loaded.row)
        writes = intent.writes
        if not mine(intent.lane):
            left.add(intent.lane)
            continue
        payloads: dict[Key, bytes | None] = {}
        for path, plain in writes.items():
            target = Key(*path.split("/"))
            payloads[target] = None if plain is None else encode(target, from_mapping(target.domain, plain))
        here, foreign = _by_place(store, payloads)
        op = Op(f"recovery@{secrets.token_hex(4)}", 1)
        try:
            for place, part in foreign.items():
                known = [intent.guards[one.domain] for one in part if one.domain in intent.guards]
                guards = {mark_key(intent.lane): known[0]} if known and store.enforces(place) else {}
                await _write(place, part, guards, intent.lane, op)
            await home.backend.commit(home.scope, {**here, key: None}, {key: loaded.version}, op=op)
        except ConflictError:
            if key in await home.backend.read(home.scope, [key]):
                raise
            continue  # somebody else has finished it meanwhile
    return left
