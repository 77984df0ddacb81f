"""Domains that lie elsewhere, as the command line names them; the ledger on a store of its own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from backend_list import BACKENDS
from fakes import Bot, FakeMarket, flat, proposal, sound

from holdfast.backends.file import FileBackend
from holdfast.backends.memory import MemoryBackend
from holdfast.backends.sqlite import SqliteBackend
from holdfast.contract import Backend, Survives
from holdfast.errors import InvalidInputError
from holdfast.store import Store

BOT = Path(__file__).parent.parent / "examples" / "bot.py"


def holdfast(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, as the user's file may be loaded once."""
    command = [sys.executable, "-m", "holdfast.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


async def content(backend: Backend) -> dict[str, set[str]]:
    """Return the domains in each scope of a backend that is not open."""
    await backend.open(read_only=True)
    found = {scope: {key.domain async for key in backend.keys(scope)} async for scope in backend.scopes()}
    await backend.close()
    return found


def test_a_run_keeps_each_domain_where_it_was_told_and_goes_on_there(tmp_path: Path) -> None:
    routes = [
        "--route", f"partial=sqlite:{tmp_path / 'cold.db'}", "--route", f"risk=sqlite:{tmp_path / 'cold.db'}",
        "--route", f"ledger={tmp_path / 'ledger'}",
    ]  # fmt: skip
    store = str(tmp_path / "hot")
    for minutes in ("200", "400"):
        command = ["run", str(BOT), "--store", store, "--market", "synthetic:7", "--speed", "wait", "--json"]
        done = holdfast(*command, "--minutes", minutes, *routes)
        assert done.returncode == 0, done.stderr
    checked = holdfast("check", store, *routes)
    assert checked.returncode == 0, checked.stdout
    shown = json.loads(holdfast("show", store, *routes, "--json").stdout)
    assert shown["trades"], "the trades are read from where they lie"
    hot, cold = (asyncio.run(content(backend)) for backend in (_file(store), SqliteBackend(tmp_path / "cold.db")))
    ledger = asyncio.run(content(_file(str(tmp_path / "ledger"))))
    assert ledger == {"main.ledger": {"ledger"}}
    assert {"risk", "partial"} & set().union(*hot.values()) == set()
    assert set().union(*cold.values()) <= {"risk", "partial", "span"}
    assert "risk" in set().union(*cold.values())


def _file(path: str) -> Backend:
    return FileBackend(path)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "file"])
async def test_a_bot_trades_with_its_signals_on_any_other_backend(name: str, tmp_path: Path) -> None:
    store = Store(MemoryBackend(), routes={"signal": BACKENDS[name](tmp_path)}, require=Survives.NOTHING)
    await store.open()
    bot = Bot(FakeMarket({"BTCUSDT": [*flat(43000, -10, 3), *flat(44500, 4, 8)]}), {1: proposal()})
    events = await bot.live(store)
    assert [event.kind for event in events] == ["opened", "closed"]
    await sound(store)
    await store.close()


@pytest.mark.parametrize(
    ("route", "told"),
    [
        ("partial", "write DOMAIN=STORE"),
        ("=x", "write DOMAIN=STORE"),
        ("owner=sqlite:x.db", "cannot be routed"),
        ("signal=nonsense://x", "names no store"),
    ],
)
def test_a_route_that_cannot_be_read_gets_one_clear_error(route: str, told: str, tmp_path: Path) -> None:
    command = ["run", str(BOT), "--store", str(tmp_path / "a"), "--market", "synthetic:7", "--minutes", "5"]
    done = holdfast(*command, "--route", route)
    assert (done.returncode, told in done.stderr) == (2, True), done.stderr


def test_a_domain_goes_to_one_place_only(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="only signal, schedule, risk, partial, ledger"):
        Store(MemoryBackend(), routes={"owner": MemoryBackend()})
    command = ["run", str(BOT), "--store", str(tmp_path / "a"), "--market", "synthetic:7", "--minutes", "5"]
    done = holdfast(*command, "--route", "risk=sqlite:a.db", "--route", "risk=sqlite:b.db")
    assert (done.returncode, "twice" in done.stderr) == (2, True), done.stderr
