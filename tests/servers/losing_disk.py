"""A disk that loses its power: a FUSE file system of ours over a directory, in a process and an environment of its own.

``python -m servers.losing_disk install`` (from ``tests``) gets what it needs: libfuse from Debian, mfusepy from PyPI.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .process import ServerProcess

_ENVIRONMENT = Path(__file__).resolve().parents[2] / "build" / "losing-disk"
_REQUIREMENT = "mfusepy==3.1.1"
_LIBRARY = "libfuse3.so.3"

Keep = Literal["none", "some"]
Order = Literal["posix", "journal"]


def why_not() -> str:
    """Return why it cannot be used, and what to do; empty if it can."""
    if not (_ENVIRONMENT / "bin" / "python").exists() or shutil.which("fusermount3") is None:
        return "the power-losing file system is not installed: run `make servers`"
    if not Path("/dev/fuse").exists():
        return "this kernel has no FUSE (/dev/fuse is missing), so power cannot be cut under a server here"
    if os.getuid():
        return "mounting a file system for a server needs root"
    return ""


def install() -> None:
    """Get it; where the kernel has no FUSE, that is not an error of the installation."""
    if shutil.which("fusermount3") is None:
        root: Sequence[str] = ("sudo",) if os.getuid() else ()
        subprocess.run([*root, "apt-get", "update", "-qq"], check=True)
        apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "-qq", "--no-install-recommends"]
        subprocess.run([*root, *apt, "fuse3"], check=True, stdout=subprocess.DEVNULL)
    if not (_ENVIRONMENT / "bin" / "python").exists():
        print("installing the power-losing file system …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(_ENVIRONMENT)], check=True)
        pip = [str(_ENVIRONMENT / "bin" / "pip"), "install", "-q", "--disable-pip-version-check", _REQUIREMENT]
        subprocess.run(pip, check=True)


class LosingDisk:
    """A mounted directory whose power can be cut.

    Args:
        directory: What to mount over; what lies there is durable from the beginning.
        scratch: An empty directory for the medium.
        order: When a name in a directory is durable; see ``losing_fs.py``.
    """

    def __init__(self, directory: Path, scratch: Path, order: Order = "journal") -> None:
        self.directory = directory
        self.image = scratch / "image"
        scratch.mkdir(parents=True, exist_ok=True)
        shutil.copytree(directory, self.image, symlinks=True)
        found = directory.stat()
        for folder, _, files in os.walk(directory):  # copytree leaves owners out
            for path in (Path(folder), *(Path(folder) / name for name in files)):
                one = path.lstat()
                os.chown(self.image / path.relative_to(directory), one.st_uid, one.st_gid, follow_symlinks=False)
        self._device = found.st_dev
        program = Path(__file__).with_name("losing_fs.py")
        self._process = ServerProcess(
            [str(_ENVIRONMENT / "bin" / "python"), str(program), str(self.image), str(directory), order],
            scratch,
            lambda: directory.stat().st_dev != self._device,
            {"PATH": os.environ.get("PATH", ""), "FUSE_LIBRARY_PATH": _LIBRARY},
        )
        self._process.start()

    def cut(self, keep: Keep = "none", seed: int = 0) -> None:
        """Cut the power and bring it back: what was not durable is gone. Nothing may have a file open there."""
        try:
            (self.directory / f".cut-{keep}-{seed}").mkdir()
        except OSError as error:
            if error.errno != errno.EIO:  # what every call after the cut gets
                raise
        self._unmount()
        self._process.start()

    def stop(self) -> None:
        """Unmount it. Repeatable."""
        self._unmount()

    def _unmount(self) -> None:
        end = time.monotonic() + 10
        while self.directory.stat().st_dev != self._device:
            if subprocess.run(["umount", str(self.directory)], capture_output=True, check=False).returncode:
                assert time.monotonic() < end, f"{self.directory} stays in use"
                time.sleep(0.01)
        self._process.stop()


if __name__ == "__main__":
    install()
