"""The real servers that the tests and benches need: ``python scripts/servers.py install|up|down|env [NAME …]``.

``install`` gets what is missing. ``up`` also starts one of each, as children of a keeper process that stays behind,
on loopback, in ``build/servers/NAME``; ``env`` prints where they listen, for a shell; ``down`` ends them. The tests
start servers of their own and need only ``install``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "servers"
sys.path.insert(0, str(ROOT / "tests"))

from servers import MODULES, Running, kind  # noqa: E402  (it lies beside the tests)

WAIT_SECONDS = 180.0


def _there() -> list[str]:
    """Names of the servers whose module exists."""
    return [name for name, module in MODULES.items() if (ROOT / "tests" / "servers" / f"{module}.py").exists()]


def install(names: list[str]) -> None:
    """Get each server that is missing."""
    for name in names:
        if kind(name).missing():
            print(f"installing {name} …", flush=True)
            kind(name).install()
        if why := kind(name).missing():
            raise SystemExit(why)


def keep(names: list[str]) -> None:
    """Start them and stay until SIGTERM: a server must be waited for by the process that started it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    started: list[Running] = []
    lines = []
    try:
        for name in names:
            directory = PLACE / name
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            started.append(kind(name).start(directory))
            lines.append(f"export {kind(name).env}={started[-1].url}\n")
        fresh = PLACE / "env.new"
        fresh.write_text("".join(lines))
        fresh.rename(PLACE / "env")
        while True:
            signal.pause()
    finally:
        (PLACE / "env").unlink(missing_ok=True)
        for server in reversed(started):
            server.stop()
        (PLACE / "pid").unlink(missing_ok=True)


def _keeper() -> int:
    try:
        pid = int((PLACE / "pid").read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return 0
    return pid if b"servers.py\0keep" in command else 0


def up(names: list[str]) -> None:
    """Install and start them, and return when all answer."""
    install(names)
    down()
    PLACE.mkdir(parents=True, exist_ok=True)
    with (PLACE / "keeper.log").open("wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "keep", *names],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (PLACE / "pid").write_text(str(keeper.pid))
    end = time.monotonic() + WAIT_SECONDS
    while not (PLACE / "env").exists():
        if keeper.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the servers did not start: {(PLACE / 'keeper.log').read_text()[-2000:]}")
        time.sleep(0.05)
    env([])


def down() -> None:
    """End them and wait until they are gone."""
    pid = _keeper()
    if pid:
        os.kill(pid, signal.SIGTERM)
        while _keeper():
            time.sleep(0.05)


def env(names: list[str]) -> None:
    """Print where they listen."""
    file = PLACE / "env"
    wanted = {kind(name).env for name in names}
    for line in file.read_text().splitlines() if file.exists() else ():
        if not wanted or line.removeprefix("export ").split("=")[0] in wanted:
            print(line)


def main() -> None:
    """Do what the command line says."""
    verb, *names = sys.argv[1:] or ["help"]
    match verb:
        case "install":
            install(names or _there())
        case "up":
            up(names or _there())
        case "keep":
            keep(names)
        case "down":
            down()
        case "env":
            env(names)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
