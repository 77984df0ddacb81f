"""One scope as one JSON object: how it is written, read, and changed. Pure.

::

    {"holdfast":1,"scope":"main","number":12,
    "writers":{"bot-7f3a":[3,12]},
    "rows":{
    "signal/BTCUSDT_my-strategy_binance/BTCUSDT":{"version":12,"n":3,"writer":"bot-7f3a","row":{…}}
    }}

Invariants:

* No two bodies of a scope are alike: ``number`` and the op that made it are in each, so that an ETag that was seen
  once stands for one state only.
* A row lies in the object as it was given, byte for byte. Text that would not come back so (blanks around it, deep
  nesting) lies there as ``"text"``, a JSON string.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from ...bulk import without_collections
from ...contract import Head, Key, Op, Record, WriterOp
from ...errors import CorruptedError, FullError, InvalidInputError, NewerFormatError
from ..state import Scope, State

FORMAT = 1
MAX_ROWS_BYTES = 16 * 1024 * 1024
"""How large the rows of one scope may become together: each commit sends them all."""
_MAX_DEPTH = 100
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]')
_RAW = msgspec.json.Decoder(msgspec.Raw)


class _Row(msgspec.Struct):
    version: int
    n: int
    writer: str
    row: msgspec.Raw = msgspec.Raw(b"")
    text: str | None = None


class _Document(msgspec.Struct):
    holdfast: int
    scope: str
    number: int
    writers: dict[str, WriterOp]
    rows: dict[str, _Row]


_DOCUMENT = msgspec.json.Decoder(_Document)


class Snapshot:
    """A scope as one object held it. Not changed once made; ``etag`` is empty where there is no object."""

    __slots__ = ("_lines", "etag", "scope")

    def __init__(self, etag: str, scope: Scope, lines: dict[Key, bytes] | None = None) -> None:
        self.etag = etag
        self.scope = scope
        self._lines = lines

    @property
    def lines(self) -> dict[Key, bytes]:
        """Each row as it lies in the object; made when they are first needed, as who only reads needs none."""
        if self._lines is None:
            self._lines = {key: _line(key, record) for key, record in self.scope.rows.items()}
        return self._lines

    @property
    def number(self) -> int:
        """The scope's commit number."""
        return self.scope.number

    @property
    def head(self) -> Head:
        """Where the scope stands."""
        return Head(self.scope.number, self.scope.writers.copy())


NOTHING = Snapshot("", Scope())
"""A scope that has no object."""


class Draft:
    """What the object becomes: a snapshot, with commits applied one after the other."""

    def __init__(self, name: str, base: Snapshot) -> None:
        self._name = name
        self._state = State()
        self._state.scopes[name] = base.scope.copy()
        self._lines = base.lines.copy()
        self._rows_bytes = sum(map(len, self._lines.values()))

    def add(self, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], op: Op) -> tuple[int, bool]:
        """Apply a commit; return its number, and whether it was there already.

        Raises:
            ConflictError: Some ``expect`` does not hold, or the writer has moved on.
            FullError: The object would become too large: no room, as on a disk that is full.
        """
        number, repeated = self._state.decide(self._name, changes, expect, op)
        if repeated:
            return number, True
        records = {k: None if payload is None else Record(payload, number, op) for k, payload in changes.items()}
        lines = {key: _line(key, record) for key, record in records.items() if record is not None}
        grown = sum(map(len, lines.values())) - sum(len(self._lines.get(key, b"")) for key in changes)
        if grown > 0 and self._rows_bytes + grown > MAX_ROWS_BYTES:
            raise FullError(
                f"scope {self._name} would hold {self._rows_bytes + grown} bytes of rows; one object takes at most "
                f"{MAX_ROWS_BYTES}, since each commit sends it whole: nothing was written; name several scopes"
            )
        self._state.scopes[self._name].apply(number, op.writer, WriterOp(op.n, number), records)
        for key in changes:
            self._lines.pop(key, None)
        self._lines.update(lines)
        self._rows_bytes += grown
        return number, False

    def body(self) -> bytes:
        """Return the object's bytes."""
        scope = self._state.scopes[self._name]
        writers = msgspec.json.encode(scope.writers)
        head = b'{"holdfast":%d,"scope":"%b","number":%d,\n"writers":%b,\n"rows":{\n'
        return b"%b%b\n}}\n" % (
            head % (FORMAT, self._name.encode(), scope.number, writers),
            b",\n".join(self._lines.values()),
        )

    def snapshot(self, etag: str) -> Snapshot:
        """Return what the object is once it was written under this ETag."""
        return Snapshot(etag, self._state.scopes[self._name], self._lines)


