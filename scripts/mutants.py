"""Plant one defect after another in a copy of the source and see that the tests catch it: ``make mutants``.

The working tree is never touched. Exit code 1 if a mutant survives, or if its text is not found exactly once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from mutants import HANDFUL, MUTANTS, Mutant  # noqa: E402

TIMEOUT_SECONDS = 240


class Outcome(NamedTuple):
    """How one mutant fared."""

    mutant: Mutant
    caught: bool
    how: str
    seconds: float


def try_mutant(mutant: Mutant, scratch: Path) -> Outcome:
    """Apply a mutant to its own copy of the source and run its tests on that; without a file, change nothing."""
    began = time.monotonic()

    def outcome(caught: bool, how: str) -> Outcome:
        return Outcome(mutant, caught, how, time.monotonic() - began)

    place = Path(tempfile.mkdtemp(dir=scratch))
    shutil.copytree(ROOT / "src", place / "src", ignore=shutil.ignore_patterns("__pycache__"))
    if mutant.file:
        files = mutant.found_in(place / "src")
        if len(files) != 1:
            return outcome(False, f"its text stands {len(files)} times in {mutant.file}: mend tests/mutants.py")
        files[0].write_text(files[0].read_text().replace(mutant.old, mutant.new))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header",
               "--show-capture=no", "--tb=line", f"--basetemp={place / 'tmp'}", *shlex.split(mutant.tests)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(place / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return outcome(False, f"the tests did not end within {TIMEOUT_SECONDS} s, which proves nothing")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if done.returncode == 1:
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return outcome(True, failed[0].split(" - ")[0].removeprefix("FAILED ")[:100] if failed else "failed")
    if done.returncode == 0:
        return outcome(False, "every test passed")
    said = (done.stdout + done.stderr).strip().splitlines()
    return outcome(False, f"pytest ended with {done.returncode}: {said[-1] if said else ''}")


def main(argv: Sequence[str] | None = None) -> int:
    """Try the mutants and print a table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--handful", action="store_true", help="only those that make test tries")
    parser.add_argument("--only", default="", metavar="TEXT", help="only those with TEXT in their name")
    parser.add_argument("--jobs", type=int, default=2, metavar="N")
    options = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if options.only in m.name and (not options.handful or m.name in HANDFUL)]
    width = max(len(mutant.name) for mutant in chosen)
    sound = [Mutant("nothing changed", "", "", "", tests) for tests in dict.fromkeys(m.tests for m in chosen)]
    survived = 0
    with tempfile.TemporaryDirectory(prefix="holdfast-mutants-") as scratch, ThreadPoolExecutor(options.jobs) as pool:
        for found in pool.map(lambda mutant: try_mutant(mutant, Path(scratch)), sound):
            if found.how != "every test passed":  # then a failure on a mutant would prove nothing
                print(f"the tests fail without a mutant: {found.mutant.tests}: {found.how}")
                return 1
        for found in pool.map(lambda mutant: try_mutant(mutant, Path(scratch)), chosen):
            survived += not found.caught
            word = "caught  " if found.caught else "SURVIVED"
            print(f"{found.mutant.name:<{width}}  {word}  {found.seconds:5.1f} s  {found.how}", flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - survived} caught, {survived} survived")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
