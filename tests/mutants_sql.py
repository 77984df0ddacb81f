"""One-line defects of the SQL backends: (name, file under ``src/holdfast``, text, its replacement, pytest arguments).

``tests/mutants.py`` makes its ``Mutant`` of each.
"""

from __future__ import annotations

_CONTRACT = "tests/test_conformance.py -k"
_SQLITE = "tests/test_sqlite.py -k"
_POSTGRES = "tests/test_postgres.py -k"
_SETTINGS = "tests/test_postgres_settings.py -k"

SQL: list[tuple[str, str, str, str, str]] = [
    (
        "sql: a long read gives rows that nobody asked for",
        "backends/sql.py",
        "for key, record in islice(found.items(), wanted) if record is not None",
        "for key, record in found.items() if record is not None",
        f"{_SQLITE} 'long_read and few'",
    ),
    (
        "sql: a row's op is the one before it",
        "backends/sql.py",
        "op = ops.get(version)",
        "op = next(iter(ops.values()), None)",
        f"{_SQLITE} 'long_read and few'",
    ),
    (
        "sqlite: what is known outlives another process's commit",
        "backends/sqlite/rows.py",
        "if known is None or known.data_version != data_version:",
        "if known is None:",
        f"{_SQLITE} another_connection_wrote",
    ),
    (
        "sqlite: the write lock is taken after the reads",
        "backends/sqlite/rows.py",
        'self._sql.execute("BEGIN IMMEDIATE")',
        'self._sql.execute("BEGIN")',
        f"{_SQLITE} 'another_processs or race'",
    ),
    (
        "sqlite: a failed flush is taken for one that wrote nothing",
        "backends/sqlite/rows.py",
        "if committing and primary_code(error) == sqlite3.SQLITE_IOERR:",
        "if False:",
        f"{_SQLITE} failed_flush",
    ),
    (
        "sqlite: after a failed flush it goes on",
        "backends/sqlite/lane.py",
        '            self._failed = f"an earlier commit failed: {error}"\n',
        "",
        f"{_SQLITE} failed_flush",
    ),
    (
        "sqlite: a deleted file is written on",
        "backends/sqlite/rows.py",
        "        self._file.require_file()\n",
        "",
        f"{_SQLITE} replaced",
    ),
    (
        "sqlite: synchronous stays at the default of the file",
        "backends/sqlite/file.py",
        'sql.execute(f"PRAGMA synchronous = {_LEVELS[self._synchronous]}")',
        'sql.execute("PRAGMA synchronous = OFF")',
        f"{_SQLITE} attests",
    ),
    (
        "sqlite: a reader takes a transaction that was interrupted for a store that holds nothing yet",
        "backends/sqlite/file.py",
        " and not any(header[_PAGES_BEFORE]):",
        ":",
        f"{_SQLITE} interrupted",
    ),
    (
        "sqlite: a reader of a store that was killed at its making is told of permissions",
        "backends/sqlite/file.py",
        "== sqlite3.SQLITE_READONLY_ROLLBACK:",
        "== -1:",
        f"{_SQLITE} maker_was_killed",
    ),
    (
        "postgres: expected versions are not compared",
        "backends/postgres/statements.py",
        "WHERE coalesce(CASE WHEN r.scope = $1 THEN r.version END, 0) <> v)\n  RETURNING c.number),",
        "WHERE false)\n  RETURNING c.number),",
        f"{_CONTRACT} 'expect and postgres'",
    ),
    (
        "postgres: a scope's number may be raised from a stale snapshot (groups)",
        "backends/postgres/statements.py",
        "WHERE c.scope = $1 AND c.number = held.number AND due > 0",
        "WHERE c.scope = $1 AND due > 0",
        f"{_POSTGRES} two_backends",
    ),
    (
        "postgres: a scope's number may be raised from a stale snapshot (single commits)",
        "backends/postgres/statements.py",
        "WHERE c.scope = $1 AND c.number = held.number AND {safe}",
        "WHERE c.scope = $1 AND {safe}",
        f"{_POSTGRES} 'race_lose'",
    ),
    (
        "postgres: a lost answer is taken for a refusal",
        "backends/postgres/connections.py",
        "        if writes:\n            return UnknownOutcomeError(",
        "        if writes:\n            return UnavailableError(",
        f"{_POSTGRES} 'cut_anywhere and close'",
    ),
    (
        "postgres: an in-flight op that is tried again is called refused",
        "backends/postgres/lane.py",
        "elif doubted and isinstance(error, UnavailableError):",
        "elif False:",
        f"{_SETTINGS} absence_is",
    ),
    (
        "postgres: the server's warning is not heard",
        "backends/postgres/lane.py",
        'self.warned = self.warned or notice.severity_nonlocalized == "WARNING"',
        "self.warned = False",
        f"{_SETTINGS} wait_for_the_standby",
    ),
    (
        "postgres: settings are looked at only at open",
        "backends/postgres/statements.py",
        "AND current_setting('fsync') = 'on' ",
        "",
        f"{_SETTINGS} changed_while",
    ),
    (
        "postgres: fsync=off is not refused",
        "backends/postgres/attestation.py",
        'if facts.fsync != "on":',
        "if False:",
        f"{_SETTINGS} voids",
    ),
    (
        "postgres: a commit goes with one that it depends on",
        "backends/postgres/statements.py",
        "or not written.isdisjoint(asked.expect)",
        "or False",
        f"{_POSTGRES} depend_on",
    ),
    (
        "postgres: no end to waiting",
        "backends/postgres/connections.py",
        "timer = loop.call_at(end, _cut, connection, late)",
        "timer = loop.call_at(end + 5, _cut, connection, late)",
        f"{_POSTGRES} black_hole",
    ),
]
