"""What the tests of both SQL backends do with processes of their own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from sql_worker import COUNTER, backend, own_key

from holdfast.contract import Op
from holdfast.errors import ConflictError

_WORKER = [sys.executable, str(Path(__file__).parent / "sql_worker.py")]


async def race_processes(target: str, processes: int, times: int) -> None:
    """Let processes raise one counter; no increment may be lost, and no number given twice."""
    store = backend(target)
    await store.open()
    racing = [
        await asyncio.create_subprocess_exec(
            *_WORKER, target, "count", str(times), f"racer-{at}", stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for at in range(processes)
    ]
    numbers: list[int] = []
    for process in racing:
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        numbers += map(int, out.split())
    record = (await store.read("main", [COUNTER]))[COUNTER]
    assert int(record.payload) == processes * times, "each acknowledged increment counts once"
    assert len(set(numbers)) == processes * times
    assert (await store.head("main")).number == max(numbers)
    await store.close()


async def kill_a_pouring_process(target: str, after: int, *, writer: str) -> int:
    """SIGKILL a process after so many acknowledged commits; return how many were found, none of them lost.

    What it acknowledged last may lie one behind what is stored: it died between the commit and its saying so.
    """
    process = await asyncio.create_subprocess_exec(*_WORKER, target, "pour", writer, stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = [await process.stdout.readline() for _ in range(after)]
    process.kill()
    said += (await process.stdout.read()).splitlines(keepends=True)
    await process.wait()
    acknowledged = [tuple(map(int, line.split())) for line in said if line.endswith(b"\n")]
    last_n, last_version = acknowledged[-1]
    store = backend(target)
    await store.open()
    try:
        record = (await store.read("main", [own_key(writer)]))[own_key(writer)]
        stored = int(record.payload)
        assert stored in (last_n, last_n + 1), (stored, last_n)
        assert (await store.head("main")).writers[writer].n == stored
        # Sending the last op again, as its sender would have done, applies nothing twice.
        try:
            number = await store.commit("main", {own_key(writer): b"0"}, {own_key(writer): 0}, op=Op(writer, last_n))
            assert (number, stored) == (last_version, last_n)
        except ConflictError:
            assert stored == last_n + 1
        return len(acknowledged)
    finally:
        await store.close()
