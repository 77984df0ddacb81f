"""SIGKILL, again and again: at random instants, at numbered steps, and during the recovery that follows."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backend_list import BACKENDS, URLS
from servers import require
from servers.postgres import PASSWORD
from torture_servers import STORES

from holdfast.backends.file import FileBackend
from holdfast.cli.torture import _print
from holdfast.contract import Key, Op
from holdfast.errors import InvalidInputError, NotFoundError
from holdfast.testing.places import derived, file_path
from holdfast.testing.round import OneRound
from holdfast.testing.torture import FIRST_STEPS, PHASES, Plan, Round, _kills_of_round, numbered_steps
from holdfast.testing.watched import watched_backend
from holdfast.testing.witness import Reporter, Reporting, Witness
from holdfast.testing.zygote import Zygote
from holdfast.urls import open_backend

Note = Callable[[str, object], None]
BOT = Path(__file__).parent.parent / "examples" / "bot.py"
KEY = Key("signal", "BTCUSDT_a_x", "BTCUSDT")


def torture(*arguments: str, bot: Path = BOT) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "holdfast.cli", "torture", str(bot), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_bot_is_killed_around_its_orders_at_a_venue_that_loses_answers(record_property: Note) -> None:
    code, found = torture("--orders", "--kills", "10", "--seed", "3", "--minutes", "600")
    assert (found["lost"], found["duplicated"], found["broken"], found["differences"]) == ([], [], [], [])
    assert code == 0 and found["ok"]
    assert found["kills"] >= 10
    assert found["orders"] >= 10
    assert found["answers_lost"] >= 1
    record_property(
        "proof:torture with orders",
        {"SIGKILLs": found["kills"], "orders at the venue": found["orders"], "twice or forgotten": 0},
    )


def test_a_bot_with_orders_is_taken_over_when_it_is_killed_and_when_it_is_stopped_past_its_lease(
    tmp_path: Path, record_property: Note
) -> None:
    bot, shared = tmp_path / "bot.py", '    risk_name="two-at-once",\n'
    assert BOT.read_text().count(shared) == 1
    bot.write_text(BOT.read_text().replace(shared, ""))  # or who asks first would decide, and nothing be compared
    words = ["--store", f"sqlite:{tmp_path}/store.db", "--minutes", "900", "--symbols", "BTCUSDT", "--seed", "5"]
    code, found = torture("--orders", "--takeovers", "1", "--pauses", "1", "--kills", "2", *words, bot=bot)
    assert (found["lost"], found["duplicated"], found["broken"], found["differences"]) == ([], [], [], [])
    assert code == 0 and found["ok"]
    assert found["kills"] >= 1 and found["takeovers"] >= 1 and found["pauses"] >= 1
    assert found["orders"] >= 2 and found["uncompared"] == 0
    record_property(
        "proof:torture with orders",
        {"SIGKILLs": found["kills"], "orders at the venue": found["orders"], "taken over": found["takeovers"],
         "stopped, replaced and woken": found["pauses"], "twice or forgotten": 0},
    )  # fmt: skip


def test_the_rounds_that_are_left_do_the_replacements_that_are_left(tmp_path: Path) -> None:
    plan = Plan(bot="", kills=3, work=str(tmp_path), market=lambda seed: (), takeovers=1, pauses=1)
    before = Round(kills=3, pauses=1)
    kills, _ = _kills_of_round(plan, before, 3, [])
    assert kills > 0, "what is replaced is replaced in the place of a kill"
    with Zygote() as zygote:
        one = OneRound(plan, 1, zygote, tmp_path / "round", "word", None)
    one.before = before
    for one.found.lives in range(1, 20):
        assert one._relay_due(kills) in ("", "kill"), "as many were stopped as were to be"
    one.found.lives = 2
    assert one._relay_due(kills) == "kill"
    one.found.takeovers = 1
    assert one._relay_due(kills) == ""


def test_a_folder_has_no_second_process_to_take_it_over(capfd: pytest.CaptureFixture[str]) -> None:
    from holdfast.cli import main

    assert main(["torture", str(BOT), "--pauses", "1"]) == 2
    assert "a store that processes share" in capfd.readouterr().err


def test_how_a_bot_ended_may_be_asked_again_and_one_that_ended_meanwhile_is_not_waited_for(tmp_path: Path) -> None:
    with Zygote() as zygote:
        words = {"witness": str(tmp_path / "witness"), "log": str(tmp_path / "log")}
        first = zygote.start(["run", str(tmp_path / "no-such-bot.py")], **words)
        assert [zygote.ended(30.0), zygote.ended(0.0), zygote.kill(first)] == [2, 2, 2]
        second = zygote.start(["demo", "--no-such-option"], **words)
        assert second != first
        assert zygote.ended(30.0) == 2


def test_a_run_killed_100_times_ends_as_one_that_was_never_killed(record_property: Note) -> None:
    # 66 numbered steps (all of opening and recovery, and the calls of a commit of each phase) and 34 random instants.
    code, found = torture("--every-step", "--kills", "34", "--seed", "5", "--minutes", "1000")
    record_property(
        "proof:kills",
        {
            "SIGKILLs": found["kills"],
            "recoveries": found["recoveries"],
            "commits acknowledged": found["commits"],
            "lost": len(found["lost"]),
            "duplicated": len(found["duplicated"]),
        },
    )
    assert (found["lost"], found["duplicated"], found["broken"], found["differences"]) == ([], [], [], [])
    assert code == 0 and found["ok"] and found["identical"]
    assert found["kills"] >= 100
    assert found["recoveries"] >= 30
    assert found["trades"] >= 20, "a run without trades proves nothing"
    assert {"recovering", "opening", "closing"} <= set(found["during"]), found["during"]


def test_on_a_market_that_does_not_wait_the_trades_are_those_of_the_pure_step(record_property: Note) -> None:
    """Over the same candles, with entries forbidden in the outages that the killed run recorded."""
    code, found = torture("--kills", "15", "--seed", "2", "--minutes", "1000", "--speed", "9000")
    record_property("proof:kills", {"SIGKILLs": found["kills"], "commits acknowledged": found["commits"], "lost": 0})
    assert (found["lost"], found["duplicated"], found["broken"], found["differences"]) == ([], [], [], [])
    assert code == 0 and found["identical"]
    assert found["kills"] >= 5
    assert found["trades"] >= 10


@pytest.mark.parametrize("name", [name for name in STORES if name != "file"])
def test_on_a_server_a_run_killed_20_times_whose_server_is_killed_too_ends_as_one_that_was_never_killed(
    name: str, record_property: Note
) -> None:
    """The server is killed under the bot, which goes on by itself when it is back."""
    server = STORES[name].server
    if server:
        require(server)
    kills_of_server = 3 if server else 0
    found = tortured(name, "--kills", "20", "--server-kills", str(kills_of_server), "--seed", "5", "--minutes", "600")
    record_property(
        f"proof:kills on {name}",
        {
            "SIGKILLs of the bot": found["kills"],
            "of the server": found["server_kills"],
            "commits acknowledged": found["commits"],
            "lost": len(found["lost"]),
        },
    )
    assert (found["lost"], found["duplicated"], found["broken"], found["differences"]) == ([], [], [], [])
    assert found["ok"] and found["identical"] and found["kept"] == []
    assert found["kills"] >= 20 and found["server_kills"] >= kills_of_server
    assert found["recoveries"] >= 8
    assert found["trades"] >= 10, "a run without trades proves nothing"


def tortured(name: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).parent / "torture_servers.py"), name, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_password_in_the_url_is_seen_in_no_command_line_and_in_no_file(tmp_path: Path) -> None:
    require("postgres")
    command = [sys.executable, str(Path(__file__).parent / "torture_servers.py"), "postgres", "--kills", "3"]
    words = ["--minutes", "200", "--symbols", "BTCUSDT", "--resume", str(tmp_path)]
    seen: set[str] = set()
    looks = 0
    with subprocess.Popen([*command, *words], stdout=subprocess.PIPE, text=True) as running:
        family = {running.pid}
        while running.poll() is None:
            looks += 1
            seen.update(line for line in command_lines(family) if PASSWORD in line)
            for folder, _, names in os.walk(tmp_path):  # which says nothing of a folder that is gone by now
                seen.update(name for name in names if PASSWORD in said(Path(folder, name)))
        assert running.stdout is not None
        output = running.stdout.read()
    assert json.loads(output)["ok"], output
    assert PASSWORD not in output
    assert seen == set()
    assert looks > 3
    assert len(family) > 5, "the server, the bot and its lives were among them"


def command_lines(family: set[int]) -> Iterator[str]:
    """Yield those of a process and all that it ever started; other tests have processes of their own."""
    for pid in sorted(int(entry.name) for entry in Path("/proc").glob("[0-9]*")):
        parent = said(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[1:2]
        if parent and int(parent[0]) in family:
            family.add(pid)
        if pid in family:
            yield said(Path(f"/proc/{pid}/cmdline"))


def said(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # gone meanwhile, or a directory
        return ""


def test_copies_and_wrappers_are_tortured_by_their_name_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_KEYS", "test=" + base64.b64encode(bytes(range(32))).decode())
    store = f"encrypted+sqlite:{tmp_path}/one.db file:{tmp_path}/two"
    words = ("--seed", "3", "--minutes", "200", "--symbols", "BTCUSDT", "--kills", "4")
    code, found = torture("--store", store, *words)
    assert (code, found["lost"], found["broken"]) == (0, [], [])
    assert (found["kills"], found["differences"], found["kept"]) == (4, [], [])
    assert list(tmp_path.iterdir()) == []


def test_torture_goes_on_where_it_stopped(tmp_path: Path) -> None:
    arguments = ("--seed", "3", "--minutes", "200", "--symbols", "BTCUSDT", "--resume", str(tmp_path))
    code, first = torture("--kills", "3", *arguments)
    assert (code, first["kills"], first["broken"]) == (0, 3, [])
    code, second = torture("--kills", "5", *arguments)
    assert (code, second["kills"], second["broken"]) == (0, 5, [])
    assert second["commits"] > first["commits"]


def test_every_numbered_step_is_named() -> None:
    steps = numbered_steps()
    assert steps[:2] == ["1", "2"]
    assert len(steps) > FIRST_STEPS + len(PHASES)
    assert "closing:2" in steps


async def test_the_witness_finds_what_is_lost(tmp_path: Path) -> None:
    backend = FileBackend(tmp_path / "data")
    await backend.open()
    with (tmp_path / "lines").open("ab", buffering=0) as lines:
        watched = Reporting(backend, Reporter(lines.fileno()))
        await watched.commit("main", {KEY: b"{}"}, {}, op=Op("w", 1))
        await watched.commit("main", {KEY: b"[]"}, {}, op=Op("w", 2))
    witness = Witness(tmp_path / "lines")
    witness.read()
    assert (witness.acknowledged, await witness.losses(backend)) == (2, [])
    await backend.close()
    other = FileBackend(tmp_path / "other")
    await other.open()
    await other.commit("main", {KEY: b"{}"}, {}, op=Op("w", 1))
    losses = await witness.losses(other)
    await other.close()
    assert len(losses) == 2
    assert "commit 2 was acknowledged, the scope stands at 1" in losses[0]


@pytest.mark.parametrize("bad", ["x", "opening:", "opening:x", "-1"])
def test_a_malformed_step_is_refused(bad: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="PHASE:N"):
        watched_backend(str(tmp_path), witness_fd=None, kill_at=bad)


# -- places of its own -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "memory"])
async def test_a_place_of_its_own_lies_beside_the_users_and_is_removed_alone(name: str, tmp_path: Path) -> None:
    url = URLS[name](tmp_path)
    own, other = derived(url, "torture1_0_killed"), derived(url, "torture1_0_killed2")
    users = open_backend(url)
    await users.open()
    await users.commit("main", {KEY: b"1"}, {}, op=Op("user", 1))
    for place in (own, other):
        backend = place.backend()
        await backend.open()
        await backend.commit("main", {KEY: b"2"}, {}, op=Op("torture", 1))
        await backend.commit("apart", {KEY._replace(entity_id="X"): b"3"}, {}, op=Op("torture", 1))
        await backend.close()
    await asyncio.to_thread(own.remove)
    await asyncio.to_thread(own.remove)  # repeatable: a round that was cut short removes what may not be there
    assert [await found(place.store) for place in (own, other)] == [{}, {"main": 1, "apart": 1}]
    assert (await users.read("main", [KEY]))[KEY].payload == b"1"
    await users.close()
    await asyncio.to_thread(other.remove)
    assert await found(other.store) == {}


async def found(url: str) -> dict[str, int]:
    """Return each scope's number of a store, which is not made by looking."""
    backend = open_backend(url)
    try:
        await backend.open(read_only=True)
        return {scope: (await backend.head(scope)).number async for scope in backend.scopes()}
    except NotFoundError:
        return {}
    finally:
        await backend.close()


