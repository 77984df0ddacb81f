"""What ``holdfast run`` puts around its file store when the proof kit watches it or kills it."""

from __future__ import annotations

from ..backends.disk import OsDisk
from ..backends.file import FileBackend
from ..contract import Backend
from ..engine.listeners import Tick, default_listeners
from ..errors import InvalidInputError
from ..rows import Event
from .killer import KillerDisk
from .witness import Reporter, Reporting


def watched_backend(where: str, *, witness_fd: int | None, kill_at: str | None) -> Backend:
    """Return a file backend that reports to a witness and dies where it is told to.

    Args:
        where: The store's directory, perhaps with ``file:`` before it.
        witness_fd: An open descriptor for the witness's lines; None for no witness.
        kill_at: ``N``: die before the N-th changing file-system call; ``PHASE:N``: before the N-th one after
            the first commit of that phase began (see :func:`holdfast.testing.witness.phase_of`).

    Raises:
        InvalidInputError: ``kill_at`` is malformed.
    """
    phase, _, number = (kill_at or "0").rpartition(":")
    if not number.isdecimal():
        raise InvalidInputError(f"--kill-at is {kill_at!r:.40}: give N or PHASE:N")
    disk = KillerDisk(OsDisk(), 0 if phase else int(number))
    backend = FileBackend(where.removeprefix("file:"), disk=disk)
    if witness_fd is None and not phase:
        return backend
    armed = bool(phase)

    def begun(what: str) -> None:
        nonlocal armed
        if armed and what == phase:
            armed = False
            disk.arm(int(number))

    reporter = Reporter(witness_fd)

    def told(news: Event | Tick) -> None:
        if isinstance(news, Event):
            reporter.told(news.id)
        else:
            reporter.ready()  # a quiet newest candle: what was missed has been stepped over

    default_listeners.listen("signal_live", told)
    return Reporting(backend, reporter, begun)
