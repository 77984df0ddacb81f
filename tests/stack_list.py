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


def place_of(root: Path, name: str) -> Path:
    """Return an own directory under ``root`` for one of several backends of a stack."""
    found = root / name
    found.mkdir(exist_ok=True)
    return found


def _whole(*bases: str, quorum: int | None = None) -> Factory:
    """Return a factory of the full stack, over one backend or over several that are copies."""

    def make(place: Path) -> Backend:
        alone = len(bases) == 1
        copies = [BACKENDS[base](place if alone else place_of(place, f"{at}-{base}")) for at, base in enumerate(bases)]
        return stack(
            *copies, retrying=True, quorum=quorum, keys=KEYS, cached=True, leases=OneWriter(), traced=True
        )  # fmt: skip

    return make


STACKS: dict[str, Factory] = {
    **{f"{name}({base})": _alone(ALONE[name], BACKENDS[base]) for name in ALONE for base in CHEAP},
    **{f"all({base})": _whole(base) for base in BACKENDS},
    "all(memory, memory, memory)": _whole("memory", "memory", "memory", quorum=2),
    "all(redis, postgres, sqlite)": _whole("redis", "postgres", "sqlite", quorum=2),
    "all(mongo, s3, file)": _whole("mongo", "s3", "file", quorum=3),
}
"""What the conformance suite runs over, besides the bare backends and the copies without other wrappers."""

BELONG_TO_ONE_PROCESS = tuple(name for name in STACKS if "memory" in name or "file" in name)
"""Stacks that cannot be shared by several processes."""


def material_of(name: str) -> Material:
    """Return what the suite writes: a little less than 8 MiB where it is encrypted, as base64 makes it longer."""
    return PLAIN if name.startswith(("cached", "retrying", "traced")) else PLAIN._replace(most_bytes=MAX_PLAIN_BYTES)
