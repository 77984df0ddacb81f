"""The statements of the SQLite backend: reads of one moment, and commits decided and written in one transaction.

Invariants:

* A transaction that writes has taken the write lock before it reads, so what it decides on cannot change under it.
* Each commit of a group is decided after those before it, by the one function that decides for memory and file too.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import msgspec

from ...contract import MAX_WRITERS, Head, Key, KeyPrefix, Op, Record, WriterOp
from ...errors import ConflictError, HoldfastError, InvalidInputError, UnknownOutcomeError
from ..sql import PAGE, records
from ..state import State
from .file import SqliteFile, primary_code

_KEY = "r.domain = j.value ->> 0 AND r.entity_name = j.value ->> 1 AND r.entity_id = j.value ->> 2"
_FIND = (
    "SELECT r.scope, r.domain, r.entity_name, r.entity_id, r.version "
    f"FROM json_each(?) AS j CROSS JOIN rows AS r ON {_KEY}"
)
_FIND_ONE = "SELECT scope, version FROM rows WHERE domain = ? AND entity_name = ? AND entity_id = ?"
_COLUMNS = "r.domain, r.entity_name, r.entity_id, CAST(r.row AS BLOB), r.version, r.writer, r.n"
_READ = f"SELECT {_COLUMNS} FROM json_each(?) AS j CROSS JOIN rows AS r ON {_KEY} WHERE r.scope = ?"
_READ_RANGE = (
    f"SELECT {_COLUMNS} FROM rows AS r WHERE scope = ? AND (domain, entity_name, entity_id) >= (?, ?, ?) "
    "AND (domain, entity_name, entity_id) <= (?, ?, ?) LIMIT ?"
)
_READ_ALL = f"SELECT {_COLUMNS} FROM rows AS r NOT INDEXED WHERE scope = ?"
_LAST = "SELECT max(rowid) FROM rows"
"""At least as many as there are rows."""
_HEAD = "SELECT writer, n, number FROM heads WHERE scope = ? ORDER BY number"
_FIND_HEAD = "SELECT n, number FROM heads WHERE scope = ? AND writer = ?"
_PUT_HEAD = (
    "INSERT INTO heads VALUES (?, ?, ?, ?) "
    "ON CONFLICT (scope, writer) DO UPDATE SET n = excluded.n, number = excluded.number"
)
_FORGET_WRITERS = (
    "DELETE FROM heads WHERE scope = ?1 AND writer IN "
    "(SELECT writer FROM heads WHERE scope = ?1 AND writer <> '' ORDER BY number LIMIT ?2)"
)
_PUT = (
    "INSERT INTO rows (scope, domain, entity_name, entity_id, row, version, writer, n) VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (domain, entity_name, entity_id) DO UPDATE "
    "SET row = excluded.row, version = excluded.version, writer = excluded.writer, n = excluded.n"
)
_CUT = "DELETE FROM rows WHERE domain = ? AND entity_name = ? AND entity_id = ?"
_MANY = 32
"""From so many keys on, looking them up together is quicker than one by one."""
_REMEMBERED = 50_000
"""How many keys' versions are remembered between commits, about."""
_Write = tuple[str, str | None, int, Op]
"""A row's scope, its text (None deletes), version and op."""


class Commit:
    """One commit that waits: what it asks for, and what became of it."""

    __slots__ = ("changes", "expect", "number", "op", "outcome", "scope", "size", "texts")

    def __init__(
        self,
        scope: str,
        changes: dict[Key, bytes | None],
        expect: dict[Key, int],
        op: Op,
        texts: dict[Key, str | None],
        size: int,
    ) -> None:
        self.scope = scope
        self.changes = changes
        self.expect = expect
        self.op = op
        self.texts = texts
        """The payloads as text."""
        self.size = size
        """Their bytes."""
        self.number = 0
        self.outcome: HoldfastError | None = None


class _Known:
    """What earlier transactions found out about the file. Good until another connection writes, or a write fails."""

    def __init__(self, data_version: int) -> None:
        self.data_version = data_version
        self.state = State()
        self.scopes: dict[str, int] = {}
        """Scopes that were looked up, each with how many writers it remembers."""
        self.writers: set[tuple[str, str]] = set()
        """Writers that were looked up, found or not."""
        self.keys: set[Key] = set()
        """Keys that were looked up, found or not."""

    def is_large(self) -> bool:
        """Whether it is time to begin anew, so that it stays small."""
        return len(self.keys) > _REMEMBERED or len(self.writers) > MAX_WRITERS // 2


