"""What the engine takes from its surroundings, replaced while histories are played: chance, process and machine."""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ... import spans, store, writer
from ...engine import account, blocks, emergency, health, ownership, worker
from .journal import at_once, simulated_emergency


class _Instead:
    """A module, of which some members are others."""

    def __init__(self, module: Any, **others: Any) -> None:
        self._module = module
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Tokens:
    """Random texts that are the same in each playing of a history."""

    def __init__(self) -> None:
        self._count = 0

    def restart(self) -> None:
        """Begin anew, for another history."""
        self._count = 0

    def token_hex(self, nbytes: int = 4) -> str:
        """Return the next one."""
        self._count += 1
        return f"{self._count:0{2 * nbytes}x}"

    def token_bytes(self, nbytes: int = 16) -> bytes:
        """Return the next one, as bytes."""
        self._count += 1
        return self._count.to_bytes(nbytes, "big")


tokens = Tokens()


@contextmanager
def simulated_surroundings() -> Iterator[None]:
    """Replace them within the ``with`` block; for all threads, so play histories in a process of their own."""
    named = _Instead(socket, gethostname=lambda: "simulated")
    process = _Instead(os, getpid=lambda: 1)
    replaced: list[tuple[Any, str, Any]] = [
        (writer, "secrets", tokens), (store, "secrets", tokens), (spans, "secrets", tokens),
        (ownership, "socket", named), (ownership, "os", process),
        (worker, "socket", named), (worker, "os", process), (account, "socket", named), (account, "os", process),
        (worker, "machine", lambda: ""), (worker, "started_ticks", lambda pid: 0),
        (health, "Emergency", simulated_emergency), (emergency, "_in_thread", at_once), (blocks, "secrets", tokens),
        # A watcher that looks more often only takes more steps.
        (ownership, "_LONGEST_LOOK_SECONDS", 90.0), (ownership, "_LOOKS_PER_LEASE", 6),
    ]  # fmt: skip
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    log = logging.getLogger("holdfast")
    was_disabled, state = log.disabled, random.getstate()
    log.disabled = True
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        log.disabled = was_disabled
        random.setstate(state)
