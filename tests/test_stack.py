"""The stack: one order, options that make sense, and every command and function that takes a store takes its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from test_urls import layers

import holdfast
from holdfast.backends.memory import MemoryBackend
from holdfast.cli import main
from holdfast.contract import Key, Op, Survives
from holdfast.documents.adapters import PersistSignalAdapter, use_store
from holdfast.documents.default import close_stores, reset
from holdfast.documents.shared import store_of
from holdfast.errors import InvalidInputError
from holdfast.rows import Signal
from holdfast.wrappers.keyring import Keyring
from holdfast.wrappers.replicated import Replicated
from holdfast.wrappers.retrying import Retrying
from holdfast.wrappers.stack import stack

BOT = str(Path(__file__).parents[1] / "examples" / "bot.py")
SECRET_KEY = "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWY="
PAIR = ("BTCUSDT", "trend")


def ring() -> Keyring:
    return Keyring({"k": b"k" * 32})


def test_nothing_asked_for_is_the_backend_itself() -> None:
    backend = MemoryBackend()
    assert stack(backend) is backend


def test_with_everything_the_order_is_the_one_of_the_design() -> None:
    copies = [MemoryBackend(), MemoryBackend(), MemoryBackend()]
    whole = stack(*copies, retrying=True, quorum=2, keys=ring(), cached=True, traced=True)
    assert layers(whole) == ["Traced", "Cached", "Encrypted", "Replicated"]
    inner: Any = whole
    while not isinstance(inner, Replicated):
        inner = inner.backend
    assert [layers(copy.backend) for copy in inner.copies] == [["Retrying", "MemoryBackend"]] * 3
    assert inner.quorum == 2
    patience = [copy.backend.deadline_seconds for copy in inner.copies if isinstance(copy.backend, Retrying)]
    assert max(patience) < 30, "a copy that is away must not hold up the opening for long"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quorum": 1}, "quorum has no meaning without followers"),
        ({"witness": "w"}, "witness has no meaning without keys"),
        ({"leases": object()}, "leases has no meaning without cached"),
        ({"meter_provider": object()}, "meter_provider .* without traced"),
        ({"tracer_provider": object()}, "tracer_provider has no meaning without traced|without traced"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        stack(MemoryBackend(), **options)


def test_the_same_backend_twice_is_refused() -> None:
    backend = MemoryBackend()
    with pytest.raises(InvalidInputError, match="stands twice"):
        stack(backend, backend)


def test_the_wrappers_are_exported_by_name() -> None:
    for name in ("Cached", "Encrypted", "Keyring", "Leases", "Replicated", "Retry", "Retrying", "Traced", "stack"):
        assert name in holdfast.__all__
        assert getattr(holdfast, name).__name__ == name


async def test_the_warnings_and_the_place_of_what_lies_below_are_told_by_the_whole_stack(tmp_path: Path) -> None:
    bare = holdfast.open_backend(f"sqlite:{tmp_path}/a.db")
    whole = stack(
        holdfast.open_backend(f"sqlite:{tmp_path}/b.db"), retrying=True, keys=ring(), cached=True, traced=True
    )  # fmt: skip
    below, found = await bare.open(), await whole.open()
    try:
        assert found.backend == below.backend.replace("a.db", "b.db")
        assert {warning.replace("a.db", "b.db") for warning in below.warnings} <= set(found.warnings)
        assert (found.survives, found.atomic, found.fenced, found.shared) == (
            below.survives, below.atomic, below.fenced, below.shared,
        )  # fmt: skip
        assert any("nothing is cached" in warning for warning in found.warnings)
        assert any("witness" in warning for warning in found.warnings), "what the encryption does not find is told"
    finally:
        await whole.close()
        await bare.close()


async def test_a_row_is_encrypted_below_and_plain_above(tmp_path: Path) -> None:
    key = Key("signal", "BTCUSDT_trend_x", "BTCUSDT")
    inner = holdfast.open_backend(f"file:{tmp_path}/data")
    whole = stack(inner, retrying=True, keys=ring(), cached=True)
    await whole.open()
    await whole.commit("main", {key: b'{"a":1}'}, {key: 0}, op=Op("w", 1))
    assert (await whole.read("main", [key]))[key].payload == b'{"a":1}'
    assert b'"a"' not in (await inner.read("main", [key]))[key].payload
    await whole.close()


# ------------------------------------------------------------------ every way to name a store


@pytest.fixture
async def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Path]:
    monkeypatch.chdir(tmp_path)
    reset()
    yield tmp_path
    await close_stores()
    reset()


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


NAMES = ["traced+cached+./wrapped", "retrying+sqlite:bot.db", "sqlite:plain.db", "cached+memory:"]


@pytest.mark.parametrize("name", [*NAMES, "file:./one sqlite:two.db quorum=2"])
async def test_the_adapters_store_takes_a_stores_name(name: str, fresh: Path) -> None:
    use_store(name)
    row = Signal(
        id="s1", position="long", price_open=1.0, price_take_profit=2.0, price_stop_loss=0.5,
        minute_estimated_time=5, symbol="BTCUSDT", exchange_name="x", strategy_name="trend",
        scheduled_at=1_704_067_200_000, pending_at=1_704_067_200_000,
    )  # fmt: skip
    await PersistSignalAdapter.write_signal_data(row, *PAIR)
    assert await PersistSignalAdapter.read_signal_data(*PAIR) == row
    made = names_in(fresh)
    assert not any(":" in path or "+" in path for path in made), "no folder has the name of a URL"
    assert "dump" not in made
    use_store(None)


async def test_a_name_and_its_folder_are_one_store(fresh: Path) -> None:
    assert store_of("file:./x") is store_of(str(fresh / "x"))
    assert store_of(f"file://{fresh}/x") is store_of("./x")
    assert store_of("cached+./x") is not store_of("./x")
    assert store_of("cached+./x") is store_of("cached+./x")


def test_a_store_in_use_by_another_loop_is_named_without_its_password() -> None:
    found = store_of("retrying+redis://user:hunter2@127.0.0.1:1/0")
    assert "hunter2" not in found.name


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "holdfast.cli", *arguments],
        cwd=folder, env={**os.environ, "HOLDFAST_KEYS": f"k={SECRET_KEY}"}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


def test_a_bot_runs_on_a_stack_as_on_a_bare_store_and_every_command_reads_it(tmp_path: Path) -> None:
    market = ("--market", "synthetic:7", "--speed", "wait", "--minutes", "90", "--json")

    def seen(store: str) -> dict[str, Any]:
        done = run("run", BOT, *market, "--store", store, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        shown: dict[str, Any] = json.loads(run("show", store, "--json", folder=tmp_path).stdout)
        return {what: shown[what] for what in ("trades", "risk", "undelivered", "quarantine", "damaged")}

    bare = seen("./bare")
    assert bare["trades"], "the market gives something to compare"
    whole = "traced+cached+encrypted+retrying+file:./data"
    assert seen(whole) == bare
    assert seen("retrying+traced+file:./a sqlite:b.db quorum=2") == bare
    assert run("check", whole, folder=tmp_path).returncode == 0
    doctor = json.loads(run("doctor", whole, "--json", folder=tmp_path).stdout)
    assert doctor["backend"] == f"file:{tmp_path}/data"


@pytest.mark.parametrize("command", ["show", "check", "doctor"])
@pytest.mark.parametrize(
    "name", ["cached+./nothing", "traced+file:nothing", "file:nothing file:neither", "file:nothing"]
)
def test_a_command_says_where_there_is_no_store_and_makes_none(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, name]) == 2
    assert "there is no store at" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_memory_below_wrappers_is_accepted_as_it_was_asked_for(tmp_path: Path) -> None:
    market = ("--market", "synthetic:7", "--speed", "wait", "--minutes", "30")
    done = run("run", BOT, *market, "--store", "traced+cached+memory:", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "survives NOTHING" in done.stdout


async def test_a_store_over_a_stack_requires_what_it_required(tmp_path: Path) -> None:
    store = holdfast.Store(holdfast.open_backend("traced+memory:"), require=Survives.PROCESS)
    with pytest.raises(holdfast.UnsafeSettingError, match="memory survives NOTHING"):
        await store.open()
