"""What a PostgreSQL server really promises: read from its own settings at open, before anything relies on them."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...contract import Guarantees, How, Survives
from ...errors import NewerFormatError, NotFoundError, UnavailableError, UnsafeSettingError
from ..sql import FORMAT
from .connections import Connection, Connections
from .statements import ATTEST, Facts, Statements

_OLDEST = 120000


class Attested(NamedTuple):
    """What was found out."""

    guarantees: Guarantees
    synchronous_commit: str
    """What each commit sets for itself."""
    needs_standby: bool
    """A commit is refused once the server no longer waits for a standby."""


async def prepare(connections: Connections, sql: Statements, name: str, *, read_only: bool) -> Attested:
    """Ask the server, refuse what voids the promise, make the tables that are missing, and tell what holds.

    Raises:
        UnsafeSettingError: The message names the setting and what to change.
        UnavailableError: A standby is asked for, and none is connected.
        NotFoundError: ``read_only``, and there is no store.
        NewerFormatError: A newer version made the tables.
    """
    facts = Facts(*(await connections.use(lambda connection: _rows(connection, ATTEST)))[0])
    wrong = _wrong(facts, read_only=read_only)
    if wrong and not read_only:
        raise UnsafeSettingError(f"{name}: {wrong[0]}", backend=name)
    tables = await connections.use(lambda connection: _rows(connection, sql.persistence))
    if len(tables) < 4:
        if read_only:
            raise NotFoundError(f"there is no store at {name}: check the database and the schema", backend=name)
        await connections.use(lambda connection: _make(connection, sql))
        tables = await connections.use(lambda connection: _rows(connection, sql.persistence))
    for table, persistence in tables:
        if persistence != "p":
            told = f"the table {table} is UNLOGGED, so a crash empties it: ALTER TABLE … SET LOGGED"
            if not read_only:
                raise UnsafeSettingError(f"{name}: {told}", backend=name)
            wrong.append(told)
    ((number,),) = await connections.use(lambda connection: _rows(connection, sql.format))
    if number > FORMAT:
        raise NewerFormatError(f"{name} has format {number}; this version reads up to {FORMAT}: upgrade", backend=name)
    return _attested(facts, name, wrong, read_only=read_only)


async def _rows(connection: Connection, statement: str) -> list[tuple[Any, ...]]:
    return await (await connection.execute(statement)).fetchall()


async def _make(connection: Connection, sql: Statements) -> None:
    async with connection.transaction():
        # Two processes may be making them at once, and IF NOT EXISTS alone does not keep them apart.
        await connection.execute("SELECT pg_advisory_xact_lock(5211401997)")
        # Only if it is missing: even IF NOT EXISTS needs a right that a user with a ready schema may not have.
        if not await _rows(connection, sql.has_schema):
            await connection.execute(sql.add_schema)
        for statement in sql.tables:
            await connection.execute(statement)


def _wrong(facts: Facts, *, read_only: bool) -> list[str]:
    """Return what voids the promise, each with the setting to change."""
    wrong = []
    if facts.version < _OLDEST:
        wrong.append(f"the server is PostgreSQL {facts.version // 10000}: use 12 or newer")
    if facts.encoding != "UTF8":
        wrong.append(f"server_encoding is {facts.encoding}: make the database with ENCODING 'UTF8'")
    if facts.in_recovery:
        wrong.append("the server is a standby (pg_is_in_recovery): give the primary, or target_session_attrs=primary")
    elif facts.read_only == "on" and not read_only:
        wrong.append("default_transaction_read_only is on: set it to off")
    if facts.fsync != "on":
        wrong.append("fsync is off, so a power cut destroys the database: set fsync = on")
    if facts.full_page_writes != "on":
        wrong.append("full_page_writes is off, so a power cut can tear pages: set full_page_writes = on")
    return wrong


def _attested(facts: Facts, name: str, wrong: list[str], *, read_only: bool) -> Attested:
    warnings = list(wrong)
    survives = Survives.PROCESS if wrong else Survives.HOST
    if facts.synchronous_commit in ("off", "local", "remote_write"):
        warnings.append(
            f"synchronous_commit is {facts.synchronous_commit} for this user: each commit of ours sets it to on; "
            "whatever else writes to these tables does not"
        )
    needs_standby = False
    if facts.standby_names and not facts.in_recovery:
        if facts.synchronous_standbys:
            needs_standby = True
            survives = survives if wrong else Survives.SERVER
        elif facts.hidden_standbys:
            warnings.append(
                "synchronous_standby_names is set, but this user may not see whether a standby is connected: "
                "GRANT pg_read_all_stats to it"
            )
        elif not read_only:
            raise UnavailableError(
                f"{name}: synchronous_standby_names is {facts.standby_names!r}, and none of them is connected, so "
                "commits would wait for ever: start the standby, or change the setting",
                backend=name,
            )
    return Attested(
        Guarantees(
            backend=name,
            survives=survives,
            survives_how=How.ATTESTED,
            atomic=True,
            atomic_how=How.ATTESTED,
            fenced=True,
            fenced_how=How.ATTESTED,
            shared=True,
            warnings=tuple(warnings),
        ),
        "remote_apply" if facts.synchronous_commit == "remote_apply" else "on",
        needs_standby,
    )
