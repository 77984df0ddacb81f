"""The hunt: killed at any instant it loses no seed and counts none twice, and what fails can be replayed."""

from __future__ import annotations

import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from simulation_defects import DEFECTS, SPINS
from simulation_seeds import KEPT

from holdfast.store import Store
from holdfast.testing.simulation import Plan, play, world
from holdfast.testing.simulation.__main__ import OK, VIOLATED, main
from holdfast.testing.simulation.hunt import Chunk, Hunt, play_chunk
from holdfast.testing.simulation.loop import no_spinning

COMMAND = [sys.executable, "-m", "holdfast.testing.simulation"]
FILE = "simulation.jsonl"


def chunk(first: int, count: int, failed: tuple[int, ...] = ()) -> bytes:
    return msgspec.json.encode(Chunk(first=first, count=count, commits=count, events=count, failed=failed)) + b"\n"


def wait_until(is_so: Callable[[], object], seconds: float = 120.0) -> None:
    ends = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def workers(pid: int) -> list[int]:
    """Return the processes that play, without the one in which multiprocessing tracks its resources."""
    return [one for one in children(pid) if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]


def lines(place: Path) -> list[Chunk]:
    text = (place / FILE).read_bytes() if (place / FILE).exists() else b""
    return [msgspec.json.decode(line, type=Chunk) for line in text.splitlines()]


def test_a_line_that_was_cut_short_is_played_again_and_the_next_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(chunk(0, 2) + chunk(2, 2)[:-9])
    hunt = Hunt(0, 4, resume=tmp_path)
    assert hunt.done == 2
    hunt.run()
    assert Hunt(0, 4, resume=tmp_path).done == hunt.done == 4
    assert [(one.first, one.count) for one in lines(tmp_path)] == [(0, 2), (2, 2)]


def test_seeds_that_two_hunts_have_played_count_once_and_those_that_failed_not_at_all(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(chunk(0, 6) + chunk(4, 6) + chunk(0, 6) + chunk(6, 3) + chunk(9, 2, (10,)))
    hunt = Hunt(0, 12, resume=tmp_path)
    assert [(one.first, one.count) for one in hunt.chunks] == [(0, 6), (6, 3)]
    hunt.run()
    assert hunt.done == 12
    assert Hunt(0, 6, resume=tmp_path).done == 6


def test_a_hunt_whose_worker_and_then_itself_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [*COMMAND, "--seeds", "600", "--jobs", "2", "--resume", str(tmp_path), "--json"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: len(workers(first.pid)) == 2)
    before = workers(first.pid)
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: len(workers(first.pid)) == 2 and before[0] not in workers(first.pid))  # it was replaced
    wait_until(lambda: lines(tmp_path))
    orphans = workers(first.pid)
    first.kill()
    first.communicate()
    wait_until(lambda: not any(Path(f"/proc/{one}").exists() for one in orphans))  # none plays on for nobody
    kept = sum(one.count for one in lines(tmp_path))
    assert 0 < kept < 600
    again = subprocess.run([*command, "--time-cap", "0.001"], capture_output=True, check=True)
    found = json.loads(again.stdout)
    assert kept <= found["played"] <= kept + 100, "each worker begins one chunk before it looks at the time"
    firsts = [one.first for one in lines(tmp_path)]
    assert len(firsts) == len(set(firsts))
    assert found["played"] == sum(one.count for one in lines(tmp_path))


def test_a_seed_that_fails_is_kept_and_told_with_the_commands_that_replay_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (defect,) = [one for one in DEFECTS if one.name == "levels outlive their signal"]
    with defect.planted():
        assert main(["--seeds", "20", "--keep", str(tmp_path)]) == VIOLATED
        text = capsys.readouterr().out
        assert "levels-without-signal" in text
        assert '"faults":[]' in text
        assert main(["--seeds", "120", "--all"]) == VIOLATED
        told_of_all = capsys.readouterr().out
        assert "120 of 120 histories" in told_of_all
        assert len(told_of_all.partition("seeds: ")[2].splitlines()[0].split()) > 10
        told = text.splitlines()
        commands = [shlex.split(line.partition(": ")[2]) for line in told if line.startswith("replay")]
        assert [command[:3] for command in commands] == [["python", "-m", "holdfast.testing.simulation"]] * 2
        assert [main(command[3:]) for command in commands] == [VIOLATED, VIOLATED]
    (kept,) = tmp_path.glob("*.json")
    assert msgspec.json.decode(kept.read_bytes(), type=Plan).minutes > 0
    assert [main(command[3:]) for command in commands] == [OK, OK], "without the defect both are in order"


def test_a_history_that_spins_is_ended_and_counts_as_violated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "no_spinning", lambda scheduler: no_spinning(scheduler, 0.5))
    before = signal.getsignal(signal.SIGVTALRM)
    with SPINS.planted():
        (violation,) = play(KEPT["a-page-of-one-old-candle"]).violations
    assert "waits for nothing" in violation
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_what_was_played_leaves_nothing_behind() -> None:
    play(0)
    gc.collect()
    before = sum(isinstance(one, Store) for one in gc.get_objects())
    for seed in range(5):
        play(seed)
    gc.collect()
    assert sum(isinstance(one, Store) for one in gc.get_objects()) <= before, "an open store is kept by nobody"


def test_a_chunk_is_the_same_wherever_it_is_played() -> None:
    once, twice = play_chunk(7, 4), play_chunk(7, 4)
    assert (once.commits, once.events, once.failed) == (twice.commits, twice.events, twice.failed)
