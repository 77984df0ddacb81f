"""What proofs counted (``record_property("proof:NAME", {what: count})``) and how long each part took, after the run."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import PurePosixPath

import pytest

from holdfast.engine.backtest import Backtest
from holdfast.engine.live import Live

_Counts = dict[str, Counter[str]]

PARTS: dict[str, tuple[str, ...]] = {
    # part: beginnings of the names of its test files, without test_
    "kills and lost power": ("kills", "lost_power"),
    "histories": ("histor", "linear"),
    "conformance": ("conformance",),
    "redis": ("redis",),
    "postgres": ("postgres",),
    "sqlite": ("sqlite",),
    "mongo": ("mongo",),
    "s3": ("s3",),
    "file": ("file", "power_cuts", "faults"),
    "wrappers": ("cached", "encrypted", "replicated", "retrying", "traced", "stack", "wrapper", "keyring", "rekey"),
    "rules": ("candles", "params", "risk", "signals"),
    "engine": ("backtest", "live", "session", "recovery", "outbox", "listeners", "lease", "owner", "worker", "turns"),
    "store": (
        "store",
        "domains",
        "names",
        "invariants",
        "memory",
        "registry",
        "adapters",
        "custom",
        "routes",
        "copy",
        "urls",
    ),
    "orders": ("orders", "sizing", "ccxt", "broker"),
    "market": ("market",),
    "command line": ("cli", "doctor"),
    "mutants": ("mutants",),
    "docs and imports": ("docs", "imports"),
}
"""What ``make test`` prints the time of; a file that no part names stands under its own name."""

LONG = ("kills and lost power", "histories", "mutants", "zombies", "shared_limits")
"""Parts with tests of half a minute and more."""


@pytest.fixture(autouse=True)
def no_ended_runs() -> None:
    """What earlier tests of this process ran is not listed any more."""
    Live.clear()
    Backtest.clear()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the long ones begin first where several processes share the tests: all would wait for one that begins last.

    Each process is given a run of the list, so each run begins with its share of them. The order is random otherwise.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes > 1:
        items.sort(key=lambda item: part_of(item.nodeid) not in LONG)
        items[:] = [item for at in range(processes) for item in items[at::processes]]


def part_of(nodeid: str) -> str:
    """Return the part that a test belongs to: by its folder below ``tests``, or by the name of its file."""
    path = PurePosixPath(nodeid.partition("::")[0])
    if path.parent.name not in ("", "tests"):
        return path.parent.name
    name = path.stem.removeprefix("test_")
    # The longest beginning that fits, so that a new file of a known family needs no line.
    fitting = [(len(start), part) for part, starts in PARTS.items() for start in starts if name.startswith(start)]
    return max(fitting)[1] if fitting else name


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Add up what all tests counted and took, also those that ran in other processes."""
    proofs: _Counts = {}
    seconds: defaultdict[str, float] = defaultdict(float)
    tests: Counter[str] = Counter()
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        for name, counts in getattr(report, "user_properties", ()):
            if name.startswith("proof:") and getattr(report, "when", "") == "call":
                proofs.setdefault(name[6:], Counter()).update(counts)
        if isinstance(report, pytest.TestReport):
            part = part_of(report.nodeid)
            seconds[part] += report.duration  # of set-up, call and end
            tests[part] += report.when == "call"
    left_out = {str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", ())}  # never in silence
    for reason in sorted(left_out):
        terminalreporter.write_line(f"left out: {reason.removeprefix('Skipped: ')}")
    for name, totals in sorted(proofs.items()):
        terminalreporter.write_line(f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in totals.items()))
    if len(seconds) > 1:
        terminalreporter.write_line("")
        terminalreporter.write_line(f"{'part':<22}{'tests':>7}{'seconds':>9}   (of the processes together)")
        for part, spent in sorted(seconds.items(), key=lambda item: -item[1]):
            terminalreporter.write_line(f"{part:<22}{tests[part]:>7}{spent:>9.1f}")
        terminalreporter.write_line(f"{'together':<22}{tests.total():>7}{sum(seconds.values()):>9.1f}")
