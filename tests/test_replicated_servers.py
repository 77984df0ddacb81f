"""Copies on real servers and files: processes that race, are killed or stopped; servers killed; promote by command."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from replicated_worker import COUNTER, raised
from servers import require
from servers.shared import own_name, shared
from servers.valkey import RedisServer, valkey_binary
from test_replicated import content, level

from holdfast.cli import main
from holdfast.cli.exits import OK, USAGE
from holdfast.contract import Key, Op
from holdfast.urls import open_backend
from holdfast.wrappers.replicated import Replicated

WORKER = Path(__file__).parent / "replicated_worker.py"


@pytest.fixture
def workers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for worker in started:
        worker.kill()
        worker.wait()


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[RedisServer]:
    require("valkey")
    server = RedisServer(valkey_binary(), tmp_path / "valkey")
    yield server
    server.stop()


def begin(workers: list[subprocess.Popen[bytes]], store: str, name: str, times: int, ledger: Path) -> None:
    workers.append(subprocess.Popen([sys.executable, str(WORKER), store, name, str(times), str(ledger)]))


def acknowledged(*ledgers: Path) -> list[int]:
    """Return the values whose commits were acknowledged."""
    lines = [line for ledger in ledgers if ledger.exists() for line in ledger.read_text().splitlines()]
    return [int(line.split()[1]) for line in lines if line != "ready"]


def wait_until(ledger: Path, count: int) -> None:
    """Wait until so many commits were acknowledged."""
    end = time.monotonic() + 60
    while len(acknowledged(ledger)) < count:
        assert time.monotonic() < end, "it does not go on"
        time.sleep(0.005)


async def judge(store: str, *ledgers: Path) -> int:
    """Open the copies, see that nothing acknowledged was lost and that they are equal; return the counter."""
    copies = open_backend(store)
    assert isinstance(copies, Replicated)
    await copies.open()
    found = (await copies.read("main", [COUNTER]))[COUNTER]
    value, done = int(found.payload), acknowledged(*ledgers)
    assert len(set(done)) == len(done), "two commits were acknowledged for one value"
    assert value >= max(done)
    await level(copies)
    contents = [await content(copy.backend) for copy in copies.copies]  # type: ignore[arg-type]
    assert all(one == contents[0] for one in contents)
    await copies.close()
    return value


async def test_processes_race_over_three_kinds_of_copies_and_one_is_killed(
    tmp_path: Path, workers: list[subprocess.Popen[bytes]]
) -> None:
    name = own_name(tmp_path)
    store = (
        f"{shared('valkey').url}/0?prefix={name} sqlite:{tmp_path / 'copy.db'} {shared('postgres').url}?schema={name}"
    )
    ledgers = [tmp_path / f"ledger-{at}" for at in range(3)]
    for at, ledger in enumerate(ledgers):
        begin(workers, store, f"racer-{at}", 40 if at else 100_000, ledger)
    await asyncio.to_thread(wait_until, ledgers[0], 20)
    workers[0].kill()
    for worker in workers[1:]:
        assert await asyncio.to_thread(worker.wait, 120) == 0
    total = await judge(store, *ledgers)
    assert total - len(acknowledged(*ledgers)) in (0, 1), "only the killed one can have left a commit unacknowledged"


async def test_a_follower_that_is_killed_is_survived_and_brought_level(
    tmp_path: Path, valkey: RedisServer, workers: list[subprocess.Popen[bytes]]
) -> None:
    store = f"sqlite:{tmp_path / 'a.db'} {valkey.url} sqlite:{tmp_path / 'b.db'}"
    ledger = tmp_path / "ledger"
    begin(workers, store, "w", 100_000, ledger)
    for _ in range(3):
        await asyncio.to_thread(wait_until, ledger, len(acknowledged(ledger)) + 15)
        valkey.kill()
        await asyncio.to_thread(wait_until, ledger, len(acknowledged(ledger)) + 15)
        await asyncio.to_thread(valkey.restart)
    workers[0].kill()
    workers[0].wait()
    await judge(store, ledger)


async def test_after_the_first_was_killed_a_promote_by_command_lets_the_running_process_go_on(
    tmp_path: Path, valkey: RedisServer, workers: list[subprocess.Popen[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    store = f"{valkey.url} sqlite:{tmp_path / 'a.db'} sqlite:{tmp_path / 'b.db'}"
    ledger = tmp_path / "ledger"
    begin(workers, store, "w", 100_000, ledger)
    await asyncio.to_thread(wait_until, ledger, 20)
    assert await asyncio.to_thread(main, ["promote", store]) == USAGE
    assert "answers" in capsys.readouterr().err
    valkey.kill()
    assert await asyncio.to_thread(main, ["promote", store, "--json"]) == OK
    told = json.loads(capsys.readouterr().out)
    assert (told["generation"], told["quorum"], told["copies"]) == (2, 2, 3)
    assert "sqlite" in told["first"]
    await asyncio.to_thread(wait_until, ledger, len(acknowledged(ledger)) + 20)
    await asyncio.to_thread(valkey.restart)
    await asyncio.to_thread(wait_until, ledger, len(acknowledged(ledger)) + 20)
    workers[0].kill()
    workers[0].wait()
    await judge(store, ledger)


async def test_a_process_that_was_stopped_through_a_promote_gets_nothing_acknowledged_by_the_old_first(
    tmp_path: Path, workers: list[subprocess.Popen[bytes]]
) -> None:
    # On servers: a process that is stopped inside a transaction of SQLite keeps the file from everybody else.
    url, name = f"{shared('valkey').url}/0?prefix=", own_name(tmp_path)
    store = f"{url}{name}a {url}{name}b {url}{name}c"
    ledgers = [tmp_path / "zombie", tmp_path / "newer"]
    begin(workers, store, "zombie", 100_000, ledgers[0])
    for turn in range(5):
        await asyncio.to_thread(wait_until, ledgers[0], len(acknowledged(ledgers[0])) + 10)
        workers[0].send_signal(signal.SIGSTOP)
        assert await asyncio.to_thread(main, ["promote", store, "--force"]) == OK
        copies = open_backend(store)
        await copies.open()
        for n in range(1, 6):
            number, value = await raised(copies, Op(f"newer-{turn}", n))
            with ledgers[1].open("a") as lines:
                lines.write(f"{number} {value}\n")
        await copies.close()
        workers[0].send_signal(signal.SIGCONT)
    await asyncio.to_thread(wait_until, ledgers[0], len(acknowledged(ledgers[0])) + 10)
    workers[0].kill()
    workers[0].wait()
    assert len(acknowledged(ledgers[1])) == 25
    await judge(store, *ledgers)


def test_promote_by_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["promote", f"sqlite:{tmp_path / 'a.db'}"]) == USAGE
    assert "one place" in capsys.readouterr().err
    assert main(["promote", f"sqlite:{tmp_path / 'a.db'} sqlite:{tmp_path / 'b.db'}"]) == USAGE
    assert "not copies" in capsys.readouterr().err


async def test_doctor_tells_how_far_each_copy_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = f"sqlite:{tmp_path / 'a.db'} sqlite:{tmp_path / 'b.db'}"
    copies = open_backend(store)
    await copies.open()
    await raised(copies, Op("w", 1))
    await copies.close()
    alone = open_backend(f"sqlite:{tmp_path / 'a.db'}")
    await alone.open()  # the first copy gets a commit that the other does not have
    own = Key("replica", "main", "number")
    await alone.commit("main", {COUNTER: b"7", own: b"{}"}, {}, op=Op("past the copies", 1))
    await alone.close()
    await asyncio.to_thread(main, ["doctor", store, "--plain"])
    said = capsys.readouterr().out
    assert "copy 2" in said
    assert "is 1 commits behind" in said
