"""How long the event loop stands still while flushes take 200 ms: ``python -m bench.loop_gap [--json]``.

A ticker notes the gaps between its turns on the loop, in turn while nothing is stored and while 64 tasks commit.
File and SQLite: each ``fsync`` and ``fdatasync`` of the process is held up for 200 ms as it enters the kernel (strace's
fault injection, so that the real call in its real thread is slow). Redis and PostgreSQL: the server is stopped for
200 ms again and again (SIGSTOP), in the middle of whatever it is doing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from holdfast.contract import Backend, Key, Op
from holdfast.urls import open_backend

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from servers import kind  # noqa: E402  (it lies beside the tests)

FLUSH_SECONDS = 0.2
TICK_SECONDS = 0.001
TURNS, TURN_SECONDS = 6, 1.6
COMMITTERS = 64
LIMIT_MS = 10.0
ROW = json.dumps({"id": "BTCUSDT", "note": "x" * 560, "priceOpen": 42_000.5}).encode()
SERVERS = {"redis": "valkey", "postgres": "postgres"}
PLACES = ("file", "sqlite", *SERVERS)
_SLOW = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", os.devnull, "-e", "signal=none", "-e", "trace=fsync,fdatasync",
         "-e", f"inject=fsync,fdatasync:delay_enter={int(FLUSH_SECONDS * 1e6)}"]  # fmt: skip


async def tick(until: float) -> list[float]:
    """Return the gaps between turns until that moment, in seconds."""
    gaps, last = [], time.perf_counter()
    while last < until:
        await asyncio.sleep(TICK_SECONDS)
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    return gaps


class Load:
    """Tasks that commit one row each, again and again."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._last = [(0, 0)] * COMMITTERS
        self.waits: list[float] = []
        """How long each commit took, in seconds."""

    async def run(self, until: float) -> None:
        """Commit until that moment; what is under way then is awaited."""
        await asyncio.gather(*(self._lane(number, until) for number in range(COMMITTERS)))

    async def _lane(self, number: int, until: float) -> None:
        key = Key("signal", f"SYM{number}_strategy_exchange", f"SYM{number}")
        while time.perf_counter() < until:
            n, version = self._last[number]
            began = time.perf_counter()
            version = await self._backend.commit("gap", {key: ROW}, {key: version}, op=Op(f"lane-{number}", n + 1))
            self._last[number] = n + 1, version
            self.waits.append(time.perf_counter() - began)


@contextmanager
def freezing(pids: list[int]) -> Iterator[None]:
    """Stop these processes for 200 ms, let them go on for 20 ms, and so on, until the block ends."""
    done = threading.Event()

    def signal_all(number: int) -> None:
        for pid in pids:
            os.kill(pid, number)

    def run() -> None:
        while not done.wait(0.02):
            signal_all(signal.SIGSTOP)
            done.wait(FLUSH_SECONDS)
            signal_all(signal.SIGCONT)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        signal_all(signal.SIGCONT)


def _worst_but_one_in_a_thousand(gaps: list[float]) -> float:
    return sorted(gaps)[int(len(gaps) * 0.999)] * 1e3


async def measure(url: str, pids: Callable[[], list[int]]) -> dict[str, Any]:
    """Take turns: idle, loaded, idle, …"""
    backend = open_backend(url)
    await backend.open()
    load = Load(backend)
    idle: list[float] = []
    loaded: list[float] = []
    await load.run(time.perf_counter() + 0.01)  # to warm up: connections are made, statements prepared
    load.waits.clear()
    for _ in range(TURNS):
        await asyncio.sleep(0.6)  # so that no readable copy of the file store is written in the idle turn
        idle += await tick(time.perf_counter() + TURN_SECONDS)
        stopped = pids()
        with freezing(stopped) if stopped else nullcontext():
            until = time.perf_counter() + TURN_SECONDS
            work = asyncio.create_task(load.run(until))
            loaded += await tick(until)
        await work
    await backend.close()
    quiet, busy = _worst_but_one_in_a_thousand(idle), _worst_but_one_in_a_thousand(loaded)
    return {
        "idle_ms": round(quiet, 2), "loaded_ms": round(busy, 2), "more_ms": round(busy - quiet, 2),
        "limit_ms": LIMIT_MS, "ticks": len(loaded), "commits": len(load.waits),
        "commit_ms": round(statistics.median(load.waits) * 1e3, 1),
        "longest_commit_ms": round(max(load.waits) * 1e3, 1), "longest_ms": round(max(loaded) * 1e3, 2),
        "met": busy - quiet <= LIMIT_MS,
    }  # fmt: skip


def _pids(server: Any) -> list[int]:
    found: list[int] = server.pids() if hasattr(server, "pids") else [server.process.pid]
    return found


def run_one(name: str, place: Path) -> dict[str, Any]:
    """Measure one backend in this process."""
    if name not in SERVERS:
        return asyncio.run(measure(f"{name}:{place / 'store'}", list))
    server = kind(SERVERS[name]).start(place / "server")
    try:
        return asyncio.run(measure(server.url, lambda: _pids(server)))
    finally:
        server.stop()


def in_a_process_of_its_own(name: str) -> dict[str, Any]:
    """Measure one backend in a new process, its flushes slowed if they are its own."""
    (ROOT / "build").mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="bench-gap-", dir=ROOT / "build"))
    try:
        own = [sys.executable, "-m", "bench.loop_gap", "--measure", name, "--place", str(place)]
        if name not in SERVERS and shutil.which("strace") is None:
            return {"not_measured": "needs strace (Debian's package): install it", "met": False}
        words = own if name in SERVERS else [*_SLOW, *own]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found
    finally:
        shutil.rmtree(place)


def main() -> int:
    """Print the figures; exit code 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--only", choices=PLACES)
    parser.add_argument("--measure", choices=PLACES, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(run_one(arguments.measure, arguments.place)))
        return 0
    good = True
    for name in [arguments.only] if arguments.only else PLACES:
        found = in_a_process_of_its_own(name)
        good = good and found["met"]
        if arguments.json:
            print(json.dumps({"loop_gap": name, **found}))
        elif "not_measured" in found:
            print(f"{name}: not measured: {found['not_measured']}")
        else:
            print(
                f"{name:9} p99.9 gap of the loop, flushes of 200 ms "
                f"(commits took up to {found['longest_commit_ms']:.0f} ms): "
                f"{found['loaded_ms']:.1f} ms, "
                f"idle {found['idle_ms']:.1f} ms: {found['more_ms']:+.1f} ms (at most +{LIMIT_MS:.0f})"
                f"{'' if found['met'] else '   MISSED'}"
            )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
