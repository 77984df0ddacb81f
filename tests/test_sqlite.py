"""SQLite: attestation, several processes, faults, and what a person can read with SQLite's own tools."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sql_ground import kill_a_pouring_process, race_processes

from holdfast.backends.disk import OsDisk
from holdfast.backends.sql import Doorman
from holdfast.backends.sqlite import SqliteBackend
from holdfast.backends.sqlite.file import SqliteFile
from holdfast.backends.sqlite.rows import Commit, SqliteRows
from holdfast.contract import How, Key, Op, Record, Survives
from holdfast.errors import (
    ConflictError,
    CorruptedError,
    FailedError,
    FencedError,
    HoldfastError,
    InvalidInputError,
    NewerFormatError,
    NotFoundError,
    UnavailableError,
    UnknownOutcomeError,
    UnsafeSettingError,
)

A, B = Key("signal", "BTCUSDT_a_x", "BTCUSDT"), Key("signal", "ETHUSDT_a_x", "ETHUSDT")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteBackend]:
    backend = SqliteBackend(tmp_path / "bot" / "store.db")
    await backend.open()
    yield backend
    await backend.close()


def _path(tmp_path: Path) -> Path:
    return tmp_path / "bot" / "store.db"


async def test_open_reads_back_what_it_set_and_attests_a_power_cut(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(OsDisk, "filesystem", lambda self, fd: "ext4")
    backend = SqliteBackend(tmp_path / "s.db")
    found = await backend.open()
    await backend.close()
    assert (found.survives, found.survives_how) == (Survives.HOST, How.ATTESTED)
    assert (found.atomic, found.fenced, found.shared, found.warnings) == (True, True, True, ())
    assert found.backend == f"sqlite:{tmp_path / 's.db'}"
    with sqlite3.connect(tmp_path / "s.db") as sql:
        assert sql.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    sql.close()


@pytest.mark.parametrize(
    ("filesystem", "survives", "how", "warning"),
    [
        ("xfs", Survives.HOST, How.ATTESTED, ""),
        ("tmpfs", Survives.PROCESS, How.ATTESTED, "tmpfs"),
        ("overlay", Survives.PROCESS, How.ATTESTED, "overlay"),
        ("brandnewfs", Survives.HOST, How.ASSUMED, "not tested"),
        ("", Survives.HOST, How.ASSUMED, "not tested"),
    ],
)
async def test_the_file_system_decides_what_a_commit_survives(
    filesystem: str, survives: Survives, how: How, warning: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(OsDisk, "filesystem", lambda self, fd: filesystem)
    backend = SqliteBackend(tmp_path / "s.db")
    found = await backend.open()
    await backend.close()
    assert (found.survives, found.survives_how) == (survives, how)
    assert warning in " ".join(found.warnings)


@pytest.mark.parametrize("filesystem", ["nfs4", "cifs", "9p", "fuse.sshfs"])
async def test_a_network_file_system_is_refused(filesystem: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(OsDisk, "filesystem", lambda self, fd: filesystem)
    with pytest.raises(UnsafeSettingError, match="network file system"):
        await SqliteBackend(tmp_path / "s.db").open()
    assert not (tmp_path / "s.db").exists()


async def test_synchronous_normal_is_reported_as_losing_commits_at_a_power_cut(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "s.db", synchronous="normal")
    found = await backend.open()
    await backend.close()
    assert (found.survives, found.survives_how) == (Survives.PROCESS, How.ATTESTED)
    assert any("synchronous" in warning and "full" in warning for warning in found.warnings)


async def test_the_file_and_its_directories_are_private(store: SqliteBackend, tmp_path: Path) -> None:
    await store.commit("main", {A: b"{}"}, {}, op=Op("w", 1))
    for path in (tmp_path / "bot").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((tmp_path / "bot").stat().st_mode) == 0o700


async def test_a_file_that_others_can_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "s.db").touch(mode=0o644)
    backend = SqliteBackend(tmp_path / "s.db")
    found = await backend.open()
    await backend.close()
    assert any("chmod 600" in warning for warning in found.warnings)


async def test_rows_can_be_read_with_sqlites_own_tools(store: SqliteBackend, tmp_path: Path) -> None:
    await store.commit("main", {A: b'{"priceOpen":42000.5}'}, {}, op=Op("bot", 1))
    sql = sqlite3.connect(f"file:{_path(tmp_path)}?mode=ro", uri=True)
    found = sql.execute("SELECT domain, entity_name, row->>'$.priceOpen' FROM rows").fetchall()
    assert found == [("signal", "BTCUSDT_a_x", 42000.5)]
    assert sql.execute("SELECT * FROM scopes").fetchall() == [("main", 1, 1)]
    assert sql.execute("SELECT * FROM writers").fetchall() == [("main", "bot", 1, 1)]
    sql.close()


async def test_processes_that_race_lose_no_increment(tmp_path: Path) -> None:
    await race_processes(str(tmp_path / "s.db"), processes=3, times=40)


async def test_a_killed_process_leaves_every_acknowledged_commit(tmp_path: Path) -> None:
    for at in range(3):
        assert await kill_a_pouring_process(str(tmp_path / "s.db"), 20 + 7 * at, writer=f"poured-{at}") >= 20


async def test_what_another_connection_wrote_is_seen_by_the_next_commit(store: SqliteBackend, tmp_path: Path) -> None:
    """A writer remembers versions between its commits; it must not go by them once somebody else has written."""
    other = SqliteBackend(_path(tmp_path))
    await other.open()
    first = await store.commit("main", {A: b"1"}, {A: 0}, op=Op("one", 1))
    second = await other.commit("main", {A: b"2"}, {A: first}, op=Op("two", 1))
    with pytest.raises(ConflictError):
        await store.commit("main", {A: b"3"}, {A: first}, op=Op("one", 2))
    assert await store.commit("main", {A: b"3"}, {A: second}, op=Op("one", 2)) == 3
    assert await other.commit("main", {B: b"4"}, {A: 3}, op=Op("two", 2)) == 4
    with pytest.raises(InvalidInputError, match="one scope"):
        await store.commit("elsewhere", {B: b"5"}, {}, op=Op("one", 1))
    await other.close()


async def test_a_store_whose_maker_was_killed_before_it_held_anything_is_not_there_yet(tmp_path: Path) -> None:
    made = sqlite3.connect(tmp_path / "s.db")
    made.execute("PRAGMA journal_mode = WAL")
    made.close()
    backend = SqliteBackend(tmp_path / "s.db")
    with pytest.raises(NotFoundError, match="no store"):
        await backend.open(read_only=True)
    await backend.open()
    assert await backend.commit("main", {A: b"{}"}, {}, op=Op("w", 1)) == 1
    await backend.close()


def _interrupt(place: Path, left: Path) -> None:
    """Put at ``left`` what a process leaves that is killed in a transaction of a rollback journal, on ``place``."""
    with contextlib.closing(sqlite3.connect(place, isolation_level=None)) as sql:
        sql.execute("PRAGMA cache_size = 1")
        sql.execute("BEGIN IMMEDIATE")
        sql.execute("CREATE TABLE half (text TEXT)")
        sql.executemany("INSERT INTO half VALUES (?)", [("x" * 4000,)] * 50)  # the cache spills into the file
        for ending in ("", "-journal"):
            shutil.copy(f"{place}{ending}", f"{left}{ending}")


async def test_a_reader_of_a_store_whose_maker_was_killed_over_it_sees_that_nothing_was_stored(tmp_path: Path) -> None:
    left = tmp_path / "s.db"
    _interrupt(tmp_path / "empty.db", left)
    before = left.read_bytes()
    with pytest.raises(NotFoundError, match="nothing was stored"):
        await SqliteBackend(left).open(read_only=True)
    assert left.read_bytes() == before, "a reader changes nothing"
    writer = SqliteBackend(left)
    await writer.open()
    assert await writer.commit("main", {A: b"{}"}, {A: 0}, op=Op("w", 1)) == 1
    await writer.close()


async def test_a_reader_does_not_take_back_what_was_interrupted_by_others_and_says_who_can(tmp_path: Path) -> None:
    place, left = tmp_path / "before.db", tmp_path / "s.db"
    store = SqliteBackend(place)
    await store.open()
    await store.commit("main", {A: b"{}"}, {A: 0}, op=Op("w", 1))
    await store.close()
    with contextlib.closing(sqlite3.connect(place)) as sql:
        sql.execute("PRAGMA journal_mode = DELETE")
    _interrupt(place, left)
    with pytest.raises(UnavailableError, match="open it for writing once"):
        await SqliteBackend(left).open(read_only=True)
    for read_only in (False, True):
        store = SqliteBackend(left)
        await store.open(read_only=read_only)
        assert (await store.read("main", [A]))[A].payload == b"{}"
        await store.close()


async def test_another_processs_transaction_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "s.db", deadline_seconds=0.1)
    await backend.open()
    holder = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    begun = time.monotonic()
    with pytest.raises(UnavailableError, match="locked"):
        await backend.commit("main", {A: b"{}"}, {}, op=Op("w", 1))
    assert time.monotonic() - begun < 3
    assert await backend.read("main", [A]) == {}, "readers do not wait"
    holder.execute("ROLLBACK")
    holder.close()
    assert await backend.commit("main", {A: b"{}"}, {}, op=Op("w", 1)) == 1
    await backend.close()


async def test_commits_that_wait_share_a_transaction_and_a_refused_one_does_not_harm_the_others(
    store: SqliteBackend, tmp_path: Path
) -> None:
    keys = [Key("signal", f"S{at}", "x") for at in range(40)]
    wrong = {7, 23}
    before = (tmp_path / "bot" / "store.db-wal").stat().st_size
    answers = await asyncio.gather(
        *(
            store.commit("main", {key: b"{}"}, {key: 9 if at in wrong else 0}, op=Op(f"w{at}", 1))
            for at, key in enumerate(keys)
        ),
        return_exceptions=True,
    )
    assert {at for at, answer in enumerate(answers) if isinstance(answer, ConflictError)} == wrong
    assert sorted(answer for answer in answers if isinstance(answer, int)) == list(range(1, 39))
    assert len(await store.read("main", keys)) == 38
    pages = ((tmp_path / "bot" / "store.db-wal").stat().st_size - before) // 4096
    assert pages < 20, f"one transaction writes each page once, not {pages} pages"


async def test_read_only_shows_a_running_store_and_changes_nothing(store: SqliteBackend, tmp_path: Path) -> None:
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    reader = SqliteBackend(_path(tmp_path))
    await reader.open(read_only=True)
    await store.commit("main", {A: b"2"}, {}, op=Op("w", 2))
    assert (await reader.read("main", [A]))[A].payload == b"2"
    with pytest.raises(FailedError, match="read-only"):
        await reader.commit("main", {A: b"3"}, {}, op=Op("r", 1))
    await reader.close()


async def test_read_only_works_on_a_store_that_nobody_has_open(store: SqliteBackend, tmp_path: Path) -> None:
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    await store.close()
    before = _path(tmp_path).read_bytes()
    reader = SqliteBackend(_path(tmp_path))
    await reader.open(read_only=True)
    assert (await reader.read("main", [A]))[A].payload == b"1"
    await reader.close()
    assert _path(tmp_path).read_bytes() == before


async def test_read_only_without_a_store_says_so_and_makes_none(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        await SqliteBackend(tmp_path / "none" / "s.db").open(read_only=True)
    assert not (tmp_path / "none").exists()


async def test_foreign_damaged_and_newer_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as sql:
        sql.execute("CREATE TABLE accounts (id)")
    sql.close()
    text = tmp_path / "text.db"
    text.write_bytes(b"not a database at all" * 100)
    newer = tmp_path / "newer.db"
    backend = SqliteBackend(newer)
    await backend.open()
    await backend.close()
    sql = sqlite3.connect(newer)
    sql.execute("PRAGMA user_version = 99")
    sql.close()
    for path, kind in ((foreign, CorruptedError), (text, CorruptedError), (newer, NewerFormatError)):
        before = path.read_bytes()
        with pytest.raises(kind):
            await SqliteBackend(path).open()
        assert path.read_bytes()[100:] == before[100:], f"{path.name} was changed"


async def test_damaged_pages_are_found_at_open(store: SqliteBackend, tmp_path: Path) -> None:
    for at in range(40):
        await store.commit("main", {Key("signal", f"S{at}", "x"): b'"' + b"x" * 900 + b'"'}, {}, op=Op("w", at))
    await store.close()
    raw = bytearray(_path(tmp_path).read_bytes())
    for page in range(2, len(raw) // 4096):
        raw[page * 4096 : page * 4096 + 64] = b"\xa5" * 64
    _path(tmp_path).write_bytes(raw)
    with pytest.raises(CorruptedError):
        await SqliteBackend(_path(tmp_path)).open()


async def test_a_file_that_was_replaced_is_not_written_any_more(store: SqliteBackend, tmp_path: Path) -> None:
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    _path(tmp_path).rename(tmp_path / "moved.db")
    with pytest.raises(FencedError, match="deleted or replaced"):
        await store.commit("main", {A: b"2"}, {}, op=Op("w", 2))


def _commit(n: int, key: Key = A, payload: bytes = b"{}") -> Commit:
    texts, size = Doorman().admit("main", {key: payload}, {}, Op("w", n))
    return Commit("main", {key: payload}, {}, Op("w", n), texts, size)


def _file(path: Path) -> SqliteFile:
    file = SqliteFile(str(path), deadline_seconds=1, synchronous="full", read_only=False)
    file.open()
    return file


def test_a_full_disk_writes_nothing_and_the_next_commit_succeeds(tmp_path: Path) -> None:
    file = _file(tmp_path / "s.db")
    rows = SqliteRows(file)
    (pages,) = file.sql.execute("PRAGMA page_count").fetchone()
    file.sql.execute(f"PRAGMA max_page_count = {pages + 2}")  # what a full disk looks like to SQLite
    with pytest.raises(UnavailableError, match="disk is full"):
        rows.apply([_commit(1, payload=b'"' + b"x" * 100_000 + b'"')])
    assert rows.read("main", [A]) == {}
    small = _commit(1)
    rows.apply([small])
    assert (small.number, small.outcome) == (1, None)
    file.close()


class _Failing:
    """A connection whose next statement of a kind fails as a disk would make it fail."""

    def __init__(self, sql: sqlite3.Connection, statement: str, code: int) -> None:
        self._sql = sql
        self._statement = statement
        self._code = code

    def execute(self, statement: str, *values: Any) -> Any:
        if statement == self._statement:
            self._statement = ""
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = self._code
            error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
            raise error
        return self._sql.execute(statement, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sql, name)


async def test_after_a_failed_flush_nothing_is_written_until_it_is_opened_again(store: SqliteBackend) -> None:
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    lane = store._writer
    assert lane is not None
    lane.rows._sql = _Failing(lane.rows._sql, "COMMIT", sqlite3.SQLITE_IOERR_FSYNC)  # type: ignore[assignment]
    with pytest.raises(UnknownOutcomeError):
        await store.commit("main", {A: b"2"}, {A: 1}, op=Op("w", 2))
    with pytest.raises(FailedError):
        await store.commit("main", {A: b"2"}, {A: 1}, op=Op("w", 2))
    await store.close()
    await store.open()
    assert await store.commit("main", {A: b"2"}, {A: 1}, op=Op("w", 2)) == 2
    assert (await store.read("main", [A]))[A].payload == b"2"


async def test_an_error_before_the_flush_leaves_nothing_and_is_no_end(store: SqliteBackend) -> None:
    lane = store._writer
    assert lane is not None
    lane.rows._sql = _Failing(lane.rows._sql, "BEGIN IMMEDIATE", sqlite3.SQLITE_IOERR_READ)  # type: ignore[assignment]
    with pytest.raises(UnavailableError):
        await store.commit("main", {A: b"1"}, {A: 0}, op=Op("w", 1))
    assert await store.commit("main", {A: b"1"}, {A: 0}, op=Op("w", 1)) == 1


@pytest.mark.parametrize("payload", [b"\xff\xfe", b'"\x00"', "text"])
async def test_a_payload_that_is_no_json_text_is_refused(store: SqliteBackend, payload: Any) -> None:
    with pytest.raises(InvalidInputError, match="payload"):
        await store.commit("main", {A: payload}, {}, op=Op("w", 1))
    assert await store.head("main") == (0, {})


async def test_ten_thousand_rows_are_read_and_listed_in_pages(store: SqliteBackend) -> None:
    keys = [Key("signal", f"S{at}", "x") for at in range(2500)]
    await store.commit("main", dict.fromkeys(keys, b"{}"), {}, op=Op("w", 1))
    await store.commit("other", {Key("trade", "S1", f"t{at}"): b"{}" for at in range(9000)}, {}, op=Op("w", 1))
    assert [key async for key in store.keys("main")] == sorted(keys)
    some = keys[::40]
    assert set(await store.read("main", some)) == set(some)
    assert set(await store.read("main", keys)) == set(keys)
    assert await store.read("other", keys) == {}


@pytest.mark.parametrize("wrong", [{"deadline_seconds": 0}, {"deadline_seconds": 61}, {"synchronous": "off"}])
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        SqliteBackend("s.db", **wrong)


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(HoldfastError, match="path"):
        SqliteBackend("")


@pytest.mark.parametrize("others", [0, 60, 1000], ids=["no others", "few others", "many others"])
async def test_a_long_read_gives_the_rows_asked_for_with_their_ops_and_no_others(
    store: SqliteBackend, others: int
) -> None:
    asked = [Key("signal", f"S{at}", "x") for at in range(100)]
    between = [Key("signal", f"S{at}", "y") for at in range(others)]
    versions = {}
    for at, key in enumerate(asked[:90]):  # the last ten are not there
        n = at + 1
        versions[key] = await store.commit("main", {key: b'{"at": %d}' % at}, {}, op=Op(f"w{at % 7}", n))
    await store.commit("main", dict.fromkeys(between, b"[]"), {}, op=Op("other", 1))
    await store.commit("elsewhere", {Key("signal", "S5", "z"): b"[]"}, {}, op=Op("other", 1))
    twice = [*asked, asked[3]]
    found = await store.read("main", twice)
    assert list(found) == [key for key in asked if key in found]
    assert {key: (record.payload, record.version, record.op) for key, record in found.items()} == {
        key: (b'{"at": %d}' % at, versions[key], Op(f"w{at % 7}", at + 1)) for at, key in enumerate(asked[:90])
    }
    assert all(type(key) is Key and type(record) is Record for key, record in found.items())
    assert await store.read("elsewhere", asked) == {}
