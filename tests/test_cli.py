"""The command line in this process: loading a user's file, what to run, show and check."""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.backends.disk import OsDisk
from holdfast.backends.file import FileBackend
from holdfast.cli import _COMMANDS as COMMANDS
from holdfast.cli import main
from holdfast.cli.loading import UserFileError, load_bot
from holdfast.cli.plan import make_plan
from holdfast.cli.screen import Board, PlainScreen, describe, draw, sentence
from holdfast.cli.tables import print_table
from holdfast.contract import Key, Survives
from holdfast.domains import context_key, event_key, guard_key, ledger_key, risk_key
from holdfast.engine import registry
from holdfast.engine.listeners import Failure, Tick
from holdfast.engine.registry import Registry
from holdfast.errors import InvalidInputError, UnavailableError
from holdfast.names import Context
from holdfast.rows import (
    Event,
    Guard,
    Levels,
    PartialLevels,
    RiskPosition,
    Row,
    ScheduledSignal,
    SessionRow,
    Signal,
    Trade,
)
from holdfast.store import Store

T0 = 1_704_067_200_000
BTC = Context("paper", "BTC/USDT", "my_strategy")
ETH = Context("paper", "ETHUSDT", "my_strategy")


def signal(context: Context, kind: type[Signal] = Signal) -> Signal:
    return kind(
        id=f"id-{context.symbol}",
        position="long",
        price_open=43000.5,
        price_take_profit=44000.0,
        price_stop_loss=42000.0,
        minute_estimated_time=90,
        symbol=context.symbol,
        exchange_name=context.exchange_name,
        strategy_name=context.strategy_name,
        scheduled_at=T0,
        pending_at=T0,
    )


def event(context: Context, number: int, **more: Any) -> Event:
    fields: dict[str, Any] = {
        "id": f"{context}#{number}",
        "number": number,
        "kind": "opened",
        "at_ms": T0 + 60_000,
        "candle_ms": T0,
        "signal": signal(context),
        "price": 43000.5,
    }
    return Event(**{**fields, **more})


def rows() -> dict[Key, Row]:
    """One context with an open position, a slot, levels and an undelivered event; one that waits."""
    slot = RiskPosition(
        strategy_name=BTC.strategy_name,
        exchange_name=BTC.exchange_name,
        symbol=BTC.symbol,
        open_timestamp=T0,
        signal_id="id-BTC/USDT",
        position="long",
    )
    return {
        context_key("session", BTC): SessionRow(
            context=(BTC.exchange_name, BTC.symbol, BTC.strategy_name),
            last_candle_ms=T0,
            last_event=1,
            risk_names=("two-at-once",),
        ),
        context_key("signal", BTC): signal(BTC),
        context_key("partial", BTC): PartialLevels(levels={"id-BTC/USDT": Levels(profit_levels=(10, 20))}),
        risk_key("two-at-once", BTC): slot,
        guard_key("two-at-once"): Guard(changes=1),
        event_key(BTC, 1): event(BTC, 1),
        context_key("session", ETH): SessionRow(
            context=(ETH.exchange_name, ETH.symbol, ETH.strategy_name), last_candle_ms=T0
        ),
        context_key("schedule", ETH): signal(ETH, ScheduledSignal),
    }


def trade() -> Trade:
    return Trade(
        id="old",
        event_id=f"{ETH}#9",
        symbol=ETH.symbol,
        exchange_name=ETH.exchange_name,
        strategy_name=ETH.strategy_name,
        position="short",
        price_open=2300.0,
        price_close=2250.0,
        price_take_profit=2250.0,
        price_stop_loss=2350.0,
        scheduled_at=T0,
        pending_at=T0,
        closed_at=T0,
        reason="take_profit",
        pnl_percent=1.7,
    )


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Store]:
    """A store that is open for writing, as a running bot has it."""
    store = Store(FileBackend(folder), require=Survives.NOTHING)
    await store.open()
    try:
        writer = store.writer("test")
        await writer.commit(rows())
        await writer.commit({ledger_key(ETH, "old"): trade()})
        yield store
    finally:
        await store.close()


