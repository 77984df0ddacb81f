"""``holdfast owners``: who owns each context, and whether that process gives signs of life."""

from __future__ import annotations

import argparse
import asyncio
import socket
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from ..backends.directory import LOCK, META
from ..contract import KeyPrefix
from ..engine.session import wall_clock_ms
from ..engine.worker import Life, Watch, is_gone, machine
from ..names import unquote
from ..rows import Owner, SessionRow, Worker
from ..store import Store
from ..urls import parse_store
from .exits import OK
from .opening import DEFAULT_STORE, reading
from .tables import moment, print_json, print_table

_LOOKS_PER_LEASE = 20
_LONGEST_LOOK_SECONDS = 1.0


class Worked(NamedTuple):
    """One worker, as it was found."""

    row: Worker
    life: Life


class Owned(NamedTuple):
    """One context, its owner row and that owner's worker."""

    context: str
    owner: Owner
    worker: Worked | None
    unsigned: str
    """What is known of an owner that gives no sign of life; where one process has the store, its lock tells."""

    @property
    def life(self) -> str:
        """What is known of the owner: alive, dead, ended, unknown, or that it has let go."""
        if self.owner.released:
            return "released"
        return self.unsigned if self.worker is None else self.worker.life.name.lower()


def _by_lock(owner: Owner, folder: Path | None) -> str:
    """Tell from a folder's lock whether the owner lives: the one that holds it is the only one that can."""
    if folder is None or owner.host != socket.gethostname():
        return "unknown"
    try:
        inode = (folder / META / LOCK).stat().st_ino
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return "unknown"
    holders = [int(words[4]) for words in locks if words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode)]
    return "alive" if owner.pid in holders else "ended"


async def owners_of(
    store: Store, *, watch: bool, folder: Path | None = None
) -> tuple[list[Owned], list[Worked]]:  # fmt: skip
    """Return who owns what, and every worker that lives, or whose contexts nobody has taken over yet.

    Args:
        store: An open store.
        watch: Watch each worker until it has shown that it lives, or for its lease; else look once, which shows that a
            process of this machine is gone, or that it is there and wrote within its lease.
        folder: Where the store lies, if one process has it.
    """
    workers = await _workers(store, watch=watch)
    names = {
        key.entity_name: "/".join(cast("SessionRow", loaded.row).context)
        for key, loaded in (await store.scan("session")).items()
    }
    shared = store.guarantees.shared
    owned = [
        Owned(
            names.get(key.entity_name) or _spelt(key.entity_name), row, workers.get(row.holder),
            "dead" if shared else _by_lock(row, folder),
        )
        for key, row in ((key, cast("Owner", loaded.row)) for key, loaded in (await store.scan("owner")).items())
    ]  # fmt: skip
    counts = Counter(one.owner.holder for one in owned if not one.owner.released)
    listed = [
        # What it said itself ends with it: whatever was taken over since is not its own.
        one._replace(row=msgspec.structs.replace(one.row, contexts=counts[holder]))
        for holder, one in workers.items() if one.life is not Life.DEAD or counts[holder]
    ]  # fmt: skip
    return sorted(owned, key=lambda one: one.context), sorted(listed, key=lambda one: one.row.holder)


async def _workers(store: Store, *, watch: bool) -> dict[str, Worked]:
    looking = Watch(store)
    found: dict[str, Worked] = {}
    wanted = [key.entity_name for key in await store.keys(KeyPrefix("worker"))]
    while wanted:
        for holder, (life, row) in (await looking.look(*wanted)).items():
            if row is None:
                found.pop(holder, None)  # it ended in good order meanwhile
            else:
                found[holder] = Worked(
                    row, Life.ALIVE if life is Life.UNKNOWN and not watch and _is_here(row) else life
                )
        wanted = [holder for holder in wanted if holder in found and found[holder].life is Life.UNKNOWN]
        if not watch:
            break
        if wanted:
            shortest = min(found[holder].row.lease_seconds for holder in wanted)
            await asyncio.sleep(min(shortest / _LOOKS_PER_LEASE, _LONGEST_LOOK_SECONDS))
    return found


