"""Which rows this process alone writes: those of a context that it owns, while its lease runs.

A cache in the store's stack may serve such rows from memory (:mod:`holdfast.wrappers.cached`, which knows nothing of
the engine). Not leased, because others write them by design:

* ``owner``: whoever takes the context over; ``guard`` and ``risk``: every context of the profile; ``ledger``.
* ``signal``, ``schedule``, ``partial``: an adapter of the documents, in any process, may put such a row.
"""

from __future__ import annotations

from typing import Any, Protocol

from ..contract import Key
from ..domains import context_key
from ..errors import FencedError
from ..names import Context
from ..rows import Owner
from ..store import Store

LEASED_DOMAINS = frozenset(("session", "outbox", "outage"))


class Owning(Protocol):
    """A session, as its worker knows it."""

    @property
    def context(self) -> Context: ...

    @property
    def owner(self) -> Owner | None:
        """The owner row under which it commits; None before it owns, and from the beginning of its end."""

    @property
    def is_proven(self) -> bool:
        """Whether the context was shown to be its own since the lease ran out the last time."""

    def lapsed(self) -> None:
        """The lease had run out and was taken again: show that the context is still one's own."""

    def fence(self, error: FencedError) -> None:
        """Somebody else has taken the context over."""


class Held(Protocol):
    """A sign of life, as its leases know it."""

    @property
    def is_held(self) -> bool:
        """Whether the lease still runs, with the margin."""


class Leases:
    """Tells a cache which keys this process alone writes; see :class:`holdfast.wrappers.cached.Leases`.

    Args:
        scope: Where the contexts lie.
        sign: This process's sign of life.
    """

    def __init__(self, scope: str, sign: Held) -> None:
        self._scope, self._sign = scope, sign
        self._owning: dict[str, Owning] = {}

    def add(self, session: Owning) -> None:
        """Know of a session that is about to own its context. Repeatable."""
        self._owning[context_key("owner", session.context).entity_name] = session

    def remove(self, session: Owning) -> None:
        """Forget a session."""
        name = context_key("owner", session.context).entity_name
        if self._owning.get(name) is session:
            del self._owning[name]

    def epoch(self, scope: str, key: Key) -> int | None:
        """Return the epoch under which this process alone writes ``key``; None where others may."""
        if key.domain not in LEASED_DOMAINS or scope != self._scope:
            return None
        session = self._owning.get(key.entity_name)
        owner = None if session is None else session.owner
        held = session is not None and session.is_proven and self._sign.is_held
        return owner.epoch if owner is not None and held else None


def offer(store: Store, leases: Leases) -> None:
    """Give ``leases`` to whatever in the store's stack can use them: what wraps has ``backend``, a cache ``lend``."""
    for place in (store.home, *store.routes.values()):
        backend: Any = place.backend
        while backend is not None:
            lend = getattr(backend, "lend", None)
            if lend is not None:
                lend(leases)
            backend = getattr(backend, "backend", None)
