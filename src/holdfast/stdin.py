"""Servers that end with whoever started them: their standard input closes then."""

from __future__ import annotations

import asyncio
import os
import stat
import sys


async def until_stdin_closes() -> None:
    """Return when standard input is closed; what comes in is thrown away."""
    mode = os.fstat(0).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or sys.stdin.isatty()):
        return  # a file or /dev/null is at its end already
    closed = asyncio.get_running_loop().create_future()

    def readable() -> None:
        try:
            gone = not os.read(0, 4096)
        except OSError:
            gone = True
        if gone and not closed.done():
            closed.set_result(None)

    loop = asyncio.get_running_loop()
    loop.add_reader(0, readable)
    try:
        await closed
    finally:
        loop.remove_reader(0)
