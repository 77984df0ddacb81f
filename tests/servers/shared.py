"""One server of a kind for all tests of a process that need no other settings: started at first use."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from zlib import crc32

from . import Running, require

_RUNNING: dict[str, Running] = {}


def shared(name: str) -> Running:
    """Return the server; the test fails where it cannot be had (see :func:`servers.require`)."""
    running = _RUNNING.get(name)
    if running is None:
        kind = require(name)
        directory = Path(tempfile.mkdtemp(prefix=f"holdfast-{name}-"))
        running = _RUNNING[name] = kind.start(directory)
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        atexit.register(running.stop)  # runs first: the last one registered does
    return running


def own_name(place: Path) -> str:
    """Return a short name for a test's directory, to be a prefix, a schema or a bucket of its own."""
    return f"t{crc32(str(place).encode()):08x}"
