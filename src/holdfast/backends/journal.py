"""The file backend's log: opened, appended to, replaced by a fresh one. Synchronous; runs on the writer thread.

Invariants:

* Nothing is acted on before the log's bytes and its name are durable.
* The log grows by whole frames. After a failed write the file is cut back to whole frames, or the journal breaks;
  after a failed sync it breaks. A broken journal never writes or syncs again.
* Bytes are cut or replaced only after a copy was put into the quarantine, unless they are zeros.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..bulk import without_collections
from ..contract import How, Key, Survives
from ..errors import CorruptedError, FencedError, NotFoundError, UnavailableError, UnknownOutcomeError
from . import log
from .directory import LOG, META, Directory, explain
from .disk import Kind, Mode
from .quarantine import write_all
from .state import Scope, State

_MAX_TAIL_BYTES = 64 * 1024 * 1024
_logger = logging.getLogger("holdfast")


class Opened(NamedTuple):
    """What opening found."""

    state: State
    gone: set[Key]
    views: dict[str, int]
    """Commit number of each scope that the views were known to show."""
    survives: Survives
    how: How
    warnings: tuple[str, ...]


class Journal:
    """The log of one directory, open or not. Made anew for each opening."""

    def __init__(self, directory: Directory) -> None:
        self.length = 0
        """Bytes of whole frames in the log."""
        self.broken = False
        self.suspect = False
        """A sync of the log failed, so the kernel may have forgotten bytes that it still shows."""
        self._directory = directory
        self._disk = directory.disk
        self._log = -1
        self._inode = 0
        self._number = 0
        self._sealed = True

    def open(self, *, read_only: bool, rewrite: bool = False) -> Opened:
        """Read everything, and (unless ``read_only``) take the lock and make durable what was read.

        Args:
            read_only: Take no lock and change nothing.
            rewrite: Put what was read into a fresh log before anybody acts on it.

        Raises:
            HoldfastError: As :meth:`holdfast.contract.Backend.open`; nothing stays open.

        Crash: Leaves what was there, with or without a torn tail; opening again finishes.
        """
        try:
            return self._open_read_only() if read_only else self._open_for_writing(rewrite)
        except OSError as error:
            self.release()
            here = self._directory
            raise UnavailableError(explain(error, f"cannot open {here.path}"), backend=here.name) from error
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Close everything and let go of the lock, writing nothing. Repeatable."""
        if self._log >= 0:
            with contextlib.suppress(OSError):  # the descriptor is gone either way
                self._disk.close(self._log)
            self._log = -1
        self._directory.release()

    def _open_read_only(self) -> Opened:
        here = self._directory
        here.open_read_only()
        witness = here.read_witness()  # before the log: what it saw is in the log that is read after it
        try:
            data = self._read_log(Mode.READ)
        except FileNotFoundError as error:
            raise NotFoundError(
                f"{here.path} has no {META}/{LOG}: nothing was stored there yet, or put that file back from a backup",
                backend=here.name,
            ) from error
        found = self._replay(data, witness, copy=False)
        # A frame that another process has written but not yet made durable must not be shown before it is.
        self._disk.fdatasync(self._log)
        survives, how = here.attest(read_only=True)
        for scope, key in _damaged(found.state):
            here.warnings.append(f"{key}: its bytes in scope {scope} are damaged")
        return Opened(found.state, set(), {}, survives, how, tuple(here.warnings))

    def _open_for_writing(self, rewrite: bool) -> Opened:
        here = self._directory
        here.open_for_writing()
        survives, how = here.attest(read_only=False)
        witness = here.read_witness()
        try:
            data = self._read_log(Mode.APPEND)
        except FileNotFoundError:
            self._create_log(witness)
            data = self._disk.read(self._log)
        found = self._replay(data, witness, copy=True)
        self.length, self._number, self._sealed = found.length, found.number, found.sealed
        self._keep_damaged(found)
        if len(data) > self.length:
            self._cut_tail(data[self.length :])
        if rewrite:
            self.checkpoint(found.state, found.gone)
        else:
            # Before the seal: else a power cut might keep the seal and tear the frame before it: that is damage.
            self._disk.fdatasync(self._log)
            if self._seal("open"):
                self._disk.fdatasync(self._log)
            # A crash may have come between the rename that gave the log its name and the sync of its directory.
            self._disk.fsync(here.meta)
        self._inode = self._disk.fstat(self._log).inode
        return Opened(found.state, found.gone, witness.views, survives, how, tuple(here.warnings))

    def _read_log(self, mode: Mode) -> bytes:
        here = self._directory
        try:
            self._log = self._disk.open_file(LOG, mode, at=here.meta)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise here.odd(LOG, error) from error
        if self._disk.fstat(self._log).kind is not Kind.FILE:
            raise here.odd(LOG, None)
        return self._disk.read(self._log)

    def _create_log(self, witness: log.WitnessLine) -> None:
        here = self._directory
        if witness.heads or here.holds_views():
            raise CorruptedError(
                f"{here.path} holds JSON files as an earlier run leaves them, but {META}/{LOG} is missing: put that "
                "file back from a backup, or give another directory to start empty",
                backend=here.name,
            )
        here.sync_parents()
        self._log = here.replace(LOG, log.frame(1, log.snapshot_body(State())), sync=True)

    def _replay(self, data: bytes, witness: log.WitnessLine, *, copy: bool) -> log.Replay:
        here = self._directory
        where = f"{here.path}/{META}/{LOG}"
        try:
            with without_collections():
                found = log.replay(data)
            for scope, number in witness.heads.items():
                head = found.state.scopes.get(scope, Scope()).number
                if head < number:
                    raise log.Damaged(f"it ends at commit {head} of scope {scope}, but commit {number} was durable")
        except log.NotOurs as error:
            raise CorruptedError(
                f"{where} cannot be used: {error}. Nothing was changed. "
                "Put the right file back, or move the directory away",
                backend=here.name,
            ) from None
        except log.Damaged as error:
            kept = f", and a copy is in {here.path}/{here.keep(LOG, data)}" if copy else ""
            raise CorruptedError(
                f"{where} is damaged: {error}. Nothing was changed{kept}. Put a backup of {here.path} back, "
                "or move the directory away and check the open positions by hand",
                backend=here.name,
            ) from None
        return found

    def _keep_damaged(self, found: log.Replay) -> None:
        here = self._directory
        for scope, key in _damaged(found.state):
            kept = here.keep(str(key).replace("/", "="), found.state.scopes[scope].rows[key].payload)
            here.warnings.append(f"{key}: its bytes in {META}/{LOG} are damaged; a copy is in {kept}")
        if found.flawed_frames:
            _logger.warning("%s: %d frames of %s/%s are damaged", here.path, found.flawed_frames, META, LOG)

    def _cut_tail(self, tail: bytes) -> None:
        """Cut off what an unfinished write left. It was never acknowledged, yet a copy is kept."""
        if tail.strip(b"\0"):
            self._directory.keep("tail", tail[:_MAX_TAIL_BYTES])
        self._disk.truncate(self._log, self.length)
        _logger.info("%s: cut %d bytes of an unfinished commit off %s", self._directory.path, len(tail), LOG)

    def _seal(self, at: str) -> bool:
        """Put a frame behind the last commit, so that damage to that commit cannot pass for a torn tail."""
        if self._sealed:
            return False
        sealed = log.frame(self._number + 1, log.seal_body(at))
        try:
            write_all(self._disk, self._log, sealed)
        except OSError as error:  # a full disk must still open and close; only this extra check is missing
            self._disk.truncate(self._log, self.length)
            _logger.warning(explain(error, f"cannot seal {self._directory.path}/{META}/{LOG}"))
            return True  # what was cut off again must be synced too
        self._number += 1
        self.length += len(sealed)
        self._sealed = True
        return True

    def append(self, body: bytes) -> None:
        """Write one frame and make it durable.

        Raises:
            UnavailableError: Nothing was written; the next call may succeed.
            UnknownOutcomeError: It may have been written; the journal is broken.
            FencedError: The lock or the log was replaced by somebody; nothing was written; the journal is broken.

        Crash: The frame is there whole, or is torn and cut by the next opening.
        """
        here = self._directory
        try:
            here.require_owner(self._inode)
        except FencedError:
            self.broken = True
            raise
        framed = log.frame(self._number + 1, body)
        try:
            write_all(self._disk, self._log, framed)
        except OSError as error:
            self._take_back(error)
            raise UnavailableError(explain(error, f"nothing was written to {here.path}"), backend=here.name) from error
        try:
            self._disk.fdatasync(self._log)
        except OSError as error:
            # The kernel may have dropped the pages and call the next sync a success: never ask again.
            self.broken = self.suspect = True
            raise self._unknown(error) from error
        self._number += 1
        self.length += len(framed)
        self._sealed = False

    def _take_back(self, cause: OSError) -> None:
        """Cut off what a failed write left, so that no garbage can come before the next frame."""
        try:
            self._disk.truncate(self._log, self.length)
            self._disk.fdatasync(self._log)
        except OSError:
            self.broken = self.suspect = True
            raise self._unknown(cause) from cause

    def _unknown(self, cause: OSError) -> UnknownOutcomeError:
        here = self._directory
        return UnknownOutcomeError(
            f"{explain(cause, f'a write to {here.path} may be lost')}; then close the store, open it again, re-send",
            backend=here.name,
        )

    def checkpoint(self, state: State, gone: Iterable[Key]) -> None:
        """Replace the log by a fresh one that begins with a snapshot.

        Raises:
            OSError: It could not be made. The old log stays in use, unless ``broken`` is set.

        Crash: The old log or the new one, both with the same rows.
        """
        framed = log.frame(self._number + 1, log.snapshot_body(state, gone))
        fresh = self._directory.replace(LOG, framed, sync=True)
        try:
            # Commits go to the new file from here on, so its name must be the one that a power cut leaves.
            self._disk.fsync(self._directory.meta)
            self._inode = self._disk.fstat(fresh).inode
        except OSError:
            self.broken = self.suspect = True
            raise
        finally:
            stale, self._log = self._log, fresh
            with contextlib.suppress(OSError):  # the old file has no name any more
                self._disk.close(stale)
        self.length, self._number, self._sealed = len(framed), self._number + 1, True

    def close(self) -> None:
        """Seal the log and let go of the lock. Raises nothing: nothing acknowledged depends on it."""
        if not self.broken and not self._sealed:
            try:
                self._seal("close")
                self._disk.fdatasync(self._log)
            except OSError as error:
                self.suspect = True
                _logger.warning(explain(error, f"cannot seal {self._directory.path}/{META}/{LOG}"))
        self.release()


def _damaged(state: State) -> Iterator[tuple[str, Key]]:
    for name, scope in state.scopes.items():
        for key in sorted(scope.damaged):
            yield name, key
