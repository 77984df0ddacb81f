"""The format of ``commit.log``: bytes in, values out, no input or output. ``docs/format.md`` shows it byte by byte.

A log is a row of *frames*. One frame is written per group of commits, and the next one only after the last was
made durable, so only the very last frame can be torn; a bad frame with a frame behind it is damage. A frame's
body is a row of *entries*: one line of JSON with its own checksum, then the payloads that it names, verbatim.

Invariants:

* Frame numbers and each scope's commit numbers grow by one, so a lost, stale or repeated frame is seen.
* The first frame is a snapshot that was made durable before the log got its name: it is never torn.
* Damage inside a payload is pinned to its key; damage anywhere else refuses the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import NamedTuple, TypeVar
from zlib import crc32

import msgspec

from ..contract import Key, Op, Record, WriterOp
from .state import Scope, State

HEADER_BYTES = 48
_MAGIC = b"HF1 "
_UNREADABLE = -1
"""Stands for a payload's checksum in a snapshot where the payload was damaged before the snapshot was made."""


class NotOurs(Exception):
    """The bytes are no log of this format (foreign, empty or newer): leave them as they are. Says why."""


class Damaged(Exception):
    """The bytes are a damaged log: keep a copy, and do not go on. Says where."""


class CommitLine(msgspec.Struct, frozen=True):
    """One commit. The payloads of ``write`` follow the line, each ended by a newline."""

    scope: str
    number: int
    op: Op
    delete: list[Key]
    write: list[Key]
    lengths: list[int]
    """Of each payload, in bytes."""
    sums: list[int]
    """CRC-32 of each payload."""


class SnapshotLine(msgspec.Struct, frozen=True):
    """One scope as it stood. The payloads of ``keys`` follow the line, each ended by a newline."""

    scope: str
    number: int
    writers: dict[str, WriterOp]
    versions: list[int]
    """Numbers of the commits that wrote the rows, each once."""
    ops: list[Op]
    """The op of each of ``versions``."""
    keys: list[Key]
    commits: list[int]
    """For each key, where in ``versions`` and ``ops`` its commit stands."""
    lengths: list[int]
    sums: list[int]


class GoneLine(msgspec.Struct, frozen=True):
    """Keys that were deleted before the snapshot, whose views may still be there."""

    keys: list[Key]


class SealLine(msgspec.Struct, frozen=True):
    """Nothing changed; tells that everything before was durable."""

    at: str
    """``close`` or ``open``."""


class WitnessLine(msgspec.Struct, frozen=True):
    """What was durable (``heads``) and shown by the views (``views``) some time ago: commit numbers by scope."""

    heads: dict[str, int]
    views: dict[str, int]


_Line = TypeVar("_Line", CommitLine, SnapshotLine, GoneLine, SealLine, WitnessLine)
_ENCODER = msgspec.json.Encoder()
_CRC_C = crc32(b"c")
_make = tuple.__new__  # what Record() comes to, without a call in Python for each of thousands of rows
_COMMIT = msgspec.json.Decoder(CommitLine)
_SNAPSHOT = msgspec.json.Decoder(SnapshotLine)
_GONE = msgspec.json.Decoder(GoneLine)
_SEAL = msgspec.json.Decoder(SealLine)
_WITNESS = msgspec.json.Decoder(WitnessLine)


def _entry(tag: bytes, line: _Line) -> bytes:
    text = _ENCODER.encode(line)
    return b"%b %08x %b\n" % (tag, crc32(text, crc32(tag)), text)


def commit_entry(scope: str, number: int, op: Op, changes: Mapping[Key, bytes | None]) -> bytes:
    """Return the bytes of one commit."""
    if len(changes) == 1:
        [(key, payload)] = changes.items()
        if payload is not None:  # most commits: nothing to collect
            text = _ENCODER.encode(CommitLine(scope, number, op, [], [key], [len(payload)], [crc32(payload)]))
            return b"c %08x %b\n%b\n" % (crc32(text, _CRC_C), text, payload)
    deleted: list[Key] = []
    written: list[Key] = []
    payloads: list[bytes] = []
    lengths: list[int] = []
    sums: list[int] = []
    for key, payload in changes.items():
        if payload is None:
            deleted.append(key)
        else:
            written.append(key)
            payloads.append(payload)
            lengths.append(len(payload))
            sums.append(crc32(payload))
    text = _ENCODER.encode(CommitLine(scope, number, op, deleted, written, lengths, sums))
    payloads.append(b"")
    return b"c %08x %b\n%b" % (crc32(text, _CRC_C), text, b"\n".join(payloads))


