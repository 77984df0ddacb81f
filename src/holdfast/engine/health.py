"""Health: how one store has been answering, measured at every commit, and the mode that follows; one for each store.

Every session of the process sees the same one, so one context's refused exit ends the entries of all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from ..errors import FailedError, InvalidInputError, UnavailableError, UnknownOutcomeError
from ..store import Store
from .emergency import Emergency
from .listeners import Failure, Listeners, ModeChange, Topic
from .modes import MOST_DOUBLINGS, Facts, Mode, TroublePolicy, is_full, is_quick, judge

_log = logging.getLogger("holdfast")

_REMEMBERED_SECONDS = 600.0
_NOT_ANSWERED = (UnavailableError, UnknownOutcomeError, FailedError, TimeoutError)


HOOK_SECONDS = 5.0
"""How long the last session of a store waits at its end for a listener that has not returned."""


class Concerned(Protocol):
    """A session, as far as the health of its store concerns it."""

    @property
    def has_lease(self) -> bool:
        """Whether what cannot be taken back may be done: the context is still its own."""
        ...

    def look_anew(self) -> None:
        """Ask again what may be done, with the next candle."""
        ...


class Health:
    """How one store has been answering.

    Made by :func:`health_of`.

    Args:
        store: Whose.
        policy: What to do about it.
        hook_seconds: How long a listener may take at the end; a seam for tests.
    """

    def __init__(self, store: Store, policy: TroublePolicy, *, hook_seconds: float = HOOK_SECONDS) -> None:
        self.policy, self._hook_seconds = policy, hook_seconds
        self.mode, self.why = Mode.NORMAL, ""
        self.emergency = Emergency(store, policy)
        self._sessions: WeakKeyDictionary[Concerned, Listeners] = WeakKeyDictionary()
        self._under_way: dict[int, float] = {}
        self._number = 0
        self._refused_since: float | None = None
        self._committed_at: float | None = None
        self._latency_seconds, self._refusals, self._full, self._quick = 0.0, 0, False, 0
        self._fell_at: list[float] = []
        """When it ceased to be normal, lately."""
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._telling: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------ who uses it

    def join(self, session: Concerned, listeners: Listeners) -> None:
        """A session is about to use the store. Repeatable."""
        self._sessions[session] = listeners

    async def leave(self, session: Concerned) -> None:
        """A session has ended; after the last one the journal is closed. Repeatable."""
        self._sessions.pop(session, None)
        if self._telling:
            await asyncio.wait(self._telling, timeout=self._hook_seconds)
            for task in self._telling:  # a hook that hangs must not keep a run from its end
                _log.warning("a listener did not return within %g s: given up", self._hook_seconds)
                task.cancel()
            await asyncio.gather(*self._telling, return_exceptions=True)
        if not self._sessions:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._under_way.clear()
            await self.emergency.close()

    @property
    def in_use(self) -> bool:
        """Whether a session uses it."""
        return bool(self._sessions)

    @property
    def commit_age_seconds(self) -> float | None:
        """How long ago the last commit succeeded; None before the first."""
        return None if self._committed_at is None else asyncio.get_running_loop().time() - self._committed_at

    # ------------------------------------------------------------------ measuring

    def began(self) -> int:
        """A commit is about to be sent; give the number to :meth:`ended`."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._timer = loop, None
            self._under_way.clear()
        self._number += 1
        self._under_way[self._number] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self.policy.slow_seconds, self._look)
        return self._number

    def ended(self, number: int, error: BaseException | None = None) -> None:
        """That commit has ended, or is waited for no more; a conflict is an answer like any other."""
        now = asyncio.get_running_loop().time()
        began = self._under_way.pop(number, now)
        if error is None or not isinstance(error, _NOT_ANSWERED):
            if isinstance(error, asyncio.CancelledError):
                return
            self._latency_seconds, self._committed_at = now - began, now
            self._refused_since, self._refusals, self._full = None, 0, False
            self._quick = self._quick + 1 if is_quick(now - began, self.policy) else 0
        else:
            self._refused_since = self._refused_since or began
            self._refusals, self._quick = self._refusals + 1, 0
            self._full = self._full or is_full(error)
        if self._refusals or self._quick < 2 or self.mode:
            self.look()

    def facts(self) -> Facts:
        """Return how the store is answering now."""
        since = list(self._under_way.values())
        if self._refused_since is not None:
            since.append(self._refused_since)
        waiting = asyncio.get_running_loop().time() - min(since) if since else 0.0
        return Facts(
            latency_seconds=self._latency_seconds, waiting_seconds=waiting, refusals=self._refusals,
            is_full=self._full, quick_commits=self._quick, can_exit=self.can_exit,
            relapses=max(0, len(self._fell_at) - 1),
        )  # fmt: skip

    @property
    def can_exit(self) -> bool:
        """Whether an exit could be kept and sent without the store."""
        may = self.policy.exit_without_lease or all(session.has_lease for session in self._sessions)
        return may and self.emergency.has_room

    def look(self) -> None:
        """Judge anew, and tell everybody of a change."""
        before, (self.mode, self.why) = self.mode, judge(self.mode, self.facts(), self.policy)
        if self.mode is before:
            return
        if before is Mode.NORMAL:
            now = asyncio.get_running_loop().time()
            lately = [at for at in self._fell_at if now - at < _REMEMBERED_SECONDS]
            self._fell_at = [*lately[-MOST_DOUBLINGS:], now]
        change = ModeChange(before=before.name, after=self.mode.name, why=self.why)
        heard: dict[int, Listeners] = {}
        for session, listeners in list(self._sessions.items()):
            session.look_anew()
            heard[id(listeners)] = listeners
        for listeners in heard.values():
            self.tell(listeners, "mode", change)

    def tell(self, listeners: Listeners, topic: Topic, value: Any) -> None:
        """Tell listeners from where nothing can be awaited; :meth:`leave` waits until they have heard."""
        if listeners.has(topic):
            self._start(listeners.emit(topic, value))

    def report(self, listeners: Listeners, failure: Failure) -> None:
        """Tell the error listeners from where nobody may wait for them, as :meth:`tell`."""
        self._start(listeners.report(failure))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="holdfast telling")
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    def _look(self) -> None:
        """While something is owed, the mode changes with time alone."""
        self._timer = None
        if self._under_way or self.mode:
            self.look()
            if self._under_way and self._loop is not None:
                self._timer = self._loop.call_later(self.policy.slow_seconds / 2, self._look)


def health_of(store: Store, policy: TroublePolicy | None = None) -> Health:
    """Return the one health of an open store.

    Args:
        policy: None: as it is, or the defaults.

    Raises:
        InvalidInputError: Runs under way on the same store have another policy.
    """
    health: Health | None = store.attached.get("health")
    if health is None or (policy is not None and health.policy != policy):
        if health is not None and health.in_use:
            raise InvalidInputError("other runs on this store have another on_trouble: use one for all")
        health = store.attached["health"] = Health(store, policy or TroublePolicy())
    return health
