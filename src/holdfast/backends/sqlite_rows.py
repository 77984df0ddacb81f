"""The statements of the SQLite backend: reads of one moment, and commits decided and written in one transaction.

Invariants:

* A transaction that writes has taken the write lock before it reads, so what it decides on cannot change under it.
* Each commit of a group is decided after those before it, by the one function that decides for memory and file too.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from ..contract import MAX_WRITERS, Head, Key, KeyPrefix, Op, Record, WriterOp
from ..errors import ConflictError, HoldfastError, InvalidInputError, UnknownOutcomeError
from .sql import PAGE
from .sqlite_file import SqliteFile, primary_code
from .state import Scope, State

_JOIN_KEYS = (
    "FROM json_each(?) AS j CROSS JOIN rows AS r ON r.domain = j.value ->> 0 AND r.entity_name = j.value ->> 1 "
    "AND r.entity_id = j.value ->> 2"
)
_PLACES = f"SELECT r.id, r.scope, r.domain, r.entity_name, r.entity_id, r.version {_JOIN_KEYS}"
_READ = (
    "SELECT r.domain, r.entity_name, r.entity_id, CAST(r.row AS BLOB), r.version, r.writer, r.n "
    f"{_JOIN_KEYS} WHERE r.scope = ?"
)
_HEAD = (
    "SELECT s.number, w.writer, w.n, w.number FROM scopes AS s LEFT JOIN writers AS w USING (scope) "
    "WHERE s.scope = ? ORDER BY w.number"
)
_SCOPES = "SELECT s.scope, s.number, s.writers FROM json_each(?) AS j JOIN scopes AS s ON s.scope = j.value"
_WRITERS = (
    "SELECT w.scope, w.writer, w.n, w.number FROM json_each(?) AS j CROSS JOIN writers AS w "
    "ON w.scope = j.value ->> 0 AND w.writer = j.value ->> 1"
)
_UPDATE = "UPDATE rows SET row = ?, version = ?, writer = ?, n = ? WHERE id = ?"
_INSERT = (
    "INSERT INTO rows (scope, domain, entity_name, entity_id, row, version, writer, n) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
_PUT_WRITER = (
    "INSERT INTO writers VALUES (?, ?, ?, ?) "
    "ON CONFLICT (scope, writer) DO UPDATE SET n = excluded.n, number = excluded.number"
)
_FORGET_WRITERS = (
    "DELETE FROM writers WHERE scope = ?1 AND writer IN "
    "(SELECT writer FROM writers WHERE scope = ?1 ORDER BY number LIMIT ?2)"
)
_PUT_SCOPE = (
    "INSERT INTO scopes VALUES (?, ?, ?) "
    "ON CONFLICT (scope) DO UPDATE SET number = excluded.number, writers = excluded.writers"
)


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


class _Found(NamedTuple):
    """What the file holds of what a group touches."""

    state: State
    row_ids: dict[Key, int]
    other_writers: dict[str, int]
    """How many writers each scope remembers beside those of the group."""


class SqliteRows:
    """Reads and commits over one connection, on the thread that opened it."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file
        self._sql = file.sql

    def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the records of ``keys`` as of one moment."""
        found = self._query(_READ, (msgspec.json.encode(keys).decode(), scope))
        return {
            Key(domain, entity_name, entity_id): Record(row, version, Op(writer, n))
            for domain, entity_name, entity_id, row, version, writer, n in found
        }

    def head(self, scope: str) -> Head:
        """Return the scope's commit number and its writers' last ops, as of one moment."""
        found = self._query(_HEAD, (scope,))
        writers = {writer: WriterOp(n, number) for _, writer, n, number in found if writer is not None}
        return Head(found[0][0] if found else 0, writers)

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
        return [scope for (scope,) in self._query("SELECT scope FROM scopes WHERE number > 0 ORDER BY scope", ())]

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
        found = self._load(group)
        state = found.state
        rows: dict[Key, tuple[str, str | None, int, Op]] = {}
        accepted: set[str] = set()
        for commit in group:
            try:
                number, repeated = state.decide(commit.scope, commit.changes, commit.expect, commit.op)
            except (ConflictError, InvalidInputError) as error:
                error.backend = self._file.name
                commit.outcome = error
                continue
            commit.number = number
            accepted.add(commit.scope)
            if not repeated:
                record = Record(b"", number, commit.op)
                state.scope(commit.scope).apply(
                    number, commit.op, {key: None if text is None else record for key, text in commit.texts.items()}
                )
                for key, text in commit.texts.items():
                    rows[key] = (commit.scope, text, number, commit.op)
        if rows:
            self._write_rows(rows, found.row_ids)
        for name in accepted:
            self._write_scope(name, state.scopes[name], found.other_writers.get(name, 0))
        return bool(accepted)

    def _load(self, group: Sequence[Commit]) -> _Found:
        state = State()
        row_ids: dict[Key, int] = {}
        others: dict[str, int] = {}
        for name, number, count in self._each(_SCOPES, {commit.scope for commit in group}):
            state.scope(name).number = number
            others[name] = count
        for name, writer, n, number in self._each(_WRITERS, {(commit.scope, commit.op.writer) for commit in group}):
            state.scope(name).writers[writer] = WriterOp(n, number)
            others[name] -= 1
        for row_id, name, domain, entity_name, entity_id, version in self._each(
            _PLACES, {key for commit in group for key in (*commit.texts, *commit.expect)}
        ):
            key = Key(domain, entity_name, entity_id)
            row_ids[key] = row_id
            state.scope(name).rows[key] = Record(b"", version, _NOBODY)
        return _Found(state, row_ids, others)

    def _each(self, statement: str, wanted: Iterable[object]) -> list[Any]:
        return self._sql.execute(statement, (msgspec.json.encode(list(wanted)).decode(),)).fetchall()

    def _write_rows(self, rows: dict[Key, tuple[str, str | None, int, Op]], row_ids: dict[Key, int]) -> None:
        updates, inserts, deletes = [], [], []
        for key, (name, text, version, (writer, n)) in rows.items():
            row_id = row_ids.get(key)
            if text is None:
                if row_id is not None:
                    deletes.append((row_id,))
            elif row_id is not None:
                updates.append((text, version, writer, n, row_id))
            else:
                inserts.append((name, *key, text, version, writer, n))
        for statement, values in ((_UPDATE, updates), (_INSERT, inserts), ("DELETE FROM rows WHERE id = ?", deletes)):
            if values:
                self._sql.executemany(statement, values)

    def _write_scope(self, name: str, scope: Scope, other_writers: int) -> None:
        """Write where the scope stands.

        Also when nothing changed: a repeated op is flushed again, since that it can be seen does not say that it is
        durable.
        """
        self._sql.executemany(_PUT_WRITER, [(name, writer, *last) for writer, last in scope.writers.items()])
        count = other_writers + len(scope.writers)
        if count > MAX_WRITERS:
            self._sql.execute(_FORGET_WRITERS, (name, count - MAX_WRITERS))
            count = MAX_WRITERS
        self._sql.execute(_PUT_SCOPE, (name, scope.number, count))


_NOBODY = Op("", 0)
