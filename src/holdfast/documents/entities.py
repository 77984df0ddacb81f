"""``PersistBase``: the documents' general class, plain JSON values under ids of the caller's own.

Rows lie in the domain ``entity`` of the store at ``base_dir``. Where ``base_dir`` is a domain of the default store
(``./dump/data/signal/``), a plain ``PersistBase`` shows that domain's entities themselves; a subclass, which may
store anything (ciphertext, say), gets a corner of its own in the default store.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

from ..contract import Key, KeyPrefix
from ..domains import require_plain
from ..errors import CorruptedError, InvalidInputError, NotFoundError
from ..names import quote, unquote
from ..rows import Entity, Row
from . import default
from .shapes import DOCUMENT_DOMAINS, positions_of, row_of, value_of
from .shared import Desk, SharedStore, store_at

EntityId = str | int

_STORED_NAME = re.compile(r"[A-Za-z0-9_\-%~=][A-Za-z0-9._\-%~=]{0,249}")
_DIGITS = re.compile(r"([0-9]+)")
_BATCH = 256


def natural_order(entity_id: EntityId) -> tuple[Any, ...]:
    """Return a sort key: numbers by value (``2`` before ``10``), letters without regard to case or accents."""
    text = str(entity_id)
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).casefold()
    parts = []
    for part in _DIGITS.split(plain):
        number = part.lstrip("0")
        # By length, then text: int() refuses more than 4300 digits.
        parts.append((0, len(number), number) if part.isascii() and part.isdigit() else (1, 0, part))
    return [part for part in parts if part[2] or part[0] == 0], text, isinstance(entity_id, int)


class PersistBase:
    """Values of one entity name in one directory. Subclass it and override what lies elsewhere.

    Args:
        entity_name: Any text; different names never meet.
        base_dir: Directory of the store, resolved now; all instances of a process share it.
    """

    def __init__(self, entity_name: str, base_dir: str | Path = "./dump/data") -> None:
        self.entity_name = entity_name
        self.base_dir = base_dir
        self._domain = "entity"
        self._quoted = quote(_text(entity_name), keep_underscore=True)
        domain, self._shared = _find_store(base_dir)
        if domain and type(self) is PersistBase:
            self._domain = domain
            self._quoted = entity_name if _STORED_NAME.fullmatch(entity_name) else self._quoted
        elif domain:  # "=": no quoted text begins so
            self._quoted = "=" + quote(f"{domain}/{entity_name}")

    async def wait_for_init(self, initial: bool = True) -> None:
        """Open the store, if it is not open yet. Repeatable.

        Raises:
            HeldError: Another process has the directory; the message names it.

        Crash: Leaves what was there.
        """
        await self._desk()

    async def read_value(self, entity_id: EntityId) -> Any:
        """Return the value.

        Raises:
            NotFoundError: There is none.
            CorruptedError: It is damaged; its bytes are in quarantine, other values can be read.
        """
        desk = await self._desk()
        if self._domain != "entity":
            rows = await self._domain_rows(desk, entity_id)
            if not rows:
                raise NotFoundError(f"{self._domain} {self.entity_name}: nothing under {entity_id!r:.80}")
            return value_of(self._domain, rows.values())
        row = await desk.read(self._key(entity_id))
        if row is None:
            raise NotFoundError(f"entity {self.entity_name}: nothing under {entity_id!r:.80}: ask has_value first")
        return cast("Entity", row).value

    async def has_value(self, entity_id: EntityId) -> bool:
        """Return whether there is a value."""
        desk = await self._desk()
        if self._domain != "entity":
            return bool(await self._domain_rows(desk, entity_id))
        return await desk.read(self._key(entity_id)) is not None

    async def write_value(self, entity_id: EntityId, value: Any) -> None:
        """Write the value over whatever was there.

        Args:
            entity_id: Text or int; 1 and "1" are different.
            value: Plain JSON: None, bool, int of 64 bits, finite float, text, list, dict with text keys.

        Raises:
            InvalidInputError: JSON would not give the value back as it is; nothing was written.

        Crash: The old value or the new one.
        """
        key = self._key(entity_id)
        if self._domain == "entity":
            require_plain(value)
            await (await self._desk()).put(key, Entity(id=entity_id, value=value))
        elif self._domain == "risk":
            rows: dict[Key, Row] = dict(positions_of(self._quoted, value))
            await (await self._desk()).replace("risk", self._quoted, rows)
        else:
            await (await self._desk()).put(key, row_of(key, value))

    async def remove_value(self, entity_id: EntityId) -> None:
        """Delete the value.

        Raises:
            NotFoundError: There is none.

        Crash: The value is there or not.
        """
        key, desk = self._key(entity_id), await self._desk()
        if self._domain == "risk":
            removed = await desk.replace("risk", self._quoted, {}) > 0
        else:
            removed = await desk.put(key, None, must_exist=True)
        if not removed:
            raise NotFoundError(f"{self._domain} {self.entity_name}: nothing under {entity_id!r:.80} to delete")

    async def remove_all(self) -> None:
        """Delete every value of this entity name, in one commit.

        Crash: All are there or none.
        """
        await (await self._desk()).replace(self._domain, self._quoted, {})

    async def keys(self) -> AsyncIterator[EntityId]:
        """Yield the ids in natural order, as they were given."""
        for entity_id in await self._ids():
            yield entity_id

    async def values(self) -> AsyncIterator[Any]:
        """Yield the values in the order of their ids.

        Raises:
            CorruptedError: Some are damaged; raised after all the good ones were yielded.
        """
        ids, desk = await self._ids(), await self._desk()
        damaged: CorruptedError | None = None
        for at in range(0, len(ids), _BATCH):
            keys = [self._key(entity_id) for entity_id in ids[at : at + _BATCH]]
            if self._domain == "risk":
                rows = await desk.scan("risk", self._quoted)
                yield value_of("risk", rows.values())
                continue
            found, bad = await desk.store.salvage(*keys)
            for key in keys:
                if key in found:
                    row = found[key].row
                    yield row.value if isinstance(row, Entity) else value_of(self._domain, [row])
            for key, reason in bad.items():
                damaged = damaged or CorruptedError(reason, key=key)
        if damaged is not None:
            raise damaged

    async def filter(self, predicate: Callable[[Any], bool]) -> AsyncIterator[Any]:
        """Yield the values for which ``predicate`` is true, in the order of their ids."""
        async for value in self.values():
            if predicate(value):
                yield value

    async def take(self, count: int, predicate: Callable[[Any], bool] | None = None) -> AsyncIterator[Any]:
        """Yield at most ``count`` values, of those for which ``predicate`` is true; none for 0."""
        if type(count) is not int or count < 0:
            raise InvalidInputError(f"take() needs a count of 0 or more, not {count!r:.80}")
        left = count
        if not left:
            return
        async for value in self.values():
            if predicate is None or predicate(value):
                yield value
                left -= 1
                if not left:
                    return

    async def get_count(self) -> int:
        """Return how many values there are."""
        return len(await self._ids())

    def __aiter__(self) -> AsyncIterator[Any]:
        return self.values()

    async def _desk(self) -> Desk:
        return await self._shared().desk(routed=False)

    def _key(self, entity_id: EntityId) -> Key:
        if self._domain == "risk":
            if entity_id != "positions":
                raise InvalidInputError(f"a risk profile has one value, 'positions', not {entity_id!r:.80}")
            return Key("risk", self._quoted, "positions")
        return Key(self._domain, self._quoted, quote(entity_id, keep_underscore=self._domain == "entity"))

    async def _domain_rows(self, desk: Desk, entity_id: EntityId) -> dict[Key, Row]:
        key = self._key(entity_id)
        if self._domain == "risk":
            return await desk.scan("risk", self._quoted)
        row = await desk.read(key)
        return {} if row is None else {key: row}

    async def _ids(self) -> list[EntityId]:
        desk = await self._desk()
        keys = await desk.store.keys(KeyPrefix(self._domain, self._quoted))
        if self._domain == "risk":
            return ["positions"] if keys else []
        ids: list[EntityId] = []
        for key in keys:
            entity_id = unquote(key.entity_id)
            if entity_id is None:  # cut: the row knows
                loaded = (await desk.store.salvage(key))[0].get(key)
                entity_id = loaded.row.id if loaded is not None and isinstance(loaded.row, Entity) else None
            if entity_id is not None:
                ids.append(entity_id)
        return sorted(ids, key=natural_order)


def _find_store(base_dir: object) -> tuple[str, Callable[[], SharedStore]]:
    """Return the domain that ``base_dir`` is in the default store ("" for none), and how to get its store."""
    if not isinstance(base_dir, str | Path) or "\0" in str(base_dir):
        raise InvalidInputError(f"base_dir must be a path, not {base_dir!r:.80}")
    path = Path(base_dir)
    if path.name in DOCUMENT_DOMAINS and default.is_default(path.parent):
        return path.name, default.shared
    if default.is_default(path):
        return "", default.shared
    absolute = path.absolute()
    return "", lambda: store_at(absolute)


def _text(name: object) -> str:
    if not isinstance(name, str):
        raise InvalidInputError(f"an entity name must be text, not {type(name).__name__}: {name!r:.80}")
    return name


__all__ = ["EntityId", "PersistBase", "natural_order"]
