"""A file system that can lose its power: ``python losing_fs.py IMAGE MOUNT [posix|journal]``, with mfusepy at hand.

It begins as the tree ``IMAGE``, which it takes over. What processes write is seen by all at once; what was not made
durable is gone after the cut, which is asked for by ``mkdir MOUNT/.cut-KEEP-SEED``: the tree that a disk would hold is
then left in ``IMAGE``, and every later call fails with EIO.

* A file's bytes and length are durable once ``fsync`` or ``fdatasync`` of it has returned.
* Names in directories are durable after an ``fsync`` of their directory (``posix``); or, as on ext4, after the next
  ``fsync`` of anything (``journal``).
* At a cut ``KEEP`` says what becomes of the rest: ``none`` of it is kept; or ``some``: of each file the first few
  writes, the last of them torn at 512 bytes, and of the names all or none.

Owners and modes are kept as they were last seen. Runs as root: what may be done is checked by the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import stat
import sys
import time
from pathlib import Path

import mfusepy  # type: ignore[import-not-found]

SECTOR_BYTES = 512


class Node:
    """A file, a directory or a symbolic link; what is seen of it, and what is durable."""

    def __init__(self, mode: int, uid: int, gid: int) -> None:
        self.mode, self.uid, self.gid = mode, uid, gid
        self.times = (time.time_ns(),) * 3
        self.names: dict[str, Node] = {}
        self.durable_names: dict[str, Node] = {}
        self.target = ""
        self.seen = ""
        """Path of the file's bytes."""
        self.durable = ""
        """Path of its durable bytes; empty while they are those that are seen."""
        self.left = ""
        """Where the cut has left it."""
        self.pending: list[tuple[int, bytes | None]] = []
        """Writes (where, what) and new lengths (length, None) since the last sync, in order."""


