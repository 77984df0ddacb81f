"""Lost power under real servers: ``python tests/lost_power.py [--cuts N] [NAME …]``, as root, where there is FUSE.

A server's data lie on a file system of ours that forgets, at the cut, what was not made durable (``losing_fs.py``). A
process commits through the library; at some instant the server (without one: that process) is killed, the power is
cut, the server starts on what is left, and every commit that was acknowledged must be there, whole.

With settings that void the promise a store that must survive the host is refused at open. Where that refusal is
passed by, the same rig must lose commits: else it could not have seen a loss.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
from servers.losing_disk import Keep, LosingDisk, Order, why_not
from servers.mongo import MongoServer
from servers.postgres import PostgresServer
from servers.valkey import RedisServer, valkey_binary

from holdfast.contract import Backend, Key, Op, Survives
from holdfast.errors import HoldfastError, UnsafeSettingError
from holdfast.store import Store
from holdfast.urls import open_backend

LEFT, RIGHT = Key("signal", "lost-power", "left"), Key("signal", "lost-power", "right")
"""Two rows that each commit writes with the same text: it is whole or it is not there."""
MOST_COMMITS = 60
"""The power is cut after 1 to so many acknowledged commits."""
_LIVES_SECONDS = 60.0


class Medium(Protocol):
    """What keeps the rows: a server, or a bare directory."""

    url: str
    data: Path
    """The directory that loses its power."""

    def down(self) -> None:
        """End the server politely, so that all it has is on the disk."""

    def kill(self) -> None:
        """End it with SIGKILL."""

    def up(self) -> None:
        """Start it on what is there."""

    def stop(self) -> None:
        """End it for good."""


class _Directory:
    def __init__(self, place: Path, scheme: str) -> None:
        self.data = place / "data"
        self.data.mkdir(parents=True)
        self.url = f"sqlite:{self.data}/store.db" if scheme == "sqlite" else f"file:{self.data}/store"

    def down(self) -> None:
        """Nothing runs."""

    kill = up = stop = down


class _Server:
    def __init__(self, server: RedisServer | PostgresServer | MongoServer, data: Path) -> None:
        self.server, self.data, self.url = server, data, server.url

    def down(self) -> None:
        if isinstance(self.server, PostgresServer):
            self.server.process.signal(signal.SIGINT)  # fast shutdown
        self.server.process.stop()

    def kill(self) -> None:
        self.server.kill()

    def up(self) -> None:
        self.server.restart()

    def stop(self) -> None:
        self.server.stop()


def _valkey(place: Path, wrong: bool) -> Medium:
    return _Server(RedisServer(valkey_binary(), place, {"appendfsync": "everysec"} if wrong else None), place)


def _postgres(place: Path, wrong: bool) -> Medium:
    # File by file: a file system of ours is not asked to flush all of itself.
    server = PostgresServer(place, {"recovery_init_sync_method": "fsync", **({"fsync": "off"} if wrong else {})})
    return _Server(server, server.data)


def _mongo(place: Path, wrong: bool) -> Medium:
    return _Server(MongoServer("secantus", place), place / "data")


class Rig(NamedTuple):
    """A kind of storage whose power can be cut."""

    start: Callable[[Path, bool], Medium]
    """Starts it in an empty directory, with right or wrong settings."""
    needs: str = ""
    """The server, by its name in ``servers``."""
    wrong: str = ""
    """The wrong setting; empty where the library itself sees to all that matters."""
    order: Order = "journal"


RIGS = {
    "valkey": Rig(_valkey, "valkey", "appendfsync everysec"),
    "postgres": Rig(_postgres, "postgres", "fsync = off"),
    "sqlite": Rig(lambda place, wrong: _Directory(place, "sqlite"), "", "synchronous=NORMAL", "posix"),
    "file": Rig(lambda place, wrong: _Directory(place, "file"), "", "", "posix"),
    "mongo": Rig(_mongo, "mongo"),
}


class Found(msgspec.Struct):
    """What the cuts of one storage showed."""

    name: str
    cuts: int = 0
    commits: int = 0
    """Acknowledged before a cut."""
    lost: int = 0
    """Of these, not there after it."""
    broken: list[str] = []
    """Torn commits, and servers that did not start again."""
    refused: str = ""
    """What ``open`` said to the wrong setting."""


def _backend(name: str, url: str, wrong: bool) -> Backend:
    """Return the backend; of SQLite the wrong setting is the connection's own."""
    if wrong and name == "sqlite":
        from holdfast.backends.sqlite import SqliteBackend

        return SqliteBackend(url.removeprefix("sqlite:"), synchronous="normal")
    return open_backend(url)


def _pass_by_the_refusals_of_postgres() -> None:
    """Take out of this process what refuses fsync = off: the judgement at open, and the check in each commit."""
    from holdfast.backends.postgres import attestation, backend, statements

    def lenient(schema: str) -> statements.Statements:
        safe = statements.statements(schema)
        return statements.Statements(*(_always(text) if isinstance(text, str) else text for text in safe))  # type: ignore[arg-type]

    def _always(text: str) -> str:
        return text.replace("current_setting('fsync') = 'on'", "true")

    attestation._wrong = lambda facts, *, read_only: []
    vars(backend)["statements"] = lenient


# -- the process that commits ------------------------------------------------------------------------------------------


