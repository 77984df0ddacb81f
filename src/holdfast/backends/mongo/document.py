"""What a scope's document holds, and how a group of commits is judged against it (pure).

::

    {_id: "main", format: 1, number: 7, tip: "…", bytes: 714,
     rows: {"signal/BTCUSDT_a_x/BTCUSDT": {version: 7, writer: "bot@1a", n: 3, bytes: 714, row: "{…}"}},
     writers: {"bot@1a": {n: 3, number: 7}}}

Invariants:

* ``number`` and ``tip`` change with every update; ``tip`` is drawn by chance, so a state that was taken back (a
  failover, a restore) and a new one with the same number are never taken for each other.
* A field name holds no dot and does not begin with ``$``. Keys have no comma, so ``,`` stands for the dot.
* ``bytes`` is never less than what the rows take in the document.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

from ...contract import MAX_WRITERS, Key, Op, WriterOp
from ...errors import ConflictError, HoldfastError, UnavailableError

FORMAT = 1
"""Number of the layout; raised with every change that an older version could not read."""
MANY_KEYS = 500
"""From so many keys on, all rows are asked for instead of each by name."""
_ROW_BYTES = 80
"""What a row takes beside its name, its writer's name and its payload, at most."""
_WRITER_BYTES = 64
_HEAD_BYTES = 512


class Asked(NamedTuple):
    """One commit, as it waits."""

    op: Op
    expect: Mapping[Key, int]
    texts: Mapping[Key, str | None]
    size: int


class RowState(NamedTuple):
    """What must be known of a row to judge a commit: its version (0: absent) and what it takes in the document."""

    version: int
    bytes: int


ABSENT = RowState(0, 0)


def field_of(key: Key) -> str:
    """Return the name of a row's field: the key's parts joined by ``/``, each dot as a comma."""
    return f"{key[0]}/{key[1]}/{key[2]}".replace(".", ",")


def key_of(field: str) -> Key:
    """Return the key whose field this is.

    Raises:
        ValueError, TypeError: Another hand made it.
    """
    return Key(*field.replace(",", ".").split("/"))


def writer_field(writer: str) -> str:
    """Return the name of a writer's field: ``%``, ``.`` and ``$`` become ``%25``, ``%2E`` and ``%24``."""
    return writer.replace("%", "%25").replace(".", "%2E").replace("$", "%24")


def writer_of(field: str) -> str:
    """Return the writer whose field this is."""
    return unquote(field)


class Known:
    """What a lane knows of its scope's document as of one moment.

    ``rows`` holds those that were looked at, and all of them if ``complete``; ``writers`` holds all, the one that wrote
    longest ago first.
    """

    __slots__ = ("bytes", "complete", "number", "rows", "tip", "writer_bytes", "writers")

    def __init__(self, number: int, tip: str, size: int, writers: Mapping[str, WriterOp]) -> None:
        self.number = number
        self.tip = tip
        self.bytes = size
        self.writers = dict(sorted(writers.items(), key=lambda item: item[1].number))
        self.writer_bytes = sum(map(_writer_bytes, self.writers))
        self.rows: dict[Key, RowState] = {}
        self.complete = False
        """A key that is not in ``rows`` is absent."""

    def row(self, key: Key) -> RowState:
        """Return what is known of a row; it was looked at, or all were."""
        return self.rows.get(key, ABSENT) if self.complete else self.rows[key]

    def lacks(self, group: Iterable[Asked]) -> bool:
        """Tell whether some row that the group names was not looked at."""
        if self.complete:
            return False
        rows = self.rows
        return any(key not in rows for asked in group for names in (asked.expect, asked.texts) for key in names)

    def advance(self, plan: Plan) -> None:
        """Take over what an update wrote."""
        self.number, self.tip, self.bytes = plan.number, plan.tip, plan.bytes
        self.rows.update(plan.rows)
        if self.complete:  # else rows that come and go, such as events, would fill the memory
            for key, state in plan.rows.items():
                if not state.version:
                    del self.rows[key]
        for writer in plan.forgotten:
            self.writer_bytes -= _writer_bytes(writer)
            del self.writers[writer]
        for writer, last in plan.writers.items():
            if self.writers.pop(writer, None) is None:
                self.writer_bytes += _writer_bytes(writer)
            self.writers[writer] = last


