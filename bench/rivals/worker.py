"""The process of one Python side: a JSON order a line on standard input, a JSON answer a line on standard output.

    python -m bench.rivals.worker MODULE SIDE PLACE ROW_FILE [URL]

Imports nothing but the side's own module, since each side's interpreter has other packages.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol


class Side(Protocol):
    """One way of keeping rows; ``row`` is a dict, and number says which of them."""

    def __init__(self, place: Path, row: dict[str, Any], url: str) -> None: ...

    async def open(self) -> None:
        """Open what lies there, or make it."""

    async def write(self, number: int, turn: int) -> None:
        """Return when the row is as durable as this side makes it."""

    async def group(self, lanes: int, each: int) -> None:
        """Let many writers write at once, each its own row again and again."""

    async def read_all(self, count: int) -> int:
        """Read every row, parsed, and return how many there are."""

    async def close(self) -> None:
        """Let go of everything."""


class Turns:
    """Carries out orders on one side."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._turn = 0

    async def open(self) -> dict[str, Any]:
        await self._side.open()
        return {}

    async def sequence(self, count: int) -> dict[str, Any]:
        """Write one row again and again, each write awaited."""
        times = []
        for _ in range(count):
            self._turn += 1
            began = time.perf_counter()
            await self._side.write(0, self._turn)
            times.append(time.perf_counter() - began)
        return {"times": times}

    async def group(self, lanes: int, each: int) -> dict[str, Any]:
        began = time.perf_counter()
        await self._side.group(lanes, each)
        return {"seconds": time.perf_counter() - began}

    async def fill(self, count: int) -> dict[str, Any]:
        for number in range(count):
            await self._side.write(number, 1)
        return {}

    async def cold(self, count: int) -> dict[str, Any]:
        """Open and read all, in a process that has loaded its code but no data."""
        began = time.perf_counter()
        await self._side.open()
        rows = await self._side.read_all(count)
        return {"rows": rows, "seconds": time.perf_counter() - began}


async def serve(side: Side) -> None:
    """Answer orders until the input ends or says so."""
    turns = Turns(side)
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        what = order.pop("do")
        if what == "end":
            break
        began = time.time()
        try:
            answer = await getattr(turns, what)(**order)
            answer |= {"began": began, "ended": time.time()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    await side.close()


def main() -> None:
    """Make the side and serve it."""
    module, name, place, row_file, url = [*sys.argv[1:], ""][:5]
    row = json.loads(Path(row_file).read_text())
    asyncio.run(serve(getattr(importlib.import_module(module), name)(Path(place), row, url)))


if __name__ == "__main__":
    main()
