"""Two copies beside the slower of them alone: ``python -m bench.replicated [--json]``.

Each figure is a ratio of two medians taken in turn in one run. Both copies and the single one hold the same 600-byte
rows; with a quorum of 2, each commit waits for one durable write after another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from pathlib import Path

from holdfast.backends.redis import RedisBackend
from holdfast.backends.sqlite import SqliteBackend
from holdfast.contract import Backend
from holdfast.wrappers.replicated import Replicated

from .sql import Side

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from servers import kind

ROUNDS = 5


async def ratios(alone: Backend, copies: Replicated) -> dict[str, float]:
    """Return how many times as long one commit takes on the copies, and their share of commits a second."""
    await alone.open()
    await copies.open()
    one, two = Side(alone), Side(copies)
    await one.one()
    await two.one()
    single: dict[Side, list[float]] = {one: [], two: []}
    many: dict[Side, list[float]] = {one: [], two: []}
    for _ in range(ROUNDS):
        for side in (one, two):
            single[side].append(await side.single())
            many[side].append(await side.many())
    await copies.close()
    await alone.close()
    median = statistics.median
    return {
        "one commit, times as long": median(single[two]) / median(single[one]),
        "64 committers, share of the rate": median(many[two]) / median(many[one]),
        "one commit, ms": 1000 * median(single[two]),
        "64 committers, commits/s": median(many[two]),
    }


async def measure() -> dict[str, dict[str, float]]:
    """Return the ratios over two SQLite files and over two Redis servers."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as name:
        place = Path(name)
        pair = Replicated(SqliteBackend(place / "a.db"), SqliteBackend(place / "b.db"))
        found["two sqlite files"] = await ratios(SqliteBackend(place / "alone.db"), pair)
        servers = [kind("valkey").start(place / f"valkey{at}") for at in range(2)]
        try:
            first, second = (RedisBackend(f"{server.url}/0") for server in servers)
            alone = RedisBackend(f"{servers[0].url}/0?prefix=alone")
            found["two redis servers"] = await ratios(alone, Replicated(first, second))
        finally:
            for server in servers:
                server.stop()
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = asyncio.run(measure())
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, figures in found.items():
        print(name)
        for what, value in figures.items():
            print(f"  {what:<36}{value:10.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
