"""The directory that one process owns: made, attested, locked and swept. Synchronous.

Invariants:

* The path that the user names may hold links; no name below it is ever followed.
* The lock is the ``flock`` of a file that still has its name; who holds it may write, and nobody else does.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import os
import socket
import sys
import time
from pathlib import Path

import msgspec

from ..contract import How, Survives
from ..errors import FencedError, HeldError, HoldfastError, NotFoundError, UnavailableError, UnsafeSettingError
from . import log
from .disk import Disk, Kind, Mode
from .quarantine import create, keep, opened, write_all

META = ".holdfast"
LOG = "commit.log"
LOCK = "lock"
WITNESS = "witness"
TEMPORARY = ".tmp"
_OURS = frozenset((LOG, LOCK, WITNESS, "quarantine"))
_SOLID = frozenset(("ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "jfs"))
_VOLATILE = frozenset(("tmpfs", "ramfs", "overlay", "aufs", "rootfs"))
_REMOTE = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "afs", "lustre", "fuse.sshfs", "fuse.glusterfs",
     "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse", "fuse.ceph", "davfs", "fuse.davfs2")
)  # fmt: skip
_LOOK_EVERY_SECONDS = 0.1
_logger = logging.getLogger("holdfast")


class Holder(msgspec.Struct, frozen=True):
    """Who has the directory open for writing."""

    pid: int
    host: str
    since: str
    command: str


def explain(error: OSError, doing: str) -> str:
    """Return one sentence on a failed file-system call, with the remedy."""
    remedy = {
        "ENOSPC": "free some disk space",
        "EDQUOT": "free some of the quota",
        "EFBIG": "raise the file size limit (ulimit -f)",
        "EMFILE": "raise the limit of open files (ulimit -n)",
        "ENFILE": "raise the system's limit of open files",
        "EACCES": "give this user the right to read and write there",
        "EPERM": "give this user the right to read and write there",
        "EROFS": "mount the file system for writing",
        "ENOTDIR": "give the path of a directory",
        "EIO": "check the disk (dmesg, smartctl)",
        "ENOENT": "name a place where directories can be made",
    }.get(_code(error), "mend that and try again")
    return f"{doing}: {error.strerror or error}: {remedy}"


def _code(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "")


class Directory:
    """One store's directory, open or not. Made anew for each opening."""

    def __init__(self, path: str, disk: Disk) -> None:
        self.path = path
        self.name = f"file:{path}"
        self.disk = disk
        self.base = -1
        self.meta = -1
        self.warnings: list[str] = []
        self._lock = -1
        self._lock_inode = 0
        self._look_at = 0.0

    def open_read_only(self) -> None:
        """Open it without the lock, changing nothing."""
        try:
            self.base = self.disk.open_base(self.path)
            self.meta = self.disk.open_directory(META, at=self.base)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"there is no store at {self.path}: check the path", backend=self.name) from error

    def open_for_writing(self) -> None:
        """Make what is missing, take the lock and sweep leftovers.

        Crash: Leaves some of the directories; opening again makes the rest.
        """
        self._open_base()
        try:
            self.meta = self.disk.open_directory(META, at=self.base)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):  # another process may be starting at this moment
                self.disk.mkdir(META, at=self.base)
            self.meta = self.disk.open_directory(META, at=self.base)
        except OSError as error:
            raise self.odd(META, error) from error
        self._take_lock()
        self._sweep()

    def release(self) -> None:
        """Close everything, the lock last. Repeatable."""
        for name in ("meta", "base", "_lock"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                with contextlib.suppress(OSError):  # the descriptor is gone either way
                    self.disk.close(fd)

    def _open_base(self) -> None:
        """Open the base directory, made with its parents if it is missing."""
        disk = self.disk
        missing: list[str] = []
        path = Path(self.path)
        while True:
            try:
                fd = disk.open_base(str(path))
                break
            except FileNotFoundError:
                if path.parent == path:
                    raise
                missing.append(path.name)
                path = path.parent
        while missing:
            with opened(disk, fd):
                name = missing.pop()
                # Somebody else may be making the same parents at this moment.
                with contextlib.suppress(FileExistsError):
                    disk.mkdir(name, at=fd)
                path = path / name
            fd = disk.open_base(str(path))
        self.base = fd
        for name in disk.listdir(fd):
            if name != META and disk.stat(name, at=fd).kind is not Kind.DIRECTORY:
                self.warnings.append(f"{name!r:.200} in {self.path} is not Holdfast's: left alone")

    def attest(self, *, read_only: bool) -> tuple[Survives, How]:
        """Return what a synced file survives here, by the kind of file system.

        Raises:
            UnsafeSettingError: It is a network file system, and ``read_only`` is not set.
        """
        kind = self.disk.filesystem(self.base)
        if kind in _REMOTE:
            reason = f"{self.path} lies on a network file system ({kind}), where locks and syncs cannot be trusted"
            if not read_only:
                raise UnsafeSettingError(f"{reason}: use a local disk", backend=self.name)
            self.warnings.append(reason)
            return Survives.PROCESS, How.ASSUMED
        if kind in _VOLATILE:
            self.warnings.append(
                f"{self.path} lies on {kind}: what is stored there may be gone after a power cut or with its "
                "container: put it on a disk or a mounted volume"
            )
            return Survives.PROCESS, How.ATTESTED
        if kind in _SOLID:
            return Survives.HOST, How.ATTESTED
        self.warnings.append(f"{self.path} lies on {kind or 'an unknown file system'}, which was not tested")
        return Survives.HOST, How.ASSUMED

    def _take_lock(self) -> None:
        disk = self.disk
        for _ in range(8):
            try:
                self._lock = disk.open_file(LOCK, Mode.KEEP, at=self.meta)
            except OSError as error:
                raise self.odd(LOCK, error) from error
            if not disk.lock(self._lock):
                raise self._held(disk.read(self._lock))
            # The holder before us may have had its lock file deleted: then this is a lock on a file without a name.
            with contextlib.suppress(FileNotFoundError):
                self._lock_inode = disk.fstat(self._lock).inode
                if disk.stat(LOCK, at=self.meta).inode == self._lock_inode:
                    self._sign_lock()
                    return
            disk.close(self._lock)
            self._lock = -1
        raise HeldError(f"the lock file of {self.path} keeps changing: another process starts and ends there")

    def _sign_lock(self) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        # Only the program's name: arguments may hold secrets.
        holder = Holder(os.getpid(), socket.gethostname(), now, " ".join(("python", *sys.argv[:1])))
        try:
            self.disk.truncate(self._lock, 0)
            write_all(self.disk, self._lock, msgspec.json.encode(holder) + b"\n")
        except OSError as error:  # only what other processes are told hangs on it, and a full disk must still open
            _logger.warning(explain(error, f"cannot sign the lock of {self.path}"))

    def _held(self, text: bytes) -> HeldError:
        try:
            by = msgspec.json.decode(text, type=Holder)
            who = f"process {by.pid} on {by.host} ({by.command}), which opened it at {by.since}"
        except msgspec.DecodeError:
            who = "another process"
        return HeldError(f"{self.path} is held by {who}: end that process, or use another directory", backend=self.name)

    def _sweep(self) -> None:
        """Remove leftover temporary files: with the lock held, nobody is writing one."""
        for name in self.disk.listdir(self.meta):
            if name in (LOG + TEMPORARY, WITNESS + TEMPORARY):
                self.disk.unlink(name, at=self.meta)
            elif name not in _OURS:
                self.warnings.append(f"{name!r:.200} in {self.path}/{META} is not Holdfast's: left alone")

    def read_witness(self) -> log.WitnessLine:
        """Return what was known to be durable some time ago; nothing if that file is missing or damaged."""
        try:
            fd = self.disk.open_file(WITNESS, Mode.READ, at=self.meta)
        except FileNotFoundError:
            return log.WitnessLine({}, {})
        except OSError as error:
            raise self.odd(WITNESS, error) from error
        with opened(self.disk, fd):
            found = log.read_witness(self.disk.read(fd))
        if found is None:
            # Written without a sync, so a power cut may leave it damaged. It only ever adds a check.
            _logger.info("the witness file of %s cannot be read: going on without it", self.path)
        return found or log.WitnessLine({}, {})

    def odd(self, name: str, error: OSError | None) -> HoldfastError | OSError:
        """Return what to raise when one of our names is a link, a pipe or a directory; or the error itself."""
        if error is not None and _code(error) not in ("ELOOP", "ENOTDIR", "EISDIR", "ENXIO"):
            return error
        return UnsafeSettingError(
            f"{self.path}/{META}/{name} is not a plain file or directory of Holdfast's (a link, perhaps): "
            "move it away; links are never followed",
            backend=self.name,
        )

    def holds_views(self) -> bool:
        """Tell whether anything here looks like the view of a row."""
        disk = self.disk

        def search(at: int, depth: int) -> bool:
            for name in disk.listdir(at):
                if name.startswith("."):
                    continue
                kind = disk.stat(name, at=at).kind
                if kind is Kind.FILE and depth and name.endswith(".json"):
                    return True
                if kind is Kind.DIRECTORY and depth < 2:
                    with opened(disk, disk.open_directory(name, at=at)) as fd:
                        if search(fd, depth + 1):
                            return True
            return False

        return search(self.base, 0)

    def sync_parents(self) -> None:
        """Make the directory's own name durable, and those of its parents.

        Any of them may have been made by a process that died before it could sync the one above.
        """
        for path in (Path(self.path), *Path(self.path).parents):
            try:
                fd = self.disk.open_base(str(path))
            except PermissionError:
                continue  # not ours to read, so none of ours made the entry in it
            with opened(self.disk, fd):
                self.disk.fsync(fd)

    def require_owner(self, log_inode: int) -> None:
        """Check that the lock file still has its name, and now and then the same for the log.

        Raises:
            FencedError: Somebody deleted or replaced one of them.
            UnavailableError: They cannot be looked at.
        """
        disk, now = self.disk, time.monotonic()
        try:
            ours = disk.stat(LOCK, at=self.meta).inode == self._lock_inode
            # Who owns the directory hangs on the lock alone; a log pulled away by hand is found soon enough.
            if now >= self._look_at:
                ours = ours and disk.stat(LOG, at=self.meta).inode == log_inode
                self._look_at = now + _LOOK_EVERY_SECONDS
        except FileNotFoundError:
            ours = False
        except OSError as error:
            raise UnavailableError(explain(error, f"nothing was written to {self.path}"), backend=self.name) from error
        if not ours:
            raise FencedError(
                f"{META}/{LOCK} or {META}/{LOG} in {self.path} was deleted or replaced: another process may own the "
                "directory now, so this one stops writing",
                backend=self.name,
            )

    def keep(self, label: str, data: bytes) -> str:
        """Put a copy into the quarantine and return where, as well as that is possible on a full disk."""
        try:
            return f"{META}/{keep(self.disk, self.meta, label, data)}"
        except OSError as error:
            _logger.warning(explain(error, f"cannot keep a copy of {label} in the quarantine of {self.path}"))
            return f"{META}/quarantine (which could not be written)"

    def replace(self, name: str, data: bytes, *, sync: bool) -> int:
        """Put a whole new file in the place of ``name`` in the meta directory and return its descriptor.

        Args:
            name: A plain name.
            data: All of its bytes.
            sync: Make the bytes durable before they get the name. The name itself is not.

        Raises:
            OSError: ``name`` is as it was.

        Crash: The old file or the new one; without ``sync`` perhaps a damaged one.
        """
        disk, temporary = self.disk, name + TEMPORARY
        fd = create(disk, temporary, at=self.meta)
        try:
            write_all(disk, fd, data)
            if sync:
                disk.fdatasync(fd)
            disk.rename(temporary, name, at=self.meta)
        except BaseException:
            disk.close(fd)
            with contextlib.suppress(OSError):
                disk.unlink(temporary, at=self.meta)
            raise
        return fd
