"""What the tests of the file backend share: keys, commits, and the places of its files."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path

from holdfast.backends.file import FileBackend
from holdfast.contract import Head, Key, Op, Record

KEY = Key("signal", "BTCUSDT_trend_binance", "BTCUSDT")
_numbers = itertools.count(1)


def key(number: int) -> Key:
    """Return a key of a row of its own."""
    return Key("signal", f"S{number}_trend_binance", f"S{number}")


def payload(number: int) -> bytes:
    """Return a small JSON payload."""
    return b'{"price":%d.5,"note":"n%d"}' % (number, number)


async def put(backend: FileBackend, at: Key, value: bytes | None, *, expect: int | None = None) -> int:
    """Commit one row under an op of its own."""
    return await backend.commit(
        "main", {at: value}, {} if expect is None else {at: expect}, op=Op(f"w{next(_numbers)}", 1)
    )


async def get(backend: FileBackend, at: Key = KEY) -> bytes | None:
    """Return the payload of one row."""
    record = (await backend.read("main", [at])).get(at)
    return None if record is None else record.payload


async def everything(backend: FileBackend) -> dict[str, tuple[Head, dict[Key, Record]]]:
    """Return all that the backend holds."""
    found = {}
    async for scope in backend.scopes():
        keys = [at async for at in backend.keys(scope)]
        found[scope] = (await backend.head(scope), await backend.read(scope, keys))
    return found


async def closed_store(place: Path, rows: int = 2) -> Path:
    """Make a store with a few rows, close it, and return its log."""
    backend = FileBackend(place)
    await backend.open()
    for number in range(rows):
        await put(backend, key(number), payload(number))
    await backend.close()
    return place / ".holdfast" / "commit.log"


async def crashed_store(place: Path, rows: int = 3) -> Path:
    """Make a store with a few rows whose process died without closing it, and return its log."""
    backend = FileBackend(place)
    await backend.open()
    for number in range(rows):
        await put(backend, key(number), payload(number))
    log = place / ".holdfast" / "commit.log"
    text = log.read_bytes()
    await backend.close()
    log.write_bytes(text)
    (log.parent / "witness").unlink(missing_ok=True)
    return log


async def until(true: Callable[[], bool], *, seconds: float = 10) -> None:
    """Wait until something is true, looking often."""
    for _ in range(int(seconds / 0.005)):
        if true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen in time")


async def raised(call: Awaitable[object]) -> BaseException | None:
    """Return what awaiting raises, if anything."""
    try:
        await call
    except Exception as error:
        return error
    return None