@pytest.mark.parametrize(
    ("store", "own"),
    [
        ("./dump/data", "./dump/data-t1"),
        ("file:///srv/a%20b/", "file:///srv/a%20b-t1"),
        ("sqlite:bot.db", "sqlite:bot.db-t1"),
        ("redis://u:p@h:1/0?prefix=bot&replicas=1", "redis://u:p@h:1/0?replicas=1&prefix=bot_t1"),
        ("rediss+sentinel://h:1/s", "rediss+sentinel://h:1/s?prefix=holdfast_t1"),
        ("postgresql://h/b?schema=" + "x" * 63, "postgresql://h/b?schema=" + "x" * 60 + "_t1"),
        ("retrying+traced+redis://h", "traced+retrying+redis://h?prefix=holdfast_t1"),
        ("redis://h file:copy quorum=2", "redis://h?prefix=holdfast_t1 file:copy-t1 quorum=2"),
    ],
)
def test_each_place_in_a_stores_name_gets_its_own(store: str, own: str) -> None:
    assert derived(store, "t1").store == own


def test_what_does_not_outlive_a_process_cannot_be_tortured() -> None:
    with pytest.raises(InvalidInputError, match="cannot be tortured"):
        derived("memory:", "t1")


@pytest.mark.parametrize(
    ("store", "path"),
    [("a/b", "a/b"), ("file:a", "a"), ("file:///a%20b", "/a b"), ("sqlite:a", None), ("retrying+file:a", None)],
)
def test_only_a_bare_file_store_has_file_system_calls_for_steps(store: str, path: str | None) -> None:
    assert file_path(store) == path


