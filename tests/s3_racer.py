"""A process that commits against others: ``python s3_racer.py URL NAME COUNT LEDGER``; see ``redis_racer.py``.

Each number that was acknowledged becomes a line of ``LEDGER``, written when ``commit`` has returned.
"""

from __future__ import annotations

import asyncio
import os
import sys

from holdfast.backends.s3 import S3Backend
from holdfast.contract import Key, Op
from holdfast.errors import ConflictError, UnavailableError, UnknownOutcomeError

COUNTER = Key("risk", "race", "counter")


async def run(url: str, name: str, count: int, ledger: str) -> None:
    backend = S3Backend(url)
    await backend.open()
    lines = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for n in range(1, count + 1):
        number, value = await raised(backend, Op(name, n))
        os.write(lines, b"%d %d %b\n" % (number, value, name.encode()))
    await backend.close()


async def raised(backend: S3Backend, op: Op) -> tuple[int, int]:
    """Raise the counter by one; return the commit's number and the new value."""
    while True:
        try:
            found = (await backend.read("main", [COUNTER])).get(COUNTER)
        except UnavailableError:
            await asyncio.sleep(0.02)
            continue
        value = int(found.payload) + 1 if found else 1
        expect = {COUNTER: found.version if found else 0}
        sent = False
        while True:
            try:
                return await backend.commit("main", {COUNTER: b"%d" % value}, expect, op=op), value
            except UnknownOutcomeError:
                sent = True
            except UnavailableError:
                await asyncio.sleep(0.02)
                if not sent:
                    break
            except ConflictError:
                break


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