async def command(*arguments: str) -> int:
    """Run a command as another process would: outside of this event loop."""
    import asyncio

    return await asyncio.to_thread(main, arguments)


async def test_show_tells_everything_beside_a_running_bot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running(tmp_path / "data"):
        assert await command("show", str(tmp_path / "data"), "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert await command("show", str(tmp_path / "data")) == 0
        text = capsys.readouterr().out
    btc, eth = told["contexts"]
    assert (btc["symbol"], btc["strategy"], btc["exchange"]) == ("BTC/USDT", "my_strategy", "paper")
    assert btc["open"]["priceOpen"] == 43000.5
    assert btc["levels"]["id-BTC/USDT"]["profitLevels"] == [10, 20]
    assert (btc["undelivered"], btc["scheduled"], eth["open"]) == (1, None, None)
    assert eth["scheduled"]["_isScheduled"] is True
    assert [slot["signalId"] for slot in told["risk"]["two-at-once"]] == ["id-BTC/USDT"]
    assert [one["id"] for one in told["undelivered"]] == [f"{BTC}#1"]
    assert [one["pnlPercent"] for one in told["trades"]] == [1.7]
    assert (told["tradesInAll"], told["quarantine"], told["damaged"]) == (1, [], [])
    for piece in (str(BTC), "long 43000.5 → 44000 | 42000", "+10 +20", "two-at-once", "+1.70 %", "Quarantine: none"):
        assert piece in text


async def test_check_passes_a_sound_store_and_fails_on_a_broken_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "data")
    async with running(tmp_path / "data") as store:
        assert await command("check", folder, "--json") == 0
        verdict = json.loads(capsys.readouterr().out)
        assert (verdict["ok"], verdict["findings"], verdict["rows"]) == (True, [], len(rows()) + 1)
        await store.writer("vandal").commit({context_key("signal", BTC): None})
        assert await command("check", folder) == 1
        text = capsys.readouterr().out
        assert "two-at-once" in text
        assert await command("check", folder, "--json") == 1
        assert not json.loads(capsys.readouterr().out)["ok"]


def test_a_warning_that_comes_again_and_again_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from holdfast.cli import check

    def noisy(options: object) -> int:
        for _ in range(3):
            logging.getLogger("holdfast").warning("%s lies in memory", "it")
        return 0

    monkeypatch.setattr(check, "_check", noisy)
    assert main(["check"]) == 0
    assert capsys.readouterr().err == "holdfast: it lies in memory\n"


async def test_doctor_tells_what_is_promised_beside_a_running_bot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OsDisk, "filesystem", lambda *_: "ext4")  # whatever the tests run on
    async with running(tmp_path):
        assert await command("doctor", str(tmp_path)) == 0
        told = capsys.readouterr().out
        assert "a power cut of the machine" in told
        assert "read from the medium" in told
        assert await command("doctor", str(tmp_path), "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["survives"], told["atomic"], told["shared"]) == ("HOST", True, False)
    assert await command("doctor", "memory:") == 1
    assert "warning: memory keeps nothing" in capsys.readouterr().out


async def test_quarantined_bytes_are_shown_and_fail_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "data")
    async with running(tmp_path / "data") as store:
        await store.quarantine(context_key("schedule", ETH), "it says that it is of another exchange")
    assert await command("show", folder, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["reason"] for one in told["quarantine"]] == ["it says that it is of another exchange"]
    assert await command("check", folder) == 1
    assert "quarantined" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["show", "check"])