# -- steps of a backend ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "stored", "told"),
    [(2, None, b""), (3, None, b"opened\n"), (4, 1, b"opened\n"), (7, 1, b"opened\ncommitted\n")],
)
async def test_a_process_dies_before_a_call_is_sent_or_after_its_answer(
    step: int, stored: int | None, told: bytes, tmp_path: Path
) -> None:
    """1 and 2 are the sides of open, 3 and 4 those of the commit, 5 and 6 those of the read, 7 is before close."""
    store = f"sqlite:{tmp_path / 'store.db'}"
    code = (
        "import asyncio, sys\n"
        "from holdfast.contract import Key, Op\n"
        "from holdfast.testing.killer import KillerBackend\n"
        "from holdfast.urls import open_backend\n"
        "async def run():\n"
        "    backend = KillerBackend(open_backend(sys.argv[1]), int(sys.argv[2]))\n"
        "    await backend.open()\n"
        "    print('opened', flush=True)\n"
        "    await backend.commit('main', {Key('signal', 'a', 'b'): b'1'}, {}, op=Op('w', 1))\n"
        "    print('committed', flush=True)\n"
        "    await backend.read('main', [Key('signal', 'a', 'b')])\n"
        "    await backend.close()\n"
        "asyncio.run(run())\n"
    )
    command = [sys.executable, "-c", code, store, str(step)]
    done = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert (await done.communicate())[0] == told
    assert done.returncode == -signal.SIGKILL
    assert (await found(store)).get("main") == stored


def test_what_was_asked_and_not_reached_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(bot="bot.py", kills=6, takeovers=1, pauses=2, work="", market=lambda seed: ())
    _print(Round(kills=3, takeovers=1), plan, plain=True)
    told = capsys.readouterr().out
    assert "3 of 6" in told
    assert "0 of 2" in told
    assert "1 of 1" not in told