def read(name: str, etag: str, body: bytes, shown: str) -> Snapshot:
    """Return what an object holds.

    Raises:
        CorruptedError: It is damaged, or was written by another hand; it stays as it is.
        NewerFormatError: A newer version wrote it.
    """
    try:
        with without_collections():
            return _read(name, etag, body)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        pass  # not chained: the cause may repeat a row
    try:
        newer = msgspec.json.decode(body, type=dict[str, object]).get("holdfast")
    except (msgspec.MsgspecError, ValueError, RecursionError):
        newer = None
    if type(newer) is int and newer > FORMAT:
        raise NewerFormatError(f"{shown}: scope {name} has format {newer}: upgrade holdfast", backend=shown)
    raise CorruptedError(
        f"{shown}: the object {name}.json is damaged or was written by another hand: nothing was changed; "
        "put back a version that is whole",
        backend=shown,
    )


def _read(name: str, etag: str, body: bytes) -> Snapshot:
    found = _DOCUMENT.decode(body)
    if (found.holdfast, found.scope) != (FORMAT, name) or found.number < 1 or not etag:
        raise ValueError("another object")
    scope = Scope()
    scope.number = found.number
    # The dict keeps the order of the object; which writer wrote longest ago is told by its number.
    scope.writers = found.writers
    ops: dict[tuple[str, int], Op] = {}
    for text, row in found.rows.items():
        key = Key(*text.split("/"))
        op = ops.get((row.writer, row.n))
        if op is None:
            op = ops[row.writer, row.n] = Op(row.writer, row.n)
        payload = bytes(row.row) if row.text is None else row.text.encode()
        if not 1 <= row.version <= found.number or not payload:
            raise ValueError("no such version")
        scope.rows[key] = Record(payload, row.version, op)
    return Snapshot(etag, scope)


def require_text(key: Key, payload: bytes) -> None:
    """Refuse a payload that no JSON object can hold."""
    try:
        payload.decode()
    except UnicodeDecodeError:
        pass  # without the cause: it holds the payload
    else:
        return
    raise InvalidInputError(f"the payload of {key} is not JSON text in UTF-8: encode it first")


def _line(key: Key, record: Record) -> bytes:
    payload, version, (writer, n) = record
    name = msgspec.json.encode(writer)
    head = b'"%b":{"version":%d,"n":%d,"writer":%b,' % (str(key).encode(), version, n, name)
    if _comes_back(payload):
        return b'%b"row":%b}' % (head, payload)
    return b'%b"text":%b}' % (head, msgspec.json.encode(payload.decode()))


def _comes_back(payload: bytes) -> bool:
    """Tell whether a JSON text lies in another one and comes back byte for byte."""
    if payload.count(b"[") + payload.count(b"{") > _MAX_DEPTH and _depth(payload) > _MAX_DEPTH:
        return False
    try:
        return bytes(_RAW.decode(payload)) == payload
    except (msgspec.MsgspecError, RecursionError):
        return False


def _depth(payload: bytes) -> int:
    depth = deepest = 0
    for token in _TOKEN.findall(payload):
        if token in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif token in b"]}":
            depth -= 1
    return deepest