@pytest.mark.parametrize("where", ["nowhere", "file:nowhere", "redish://x"])
def test_a_store_that_is_not_there_is_one_line_and_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([name, where]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("holdfast: ")
    assert told.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Give arguments that make no sense; return the one line that is said of them."""
    assert main(arguments) == 2, arguments
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1), told
    return told.err


@pytest.mark.parametrize(
    ("arguments", "what", "where"),
    [
        ([], "COMMAND", "holdfast --help"),
        (["fly"], "'fly'", "holdfast --help"),
        (["--", "show"], "'--'", "holdfast --help"),
        (["--fly", "show"], "--fly", "holdfast show --help"),
        (["show", "here", "there"], "there", "holdfast show --help"),
        (["run"], "BOT.py", "holdfast run --help"),
        (["run", "bot.py", "--st", "x"], "--strategy, --store", "holdfast run --help"),
        (["run", "bot.py", "--on-conflict", "win"], "'win' (choose from 'refuse'", "holdfast run --help"),
        (["run", "bot.py", "--lease", "a\nb"], "'a\\nb' is no lease: give 0.5", "holdfast run --help"),
        (["run", "bot.py", "a\nb"], "a\\nb", "holdfast run --help"),
        (["torture", "bot.py", "--kills", "1e3"], "--kills: '1e3' is no whole number", "holdfast torture --help"),
        (["adopt", "a/b/c", "--open", "43,5"], "--open: '43,5' is no number", "holdfast adopt --help"),
    ],
)
def test_arguments_that_make_no_sense_are_one_line_that_names_them_and_where_to_look(
    arguments: list[str], what: str, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said(arguments, capsys)
    assert what in line
    assert line.endswith(f"; see {where}\n")


@pytest.mark.parametrize(
    ("program", "arguments", "what"),
    [
        ("market.serve", ["--synthetic", "many"], "--synthetic: 'many' is no whole number"),
        ("brokers.paper_venue", ["--fly"], "--fly"),
        ("testing.histories.__main__", [], "STORE"),
        ("testing.simulation.__main__", ["--seeds", "1e6"], "--seeds: '1e6' is no whole number"),
    ],
)
def test_so_they_are_at_each_program_beside_the_command(
    program: str, arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        importlib.import_module(f"holdfast.{program}").main(arguments)
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1), told
    assert what in told.err
    assert told.err.endswith(f"; see python -m holdfast.{program.removesuffix('.__main__')} --help\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_without_its_value_is_one_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said([command, "--fly"], capsys).endswith(f"; see holdfast {command} --help\n")
    assert main([command, "--help"]) == 0
    described = capsys.readouterr().out.partition("\noptions:")[2]
    options = set(re.findall(r"^  (--[a-z-]+) [A-Z{]", described, re.MULTILINE))
    assert len(options) >= LEAST_OPTIONS.get(command, 0)
    for option in options:
        line = said([command, option], capsys)
        assert line == f"holdfast {command}: argument {option}: expected one argument; see holdfast {command} --help\n"


LEAST_OPTIONS = {"run": 10, "adopt": 12, "torture": 10}
"""How many of theirs take a value."""


def test_help_lists_every_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("run", "show", "check", "torture", "Exit codes"):
        assert name in text


@pytest.fixture
def clean() -> Iterator[None]:
    """The user's file adds to the process's registry and modules."""
    paths, modules = list(sys.path), set(sys.modules)
    registry.reset()
    yield
    registry.reset()
    sys.path[:] = paths
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.mark.usefixtures("clean")
def test_a_users_file_is_an_ordinary_module_that_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "bot_neighbour_of_test.py").write_text("NAME = 'from a neighbour'\n")
    (tmp_path / "bot.py").write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from bot_neighbour_of_test import NAME\n"
        "from holdfast.engine.registry import add_strategy\n"
        "@dataclasses.dataclass\n"
        "class Setting:\n"
        "    size: int = 3\n"
        "@add_strategy(strategy_name=NAME, interval='5m')\n"
        "def decide(symbol, when_ms):\n"
        "    return None\n"
        "assert __name__ != '__main__'\n"
    )
    module = load_bot(str(tmp_path / "bot.py"))
    assert module.Setting().size == 3
    assert [spec.strategy_name for spec in registry.list_strategies()] == ["from a neighbour"]


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("def f(:\n", "SyntaxError: invalid syntax"),
        ("def f():\n    return 1 / 0\nf()\n", "ZeroDivisionError: division by zero"),
        ("import json\njson.loads('{')\n", "json.decoder.JSONDecodeError: Expecting property name"),
        ("import no_such_module_at_all\n", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("raise SystemExit('no')\n", "SystemExit: no"),
        (
            "from holdfast import add_strategy\nadd_strategy(print, strategy_name='x', interval='7m')\n",
            "InvalidInputError: strategy 'x' has the interval '7m'",
        ),
    ],
)
def test_a_mistake_in_a_users_file_is_shown_as_its_own_lines_only(
    tmp_path: Path, text: str, ends: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bot.py"
    file.write_text(text)
    with pytest.raises(UserFileError) as caught:
        load_bot(str(file))
    lines = str(caught.value).splitlines()
    assert ends in lines[-1]
    frames = [line for line in lines if line.lstrip().startswith("File ")]
    assert frames
    assert all(str(file) in line for line in frames)
    registry.reset()
    assert main(["run", str(file)]) == 2
    assert ends in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "bot.py", "--store", ""), "--store is empty"),
        (("run", "bot.py", "--symbols", ","), "--symbols ',' names none"),
        (("show", ""), "the store's name is empty"),
        (("check", ""), "the store's name is empty"),
        (("show", "--trades", "-1"), "--trades is -1: at least 0"),
    ],
)
def test_an_option_that_says_nothing_is_refused_and_not_replaced(
    arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"holdfast: {told}")


def test_names_cannot_move_the_cursor_of_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    context = Context("ex", "A\x1b[2J\u202eB\nC", "é")
    print_table("Contexts", ("context",), [[str(context)]], plain=True)
    PlainScreen(Board([context], "t"), json=False).show(event(context, 1))
    told = capsys.readouterr().out
    assert "\x1b" not in told and "\u202e" not in told
    assert told.count("ex/A\\x1b[2J\\u202eB\\nC/é") == 2


@pytest.mark.usefixtures("clean")
def test_a_strategy_that_fails_is_told_with_its_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text("def decide(symbol, when_ms):\n    return 1 / 0\n")
    module = load_bot(str(tmp_path / "bot.py"))
    with pytest.raises(ZeroDivisionError) as caught:
        module.decide("BTCUSDT", T0)
    told = describe(Failure(where="strategy", error=caught.value, context=BTC))
    assert told == "strategy, paper/BTC/USDT/my_strategy: ZeroDivisionError: division by zero (bot.py, line 2)"
    assert describe(Failure(where="live", error=UnavailableError("gone"))) == "live: UnavailableError: gone"


def _registry(**symbols: tuple[str, ...]) -> Registry:
    made = Registry()
    for name, own in symbols.items():
        made.add_strategy(lambda symbol, when_ms: None, strategy_name=name, interval="5m", symbols=own)
    return made


def test_a_plan_takes_each_strategys_own_symbols_or_those_of_the_market() -> None:
    made = _registry(a=("BTCUSDT", "ETHUSDT"), b=())
    plan = make_plan(made, market="synthetic:7", speed="wait", minutes=9)
    assert [tuple(one) for one in plan.contexts] == [
        ("replay", "BTCUSDT", "a"), ("replay", "ETHUSDT", "a"), ("replay", "BTCUSDT", "b"), ("replay", "ETHUSDT", "b"),
    ]  # fmt: skip
    assert plan.server == (
        "--synthetic", "7", "--symbols", "BTCUSDT,ETHUSDT", "--wait", "4", "--minutes", "9",
    )  # fmt: skip
    assert "synthetic market, seed 7" in plan.market
    only = make_plan(made, market="XRP=x.csv,dir/BTCUSDT-1m.csv.gz", strategies=["a"], exchange="e", speed="10")
    assert [tuple(one) for one in only.contexts] == [("e", "BTCUSDT", "a")]
    assert only.server == ("--candles", "XRP=x.csv,dir/BTCUSDT-1m.csv.gz", "--speed", "10")
    made.add_exchange(lambda *_: [], exchange_name="mine")
    assert make_plan(made, symbols=["X"]).contexts == (Context("mine", "X", "a"), Context("mine", "X", "b"))
    assert make_plan(made, market="synthetic:7").exchange_name == "mine"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "adds no exchange"),
        ({"market": "synthetic:x"}, "must be a whole number"),
        ({"market": "synthetic:1", "speed": "fast"}, "--speed is 'fast'"),
        ({"market": "BTCUSDT.csv", "symbols": ["ETHUSDT"]}, "the market has no ETHUSDT: it has BTCUSDT"),
        ({"strategies": ["z"], "market": "synthetic:1"}, "there is no strategy 'z'"),
        ({"market": "tcp://nowhere"}, "no market address"),
        ({"market": "tcp://127.0.0.1:1", "speed": "1"}, "its own speed"),
    ],
)
def test_a_plan_that_cannot_be_is_one_clear_error(more: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make_plan(_registry(a=("BTCUSDT",)), **more)
    with pytest.raises(InvalidInputError, match="adds no strategy"):
        make_plan(Registry(), market="synthetic:1")


def test_a_plan_without_a_market_needs_symbols_and_one_exchange() -> None:
    made = _registry(a=())
    made.add_exchange(lambda *_: [], exchange_name="one")
    with pytest.raises(InvalidInputError, match="names no symbols"):
        make_plan(made)
    with pytest.raises(InvalidInputError, match="--speed is for a replayed market"):
        make_plan(made, speed="3")
    made.add_exchange(lambda *_: [], exchange_name="two")
    with pytest.raises(InvalidInputError, match="choose one with --exchange"):
        make_plan(made, symbols=["X"])
    assert make_plan(made, symbols=["X"], exchange="two").contexts == (Context("two", "X", "a"),)


def test_each_kind_of_event_is_one_plain_sentence() -> None:
    told = [
        sentence(event(BTC, 1)),
        sentence(event(BTC, 1, activated=True)),
        sentence(event(BTC, 1, kind="scheduled")),
        sentence(event(BTC, 1, kind="partial_loss", level=30)),
        sentence(
            event(
                BTC, 1, kind="closed", price_close=44000.0, pnl_percent=1.2345, reason="take_profit", both_hit=True
            )
        ),
        sentence(event(BTC, 1, kind="cancelled", reason="timeout")),
    ]  # fmt: skip
    assert told == [
        "opened long 43000.5, target 44000, stop 42000",
        "activated long 43000.5, target 44000, stop 42000",
        "scheduled long 43000.5, target 44000, stop 42000",
        "30 % of the way to its stop",
        "closed long at 44000, take profit, both in one candle, +1.23 %",
        "cancelled long 43000.5: timeout",
    ]


def test_the_board_follows_events_and_ticks_and_can_be_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = [10.0]
    board = Board([BTC, ETH], "two contexts", now=lambda: seconds[0])
    board.take(event(BTC, 1))
    board.take(Tick(kind="active", context=BTC, price=43500.0, at_ms=T0, signal=signal(BTC), percent=50.0))
    board.take(event(ETH, 1, kind="scheduled"))
    board.take(event(Context("x", "y", "z"), 1))  # of another run in the same process
    board.committed("main", 1, {})
    seconds[0] += 2.5
    assert board.summary() == {"contexts": 2, "open": 1, "closed": 0, "pnlPercent": 0, "commits": 1}
    assert "the last one 2.5 s ago" in board.footer()
    board.take(event(BTC, 2, kind="closed", price_close=1.0, pnl_percent=-0.5, reason="stop_loss"))
    assert (board.summary()["closed"], board.summary()["open"]) == (1, 0)
    console = pytest.importorskip("rich.console")
    drawing = console.Console(width=140, record=True)
    drawing.print(draw(board))
    text = drawing.export_text()
    for piece in (str(BTC), "43000.5", "waits for", "-0.50 %", "stop loss", "1 commits"):
        assert piece in text
    capsys.readouterr()
    screen = PlainScreen(board, json=True)
    screen.show(event(BTC, 3))
    screen.close()
    told = [msgspec.json.decode(line) for line in capsys.readouterr().out.splitlines()]
    assert told[0]["event"]["id"] == f"{BTC}#3"
    assert told[1]["summary"]["closed"] == 1
