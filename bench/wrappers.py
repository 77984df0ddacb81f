"""What each wrapper costs, as a ratio to the bare backend: ``python -m bench.wrappers [--json]``.

Over memory, where a call costs next to nothing, the ratio is the wrapper's own work; over the file store it is what a
bot pays beside a flush. Ratios are medians of neighbours in time in one run, so that the machine's moods cancel out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider

from holdfast.backends.file import FileBackend
from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Backend, Key, Op
from holdfast.wrappers.cached import Cached
from holdfast.wrappers.encrypted import Encrypted
from holdfast.wrappers.keyring import Keyring
from holdfast.wrappers.retrying import Retrying
from holdfast.wrappers.stack import stack
from holdfast.wrappers.traced import Traced

BUILD = Path(__file__).resolve().parent.parent / "build"
ROW = json.dumps({"id": "BTCUSDT", "note": "x" * 560, "priceOpen": 42_000.5}).encode()
KEYS = [Key("signal", f"SYM{number}_strategy_exchange", f"SYM{number}") for number in range(4)]
TURNS = 25
CALLS = {"memory": 400, "file": 40}
LIMIT = 1.3
"""Of the four wrappers without encryption, beside a flush: a commit to the file store."""


def _keys() -> Keyring:
    return Keyring({"bench": b"k" * 32})


def _told(backend: Backend) -> Backend:
    """Trace with the SDK at work: metrics are added up, and each span is made and thrown away."""
    meters = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)
    return Traced(backend, meter_provider=meters, tracer_provider=TracerProvider(shutdown_on_exit=False))


WRAPPERS: dict[str, Callable[[Backend], Backend]] = {
    "Retrying": Retrying,
    "Cached": Cached,
    "Traced, no SDK": Traced,
    "Traced, with SDK": _told,
    "Encrypted": lambda backend: Encrypted(backend, _keys()),
    "all, no SDK": lambda backend: stack(backend, retrying=True, keys=_keys(), cached=True, traced=True),
}
UNLIMITED = ("Encrypted", "all, no SDK", "Traced, with SDK")


class Side:
    """A backend under test: commits one row, as the engine does, or reads four."""

    def __init__(self, backend: Backend, calls: int) -> None:
        self.backend = backend
        self._calls = calls
        self._n = 0
        self._version = 0

    async def commits(self) -> float:
        """Return the median seconds of a commit of one row with its version expected."""
        times = []
        for _ in range(self._calls):
            self._n += 1
            begun = time.perf_counter()
            self._version = await self.backend.commit(
                "bench", {KEYS[0]: ROW}, {KEYS[0]: self._version}, op=Op("writer", self._n)
            )
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    async def reads(self) -> float:
        """Return the median seconds of a read of four rows."""
        times = []
        for _ in range(self._calls):
            begun = time.perf_counter()
            found = await self.backend.read("bench", KEYS)
            times.append(time.perf_counter() - begun)
            assert len(found) == len(KEYS)
        return statistics.median(times)


async def _figures(name: str, base: str, ours: Backend, bare: Backend) -> dict[str, Any]:
    sides = Side(ours, CALLS[base]), Side(bare, CALLS[base])
    for side in sides:
        await side.backend.open()
        await side.backend.commit("bench", dict.fromkeys(KEYS[1:], ROW), {}, op=Op("first", 1))
        await side.commits(), await side.reads()  # to warm up
    try:
        commits = [(await sides[0].commits(), await sides[1].commits()) for _ in range(TURNS)]
        reads = [(await sides[0].reads(), await sides[1].reads()) for _ in range(TURNS)]
    finally:
        for side in sides:
            await side.backend.close()
    return {
        "wrapper": name,
        "over": base,
        "commit_us": round(statistics.median(a for a, _ in commits) * 1e6, 1),
        "bare_commit_us": round(statistics.median(b for _, b in commits) * 1e6, 1),
        "commit_ratio": round(statistics.median(a / b for a, b in commits), 2),
        "read_us": round(statistics.median(a for a, _ in reads) * 1e6, 1),
        "bare_read_us": round(statistics.median(b for _, b in reads) * 1e6, 1),
        "read_ratio": round(statistics.median(a / b for a, b in reads), 2),
    }


async def _all(place: Path, as_json: bool) -> bool:
    ok = True
    bases: dict[str, Callable[[str], Backend]] = {
        "memory": lambda name: MemoryBackend(),
        "file": lambda name: FileBackend(place / name),
    }
    for base, make in bases.items():
        for at, (name, wrap) in enumerate(WRAPPERS.items()):
            found = await _figures(name, base, wrap(make(f"ours{at}")), make(f"bare{at}"))
            limited = base == "file" and name not in UNLIMITED
            ok = ok and not (limited and found["commit_ratio"] > LIMIT)
            _show(found, as_json=as_json, limited=limited)
    return ok


def _show(found: dict[str, Any], *, as_json: bool, limited: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    print(
        f"{found['wrapper']:<17} over {found['over']:<7}"
        f" commit {found['commit_us']:>7} µs, bare {found['bare_commit_us']:>7}: {found['commit_ratio']:>5}x"
        f"{f' (at most {LIMIT})' if limited else '':<14}"
        f" 4 rows read {found['read_us']:>6} µs, bare {found['bare_read_us']:>6}: {found['read_ratio']:>5}x"
    )


def main() -> int:
    """Print the figures; the exit code is 1 if a wrapper costs too much beside a flush."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    BUILD.mkdir(exist_ok=True)  # on a disk, where /tmp may not be
    with tempfile.TemporaryDirectory(prefix="bench-", dir=BUILD) as place:
        return int(not asyncio.run(_all(Path(place), arguments.json)))


if __name__ == "__main__":
    sys.exit(main())
