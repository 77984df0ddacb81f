"""A local memory of what a store has shown before, so that an older state put back is noticed.

Encryption cannot tell a row from the same row as it was last week: both are genuine. The witness can: a small file on
this machine, out of reach of whoever can write to the store, keeps for each scope the highest commit number seen, and
for each row its last version and op.

Invariants:

* Only what the store has acknowledged, or shown to a reader, is noted: a crash, or a power cut within what the store
  attests, never leaves the witness ahead of the store, so it raises no false alarm.
* It may lag: the file is written at most :data:`FLUSH_SECONDS` after a change, and at close. Put back within that time
  of a crash, an older state is not noticed.
* Numbers only grow. Processes that share a file add what they know; none takes back what another noted.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import msgspec

from ..contract import Head, Key, Op, Record
from ..errors import CorruptedError, InvalidInputError

_log = logging.getLogger("holdfast")

FLUSH_SECONDS = 1.0
MAX_ROWS = 10_000
"""Of how many rows of a store the file keeps the last version. Deleted ones go first, then those longest unchanged;
for what is gone only the scope's number is compared."""
_FORMAT = 1


class Seen(NamedTuple):
    """The last that was seen of a row: its version and the op that wrote it; no writer once it was deleted."""

    version: int
    writer: str
    n: int


_Rows = dict[tuple[str, Key], Seen]


class _Section(msgspec.Struct):
    """What the file says of one store."""

    scopes: dict[str, int]
    rows: dict[str, tuple[int, str, int]]
    """Under ``SCOPE DOMAIN/NAME/ID``."""


class _File(msgspec.Struct):
    format: int
    stores: dict[str, _Section]


