"""Where damaged bytes are kept: ``.holdfast/quarantine/``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from zlib import crc32

from .disk import Disk, Mode

DIRECTORY = "quarantine"
_MAX_LABEL = 150


def write_all(disk: Disk, fd: int, data: bytes) -> None:
    """Append all of ``data``, however short the single writes turn out."""
    taken = disk.write(fd, data)
    if taken == len(data):
        return
    rest = memoryview(data)[taken:]
    while rest:
        taken = disk.write(fd, rest)
        if taken <= 0:
            raise OSError(28, "the file takes no more bytes")
        rest = rest[taken:]


def create(disk: Disk, name: str, *, at: int) -> int:
    """Make a temporary file, in the place of a leftover one that could not be removed before."""
    try:
        return disk.open_file(name, Mode.CREATE, at=at)
    except FileExistsError:
        disk.unlink(name, at=at)
        return disk.open_file(name, Mode.CREATE, at=at)


@contextlib.contextmanager
def opened(disk: Disk, fd: int) -> Iterator[int]:
    """Close ``fd`` at the end of the block."""
    try:
        yield fd
    finally:
        disk.close(fd)


def keep(disk: Disk, meta: int, label: str, data: bytes) -> str:
    """Write ``data`` durably into the quarantine of the directory ``meta`` and return the file's name.

    The name ends in the checksum of the bytes, so the same bytes are kept once.

    Crash: The file is whole, partial or absent; the next call with these bytes completes it.
    """
    name = f"{label[:_MAX_LABEL]}.{len(data)}.{crc32(data):08x}"
    try:
        directory = disk.open_directory(DIRECTORY, at=meta)
    except FileNotFoundError:
        disk.mkdir(DIRECTORY, at=meta)
        disk.fsync(meta)
        directory = disk.open_directory(DIRECTORY, at=meta)
    with opened(disk, directory):
        return f"{DIRECTORY}/{_keep(disk, directory, name, data)}"


def _keep(disk: Disk, directory: int, name: str, data: bytes) -> str:
    try:
        fd = disk.open_file(name, Mode.READ, at=directory)
    except FileNotFoundError:
        pass
    else:
        with opened(disk, fd):
            if disk.read(fd) == data:
                return name
        disk.unlink(name, at=directory)  # a crash cut this copy short
    fd = disk.open_file(name, Mode.CREATE, at=directory)
    with opened(disk, fd):
        write_all(disk, fd, data)
        disk.fdatasync(fd)
    disk.fsync(directory)
    return name