def _is_here(row: Worker) -> bool:
    """Whether it is a process of this machine that is there and wrote within its lease: for people, as ages are."""
    here = bool(row.machine) and row.machine == machine() and not is_gone(row.pid, row.started)
    return here and _age_seconds(row) < row.lease_seconds


def _spelt(entity_name: str) -> str:
    """Return a context's name from a key, for one that has never decided anything."""
    parts = [unquote(part) for part in entity_name.split("_")]
    return entity_name if len(parts) != 3 or None in parts else f"{parts[2]}/{parts[0]}/{parts[1]}"


def _age_seconds(row: Worker) -> float:
    """Return the age of a sign of life by two wall clocks: for people, nothing is decided by it."""
    return round(max(0, wall_clock_ms() - row.at_ms) / 1000, 1)


def _as_json(owned: list[Owned], workers: list[Worked]) -> dict[str, Any]:
    return {
        "contexts": [
            {
                "context": one.context,
                "holder": one.owner.holder,
                "host": one.owner.host,
                "pid": one.owner.pid,
                "epoch": one.owner.epoch,
                "sinceMs": one.owner.since_ms,
                "released": one.owner.released,
                "life": one.life,
                "lastBeatMs": one.worker.row.at_ms if one.worker else None,
                "beatAgeSeconds": _age_seconds(one.worker.row) if one.worker else None,
            }
            for one in owned
        ],
        "workers": [
            {
                "holder": one.row.holder,
                "host": one.row.host,
                "pid": one.row.pid,
                "life": one.life.name.lower(),
                "leaseSeconds": one.row.lease_seconds,
                "contexts": one.row.contexts,
                "fleet": one.row.fleet,
                "leaving": one.row.leaving,
                "lastBeatMs": one.row.at_ms,
                "beatAgeSeconds": _age_seconds(one.row),
            }
            for one in workers
        ],
    }


def _print(owned: list[Owned], workers: list[Worked], *, plain: bool) -> None:
    lines = [
        [
            one.context,
            f"{one.owner.pid} on {one.owner.host}",
            str(one.owner.epoch),
            moment(one.owner.since_ms),
            one.life,
            f"{_age_seconds(one.worker.row):g} s ago" if one.worker and not one.owner.released else "-",
        ]
        for one in owned
    ]
    print_table("Owners", ("context", "process", "epoch", "since", "life", "last beat"), lines, plain=plain)
    signs = [
        [
            f"{one.row.pid} on {one.row.host}",
            one.life.name.lower(),
            f"{one.row.lease_seconds:g} s",
            str(one.row.contexts),
            "leaving" if one.row.leaving else one.row.fleet or "-",
            f"{_age_seconds(one.row):g} s ago",
        ]
        for one in workers
    ]
    print_table("Processes", ("process", "life", "lease", "owns", "fleet", "last beat"), signs, plain=plain)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "owners",
        help="who owns each context of a shared store, and whether that process lives",
        description="Show who owns each context, under which epoch, and the newest sign of life of each process. Reads "
        "only. One look can tell of processes of this machine only; --watch tells for all.",
    )
    parser.add_argument("store", nargs="?", metavar="STORE", help="folder or URL (default: ./dump/data)")
    parser.add_argument(
        "--watch", action="store_true", help="watch each process until it shows that it lives, at most for its lease"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    parser.add_argument("--plain", action="store_true", help="no colours, no frames")
    parser.set_defaults(command=_owners)


def _owners(options: argparse.Namespace) -> int:
    where = DEFAULT_STORE if options.store is None else options.store
    folders = parse_store(where).folders if where else []
    folder = Path(str(folders[0])) if len(folders) == 1 and folders[0] is not None else None

    async def read() -> tuple[list[Owned], list[Worked]]:
        async with reading(options.store) as store:
            return await owners_of(store, watch=options.watch, folder=folder)

    owned, workers = asyncio.run(read())
    if options.json:
        print_json(_as_json(owned, workers))
    else:
        _print(owned, workers, plain=options.plain)
    return OK
