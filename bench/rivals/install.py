"""Get the rivals into ``build/rivals``, each at its pinned version, and strace from Debian; quick the second time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .catalogue import BUILD

HERE = Path(__file__).resolve().parent


def install() -> dict[str, str]:
    """Install what is missing.

    Returns:
        For each runtime that could not be had ("node", "strace"), why: the last line of what its installer said.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    _python()
    missing = {}
    for name, part in (("strace", _strace), ("node", _node)):
        try:
            part()
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or error.stdout or str(error)).strip().splitlines()
            missing[name] = next((line for line in reversed(lines) if "404" in line or "ETARGET" in line), lines[-1])
    return missing


def _run(*words: str, cwd: Path | None = None) -> None:
    subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True)


def _unchanged(sources: list[Path], mark: Path) -> bool:
    return mark.exists() and mark.read_text() == "".join(source.read_text() for source in sources)


def _python() -> None:
    wanted, mark = HERE / "requirements.txt", BUILD / "venv" / "installed"
    if _unchanged([wanted], mark):
        return
    print("installing the Python rivals into build/rivals/venv …", file=sys.stderr)
    _run(sys.executable, "-m", "venv", str(BUILD / "venv"))
    pip = [str(BUILD / "venv" / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    _run(*pip, "-r", str(wanted))
    mark.write_text(wanted.read_text())


def _apt(*packages: str) -> None:
    root = ["sudo"] if os.getuid() else []
    _run(*root, "apt-get", "update", "-qq")
    _run(*root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "-qq",
         "--no-install-recommends", *packages)  # fmt: skip


def _strace() -> None:
    if shutil.which("strace") is None:
        print("installing strace …", file=sys.stderr)
        _apt("strace")


def _node() -> None:
    place, mark = BUILD / "node", BUILD / "node" / "installed"
    if shutil.which("npm") is None:
        print("installing Node …", file=sys.stderr)
        _apt("nodejs", "npm")
    wanted = [HERE / "node" / "package.json", HERE / "node" / "package-lock.json"]
    fresh = not _unchanged(wanted, mark)
    shutil.copytree(HERE / "node", place, dirs_exist_ok=True)
    if fresh:
        print("installing the Node rivals into build/rivals/node …", file=sys.stderr)
        _run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=place)
        mark.write_text("".join(source.read_text() for source in wanted))
