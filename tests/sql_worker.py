"""A process of its own over a shared store: ``python sql_worker.py TARGET count TIMES WRITER`` or ``… pour WRITER``.

``count`` raises a counter under ``expect`` so many times; ``pour`` commits without end and says each that returned.
"""

from __future__ import annotations

import asyncio
import sys

from holdfast.backends.mongo import MongoBackend
from holdfast.backends.postgres import PostgresBackend
from holdfast.backends.sqlite import SqliteBackend
from holdfast.contract import Backend, Key, Op
from holdfast.errors import ConflictError

COUNTER = Key("entity", "counter", "total")


def backend(target: str) -> Backend:
    """Return the backend for a URL or a path."""
    if target.startswith("postgresql:"):
        return PostgresBackend(target, deadline_seconds=20)
    if target.startswith("mongodb:"):
        return MongoBackend(f"{target}&deadline_seconds=20")
    return SqliteBackend(target, deadline_seconds=20)


def own_key(writer: str) -> Key:
    """Return the key that only this writer writes."""
    return Key("entity", "poured", writer)


async def raise_counter(store: Backend, writer: str, times: int) -> list[int]:
    """Read, raise and write the counter; return the numbers of the commits that won."""
    numbers = []
    for n in range(1, times + 1):
        while True:
            record = (await store.read("main", [COUNTER])).get(COUNTER)
            value = int(record.payload) if record else 0
            version = record.version if record else 0
            try:
                changes: dict[Key, bytes | None] = {COUNTER: b"%d" % (value + 1)}
                numbers.append(await store.commit("main", changes, {COUNTER: version}, op=Op(writer, n)))
                break
            except ConflictError:
                await asyncio.sleep(0)
    return numbers


async def pour(store: Backend, writer: str) -> None:
    """Commit one after another, each expecting the one before, and say each that returned."""
    key, version, n = own_key(writer), 0, 0
    while True:
        n += 1
        version = await store.commit("main", {key: b"%d" % n}, {key: version}, op=Op(writer, n))
        print(n, version, flush=True)


async def main(target: str, verb: str, *words: str) -> None:
    """Do what the command line says."""
    store = backend(target)
    await store.open()
    try:
        if verb == "count":
            times, writer = words
            print(*await raise_counter(store, writer, int(times)))
        else:
            await pour(store, words[0])
    finally:
        await store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
