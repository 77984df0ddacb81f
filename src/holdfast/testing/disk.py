"""A simulated process's file-system calls, on a :class:`~holdfast.testing.medium.Medium`."""

from __future__ import annotations

import errno
import itertools
import os

from ..backends.disk import Entry, Kind, Mode
from .medium import SECTOR_BYTES, Change, Cut, Grow, Medium, NewName, Node, Sector


class SimulatedDisk:
    """One process's view of a :class:`Medium`; implements :class:`holdfast.backends.disk.Disk`.

    After :meth:`kill` every call fails and changes nothing, as for a process that is no more; what it wrote
    stays in the medium's cache, and its locks are free.
    """

    def __init__(self, medium: Medium) -> None:
        self.medium = medium
        self.dead = False
        self.kill_at: int | None = None
        """Number of the medium's changing call before which this process dies."""
        self.failing_syncs: set[int] = set()
        """Which syncs of this process (1 is the first) fail with EIO."""
        self._syncs = 0
        self._fds: dict[int, tuple[Node, bool]] = {}
        self._numbers = itertools.count(1000)

    def kill(self) -> None:
        """End the simulated process here."""
        with self.medium.lock:
            self.dead = True
            for node, _ in self._fds.values():
                if node.holder is self:
                    node.holder = None

    def _call(self, *, change: bool = False) -> None:
        if change and not self.dead:
            if self.kill_at is not None and self.medium.calls >= self.kill_at:
                self.kill()
            else:
                self.medium.before_change()
                self.medium.calls += 1
        if self.dead:
            raise OSError(errno.EIO, "the simulated process was killed")

    def _node(self, fd: int, *, directory: bool | None = None) -> Node:
        try:
            node, _ = self._fds[fd]
        except KeyError:
            raise _error(errno.EBADF, str(fd)) from None
        if directory is not None and node.directory is not directory:
            raise _error(errno.ENOTDIR if directory else errno.EISDIR, node.path)
        return node

    def _hand_out(self, node: Node, *, writable: bool) -> int:
        fd = next(self._numbers)
        self._fds[fd] = (node, writable)
        return fd

    def _child(self, name: str, at: int) -> Node:
        assert name not in ("", ".", "..") and "/" not in name, name
        parent = self._node(at, directory=True)
        try:
            return parent.names[name]
        except KeyError:
            raise _error(errno.ENOENT, name) from None

    def open_base(self, path: str) -> int:
        with self.medium.lock:
            self._call()
            node = self.medium.root
            for part in path.strip("/").split("/"):
                if part and part not in node.names:
                    raise _error(errno.ENOENT, path)
                node = node.names[part] if part else node
                if not node.directory:
                    raise _error(errno.ENOTDIR, path)
            return self._hand_out(node, writable=False)

    def open_directory(self, name: str, *, at: int) -> int:
        with self.medium.lock:
            self._call()
            node = self._child(name, at)
            if not node.directory:
                raise _error(errno.ENOTDIR, name)
            return self._hand_out(node, writable=False)

    def open_file(self, name: str, mode: Mode, *, at: int) -> int:
        with self.medium.lock:
            parent = self._node(at, directory=True)
            there = parent.names.get(name)
            makes = there is None and mode in (Mode.CREATE, Mode.KEEP)
            self._call(change=makes)
            if there is None and not makes:
                raise _error(errno.ENOENT, name)
            if there is not None and mode is Mode.CREATE:
                raise _error(errno.EEXIST, name)
            if there is not None and there.directory:
                raise _error(errno.EISDIR, name)
            node = there or self.medium.make(parent, name, directory=False)
            return self._hand_out(node, writable=mode is not Mode.READ)

    def close(self, fd: int) -> None:
        with self.medium.lock:
            node = self._node(fd)
            del self._fds[fd]
            if node.holder is self:
                node.holder = None
            self._call()

    def read(self, fd: int) -> bytes:
        with self.medium.lock:
            self._call()
            return bytes(self._node(fd, directory=False).data)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        with self.medium.lock:
            node = self._writable(fd)
            self._call(change=True)
            start, piece = len(node.data), bytes(data)
            changes: list[Change] = [Grow(start + len(piece))]
            at = start
            while at < start + len(piece):
                end = min((at // SECTOR_BYTES + 1) * SECTOR_BYTES, start + len(piece))
                changes.append(Sector(at, piece[at - start : end - start]))
                at = end
            node.note(*changes)
            return len(piece)

    def _writable(self, fd: int) -> Node:
        node = self._node(fd, directory=False)
        if not self._fds[fd][1]:
            raise _error(errno.EBADF, node.path)
        return node

    def truncate(self, fd: int, size: int) -> None:
        with self.medium.lock:
            node = self._writable(fd)
            self._call(change=True)
            node.note(Cut(size) if size <= len(node.data) else Grow(size))

    def fdatasync(self, fd: int) -> None:
        with self.medium.lock:
            self._call(change=True)
            node = self._node(fd)
            self._syncs += 1
            if self._syncs in self.failing_syncs:
                node.doom()
                raise _error(errno.EIO, node.path)
            node.sync()

    def fsync(self, fd: int) -> None:
        self.fdatasync(fd)

    def mkdir(self, name: str, *, at: int) -> None:
        with self.medium.lock:
            parent = self._node(at, directory=True)
            self._call(change=True)
            if name in parent.names:
                raise _error(errno.EEXIST, name)
            self.medium.make(parent, name, directory=True)

    def rename(self, old: str, new: str, *, at: int) -> None:
        with self.medium.lock:
            node = self._child(old, at)
            self._call(change=True)
            there = self._node(at).names.get(new)
            if there is not None and there.directory:
                raise _error(errno.EISDIR, new)
            self._node(at).note(NewName(new, node, gone=old))

    def unlink(self, name: str, *, at: int) -> None:
        with self.medium.lock:
            if self._child(name, at).directory:
                raise _error(errno.EISDIR, name)
            self._call(change=True)
            self._node(at).note(NewName(name, None))

    def rmdir(self, name: str, *, at: int) -> None:
        with self.medium.lock:
            if self._child(name, at).names:
                raise _error(errno.ENOTEMPTY, name)
            self._call(change=True)
            self._node(at).note(NewName(name, None))

    def listdir(self, fd: int) -> list[str]:
        with self.medium.lock:
            self._call()
            return list(self._node(fd, directory=True).names)

    def stat(self, name: str, *, at: int) -> Entry:
        with self.medium.lock:
            self._call()
            return _entry_of(self._child(name, at))

    def fstat(self, fd: int) -> Entry:
        with self.medium.lock:
            self._call()
            return _entry_of(self._node(fd))

    def lock(self, fd: int) -> bool:
        with self.medium.lock:
            self._call()
            node = self._node(fd)
            if node.holder not in (None, self):
                return False
            node.holder = self
            return True

    def filesystem(self, fd: int) -> str:
        self._node(fd)
        return "ext4"

    @property
    def open_files(self) -> int:
        """How many descriptors are open."""
        return len(self._fds)


def _entry_of(node: Node) -> Entry:
    kind = Kind.DIRECTORY if node.directory else Kind.FILE
    return Entry(kind, len(node.data), node.inode)


def _error(number: int, what: str) -> OSError:
    return OSError(number, os.strerror(number), what)
