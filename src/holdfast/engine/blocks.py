"""Blocks: the file of the emergency journal, written in place, so that a full disk cannot refuse it.

Layout: two places for the head, of which the newest good one counts; then records, each with its generation, its
number and a checksum over these, its place and its text. A new generation, begun when nothing in the file is needed any
more, makes every older record void by one write of one head.

Invariants:

* The file has its whole length, and real blocks, before anything depends on it; later writes only replace bytes.
* A record counts when its checksum holds and its number follows; the first that does not ends the journal, and one that
  is good behind that is damage, not an end: the file is then refused, and kept.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import struct
from pathlib import Path
from typing import NamedTuple, Protocol

from ..errors import CorruptedError, FailedError, FullError, HeldError, InvalidInputError, UnavailableError

_HEAD = struct.Struct("<8sQQ16s")
"""Magic, generation, length of the file, random id."""
_RECORD = struct.Struct("<4sQQI")
"""Magic, generation, number, length of the text."""
_SUM_BYTES = 16
_MAGIC, _RECORD_MAGIC = b"HOLDFEM1", b"HFR1"
_HEAD_PLACES = (0, 4096)
_FIRST_RECORD = 8192
_GRAIN = 64
"""Records begin at multiples of this."""


class Space(Protocol):
    """The file-system calls of the journal; each may raise ``OSError``. A seam for tests."""

    def read(self) -> bytes:
        """Return the whole file."""
        ...

    def write(self, at: int, data: bytes) -> None:
        """Write all of ``data`` in place, or at the end while the file is made."""
        ...

    def sync(self) -> None:
        """Make what was written durable."""
        ...

    def close(self) -> None:
        """Let go of the file and of its lock."""
        ...


class FileSpace:
    """A file of this machine, locked against other processes.

    Raises:
        HeldError: Another process has it.
        InvalidInputError: There can be no such file.
        UnavailableError: It cannot be opened now.
    """

    def __init__(self, path: str) -> None:
        place = Path(path)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            self._fd = os.open(place, flags, 0o600)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise InvalidInputError(f"emergency is {path!r:.200}: name a file in a folder that exists") from error
        except OSError as error:
            known = error.errno in (errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG)
            kind = InvalidInputError if known else UnavailableError
            raise kind(f"the emergency journal {path!r:.200} cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise HeldError(f"another process uses the emergency journal {path!r:.200}: name one for each") from error
        except OSError as error:
            os.close(self._fd)
            raise UnavailableError(f"the emergency journal {path!r:.200} cannot be locked: {error.strerror}") from error
        self._directory = place.parent

    def read(self) -> bytes:
        """Return the whole file."""
        size, chunks, at = os.fstat(self._fd).st_size, [], 0
        while at < size and (chunk := os.pread(self._fd, size - at, at)):
            chunks.append(chunk)
            at += len(chunk)
        return b"".join(chunks)

    def write(self, at: int, data: bytes) -> None:
        """Write all of ``data`` in place."""
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, at)
            at, view = at + done, view[done:]

    def sync(self) -> None:
        """Make what was written durable, the file's name included."""
        os.fdatasync(self._fd)

    def sync_name(self) -> None:
        """Make a new file's length and name durable."""
        os.fsync(self._fd)
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def cut(self, size_bytes: int) -> None:
        """Make the file as short as it was."""
        os.ftruncate(self._fd, size_bytes)

    def close(self) -> None:
        """Let go of the file and of its lock."""
        os.close(self._fd)


class Entry(NamedTuple):
    """One record."""

    number: int
    text: bytes


def text_of(record: bytes) -> bytes | None:
    """Return the text of one record as it was written; None if it is no record."""
    return record[_RECORD.size + _SUM_BYTES :] if record[: len(_RECORD_MAGIC)] == _RECORD_MAGIC else None


