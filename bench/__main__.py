"""Run every benchmark of the repo in turn: ``python -m bench [--json]``."""

from __future__ import annotations

import subprocess
import sys

PARTS = (
    "bench.storage",
    "bench.engine",
    "bench.backtest",
    "bench.sql",
    "bench.redis",
    "bench.mongo",
    "bench.s3",
    "bench.wrappers",
    "bench.replicated",
    "bench.loop_gap",
)


def main() -> int:
    """Run each part in a process of its own, so that one does not warm up or burden another."""
    return max(subprocess.run([sys.executable, "-m", part, *sys.argv[1:]]).returncode for part in PARTS)


if __name__ == "__main__":
    sys.exit(main())
