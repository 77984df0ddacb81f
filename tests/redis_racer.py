"""A process that commits against others until it is killed or done: ``python redis_racer.py URL NAME COUNT LEDGER``.

It raises one shared counter ``COUNT`` times; each number that was acknowledged becomes a line of ``LEDGER`` first
written when ``commit`` has returned.
"""

from __future__ import annotations

import asyncio
import os
import sys

from holdfast.backends.redis import RedisBackend
from holdfast.contract import Key, Op
from holdfast.errors import ConflictError, UnavailableError, UnknownOutcomeError

COUNTER = Key("risk", "race", "counter")


async def run(url: str, name: str, count: int, ledger: str) -> None:
    backend = RedisBackend(url)
    while True:
        try:
            await backend.open()
            break
        except UnavailableError:
            await asyncio.sleep(0.01)
    lines = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(lines, b"ready\n")
    for n in range(1, count + 1):
        number, value = await raised(backend, Op(name, n))
        os.write(lines, b"%d %d %b\n" % (number, value, name.encode()))
    await backend.close()


async def raised(backend: RedisBackend, op: Op) -> tuple[int, int]:
    """Raise the counter by one; return the commit's number and the new value."""
    while True:
        try:
            found = (await backend.read("main", [COUNTER])).get(COUNTER)
        except UnavailableError:
            await asyncio.sleep(0.01)
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
                await asyncio.sleep(0.01)
                if not sent:
                    break
            except ConflictError:
                break


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
