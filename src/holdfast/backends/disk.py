"""The seam: every file-system call that the file backend makes, and no other.

A simulated disk implements :class:`Disk` to record calls, to fail the n-th one,
or to rebuild what a power cut may leave. What an implementation may rely on:

* A directory is opened once by absolute path (the base directory and, while it
  is created, its parents); everything else is named relative to an open
  directory by one plain path component, never ``.``, ``..`` or with a ``/``.
* Files are only ever appended to (``write`` goes to the end), truncated, or
  replaced by ``rename`` within one directory. Nothing is written in place.
* Calls come from several threads, never two at once on one descriptor, and never
  from the event loop's thread.
* Failures are ``OSError`` with the errno of the system call.

Invariants kept here: descriptors are close-on-exec; the last component is never
followed if it is a symbolic link; files are 0600 and directories 0700 whatever
the umask.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import NamedTuple, Protocol


class Mode(enum.Enum):
    """How a file is opened."""

    READ = "read"
    """An existing file, for reading."""
    APPEND = "append"
    """An existing file, for reading, appending and truncating."""
    CREATE = "create"
    """A new file, for reading, appending and truncating; fails with EEXIST if the name is taken."""
    KEEP = "keep"
    """As APPEND, or as CREATE if there is none."""


class Kind(enum.Enum):
    """What a name stands for."""

    FILE = "file"
    DIRECTORY = "directory"
    OTHER = "other"
    """A symbolic link, a pipe, a device, a socket."""


class Entry(NamedTuple):
    """What ``stat`` tells of a file or directory."""

    kind: Kind
    size: int
    inode: int


class Disk(Protocol):
    """The file-system calls of the file backend. Every method may raise ``OSError``."""

    def open_base(self, path: str) -> int:
        """Open an existing directory by its absolute path (links in it are followed) and return a descriptor."""
        ...

    def open_directory(self, name: str, *, at: int) -> int:
        """Open the directory ``name`` that lies in the directory ``at``; a link is refused (ENOTDIR or ELOOP)."""
        ...

    def open_file(self, name: str, mode: Mode, *, at: int) -> int:
        """Open the file ``name`` in the directory ``at``; a link is refused (ELOOP). Never blocks on a pipe."""
        ...

    def close(self, fd: int) -> None:
        """Close a descriptor of a file or directory; a lock taken with it is let go."""
        ...

    def read(self, fd: int) -> bytes:
        """Return all bytes of the file, from its beginning to its end."""
        ...

    def write(self, fd: int, data: bytes | memoryview) -> int:
        """Append ``data``; return how many bytes were taken, which may be fewer than given: call again."""
        ...

    def truncate(self, fd: int, size: int) -> None:
        """Cut the file to ``size`` bytes."""
        ...

    def fdatasync(self, fd: int) -> None:
        """Make the file's bytes and its length durable. Not its name: that takes ``fsync`` of the directory."""
        ...

    def fsync(self, fd: int) -> None:
        """Make a directory's entries (or a file's bytes, length and attributes) durable."""
        ...

    def mkdir(self, name: str, *, at: int) -> None:
        """Make the directory ``name`` in ``at``, 0700."""
        ...

    def rename(self, old: str, new: str, *, at: int) -> None:
        """Rename within the directory ``at``, replacing ``new`` if it is there; atomic while the power is on."""
        ...

    def unlink(self, name: str, *, at: int) -> None:
        """Remove the file ``name`` from the directory ``at``."""
        ...

    def rmdir(self, name: str, *, at: int) -> None:
        """Remove the empty directory ``name`` from the directory ``at``."""
        ...

    def listdir(self, fd: int) -> list[str]:
        """Return the names in an open directory, in any order, without ``.`` and ``..``."""
        ...

    def stat(self, name: str, *, at: int) -> Entry:
        """Tell what ``name`` in the directory ``at`` is; a link is told as itself, not followed."""
        ...

    def fstat(self, fd: int) -> Entry:
        """Tell what an open descriptor is."""
        ...

    def lock(self, fd: int) -> bool:
        """Take the exclusive ``flock`` of an open file without waiting; False if somebody else has it."""
        ...

    def filesystem(self, fd: int) -> str:
        """Return the kind of file system that an open directory lies on, such as ``ext4``; ``""`` if unknown."""
        ...


