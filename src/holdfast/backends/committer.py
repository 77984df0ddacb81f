"""The file backend's writer thread, and the two states between which it stands.

*Newest* has every commit that was accepted; commits are decided against it, in order. *Durable* has those whose
frame is on the disk; reads see nothing else. The thread takes everything that is queued, writes it as one frame,
syncs, applies it to durable, and wakes those who wait.

Invariants:

* Commits are numbered, queued, written and applied in one order.
* What a commit is told (its number, a conflict, a repeated op) rests on durable commits only.
* After a failure nothing is written until newest is again what the disk has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from ..contract import Guarantees, Head, How, Key, KeyPrefix, Op, Record, WriterOp
from ..errors import (
    ConflictError,
    CorruptedError,
    FailedError,
    FencedError,
    HoldfastError,
    UnavailableError,
    UnknownOutcomeError,
)
from . import log
from .directory import Directory, explain
from .disk import Disk
from .journal import Journal, Opened
from .state import Scope, State
from .views import Views
from .waiting import Waiting, again, merged, wake

_MAX_GROUP_BYTES = 32 * 1024 * 1024
_ROW_BYTES = 160
"""What a snapshot's line takes for one row, about."""
_make = tuple.__new__  # what Record() comes to, without a call in Python for each row
_logger = logging.getLogger("holdfast")


