"""SIGKILL of a real bot at every step around submit, fill and cancel, times lost answers; its venue is the witness."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
from backend_list import URLS
from order_kills import Found

KILLS = Path(__file__).parent / "order_kills.py"
PARTS = 3
"""Processes at once: a run mostly waits for expiries."""
RUNS = 75
RUNS_ON_A_SERVER = 4
FIRST_ON_A_SERVER, SEED_ON_A_SERVER = 5, 3
"""One killed twice, as if elsewhere, and one once; one taken over, one stopped: each at its orders."""
SHARED = sorted(URLS.keys() - {"memory", "file"})

Record = Callable[[str, object], None]


def hunted(record_property: Record, where: str, words: Sequence[str], parts: int) -> list[Found]:
    """Run parts of a hunt at once; put what they found on record, and see that nothing was wrong."""
    command = [sys.executable, str(KILLS), *words]
    running = [
        subprocess.Popen([*command, "--part", f"{part}/{parts}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for part in range(parts)
    ]  # fmt: skip
    ended = [process.communicate(timeout=240) for process in running]
    found = [msgspec.json.decode(told, type=Found) for told, _ in ended if told]
    assert len(found) == parts, ended
    record_property(
        f"proof:orders killed{where}",
        {
            "SIGKILLs of the bot": sum(one.kills for one in found),
            "owners stopped past their lease and woken": sum(one.pauses for one in found),
            "orders at the venue": sum(one.venue_orders for one in found),
            "answers or requests lost or late": sum(one.lost for one in found),
            "possible duplicates told where a venue promises little": sum(one.told for one in found),
            "placed twice": sum(len(one.twice) for one in found),
            "forgotten": sum(len(one.forgotten) for one in found),
            "positions without a row": sum(len(one.without_row) for one in found),
        },
    )
    assert [text for one in found for text in one.wrong] == []
    return found


def test_after_100_kills_around_orders_none_was_placed_twice_none_forgotten_and_no_position_is_without_a_row(
    record_property: Record,
) -> None:
    found = hunted(record_property, "", ["--runs", str(RUNS), "--seed", "1"], PARTS)
    assert sum(one.runs for one in found) == RUNS
    assert sum(one.kills for one in found) >= 100
    assert sum(one.venue_orders for one in found) >= 200, "runs without orders prove nothing"
    assert sum(one.told for one in found) > 0


@pytest.mark.parametrize("name", SHARED)
def test_where_processes_share_a_store_a_successor_that_waits_takes_the_orders_over_and_the_replaced_send_no_more(
    name: str, tmp_path: Path, record_property: Record
) -> None:
    words = ["--store", URLS[name](tmp_path), "--runs", str(RUNS_ON_A_SERVER)]
    words += ["--first", str(FIRST_ON_A_SERVER), "--seed", str(SEED_ON_A_SERVER)]
    (found,) = hunted(record_property, " on shared stores", words, 1)
    assert found.runs == RUNS_ON_A_SERVER
    assert found.kills >= 3
    assert found.pauses + found.blocked >= 1
    assert found.takeovers >= 1
    assert found.lost >= 1
    assert found.venue_orders >= RUNS_ON_A_SERVER
