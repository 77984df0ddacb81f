"""A handful of planted defects, each of which the tests must catch; ``make mutants`` tries all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mutants import HANDFUL, MUTANTS

ROOT = Path(__file__).parent.parent


def test_a_handful_of_defects_is_caught() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "mutants.py"), "--handful", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_defect_stands_for_a_text_that_is_there_once() -> None:
    """So that a change of the source cannot make a mutant an empty threat."""
    found = {mutant.name: mutant.found_in(ROOT / "src") for mutant in MUTANTS}
    wrong = [f"{name}: {len(files)} times" for name, files in found.items() if len(files) != 1]
    assert wrong == []
    assert len(MUTANTS) >= 15
    assert set(HANDFUL) <= {mutant.name for mutant in MUTANTS}
