"""PostgreSQL: what the server's settings really promise, right ones and wrong ones; none may be misreported."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from servers import require
from servers.postgres import PASSWORD, PostgresServer

from holdfast.backends.postgres import PostgresBackend
from holdfast.contract import Guarantees, How, Key, Op, Survives
from holdfast.errors import (
    HoldfastError,
    InvalidInputError,
    NewerFormatError,
    NotFoundError,
    UnavailableError,
    UnknownOutcomeError,
    UnsafeSettingError,
)

A = Key("signal", "BTCUSDT_a_x", "BTCUSDT")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    require("postgres")
    running = PostgresServer(tmp_path_factory.mktemp("postgres"))
    yield running
    running.stop()


@pytest.fixture
def tuned(server: PostgresServer) -> Iterator[PostgresServer]:
    """The server, whose settings are put back afterwards."""
    yield server
    server.psql("ALTER SYSTEM RESET ALL")
    server.psql("ALTER ROLE postgres RESET ALL")
    server.psql("SELECT pg_reload_conf()")
    server.wait_until("SELECT current_setting('fsync') || current_setting('synchronous_standby_names')", "on")


async def attested(url: str, *, read_only: bool = False) -> Guarantees:
    backend = PostgresBackend(url, deadline_seconds=3)
    try:
        return await backend.open(read_only=read_only)
    finally:
        await backend.close()


async def test_the_defaults_survive_a_power_cut(server: PostgresServer) -> None:
    found = await attested(server.url)
    assert (found.survives, found.survives_how) == (Survives.HOST, How.ATTESTED)
    assert (found.atomic, found.fenced, found.shared, found.warnings) == (True, True, True, ())
    assert found.backend == f"postgresql://127.0.0.1:{server.port}/postgres?schema=holdfast"


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
async def test_a_setting_that_voids_the_promise_is_refused_by_name(tuned: PostgresServer, setting: str) -> None:
    await attested(tuned.url)
    tuned.set(setting, "off")
    with pytest.raises(UnsafeSettingError, match=f"set {setting} = on"):
        await attested(tuned.url)
    shown = await attested(tuned.url, read_only=True)
    assert shown.survives == Survives.PROCESS
    assert any(setting in warning for warning in shown.warnings)


@pytest.mark.parametrize("value", ["off", "local", "remote_write"])
@pytest.mark.parametrize("where", ["server", "role"])
async def test_a_weaker_synchronous_commit_is_overridden_and_told(
    tuned: PostgresServer, where: str, value: str
) -> None:
    if where == "server":
        tuned.set("synchronous_commit", value)
    else:
        tuned.psql(f"ALTER ROLE postgres SET synchronous_commit = '{value}'")
    found = await attested(tuned.url)
    assert found.survives == Survives.HOST
    assert any("synchronous_commit" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    "setting",
    ["default_transaction_isolation = 'serializable'", "default_transaction_read_only = 'on'",
     "statement_timeout = '1ms'", "client_encoding = 'latin1'", "plan_cache_mode = 'force_custom_plan'",
     "search_path = 'nowhere'", "standard_conforming_strings = 'off'", "datestyle = 'German'"],
)  # fmt: skip
async def test_settings_of_the_user_that_would_disturb_are_overridden(tuned: PostgresServer, setting: str) -> None:
    tuned.psql(f"ALTER ROLE postgres SET {setting}")
    backend = PostgresBackend(f"{tuned.url}?schema=disturbed")
    await backend.open()
    number = (await backend.head("main")).number
    payload = '"é\\u0000"'.encode()
    assert await backend.commit("main", {A: payload}, {}, op=Op(setting, 1)) == number + 1
    assert (await backend.read("main", [A]))[A].payload == payload
    await backend.close()


async def test_an_unlogged_table_is_refused(server: PostgresServer) -> None:
    await attested(f"{server.url}?schema=volatile")
    server.psql("ALTER TABLE volatile.rows SET UNLOGGED")
    with pytest.raises(UnsafeSettingError, match="UNLOGGED"):
        await attested(f"{server.url}?schema=volatile")


async def test_a_database_that_is_not_utf8_is_refused(server: PostgresServer) -> None:
    server.psql("CREATE DATABASE ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(UnsafeSettingError, match="server_encoding"):
        await attested(server.url.removesuffix("postgres") + "ascii")


async def test_a_newer_format_is_refused(server: PostgresServer) -> None:
    await attested(f"{server.url}?schema=newer")
    server.psql("UPDATE newer.format SET number = 99")
    with pytest.raises(NewerFormatError, match="99"):
        await attested(f"{server.url}?schema=newer")


async def test_a_setting_changed_while_it_runs_is_found_by_the_next_commit(tuned: PostgresServer) -> None:
    backend = PostgresBackend(f"{tuned.url}?schema=changing")
    await backend.open()
    first = await backend.commit("main", {A: b"1"}, {A: 0}, op=Op("w", 1))
    tuned.set("fsync", "off")
    with pytest.raises(UnsafeSettingError, match="fsync"):
        await backend.commit("main", {A: b"2"}, {A: first}, op=Op("w", 2))
    assert (await backend.read("main", [A]))[A].payload == b"1"
    tuned.set("fsync", "on")
    assert await backend.commit("main", {A: b"2"}, {A: first}, op=Op("w", 2)) == first + 1
    await backend.close()


async def test_a_plain_user_with_a_schema_of_its_own_is_enough(server: PostgresServer) -> None:
    server.psql("CREATE ROLE plain LOGIN PASSWORD 'plain'")
    server.psql("CREATE SCHEMA plain AUTHORIZATION plain")
    base = f"postgresql://plain:plain@127.0.0.1:{server.port}/postgres"
    assert (await attested(f"{base}?schema=plain")).survives == Survives.HOST
    with pytest.raises(UnavailableError, match="permission denied"):
        await attested(f"{base}?schema=not_mine")


async def test_read_only_without_a_store_says_so_and_makes_none(server: PostgresServer) -> None:
    with pytest.raises(NotFoundError):
        await attested(f"{server.url}?schema=nothing_here", read_only=True)
    assert server.psql("SELECT count(*) FROM pg_namespace WHERE nspname = 'nothing_here'") == "0"


async def test_a_standby_that_is_asked_for_but_not_there_is_told_at_once(tuned: PostgresServer) -> None:
    await attested(tuned.url)
    tuned.set("synchronous_standby_names", "elsewhere")
    with pytest.raises(UnavailableError, match="synchronous_standby_names"):
        await attested(tuned.url)
    tuned.set("synchronous_standby_names", None)


@pytest.fixture
async def pair(tuned: PostgresServer, tmp_path: Path) -> AsyncIterator[tuple[PostgresServer, PostgresServer]]:
    """A primary and its synchronous standby."""
    standby = PostgresServer(tmp_path / "standby", primary=tuned, name="twin")
    tuned.set("synchronous_standby_names", "twin")
    tuned.wait_until("SELECT sync_state FROM pg_stat_replication", "sync")
    yield tuned, standby
    tuned.set("synchronous_standby_names", None)
    standby.stop()


def replayed(standby: PostgresServer, statement: str) -> str:
    """Return what a standby answers once it shows all that it has on disk by now: a commit waits for that alone."""
    flushed = standby.psql("SELECT pg_last_wal_receive_lsn()")
    standby.wait_until(f"SELECT pg_last_wal_replay_lsn() >= '{flushed}'", "t")
    return standby.psql(statement)


async def test_a_synchronous_standby_survives_the_loss_of_a_server_and_its_absence_is_an_unknown_outcome(
    pair: tuple[PostgresServer, PostgresServer],
) -> None:
    primary, standby = pair
    backend = PostgresBackend(f"{primary.url}?schema=paired", deadline_seconds=0.6)
    found = await backend.open()
    assert (found.survives, found.survives_how) == (Survives.SERVER, How.ATTESTED)
    first = await backend.commit("main", {A: b"1"}, {A: 0}, op=Op("w", 1))
    assert replayed(standby, "SELECT row FROM paired.rows") == "1", "what was acknowledged is there"

    standby.freeze()
    loop = asyncio.get_running_loop()
    for _ in range(2):
        begun = loop.time()
        with pytest.raises(UnknownOutcomeError):  # the second meets the first, which still waits on the server
            await backend.commit("main", {A: b"2"}, {A: first}, op=Op("w", 2))
        assert loop.time() - begun < 3
    standby.freeze(thaw=True)
    number = 0
    async with asyncio.timeout(20):
        while not number:
            try:
                number = await backend.commit("main", {A: b"2"}, {A: first}, op=Op("w", 2))
            except UnknownOutcomeError:
                continue
    assert number == first + 1, "applied once"
    assert replayed(standby, "SELECT row FROM paired.rows") == "2"
    await backend.close()


async def test_a_commit_whose_wait_for_the_standby_was_cancelled_is_not_acknowledged(
    pair: tuple[PostgresServer, PostgresServer],
) -> None:
    primary, standby = pair
    backend = PostgresBackend(f"{primary.url}?schema=cancelled", deadline_seconds=10)
    await backend.open()
    first = await backend.commit("main", {A: b"1"}, {A: 0}, op=Op("w", 1))
    standby.freeze()
    waits = asyncio.ensure_future(backend.commit("main", {A: b"2"}, {A: first}, op=Op("w", 2)))
    waiting = "FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = 'holdfast'"
    await asyncio.to_thread(primary.wait_until, f"SELECT count(*) {waiting}", "1")
    await asyncio.to_thread(primary.psql, f"SELECT pg_cancel_backend(pid) {waiting}")
    with pytest.raises(UnknownOutcomeError, match="standby"):
        await waits
    assert primary.psql("SELECT row FROM cancelled.rows") == "2", "it is on the primary"
    reading = asyncio.ensure_future(backend.read("main", [A]))
    await asyncio.to_thread(primary.wait_until, f"SELECT count(*) {waiting}", "1")
    assert not reading.done(), "what might be lost with the primary is not shown"
    standby.freeze(thaw=True)
    assert (await reading)[A].payload == b"2"
    assert await backend.commit("main", {A: b"2"}, {A: first}, op=Op("w", 2)) == first + 1
    await backend.close()


async def test_a_server_that_stops_waiting_for_its_standby_is_refused(
    pair: tuple[PostgresServer, PostgresServer],
) -> None:
    primary, _ = pair
    backend = PostgresBackend(f"{primary.url}?schema=downgraded")
    assert (await backend.open()).survives == Survives.SERVER
    primary.set("synchronous_standby_names", None)
    with pytest.raises(UnsafeSettingError, match="synchronous_standby_names"):
        await backend.commit("main", {A: b"1"}, {A: 0}, op=Op("w", 1))
    await backend.close()
    assert (await attested(f"{primary.url}?schema=downgraded")).survives == Survives.HOST


async def test_a_standby_takes_readers_but_no_writers(pair: tuple[PostgresServer, PostgresServer]) -> None:
    primary, standby = pair
    await attested(f"{primary.url}?schema=shown")
    with pytest.raises(UnsafeSettingError, match="standby"):
        await attested(f"{standby.url}?schema=shown")
    assert any("standby" in told for told in (await attested(f"{standby.url}?schema=shown", read_only=True)).warnings)


async def test_a_user_who_may_not_see_the_standbys_is_promised_less(
    pair: tuple[PostgresServer, PostgresServer],
) -> None:
    primary, _ = pair
    primary.psql("CREATE ROLE blind LOGIN PASSWORD 'blind'")
    primary.psql("CREATE SCHEMA blind AUTHORIZATION blind")
    found = await attested(f"postgresql://blind:blind@127.0.0.1:{primary.port}/postgres?schema=blind")
    assert found.survives == Survives.HOST
    assert any("pg_read_all_stats" in warning for warning in found.warnings)


def told(error: BaseException) -> str:
    """Return all that a traceback of this error would show."""
    seen, text = set(), ""
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            text += f"{one!r} {one} {vars(one)}"
            todo += [one.__cause__, None if one.__suppress_context__ else one.__context__]
    return text


async def test_no_password_is_in_an_error_a_name_or_a_log(
    server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "S3cret-canary"
    said = ""
    for url in (
        f"postgresql://postgres:{secret}@127.0.0.1:{server.port}/postgres",
        f"postgresql://postgres:{secret}@127.0.0.1:1/postgres",
        f"postgresql://postgres@127.0.0.1:1/postgres?password={secret}",
        f"postgresql://postgres:{secret}@127.0.0.1:{server.port}/nowhere",
    ):
        backend = PostgresBackend(url)
        with pytest.raises(UnavailableError) as caught:
            await backend.open()
        said += repr(backend) + told(caught.value)
    for url in (
        f"postgresql://u:{secret}@[bad/postgres",
        f"postgresql://u:{secret}@h/d?wrong={secret}",
        f"mysql://u:{secret}@h/d",
        f"postgresql://u:{secret}@h/d?schema=BAD",
    ):
        with pytest.raises(InvalidInputError) as refused:
            PostgresBackend(url)
        said += told(refused.value)
    good = PostgresBackend(server.url)
    said += str(await good.open()) + repr(good)
    await good.close()
    said += caplog.text
    assert secret not in said
    assert PASSWORD not in said


@pytest.mark.parametrize("schema", ["", "Upper", "a b", "x" * 64, "1st", "pg_mine", "a-b", 'a"b', "a%3Bdrop"])
def test_a_schema_that_cannot_be_is_refused(schema: str) -> None:
    with pytest.raises(InvalidInputError, match="schema"):
        PostgresBackend(f"postgresql://127.0.0.1/x?schema={schema}")


@pytest.mark.parametrize("deadline", ["0", "61", "soon"])
def test_a_deadline_that_cannot_be_is_refused(deadline: str) -> None:
    with pytest.raises(HoldfastError, match="deadline_seconds"):
        PostgresBackend(f"postgresql://127.0.0.1/x?deadline_seconds={deadline}")
