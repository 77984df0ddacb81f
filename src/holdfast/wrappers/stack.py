"""Wrappers put together in their one fixed order, so that nobody has to think about it.

``Traced(Cached(Encrypted(Replicated(Retrying(a), Retrying(b)))))``: the trace counts what the caller saw, the cache
keeps what was decrypted, every copy holds the same ciphertext, and each copy is retried by itself, so that one that
is away does not hold up the others.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from ..contract import Backend
from ..errors import InvalidInputError
from .cached import Cached, Leases
from .retrying import DEADLINE_SECONDS, Retrying

_COPY_DEADLINE_SECONDS = 5.0
"""How long one of several copies is tried: the others wait for it at open, and it is asked again later anyway."""


def stack(
    first: Backend,
    *followers: Backend,
    retrying: bool = False,
    quorum: int | None = None,
    keys: Any = None,
    witness: str | os.PathLike[str] | None = None,
    cached: bool = False,
    leases: Leases | None = None,
    traced: bool = False,
    meter_provider: Any = None,
    tracer_provider: Any = None,
) -> Backend:
    """Put wrappers around one backend, or around several that are copies of each other, in the fixed order.

    Args:
        first: The backend; of several copies the one that decides and numbers the commits.
        followers: The other copies, if there are any (:class:`~holdfast.wrappers.replicated.Replicated`).
        retrying: Send again, on each copy, what is safe to send again.
        quorum: How many copies hold a commit when it returns; only with followers.
        keys: A :class:`~holdfast.wrappers.encrypted.Keyring`: encrypt with it.
        witness: File that remembers the highest commit numbers seen, for the encryption; only with ``keys``.
        cached: Serve rows from memory under a live lease.
        leases: Which keys this process alone writes; only with ``cached``.
        traced: OpenTelemetry spans and metrics.
        meter_provider: Where metrics go (default: the process's own provider); only with ``traced``.
        tracer_provider: Where spans go (default: the process's own provider); only with ``traced``.

    Returns:
        The outermost wrapper, not open yet; ``first`` itself if nothing was asked for.

    Raises:
        InvalidInputError: Options that contradict each other, or a package that is missing.
    """
    copies = [first, *followers]
    if len({id(copy) for copy in copies}) < len(copies):
        raise InvalidInputError("the same backend stands twice among the copies: a copy must be a place of its own")
    _require(quorum is None or bool(followers), "quorum", "followers: name the other copies")
    _require(witness is None or keys is not None, "witness", "keys")
    _require(leases is None or cached, "leases", "cached=True")
    _require((meter_provider or tracer_provider) is None or traced, "meter_provider and tracer_provider", "traced=True")
    patience = _COPY_DEADLINE_SECONDS if followers else DEADLINE_SECONDS
    retried = [Retrying(copy, deadline_seconds=patience) for copy in copies] if retrying else []
    inner: Backend = (retried or copies)[0]
    if followers:
        inner = _class("replicated", "Replicated")(*(retried or copies), quorum=quorum)
    if keys is not None:
        inner = _class("encrypted", "Encrypted")(inner, keys, witness=witness)
    if cached:
        inner = Cached(inner, leases=leases)
    if traced:
        outer = _class("traced", "Traced")(inner, meter_provider=meter_provider, tracer_provider=tracer_provider)
        for one in retried:
            one.observer = outer.retried  # retries happen far below: they tell the trace themselves
        inner = outer
    return inner


def _require(holds: bool, what: str, needed: str) -> None:
    if not holds:
        raise InvalidInputError(f"{what} has no meaning without {needed}")


def _class(module: str, name: str) -> Any:
    """Return a wrapper's class; its module may need an extra that is not installed, so it is imported only here."""
    return getattr(importlib.import_module(f".{module}", __package__), name)


def keys_from_environment() -> Any:
    """Return the keys that ``HOLDFAST_KEYS`` names, for a store whose name says ``encrypted+``.

    Raises:
        InvalidInputError: There are none, or the package that encrypts is missing.
    """
    return _class("keyring", "Keyring").from_env()
