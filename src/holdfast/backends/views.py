"""The JSON files of the documents' layout: what ``cat`` shows. Never read to decide anything.

One thread replaces them soon after the commits, many changes of a row at once, without a sync: a power cut may
leave an old, empty or damaged view, and the next opening mends it. Beside them it writes the witness, which says
which commits were durable and which of them the views show.

Invariants:

* A view that should show the newest row but does not was changed by somebody else or damaged: its bytes go into
  the quarantine before it is replaced.
* A failing view is reported once and tried again; it never fails or delays a commit.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

from ..contract import Key, Record
from . import log
from .directory import META, TEMPORARY, WITNESS, Directory, explain
from .disk import Kind, Mode
from .quarantine import create, opened, write_all
from .state import Scope

_TEMPORARY = ".holdfast" + TEMPORARY
_SUFFIX = ".json"
_CHECKED_AT_ONCE = 200
_logger = logging.getLogger("holdfast")


class Views:
    """The views of one open directory.

    Args:
        directory: Where they lie.
        flat_domain: The domain whose entities lie directly under the base directory.
        delay_seconds: How long a change waits for others before it is written.
        scopes: Returns the durable rows, once, when the check of all views begins.
        shown: Commit number of each scope that the views were known to show.
        gone: Deleted keys whose views may still be there.
    """

    def __init__(
        self,
        directory: Directory,
        *,
        flat_domain: str,
        delay_seconds: float,
        scopes: Callable[[], dict[str, Scope]],
        shown: Mapping[str, int],
        gone: Iterable[Key],
    ) -> None:
        self._directory = directory
        self._disk = directory.disk
        self._flat_domain = flat_domain
        self._delay_seconds = delay_seconds
        self._scopes = scopes
        self._shown = dict(shown)
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._pending: dict[Key, Record | None] = {}
        self._taken: dict[Key, Record | None] = {}
        self._heads: dict[str, int] = {}
        self._gone = set(gone)
        """Deleted before this opening; empty once all views were checked."""
        self._removed: set[Key] = set()
        """Deleted since the last checkpoint; no sync follows a deletion, so a power cut may undo it."""
        self._touched: set[Key] | None = set()
        """Keys that changed since the check of all views began; None once it is done."""
        self._witnessed: bytes = b""
        self._complained = False
        self._abandoned = False
        self._unchecked = False
        """The check of all views met a failing call, so what they show is not known."""
        self._thread = threading.Thread(target=self._run, name="holdfast-views", daemon=True)

    def start(self, heads: Mapping[str, int]) -> None:
        """Begin, with the commit numbers that are durable now."""
        self._heads = dict(heads)
        self._thread.start()

    def changed(self, commits: Iterable[tuple[str, int, Mapping[Key, Record | None]]]) -> None:
        """Take note of durable commits: scope, number and changes of each."""
        with self._lock:
            for scope, number, changes in commits:
                self._pending.update(changes)
                self._heads[scope] = number
                if self._touched is not None:
                    self._touched.update(changes)
        if not self._wake.is_set():
            self._wake.set()

    def gone(self) -> set[Key]:
        """Return the deleted keys whose views are still there, or may come back when the power is cut."""
        with self._lock:
            both = {**self._taken, **self._pending}
            return {key for key, record in both.items() if record is None} | self._gone | self._removed

    def forget_gone(self) -> None:
        """Begin anew to collect what :meth:`gone` returns: a checkpoint has taken note of it."""
        with self._lock:
            self._removed = set()

    def stop(self) -> None:
        """Write what is waiting, and end the thread."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def abandon(self) -> None:
        """Write nothing any more: somebody else may own the directory now."""
        self._abandoned = True
        self._stop.set()
        self._wake.set()

    # The thread

    def _run(self) -> None:
        try:
            self._stop.wait(self._delay_seconds)  # let those who opened the store read it first
            for _ in self._check_all():
                self._round()
                if self._abandoned or (self._stop.is_set() and self._complained):
                    break  # a medium that refuses views must not hold up the closing
            while not self._stop.is_set():
                self._wake.wait()
                self._stop.wait(self._delay_seconds)
                self._wake.clear()
                self._round()
                if self._pending:  # it failed: try again, but not in a tight loop
                    self._stop.wait(max(self._delay_seconds, 0.1))
                    self._wake.set()
            self._round()
        except Exception:  # a defect here must not take the store down, nor go unseen
            _logger.exception("the views of %s are no longer written: open the store again", self._directory.path)

    def _round(self) -> None:
        """Write all that is waiting, then the witness."""
        if self._abandoned:
            return
        with self._lock:
            self._taken, self._pending = self._pending, {}
            heads = dict(self._heads)
        failed: dict[Key, Record | None] = {}
        for key, record in self._taken.items():
            try:
                if record is None:
                    if self._remove(self._place(key)):
                        with self._lock:
                            self._removed.add(key)
                else:
                    self._write(self._place(key), record.payload)
            except OSError as error:
                failed[key] = record
                self._complain(error, str(key))
        with self._lock:
            self._pending = {**failed, **self._pending}
            self._taken = {}
        if failed:
            return
        if self._touched is None and not self._unchecked:
            self._shown = heads
        try:
            text = log.witness_text(heads, self._shown)
            if text != self._witnessed:
                self._disk.close(self._directory.replace(WITNESS, text, sync=False))
                self._witnessed = text
                self._complained = False
        except OSError as error:
            self._complain(error, WITNESS)

    def _complain(self, error: OSError, what: str) -> None:
        self._unchecked = self._unchecked or self._touched is not None
        if not self._complained:
            self._complained = True
            _logger.warning(explain(error, f"the view of {what} in {self._directory.path} waits"))

    def _place(self, key: Key) -> tuple[str, ...]:
        """Return where the view of ``key`` lies: its directories and its file name."""
        name = key.entity_id + _SUFFIX
        return (key.entity_name, name) if key.domain == self._flat_domain else (key.domain, key.entity_name, name)

    @contextlib.contextmanager
    def _inside(self, directories: tuple[str, ...], *, make: bool = False) -> Iterator[int]:
        """Open the directory below the base, made if asked; a link on the way is refused."""
        with contextlib.ExitStack() as stack:
            at = self._directory.base
            for name in directories:
                try:
                    at = stack.enter_context(opened(self._disk, self._disk.open_directory(name, at=at)))
                except FileNotFoundError:
                    if not make:
                        raise
                    self._disk.mkdir(name, at=at)
                    at = stack.enter_context(opened(self._disk, self._disk.open_directory(name, at=at)))
            yield at

    def _write(self, place: tuple[str, ...], payload: bytes) -> None:
        *directories, name = place
        with self._inside(tuple(directories), make=True) as at:
            try:
                with opened(self._disk, create(self._disk, _TEMPORARY, at=at)) as fd:
                    write_all(self._disk, fd, payload + b"\n")
                self._disk.rename(_TEMPORARY, name, at=at)
            except OSError:
                with contextlib.suppress(OSError):
                    self._disk.unlink(_TEMPORARY, at=at)
                raise

    def _remove(self, place: tuple[str, ...]) -> bool:
        """Remove a view and the directories that it leaves empty; tell whether there was one."""
        *directories, name = place
        try:
            with self._inside(tuple(directories)) as at:
                self._disk.unlink(name, at=at)
        except FileNotFoundError:
            return False
        with contextlib.suppress(OSError):  # not empty
            while directories:
                *directories, name = directories
                with self._inside(tuple(directories)) as at:
                    self._disk.rmdir(name, at=at)
        return True

    # The check of all views, after opening

    def _check_all(self) -> Iterator[None]:
        """Mend every view that does not show its row; yield now and then, so that fresh changes need not wait."""
        with self._lock:
            assert self._touched is not None
            self._touched.update(self._pending)
        scopes = self._scopes()
        # The view of a damaged row may be the last good copy: it stays as it is until the row is written again.
        kept = {self._place(key) for scope in scopes.values() for key in scope.damaged}
        rows = {
            self._place(key): (key, record, record.version <= self._shown.get(name, 0))
            for name, scope in scopes.items()
            for key, record in scope.rows.items()
            if key not in scope.damaged
        }
        gone = {self._place(key) for key in self._gone}
        checked = 0
        for place in self._files(self._directory.base, ()):
            found = rows.pop(place, None)
            try:
                if place not in kept:
                    self._check(place, found, place in gone)
            except OSError as error:
                self._complain(error, "/".join(place))
            checked += 1
            if checked % _CHECKED_AT_ONCE == 0:
                yield
        for place, missing in rows.items():
            try:
                self._check(place, missing, False)
            except OSError as error:
                self._complain(error, "/".join(place))
            checked += 1
            if checked % _CHECKED_AT_ONCE == 0:
                yield
        with self._lock:
            self._touched = None
            self._removed |= self._gone
            self._gone = set()
        yield

    def _files(self, at: int, place: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        """Walk the files below the base directory, two directories deep; sweep our leftover temporary files."""
        disk = self._disk
        try:
            names = sorted(disk.listdir(at))
        except OSError as error:
            self._complain(error, "/".join(place))
            return
        for name in names:
            if not place and name == META:
                continue
            try:
                if name == _TEMPORARY:
                    disk.unlink(name, at=at)  # nobody else writes here: we hold the lock
                    continue
                kind = disk.stat(name, at=at).kind
                if kind is Kind.DIRECTORY and len(place) < 2:
                    with opened(disk, disk.open_directory(name, at=at)) as fd:
                        yield from self._files(fd, (*place, name))
                elif place:
                    yield (*place, name)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._complain(error, "/".join((*place, name)))

    def _check(self, place: tuple[str, ...], found: tuple[Key, Record, bool] | None, gone: bool) -> None:
        if found is None:
            with self._lock:
                fresh = any(self._place(key) == place for key in self._touched or ())
            if gone and not fresh:
                self._remove(place)
            elif not fresh:
                _logger.warning("%s in %s is not Holdfast's: left alone", "/".join(place), self._directory.path)
            return
        key, record, settled = found
        text: bytes | None = None
        with contextlib.suppress(FileNotFoundError):
            text = self._read(place)
        if text == record.payload + b"\n":
            return
        with self._lock:
            if self._touched is not None and key in self._touched:
                return  # changed meanwhile, and written by its own round
        if settled and text is not None:
            kept = self._directory.keep("view." + "=".join(place), text)
            _logger.warning(
                "the view %s in %s was edited or damaged: its bytes are in %s, and it shows the stored row again",
                "/".join(place), self._directory.path, kept,
            )  # fmt: skip
        self._mend(place, key, record)

    def _read(self, place: tuple[str, ...]) -> bytes:
        *directories, name = place
        with self._inside(tuple(directories)) as at:
            if self._disk.stat(name, at=at).kind is not Kind.FILE:
                raise OSError(errno.ELOOP, "it is a link or a directory", name)
            with opened(self._disk, self._disk.open_file(name, Mode.READ, at=at)) as fd:
                return self._disk.read(fd)

    def _mend(self, place: tuple[str, ...], key: Key, record: Record) -> None:
        with self._lock:
            if self._touched is not None and key in self._touched:
                return
        try:
            self._write(place, record.payload)
        except OSError as error:
            with self._lock:
                self._pending.setdefault(key, record)
            self._wake.set()
            self._complain(error, str(key))
