"""PostgreSQL 15 from Debian: a primary, or a standby of one."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .process import ServerProcess, free_port

PASSWORD = "canary-k3yW0rd"
"""The superuser's: must never be seen in anything that the library says."""
_BINARIES = Path("/usr/lib/postgresql/15/bin")


def _as_postgres(*words: str) -> list[str]:
    """Return the command as PostgreSQL wants it: never as root."""
    if os.getuid():
        return list(words)
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--pdeathsig", "KILL"]
    return [*user, *words]


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8", "PGPASSWORD": PASSWORD, "HOME": "/"}


def _run(*words: str, cwd: Path) -> None:
    done = subprocess.run(_as_postgres(*words), cwd=cwd, env=_environment(), capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {done.stderr.decode(errors='replace')[-800:]}")


class PostgresServer:
    """A running server in a directory of its own, which is removed when it is stopped.

    Args:
        place: Gets a link to that directory, which lies where the user postgres can enter.
        settings: Lines of its configuration.
        primary: Be a standby of this one, under ``name``.
        name: What the primary calls it.
    """

    def __init__(
        self,
        place: Path,
        settings: dict[str, str] | None = None,
        *,
        primary: PostgresServer | None = None,
        name: str = "standby",
    ) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="holdfast-postgres-"))
        place.mkdir(parents=True, exist_ok=True)
        (place / "data").symlink_to(self.directory)
        if not os.getuid():
            postgres = pwd.getpwnam("postgres")
            os.chown(self.directory, postgres.pw_uid, postgres.pw_gid)
        self.data = self.directory / "data"
        self._frozen: list[int] = []
        if primary is None:
            self._initialise()
        else:
            self._copy(primary, name)
        values = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.directory),
            "shared_buffers": "16MB",
            "max_connections": "80",
            "hot_standby": "on",
            "recovery_init_sync_method": "syncfs",  # five seconds quicker after a kill than file by file
            **(settings or {}),
        }
        flags = [word for key, value in values.items() for word in ("-c", f"{key}={value}")]
        self.process = ServerProcess(
            _as_postgres(str(_BINARIES / "postgres"), "-D", str(self.data), *flags),
            self.directory,
            self._answers,
            _environment(),
        )
        self.process.start()

    def _initialise(self) -> None:
        secret = self.directory / "secret"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        _run(
            str(_BINARIES / "initdb"), "-D", str(self.data), "-U", "postgres", "-A", "scram-sha-256", "-E", "UTF8",
            "--locale=C.UTF-8", "--no-sync", "--no-instructions", f"--pwfile={secret}", cwd=self.directory,
        )  # fmt: skip
        with (self.data / "pg_hba.conf").open("a") as rules:
            rules.write("host replication all 127.0.0.1/32 scram-sha-256\n")
        secret.unlink()

    def _copy(self, primary: PostgresServer, name: str) -> None:
        _run(
            str(_BINARIES / "pg_basebackup"), "-D", str(self.data), "-R", "-c", "fast", "-X", "stream", "--no-sync",
            "-d", f"host=127.0.0.1 port={primary.port} user=postgres password={PASSWORD} application_name={name}",
            cwd=self.directory,
        )  # fmt: skip

    @property
    def url(self) -> str:
        """Where it listens, with the superuser's password."""
        return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def _answers(self) -> bool:
        ready = [str(_BINARIES / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(ready, check=False).returncode == 0

    def psql(self, statement: str, database: str = "postgres") -> str:
        """Return what the server's own tool prints for a statement."""
        done = subprocess.run(
            [*self.psql_words(database), "-v", "ON_ERROR_STOP=1", "-c", statement],
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"psql: {done.stderr[-500:]}")
        return done.stdout.strip()

    def psql_words(self, database: str = "postgres") -> list[str]:
        """Return the command line of the server's own tool."""
        return [
            str(_BINARIES / "psql"), "-XAtq", "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-d", database,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Return what it needs around it: whatever a test has set for the user must not disturb its own questions."""
        return _environment() | {"PGOPTIONS": "-c default_transaction_read_only=off -c statement_timeout=0"}

    def set(self, name: str, value: str | None) -> None:
        """Change a setting (None: back to its default) and wait until the server has taken it over."""
        before = self.psql("SELECT pg_conf_load_time()")
        self.psql(f"ALTER SYSTEM RESET {name}" if value is None else f"ALTER SYSTEM SET {name} = '{value}'")
        self.psql("SELECT pg_reload_conf()")
        end = time.monotonic() + 10
        while self.psql("SELECT pg_conf_load_time()") == before:
            assert time.monotonic() < end, "the server did not read its configuration"
            time.sleep(0.01)

    def wait_until(self, statement: str, answer: str) -> None:
        """Ask again and again until the answer is this one."""
        end = time.monotonic() + 15
        while (found := self.psql(statement)) != answer:
            assert time.monotonic() < end, f"{statement}: {found!r}"
            time.sleep(0.01)

    def pids(self) -> list[int]:
        """Return the processes of the server: the postmaster, then its children."""
        found = [self.process.pid]
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if words[0] != "Z" and int(words[1]) == self.process.pid:
                    found.append(int(entry.name))
        return found

    def freeze(self, *, thaw: bool = False) -> None:
        """Stop all its processes in their tracks, or let them go on."""
        pids, self._frozen = (self._frozen, []) if thaw else (self.pids(), self.pids())
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT if thaw else signal.SIGSTOP)

    def kill(self) -> None:
        """End it and its children with SIGKILL, and wait until they are gone: a power cut without the power."""
        postmaster, *children = self.pids()
        self.process.kill()
        for pid in children:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        end = time.monotonic() + 10
        while any(_runs(pid) for pid in children):
            assert time.monotonic() < end, f"a child of {postmaster} does not end"
            time.sleep(0.002)

    def restart(self) -> None:
        """Start it again where it was."""
        self.process.start()

    def stop(self) -> None:
        """End it and remove its directory. Repeatable."""
        try:
            self.freeze(thaw=True)  # a child that a failed test left frozen would stay for ever
            # Fast shutdown: SIGTERM would wait for its clients to go.
            self.process.signal(signal.SIGINT)
            self.process.stop()
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class _Postgres:
    env = "HOLDFAST_POSTGRES_URL"

    def missing(self) -> str:
        return "" if (_BINARIES / "postgres").exists() else "PostgreSQL 15 is not installed: run `make servers`"

    def install(self) -> None:
        root: Sequence[str] = ("sudo",) if os.getuid() else ()
        subprocess.run([*root, "apt-get", "update", "-qq"], check=True)
        # Debian would otherwise make and start a cluster of its own.
        apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "-qq", "--no-install-recommends"]
        subprocess.run([*root, *apt, "postgresql-15"], check=True, stdout=subprocess.DEVNULL)

    def start(self, directory: Path) -> PostgresServer:
        return PostgresServer(directory)


KINDS = {"postgres": _Postgres()}