class Witness:
    """One store's part of a witness file.

    Args:
        path: The file; its directory must exist. Several stores and processes may share it.
        flush_seconds: How long it may lag behind.
    """

    def __init__(self, path: str | os.PathLike[str], *, flush_seconds: float = FLUSH_SECONDS) -> None:
        self.path = Path(path)
        self._flush_seconds = flush_seconds
        self._store = ""
        self._scopes: dict[str, int] = {}
        self._rows: _Rows = {}
        self._changed = False
        self._task: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self._read_only = False

    def __repr__(self) -> str:
        return f"Witness({str(self.path)!r})"

    # ------------------------------------------------------------------ opening and closing

    async def open(self, store: str, *, read_only: bool) -> bool:
        """Read what is known of ``store``; return whether anything was.

        Args:
            store: The backend's own name, without credentials.
            read_only: Write nothing.

        Raises:
            InvalidInputError: The file cannot be read or written; the message names it.
            CorruptedError: It is damaged.

        Crash: The file is as it was, or new and whole.
        """
        self._store, self._read_only, self._writing = store, read_only, asyncio.Lock()
        section = _section_of(await asyncio.to_thread(_load, self.path), store)
        self._scopes, self._rows, self._changed = {}, {}, False
        known = bool(section.scopes or section.rows)
        self._take(section.scopes, _rows_of(section))
        if not read_only:
            try:
                await self.flush()
            except OSError as error:
                raise InvalidInputError(f"the witness {self.path} cannot be written: {error.strerror}") from error
        return known

    async def close(self) -> None:
        """Write what was noted since. Repeatable.

        Crash: What was noted in the last moments may be missing.
        """
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if self._changed:
            await self._flush_or_tell()

    # ------------------------------------------------------------------ comparing

    @property
    def scopes(self) -> Mapping[str, int]:
        """For each scope the highest commit number seen."""
        return dict(self._scopes)

    def floor(self, scope: str) -> int:
        """Return the highest commit number seen of ``scope``; 0 if none was."""
        return self._scopes.get(scope, 0)

    def known(self, scope: str, keys: Iterable[Key]) -> dict[Key, Seen]:
        """Return what is known of ``keys`` at this moment: what a read that begins now may not fall behind."""
        rows = self._rows
        return {key: seen for key in keys if (seen := rows.get((scope, key))) is not None}

    def require_head(self, scope: str, number: int, floor: int) -> None:
        """Refuse a scope that stands before what was seen.

        Raises:
            CorruptedError: Commits are missing that had been there.
        """
        if number < floor:
            raise CorruptedError(
                f"scope {scope} stands at commit {number}, but {self.path} has seen {floor}: an older state of the "
                "store was put back, or it lost commits (a restore, a failover). Compare with your exchange before "
                "you trade; to accept it as it is, move that file away",
                backend=self._store,
            )

    @staticmethod
    def why_not(record: Record, seen: Seen) -> str:
        """Return why ``record`` cannot be what follows ``seen``; empty if it can."""
        version, op = record.version, record.op
        if version < seen.version:
            gone = "deleted" if not seen.writer else "written"
            return f"it is of commit {version}, but commit {seen.version}, which has {gone} it since, was seen"
        if version == seen.version and (seen.writer, seen.n) != (op.writer, op.n):
            return f"at commit {version} another op was seen"
        if version > seen.version and op.writer == seen.writer and op.n <= seen.n:
            return f"op {op.n} of {op.writer} cannot come after its op {seen.n}, which was seen at {seen.version}"
        return ""

    # ------------------------------------------------------------------ noting

    def note_head(self, scope: str, head: Head) -> None:
        """Take note of where a scope stands."""
        self._raise_scope(scope, head.number)

    def note_read(self, scope: str, records: Mapping[Key, Record]) -> None:
        """Take note of rows that a read has returned."""
        rows, newest, touched = self._rows, self._scopes.get(scope, 0), False
        for key, (_, version, (writer, n)) in records.items():
            before = rows.get((scope, key))
            if before is None or before[0] < version:
                rows[scope, key] = Seen(version, writer, n)
                newest, touched = max(newest, version), True
        if touched:
            self._raise_scope(scope, newest)
            self._touch()

    def note_commit(self, scope: str, number: int, changes: Mapping[Key, bytes | None], op: Op) -> None:
        """Take note of a commit that the store has acknowledged."""
        for key, payload in changes.items():
            before = self._rows.get((scope, key))
            if before is None or before.version < number:
                self._rows[scope, key] = Seen(number, "", -1) if payload is None else Seen(number, op.writer, op.n)
        self._raise_scope(scope, number)
        self._touch()

    def _raise_scope(self, scope: str, number: int) -> None:
        if number > self._scopes.get(scope, 0):
            self._scopes[scope] = number
            self._touch()

    def _touch(self) -> None:
        self._changed = True
        if not self._read_only and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._flush_later(), name="holdfast witness")

    def _take(self, scopes: Mapping[str, int], rows: _Rows) -> None:
        for scope, number in scopes.items():
            self._scopes[scope] = max(number, self._scopes.get(scope, 0))
        for name, seen in rows.items():
            before = self._rows.get(name)
            if before is None or before.version < seen.version:
                self._rows[name] = seen

    # ------------------------------------------------------------------ writing

    async def _flush_later(self) -> None:
        while self._changed:
            await asyncio.sleep(self._flush_seconds)
            await self._flush_or_tell()

    async def _flush_or_tell(self) -> None:
        try:
            await self.flush()
        except (OSError, CorruptedError, InvalidInputError) as error:
            _log.warning("the witness %s could not be written: %s", self.path, error)

    async def flush(self) -> None:
        """Add what this process knows to the file, and learn what others have added.

        Raises:
            OSError: It cannot be written; the file is as it was.

        Crash: The file is as it was, or new and whole.
        """
        if self._read_only:
            return
        async with self._writing:
            scopes, rows = self._scopes.copy(), self._rows.copy()
            self._changed = False
            writing = asyncio.ensure_future(asyncio.to_thread(_merge, self.path, self._store, scopes, rows))
            try:
                news, kept = await asyncio.shield(writing)
            except asyncio.CancelledError:
                await asyncio.wait([writing])  # the thread goes on, and nobody may write beside it
                self._changed = True
                raise
            except BaseException:
                self._changed = True
                raise
            self._take(news.scopes, _rows_of(news))
            if kept is not None:
                noted = {name: seen for name, seen in self._rows.items() if rows.get(name) != seen}  # meanwhile
                self._rows = {**kept, **noted}