def snapshot_body(state: State, gone: Iterable[Key] = ()) -> bytes:
    """Return a frame body that holds every live row, head and writer, and the deleted keys that may have a view."""
    parts: list[bytes] = [_entry(b"g", GoneLine(list(gone)))]
    for name in state.names():
        scope = state.scopes[name]
        keys = sorted(scope.rows)
        records = [scope.rows[key] for key in keys]
        ops = {record.version: record.op for record in records}
        places = dict(zip(ops, range(len(ops)), strict=True))
        payloads = [record.payload for record in records]
        sums = [
            _UNREADABLE if key in scope.damaged else crc32(payload)
            for key, payload in zip(keys, payloads, strict=True)
        ]  # fmt: skip
        commits = [places[record.version] for record in records]
        lengths = [*map(len, payloads)]
        line = SnapshotLine(
            name, scope.number, scope.writers, [*ops], [*ops.values()], keys, commits, lengths, sums
        )  # fmt: skip
        parts += (_entry(b"s", line), b"\n".join([*payloads, b""]))
    return b"".join(parts)


def seal_body(at: str) -> bytes:
    """Return a frame body that changes nothing: with it behind them, older frames can no longer pass for torn."""
    return _entry(b"e", SealLine(at))


def frame(number: int, body: bytes) -> bytes:
    """Return frame ``number``: its header and its body."""
    start = b"%b%08x %08x %016x " % (_MAGIC, len(body), crc32(body), number)
    return b"%b%08x\n%b" % (start, crc32(start), body)


def witness_text(heads: Mapping[str, int], views: Mapping[str, int]) -> bytes:
    """Return the text of the witness file."""
    return _entry(b"w", WitnessLine(dict(heads), dict(views)))


def read_witness(text: bytes) -> WitnessLine | None:
    """Return what a witness file says, or None if it is damaged."""
    line = text[11:-1]
    if text[:2] != b"w " or text[-1:] != b"\n" or text[2:11] != b"%08x " % crc32(line, crc32(b"w")):
        return None
    try:
        return _WITNESS.decode(line)
    except msgspec.DecodeError:
        return None


class _Header(NamedTuple):
    length: int
    crc: int
    number: int


def _read_header(data: bytes, at: int) -> _Header | None:
    head = data[at : at + HEADER_BYTES]
    if len(head) < HEADER_BYTES or head[:4] != _MAGIC or head[47:] != b"\n":
        return None
    if head[39:47] != b"%08x" % crc32(head[:39]):
        return None
    return _Header(int(head[4:12], 16), int(head[13:21], 16), int(head[22:38], 16))


def _frame_behind(data: bytes, at: int, number: int) -> bool:
    """Tell whether a frame with a number of at least ``number`` begins anywhere at or behind ``at``."""
    while (at := data.find(_MAGIC, at)) >= 0:
        head = _read_header(data, at)
        if head is not None and head.number >= number:
            return True
        at += 1
    return False


