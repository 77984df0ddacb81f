"""Wrapper stacks, by name, for the conformance suite and the histories: every wrapper over every backend once.

Each wrapper stands alone over the backends that cost nothing; over each server one stack holds all of them. A new
wrapper is one line in ``ALONE``; a new backend needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from backend_list import BACKENDS

from holdfast.contract import Backend, Key
from holdfast.testing.conformance import PLAIN, Factory, Material
from holdfast.wrappers.cached import Cached
from holdfast.wrappers.encrypted import MAX_PLAIN_BYTES, Encrypted
from holdfast.wrappers.keyring import Keyring
from holdfast.wrappers.retrying import Retrying
from holdfast.wrappers.stack import stack
from holdfast.wrappers.traced import Traced


class OneWriter:
    """The lease of a test that writes from one place only."""

    def epoch(self, scope: str, key: Key) -> int | None:
        """Return the epoch that never ends."""
        return 1


def _cached(backend: Backend) -> Backend:
    return Cached(backend, leases=OneWriter())


def _encrypted(backend: Backend) -> Backend:
    return Encrypted(backend, KEYS)


KEYS = Keyring({"test": bytes(range(32))})


ALONE: dict[str, Callable[[Backend], Backend]] = {
    "cached": _cached,
    "encrypted": _encrypted,
    "retrying": Retrying,
    "traced": Traced,
}
"""Each wrapper by itself."""

CHEAP = ("memory", "file", "sqlite")
"""Backends that need no server."""


def _alone(wrapper: Callable[[Backend], Backend], base: Factory) -> Factory:
    return lambda place: wrapper(base(place))


def _whole(base: Factory) -> Factory:
    return lambda place: stack(base(place), retrying=True, keys=KEYS, cached=True, leases=OneWriter(), traced=True)


STACKS: dict[str, Factory] = {
    **{f"{name}({base})": _alone(ALONE[name], BACKENDS[base]) for name in ALONE for base in CHEAP},
    **{f"all({base})": _whole(BACKENDS[base]) for base in BACKENDS},
}
"""What the conformance suite runs over, besides the bare backends."""

BELONG_TO_ONE_PROCESS = tuple(name for name in STACKS if "(memory" in name or "(file" in name)
"""Stacks that cannot be shared by several processes."""


def material_of(name: str) -> Material:
    """Return what the suite writes: a little less than 8 MiB where it is encrypted, as base64 makes it longer."""
    return PLAIN if name.startswith(("cached", "retrying", "traced")) else PLAIN._replace(most_bytes=MAX_PLAIN_BYTES)


def place_of(root: Path, name: str) -> Path:
    """Return an own directory under ``root`` for one of several backends of a stack."""
    found = root / name
    found.mkdir(exist_ok=True)
    return found
