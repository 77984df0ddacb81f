"""Rows served from memory, while nobody else can write them.

Invariants:

* What is served is what the store holds at that moment: a row is kept only under a live lease, and only after the
  store has acknowledged it or returned it.
* While a commit is under way its keys are not in the cache, and a read that overlapped it puts none of them back.
* A commit whose outcome is not known (lost answer, failure, cancellation) may land at any later time: its keys stay
  out until a later commit of the same writer has returned, for from then on the store refuses the older op.
* A row that was kept under one epoch of a lease is never served under another.
* One answer is of one moment: if one of the keys is not in the cache, all of them are read from the store.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import msgspec

from ..contract import Backend, Guarantees, Key, Op, Record
from ..errors import ConflictError, HoldfastError, InvalidInputError, UnavailableError
from .around import Around

_ROW_BYTES = 600
"""What an entry costs besides its payload: a record, a key of three texts and the places in dicts, about."""

_MOST_UNSETTLED = 4096
"""Writers with a commit of unknown outcome, beyond which nothing is kept any more until the next open."""

_Place = tuple[str, Key]


@runtime_checkable
class Leases(Protocol):
    """Tells which keys this process alone writes."""

    def epoch(self, scope: str, key: Key) -> int | None:
        """Return the epoch of the live lease on ``key``; None if there is none.

        While it answers a number, no commit of anybody else may change ``key``; where a lease was lost and taken
        again, the number is another one. It is asked at every read, so it must be quick, and must not raise.
        A row that several processes write, such as a shared risk profile's, is never leased.
        """
        ...


class _WholeLife:
    """The lease of a store that belongs to one process: on every key, for as long as it is open."""

    def epoch(self, scope: str, key: Key) -> int | None:
        """Return the one epoch that there is."""
        return 0


class _NoLease:
    def epoch(self, scope: str, key: Key) -> int | None:
        """Return None."""
        return None


class _Entry(NamedTuple):
    record: Record | None
    """None: the key is absent."""
    epoch: int
    size: int


class _Look:
    """A read under way: which of its keys were written meanwhile."""

    __slots__ = ("spoiled",)

    def __init__(self) -> None:
        self.spoiled: set[_Place] = set()


class Figures(NamedTuple):
    """What the cache did since it was opened."""

    hits: int
    """Reads answered from memory."""
    misses: int
    """Reads that went to the store."""
    rows: int
    """What is kept now; absent keys count."""
    size_bytes: int


class Cached(Around):
    """A backend whose rows are served from memory, as long as this process alone can write them.

    Everything that this process writes to the store must pass through this one object.

    Args:
        backend: What it wraps.
        leases: Which keys this process alone writes. Without it a store that belongs to one process is leased as
            a whole, and of a shared one nothing is kept until somebody lends leases (``Guarantees.warnings`` says so).
        most_rows: Most rows kept, absent keys included; those used longest ago go first.
        most_bytes: Most bytes kept, about.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        leases: Leases | None = None,
        most_rows: int = 20_000,
        most_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        super().__init__(backend)
        if most_rows < 1 or most_bytes < 1:
            raise InvalidInputError(f"most_rows is {most_rows!r:.40} and most_bytes {most_bytes!r:.40}: give 1 or more")
        self._given = leases
        self._may_lend = False
        self._most_rows, self._most_bytes = most_rows, most_bytes
        self._life = 0
        self._leases: Leases = _NoLease()
        self._begin()

    def _begin(self) -> None:
        """Start with nothing; answers that are still on their way belong to an earlier life and are not kept."""
        self._life += 1
        self._rows: OrderedDict[_Place, _Entry] = OrderedDict()
        self._size_bytes = self._hits = self._misses = 0
        self._looks: set[_Look] = set()
        self._writing: Counter[_Place] = Counter()
        self._overlapped: set[_Place] = set()
        self._unsettled: dict[tuple[str, str], tuple[int, frozenset[_Place]]] = {}
        self._doubtful: Counter[_Place] = Counter()
        self._floors: dict[str, int] = {}
        self._finding = asyncio.Lock()
        self._failures = 0

    @property
    def figures(self) -> Figures:
        """What the cache did since it was opened."""
        return Figures(self._hits, self._misses, len(self._rows), self._size_bytes)

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Open what is wrapped, with an empty cache; see :meth:`holdfast.contract.Backend.open`."""
        found = await self.backend.open(read_only=read_only)
        self._begin()
        self._leases = _NoLease()
        self._may_lend = False
        if read_only:
            return found  # another process may be writing
        why = ""
        if not found.atomic:
            why = "its commits are not atomic"
        elif self._given is not None:
            self._leases = self._given
        elif found.shared:
            self._may_lend = True
            why = "several processes may write it: only a live run lends leases, on rows of its own; or pass leases=…"
        else:
            self._leases = _WholeLife()
        if not why:
            return found
        return msgspec.structs.replace(found, warnings=(*found.warnings, f"nothing is cached: {why}"))

    def lend(self, leases: Leases) -> None:
        """Tell an open cache of a shared store, which was given no leases, who knows them; others pass this by.

        Args:
            leases: Those of the newest run; the rows kept under others are forgotten.
        """
        if self._may_lend and leases is not self._leases:
            self._leases = leases
            self._rows.clear()  # and no more: a commit that is under way, or may land late, still is
            self._size_bytes = 0

    async def close(self) -> None:
        """Close what is wrapped, and forget everything. Repeatable.

        Crash: As before the call: nothing acknowledged depends on close.
        """
        self._may_lend = False
        self._leases = _NoLease()
        self._begin()
        await self.backend.close()

    # ------------------------------------------------------------------ reading

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys``, from memory if all of them are there; see the contract."""
        epoch = self._leases.epoch
        rows = self._rows
        found: dict[Key, Record] = {}
        for key in keys:
            entry = rows.get((scope, key))
            if entry is None or entry.epoch != epoch(scope, key):
                break
            if entry.record is not None:
                found[key] = entry.record
        else:
            if keys:
                self._hits += 1
                for key in keys:
                    rows.move_to_end((scope, key))
                return found
        return await self._read_through(scope, keys)

    async def _read_through(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        self._misses += 1
        life = self._life
        before = {key: self._leases.epoch(scope, key) for key in keys}
        look = _Look()
        self._looks.add(look)
        try:
            found = await self.backend.read(scope, keys)
        finally:
            self._looks.discard(look)
        if life == self._life:
            for key, epoch in before.items():
                place = (scope, key)
                if epoch is not None and place not in look.spoiled:
                    self._keep(place, found.get(key), epoch)
        return found

    def _keep(self, place: _Place, record: Record | None, epoch: int) -> None:
        """Keep what the store holds, unless the lease ended or a commit of the key may still land."""
        if self._writing[place] or self._doubtful[place] or self._leases.epoch(*place) != epoch:
            return
        self._drop(place)
        size = _ROW_BYTES + (len(record.payload) if record is not None else 0)
        if size > self._most_bytes:
            return
        self._rows[place] = _Entry(record, epoch, size)
        self._size_bytes += size
        while len(self._rows) > self._most_rows or self._size_bytes > self._most_bytes:
            _, oldest = self._rows.popitem(last=False)
            self._size_bytes -= oldest.size

    def _drop(self, place: _Place) -> None:
        entry = self._rows.pop(place, None)
        if entry is not None:
            self._size_bytes -= entry.size

    # ------------------------------------------------------------------ committing

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        """Apply ``changes`` if ``expect`` holds; the rows are in memory once the store has acknowledged them.

        Crash: As what is wrapped: nothing is kept that the store did not acknowledge.
        """
        epochs = {key: epoch for key in changes if (epoch := self._leases.epoch(scope, key)) is not None}
        if epochs and scope not in self._floors:
            await self._find_floor(scope)
        life = self._life
        floor = self._floors.get(scope)
        repeated = (scope, op.writer) in self._unsettled
        places = [(scope, key) for key in changes]
        self._begin_writing(places)
        number = 0
        try:
            number = await self.backend.commit(scope, changes, expect, op=op)
        except ConflictError as error:
            if life == self._life:
                for key in (*error.keys, *expect):
                    if isinstance(key, Key):
                        self._drop((scope, key))  # somebody has written it: the lease was not what it seemed
            raise
        except (UnavailableError, InvalidInputError):
            raise  # this attempt wrote nothing
        except BaseException:
            if life == self._life:
                self._doubt(scope, op, places)
            raise
        finally:
            alone = self._end_writing(places) if life == self._life else frozenset()
        if life == self._life:
            self._settle(scope, op)
            # An op that is answered with an older number was not applied now: its rows may be old ones.
            fresh = floor is not None and number > floor and not repeated
            if scope in self._floors:
                self._floors[scope] = max(self._floors[scope], number)
            if fresh:
                own = Op(*op)
                for key, epoch in epochs.items():
                    if (scope, key) in alone:
                        payload = changes[key]
                        self._keep((scope, key), None if payload is None else Record(payload, number, own), epoch)
        return number

    async def _find_floor(self, scope: str) -> None:
        """Learn a commit number that every commit of an earlier life is at most: once for each scope."""
        life, failures = self._life, self._failures
        async with self._finding:
            # Whoever waited for another's question does not ask again, above all not if it failed by a deadline.
            if scope in self._floors or (life, failures) != (self._life, self._failures):
                return
            try:
                number = (await self.backend.head(scope)).number
            except HoldfastError:
                self._failures += 1
                return  # nothing is kept from this commit; it will say what is wrong
            if life == self._life:
                self._floors[scope] = number

    def _begin_writing(self, places: Iterable[_Place]) -> None:
        for place in places:
            self._drop(place)
            if self._writing[place]:
                self._overlapped.add(place)
            self._writing[place] += 1
        for look in self._looks:
            look.spoiled.update(places)

    def _end_writing(self, places: Iterable[_Place]) -> frozenset[_Place]:
        """Note the end of a commit; return those of its places that no other commit wrote meanwhile."""
        alone = []
        for place in places:
            self._writing[place] -= 1
            if place not in self._overlapped:
                alone.append(place)
            if not self._writing[place]:
                del self._writing[place]
                self._overlapped.discard(place)
        for look in self._looks:
            look.spoiled.update(places)
        return frozenset(alone)

    def _doubt(self, scope: str, op: Op, places: Iterable[_Place]) -> None:
        """Keep the places of a commit out of the cache: it may land later."""
        who = (scope, op.writer)
        known = self._unsettled.pop(who, (op.n, frozenset()))
        if len(self._unsettled) >= _MOST_UNSETTLED:
            self._leases, self._may_lend = _NoLease(), False
            self._begin()
            return
        more = frozenset(places) - known[1]
        self._doubtful.update(more)
        self._unsettled[who] = (max(op.n, known[0]), known[1] | more)

    def _settle(self, scope: str, op: Op) -> None:
        """A commit of the writer has returned: its ops up to that one were applied by now, or never will be."""
        known = self._unsettled.get((scope, op.writer))
        if known is None or op.n < known[0]:
            return
        del self._unsettled[scope, op.writer]
        for look in self._looks:
            look.spoiled.update(known[1])  # it may have looked before the commit landed
        for place in known[1]:
            self._doubtful[place] -= 1
            if not self._doubtful[place]:
                del self._doubtful[place]