class LosingFs(mfusepy.Operations):  # type: ignore[misc]
    """The calls of the file system; one at a time."""

    use_ns = True

    def __init__(self, image: Path, order: str) -> None:
        self.image, self.order = image, order
        self.store = image.with_name(image.name + ".bytes")
        shutil.rmtree(self.store, ignore_errors=True)
        self.store.mkdir(parents=True)
        self.count = 0
        self.is_cut = False
        self.changed: set[Node] = set()
        """Directories whose names are not durable."""
        self.open_files: dict[int, Node] = {}
        self.root = self._taken_over(image)

    def _taken_over(self, path: Path) -> Node:
        found = path.lstat()
        node = Node(found.st_mode, found.st_uid, found.st_gid)
        if stat.S_ISDIR(found.st_mode):
            node.names = {one.name: self._taken_over(one) for one in path.iterdir()}
            node.durable_names = dict(node.names)
        elif stat.S_ISLNK(found.st_mode):
            node.target = str(path.readlink())
        else:
            node.seen = self._new_bytes()
            path.rename(node.seen)
        return node

    def _new_bytes(self) -> str:
        self.count += 1
        return str(self.store / str(self.count))

    # -- names

    def _node(self, path: str) -> Node:
        if self.is_cut and path != "/":  # which is looked at to see whether it is mounted
            raise mfusepy.FuseOSError(errno.EIO)
        node = self.root
        for name in path.split("/"):
            if name:
                found = node.names.get(name)
                if found is None:
                    raise mfusepy.FuseOSError(errno.ENOENT)
                node = found
        return node

    def _place(self, path: str) -> tuple[Node, str]:
        folder, _, name = path.rpartition("/")
        return self._node(folder), name

    def _put(self, path: str, node: Node) -> None:
        folder, name = self._place(path)
        folder.names[name] = node
        self.changed.add(folder)

    def _drop(self, path: str) -> None:
        folder, name = self._place(path)
        if name not in folder.names:
            raise mfusepy.FuseOSError(errno.ENOENT)
        del folder.names[name]
        self.changed.add(folder)

    def _made(self, path: str, mode: int) -> Node:
        uid, gid, _ = mfusepy.fuse_get_context()
        node = Node(mode, uid, gid)
        self._put(path, node)
        return node

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        node = self.open_files[fh] if fh in self.open_files else self._node(path)
        size = Path(node.seen).stat().st_size if node.seen else len(node.target)
        at, changed, modified = node.times
        return {
            "st_mode": node.mode, "st_uid": node.uid, "st_gid": node.gid, "st_size": size, "st_nlink": 1,
            "st_blocks": -(-size // 512), "st_blksize": 4096,
            "st_atime": at, "st_ctime": changed, "st_mtime": modified, "st_ino": id(node) & 0x7FFFFFFF,
        }  # fmt: skip

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *self._node(path).names]

    def mkdir(self, path: str, mode: int) -> int:
        if path.startswith("/.cut-"):
            _, keep, seed = path[1:].split("-")
            self._cut(keep, random.Random(int(seed)))
            return 0
        self._made(path, stat.S_IFDIR | mode)
        return 0

    def rmdir(self, path: str) -> int:
        if self._node(path).names:
            raise mfusepy.FuseOSError(errno.ENOTEMPTY)
        self._drop(path)
        return 0

    def unlink(self, path: str) -> int:
        self._drop(path)
        return 0

    def rename(self, old: str, new: str) -> int:
        node = self._node(old)
        self._drop(old)
        self._put(new, node)
        return 0

    def link(self, target: str, source: str) -> int:
        self._put(target, self._node(source))
        return 0

    def symlink(self, target: str, source: str) -> int:
        self._made(target, stat.S_IFLNK | 0o777).target = source
        return 0

    def readlink(self, path: str) -> str:
        return self._node(path).target

    def chmod(self, path: str, mode: int) -> int:
        node = self._node(path)
        node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        node = self._node(path)
        node.uid = node.uid if uid in (-1, 0xFFFFFFFF) else uid
        node.gid = node.gid if gid in (-1, 0xFFFFFFFF) else gid
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        node = self._node(path)
        now = time.time_ns()
        at, modified = times or (now, now)
        node.times = (at, now, modified)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self.store)
        return {name: getattr(found, name) for name in dir(found) if name.startswith("f_") and name != "f_fsid"}

    # -- bytes

    def create(self, path: str, mode: int, fi: object = None) -> int:
        node = self._made(path, stat.S_IFREG | mode)
        node.seen, node.durable = self._new_bytes(), self._new_bytes()
        for one in (node.seen, node.durable):
            Path(one).touch()
        return self._opened(node)

    def open(self, path: str, flags: int) -> int:
        node = self._node(path)
        fh = self._opened(node)
        if flags & os.O_TRUNC:
            self._write(node, fh, 0, None)
        return fh

    def _opened(self, node: Node) -> int:
        fh = os.open(node.seen, os.O_RDWR)
        self.open_files[fh] = node
        return fh

    def release(self, path: str, fh: int) -> int:
        self.open_files.pop(fh, None)
        os.close(fh)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        if self.is_cut:
            raise mfusepy.FuseOSError(errno.EIO)
        self._write(self.open_files[fh], fh, offset, data)
        return len(data)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        if fh is not None and fh in self.open_files:
            self._write(self.open_files[fh], fh, length, None)
            return 0
        node = self._node(path)
        own = os.open(node.seen, os.O_RDWR)
        try:
            self._write(node, own, length, None)
        finally:
            os.close(own)
        return 0

    def _write(self, node: Node, fh: int, offset: int, data: bytes | None) -> None:
        if not node.durable:  # from now on they differ
            node.durable = self._new_bytes()
            shutil.copyfile(node.seen, node.durable)
        node.pending.append((offset, data))
        _apply(fh, offset, data)
        node.times = (node.times[0], *(time.time_ns(),) * 2)

    def flush(self, path: str, fh: int) -> int:
        return 0  # closing makes nothing durable

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        if self.is_cut:
            raise mfusepy.FuseOSError(errno.EIO)
        node = self.open_files[fh]
        _persist(node, node.pending)
        node.pending = []
        if self.order == "journal":
            self._commit_names(self.changed)
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        node = self._node(path)
        self._commit_names(self.changed if self.order == "journal" else {node})
        return 0

    def _commit_names(self, folders: set[Node]) -> None:
        for folder in list(folders):
            folder.durable_names = dict(folder.names)
            self.changed.discard(folder)

    # -- the cut

    def _cut(self, keep: str, chance: random.Random) -> None:
        """Leave in the image what a disk would hold, and be dead from now on."""
        self.is_cut = True
        if keep == "some" and chance.random() < 0.5:
            self._commit_names(self.changed)
        shutil.rmtree(self.image, ignore_errors=True)
        self._leave(self.root, self.image, keep, chance)

    def _leave(self, node: Node, path: Path, keep: str, chance: random.Random) -> None:
        if stat.S_ISDIR(node.mode):
            path.mkdir(parents=True)
            for name, one in sorted(node.durable_names.items()):
                self._leave(one, path / name, keep, chance)
        elif stat.S_ISLNK(node.mode):
            path.symlink_to(node.target)
        else:
            if keep == "some" and node.pending:
                _persist(node, _torn(node.pending, chance))
            if node.left:  # it has two names
                shutil.copyfile(node.left, path)
            else:
                os.rename(node.durable or node.seen, path)  # noqa: PTH104
            node.left = str(path)
        os.chown(path, node.uid, node.gid, follow_symlinks=False)
        if not stat.S_ISLNK(node.mode):
            path.chmod(stat.S_IMODE(node.mode))


def _apply(fd: int, offset: int, data: bytes | None) -> None:
    if data is None:
        os.ftruncate(fd, offset)
    else:
        os.pwrite(fd, data, offset)


def _persist(node: Node, changes: list[tuple[int, bytes | None]]) -> None:
    if not changes:
        return
    fd = os.open(node.durable, os.O_RDWR)
    try:
        for offset, data in changes:
            _apply(fd, offset, data)
    finally:
        os.close(fd)


def _torn(changes: list[tuple[int, bytes | None]], chance: random.Random) -> list[tuple[int, bytes | None]]:
    """Return the first few changes, the last of them cut off at a sector's end."""
    kept = changes[: chance.randint(0, len(changes))]
    offset, data = kept[-1] if kept else (0, None)
    if data:
        end = (offset // SECTOR_BYTES + chance.randint(0, len(data) // SECTOR_BYTES + 1)) * SECTOR_BYTES
        kept[-1] = (offset, data[: max(0, end - offset)])
    return kept


def main() -> None:
    """Mount it and stay until it is unmounted."""
    image, mount = map(Path, sys.argv[1:3])
    order = sys.argv[3] if len(sys.argv) > 3 else "journal"
    with contextlib.suppress(KeyboardInterrupt):
        mfusepy.FUSE(
            LosingFs(image, order), str(mount), foreground=True, nothreads=True, allow_other=True,
            default_permissions=True, fsname="losing", attr_timeout=60, entry_timeout=60,
            auto_unmount=True,  # a test run that is killed must not leave a dead mount behind
        )  # fmt: skip


if __name__ == "__main__":
    main()
