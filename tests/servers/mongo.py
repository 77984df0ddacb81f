"""What speaks MongoDB's protocol and can be had here: SecantusDB, and nx-27017 as a bad example. Neither is MongoDB.

MongoDB's own server is in no registry that the tests may use. SecantusDB 0.7.0b3 keeps its data with WiredTiger, is one
node that presents itself as a replica set (or, with ``--standalone``, as one that stands alone), and is a beta.
nx-27017 0.8.1 keeps its data in SQLite, and confirms write concerns that it cannot keep.
"""

from __future__ import annotations

import gc
import socket
import struct
import subprocess
import sys
import warnings
from pathlib import Path

from .process import ServerProcess, free_port

_ROOT = Path(__file__).resolve().parent.parent.parent
_ENVIRONMENTS = _ROOT / "build"
"""Each in a virtual environment of its own: they are tools for tests, and bring much with them."""
_PLACES = {"secantus": ("mongo-secantus", "secantusd-py", "SecantusDB==0.7.0b3"),
           "nx": ("mongo-nx", "nx-27017", "nx-27017==0.8.1")}  # fmt: skip


def binary(name: str) -> Path:
    """Return where the command of ``secantus`` or ``nx`` lies, or would lie."""
    place, command, _ = _PLACES[name]
    return _ENVIRONMENTS / place / "bin" / command


def hello_answered(port: int) -> bool:
    """Tell whether something on this port answers ``hello``."""
    body = struct.pack("<iB", 0, 0) + _document(
        b"\x10hello\x00" + struct.pack("<i", 1) + b"\x02$db\x00" + _text("admin")
    )
    with socket.create_connection(("127.0.0.1", port), 1) as link:
        link.settimeout(2)
        link.sendall(struct.pack("<iiii", 16 + len(body), 1, 0, 2013) + body)
        return len(link.recv(64)) > 16


def _document(fields: bytes) -> bytes:
    return struct.pack("<i", len(fields) + 5) + fields + b"\x00"


def _text(value: str) -> bytes:
    return struct.pack("<i", len(value) + 1) + value.encode() + b"\x00"


class MongoServer:
    """A running server of either kind.

    Args:
        name: ``secantus`` or ``nx``.
        directory: Where it keeps its data.
        words: More words of its command line.
    """

    def __init__(self, name: str, directory: Path, *words: str, port: int = 0) -> None:
        self.port = port or free_port()
        directory.mkdir(parents=True, exist_ok=True)
        command = [str(binary(name)), "--host", "127.0.0.1"]
        if name == "secantus":
            command += ["--port", str(self.port), "--storage-path", str(directory / "data"), "--cache-size", "256M"]
            command += ["--log-level", "WARNING"]
        else:
            command += ["-p", str(self.port), "--db", str(directory / "data.db")]
            command += ["--pid-file", str(directory / "pid"), "--log-file", str(directory / "nx.log")]
        self.process = ServerProcess([*command, *words], directory, lambda: hello_answered(self.port))
        self.process.start()

    @property
    def url(self) -> str:
        """Where it listens, and a database."""
        return f"mongodb://127.0.0.1:{self.port}/bots"

    def kill(self) -> None:
        """End it with SIGKILL; its data stay."""
        self.process.kill()

    def restart(self) -> None:
        """Start it again where it was."""
        self.process.start()

    def stop(self) -> None:
        """End it."""
        self.process.kill()


class _Mongo:
    def __init__(self, name: str, env: str) -> None:
        self._name = name
        self.env = env

    def missing(self) -> str:
        return "" if binary(self._name).exists() else f"{_PLACES[self._name][2]} is not installed: run `make servers`"

    def install(self) -> None:
        place = _ENVIRONMENTS / _PLACES[self._name][0]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        pip = [str(place / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--pre"]
        subprocess.run([*pip, _PLACES[self._name][2]], check=True)

    def start(self, directory: Path) -> MongoServer:
        return MongoServer(self._name, directory)


def sweep_sockets() -> None:
    """Collect sockets that pymongo 4.20 leaves to the collector where a connection attempt is cancelled by its close.

    Else their warning would fail whichever test the collector happens to run in.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


KINDS = {"mongo": _Mongo("secantus", "HOLDFAST_MONGO_URL"), "mongo-nx": _Mongo("nx", "HOLDFAST_MONGO_NX_URL")}