class Committer:
    """One opening of one directory.

    Args:
        path: The directory's absolute path.
        disk: The file-system calls.
        view_delay_seconds: How long a view may wait for further changes.
        checkpoint_bytes: The log is replaced when it is larger than this and than twice its rows.
        flat_domain: The domain whose entities lie directly under the directory.
        read_only: Take no lock and change nothing.
        rewrite: The last opening saw a sync fail: put everything into a fresh log first.
    """

    def __init__(
        self,
        path: str,
        disk: Disk,
        *,
        view_delay_seconds: float,
        checkpoint_bytes: int,
        flat_domain: str,
        read_only: bool,
        rewrite: bool,
    ) -> None:
        self.name = f"file:{path}"
        self.opened: Future[Guarantees] = Future()
        self.closed: Future[None] = Future()
        self.stopping = False
        self._directory = Directory(path, disk)
        self._journal = Journal(self._directory)
        self._views: Views | None = None
        self._view_delay_seconds = view_delay_seconds
        self._checkpoint_bytes = self._checkpoint_at = checkpoint_bytes
        self._flat_domain = flat_domain
        self._read_only = read_only
        self._rewrite = rewrite
        self._lock = threading.Lock()
        """Guards the members below; held for microseconds, never during input or output."""
        self._newest = State()
        self._durable = State()
        self._readable = False
        self._refusal: str | None = f"{self.name} is not open: open it first"
        """Why commits are refused, if they are."""
        self._queue: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="holdfast-writer", daemon=True)

    @property
    def suspect(self) -> bool:
        """Whether a sync of the log failed, so that the next opening must rewrite it."""
        return self._journal.suspect

    def start(self) -> None:
        """Begin to open; ``opened`` tells how it went."""
        try:
            self._thread.start()
        except RuntimeError as error:
            self.closed.set_result(None)
            why = f"cannot open {self.name}: {error}: raise the limit of processes (ulimit -u)"
            raise UnavailableError(why, backend=self.name) from error
        _live.add(self)

    def stop(self) -> None:
        """Begin to close; ``closed`` tells when it is done. Repeatable."""
        with self._lock:
            self.stopping = True
            self._readable = False
            self._refusal = f"{self.name} is not open: open it first"
            self._queue.put(None)

    def join(self) -> None:
        """Wait for the thread, once ``closed`` is done: a matter of microseconds."""
        if self._thread.ident is not None:
            self._thread.join()

    # What the event loop calls: none of it waits for the disk

    def submit(
        self,
        loop: asyncio.AbstractEventLoop,
        scope: str,
        changes: Mapping[Key, bytes | None],
        expect: Mapping[Key, int],
        op: Op,
    ) -> asyncio.Future[int] | int:
        """Decide a commit and queue it; return its number, or what to await for it."""
        with self._lock:
            if self._refusal is not None:
                raise FailedError(self._refusal, backend=self.name)
            newest = self._newest
            try:
                number, repeated = newest.decide(scope, changes, expect, op)
            except ConflictError as error:
                return self._after_queued(loop, scope, error)
            if repeated:
                return self._after_queued(loop, scope, number)
            if type(op) is not Op:
                op = Op(*op)
            records = {
                key: None if payload is None else _make(Record, (payload, number, op))
                for key, payload in changes.items()
            }
            entry = log.commit_entry(scope, number, op, changes)
            last = _make(WriterOp, (op[1], number))
            future = loop.create_future()
            newest.scope(scope).apply(number, op[0], last, records)
            self._queue.put(Waiting(future, number, entry, scope, op[0], last, records))
        return future

    def _after_queued(
        self, loop: asyncio.AbstractEventLoop, scope: str, told: int | HoldfastError
    ) -> asyncio.Future[int] | int:
        """Tell what rests on commits that may still be queued only once they are durable."""
        if self._newest.number(scope) == self._durable.number(scope):
            if isinstance(told, HoldfastError):
                raise told
            return told
        future: asyncio.Future[int] = loop.create_future()
        self._queue.put(Waiting(future, told))
        return future

    def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Return the durable records of ``keys`` as of one moment."""
        with self._lock:
            self._require_readable()
            found = self._durable.scopes.get(scope)
            if found is None:
                return {}
            rows = found.rows
            if found.damaged:
                for key in keys:
                    if key in found.damaged:
                        why = f"{key}: its stored bytes are damaged; a copy is in the quarantine"
                        raise CorruptedError(why, key=key, backend=self.name)
            return {key: record for key, record in zip(keys, map(rows.get, keys), strict=True) if record is not None}

    def head(self, scope: str) -> Head:
        """Return the scope's durable commit number and its writers' last ops."""
        with self._lock:
            self._require_readable()
            return self._durable.head(scope)

    def keys(self, scope: str, prefix: KeyPrefix) -> list[Key]:
        """Return the durable keys under ``prefix`` in byte order."""
        with self._lock:
            self._require_readable()
            return self._durable.keys(scope, prefix)

    def scopes(self) -> list[str]:
        """Return the names of the scopes that have had a durable commit, in byte order."""
        with self._lock:
            self._require_readable()
            return self._durable.names()

    def _require_readable(self) -> None:
        if not self._readable:
            raise FailedError(f"{self.name} is not open: open it first", backend=self.name)

    # The writer thread

    def _run(self) -> None:
        try:
            found = self._journal.open(read_only=self._read_only, rewrite=self._rewrite)
            self._begin(found)
        except BaseException as error:
            self._journal.release()
            self.closed.set_result(None)
            if not isinstance(error, HoldfastError):
                cause, error = error, UnavailableError(f"cannot open {self.name}: {error!r}", backend=self.name)
                error.__cause__ = cause
            self.opened.set_exception(error)
            return
        self.opened.set_result(self._guarantees(found))
        try:
            self._serve()
        finally:
            self._end()

    def _end(self) -> None:
        try:
            if self._views is not None:
                self._views.stop()
            if self._read_only:
                self._journal.release()
            else:
                self._journal.close()
        finally:
            self.closed.set_result(None)

    def _begin(self, found: Opened) -> None:
        refusal: str | None = f"{self.name} was opened read-only: nothing was written; close it, open it for writing"
        with self._lock:
            self._durable, self._newest = found.state, found.state.copy()
        if not self._read_only:
            refusal = None
            self._views = Views(
                self._directory,
                flat_domain=self._flat_domain,
                delay_seconds=self._view_delay_seconds,
                scopes=self._copy_of_durable,
                shown=found.views,
                gone=found.gone,
            )
            self._views.start({name: found.state.number(name) for name in found.state.names()})
        with self._lock:
            if not self.stopping:
                self._readable, self._refusal = True, refusal

    def _copy_of_durable(self) -> dict[str, Scope]:
        with self._lock:
            return self._durable.copy().scopes

    def _guarantees(self, found: Opened) -> Guarantees:
        for warning in found.warnings:
            _logger.warning(warning)
        return Guarantees(
            backend=self.name,
            survives=found.survives,
            survives_how=found.how,
            atomic=True,
            atomic_how=How.ATTESTED,
            fenced=True,
            fenced_how=How.ATTESTED,
            shared=False,
            warnings=found.warnings,
        )

    def _serve(self) -> None:
        """Flush group after group until told to close."""
        while (first := self._queue.get()) is not None:
            group, size, last = [first], len(first.entry), False
            while size < _MAX_GROUP_BYTES and not self._queue.empty():  # nobody else takes anything out
                more = self._queue.get()
                if more is None:
                    last = True
                    break
                group.append(more)
                size += len(more.entry)
            try:
                self._flush(group)
            except HoldfastError as error:
                self._fail(group, error)
            except Exception as error:  # a defect, or no memory: nobody may wait for ever
                self._journal.broken = self._journal.suspect = True
                self._fail(group, UnknownOutcomeError(f"{self.name}: {error!r}: close it and open it again"))
            if last:
                return
            if self._journal.length > self._checkpoint_at and not self._journal.broken:
                self._checkpoint()

    def _flush(self, group: list[Waiting]) -> None:
        body = group[0].entry if len(group) == 1 else b"".join([waiting.entry for waiting in group])
        if body:
            self._journal.append(body)
            with self._lock:
                scope = self._durable.scope
                for waiting in group:
                    if waiting.entry:
                        last = waiting.last
                        scope(waiting.scope).apply(last[1], waiting.writer, last, waiting.changes)
        wake(group)
        if body and self._views is not None:
            self._views.changed(merged(group))

    def _fail(self, group: list[Waiting], error: HoldfastError) -> None:
        """Tell everybody who waits; carry on from what is durable, unless the journal is broken."""
        if isinstance(error, FencedError) and self._views is not None:
            self._views.abandon()
        with self._lock:
            behind = self._take_queue()
            if self._journal.broken:
                self._refusal = f"{self.name}: an earlier commit failed: {error}"
            else:
                self._newest = self._durable.copy()
        unknown = isinstance(error, UnknownOutcomeError)
        told: list[Waiting] = []
        for at, waiting in enumerate((*group, *behind)):
            # Not in the frame that failed: queued behind it, or refused with a conflict. A repeated op has no entry
            # of its own, but what it repeats may be in that frame.
            unwritten = (at >= len(group) and waiting.entry) or isinstance(waiting.told, HoldfastError)
            told.append(
                Waiting(waiting.future, self._nothing_written(error) if unknown and unwritten else again(error))
            )
        wake(told)

    def _nothing_written(self, error: HoldfastError) -> UnavailableError:
        return UnavailableError(f"nothing was written, because the commit before failed: {error}", backend=self.name)

    def _take_queue(self) -> list[Waiting]:
        behind: list[Waiting] = []
        closing = False
        with contextlib.suppress(queue.Empty):
            while True:
                waiting = self._queue.get_nowait()
                if waiting is None:
                    closing = True
                else:
                    behind.append(waiting)
        if closing:
            self._queue.put(None)
        return behind

    def _checkpoint(self) -> None:
        """Replace the log by a snapshot, if that makes it much shorter. Commits wait meanwhile."""
        live = sum(len(r.payload) + _ROW_BYTES for scope in self._durable.scopes.values() for r in scope.rows.values())
        if self._journal.length <= 2 * live:
            self._checkpoint_at = max(self._checkpoint_bytes, 2 * live)
            return
        views = self._views
        try:
            self._journal.checkpoint(self._durable, views.gone() if views is not None else ())
            if views is not None:
                views.forget_gone()
            self._checkpoint_at = max(self._checkpoint_bytes, 2 * self._journal.length)
        except OSError as error:
            why = explain(error, f"cannot replace the log of {self.name} by a shorter one")
            _logger.warning(why)
            self._checkpoint_at = self._journal.length + max(self._checkpoint_bytes // 4, 1)
            if self._journal.broken:
                self._fail([], UnavailableError(f"nothing was written: {why}", backend=self.name))

    def forget(self) -> None:
        """Let go of everything in a forked child: the store stays with the parent process."""
        self._refusal = f"{self.name} was opened by the parent process: open it in this one"
        self._readable = False
        self._journal.release()
        if not self.closed.done():
            self.closed.set_result(None)


_live: weakref.WeakSet[Committer] = weakref.WeakSet()


def _forget_all() -> None:
    for committer in list(_live):
        committer.forget()


os.register_at_fork(after_in_child=_forget_all)