class Replay:
    """What a log holds, built while it is read."""

    def __init__(self) -> None:
        self.state = State()
        self.gone: set[Key] = set()
        """Keys that a commit deleted: a view of theirs is a leftover."""
        self.length = 0
        """How many bytes are whole frames; what lies behind is a torn tail."""
        self.number = 0
        """Number of the last whole frame."""
        self.sealed = True
        """The last whole frame changed nothing (or is the first): nothing durable hangs on its bytes alone."""
        self.flawed_frames = 0
        """How many frames do not match their checksum although every row in them may."""

    def _commit(self, line: CommitLine, data: bytes, at: int, end: int, trusted: bool) -> int:
        at, payloads = _payloads(data, at, end, line.write, line.lengths)
        scope = self.state.scope(line.scope)
        number, op = line.number, line.op
        if number != scope.number + 1:
            raise Damaged(f"commit {number} of scope {line.scope} follows {scope.number}")
        changes: dict[Key, Record | None] = dict.fromkeys(line.delete)
        records = [_make(Record, (payload, number, op)) for payload in payloads]
        changes.update(zip(line.write, records, strict=True))
        scope.apply(number, op.writer, WriterOp(op.n, number), changes)
        if not trusted:
            scope.damaged.update(_damaged(line.write, payloads, line.sums))
        if line.delete:
            self.gone.update(line.delete)
        if self.gone:
            self.gone.difference_update(line.write)
        return at

    def _snapshot(self, line: SnapshotLine, data: bytes, at: int, end: int, trusted: bool) -> int:
        at, payloads = _payloads(data, at, end, line.keys, line.lengths)
        if line.scope in self.state.scopes:
            raise Damaged(f"a second snapshot of scope {line.scope}")
        scope = self.state.scopes[line.scope] = Scope()
        scope.number, scope.writers = line.number, line.writers
        versions, ops = map(line.versions.__getitem__, line.commits), map(line.ops.__getitem__, line.commits)
        records = [_make(Record, fields) for fields in zip(payloads, versions, ops, strict=True)]
        scope.rows = dict(zip(line.keys, records, strict=True))
        if not trusted:
            scope.damaged.update(_damaged(line.keys, payloads, line.sums))
        elif line.sums and min(line.sums) < 0:
            scope.damaged.update(key for key, crc in zip(line.keys, line.sums, strict=True) if crc == _UNREADABLE)
        return at

    def body(self, data: bytes, at: int, end: int, *, trusted: bool) -> None:
        """Apply one frame's body; ``trusted`` when its checksum holds, so that no other needs to be looked at."""
        self.sealed = True
        while at < end:
            stop = data.find(b"\n", at, end)
            tag, text = data[at : at + 2], data[at + 11 : stop]
            if stop < 0 or not (trusted or data[at + 1 : at + 11] == b" %08x " % crc32(text, crc32(tag[:1]))):
                raise Damaged(f"the entry at byte {at} does not match its checksum")
            at = stop + 1
            try:
                if tag == b"c ":
                    at = self._commit(_COMMIT.decode(text), data, at, end, trusted)
                    self.sealed = False
                elif tag == b"s ":
                    at = self._snapshot(_SNAPSHOT.decode(text), data, at, end, trusted)
                elif tag == b"g ":
                    self.gone.update(_GONE.decode(text).keys)
                elif tag == b"e ":
                    _SEAL.decode(text)
                else:
                    raise NotOurs(f"it holds an entry {tag!r} that this version does not know: upgrade holdfast")
            except (msgspec.DecodeError, ValueError, IndexError) as error:
                raise Damaged(f"the entry before byte {at} cannot be read: {error}") from error


def _payloads(data: bytes, at: int, end: int, keys: list[Key], lengths: list[int]) -> tuple[int, list[bytes]]:
    """Return where the payloads that begin at ``at`` end, and the payloads."""
    if len(keys) != len(lengths) or (lengths and min(lengths) < 0):
        raise Damaged(f"the entry before byte {at} does not fit together")
    starts = [*accumulate([length + 1 for length in lengths], initial=at)]  # a newline ends each payload
    if starts[-1] > end:
        raise Damaged(f"the payloads from byte {at} reach over the end of their frame")
    return starts[-1], [data[start : start + length] for start, length in zip(starts, lengths, strict=False)]


def _damaged(keys: list[Key], payloads: list[bytes], sums: list[int]) -> list[Key]:
    return [key for key, payload, crc in zip(keys, payloads, sums, strict=True) if crc32(payload) != crc]


def _require_log(data: bytes) -> None:
    if not data:
        raise NotOurs("it is empty, and Holdfast never leaves it so")
    if data[:4] == _MAGIC or _frame_behind(data, 0, 0):
        return
    if data[:2] == b"HF" and data[2:3].isdigit():
        raise NotOurs("it was written by a newer version: upgrade holdfast")
    raise NotOurs("it is not a Holdfast log")


def replay(data: bytes) -> Replay:
    """Read a log.

    Raises:
        NotOurs: It is foreign, empty or of a newer format.
        Damaged: A frame that is not the last one cannot be read, or numbers are out of order.
    """
    _require_log(data)
    found = Replay()
    at, size = 0, len(data)
    whole = memoryview(data)
    while at < size:
        head = _read_header(data, at)
        if head is None:
            break
        if at and head.number != found.number + 1:
            raise Damaged(f"frame {head.number} at byte {at} follows frame {found.number}")
        start = at + HEADER_BYTES
        end = start + head.length
        if end > size:
            break
        trusted = crc32(whole[start:end]) == head.crc
        if not trusted:
            if at and not _frame_behind(data, end, head.number + 1):
                break
            found.flawed_frames += 1
        found.body(data, start, end, trusted=trusted)
        found.number, found.length = head.number, end
        at = end
    if at == 0:
        raise Damaged("its first frame cannot be read")
    # The frame that may be torn would have the next number: any later one was written after that one was durable.
    if _frame_behind(data, at, found.number + 2):
        raise Damaged(f"the frame at byte {at} cannot be read, and there are good ones behind it")
    return found
