"""PostgreSQL: cut answers, killed servers and clients, races, and what a person can read with psql."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from proxy import SLACK_SECONDS, Direction, How, Proxy
from servers import require
from servers.postgres import PASSWORD, PostgresServer
from servers.shared import own_name, shared
from sql_ground import kill_a_pouring_process, race_processes

from holdfast.backends.postgres import PostgresBackend
from holdfast.contract import Key, Op
from holdfast.errors import ConflictError, FailedError, InvalidInputError, UnavailableError, UnknownOutcomeError

A, B = Key("signal", "BTCUSDT_a_x", "BTCUSDT"), Key("signal", "ETHUSDT_a_x", "ETHUSDT")
DEADLINE_SECONDS = 1.0


@pytest.fixture
def server() -> PostgresServer:
    found = shared("postgres")
    assert isinstance(found, PostgresServer)
    return found


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[PostgresServer]:
    """A server of this test alone, to be killed."""
    require("postgres")
    running = PostgresServer(tmp_path / "mortal")
    yield running
    running.stop()


@pytest.fixture
async def store(server: PostgresServer, tmp_path: Path) -> AsyncIterator[PostgresBackend]:
    backend = PostgresBackend(f"{server.url}?schema={own_name(tmp_path)}")
    await backend.open()
    yield backend
    await backend.close()


def through(proxy: Proxy, place: Path, deadline_seconds: float = DEADLINE_SECONDS) -> PostgresBackend:
    return PostgresBackend(
        f"postgresql://postgres:{PASSWORD}@127.0.0.1:{proxy.port}/postgres?schema={own_name(place)}&sslmode=disable",
        deadline_seconds=deadline_seconds,
    )


async def settled(backend: PostgresBackend, key: Key, n: int, expect: int) -> tuple[int, str]:
    """Commit as a caller must: the same op again after an unknown outcome, anew after an unavailable server."""
    seen = ""
    clock = asyncio.get_running_loop().time
    for _ in range(20):
        begun = clock()
        try:
            return await backend.commit("main", {key: b"%d" % n}, {key: expect}, op=Op("w", n)), seen
        except UnknownOutcomeError:
            seen += "?"
        except UnavailableError:
            seen += "-"
        finally:
            assert clock() - begun < DEADLINE_SECONDS + SLACK_SECONDS, "beyond its deadline"
    raise AssertionError("never settled")


@pytest.mark.parametrize("how", ["close", "reset", "hole", "hold"])
@pytest.mark.parametrize("direction", ["requests", "answers"])
async def test_a_commit_cut_anywhere_is_applied_exactly_once(
    server: PostgresServer,
    tmp_path: Path,
    direction: Direction,
    how: How,
    record_property: Callable[[str, object], None],
) -> None:
    async with Proxy(server.port) as proxy:
        backend = through(proxy, tmp_path)
        await backend.open()
        version = 0
        for n in range(1, 9):  # psycopg prepares a statement at its first use; then sizes are steady
            before = dict(proxy.passed)
            version, _ = await settled(backend, A, n, version)
        taken = proxy.passed[direction] - before[direction]
        cuts = 0
        for at in range(0, taken, max(1, taken // (6 if how in ("hole", "hold") else 30))):
            proxy.cut(direction, at, how)
            n += 1
            number, seen = await settled(backend, A, n, version)
            if proxy.was_cut.is_set():
                assert seen == "?", "one unknown outcome, then the answer"
                cuts += 1
            proxy.spare()
            if how == "hold" and proxy.was_cut.is_set() and direction == "requests":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await proxy.release()  # the first request arrives after its repetition was answered
            record = (await backend.read("main", [A]))[A]
            assert (record.version, record.payload, number) == (version + 1, b"%d" % n, version + 1), f"cut at {at}"
            version = number
        assert cuts >= 4
        record_property("proof:cut answers, postgres", {"cuts": cuts, "applied twice": 0, "lost": 0})
        await backend.close()


async def test_a_black_hole_is_left_within_the_deadline(server: PostgresServer, tmp_path: Path) -> None:
    async with Proxy(server.port) as proxy:
        backend = through(proxy, tmp_path)
        await backend.open()
        await settled(backend, A, 1, 0)
        clock = asyncio.get_running_loop().time
        proxy.cut("answers", 0, "hole")
        begun = clock()
        with pytest.raises(UnavailableError):
            await backend.read("main", [A])
        assert clock() - begun < DEADLINE_SECONDS + SLACK_SECONDS
        assert (await backend.read("main", [A]))[A].payload == b"1", "on a new connection"
        await backend.close()


async def test_a_killed_server_loses_nothing_acknowledged_and_its_return_is_all_that_is_needed(
    mortal: PostgresServer,
) -> None:
    backend = PostgresBackend(f"{mortal.url}?schema=killed", deadline_seconds=5)
    await backend.open()
    going = True
    acknowledged: dict[int, tuple[int, int]] = {}

    async def pour(writer: int) -> None:
        key, version, n = Key("entity", "poured", f"w{writer}"), 0, 0
        while going:
            n += 1
            while True:
                try:
                    version = await backend.commit("main", {key: b"%d" % n}, {key: version}, op=Op(f"w{writer}", n))
                    acknowledged[writer] = (n, version)
                    break
                except (UnavailableError, UnknownOutcomeError):
                    await asyncio.sleep(0.02)

    pouring = [asyncio.ensure_future(pour(writer)) for writer in range(8)]
    for _ in range(3):
        so_far = sum(n for n, _ in acknowledged.values())
        async with asyncio.timeout(30):
            while sum(n for n, _ in acknowledged.values()) < so_far + 40:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await asyncio.to_thread(mortal.kill)
        before = dict(acknowledged)
        await asyncio.to_thread(mortal.restart)
        for writer, (n, version) in before.items():
            key = Key("entity", "poured", f"w{writer}")
            found = mortal.psql(f"SELECT row, version FROM killed.rows WHERE entity_id = '{key.entity_id}'")
            row, stored = found.split("|")
            assert (int(row), int(stored)) >= (n, version), "acknowledged, then lost"
    going = False
    await asyncio.gather(*pouring)
    head = await backend.head("main")
    assert head.number == sum(n for n, _ in acknowledged.values()), "each op was counted once"
    await backend.close()


async def test_after_a_restart_of_the_server_the_next_commit_simply_succeeds(mortal: PostgresServer) -> None:
    backend = PostgresBackend(f"{mortal.url}?schema=restarted")
    await backend.open()
    version = await backend.commit("main", {A: b"1"}, {A: 0}, op=Op("w", 1))
    await asyncio.to_thread(mortal.process.signal, 2)
    await asyncio.to_thread(mortal.process.stop)
    with pytest.raises(UnavailableError):
        await backend.commit("main", {A: b"2"}, {A: version}, op=Op("w", 2))
    with pytest.raises(UnavailableError):
        await backend.read("main", [A])
    await asyncio.to_thread(mortal.restart)
    assert await backend.commit("main", {A: b"2"}, {A: version}, op=Op("w", 2)) == 2
    await backend.close()


async def test_processes_that_race_lose_no_increment(server: PostgresServer, tmp_path: Path) -> None:
    await race_processes(f"{server.url}?schema={own_name(tmp_path)}", processes=3, times=40)


async def test_a_killed_process_leaves_every_acknowledged_commit(server: PostgresServer, tmp_path: Path) -> None:
    for at in range(3):
        target = f"{server.url}?schema={own_name(tmp_path)}"
        assert await kill_a_pouring_process(target, 20 + 7 * at, writer=f"poured-{at}") >= 20


async def test_two_backends_on_one_scope_share_it_without_losing_an_increment(
    server: PostgresServer, store: PostgresBackend, tmp_path: Path
) -> None:
    """Both commit groups at the same time, so each often finds that the other was faster."""
    other = PostgresBackend(f"{server.url}?schema={own_name(tmp_path)}")
    await other.open()

    async def some(backend: PostgresBackend, name: str) -> list[int]:
        keys = [Key("signal", name, f"S{at}") for at in range(6)]
        numbers: list[int] = []
        for n in range(1, 11):
            numbers += await asyncio.gather(
                *(backend.commit("main", {key: b"1"}, {}, op=Op(f"{name}-{key.entity_id}", n)) for key in keys)
            )
        return numbers

    one, two = await asyncio.gather(some(store, "one"), some(other, "two"))
    assert sorted(one + two) == list(range(1, 121))
    assert (await store.head("main")).number == 120
    await other.close()


async def test_a_lock_that_is_held_too_long_leaves_nothing_written(server: PostgresServer, tmp_path: Path) -> None:
    schema = own_name(tmp_path)
    backend = PostgresBackend(f"{server.url}?schema={schema}", deadline_seconds=1.5)
    await backend.open()
    version = await backend.commit("main", {A: b"1"}, {A: 0}, op=Op("w", 1))
    holder = await asyncio.create_subprocess_exec(
        *server.psql_words(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=server.environment()
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write(f"BEGIN; SELECT number FROM {schema}.scopes FOR UPDATE;\n".encode())
    await holder.stdin.drain()
    await holder.stdout.readline()
    with pytest.raises(UnavailableError):
        await backend.commit("main", {A: b"2"}, {A: version}, op=Op("w", 2))
    holder.stdin.close()
    await holder.wait()
    assert (await backend.read("main", [A]))[A].payload == b"1"
    assert await backend.commit("main", {A: b"2"}, {A: version}, op=Op("w", 2)) == version + 1
    await backend.close()


async def test_rows_can_be_read_with_psql(server: PostgresServer, store: PostgresBackend, tmp_path: Path) -> None:
    await store.commit("main", {A: b'{"priceOpen": 42000.5}'}, {}, op=Op("bot", 1))
    schema = own_name(tmp_path)
    assert server.psql(f"SELECT entity_name, row->>'priceOpen' FROM {schema}.rows") == "BTCUSDT_a_x|42000.5"
    assert server.psql(f"SELECT * FROM {schema}.writers") == "main|bot|1|1"


@pytest.mark.parametrize("payload", [b"{", b"not json", b"NaN", b"\xff", b'"\x00"', b"[" * 100_000 + b"]" * 100_000])
async def test_what_is_not_json_is_refused_and_does_not_harm_its_group(store: PostgresBackend, payload: bytes) -> None:
    good, bad, deleted = await asyncio.gather(
        store.commit("main", {A: b"1"}, {A: 0}, op=Op("good", 1)),
        store.commit("main", {B: payload}, {B: 0}, op=Op("bad", 1)),
        store.commit("main", {Key("signal", "gone", "x"): None}, {}, op=Op("deletes", 1)),
        return_exceptions=True,
    )
    assert isinstance(bad, InvalidInputError), bad
    assert sorted([good, deleted]) == [1, 2]  # type: ignore[type-var]
    with pytest.raises(InvalidInputError):
        await store.commit("main", {B: payload}, {B: 0}, op=Op("bad", 1))
    assert set(await store.read("main", [A, B])) == {A}


async def test_an_error_never_holds_a_row(store: PostgresBackend) -> None:
    with pytest.raises(InvalidInputError) as caught:
        await store.commit("main", {A: b'{"secret-canary": }'}, {}, op=Op("w", 1))
    assert "canary" not in f"{caught.value} {caught.value.__cause__}"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


async def test_a_key_that_lies_in_another_scope_is_refused_also_when_two_scopes_race_for_it(
    store: PostgresBackend,
) -> None:
    await store.commit("one", {A: b"1"}, {}, op=Op("w", 1))
    with pytest.raises(InvalidInputError, match="'one'"):
        await store.commit("two", {A: b"2"}, {A: 0}, op=Op("w", 1))
    for turn in range(10):
        key = Key("signal", "raced", f"S{turn}")
        answers = await asyncio.gather(
            *(store.commit(scope, {key: b"1"}, {key: 0}, op=Op("r", turn)) for scope in ("one", "two", "three")),
            return_exceptions=True,
        )
        assert sum(isinstance(answer, int) for answer in answers) == 1, answers
        assert sum(isinstance(answer, InvalidInputError) for answer in answers) == 2, answers


async def test_tables_that_were_dropped_stop_the_store_until_it_is_opened_again(
    server: PostgresServer, store: PostgresBackend, tmp_path: Path
) -> None:
    await store.commit("main", {A: b"1"}, {}, op=Op("w", 1))
    server.psql(f"SET client_min_messages = error; DROP SCHEMA {own_name(tmp_path)} CASCADE")
    with pytest.raises(FailedError, match="open it again"):
        await store.commit("main", {A: b"2"}, {}, op=Op("w", 2))
    await store.close()
    await store.open()
    assert await store.commit("main", {A: b"2"}, {A: 0}, op=Op("w", 2)) == 1


async def test_commits_that_depend_on_each_other_wait_for_the_next_group(store: PostgresBackend) -> None:
    answers = await asyncio.gather(
        store.commit("main", {A: b"1"}, {A: 0}, op=Op("w", 1)),
        store.commit("main", {B: b"1"}, {A: 0}, op=Op("v", 1)),
        store.commit("main", {A: None}, {}, op=Op("u", 1)),
        store.commit("main", {B: b"2"}, {A: 0, B: 0}, op=Op("t", 1)),
        store.commit("main", {A: b"1"}, {A: 0}, op=Op("w", 1)),
        return_exceptions=True,
    )
    one, two, three, refused, repeated = answers
    assert (one, repeated) == (1, 1), "the repetition got the number of the first"
    assert (three, two) == (2, 3), "what expects a key that was just written came after that"
    assert isinstance(refused, ConflictError)
    assert refused.keys == (B,)
    assert (await store.head("main")).number == 3
    assert {key: record.payload for key, record in (await store.read("main", [A, B])).items()} == {B: b"1"}


async def test_thousands_of_rows_are_read_and_listed_in_pages(store: PostgresBackend) -> None:
    keys = [Key("signal", f"S{at}", "x") for at in range(2500)]
    await store.commit("main", dict.fromkeys(keys, b"{}"), {}, op=Op("w", 1))
    await store.commit("other", {Key("trade", "S1", f"t{at}"): b"{}" for at in range(3000)}, {}, op=Op("w", 1))
    assert [key async for key in store.keys("main")] == sorted(keys)
    some = keys[::40]
    assert set(await store.read("main", some)) == set(some)
    assert set(await store.read("main", keys)) == set(keys)
    assert await store.read("other", keys) == {}