class Blocks:
    """The open journal file. Not for several threads at once.

    Args:
        space: The file.
        name: What to call it in errors.
        size_bytes: How long to make it; a longer one stays.
    """

    def __init__(self, space: Space, name: str, size_bytes: int) -> None:
        self._space, self._name = space, name
        self._failed, self._generation = False, 0
        try:
            found = space.read()
            self._generation, self.journal, made_bytes = self._head(found)
            if len(found) < made_bytes:
                raise CorruptedError(
                    f"the emergency journal {name} was cut from {made_bytes} to {len(found)} bytes: what was kept may "
                    "be gone; compare the positions with the venue, then name another file"
                )
            if self._generation == 0 or len(found) < size_bytes:
                found = self._grown(found, size_bytes)
        except OSError as error:
            raise UnavailableError(f"the emergency journal {name} cannot be set up: {error.strerror}") from error
        self._size = len(found)
        self.entries, self._at = self._scan(found)
        self._number = self.entries[-1].number if self.entries else 0

    def room_bytes(self) -> int:
        """Return how long a text still fits; 0 or less once a write has failed."""
        return 0 if self._failed else self._size - self._at - _RECORD.size - _SUM_BYTES - _GRAIN

    def append(self, text: bytes) -> int:
        """Write a record and make it durable; return its number.

        Raises:
            UnavailableError: It does not fit; nothing was written.
            FailedError: It could not be written; it may lie there, and nothing more is taken.

        Crash: Before the return it is there or not; after it, it is.
        """
        if len(text) > self.room_bytes():
            raise UnavailableError(f"the emergency journal {self._name} has no room: make emergency_bytes larger")
        number = self._number + 1
        data = self._packed(number, text, self._at)
        try:
            self._space.write(self._at, data)
            self._space.sync()
        except OSError as error:
            self._failed = True  # never sync the same descriptor again: the kernel may have dropped what it could not
            raise FailedError(f"the emergency journal {self._name} cannot be written: {error.strerror}") from error
        self._number, self._at = number, _next(self._at + len(data))
        self.entries.append(Entry(number, text))
        return number

    def forget_all(self) -> None:
        """Begin a new generation: no record counts any more.

        Crash: All count, or none.
        """
        if not self.entries or self._failed:
            return
        try:
            self._write_head(self._generation + 1)
        except OSError:
            self._failed = True
            return
        self._generation += 1
        self.entries, self._number, self._at = [], 0, _FIRST_RECORD

    def close(self) -> None:
        """Let go of the file. Repeatable is not needed: the owner closes once."""
        self._space.close()

    # ------------------------------------------------------------------ the medium

    def _packed(self, number: int, text: bytes, at: int) -> bytes:
        head = _RECORD.pack(_RECORD_MAGIC, self._generation, number, len(text))
        return head + self._sum(head, text, at) + text

    def _sum(self, head: bytes, text: bytes, at: int) -> bytes:
        return hashlib.blake2b(
            head + text + at.to_bytes(8, "little"), key=self.journal, digest_size=_SUM_BYTES
        ).digest()

    def _head(self, found: bytes) -> tuple[int, bytes, int]:
        """Return the newest good head's generation, id and length of the file; zeros for a file without one."""
        best = (0, b"", 0)
        for at in _HEAD_PLACES:
            text = found[at : at + _HEAD.size]
            if len(text) < _HEAD.size:
                continue
            magic, generation, made_bytes, journal = _HEAD.unpack(text)
            good = found[at + _HEAD.size : at + _HEAD.size + _SUM_BYTES] == _head_sum(text)
            if magic == _MAGIC and good and generation > best[0]:
                best = (generation, journal, made_bytes)
        first, second = (at + _HEAD.size + _SUM_BYTES for at in _HEAD_PLACES)
        # A cut while it was set up leaves zeros, and perhaps parts of heads.
        if best[0] == 0 and (found[first : _HEAD_PLACES[1]] + found[second:]).strip(b"\0"):
            raise InvalidInputError(f"{self._name} is no emergency journal: name another file")
        return best

    def _grown(self, found: bytes, size_bytes: int) -> bytes:
        try:
            self._lay_out(found, size_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            cut = getattr(self._space, "cut", None)
            if cut is not None:
                cut(len(found))  # what it got was the last room of a store, perhaps
            if self._generation == 0:  # it holds nothing: whoever wants to can go on without it
                raise FullError(f"the emergency journal {self._name} cannot be set up: {error.strerror}") from error
            return found  # as long as it was will have to do
        return found.ljust(size_bytes, b"\0")

    def _lay_out(self, found: bytes, size_bytes: int) -> None:
        """Give the file real blocks for its whole length, then a head: without a head it holds nothing."""
        zeros = bytes(65536)
        # Zeros are written, not only set aside: a first write into blocks that were only set aside may need room again.
        for at in range(len(found), size_bytes, len(zeros)):
            self._space.write(at, zeros[: size_bytes - at])
        sync_name = getattr(self._space, "sync_name", self._space.sync)
        sync_name()
        if self._generation == 0:
            self.journal = secrets.token_bytes(16)
            for _ in _HEAD_PLACES:
                self._generation += 1
                self._write_head(self._generation, size_bytes)

    def _write_head(self, generation: int, size_bytes: int = 0) -> None:
        text = _HEAD.pack(_MAGIC, generation, size_bytes or self._size, self.journal)
        self._space.write(_HEAD_PLACES[generation % 2], text + _head_sum(text))
        self._space.sync()

    def _scan(self, found: bytes) -> tuple[list[Entry], int]:
        entries: list[Entry] = []
        at = _FIRST_RECORD
        while (entry := self._entry(found, at)) is not None and entry.number == len(entries) + 1:
            entries.append(entry)
            at = _next(at + _RECORD.size + _SUM_BYTES + len(entry.text))
        place = found.find(_RECORD_MAGIC, at)
        while place >= 0:
            behind = self._entry(found, place) if place % _GRAIN == 0 else None
            if behind is not None and behind.number > len(entries):
                raise CorruptedError(
                    f"the emergency journal {self._name} is damaged before record {behind.number}: keep a copy, "
                    "compare it with the venue, then name another file"
                )
            place = found.find(_RECORD_MAGIC, place + 1)
        return entries, at

    def _entry(self, found: bytes, at: int) -> Entry | None:
        head = found[at : at + _RECORD.size]
        if len(head) < _RECORD.size:
            return None
        magic, generation, number, length = _RECORD.unpack(head)
        if magic != _RECORD_MAGIC or generation != self._generation:
            return None
        begin = at + _RECORD.size + _SUM_BYTES
        text = found[begin : begin + length]
        good = found[at + _RECORD.size : begin] == self._sum(head, text, at)
        return Entry(number, text) if good else None


def _head_sum(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=_SUM_BYTES).digest()


def _next(at: int) -> int:
    return -(-at // _GRAIN) * _GRAIN
