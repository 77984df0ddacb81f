"""One connection to a SQLite file: where it may lie, its settings, its tables, and what its errors mean.

Every method runs on the thread that connected. Nothing is read before what the file holds has been made durable.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from ...contract import Guarantees, How, Survives
from ...errors import (
    CorruptedError,
    FencedError,
    FullError,
    HoldfastError,
    InvalidInputError,
    NewerFormatError,
    NotFoundError,
    UnavailableError,
    UnsafeSettingError,
)
from ..disk import OsDisk
from ..sql import FORMAT

Synchronous = Literal["full", "extra", "normal"]

_APPLICATION_ID = 0x484F4C44  # "HOLD"
_LEVELS: dict[str, int] = {"normal": 1, "full": 2, "extra": 3}
_REMOTE = ("nfs", "cifs", "smb", "9p", "ceph", "glusterfs", "afs", "lustre", "fuse.", "davfs")
_VOLATILE = ("tmpfs", "ramfs", "overlay", "aufs", "rootfs")
_SOLID = ("ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "jfs")
_CHECKED_BYTES = 32 * 1024 * 1024
"""Up to this size the whole file is checked at open, which takes a few hundredths of a second."""

_PAGES_BEFORE = slice(16, 20)
"""Where a rollback journal says how many pages the file had before."""

_TABLES = (
    # One table for where a scope stands and for its writers, so that a commit seldom touches two pages of it.
    "CREATE TABLE heads (scope TEXT NOT NULL, writer TEXT NOT NULL, n INTEGER NOT NULL, number INTEGER NOT NULL, "
    "PRIMARY KEY (scope, writer)) WITHOUT ROWID",
    "CREATE TABLE rows (scope TEXT NOT NULL, domain TEXT NOT NULL, entity_name TEXT NOT NULL, entity_id TEXT NOT NULL, "
    "row TEXT NOT NULL, version INTEGER NOT NULL, writer TEXT NOT NULL, n INTEGER NOT NULL)",
    "CREATE UNIQUE INDEX rows_by_key ON rows (domain, entity_name, entity_id)",
    "CREATE INDEX rows_by_scope ON rows (scope, domain, entity_name, entity_id)",
    "CREATE VIEW scopes AS SELECT scope, number, n AS writers FROM heads WHERE writer = '' AND number > 0",
    "CREATE VIEW writers AS SELECT scope, writer, n, number FROM heads WHERE writer <> ''",
)


class SqliteFile:
    """One connection.

    Args:
        path: Absolute path of the file.
        deadline_seconds: How long to wait for another process's transaction.
        synchronous: What a commit flushes.
        read_only: Change nothing, create nothing.
    """

    def __init__(self, path: str, *, deadline_seconds: float, synchronous: Synchronous, read_only: bool) -> None:
        self.path = path
        self.name = f"sqlite:{path}"
        self._deadline_seconds = deadline_seconds
        self._synchronous = synchronous
        self._read_only = read_only
        self.sql: sqlite3.Connection
        self._inode = (0, 0)

    def open(self) -> Guarantees:
        """Create what is missing, set and read back the settings, make durable what is there."""
        survives, how, warnings = self._attest_place()
        try:
            created = not self._read_only and self._create()
            self.connect()
        except sqlite3.Error as error:
            raise self.mapped(error, "it cannot be opened") from error
        try:
            self._require_ours(created)
            if not self._read_only:
                self._make_durable()
            self._check()
        except sqlite3.Error as error:
            self.close()
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_ROLLBACK:
                raise self._interrupted() from error
            raise self.mapped(error, "it cannot be opened") from error
        except BaseException:
            self.close()
            raise
        if Path(self.path).stat().st_mode & 0o077:
            warnings.append(f"{self.path} can be read by others: chmod 600 it")
        if self._synchronous == "normal":
            survives, how = Survives.PROCESS, How.ATTESTED
            warnings.append("synchronous is 'normal', so a power cut takes back the newest commits: use 'full'")
        return Guarantees(
            backend=self.name,
            survives=survives,
            survives_how=how,
            atomic=True,
            atomic_how=How.ATTESTED,
            fenced=True,
            fenced_how=How.ATTESTED,
            shared=True,
            warnings=tuple(warnings),
        )

    def connect(self) -> None:
        """Open a connection and set what holds for it alone; the file must exist."""
        mode = "ro" if self._read_only else "rw"
        self.sql = sql = sqlite3.connect(
            f"file:{quote(self.path)}?mode={mode}", uri=True, isolation_level=None, timeout=self._deadline_seconds
        )
        try:
            sql.execute("PRAGMA trusted_schema = OFF")
            sql.execute("PRAGMA cell_size_check = ON")
            if self._read_only:
                sql.execute("PRAGMA query_only = ON")
            else:
                # The journal mode is the file's; the rest is this connection's. On macOS only F_FULLFSYNC flushes.
                found = self._with_patience("PRAGMA journal_mode = WAL")
                if found != "wal":
                    raise UnsafeSettingError(
                        f"{self.name}: journal_mode is {found!r} and cannot be set to 'wal' here: "
                        "put the file on a local disk",
                        backend=self.name,
                    )
                sql.execute(f"PRAGMA synchronous = {_LEVELS[self._synchronous]}")
                sql.execute("PRAGMA fullfsync = ON")
                sql.execute("PRAGMA checkpoint_fullfsync = ON")
                level = sql.execute("PRAGMA synchronous").fetchone()[0]
                if level != _LEVELS[self._synchronous]:
                    raise UnsafeSettingError(
                        f"{self.name}: synchronous is {level} though {self._synchronous!r} was set", backend=self.name
                    )
            found_stat = Path(self.path).stat()
            self._inode = (found_stat.st_dev, found_stat.st_ino)
        except BaseException:
            sql.close()
            raise

    def _with_patience(self, statement: str) -> Any:
        """Run a statement that SQLite may refuse at once, without waiting, while another process opens the file."""
        end = time.monotonic() + self._deadline_seconds
        while True:
            try:
                return self.sql.execute(statement).fetchone()[0]
            except sqlite3.OperationalError as error:
                if primary_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
                time.sleep(0.005)

    def _attest_place(self) -> tuple[Survives, How, list[str]]:
        directory = Path(self.path).parent
        if self._read_only:
            if not Path(self.path).exists():
                raise NotFoundError(f"there is no store at {self.path}: check the path", backend=self.name)
        else:
            try:
                _make_directories(directory)
            except OSError as error:
                raise self._no_file(error) from error
        disk = OsDisk()
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise self._no_file(error) from error
        try:
            kind = disk.filesystem(fd)
        finally:
            os.close(fd)
        if kind.startswith(_REMOTE):
            reason = f"{self.path} lies on a network file system ({kind}), where SQLite's locks cannot be trusted"
            if not self._read_only:
                raise UnsafeSettingError(f"{reason}: use a local disk", backend=self.name)
            return Survives.PROCESS, How.ASSUMED, [reason]
        if kind in _VOLATILE:
            reason = (
                f"{self.path} lies on {kind}: what is stored there may be gone after a power cut or with its "
                "container: put it on a disk or a mounted volume"
            )
            return Survives.PROCESS, How.ATTESTED, [reason]
        if kind in _SOLID:
            return Survives.HOST, How.ATTESTED, []
        reason = f"{self.path} lies on {kind or 'an unknown file system'}, which was not tested"
        return Survives.HOST, How.ASSUMED, [reason]

    def _no_file(self, error: OSError) -> UnavailableError:
        return UnavailableError(f"{self.name} cannot be opened: {error.strerror or error}", backend=self.name)

    def _create(self) -> bool:
        """Make an empty private file if there is none, and make its name durable."""
        try:
            # Never open and close a file that is there: that would drop the locks of this process's other connections.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        except OSError as error:
            raise self._no_file(error) from error
        return True

    def _require_ours(self, created: bool) -> None:
        sql = self.sql
        if not self._read_only:
            sql.execute("BEGIN IMMEDIATE")  # two processes may be creating it at once
        try:
            application, number = (sql.execute(f"PRAGMA {p}").fetchone()[0] for p in ("application_id", "user_version"))
            empty = not sql.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
            if empty and not self._read_only:
                for statement in _TABLES:
                    sql.execute(statement)
                sql.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                sql.execute(f"PRAGMA user_version = {FORMAT}")
            elif empty and not application:  # whoever was about to make it was killed first
                raise self._nothing_yet()
            elif application != _APPLICATION_ID:
                raise CorruptedError(f"{self.path} is another program's database: use another path", backend=self.name)
            elif number > FORMAT:
                raise NewerFormatError(
                    f"{self.path} has format {number}; this version reads up to {FORMAT}: upgrade", backend=self.name
                )
            if sql.in_transaction:
                sql.execute("COMMIT")
        except BaseException:
            self.rollback()
            raise
        if created or not self._read_only:
            # A process that died may have made the file, or a directory above it, without syncing its name.
            for place in Path(self.path).parents:
                with contextlib.suppress(PermissionError):
                    _sync_directory(place)

    def _interrupted(self) -> HoldfastError:
        """Return what to tell a reader who must not take back a transaction that was interrupted.

        A store has a rollback journal only until it is in WAL mode: of a file that was empty before, which the
        journal's header says (https://www.sqlite.org/fileformat.html, "The Rollback Journal"), nothing was stored.
        """
        with contextlib.suppress(OSError), open(f"{self.path}-journal", "rb") as journal:
            if len(header := journal.read(_PAGES_BEFORE.stop)) == _PAGES_BEFORE.stop and not any(header[_PAGES_BEFORE]):
                return self._nothing_yet()
        return UnavailableError(
            f"{self.name}: a transaction was interrupted, and a reader changes nothing: open it for writing once, "
            "which takes the transaction back",
            backend=self.name,
        )

    def _nothing_yet(self) -> NotFoundError:
        return NotFoundError(f"there is no store at {self.path} yet: nothing was stored", backend=self.name)

    def _make_durable(self) -> None:
        """Flush what a process that was killed may have left unflushed, before anybody acts on it."""
        busy = self.sql.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if busy:  # others have it open; then the log is theirs to empty, and flushing it is enough
            with contextlib.suppress(FileNotFoundError), open(f"{self.path}-wal", "rb") as log:
                os.fsync(log.fileno())

    def _check(self) -> None:
        if Path(self.path).stat().st_size <= _CHECKED_BYTES:
            found = self.sql.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise CorruptedError(
                    f"{self.path} is damaged ({found!s:.200}): restore it from a copy", backend=self.name
                )

    def close(self) -> None:
        """Close the connection. Repeatable."""
        with contextlib.suppress(AttributeError, sqlite3.Error):  # nothing acknowledged hangs on it
            self.sql.close()

    def rollback(self) -> None:
        """End the transaction, if there is one, without its changes."""
        with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back by itself
            if self.sql.in_transaction:
                self.sql.execute("ROLLBACK")

    def require_file(self) -> None:
        """Check that the file still has its name.

        Raises:
            FencedError: Somebody deleted or replaced it: what is committed now would be lost with it.
        """
        try:
            found = os.stat(self.path)  # noqa: PTH116  (before each group of commits: a Path costs more than the call)
            ours = (found.st_dev, found.st_ino) == self._inode
        except FileNotFoundError:
            ours = False
        except OSError as error:
            raise self._no_file(error) from error
        if not ours:
            raise FencedError(
                f"{self.path} was deleted or replaced while it was open: nothing was written", backend=self.name
            )

    def mapped(self, error: sqlite3.Error, what: str) -> HoldfastError:
        """Return what to raise for an error of SQLite's that left nothing written."""
        code = primary_code(error)
        kind, remedy = _MEANINGS.get(code, (UnavailableError, str(error)))
        return kind(f"{self.name}: {what}: {remedy}", backend=self.name)


