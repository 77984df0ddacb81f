"""One life's lines: how its calls come to the storage and to the venue, and their answers back, faults between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

from ...errors import ConflictError, FailedError, FullError, HoldfastError, UnavailableError, UnknownOutcomeError
from .plan import Call, Fault

if TYPE_CHECKING:
    from .process import Life

UNANSWERED_SECONDS = 1.0
"""How long a call waits for an answer that does not come."""
_CALLS: dict[str, Call] = {
    "commit": "commit", "read": "read", "open": "read", "submit": "submit", "cancel": "cancel", "ask": "ask",
}  # fmt: skip
_CHANGES = frozenset(("commit", "submit", "cancel"))
"""Calls of which it matters whether they were done."""


class FaultyLine:
    """The lines of one life.

    Args:
        life: Whose; asked whether it is dead, and told to stop or to end.
    """

    def __init__(self, life: Life) -> None:
        self._life, self._process, self._world = life, life.process, life.world

    def call(self, kind: str, act: Callable[[], Any], told: str = "") -> Awaitable[Any]:
        """Have ``act`` done at the other end, unless a fault comes between."""
        if self._life.dead:
            raise FailedError("the simulated process is dead")
        process, scheduler = self._process, self._world.scheduler
        kind = _CALLS[kind]
        process.calls[kind] += 1
        fault = process.at_calls.get((kind, process.calls[kind])) if process.at_calls else None
        now, answer = scheduler.now_seconds, self._life.loop.create_future()
        if fault is not None:
            self._fail(fault, act, answer, now, told)
        elif kind in ("submit", "cancel", "ask"):
            if now < process.cut_off_until:
                self._cut_off(kind, answer, now)
            else:
                scheduler.at(now + process.lag(), self._land, act, answer, told)
        elif now < process.full_until and kind == "commit":
            scheduler.at(now + process.lag(), self._answer, answer, FullError("there is no room: make some"))
        elif now < process.silent_until and kind == "commit":
            if process.is_lost():
                scheduler.at(now + process.lag(), self._land, act, self._nobody(), told)
            self._tell_later(now + UNANSWERED_SECONDS, answer, lost=True)
        elif now < process.outage_until:
            self._cut_off(kind, answer, now)
        else:
            scheduler.at(now + process.lag(), self._land, act, answer, told)
        return answer

    def _cut_off(self, kind: str, answer: asyncio.Future[Any], now: float) -> None:
        lost = kind in _CHANGES and self._process.is_lost()
        self._tell_later(now + (UNANSWERED_SECONDS if lost else self._process.lag()), answer, lost)

    def _nobody(self) -> asyncio.Future[Any]:
        """Return a future that nobody waits for, and that takes no answer."""
        nobody = self._life.loop.create_future()
        nobody.cancel()
        return nobody

    def _land(self, act: Callable[[], Any], answer: asyncio.Future[Any], told: str, later_seconds: float = 0.0) -> None:
        """The request arrives at the other end, whatever has become of its sender; the answer goes back."""
        if told == "main.beats":
            self._life.looked_seconds = self._world.scheduler.now_seconds
        try:
            result = act()
        except HoldfastError as error:
            self._world.note(f"{self._life.name} {told}: {type(error).__name__}")
            self._answer(answer, error, later_seconds, told)
        else:
            self._answer(answer, result, later_seconds)

    def _answer(self, answer: asyncio.Future[Any], result: Any, later_seconds: float = 0.0, told: str = "") -> None:
        if later_seconds:
            when = self._world.scheduler.now_seconds + later_seconds
            self._world.scheduler.at(when, self._answer, answer, result, 0.0, told)
        elif answer.done() or self._life.dead:
            pass
        elif isinstance(result, Exception):
            answer.set_exception(result)
            if isinstance(result, ConflictError):
                self._world.oracle.refused(self._life, told)
        else:
            answer.set_result(result)

    def _tell_later(self, when_seconds: float, answer: asyncio.Future[Any], lost: bool) -> None:
        error: HoldfastError = (
            UnknownOutcomeError("no answer came: send the same op again")
            if lost
            else UnavailableError("the simulated storage or venue refused: try again")
        )
        self._world.scheduler.at(when_seconds, self._answer, answer, error)

    def _fail(self, fault: Fault, act: Callable[[], Any], answer: asyncio.Future[Any], now: float, told: str) -> None:
        life, scheduler, lag = self._life, self._world.scheduler, self._process.lag()
        lost = fault.call in _CHANGES
        self._world.note(f"{life.name} {fault.kind} at {fault.call} {fault.at:g} ({told})")
        if fault.call in ("commit", "read"):
            life.held_up(fault.seconds)
        match fault.kind:
            case "refused":
                self._tell_later(now + lag, answer, lost=False)
            case "lost":
                self._tell_later(now + UNANSWERED_SECONDS, answer, lost)
            case "unanswered":
                scheduler.at(now + lag, self._land, act, self._nobody(), told)
                self._tell_later(now + UNANSWERED_SECONDS, answer, lost)
            case "late":
                self._world.late(now + fault.seconds)
                scheduler.at(now + fault.seconds, self._land, act, self._nobody(), told)
                self._tell_later(now + UNANSWERED_SECONDS, answer, lost)
            case "slow":
                self._world.late(now + fault.seconds)
                scheduler.at(now + fault.seconds, self._land, act, answer, told)
            case "slow_answer":
                scheduler.at(now + lag, self._land, act, answer, told, fault.seconds)
            case "crash_before" | "crash_sent" | "crash_after" | "crash_late":
                life.loop.pause()  # from here on it does nothing more
                if fault.kind == "crash_sent":
                    scheduler.at(now + lag, self._land, act, self._nobody(), told)
                elif fault.kind == "crash_late":
                    self._world.late(now + fault.seconds)
                    scheduler.at(now + fault.seconds, self._land, act, self._nobody(), told)
                elif fault.kind == "crash_after":
                    self._land(act, self._nobody(), told)
                scheduler.at(now, life.crash)
            case "pause_before":
                life.pause(fault.seconds)  # it had looked at its lease: the request goes out when it wakes
                scheduler.at(now + fault.seconds + lag, self._land, act, answer, told)
            case "pause_sent" | "pause_after":
                scheduler.at(now + (lag if fault.kind == "pause_sent" else 0.0), self._land, act, answer, told)
                life.pause(fault.seconds)
            case _:
                raise AssertionError(cast("str", fault.kind))