def _load(path: Path) -> _File:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return _File(_FORMAT, {})
    except OSError as error:
        raise InvalidInputError(f"the witness {path} cannot be read: {error.strerror}") from error
    text, _, checksum = raw.rstrip(b"\n").rpartition(b"\n")
    if checksum != b"%08x" % crc32(text):
        raise CorruptedError(f"the witness {path} is damaged: move it away to begin anew, and ask who changed it")
    try:
        found = msgspec.json.decode(text, type=_File)
    except msgspec.DecodeError as error:
        raise CorruptedError(f"the witness {path} cannot be read: {error}") from error
    if found.format != _FORMAT:
        raise CorruptedError(f"the witness {path} has format {found.format}: a newer version wrote it: upgrade")
    return found


def _merge(path: Path, store: str, scopes: dict[str, int], rows: _Rows) -> tuple[_Section, _Rows | None]:
    """Add to the file what this process knows. Runs in a thread.

    Returns:
        What the file knew better, and, where memory holds too much, what to keep there.
    """
    with _locked(path):
        whole = _load(path)
        section = _section_of(whole, store)
        news = _Section({}, {})
        for scope, number in scopes.items():
            if section.scopes.get(scope, 0) < number:
                section.scopes[scope] = number
        news.scopes = {scope: number for scope, number in section.scopes.items() if number > scopes.get(scope, 0)}
        known = {f"{scope} {key}": seen for (scope, key), seen in rows.items()}
        for name, seen in known.items():
            there = section.rows.get(name)
            if there is None or there[0] < seen[0]:
                section.rows[name] = seen
        for name, row in section.rows.items():
            mine = known.get(name)
            if mine is None or mine[0] < row[0]:
                news.rows[name] = row
        if len(section.rows) > MAX_ROWS:
            by_worth = sorted(section.rows.items(), key=lambda item: (item[1][1] != "", item[1][0]))
            section.rows = dict(by_worth[-MAX_ROWS:])
            news.rows = {name: row for name, row in news.rows.items() if name in section.rows}
        text = msgspec.json.encode(whole)
        _replace(path, b"%b\n%08x\n" % (text, crc32(text)))
    return news, _rows_of(section) if len(rows) > 2 * MAX_ROWS else None


_BETWEEN_COPIES = " + "
"""What :meth:`holdfast.contract.Guarantees.weakest` puts between the names of several backends."""


def _section_of(whole: _File, store: str) -> _Section:
    """Return what the file has on a store, under all names that it went by.

    A store with copies is named after those that could be reached: it is the same store when one of them is away.
    """
    names = set(store.split(_BETWEEN_COPIES))
    section = _Section({}, {})
    for other in [name for name in whole.stores if not names.isdisjoint(name.split(_BETWEEN_COPIES))]:
        names.update(other.split(_BETWEEN_COPIES))
        old = whole.stores.pop(other)
        for scope, number in old.scopes.items():
            section.scopes[scope] = max(number, section.scopes.get(scope, 0))
        for name, row in old.rows.items():
            if name not in section.rows or section.rows[name][0] < row[0]:
                section.rows[name] = row
    whole.stores[_BETWEEN_COPIES.join(sorted(names))] = section
    return section


def _rows_of(section: _Section) -> _Rows:
    found: _Rows = {}
    for name, row in section.rows.items():
        scope, _, path = name.partition(" ")
        found[scope, Key(*path.split("/"))] = Seen(*row)
    return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _replace(path: Path, data: bytes) -> None:
    temporary = f"{path}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)  # before the rename: else a power cut could leave the new name with no content
    finally:
        os.close(fd)
    Path(temporary).replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)  # else the old file could come back, and with it an older memory
    finally:
        os.close(directory)
