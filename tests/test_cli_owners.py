"""Two processes that want the same contexts, as a user starts them; and ``holdfast owners``."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_cli_run import BOT, holdfast, started

from holdfast.backends.sqlite import SqliteBackend
from holdfast.cli.owners import owners_of
from holdfast.cli.owning import when_free
from holdfast.contract import Survives
from holdfast.domains import context_key, worker_key
from holdfast.engine.session import wall_clock_ms
from holdfast.engine.worker import machine, started_ticks
from holdfast.errors import HeldError, InvalidInputError
from holdfast.names import Context
from holdfast.rows import Owner, Worker
from holdfast.store import Store

STORE = "sqlite:store.db"
RUN = ("run", BOT, "--symbols", "BTCUSDT", "--market", "synthetic:7", "--speed", "600", "--lease", "1", "--plain")
_LIMIT_SECONDS = 60


def eventually(folder: Path, condition: Callable[[dict[str, Any]], bool], *options: str) -> dict[str, Any]:
    """Ask ``holdfast owners`` until it says so; bounded."""
    ends = time.monotonic() + _LIMIT_SECONDS
    while True:
        done = holdfast("owners", STORE, "--json", *options, folder=folder)
        if done.returncode == 0:
            picture: dict[str, Any] = json.loads(done.stdout)
            if condition(picture):
                return picture
        assert time.monotonic() < ends, done.stdout + done.stderr
        time.sleep(0.05)


def owned_by(pid: int) -> Callable[[dict[str, Any]], bool]:
    return lambda picture: [one["pid"] for one in picture["contexts"] if not one["released"]] == [pid]


def test_of_two_runs_one_trades_and_the_other_waits_until_the_first_is_killed(tmp_path: Path) -> None:
    with started(*RUN, "--store", STORE, folder=tmp_path) as first:
        (context,) = eventually(tmp_path, owned_by(first.pid), "--watch")["contexts"]
        assert (context["context"], context["epoch"], context["life"]) == ("replay/BTCUSDT/swing", 1, "alive")
        assert 0 <= context["beatAgeSeconds"] < 30
        refused = holdfast(*RUN, "--store", STORE, folder=tmp_path)
        assert refused.returncode == 3
        assert re.search(rf"owned by process {first.pid} on .*alive", refused.stderr)
        with started(*RUN, "--store", STORE, "--on-conflict", "wait", folder=tmp_path) as second:
            eventually(tmp_path, lambda picture: len(picture["workers"]) == 2)
            assert owned_by(first.pid)(eventually(tmp_path, lambda picture: True))
            first.kill()
            (context,) = eventually(tmp_path, owned_by(second.pid))["contexts"]
            assert context["epoch"] == 2
            plain = holdfast("owners", STORE, "--plain", folder=tmp_path).stdout
            assert re.search(rf"replay/BTCUSDT/swing +{second.pid} on \S+ +2 ", plain)
            second.send_signal(signal.SIGTERM)
            _, stderr = second.communicate(timeout=_LIMIT_SECONDS)
            assert second.returncode == 0
            assert f"waiting for process {first.pid} on" in stderr
            assert f"taken over from process {first.pid} on" in stderr
    (context,) = eventually(tmp_path, lambda picture: True)["contexts"]
    assert (context["released"], context["life"]) == (True, "released")


def test_a_run_that_is_taken_over_ends_with_the_error_that_names_the_new_owner(tmp_path: Path) -> None:
    with started(*RUN, "--store", STORE, folder=tmp_path) as first:
        eventually(tmp_path, owned_by(first.pid))
        with started(*RUN, "--store", STORE, "--on-conflict", "takeover", folder=tmp_path) as second:
            _, stderr = first.communicate(timeout=_LIMIT_SECONDS)
            assert first.returncode == 4
            assert f"is owned by process {second.pid} on" in stderr
            eventually(tmp_path, owned_by(second.pid))


def test_a_folder_belongs_to_one_process_so_a_takeover_names_it_and_a_wait_lasts_until_its_end(tmp_path: Path) -> None:
    with started(*RUN, "--store", "data", folder=tmp_path) as first:
        ends = time.monotonic() + _LIMIT_SECONDS
        while not (tmp_path / "data" / ".holdfast" / "commit.log").exists():
            assert time.monotonic() < ends
            time.sleep(0.02)
        ends = time.monotonic() + _LIMIT_SECONDS
        while (told := _folder_owners(tmp_path)) != ["alive"]:
            assert time.monotonic() < ends, told
        done = holdfast(*RUN, "--store", "data", "--on-conflict", "takeover", folder=tmp_path)
        assert done.returncode == 2
        assert re.search(rf"{first.pid}.*cannot be taken from it: end that process", done.stderr)
        with started(*RUN, "--store", "data", "--on-conflict", "wait", "--minutes", "5", folder=tmp_path) as second:
            assert second.stderr is not None
            line = second.stderr.readline()
            while "waiting" not in line:
                assert line, "it ended"
                line = second.stderr.readline()
            assert str(first.pid) in line
            assert second.poll() is None
            os.kill(first.pid, signal.SIGKILL)
            second.communicate(timeout=_LIMIT_SECONDS)
            assert second.returncode == 0
    assert _folder_owners(tmp_path) == ["ended"]


def _folder_owners(folder: Path) -> list[str]:
    """Say what ``holdfast owners`` says of the owners in a folder."""
    done = holdfast("owners", "data", "--json", folder=folder)
    return [one["life"] for one in json.loads(done.stdout)["contexts"]] if done.returncode == 0 else []


async def test_a_dead_worker_is_listed_until_its_contexts_are_taken_over_and_a_fresh_beat_of_this_machine_is_a_life(
    tmp_path: Path,
) -> None:
    store = Store(SqliteBackend(tmp_path / "store.db"), require=Survives.NOTHING)
    await store.open()
    contexts = [Context("paper", symbol, "idle") for symbol in ("BTCUSDT", "ETHUSDT")]
    row = Worker(
        holder="old", beat=3, lease_seconds=20.0, host=socket.gethostname(), pid=os.getpid(), machine=machine(),
        started=1, contexts=4, at_ms=wall_clock_ms(),
    )  # fmt: skip
    living = msgspec.structs.replace(row, holder="new", started=started_ticks(os.getpid()) or 0, contexts=0)
    silent = msgspec.structs.replace(living, holder="silent", at_ms=wall_clock_ms() - 60_000)
    writer = store.writer("test")
    await writer.commit({worker_key(one.holder): one for one in (row, living, silent)})

    async def own(context: Context, holder: str, epoch: int) -> None:
        owner = Owner(holder=holder, epoch=epoch, host=row.host, pid=row.pid, since_ms=1)
        await writer.commit({context_key("owner", context): owner})

    async def told() -> tuple[list[str], dict[str, tuple[str, int]]]:
        owned, workers = await owners_of(store, watch=False)
        return [one.life for one in owned], {one.row.holder: (one.life.name, one.row.contexts) for one in workers}

    for context in contexts:
        await own(context, "old", 1)
    mine, others = ("ALIVE", 0), ("UNKNOWN", 0)
    assert await told() == (["dead", "dead"], {"old": ("DEAD", 2), "new": mine, "silent": others})
    await own(contexts[0], "new", 2)
    assert await told() == (["alive", "dead"], {"old": ("DEAD", 1), "new": ("ALIVE", 1), "silent": others})
    await own(contexts[1], "new", 2)
    assert await told() == (["alive", "alive"], {"new": ("ALIVE", 2), "silent": others})
    await store.close()


@pytest.mark.parametrize("text", ["0.1", "-1", "x", "nan", "99999"])
def test_a_lease_that_cannot_be_is_refused(text: str, tmp_path: Path) -> None:
    done = holdfast(*RUN, f"--lease={text}", folder=tmp_path)
    assert done.returncode == 2
    assert "is no lease: give 0.5 to 3600 seconds" in done.stderr


def test_a_fleet_of_one_runs_its_file_and_hands_over_at_sigterm(tmp_path: Path) -> None:
    file, bot = tmp_path / "contexts", tmp_path / "bot.py"
    bot.write_text(
        "from pathlib import Path\n"
        "from holdfast import add_exchange, add_strategy\n"
        "from holdfast.market.serve import build_market\n"
        "market, _ = build_market(synthetic=7, symbols=('BTCUSDT', 'ETHUSDT'), speed=600)\n"
        "add_exchange(market, exchange_name='paper')\n"
        "add_strategy(lambda symbol, when_ms: None, strategy_name='idle', interval='1m')\n"
    )
    file.write_text("paper BTCUSDT idle\npaper ETHUSDT idle  # both\n")
    options = ("fleet", str(bot), "--contexts", str(file), "--store", STORE, "--lease", "1")
    with started(*options, folder=tmp_path) as worker:
        picture = eventually(tmp_path, lambda picture: len(picture["contexts"]) == 2)
        assert {one["pid"] for one in picture["contexts"]} == {worker.pid}
        assert picture["workers"][0]["fleet"]
        worker.terminate()
        stdout, stderr = worker.communicate(timeout=_LIMIT_SECONDS)
        assert worker.returncode == 0, stderr
    assert "paper/BTCUSDT/idle: taken" in stdout
    assert "leaving: the contexts are handed over" in stderr
    picture = eventually(tmp_path, lambda picture: True)
    assert [one["released"] for one in picture["contexts"]] == [True, True]
    assert picture["workers"] == []
    file.write_text("paper BTCUSDT\n")
    done = holdfast(*options, folder=tmp_path)
    assert (done.returncode, "line 1: 'paper BTCUSDT' is no context" in done.stderr) == (2, True)
    file.write_text("paper BTCUSDT idle\n")
    done = holdfast(*options[:4], "--store", "data", folder=tmp_path)
    assert (done.returncode, "belongs to one process: a fleet needs" in done.stderr) == (2, True)


async def test_waiting_for_a_store_of_one_process_ends_when_it_is_free_and_tells_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tries = 0

    async def opened() -> str:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise HeldError("process 7 holds it")
        return "open"

    assert await when_free(opened, "wait", sleep=lambda seconds: asyncio.sleep(0)) == "open"
    assert capsys.readouterr().err.count("waiting: process 7 holds it") == 1
    tries = 0
    with pytest.raises(HeldError):
        await when_free(opened, "refuse")
    with pytest.raises(InvalidInputError, match=r"process 7 holds it; .*end that process"):
        await when_free(opened, "takeover")
