"""Histories of several processes on every backend, faults on, each answer checked for linearizability."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from backend_list import BACKENDS, URLS
from servers.shared import shared

from holdfast.testing.histories import Hunt, Report
from holdfast.testing.histories.storm import address
from holdfast.urls import WRAPPERS

COUNT, OPERATIONS = 10, 1000
FEWER = {"s3": (3, 300)}
"""A commit there is several requests to a slow server."""
SERVERS = {"redis": "valkey", "postgres": "postgres"}
"""Whose server is killed and restarted once in each history: those that keep their data."""
ONE_PROCESS = ("memory", "file")
ALL = "+".join(WRAPPERS)

Proof = Callable[[str, object], None]


def restart_of(name: str) -> Callable[[], Awaitable[None]] | None:
    if name not in SERVERS:
        return None
    server = shared(SERVERS[name])

    async def restart() -> None:
        # Not in a thread: a server ends with the thread that started it.
        server.kill()
        server.restart()

    return restart


async def hunted(url: str, place: Path, name: str, count: int, operations: int) -> list[Report]:
    """Make histories; each must be in order."""
    reports = []
    async with Hunt(url, place / "work", operations=operations, restart=restart_of(name)) as hunt:
        for number in range(count):
            report = await hunt.history(number + 1, number)
            assert report.ok, "\n".join([f"seed {report.seed}", *report.violations, *report.broken])
            assert report.operations >= operations
            reports.append(report)
    return reports


def told(reports: list[Report], name: str, record_property: Proof) -> Counter[str]:
    """Print what the histories came to; return it."""
    faults = sum((Counter(report.faults) for report in reports), Counter[str]())
    counts = Counter(
        histories=len(reports),
        operations=sum(report.operations for report in reports),
        commits=sum(report.commits for report in reports),
        unknown=sum(report.unknown for report in reports),
    )
    counts["sent again"] = sum(report.resent for report in reports)
    counts.update({what: faults[what] for what in ("kill", "pause", "cut", "restart", "cancelled") if faults[what]})
    record_property(f"proof:races on {name}", dict(counts))
    return counts


def test_every_backend_has_a_url() -> None:
    assert set(URLS) == set(BACKENDS)


@pytest.mark.parametrize("name", BACKENDS)
async def test_ten_histories_of_a_backend_are_linearizable(name: str, tmp_path: Path, record_property: Proof) -> None:
    count, operations = FEWER.get(name, (COUNT, OPERATIONS))
    url = URLS[name](tmp_path)
    counts = told(await hunted(url, tmp_path, name, count, operations), name, record_property)
    if name == "memory":
        return
    assert counts["kill"] >= count, "clients were killed"
    assert counts["unknown"] > 0
    assert counts["cancelled"] > 0
    if name not in ONE_PROCESS:
        assert counts["pause"] >= 2 * count
        assert counts["sent again"] > 0
    if address(url) is not None:
        assert counts["cut"] >= 3 * count
    if name in SERVERS:
        assert counts["restart"] == count


WRAPPED: dict[str, tuple[str, str]] = {
    "cached file": ("cached+", "file"),
    "encrypted sqlite": ("encrypted+", "sqlite"),
    "all over file": (f"{ALL}+", "file"),
    "all over sqlite": (f"{ALL}+", "sqlite"),
    "all over redis": (f"{ALL}+", "redis"),
    "all over postgres": (f"{ALL}+", "postgres"),
}
"""Stacks: a prefix, and what it stands before."""


@pytest.mark.parametrize("name", WRAPPED)
async def test_histories_through_wrappers_are_linearizable(
    name: str, tmp_path: Path, record_property: Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_KEYS", f"test={base64.b64encode(bytes(range(32))).decode()}")
    prefix, base = WRAPPED[name]
    reports = await hunted(prefix + URLS[base](tmp_path), tmp_path, base, 2, OPERATIONS)
    assert told(reports, name, record_property)["kill"] >= 2


async def test_each_scope_is_checked_by_itself(tmp_path: Path) -> None:
    async with Hunt(URLS["sqlite"](tmp_path), tmp_path / "work", operations=300, scopes=3) as hunt:
        report = await hunt.history(1, 0)
    assert report.ok, report.violations
    assert report.operations >= 300


@pytest.mark.parametrize(
    ("store", "host", "port", "through"),
    [
        ("redis://127.0.0.1:6379/0?prefix=a", "127.0.0.1", 6379, "redis://127.0.0.1:1/0?prefix=a"),
        ("cached+redis://h.example:6379", "h.example", 6379, "cached+redis://127.0.0.1:1"),
        ("postgresql://u:12345@db:5432/x?schema=s", "db", 5432, "postgresql://u:12345@127.0.0.1:1/x?schema=s"),
        ("s3://b?endpoint=http://10.0.0.1:9000", "10.0.0.1", 9000, "s3://b?endpoint=http://127.0.0.1:1"),
        ("mongodb://h:27017/x?a=b", "h", 27017, "mongodb://127.0.0.1:1/x?a=b&directConnection=true"),
        ("s3://b?endpoint=http%3A%2F%2Fh%3A9000", "h", 9000, "s3://b?endpoint=http%3A%2F%2F127.0.0.1%3A1"),
    ],
)
def test_a_stores_address_is_found_in_its_url(store: str, host: str, port: int, through: str) -> None:
    found = address(store)
    assert found is not None
    assert (found.host, found.port, found.through(1)) == (host, port, through)


@pytest.mark.parametrize(
    "store", ["memory:", "file:/a:80x", "sqlite:x.db", "redis://a:1,b:2", "rediss://a:6379", "redis://localhost"]
)
def test_a_store_without_one_plain_address_is_not_cut(store: str) -> None:
    assert address(store) is None


@pytest.mark.parametrize(
    "broken", ["unguarded", "read_then_written", "torn", "cached_first", "remembering", "forgetful"]
)
async def test_a_store_that_breaks_one_promise_is_found(broken: str, tmp_path: Path, record_property: Proof) -> None:
    """Within three histories: what needs two processes to meet at the wrong moment may not come up at once."""
    store = URLS["sqlite"](tmp_path)
    async with Hunt(store, tmp_path / "work", operations=OPERATIONS, opener=f"broken_stores:{broken}") as hunt:
        for number in range(3):
            report = await hunt.history(number, number)
            if report.violations:
                break
    assert len(report.violations) == 1, report
    assert not report.broken
    lines = report.violations[0].splitlines()
    assert "these do not:" in lines[0]
    assert 2 <= len(lines) <= 60, "a window, not the whole history"
    assert any(line.startswith("> ") for line in lines)
    assert (tmp_path / "work" / f"history-{number}").exists(), "its lines are kept"
    record_property("proof:races on broken stores", {"found": 1})


def command(*words: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "holdfast.testing.histories", *words]
    # From this directory, where the stores of one's own lie.
    return subprocess.run(run, capture_output=True, text=True, check=False, timeout=120, cwd=Path(__file__).parent)


def test_the_command_goes_on_where_it_stopped_and_tells_the_whole(tmp_path: Path) -> None:
    same = ["sqlite:" + str(tmp_path / "store.db"), "--operations", "100", "--resume", str(tmp_path / "kept")]
    first = command(*same, "--count", "1")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("history 1 (seed 1): ok, 1")
    second = command(*same, "--count", "3", "--json")
    assert second.returncode == 0, second.stderr
    total = json.loads(second.stdout)
    assert (total["ok"], total["wanted"], [one["seed"] for one in total["histories"]]) == (True, 3, [1, 2, 3])
    third = command(*same, "--count", "3", "--seed", "9")
    assert third.returncode == 2
    assert "give the same, or another directory" in third.stderr


def test_the_command_ends_by_its_time_cap_and_says_how_far_it_came(tmp_path: Path) -> None:
    done = command(str(tmp_path / "store"), "--operations", "50", "--count", "9999", "--time-cap", "0.5")
    assert done.returncode == 0, done.stderr
    assert "of 9999 (the time cap ended it)" in done.stdout


def test_the_command_shows_what_does_not_fit_and_where_the_lines_are(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    store = "sqlite:" + str(tmp_path / "store.db")
    done = command(store, "--open", "broken_stores:unguarded", "--count", "1", "--resume", str(kept))
    assert done.returncode == 1
    assert "VIOLATED" in done.stdout
    assert "1 violated" in done.stdout
    assert "these do not:" in done.stderr
    assert f"its lines are kept in {kept / 'history-0'}" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nothing:here"], 2, "names no store"),
        (["memory:", "--count", "0"], 2, "--count is 0"),
        (["memory:", "--operations", "0"], 2, "operations is 0"),
        (["memory:", "--scopes", "99"], 2, "scopes is 99"),
        (["memory:", "--time-cap", "-1"], 2, "--time-cap is -1"),
        (["memory:", "--open", "nowhere"], 2, "give MODULE:CALLABLE"),
        (["memory:", "--open", "broken_stores:no_backend"], 2, "must return a Backend"),
        (["redis://127.0.0.1:1"], 3, "cannot be reached"),
    ],
)
def test_the_command_says_what_has_to_be_mended(words: list[str], code: int, said: str) -> None:
    done = command(*words)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