async def pour(name: str, url: str, wrong: bool) -> None:
    """Commit until killed; print the number of each commit when it has been acknowledged."""
    if wrong and name == "postgres":
        _pass_by_the_refusals_of_postgres()  # of this process alone
    backend = _backend(name, url, wrong)
    await backend.open()
    number = (await backend.head("main")).number
    while True:
        text = b"%d" % (number + 1)
        expect = dict.fromkeys((LEFT, RIGHT), number)
        number = await backend.commit("main", {LEFT: text, RIGHT: text}, expect, op=Op("pour", number + 1))
        os.write(1, b"%d\n" % number)


def _acknowledged(name: str, medium: Medium, wrong: bool, commits: int) -> tuple[int, int]:
    """Let a process commit, and kill it or its server after so many; return the first and last number it was told."""
    command = [sys.executable, __file__, "pour", name, str(int(wrong))]
    environment = {**os.environ, "LOST_POWER_URL": medium.url}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        told = []
        for line in process.stdout:
            told.append(int(line))
            if len(told) == commits:
                medium.kill()
                if name in ("sqlite", "file"):
                    process.kill()
        # Without its server it ends by itself, since it does not retry.
        said = process.stderr.read().decode(errors="replace")
    assert len(told) >= commits, f"the process that commits ended by itself: {said[-1500:]}"
    return told[0], told[-1]


# -- after the cut -----------------------------------------------------------------------------------------------------


async def _look(name: str, url: str, wrong: bool) -> tuple[int, str]:
    """Open the store as a bot would; return its commit number, and what is torn."""
    backend = _backend(name, url, wrong)
    await backend.open(read_only=wrong)  # to write it would rightly be refused
    try:
        number = (await backend.head("main")).number
        found = await backend.read("main", [LEFT, RIGHT])
        texts = {key: (record.payload, record.version) for key, record in found.items()}
        whole = dict.fromkeys((LEFT, RIGHT), (b"%d" % number, number)) if number else {}
        return number, "" if texts == whole else f"the scope stands at {number}, its rows are {texts}"
    finally:
        await backend.close()


async def _refusal(url: str, name: str, wrong: bool) -> str:
    """Return what a store that must survive the host says at open; empty if it opens."""
    # Of SQLite the setting is the connection's own, and no URL has it.
    backend = _backend(name, url, wrong) if wrong and name == "sqlite" else open_backend(url)
    store = Store(backend, require=Survives.HOST)
    try:
        await store.open()
    except UnsafeSettingError as error:
        return str(error)
    await store.close()
    return ""


def cut_again_and_again(name: str, cuts: int, *, wrong: bool = False, seed: int = 1) -> Found:
    """Cut the power under a storage so often, and return what was left each time.

    Args:
        name: One of :data:`RIGS`.
        cuts: How often; every other time some of what was not durable is kept all the same, torn.
        wrong: With the wrong setting, each time from the beginning: what is left may be beyond repair.
        seed: Of chance.
    """
    found, chance = Found(name), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="holdfast-lost-power-") as scratch:
        Path(scratch).chmod(0o755)  # PostgreSQL runs as another user
        rounds = [1] * cuts if wrong else [cuts]
        for at, times in enumerate(rounds):
            _cuts_of_one(found, Path(scratch) / str(at), times, wrong, chance)
    return found


def _cuts_of_one(found: Found, place: Path, cuts: int, wrong: bool, chance: random.Random) -> None:
    rig = RIGS[found.name]
    medium = rig.start(place / "place", wrong)
    medium.down()
    disk = LosingDisk(medium.data, place / "disk", rig.order)
    try:
        medium.up()
        if wrong:
            found.refused = asyncio.run(_refusal(medium.url, found.name, wrong))
        for _ in range(cuts):
            first, last = _acknowledged(found.name, medium, wrong, chance.randint(1, MOST_COMMITS))
            found.commits += last - first + 1
            keep: Keep = "some" if found.cuts % 2 and not wrong else "none"
            disk.cut(keep, chance.randrange(1 << 30))
            found.cuts += 1
            try:
                medium.up()
                number, torn = asyncio.run(_look(found.name, medium.url, wrong))
            except (RuntimeError, HoldfastError) as error:
                number, torn = 0, f"it cannot be used any more: {error}"
            found.lost += max(0, last - max(number, first - 1))
            if torn:
                found.broken.append(f"cut {found.cuts} ({keep}): {torn}"[:600])
                return
    finally:
        medium.kill()
        disk.stop()
        medium.stop()


def main(argv: Sequence[str]) -> int:
    """Cut, and print a table; return the exit code."""
    if argv[:1] == ["pour"]:
        asyncio.run(pour(argv[1], os.environ["LOST_POWER_URL"], argv[2] == "1"))
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *RIGS], default=[], metavar="NAME")
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    if why := why_not():
        print(why, file=sys.stderr)
        return 1
    logging.getLogger("holdfast").setLevel(logging.ERROR)  # that FUSE is not a tested file system, each time
    failed = False
    row = "{:<10} {:<22} {:>5} {:>9} {:>6}  {}"
    print(row.format("storage", "settings", "cuts", "commits", "lost", ""))
    for name in options.names or RIGS:
        right = cut_again_and_again(name, options.cuts, seed=options.seed)
        print(row.format(name, "right", right.cuts, right.commits, right.lost, "; ".join(right.broken)), flush=True)
        failed = failed or bool(right.lost or right.broken)
        if RIGS[name].wrong:
            wrong = cut_again_and_again(name, max(1, options.cuts // 10), wrong=True, seed=options.seed)
            said = "open refused it" if wrong.refused else "OPEN TOOK IT"
            print(row.format(name, RIGS[name].wrong, wrong.cuts, wrong.commits, wrong.lost, said), flush=True)
            failed = failed or not (wrong.refused and wrong.lost)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
