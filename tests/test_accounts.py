"""One record for each venue account, between processes: one scope of a store trades it, one at a time acts on it all.

What two processes on different stores do about one account, nothing that they share can tell: there the recovery plan
calls the other's orders and positions foreign (``test_recovery_venue.py``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from backend_list import URLS

COUNT = 10
SHARED = sorted(URLS.keys() - {"memory", "file"})


def both(url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run two processes that claim the same accounts at the same time, each from a scope of its own."""
    script = str(Path(__file__).with_name("account_process.py"))
    running = [
        subprocess.Popen(
            [sys.executable, script, url, scope, str(COUNT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for scope in ("one", "two")
    ]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        one, two = (json.loads(process.communicate(timeout=60)[0]) for process in running)
        return one, two
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("name", SHARED)
def test_of_two_scopes_that_claim_an_account_at_once_one_trades_it_and_the_other_is_told_who_does(
    name: str, tmp_path: Path
) -> None:
    one, two = both(URLS[name](tmp_path))
    assert sorted(one["mine"] + two["mine"]) == list(range(COUNT)), "each account is traded by exactly one"
    assert all("is traded by the scope 'two' of this store, not by 'one'" in text for text in one["refused"])
    assert all("is traded by the scope 'one' of this store, not by 'two'" in text for text in two["refused"])
    epochs = one["epochs"] + two["epochs"]
    assert sorted(epochs) == list(range(1, 2 * COUNT + 1)), "whoever acts on the whole account has an epoch of its own"
