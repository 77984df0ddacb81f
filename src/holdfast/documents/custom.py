"""A user's own four-method class as a backend for one of the documents' domains.

The class is built with ``(entity_name, base_dir)`` and has ``wait_for_init``, ``read_value``, ``has_value`` and
``write_value``, sync or async; it inherits nothing. It is given the documents' plain JSON values and nothing of ours:
no envelope, no checksum, no version. So it promises less, and says so:

* a commit of several entities is not atomic; recovery leans on the intent that the store writes first;
* ``expect`` is compared here, with counters of this process;
* what a returned write survives is whatever the class does.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import msgspec

from ..cancellation import no_stray_cancellation
from ..contract import Guarantees, Head, How, Key, KeyPrefix, Op, Record, Survives, WriterOp
from ..domains import decode, encode
from ..errors import (
    ConflictError,
    CorruptedError,
    HoldfastError,
    InvalidInputError,
    UnavailableError,
    UnknownOutcomeError,
)
from ..rows import RiskPosition, Row
from .shapes import (
    DOCUMENT_DOMAINS,
    damaged_position_key,
    document_id,
    empty_value,
    in_list_order,
    position_of,
    trusted_row,
    value_of,
)

METHODS = ("wait_for_init", "read_value", "has_value", "write_value")


def require_four_methods(cls: object) -> None:
    """Refuse what cannot serve as a user's persistence class.

    Raises:
        InvalidInputError: It is not a class, or lacks a method; the message names it.
    """
    if not isinstance(cls, type):
        raise InvalidInputError(f"pass the class itself, not {cls!r:.80}: one is made for each entity")
    missing = [name for name in METHODS if not callable(getattr(cls, name, None))]
    if missing:
        raise InvalidInputError(f"{cls.__name__} lacks {', '.join(missing)}: a persistence class has {METHODS}")


class _Entity:
    """One instance of the user's class, and whether its ``wait_for_init`` has succeeded."""

    def __init__(self, cls: Callable[[str, str], Any], entity_name: str, base_dir: str) -> None:
        try:
            self.instance = cls(entity_name, base_dir)
        except Exception as error:
            raise UnavailableError(f"{_name(cls)}({entity_name!r}) could not be made: {error!r}") from error
        self._ready = False
        self._lock = asyncio.Lock()

    async def ready(self) -> None:
        """Run ``wait_for_init(True)`` once, however many callers come first; a failed one is tried again."""
        if self._ready:
            return
        async with self._lock:
            if not self._ready:
                await _answer(self.instance.wait_for_init(True))
                self._ready = True


class _Seen(NamedTuple):
    payload: bytes
    version: int
    op: Op