_BASE = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # O_NONBLOCK: opening a pipe must fail or return, not hang
_FLAGS = {
    Mode.READ: _BASE | os.O_RDONLY,
    Mode.APPEND: _BASE | os.O_RDWR | os.O_APPEND,
    Mode.CREATE: _BASE | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL,
    Mode.KEEP: _BASE | os.O_RDWR | os.O_APPEND,
}
_CHUNK_BYTES = 4 * 1024 * 1024


def _entry(found: os.stat_result) -> Entry:
    mode = found.st_mode
    kind = Kind.FILE if stat.S_ISREG(mode) else Kind.DIRECTORY if stat.S_ISDIR(mode) else Kind.OTHER
    return Entry(kind, found.st_size, found.st_ino)


class OsDisk:
    """The real disk. Has no state; one instance may be shared."""

    def open_base(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def open_directory(self, name: str, *, at: int) -> int:
        return os.open(name, _BASE | os.O_RDONLY | os.O_DIRECTORY, dir_fd=at)

    def open_file(self, name: str, mode: Mode, *, at: int) -> int:
        if mode is Mode.KEEP:
            try:
                return self.open_file(name, Mode.CREATE, at=at)
            except FileExistsError:
                pass
        fd = os.open(name, _FLAGS[mode], 0o600, dir_fd=at)
        if mode is Mode.CREATE:
            try:
                os.fchmod(fd, 0o600)  # the umask may only have taken bits away; the owner must keep both
            except OSError:
                os.close(fd)
                raise
        return fd

    def close(self, fd: int) -> None:
        os.close(fd)

    def read(self, fd: int) -> bytes:
        chunks: list[bytes] = []
        at = 0
        # One large read first: most files are read whole by it, without joining.
        want = max(os.fstat(fd).st_size + 1, 1)
        while True:
            chunk = os.pread(fd, min(want, 1 << 30), at)
            if not chunk:
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)
            chunks.append(chunk)
            at += len(chunk)
            want = _CHUNK_BYTES

    def write(self, fd: int, data: bytes | memoryview) -> int:
        return os.write(fd, data)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def mkdir(self, name: str, *, at: int) -> None:
        os.mkdir(name, 0o700, dir_fd=at)
        os.chmod(name, 0o700, dir_fd=at)  # a umask may have taken the owner's own bits

    def rename(self, old: str, new: str, *, at: int) -> None:
        os.rename(old, new, src_dir_fd=at, dst_dir_fd=at)

    def unlink(self, name: str, *, at: int) -> None:
        os.unlink(name, dir_fd=at)

    def rmdir(self, name: str, *, at: int) -> None:
        os.rmdir(name, dir_fd=at)

    def listdir(self, fd: int) -> list[str]:
        return os.listdir(fd)

    def stat(self, name: str, *, at: int) -> Entry:
        return _entry(os.stat(name, dir_fd=at, follow_symlinks=False))

    def fstat(self, fd: int) -> Entry:
        return _entry(os.fstat(fd))

    def lock(self, fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        return True

    def filesystem(self, fd: int) -> str:
        try:
            facts = Path(f"/proc/self/fdinfo/{fd}").read_text()
            mount_id = next(line.split()[1] for line in facts.splitlines() if line.startswith("mnt_id:"))
            for line in Path("/proc/self/mountinfo").read_text().splitlines():
                if line.split(" ", 1)[0] == mount_id:
                    return line.split(" - ", 1)[1].split(" ", 1)[0]
        except (OSError, StopIteration, IndexError):
            pass
        return ""
