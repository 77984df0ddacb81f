"""What ``holdfast run`` puts around its store when the proof kit watches it or kills it."""

from __future__ import annotations

from collections.abc import Callable

from ..backends.disk import OsDisk
from ..backends.file import FileBackend
from ..contract import Backend
from ..engine.listeners import Tick, default_listeners
from ..errors import InvalidInputError
from ..rows import Event
from ..urls import open_backend
from .killer import Countdown, KillerBackend, KillerDisk
from .places import file_path
from .witness import Reporter, Reporting

_countdown: Countdown | None = None
_begun: Callable[[str], None] | None = None
"""Of the newest backend: what else is to be a step asks them."""


def began(phase: str) -> None:
    """Something begins that is no commit, and at which the process may be told to die."""
    if _begun is not None:
        _begun(phase)


def step() -> None:
    """Die if it is time."""
    if _countdown is not None:
        _countdown.step()


def watched_backend(where: str, *, witness_fd: int | None, kill_at: str | None) -> Backend:
    """Return a backend that reports to a witness and dies where it is told to.

    The steps of a file store are its file-system calls that change something. Those of any other, wrapped ones
    included, are the two sides of each call: before it is sent, and after its answer.

    Args:
        where: The store: a path or a URL, perhaps with wrappers; see :func:`holdfast.urls.open_backend`.
        witness_fd: An open descriptor for the witness's lines; None for no witness.
        kill_at: ``N``: die at the N-th step; ``PHASE:N``: at the N-th one after the first commit of that phase
            began (see :func:`holdfast.testing.witness.phase_of`).

    Raises:
        InvalidInputError: ``kill_at`` is malformed, or ``where`` names no store.
    """
    phase, _, number = (kill_at or "0").rpartition(":")
    if not number.isdecimal():
        raise InvalidInputError(f"--kill-at is {kill_at!r:.40}: give N or PHASE:N")
    global _countdown, _begun
    backend, countdown = _stepped(where, 0 if phase else int(number))
    _countdown = countdown
    if witness_fd is None and not phase:
        return backend
    armed = bool(phase)

    def begun(what: str) -> None:
        nonlocal armed
        if armed and what == phase:
            armed = False
            countdown.arm(int(number))

    _begun = begun
    reporter = Reporter(witness_fd)

    def told(news: Event | Tick) -> None:
        if isinstance(news, Event):
            reporter.told(news.id)
        else:
            reporter.ready()  # a quiet newest candle: what was missed has been stepped over

    default_listeners.listen("signal_live", told)
    return Reporting(backend, reporter, begun)


def _stepped(where: str, kill_at: int) -> tuple[Backend, Countdown]:
    path = file_path(where)
    if path is not None:
        disk = KillerDisk(OsDisk(), kill_at)
        return FileBackend(path, disk=disk), disk.countdown
    backend = KillerBackend(open_backend(where), kill_at)
    return backend, backend.countdown