def primary_code(error: sqlite3.Error) -> int:
    """Return SQLite's own code, without what is added to tell cases apart."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _make_directories(place: Path) -> None:
    """Make ``place`` with what is missing above it, all private (``Path.mkdir`` would make only the last one so)."""
    for missing in reversed([one for one in (place, *place.parents) if not one.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)


def _sync_directory(place: Path) -> None:
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_MEANINGS: dict[int, tuple[type[HoldfastError], str]] = {
    sqlite3.SQLITE_BUSY: (UnavailableError, "another process kept it locked until the deadline: try again"),
    sqlite3.SQLITE_LOCKED: (UnavailableError, "another connection of this process has it locked: try again"),
    sqlite3.SQLITE_FULL: (FullError, "the disk is full: make room, then try again"),
    sqlite3.SQLITE_IOERR: (UnavailableError, "the disk failed: see the system's log"),
    sqlite3.SQLITE_CANTOPEN: (UnavailableError, "the file cannot be opened: check the path and its permissions"),
    sqlite3.SQLITE_READONLY: (UnavailableError, "the file cannot be written: check its permissions"),
    sqlite3.SQLITE_PERM: (UnavailableError, "the file may not be used: check its permissions"),
    sqlite3.SQLITE_NOMEM: (UnavailableError, "there is not enough memory"),
    sqlite3.SQLITE_CORRUPT: (CorruptedError, "the file is damaged: stop, and restore it from a copy"),
    sqlite3.SQLITE_NOTADB: (CorruptedError, "the file is no SQLite database: use another path"),
    sqlite3.SQLITE_TOOBIG: (InvalidInputError, "a value is too large: split it"),
}
