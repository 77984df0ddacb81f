"""A limit of three open positions, shared by contexts of several processes, is never passed: at no commit."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from backend_list import URLS
from limits_process import LIMIT
from owner_records import Records

from holdfast.contract import Survives
from holdfast.invariants import check_store
from holdfast.store import Store
from holdfast.urls import open_backend

PROCESSES, ENTRIES = 4, 200
_LIMIT_SECONDS = 240


def ended(command: list[str], environment: dict[str, str]) -> tuple[list[subprocess.Popen[str]], list[Any]]:
    """Run the processes to their end; return them and what each said."""
    running = [
        subprocess.Popen(
            [*command, f"process{n}", str(ENTRIES)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for n in range(PROCESSES)
    ]  # fmt: skip
    try:
        return running, [one.communicate(timeout=_LIMIT_SECONDS) for one in running]
    finally:
        for one in running:
            one.kill()
            one.wait()


@pytest.mark.parametrize("name", ["sqlite", "redis", "postgres"])
async def test_four_processes_that_enter_two_hundred_times_each_never_hold_more_than_three_positions(
    name: str, tmp_path: Path, record_property: Any
) -> None:
    url = URLS[name](tmp_path)
    (tmp_path / "records").mkdir()
    environment = {**os.environ, "HOLDFAST_TEST_RECORD": str(tmp_path / "records")}
    script = str(Path(__file__).with_name("limits_process.py"))
    running, said = await asyncio.to_thread(ended, [sys.executable, script, url], environment)
    assert [one.returncode for one in running] == [0] * PROCESSES, "".join(err for _, err in said)[-2000:]
    counted = [tuple(map(int, out.split())) for out, _ in said]
    opened, rejected = sum(one for one, _ in counted), sum(two for _, two in counted)
    assert all(one >= ENTRIES for one, _ in counted)

    records = Records(tmp_path / "records")
    assert records.most_open() == LIMIT, "reached, and never passed"
    assert sum(taken for _, _, taken in records.slots) == opened
    numbers = [number for number, _, _ in records.slots]
    assert len(set(numbers)) == len(numbers) == 2 * opened, "no change of a slot is missing from the records"
    store = Store(open_backend(url), require=Survives.NOTHING)
    await store.open(read_only=True)
    try:
        assert await check_store(store) == []
    finally:
        await store.close()
    record_property("proof:shared limits", {"entries": opened, "refused": rejected, "over the limit": 0})
