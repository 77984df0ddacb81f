"""Modes: what may still be done while the store is slow, full or lost; plain functions and values, no I/O, no clock.

Invariants:

* The mode follows from the facts and the mode before it alone.
* It gets worse at once, and better only after some commits in a row were quick; after twice as many for each time that
  trouble has come back lately: a store that comes and goes soon lets nothing open in between.
"""

from __future__ import annotations

import enum
import errno
import math

import msgspec

from ..errors import FullError, InvalidInputError

MOST_DOUBLINGS = 5
"""How often the calm that is asked for is doubled while trouble keeps coming back."""


class Mode(enum.IntEnum):
    """What may still be done; each allows less than the one before."""

    NORMAL = 0
    """Everything."""
    NO_ENTRIES = 1
    """Nothing begins. Exits are committed as ever."""
    CLOSE_ONLY = 2
    """The store counts as lost: exits go to the emergency journal and are merged when it returns."""
    HALT = 3
    """Nothing is sent: the store is lost, and there is no journal, it is full, or the lease is over."""


class TroublePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What to do about a store in trouble; the same for all runs on one store.

    Raises:
        InvalidInputError: A value cannot be used; the message names it.
    """

    slow_seconds: float = 5.0
    """A commit that took so long, or has been waiting for so long, ends entries."""
    refusals: int = 2
    """So many commits refused in a row end entries."""
    lost_seconds: float = 15.0
    """After so long without a commit that succeeded, though some were tried, the store counts as lost."""
    lost_refusals: int = 4
    """After so many refusals in a row it counts as lost. After one because the disk is full, too."""
    calm_commits: int = 2
    """How many commits in a row must be quick, at most half of ``slow_seconds``, before things get better; twice as
    many for each time that trouble has come back within ten minutes, up to 32 times as many."""
    emergency: str | None = None
    """File for the emergency journal, on a disk of this machine; None for none: then exits wait for the store."""
    emergency_bytes: int = 1024 * 1024
    """How much is set aside there when the run starts; an exit takes about 2,000."""
    patience_seconds: float = 5.0
    """How long an exit waits for the store's answer before it goes to the journal."""
    exit_without_lease: bool = False
    """Exits go on when this process can no longer know that the context is its own: two may then send the same exit."""

    def __post_init__(self) -> None:
        for name in ("slow_seconds", "lost_seconds", "patience_seconds"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise InvalidInputError(f"{name} is {value!r:.40}: use a number of seconds above 0")
        for name in ("refusals", "lost_refusals", "calm_commits"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InvalidInputError(f"{name} is {value!r:.40}: use a whole number of at least 1")
        if self.lost_seconds < self.slow_seconds or self.lost_refusals < self.refusals:
            raise InvalidInputError(
                f"the store would be lost ({self.lost_seconds} s, {self.lost_refusals} refusals) before it is slow "
                f"({self.slow_seconds} s, {self.refusals}): make the first the larger ones"
            )
        if type(self.exit_without_lease) is not bool:
            raise InvalidInputError(f"exit_without_lease is {self.exit_without_lease!r:.40}: use True or False")
        if self.emergency is not None and (type(self.emergency) is not str or not self.emergency):
            raise InvalidInputError(f"emergency is {self.emergency!r:.80}: name a file, or leave it out")
        if type(self.emergency_bytes) is not int or not 64 * 1024 <= self.emergency_bytes <= 1 << 30:
            raise InvalidInputError(f"emergency_bytes is {self.emergency_bytes!r:.40}: use 65536 to 1073741824")


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """How a store has been answering."""

    latency_seconds: float = 0.0
    """Of the newest commit that succeeded."""
    waiting_seconds: float = 0.0
    """How long the store has owed something: since the oldest commit under way began, or since the first refusal after
    the last success."""
    refusals: int = 0
    """Commits in a row that did not succeed."""
    is_full: bool = False
    """One of them because there was no room."""
    quick_commits: int = 0
    """Commits in a row that succeeded quickly."""
    relapses: int = 0
    """How often trouble has come back lately."""
    can_exit: bool = True
    """Whether an exit could be kept and sent without the store."""


def judge(before: Mode, facts: Facts, policy: TroublePolicy) -> tuple[Mode, str]:
    """Return the mode, and why, in plain words; the reason is empty in ``NORMAL``."""
    found, why = _found(facts, policy)
    calm_commits = policy.calm_commits << min(facts.relapses, MOST_DOUBLINGS)
    if found < min(before, Mode.CLOSE_ONLY) and facts.quick_commits < calm_commits:
        found = min(before, Mode.CLOSE_ONLY)
        why = f"{facts.quick_commits} of {calm_commits} quick commits since the trouble"
    if found is Mode.CLOSE_ONLY and not facts.can_exit:
        return Mode.HALT, f"{why}, and exits cannot be kept elsewhere"
    return found, why


def is_quick(latency_seconds: float, policy: TroublePolicy) -> bool:
    """Whether a commit counts towards better times."""
    return latency_seconds <= policy.slow_seconds / 2


def _found(facts: Facts, policy: TroublePolicy) -> tuple[Mode, str]:
    if facts.is_full:
        return Mode.CLOSE_ONLY, "the store is full"
    if facts.refusals >= policy.lost_refusals:
        return Mode.CLOSE_ONLY, f"{facts.refusals} commits in a row were refused"
    if facts.waiting_seconds >= policy.lost_seconds:
        return Mode.CLOSE_ONLY, f"no commit for {facts.waiting_seconds:.1f} s"
    if facts.refusals >= policy.refusals:
        return Mode.NO_ENTRIES, f"{facts.refusals} commits in a row were refused"
    if facts.waiting_seconds >= policy.slow_seconds:
        return Mode.NO_ENTRIES, f"a commit has been waiting for {facts.waiting_seconds:.1f} s"
    if facts.latency_seconds >= policy.slow_seconds:
        return Mode.NO_ENTRIES, f"a commit took {facts.latency_seconds:.1f} s"
    return Mode.NORMAL, ""


_FULL_ERRNOS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def is_full(error: BaseException) -> bool:
    """Whether a commit failed because there was no room, by the error and its causes."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return False
        if isinstance(seen, FullError) or (isinstance(seen, OSError) and seen.errno in _FULL_ERRNOS):
            return True
        seen = seen.__cause__
    return False