class Plan:
    """How a group is answered, and the one update that writes what it grants.

    Args:
        known: What the document holds; every row that the group names was looked at.
        tip: The document's next tip.
        limit_bytes: How large the document may become.
        backend: For errors.
    """

    def __init__(self, known: Known, tip: str, limit_bytes: int, backend: str) -> None:
        self.number = known.number
        self.tip = tip
        self.bytes = known.bytes
        self.rows: dict[Key, RowState] = {}
        self.writers: dict[str, WriterOp] = {}
        self.forgotten: dict[str, None] = {}
        self.answers: list[int | HoldfastError] = []
        self.repeats = False
        """Some op was there already."""
        self._known = known
        self._limit = limit_bytes
        self._backend = backend
        self._written: dict[Key, dict[str, Any] | None] = {}
        self._writer_bytes = known.writer_bytes

    @property
    def grants(self) -> bool:
        """Whether there is something to write."""
        return self.number > self._known.number

    def judge(self, asked: Asked) -> bool:
        """Judge one commit after those before it; tell whether it is granted."""
        answer = self._refusal(asked)
        if answer is None:
            self.number += 1
            self._apply(asked)
            answer = self.number
            self.answers.append(answer)
            return True
        self.repeats = self.repeats or isinstance(answer, int)
        self.answers.append(answer)
        return False

    def _last(self, writer: str) -> WriterOp | None:
        if writer in self.writers:
            return self.writers[writer]
        return None if writer in self.forgotten else self._known.writers.get(writer)

    def _row(self, key: Key) -> RowState:
        return self.rows.get(key) or self._known.row(key)

    def _refusal(self, asked: Asked) -> int | HoldfastError | None:
        """Return the number of a repeated op, or why it is refused, or None."""
        writer, n = asked.op
        last = self._last(writer)
        if last is not None and n == last.n:
            return last.number
        if last is not None and n < last.n:
            return ConflictError(
                f"op {n} of writer {writer} comes after its op {last.n}: that writer has moved on",
                backend=self._backend,
            )
        clashes = [key for key, version in asked.expect.items() if self._row(key).version != version]
        if clashes:
            return ConflictError(
                f"{', '.join(map(str, clashes[:3]))}: not at the expected version: read again, then decide again",
                keys=clashes,
                backend=self._backend,
            )
        grows = sum(
            (0 if text is None else row_bytes(key, text, writer)) - self._row(key).bytes
            for key, text in asked.texts.items()
        )
        total = _HEAD_BYTES + self.bytes + grows + self._writer_bytes + _writer_bytes(writer)
        if total > self._limit and grows > 0:
            return UnavailableError(
                f"{self._backend}: the scope's document would have about {total:,} bytes, and MongoDB takes "
                f"{self._limit:,}: nothing was written; spread the strategies over several scopes",
                backend=self._backend,
            )
        return None

    def _apply(self, asked: Asked) -> None:
        writer, n = asked.op
        for key, text in asked.texts.items():
            size = 0 if text is None else row_bytes(key, text, writer)
            self.bytes += size - self._row(key).bytes
            if text is None:
                self.rows[key], self._written[key] = ABSENT, None
            else:
                self.rows[key] = RowState(self.number, size)
                self._written[key] = {"version": self.number, "writer": writer, "n": n, "bytes": size, "row": text}
        if self._last(writer) is None:
            self._writer_bytes += _writer_bytes(writer)
            self._forget_one()
        self.writers.pop(writer, None)
        self.writers[writer] = WriterOp(n, self.number)

    def _forget_one(self) -> None:
        """Make room for one more writer: the one that wrote longest ago goes (a group has fewer than are kept)."""
        known = self._known.writers
        kept = len(known) - len(self.forgotten) + sum(writer not in known for writer in self.writers)
        if kept < MAX_WRITERS:
            return
        for writer in known:
            if writer not in self.forgotten and writer not in self.writers:
                self.forgotten[writer] = None
                self._writer_bytes -= _writer_bytes(writer)
                return

    def document(self, scope: str) -> dict[str, Any]:
        """Return the whole document of a scope that has none yet."""
        return {
            "_id": scope,
            "format": FORMAT,
            "number": self.number,
            "tip": self.tip,
            "bytes": self.bytes,
            "rows": {field_of(key): row for key, row in self._written.items() if row is not None},
            "writers": {writer_field(name): last._asdict() for name, last in self.writers.items()},
        }

    def update(self, scope: str) -> dict[str, Any]:
        """Return the update for a scope that has a document: it applies to the known state only."""
        setting: dict[str, Any] = {"number": self.number, "tip": self.tip, "bytes": self.bytes}
        removing: dict[str, str] = {f"writers.{writer_field(name)}": "" for name in self.forgotten}
        for key, row in self._written.items():
            if row is not None:
                setting[f"rows.{field_of(key)}"] = row
            elif self._known.row(key).version:
                removing[f"rows.{field_of(key)}"] = ""
        for name, last in self.writers.items():
            setting[f"writers.{writer_field(name)}"] = last._asdict()
        change: dict[str, Any] = {"$set": setting}
        if removing:
            change["$unset"] = removing
        return {"q": {"_id": scope, "number": self._known.number, "tip": self._known.tip}, "u": change}


def row_bytes(key: Key, text: str, writer: str) -> int:
    """Return what a row takes in the document, at most."""
    payload = len(text) if text.isascii() else len(text.encode())
    return _ROW_BYTES + sum(map(len, key)) + 2 + len(writer.encode()) + payload


def _writer_bytes(writer: str) -> int:
    return _WRITER_BYTES + len(writer_field(writer).encode())


def rows_asked(keys: Sequence[Key] | set[Key], *parts: str) -> dict[str, int]:
    """Return the projection that brings these rows, or these parts of them."""
    if len(keys) > MANY_KEYS:
        return {"rows": 1}
    return {f"rows.{field_of(key)}{part}": 1 for key in keys for part in (parts or ("",))}
