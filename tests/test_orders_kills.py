"""SIGKILL of a real bot at every step around submit, fill and cancel, times lost answers; its venue is the witness."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from order_kills import Found

KILLS = Path(__file__).parent / "order_kills.py"
PARTS = 3
"""Processes at once: a run mostly waits for expiries."""


def test_after_100_kills_around_orders_none_was_placed_twice_none_forgotten_and_no_position_is_without_a_row(
    record_property: Callable[[str, object], None],
) -> None:
    words = [sys.executable, str(KILLS), "--runs", "75", "--seed", "1"]
    running = [
        subprocess.Popen([*words, "--part", f"{part}/{PARTS}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for part in range(PARTS)
    ]  # fmt: skip
    ended = [process.communicate(timeout=240) for process in running]
    found = [msgspec.json.decode(told, type=Found) for told, _ in ended if told]
    assert len(found) == PARTS, ended
    kills = sum(one.kills for one in found)
    record_property(
        "proof:orders killed",
        {
            "SIGKILLs of the bot": kills,
            "orders at the venue": sum(one.venue_orders for one in found),
            "answers or requests lost or late": sum(one.lost for one in found),
            "placed twice": sum(len(one.twice) for one in found),
            "forgotten": sum(len(one.forgotten) for one in found),
            "positions without a row": sum(len(one.without_row) for one in found),
        },
    )
    assert [text for one in found for text in one.wrong] == []
    assert sum(one.runs for one in found) == 75
    assert kills >= 100
    assert sum(one.venue_orders for one in found) >= 200, "runs without orders prove nothing"
