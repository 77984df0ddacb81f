"""``holdfast rekey``: bring every row of an encrypted store under the current key, beside a running bot."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import Any

import msgspec

from ..contract import Key
from ..domains import decode
from ..errors import InvalidInputError
from ..urls import open_backend
from ..wrappers.keyring import ENVIRONMENT, new_entry
from .exits import OK, STOPPED, UNAVAILABLE
from .opening import require_no_bot, require_store
from .tables import print_json, print_table, progress_bar


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "rekey",
        help="bring every row of an encrypted store under the current key",
        description=f"Rewrite each row that is not under the first key of {ENVIRONMENT}. Works beside running bots on "
        "a store that several processes may share, and can be interrupted and run again. Exit code 4 when rows cannot "
        "be read, 3 when others go on writing under another key.",
    )
    parser.add_argument("store", nargs="?", metavar="STORE", help="such as encrypted+redis://HOST")
    parser.add_argument(
        "--from-plain", action="store_true", help="encrypt a store that was not encrypted so far; end its bots first"
    )
    parser.add_argument("--new-key", action="store_true", help="print a fresh key and change nothing")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--plain", action="store_true", help="no colours, no bar")
    parser.set_defaults(command=_rekey)


def _rekey(options: argparse.Namespace) -> int:
    if options.new_key:
        print(new_entry())
        print(
            f"Keep it where you keep passwords. Append it to {ENVIRONMENT} (id=base64,id=base64) and restart every bot "
            "of the store, then move it to the front and restart them again, then run holdfast rekey STORE.",
            file=sys.stderr,
        )
        return OK
    if not options.store:
        raise InvalidInputError("name the store, such as encrypted+redis://HOST; or --new-key for a fresh key")
    return asyncio.run(_run(options))


async def _run(options: argparse.Namespace) -> int:
    require_store(options.store)
    backend = open_backend(options.store)
    from ..wrappers.rekeying import encrypted_in, rekey  # needs an extra, about which open_backend has complained

    store = encrypted_in(backend)
    if store is None:
        raise InvalidInputError("the store is not named as an encrypted one: write encrypted+ before its URL or path")
    began = time.monotonic()
    promised = await backend.open()
    try:
        if options.from_plain and promised.shared:
            await require_no_bot(store.backend)  # what it writes later would stay plain
        with progress_bar("rows", plain=options.plain or options.json) as progress:
            found = await rekey(store, accept_plain=_sound if options.from_plain else None, progress=progress)
    finally:
        await backend.close()
    seconds = time.monotonic() - began
    if options.json:
        plain: Any = msgspec.to_builtins(found)
        print_json(plain | {"ok": found.ok, "seconds": round(seconds, 1)})
    else:
        lines = [["rows", f"{found.rows}"], ["rewritten", f"{found.rewritten}"], ["left", f"{len(found.left)}"]]
        print_table(f"Under the key {found.key}", ("what", "count"), lines, plain=options.plain)
        for why in found.left.values():
            print(why)
        print(_advice(found.ok, found.settled, from_plain=options.from_plain, others=store.keyring.ids[1:]))
    if found.left:
        return STOPPED
    return OK if found.settled else UNAVAILABLE


def _sound(key: Key, payload: bytes) -> None:
    decode(key, payload)


def _advice(ok: bool, settled: bool, *, from_plain: bool, others: tuple[str, ...]) -> str:
    if not settled:
        return (
            f"Rows are still written under another key: restart every bot of this store with the same {ENVIRONMENT}, "
            "then run this again."
        )
    if not ok:
        return "The rows named above were left as they are; keep the old keys until they are mended."
    if from_plain:
        return (
            "Every row is encrypted. Name the store with encrypted+ everywhere from now on. What was plain may still "
            "lie in backups, old log files, replicas and deleted blocks of the medium: those are yours to remove."
        )
    if others:
        return (
            f"This store needs {', '.join(others)} no more: remove it from {ENVIRONMENT}, but keep it somewhere for as "
            "long as there are backups, or bytes in quarantine, from before."
        )
    return "Every row is under the current key."
