"""Coming to own a context: by compare-and-set on its owner row, whose epoch fences whoever had it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

from ..contract import Key
from ..domains import context_key
from ..errors import ConflictError, CorruptedError, HeldError, UnavailableError
from ..names import Context
from ..rows import Owner
from ..store import Loaded, Store, Writer
from .lanes import Sleep, commit_surely
from .worker import Life, Watch, describe

_log = logging.getLogger("holdfast")

OnConflict = Literal["refuse", "wait", "takeover"]
"""What a run does about a context that another live process owns."""
ON_CONFLICT: tuple[OnConflict, ...] = ("refuse", "wait", "takeover")

MAX_ATTEMPTS = 20
_LOOKS_PER_LEASE = 20
_LONGEST_LOOK_SECONDS = 1.0


class Claim(NamedTuple):
    """How a session comes by its context.

    ``watch`` is None where the store belongs to one process: then nobody else can be alive.
    """

    on_conflict: OnConflict = "refuse"
    watch: Watch | None = None
    given_up: Callable[[], bool] = lambda: False
    """Asked while waiting; True ends it with ``HeldError``."""


async def own(
    store: Store, writer: Writer, context: Context, *, holder: str, now_ms: int, sleep: Sleep, claim: Claim = Claim()
) -> Loaded[Owner]:
    """Take the context over: the owner row's epoch is raised by compare-and-set, which fences whoever had it.

    A live owner is respected: with ``refuse`` it is watched until it has shown that it lives, or for one lease;
    with ``wait`` until it is gone. ``takeover`` asks nobody: from its commit on the old owner can write nothing. But
    what that one does under its lease alone (serve rows from memory, send to a venue) ends when it has noticed, so
    this returns then, at the latest when its lease is over.

    Raises:
        HeldError: Another process owns it and lives, or the wait was given up; the message names it.
        UnavailableError: The store cannot be used now; call again.

    Crash: The old owner still has it, or the new one does; owning again raises the epoch once more.
    """
    key = context_key("owner", context)
    attempts, told = 0, False
    while attempts < MAX_ATTEMPTS:
        found, damaged = await store.salvage(key)  # a damaged one is replaced: it says nothing about the trade
        refuse_newer(store, damaged)
        old = cast("Loaded[Owner] | None", found.get(key))
        if old is not None and await _must_wait(context, old.row, holder, claim, sleep):
            if claim.on_conflict == "wait" and not told:
                told = True
                _log.warning("%s: waiting for %s, which owns it (epoch %d)", context, describe(old.row), old.row.epoch)
            continue
        attempts += 1
        row = Owner(
            holder=holder,
            epoch=1 if old is None else old.row.epoch + 1,
            host=socket.gethostname(),
            pid=os.getpid(),
            since_ms=now_ms,
        )
        try:
            version = await commit_surely(writer, {key: row}, {key: 0 if old is None else old.version}, sleep=sleep)
        except ConflictError:
            continue
        if old is not None and old.row.holder != holder and not old.row.released:
            _log.warning("%s: taken over from %s, epoch %d", context, describe(old.row), row.epoch)
            if claim.watch is not None and claim.on_conflict == "takeover":
                await _outlast(claim.watch, old.row.holder, sleep)
        return Loaded(row, version)
    raise UnavailableError(f"{context}: others keep taking it over: run it once only", key=key)


async def _must_wait(context: Context, owner: Owner, holder: str, claim: Claim, sleep: Sleep) -> bool:
    """Whether the context is another's that may be alive; waits a little before it says so."""
    watch = claim.watch
    if watch is None or owner.released or owner.holder == holder or claim.on_conflict == "takeover":
        return False
    life, row = (await watch.look(owner.holder))[owner.holder]
    if life is Life.DEAD or row is None:
        return False
    if claim.given_up() or (life is Life.ALIVE and claim.on_conflict == "refuse"):
        raise HeldError(
            f"{context} is owned by {describe(owner)}, which is alive (epoch {owner.epoch}): end that process, "
            "or wait for it (on_conflict='wait'), or take over (on_conflict='takeover')",
            key=context_key("owner", context),
        )
    await sleep(min(row.lease_seconds / _LOOKS_PER_LEASE, _LONGEST_LOOK_SECONDS))
    return True


async def _outlast(watch: Watch, holder: str, sleep: Sleep) -> None:
    """Wait until a worker must have seen that one of its contexts was taken, or its lease is over."""
    began, beat, looks = watch.boot_clock(), -1, -1
    while True:
        try:
            life, row = (await watch.look(holder))[holder]
        except UnavailableError:
            await sleep(_LONGEST_LOOK_SECONDS)  # it has to last through that too
            continue
        if life is Life.DEAD or row is None or watch.boot_clock() - began >= row.lease_seconds:
            return
        if row.beat != beat:
            beat, looks = row.beat, looks + 1
        if looks >= 2:  # the first may have been under way; the second began after the takeover
            return
        await sleep(min(row.lease_seconds / _LOOKS_PER_LEASE, _LONGEST_LOOK_SECONDS))


def refuse_newer(store: Store, damaged: dict[Key, str]) -> None:
    """A row that a newer version wrote is whole and stays where it is: only that version may go on."""
    for key, reason in damaged.items():
        if not store.is_stopped(key):
            raise CorruptedError(reason, key=key)