class CustomBackend:
    """Holds one domain in a user's class.

    Args:
        cls: The class; one instance is made for each entity name.
        base_dir: Passed to the class as it is.
        domain: ``signal``, ``schedule``, ``risk`` or ``partial``.
    """

    def __init__(self, cls: Callable[[str, str], Any], base_dir: str, domain: str) -> None:
        if domain not in DOCUMENT_DOMAINS:
            raise InvalidInputError(f"a persistence class can hold {', '.join(DOCUMENT_DOMAINS)}, not {domain!r}")
        require_four_methods(cls)
        self.cls = cls
        self._base_dir = base_dir
        self._domain = domain
        self._entities: dict[str, _Entity] = {}
        self._seen: dict[Key, _Seen] = {}
        """What was last read or written: a version stays while the bytes stay."""
        self._number = 0
        self._writers: dict[str, WriterOp] = {}
        self._tried: dict[str, int] = {}
        """Each writer's last op that was begun: sending it again must not be held against its own writes."""
        self._scopes: set[str] = set()
        self._lock = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Promise what can be promised; the class itself is asked at the first use of each entity."""
        return self.guarantees

    @property
    def guarantees(self) -> Guarantees:
        """What can be promised for a class about which nothing is known."""
        name = _name(self.cls)
        return Guarantees(
            backend=f"class:{name}",
            survives=Survives.PROCESS,
            survives_how=How.ASSUMED,
            atomic=False,
            atomic_how=How.ASSUMED,
            fenced=False,
            fenced_how=How.ASSUMED,
            shared=False,
            warnings=(f"{self._domain} rows lie in {name}: it is not known what a write to it survives",),
        )

    # ------------------------------------------------------------------ reading

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys``, asking ``has_value`` before each ``read_value``.

        Raises:
            CorruptedError: A value has the wrong shape; ``error.key`` names it. It stays where it is.
            UnavailableError: The class raised.
        """
        found: dict[Key, Record] = {}
        for name, members in _by_entity(keys).items():
            rows, damaged = await self._rows(name, members[0])
            for key in members:
                if key in damaged:
                    raise CorruptedError(damaged[key], key=key, backend=f"class:{_name(self.cls)}")
                row = rows.get(key)
                if row is None:
                    self._seen.pop(key, None)
                else:
                    found[key] = self._record(key, encode(key, row))
        return found

    def _record(self, key: Key, payload: bytes) -> Record:
        seen = self._seen.get(key)
        if seen is None or seen.payload != payload:  # somebody else wrote it
            self._number += 1
            seen = self._seen[key] = _Seen(payload, self._number, Op("elsewhere", self._number))
        return Record(payload, seen.version, seen.op)

    async def _value(self, entity_name: str, key: Key) -> Any:
        entity = self._entity(entity_name)
        try:
            await entity.ready()
            if not await _answer(entity.instance.has_value(document_id(key))):
                return None
            return await _answer(entity.instance.read_value(document_id(key)))
        except HoldfastError as error:
            if isinstance(error, UnavailableError | CorruptedError):
                error.key = error.key if isinstance(error, UnavailableError) else key
                raise
            raise UnavailableError(f"{key} could not be read: {error}", key=key) from error
        except Exception as error:
            raise UnavailableError(f"{key} could not be read from {_name(self.cls)}: {error!r}", key=key) from error

    async def _rows(self, entity_name: str, key: Key) -> tuple[dict[Key, Row], dict[Key, str]]:
        """Return the good rows of an entity, and for each damaged one why it is."""
        value = await self._value(entity_name, key)
        if self._domain != "risk":
            try:
                row = trusted_row(key, value)
            except CorruptedError as error:
                return {}, {key: str(error)}
            return ({} if row is None else {key: row}), {}
        good, bad = _positions(entity_name, value, key)
        return dict(good), {damaged: reason for damaged, (reason, _) in bad.items()}

    def _entity(self, entity_name: str) -> _Entity:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # locks belong to one loop; the instances live on
            self._loop, self._lock = loop, asyncio.Lock()
            for entity in self._entities.values():
                entity._lock = asyncio.Lock()
        if entity_name not in self._entities:
            self._entities[entity_name] = _Entity(self.cls, entity_name, self._base_dir)
        return self._entities[entity_name]

    # ------------------------------------------------------------------ writing

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:
        """Write each entity that ``changes`` touch, one after another, as the documents' plain value.

        Raises:
            ConflictError: Some ``expect`` does not hold; nothing was changed.
            UnknownOutcomeError: The class raised in a write, which may have happened; send the same op again.

        Crash: Each entity is as the class leaves it; they are not written together.
        """
        for name in _by_entity(changes):
            self._entity(name)
        async with self._lock:
            last = self._writers.get(op.writer)
            if last is not None and op.n <= last.n:
                if op.n == last.n:
                    return last.number
                raise ConflictError(f"the op {op.n} of {op.writer} is older than its last, {last.n}")
            if expect and self._tried.get(op.writer) != op.n:
                records = await self.read(scope, list(expect))
                wrong = [k for k, version in expect.items() if (records[k].version if k in records else 0) != version]
                if wrong:
                    raise ConflictError(f"{wrong[0]} has changed: read it again", keys=wrong)
            self._tried[op.writer] = op.n
            for name, members in _by_entity(changes).items():
                await self._write(name, {key: changes[key] for key in members})
            self._number += 1
            for key, payload in changes.items():
                if payload is None:
                    self._seen.pop(key, None)
                else:
                    self._seen[key] = _Seen(payload, self._number, op)
            self._writers[op.writer] = WriterOp(op.n, self._number)
            self._scopes.add(scope)
            return self._number

    async def _write(self, entity_name: str, changes: Mapping[Key, bytes | None]) -> None:
        first = next(iter(changes))
        rows = {key: None if payload is None else decode(key, payload) for key, payload in changes.items()}
        if self._domain == "risk":
            value = _merged(entity_name, await self._value(entity_name, first), rows)
        else:
            row = rows[first]
            value = empty_value(self._domain) if row is None else value_of(self._domain, [row])
        entity = self._entity(entity_name)
        try:
            await entity.ready()
        except Exception as error:
            raise UnavailableError(f"{_name(self.cls)} could not be made ready: {error!r}", key=first) from error
        try:
            await _answer(entity.instance.write_value(document_id(first), value))
        except Exception as error:
            raise UnknownOutcomeError(
                f"{_name(self.cls)}.write_value raised for {first}; it may have been written: {error!r}", key=first
            ) from error

    # ------------------------------------------------------------------ the rest

    async def head(self, scope: str) -> Head:
        """Return this process's commit number and the writers' last ops."""
        return Head(self._number, dict(self._writers))

    async def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        """Yield the stored keys of the entity named, or of those that this process has met.

        A four-method class cannot say what it holds; it can only be asked.
        """
        if prefix.domain not in ("", self._domain):
            return
        names = [prefix.entity_name] if prefix.entity_name else sorted(self._entities)
        for name in names:
            if self._domain == "risk":
                probe = Key("risk", name, "positions")
            elif self._domain == "partial":
                probe = Key("partial", name, "levels")
            elif "~" not in name:
                probe = Key(self._domain, name, name.split("_")[0])  # the name begins with the symbol
            else:
                known = [key for key in self._seen if key.entity_name == name]
                if not known:
                    continue
                probe = known[0]
            rows, damaged = await self._rows(name, probe)
            for key in sorted({*rows, *damaged}):
                yield key

    async def scopes(self) -> AsyncIterator[str]:
        """Yield the scopes that this process has written."""
        for scope in sorted(self._scopes):
            yield scope

    async def close(self) -> None:
        """Let go of all instances, calling the ``close`` of those that have one."""
        entities, self._entities = self._entities, {}
        failure: Exception | None = None
        for entity in entities.values():
            close = getattr(entity.instance, "close", None)
            if callable(close):
                try:
                    await _answer(close())
                except Exception as error:  # the others must still be closed
                    failure = failure or error
        if failure is not None:
            raise UnavailableError(f"{_name(self.cls)}.close raised: {failure!r}") from failure


