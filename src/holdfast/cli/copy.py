"""``holdfast copy``: move a store to another backend, verified; or import the documents' raw JSON directories."""

from __future__ import annotations

import argparse
import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ..backends.memory import MemoryBackend
from ..contract import Backend, Key, Op
from ..copying import Copied, copy
from ..documents.raw import Raw, is_raw, read_raw
from ..domains import decode, encode
from ..errors import InvalidInputError, LockedError, NewerFormatError
from ..rules.drafts import stored_failures
from ..urls import open_backend, parse_store
from .exits import OK, STOPPED
from .opening import require_no_bot, require_store
from .tables import print_json, print_table, progress_bar


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "copy",
        help="move a store to another backend, verified",
        description="Copy every row of one store to an empty place, compare both by count and checksum, and tell. Can "
        "be interrupted and run again; refuses while a bot works on either side. FROM may also be a folder of the "
        "documents' raw JSON files (signal/, schedule/, risk/, partial/). FROM is left as it is.",
    )
    parser.add_argument("source", metavar="FROM", help="folder or URL of the store to copy, or a folder of raw files")
    parser.add_argument("target", metavar="TO", help="folder or URL of an empty place")
    parser.add_argument("--exchange", metavar="NAME", help="raw files: the exchange of rows that name none")
    parser.add_argument(
        "--leave-damaged", action="store_true", help="raw files: import the good ones though others cannot be trusted"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--plain", action="store_true", help="no colours, no bar")
    parser.set_defaults(command=_copy)


def _copy(options: argparse.Namespace) -> int:
    source, target = parse_store(options.source), parse_store(options.target)
    if source.in_memory or target.in_memory:
        raise InvalidInputError("memory: keeps nothing that could be copied: name a place that stays")
    if set(source.places) & set(target.places):
        raise InvalidInputError("FROM and TO are the same place: name another one")
    raw = _raw(options)
    if raw is not None and raw.damaged and not options.leave_damaged:
        _tell_raw(raw, options)
        return STOPPED
    copied, where = asyncio.run(_run(options, raw))
    if options.json:
        plain = {scope: {"rows": one.rows, "sha256": one.checksum} for scope, one in copied.scopes.items()}
        more = {} if raw is None else {"damaged": raw.damaged, "left_out": raw.left_out}
        print_json({"target": where, "rows": copied.rows, "written": copied.written, "scopes": plain, **more})
        return OK
    lines = [[scope, f"{one.rows}", one.checksum[:16]] for scope, one in copied.scopes.items()]
    print_table(f"Copied to {where}, and compared", ("scope", "rows", "sha256"), lines, plain=options.plain)
    print(f"{copied.rows} rows, {copied.written} written now. Start the bot with the new store; FROM is as it was.")
    if raw is not None:
        _tell_raw(raw, options)
    return OK


def _raw(options: argparse.Namespace) -> Raw | None:
    folder = Path(str(options.source).removeprefix("file:"))
    if folder.is_dir() and is_raw(folder):
        return read_raw(folder, failures=stored_failures, exchange_name=options.exchange)
    if options.exchange or options.leave_damaged:
        raise InvalidInputError("--exchange and --leave-damaged are for a folder of raw files, which FROM is not")
    require_store(options.source)
    return None


def _tell_raw(raw: Raw, options: argparse.Namespace) -> None:
    if options.json:
        print_json({"rows": len(raw.rows), "damaged": raw.damaged, "left_out": raw.left_out})
        return
    for name, why in raw.left_out.items():
        print(f"left out: {name}: {why}")
    for name, why in raw.damaged.items():
        print(f"damaged: {name}: {why}")
    if raw.damaged and not options.leave_damaged:
        print("Nothing was imported: mend or remove what is named, or add --leave-damaged.")


async def _run(options: argparse.Namespace, raw: Raw | None) -> tuple[Copied, str]:
    async with _source(options.source, raw) as (source, name):
        target = open_backend(options.target)
        promised = await target.open()
        try:
            await require_no_bot(target)
            with progress_bar("rows", plain=options.plain or options.json) as progress:
                return await copy(source, target, name=name, sound=_sound, progress=progress), promised.backend
        finally:
            await target.close()


def _sound(key: Key, payload: bytes) -> None:
    """Refuse a row that is damaged, or encrypted: its ciphertext would open nowhere else."""
    try:
        decode(key, payload)
    except LockedError:
        raise
    except NewerFormatError:
        pass  # whole, and for a newer version to read


@asynccontextmanager
async def _source(where: str, raw: Raw | None) -> AsyncIterator[tuple[Backend, str]]:
    """Open the source: a store of one process under its lock, a shared one read-only after a look at who lives."""
    if raw is not None:
        held = MemoryBackend()
        await held.open()
        payloads = {key: encode(key, row) for key, row in raw.rows.items()}
        if payloads:
            await held.commit("main", payloads, {}, op=Op(f"raw@{secrets.token_hex(4)}", 1))
        yield held, f"the raw files in {raw.directory}"
        return
    backend = open_backend(where)
    promised = await backend.open(read_only=True)
    try:
        if not promised.shared:
            await backend.close()
            promised = await backend.open()  # under its lock: no bot may write meanwhile
        await require_no_bot(backend)
        yield backend, promised.backend
    finally:
        await backend.close()
