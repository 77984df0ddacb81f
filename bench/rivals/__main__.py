"""Measure Holdfast and its rivals side by side, and write docs/rivals.md and docs/rivals.svg.

python -m bench.rivals [--rounds N] [--only TEXT] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from ..redis import make_signal
from .catalogue import BUILD, ENTRIES, ROOT, Entry
from .flushes import Attached, Flushes, per_write, read_trace, trace_command
from .install import install
from .page import Result, line, write_page

sys.path.insert(0, str(ROOT / "tests"))
from servers import kind

ROW_BYTES = 600
ROUNDS, SEQUENCE, LANES, EACH = 9, 40, 64, 3
LEAST_ROUNDS, MOST_SECONDS = 3, 150
"""On a slow day fewer rounds, so that the whole stays under six minutes; the page says how many there were."""
ROWS, COLD_RUNS = 2_000, 3
TRACED, TRACED_EACH = 100, 5
REST_SECONDS = 0.1
"""Pause between two sides, for what one still does in the background; what lasts longer falls on all by chance."""


class Process:
    """One side at work."""

    def __init__(self, entry: Entry, place: Path, phase: str, row: Path, urls: dict[str, str], *before: str) -> None:
        self._label = entry.label
        argv = [*before, *entry.argv(place, phase, row, urls)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def ask(self, what: str, **more: int) -> dict[str, Any]:
        """Give an order and return the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the process has ended"}')
        if "error" in answer:
            raise RuntimeError(f"{self._label}: {what}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Have it end, and wait for that."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@contextmanager
def _row_file(place: Path) -> Iterator[Path]:
    row = msgspec.to_builtins(make_signal(0))
    row["note"] = ""
    row["note"] = "x" * (ROW_BYTES - len(msgspec.json.encode(row)))
    file = place / "row.json"
    file.write_bytes(msgspec.json.encode(row))
    assert file.stat().st_size == ROW_BYTES
    yield file


class Bench:
    """All sides on one disk, in one run."""

    def __init__(self, entries: list[Entry], place: Path, row: Path, urls: dict[str, str], rounds: int) -> None:
        self._entries, self._place, self._row, self._urls, self._rounds = entries, place, row, urls, rounds
        self.rounds = 0
        """How many rounds there were."""

    def _start(self, entry: Entry, phase: str, *before: str) -> Process:
        at = ENTRIES.index(entry)
        return Process(entry, self._place / f"{phase}{at}", phase, self._row, self._urls, *before)

    def cold(self) -> dict[str, float]:
        """Fill each side with rows, then open and read them all, each time in a new process: median milliseconds."""
        times: dict[str, list[float]] = {entry.label: [] for entry in self._entries}
        for entry in self._entries:
            side = self._start(entry, "cold")
            side.ask("open")
            side.ask("fill", count=ROWS)
            side.close()
        for _ in range(COLD_RUNS):
            for entry in self._entries:
                side = self._start(entry, "cold")
                answer = side.ask("cold", count=ROWS)
                side.close()
                if answer["rows"] != ROWS:
                    raise RuntimeError(f"{entry.label} read {answer['rows']} rows of {ROWS}")
                times[entry.label].append(answer["seconds"] * 1e3)
        return {label: statistics.median(found) for label, found in times.items()}

    def turns(self) -> dict[str, tuple[float, float, float]]:
        """Let all write in turn, in another order each round.

        Returns:
            For each its median write in sequence in µs, writes a second in sequence, and those of 64 at once.
        """
        singles: dict[str, list[float]] = {entry.label: [] for entry in self._entries}
        rates: dict[str, list[float]] = {entry.label: [] for entry in self._entries}
        groups: dict[str, list[float]] = {entry.label: [] for entry in self._entries}
        with ExitStack() as stack:
            sides = {}
            for entry in self._entries:
                sides[entry.label] = side = self._start(entry, "turns")
                stack.callback(side.close)
                side.ask("open")
                side.ask("sequence", count=10)  # to warm up
                side.ask("group", lanes=LANES, each=2)
            order, chance = list(sides.items()), random.Random(7)
            end = time.monotonic() + MOST_SECONDS
            while self.rounds < self._rounds and (self.rounds < LEAST_ROUNDS or time.monotonic() < end):
                self.rounds += 1
                chance.shuffle(order)
                for label, side in order:
                    times = side.ask("sequence", count=SEQUENCE)["times"]
                    singles[label] += times
                    rates[label].append(SEQUENCE / sum(times))
                    groups[label].append(LANES * EACH / side.ask("group", lanes=LANES, each=EACH)["seconds"])
                    time.sleep(REST_SECONDS)
                print(f"\rround {self.rounds} of {self._rounds} ", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        median = statistics.median
        return {label: (median(singles[label]) * 1e6, median(rates[label]), median(groups[label])) for label in singles}

    def flushes(self, entry: Entry, pids: list[int]) -> tuple[Flushes, Flushes]:
        """Return what one side and its server flush for each write: in sequence, and of 64 at once."""
        trace = self._place / f"flushes{ENTRIES.index(entry)}.trace"
        attached = Attached(pids, trace.with_suffix(".server")) if pids else None
        side = self._start(entry, "flushes", *trace_command(trace))
        try:
            side.ask("open")
            side.ask("sequence", count=10)
            time.sleep(
                1.2
            )  # what a first write still does behind it (Holdfast's readable copies) is not the next one's
            one = side.ask("sequence", count=TRACED)
            many = side.ask("group", lanes=LANES, each=TRACED_EACH)
        finally:
            side.close()
            if attached:
                attached.close()
        found = read_trace(trace) + (read_trace(attached.output) if attached else [])
        return (
            per_write(found, one["began"], one["ended"], TRACED),
            per_write(found, many["began"], many["ended"], LANES * TRACED_EACH),
        )


def _pids(server: Any) -> list[int]:
    return [server.process.pid] if not hasattr(server, "pids") else server.pids()


def _measure(entries: list[Entry], rounds: int, without: dict[str, str]) -> tuple[list[Result], int]:
    BUILD.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="run-", dir=BUILD))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        row = stack.enter_context(_row_file(place))
        servers: dict[str, Any] = {}
        for name, which in (("redis", "valkey"), ("postgres", "postgres")):
            if any(entry.server == name for entry in entries):
                servers[name] = server = kind(which).start(place / which)
                stack.callback(server.stop)
        bench = Bench(entries, place, row, {name: server.url for name, server in servers.items()}, rounds)
        print("cold starts …", file=sys.stderr)
        cold = bench.cold()
        turns = bench.turns()
        flushed: dict[str, tuple[Flushes, Flushes] | None] = {}
        for entry in entries:
            print(f"flushes of {entry.label} …", file=sys.stderr)
            pids = _pids(servers[entry.server]) if entry.server else []
            flushed[entry.label] = None if "strace" in without else bench.flushes(entry, pids)
    found = [Result(entry, *turns[entry.label], cold[entry.label], flushed[entry.label]) for entry in entries]
    return found, bench.rounds


def main() -> int:
    """Install, measure, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default="", help="sides whose name holds this text; writes no page")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    without = install()
    entries = [e for e in ENTRIES if arguments.only in e.label and e.runtime not in without]
    began = time.monotonic()
    results, rounds = _measure(entries, arguments.rounds, without)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    for result in results:
        print(json.dumps(result.as_dict()) if arguments.json else line(result))
    if not arguments.only:
        write_page(results, without, rounds=rounds)
        print("written: docs/rivals.md, docs/rivals.svg", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