class Dummy:
    """A persistence class that discards writes and has nothing."""

    def __init__(self, entity_name: str, base_dir: str) -> None:
        self.entity_name = entity_name

    def wait_for_init(self, initial: bool) -> None:
        """Nothing to do."""

    def has_value(self, entity_id: str) -> bool:
        """Nothing is there."""
        return False

    def read_value(self, entity_id: str) -> Any:
        """Nothing is there."""
        raise UnavailableError("a dummy holds nothing: ask has_value first")

    def write_value(self, entity_id: str, value: Any) -> None:
        """Discard the value."""


def _positions(entity_name: str, value: Any, asked: Key) -> tuple[dict[Key, RiskPosition], dict[Key, tuple[str, Any]]]:
    """Split the documents' list into good rows and damaged pairs, so that one bad pair stops only itself."""
    if value is None:
        return {}, {}
    if not isinstance(value, list | tuple):
        return {}, {asked: (f"{asked}: wrong shape: a list of pairs is needed, not {type(value).__name__}", value)}
    good: dict[Key, RiskPosition] = {}
    bad: dict[Key, tuple[str, Any]] = {}
    for rank, pair in enumerate(value):
        try:
            key, row = position_of(entity_name, pair, rank)
            good[key] = row
        except InvalidInputError as error:
            damaged = damaged_position_key(entity_name, pair, rank)
            bad[damaged] = (f"{damaged}: wrong shape: {error}", pair)
    return good, bad


def _merged(entity_name: str, value: Any, rows: Mapping[Key, Row | None]) -> list[Any]:
    """Return the documents' list with ``rows`` put in; pairs that cannot be understood are kept as they are."""
    good, bad = _positions(entity_name, value, next(iter(rows)))
    if value is not None and not isinstance(value, list | tuple):
        raise CorruptedError(f"risk/{entity_name}: the stored value is no list: mend it first", key=next(iter(rows)))
    listed = dict(good)
    behind = max((row.rank for row in good.values()), default=-1) + 1
    others = good.keys() - rows.keys()
    for key, row in rows.items():
        if row is None:
            listed.pop(key, None)
        elif others:  # one slot of several: it keeps its place, or goes behind
            rank = good[key].rank if key in good else behind
            listed[key] = msgspec.structs.replace(cast("RiskPosition", row), rank=rank)
        else:
            listed[key] = cast("RiskPosition", row)
    return [*value_of("risk", in_list_order(listed.values())), *(pair for _, pair in bad.values())]


def _by_entity(keys: Iterable[Key]) -> dict[str, list[Key]]:
    groups: dict[str, list[Key]] = {}
    for key in keys:
        groups.setdefault(key.entity_name, []).append(key)
    return groups


async def _answer(value: Any) -> Any:
    if not inspect.isawaitable(value):
        return value
    with no_stray_cancellation:
        return await value


def _name(cls: object) -> str:
    return getattr(cls, "__name__", repr(cls))
