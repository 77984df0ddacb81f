"""``holdfast run`` as users start it: processes, terminals, interrupts, kills."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from holdfast.brokers.paper_venue import VenueProcess
from holdfast.cli import tables
from holdfast.market.process import MarketProcess

ROOT = Path(__file__).parents[1]
BOT = str(ROOT / "examples" / "bot.py")
ORDERS_BOT = str(ROOT / "examples" / "orders_bot.py")
REAL = Path(os.environ.get("HOLDFAST_CANDLES") or ROOT.parent / "shared" / "data")
LIMIT_SECONDS = 60
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "error", "COLUMNS": "150", "LINES": "50", "TERM": "xterm"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "holdfast.cli", *arguments]


def said(stderr: str) -> str:
    """Standard error without what a store says of the file system that the tests happen to run on."""
    return "".join(line for line in stderr.splitlines(keepends=True) if " lies on " not in line)


def holdfast(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    done.stderr = said(done.stderr)
    return done


@contextmanager
def started(*arguments: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A run in the background; ended for certain when the block ends."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def stored(folder: Path) -> dict[str, Any]:
    done = holdfast("show", "--json", "--trades", "100000", folder=folder)
    assert done.returncode == 0, done.stderr
    picture: dict[str, Any] = json.loads(done.stdout)
    return picture


def what_was_decided(folder: Path) -> dict[str, Any]:
    """What must not depend on when a process was killed: everything but commit numbers and owners."""
    picture = stored(folder)
    return {
        "trades": picture["trades"],
        "risk": picture["risk"],
        "contexts": [
            {name: context[name] for name in ("symbol", "events", "open", "scheduled", "levels")}
            for context in picture["contexts"]
        ],
    }


def test_a_run_on_the_synthetic_market_tells_each_event_and_ends_with_the_market(tmp_path: Path) -> None:
    done = holdfast("run", BOT, "--market", "synthetic:7", "--speed", "wait", "--minutes", "200", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines, last = done.stdout.splitlines()
    assert first.startswith("4 contexts, synthetic market, seed 7, wait 4, store file:")
    assert all(line.startswith("2024-01-01 0") and "  replay/" in line for line in lines)
    assert {"activated", "scheduled", "closed"} <= {line.split("  ")[2].split()[0] for line in lines}
    assert "commits" in last
    assert holdfast("check", folder=tmp_path).returncode == 0
    assert len(stored(tmp_path)["trades"]) == sum("  closed " in line for line in lines)


def test_the_bot_with_orders_trades_at_its_venue_what_its_sizing_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    market = ("--synthetic", "7", "--symbols", "BTCUSDT,ETHUSDT", "--wait", "2", "--minutes", "300")
    with MarketProcess(market) as paper, VenueProcess() as venue:
        monkeypatch.setitem(ENVIRONMENT, "PAPER_MARKET", paper.address)
        monkeypatch.setitem(ENVIRONMENT, "PAPER_VENUE", venue.address)
        done = holdfast("run", ORDERS_BOT, folder=tmp_path)
        books = venue.witness()
    assert (done.returncode, done.stderr) == (0, "")
    picture = stored(tmp_path)
    entries = [order for order in books.orders if not order.reduce_only]
    assert len(entries) >= 4
    assert len(books.orders) == len(entries) + len(picture["trades"]), "each trade was closed at the venue"
    opened = [context["open"] for context in picture["contexts"] if context["open"]]
    assert {(one.symbol, one.side, one.quantity) for one in books.positions} == {
        (one["symbol"], one["position"], one["quantity"]) for one in opened
    }
    for one in opened:
        loss = one["quantity"] * abs(one["priceOpen"] - one["priceStopLoss"])
        assert loss == pytest.approx(100, rel=0.01), "1 % of the account, at its stop"
    assert holdfast("check", folder=tmp_path).returncode == 0


def test_that_a_market_takes_the_place_of_the_broker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "PAPER_MARKET", "tcp://127.0.0.1:9")
    monkeypatch.setitem(ENVIRONMENT, "PAPER_VENUE", "tcp://127.0.0.1:9")
    market = ("--market", "synthetic:7", "--speed", "wait", "--minutes", "20")
    done = holdfast("run", ORDERS_BOT, *market, folder=tmp_path)
    assert done.returncode == 0
    assert "no orders are sent" in done.stderr
    assert holdfast("run", BOT, *market, "--store", "memory:", folder=tmp_path).stderr == ""


def test_json_output_is_one_object_a_line_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    arguments = ("run", BOT, "--market", "synthetic:3", "--speed", "wait", "--minutes", "60", "--json")
    runs = [holdfast(*arguments, "--store", name, folder=tmp_path) for name in ("one", "memory:")]
    assert [done.returncode for done in runs] == [0, 0]
    events, again = ([json.loads(line) for line in done.stdout.splitlines()[:-1]] for done in runs)
    assert json.loads(runs[0].stdout.splitlines()[-1])["summary"]["contexts"] == 4

    def by_id(told: list[dict[str, Any]]) -> dict[str, Any]:
        return {one["event"]["id"]: one["event"] for one in told}

    assert len(events) > 5
    assert by_id(events) == by_id(again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_a_run_killed_again_and_again_ends_as_one_that_was_never_killed(tmp_path: Path) -> None:
    market = ["--synthetic", "11", "--wait", "4", "--minutes", "240"]
    kills = 0
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        with MarketProcess(market) as server:
            arguments = ("run", BOT, "--market", server.address, "--plain")
            if name == "whole":
                assert holdfast(*arguments, folder=tmp_path / name).returncode == 0
                continue
            for lines in (2, 9, 1, 25):
                with started(*arguments, folder=tmp_path / name) as bot:
                    assert bot.stdout is not None
                    for _ in range(lines):
                        bot.stdout.readline()
                    assert bot.poll() is None
                    bot.kill()
                    kills += 1
                assert holdfast("check", folder=tmp_path / name).returncode == 0
            assert holdfast(*arguments, folder=tmp_path / name).returncode == 0
    assert kills == 4
    whole = what_was_decided(tmp_path / "whole")
    assert len(whole["trades"]) > 3
    assert what_was_decided(tmp_path / "killed") == whole


def test_a_bot_started_again_goes_on_where_its_paper_market_was(tmp_path: Path) -> None:
    def run(store: str, minutes: str) -> subprocess.CompletedProcess[str]:
        arguments = ("--market", "synthetic:7", "--speed", "wait", "--minutes", minutes, "--store", store)
        return holdfast("run", BOT, *arguments, folder=tmp_path)

    def trades(store: str) -> list[dict[str, Any]]:
        done = holdfast("show", store, "--json", "--trades", "100000", folder=tmp_path)
        return list(json.loads(done.stdout)["trades"])

    first, again, whole = run("parts", "150"), run("parts", "100"), run("whole", "250")
    assert [done.returncode for done in (first, again, whole)] == [0, 0, 0]
    assert " from " not in first.stdout.splitlines()[0]
    assert ", from 2024-01-01 02:" in again.stdout.splitlines()[0]
    assert again.stdout.splitlines()[1] > first.stdout.splitlines()[-2][:16]  # it goes on, and never back
    parts = trades("parts")
    assert len(parts) > 2
    assert parts == trades("whole")[: len(parts)]


def test_candles_that_end_before_what_the_store_has_decided_are_refused(tmp_path: Path) -> None:
    candles = tmp_path / "BTCUSDT-1m.csv"
    candles.write_text("".join(f"{1_600_000_020_000 + n * 60_000},1,2,1,1,1\n" for n in range(200)))
    arguments = ("run", BOT, "--symbols", "BTCUSDT", "--speed", "wait", "--minutes", "60")
    assert holdfast(*arguments, "--market", "synthetic:7", folder=tmp_path).returncode == 0
    done = holdfast(*arguments, "--market", str(candles), folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("holdfast: the store has decided up to 2024-01-01 0")
    assert "give later candles, or another --store" in done.stderr


def test_a_disk_that_stays_full_is_said_once_for_each_context_and_by_the_exit_code(tmp_path: Path) -> None:
    arguments = ("run", BOT, "--market", "synthetic:7", "--speed", "wait", "--minutes", "300")
    limited = ["bash", "-c", 'ulimit -f 32 && exec "$@"', "bash", *command(*arguments)]
    done = subprocess.run(
        limited, cwd=tmp_path, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    told = [line for line in done.stderr.splitlines() if line.startswith("holdfast: store, replay/")]
    assert told
    assert all("nothing was written" in line and "raise the file size limit" in line for line in told)
    first = [line for line in told if not line.endswith(" more times)")]
    assert len(first) == len(set(first)) <= 4
    assert holdfast("check", folder=tmp_path).returncode == 0
    assert holdfast(*arguments, folder=tmp_path).returncode == 0, "with space again, the next run goes on"


def test_beside_a_running_bot_others_may_look_but_not_run(tmp_path: Path) -> None:
    with started("run", BOT, "--market", "synthetic:7", "--speed", "6000", folder=tmp_path) as bot:
        assert bot.stdout is not None
        while "  scheduled" not in bot.stdout.readline():
            assert bot.poll() is None
        second = holdfast("run", BOT, "--market", "synthetic:7", folder=tmp_path)
        assert second.returncode == 3
        assert second.stderr.startswith("holdfast: ")
        assert str(bot.pid) in second.stderr
        assert "Traceback" not in second.stderr
        assert len(stored(tmp_path)["contexts"]) == 4
        checked = holdfast("check", folder=tmp_path)
        assert (checked.returncode, checked.stderr) == (0, ""), checked.stdout
        bot.send_signal(signal.SIGINT)
        rest, errors = bot.communicate(timeout=LIMIT_SECONDS)
    assert (bot.returncode, said(errors)) == (0, "")
    assert "commits" in rest.splitlines()[-1]
    assert holdfast("check", folder=tmp_path).returncode == 0


def test_a_run_goes_on_when_nobody_reads_it_any_more(tmp_path: Path) -> None:
    market = ("--market", "synthetic:7", "--speed", "wait", "--minutes", "100")
    with started("run", BOT, *market, folder=tmp_path) as bot:
        assert bot.stdout is not None and bot.stderr is not None
        bot.stdout.readline()
        bot.stdout.close()
        assert said(bot.stderr.read()).splitlines() == [
            "holdfast: nobody reads standard output any more; the run goes on without it"
        ]
        assert bot.wait(LIMIT_SECONDS) == 0
        bot.stdout = None
    assert stored(tmp_path)["trades"]


def test_a_second_interrupt_ends_a_run_at_once(tmp_path: Path) -> None:
    bot_file = tmp_path / "bot.py"
    bot_file.write_text(
        "import asyncio\n"
        "from holdfast import add_strategy, listen_signal\n"
        "@listen_signal\n"
        "async def hold(news):\n"
        "    try:\n"
        "        print('listening', flush=True)\n"
        "        await asyncio.sleep(3600)\n"
        "    except asyncio.CancelledError:\n"
        "        print('holding on', flush=True)\n"
        "        await asyncio.sleep(3600)\n"
        "@add_strategy(strategy_name='s', interval='1m')\n"
        "def never(symbol, when_ms):\n"
        "    return None\n"
    )
    with started("run", "bot.py", "--market", "synthetic:1", "--symbols", "A", folder=tmp_path) as bot:
        assert bot.stdout is not None
        while "listening" not in bot.stdout.readline():
            assert bot.poll() is None
        bot.send_signal(signal.SIGINT)
        while "holding on" not in bot.stdout.readline():
            assert bot.poll() is None
        bot.send_signal(signal.SIGINT)
        bot.communicate(timeout=LIMIT_SECONDS)
    assert bot.returncode == 130


def test_on_a_terminal_a_live_table_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    ours, theirs = pty.openpty()
    arguments = command("run", BOT, "--market", "synthetic:7", "--speed", "wait", "--minutes", "90")
    with subprocess.Popen(arguments, cwd=tmp_path, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs) as bot:
        os.close(theirs)
        screen = b""
        try:
            while select.select([ours], [], [], LIMIT_SECONDS)[0]:
                screen += os.read(ours, 65536)
        except OSError:
            pass  # the other side is closed: the run has ended
        finally:
            os.close(ours)
    text = screen.decode()
    assert bot.returncode == 0, text
    for piece in ("context", "open signal", "swing", "commits", "\x1b["):
        assert piece in text
    assert "Traceback" not in text


def test_without_rich_or_a_terminal_output_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert tables.fancy() == (importlib.util.find_spec("rich") is not None)
    assert not tables.fancy(plain=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not tables.fancy()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.py"], "there is no file nowhere.py"),
        (["run", BOT], "adds no exchange"),
        (["run", BOT, "--market", "nowhere.csv"], "nowhere.csv: cannot be read"),
        (["run", BOT, "--market", "synthetic:7", "--minutes", "0"], "--minutes is 0"),
        (["run", BOT, "--market", "synthetic:7", "--speed", "0"], "speed is 0.0"),
        (["run", BOT, "--market", "synthetic:7", "--store", "redish://x"], "names no store"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = holdfast(*arguments, folder=tmp_path)
    assert message in done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


@pytest.mark.parametrize("arguments", [("--market", "tcp://127.0.0.1:9"), ("--market", "synthetic:7", "--store", BOT)])
def test_a_market_or_a_store_that_cannot_be_used_is_one_line_and_exit_3(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = holdfast("run", BOT, *arguments, folder=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr


@pytest.mark.candles
def test_a_bot_runs_on_real_candles_with_their_gaps(tmp_path: Path) -> None:
    found = sorted(REAL.glob("ALTBTC-1m*.csv.gz"))
    if not found:
        pytest.skip("needs the real candle file ALTBTC-1m….csv.gz, which is not here")
    market = ("--market", str(found[0]), "--speed", "wait", "--minutes", "600")
    done = holdfast("run", BOT, *market, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "recorded market (ALTBTC), wait 1" in done.stdout
    assert holdfast("check", folder=tmp_path).returncode == 0


def test_each_mistake_of_a_strategy_is_told_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(
        "from holdfast import add_strategy\n"
        "@add_strategy(strategy_name='s', interval='1m')\n"
        "def broken(symbol, when_ms):\n"
        "    return {'position': 'up'} if when_ms // 60_000 % 2 else 1 / 0\n"
    )
    market = ("--market", "synthetic:1", "--symbols", "A", "--speed", "wait", "--minutes", "3")
    done = holdfast("run", "bot.py", *market, folder=tmp_path)
    assert done.returncode == 0
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert "the signal was refused" in done.stderr
    assert "Traceback" not in done.stderr
