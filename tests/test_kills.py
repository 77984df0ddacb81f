"""SIGKILL, again and again: at random instants, at numbered steps, and during the recovery that follows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.backends.file import FileBackend
from holdfast.contract import Key, Op
from holdfast.errors import InvalidInputError
from holdfast.testing.torture import FIRST_STEPS, PHASES, numbered_steps
from holdfast.testing.watched import watched_backend
from holdfast.testing.witness import Reporter, Reporting, Witness

Note = Callable[[str, object], None]
BOT = Path(__file__).parent.parent / "examples" / "bot.py"
KEY = Key("signal", "BTCUSDT_a_x", "BTCUSDT")


def torture(*arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "holdfast.cli", "torture", str(BOT), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


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


def test_torture_goes_on_where_it_stopped(tmp_path: Path) -> None:
    arguments = ("--seed", "3", "--minutes", "200", "--symbols", "BTCUSDT", "--resume", str(tmp_path))
    code, first = torture("--kills", "3", *arguments)
    assert (code, first["kills"]) == (0, 3)
    code, second = torture("--kills", "5", *arguments)
    assert (code, second["kills"]) == (0, 5)
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
