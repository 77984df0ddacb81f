"""A process that raises a counter on copies, against others: ``python replicated_worker.py STORE NAME TIMES LEDGER``.

Each acknowledged commit becomes a line ``number value`` of LEDGER, written when ``commit`` has returned.
"""

from __future__ import annotations

import asyncio
import os
import sys

from holdfast.contract import Backend, Key, Op
from holdfast.errors import ConflictError, FailedError, UnavailableError, UnknownOutcomeError
from holdfast.urls import open_backend

COUNTER = Key("risk", "race", "counter")


async def raised(store: Backend, op: Op) -> tuple[int, int]:
    """Raise the counter by one, through whatever happens; return the commit's number and the new value."""
    while True:
        try:
            found = (await store.read("main", [COUNTER])).get(COUNTER)
        except UnavailableError:
            await asyncio.sleep(0.01)
            continue
        value = int(found.payload) + 1 if found else 1
        expect = {COUNTER: found.version if found else 0}
        in_doubt = False
        while True:
            try:
                return await store.commit("main", {COUNTER: b"%d" % value}, expect, op=op), value
            except (UnknownOutcomeError, FailedError):
                in_doubt = True
                await asyncio.sleep(0.01)
            except UnavailableError:
                await asyncio.sleep(0.01)
                if not in_doubt:
                    break
            except ConflictError:
                break


async def run(name: str, writer: str, times: int, ledger: str) -> None:
    """Raise the counter so many times."""
    store = open_backend(name)
    while True:
        try:
            await store.open()
            break
        except UnavailableError:
            await asyncio.sleep(0.05)
    lines = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(lines, b"ready\n")
    for n in range(1, times + 1):
        number, value = await raised(store, Op(writer, n))
        os.write(lines, b"%d %d\n" % (number, value))
    await store.close()


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