class SqliteRows:
    """Reads and commits over one connection, on the thread that opened it."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file
        self._sql = file.sql
        self._known: _Known | None = None
        self._next_known: _Known | None = None
        """What will be known if the transaction under way succeeds."""

    def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys`` as of one moment."""
        try:
            if len(keys) >= _MANY:
                limit = 2 * len(keys) + 100
                (last,) = self._sql.execute(_LAST).fetchone()
                if (last or 0) <= limit:  # so few rows are there that going through them as they lie is quickest
                    return records(keys, _in_pieces(self._sql.execute(_READ_ALL, (scope,))))[1]
                # Most often they are all that lie between the first and the last, and then this is much quicker.
                lines = self._sql.execute(_READ_RANGE, (scope, *min(keys), *max(keys), limit))
                seen, found = records(keys, _in_pieces(lines))
                if seen < limit:
                    return found
            return records(keys, self._sql.execute(_READ, (msgspec.json.encode(keys).decode(), scope)))[1]
        except sqlite3.Error as error:
            raise self._file.mapped(error, "it cannot be read") from error

    def head(self, scope: str) -> Head:
        """Return the scope's commit number and its writers' last ops, as of one moment."""
        writers = {writer: WriterOp(n, number) for writer, n, number in self._query(_HEAD, (scope,))}
        stand = writers.pop("", None)
        return Head(stand.number if stand else 0, writers)

    def keys(self, scope: str, prefix: KeyPrefix, after: Key) -> list[Key]:
        """Return the next page of keys under ``prefix``, in byte order."""
        where, values = ["scope = ?", "(domain, entity_name, entity_id) > (?, ?, ?)"], [scope, *after]
        for column, part in zip(("domain", "entity_name"), prefix, strict=True):
            if part:
                where.append(f"{column} = ?")
                values.append(part)
        found = self._query(
            f"SELECT domain, entity_name, entity_id FROM rows WHERE {' AND '.join(where)} "
            f"ORDER BY domain, entity_name, entity_id LIMIT {PAGE}",
            values,
        )
        return [Key(*parts) for parts in found]

    def scopes(self) -> list[str]:
        """Return the names of the scopes that have had a commit, in byte order."""
        return [scope for (scope,) in self._query("SELECT scope FROM scopes ORDER BY scope", ())]

    def _query(self, statement: str, values: Sequence[object]) -> list[Any]:
        try:
            return self._sql.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._file.mapped(error, "it cannot be read") from error

    def apply(self, group: Sequence[Commit]) -> None:
        """Decide and apply commits in one transaction with one flush; each one's number or outcome is set on it.

        Raises:
            UnavailableError: Nothing of the group was written.
            UnknownOutcomeError: The flush failed; the file must be opened anew.
            FencedError: The file was deleted or replaced.

        Crash: Those of the group that were accepted, or none.
        """
        self._file.require_file()
        committing = False
        try:
            self._sql.execute("BEGIN IMMEDIATE")
            if self._decide_and_write(group):
                committing = True
                self._sql.execute("COMMIT")
            else:
                self._sql.execute("ROLLBACK")
            self._known = self._next_known
        except sqlite3.Error as error:
            self._file.rollback()
            if committing and primary_code(error) == sqlite3.SQLITE_IOERR:
                # The log may or may not hold it, and the same descriptor must not be flushed again.
                raise UnknownOutcomeError(
                    f"{self._file.name}: the flush failed ({error.sqlite_errorname}): close it, open it, "
                    "and send the same op again",
                    backend=self._file.name,
                ) from error
            raise self._file.mapped(error, "nothing was written") from error
        except BaseException:
            self._file.rollback()
            raise

    def _decide_and_write(self, group: Sequence[Commit]) -> bool:
        """Decide each commit after those before it, and write what they come to; False if there is nothing to flush."""
        known = self._look_up(group)
        state = known.state
        self._known = None  # until it is certain that the file holds what ``state`` is about to become
        rows: dict[Key, _Write] = {}
        accepted: dict[tuple[str, str], WriterOp] = {}
        for commit in group:
            op, name = commit.op, commit.scope
            try:
                number, repeated = state.decide(name, commit.changes, commit.expect, op)
            except (ConflictError, InvalidInputError) as error:
                error.backend = self._file.name
                commit.outcome = error
                continue
            commit.number = number
            scope = state.scope(name)
            writer, n = op
            if not repeated:
                if writer not in scope.writers:
                    known.scopes[name] += 1
                record = Record(b"", number, op)
                written: dict[Key, Record | None] = {}
                for key, text in commit.texts.items():
                    written[key] = None if text is None else record
                    rows[key] = (name, text, number, op)
                scope.apply(number, writer, WriterOp(n, number), written)
            # Also a repeated op is written again: that it can be seen does not say that it is durable.
            accepted[name, writer] = scope.writers[writer]
        self._write_rows(rows)
        forgot = self._write_heads(accepted, known)
        self._next_known = None if forgot or known.is_large() else known
        return bool(accepted)

    def _look_up(self, group: Sequence[Commit]) -> _Known:
        """Return what is known of all that the group touches, reading what is not known yet."""
        (data_version,) = self._sql.execute("PRAGMA data_version").fetchone()
        known = self._known
        if known is None or known.data_version != data_version:
            known = _Known(data_version)
        state, known_keys, known_writers = known.state, known.keys, known.writers
        keys: set[Key] = set()
        for commit in group:
            name, writer = commit.scope, commit.op[0]
            if name not in known.scopes:
                count, number = self._sql.execute(_FIND_HEAD, (name, "")).fetchone() or (0, 0)
                state.scope(name).number = number
                known.scopes[name] = count
            if (name, writer) not in known_writers:
                found = self._sql.execute(_FIND_HEAD, (name, writer)).fetchone()
                if found:
                    state.scope(name).writers[writer] = WriterOp(*found)
                known_writers.add((name, writer))
            for named in (commit.texts, commit.expect):
                for key in named:
                    if key not in known_keys:
                        keys.add(key)
        if keys:
            for name, key, version in self._find(keys):
                state.scope(name).rows[key] = Record(b"", version, _NOBODY)
            known_keys |= keys
        return known

    def _find(self, keys: set[Key]) -> list[tuple[str, Key, int]]:
        if len(keys) >= _MANY:
            wanted = msgspec.json.encode(list(keys)).decode()
            return [(scope, Key(*key), version) for scope, *key, version in self._sql.execute(_FIND, (wanted,))]
        result = []
        for key in keys:
            found = self._sql.execute(_FIND_ONE, key).fetchone()
            if found:
                scope, version = found
                result.append((scope, key, version))
        return result

    def _write_rows(self, rows: dict[Key, _Write]) -> None:
        puts = [(name, *key, text, version, *op) for key, (name, text, version, op) in rows.items() if text is not None]
        cuts = [key for key, (_, text, _, _) in rows.items() if text is None]
        if puts:
            self._sql.executemany(_PUT, puts)
        if cuts:
            self._sql.executemany(_CUT, cuts)

    def _write_heads(self, accepted: dict[tuple[str, str], WriterOp], known: _Known) -> bool:
        """Write where the scopes and their writers stand; True if writers had to be forgotten."""
        self._sql.executemany(_PUT_HEAD, [(*writer, *last) for writer, last in accepted.items()])
        forgot = False
        heads = []
        for name in {name for name, _ in accepted}:
            excess = known.scopes[name] - MAX_WRITERS
            if excess > 0:
                self._sql.execute(_FORGET_WRITERS, (name, excess))
                known.scopes[name] = MAX_WRITERS
                forgot = True
            heads.append((name, "", known.scopes[name], known.state.scopes[name].number))
        self._sql.executemany(_PUT_HEAD, heads)
        return forgot


def _in_pieces(cursor: sqlite3.Cursor) -> Iterable[tuple[Any, ...]]:
    """Return the lines of a long answer; each time some are fetched, memory for as many is asked for at once before.

    Outside the main thread glibc asks the system for each 4 KiB apart, which takes as long as the reading.
    """

    def fetch() -> list[tuple[Any, ...]]:
        bytearray(_PIECE_BYTES)
        return cursor.fetchmany(_PIECE_ROWS)

    return chain.from_iterable(iter(fetch, []))


_PIECE_ROWS = 128
_PIECE_BYTES = 100_000  # below 128 KiB, where it would take memory of another kind
_NOBODY = Op("", 0)
