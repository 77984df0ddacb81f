"""Emergency journals of a fleet: a folder of this machine, in which each worker has a file of its own.

A context may move on while its exit lies in a journal. Then one of three things is true, and the stored session row
tells which: the exit was merged; or whoever has the context has gone on, which is told and the exit left out (that
worker found it at its own candle, with the same event id and client order id); or nobody has gone on yet, and it is
kept until one of these holds.

Invariants:

* A file belongs to the process that holds its lock, so to nobody once that has ended.
* What an ended worker left goes into the journal of a living one before that one begins the contexts, so that the exits
  are merged when it takes them over. It is durable there before it is forgotten in the first.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import cast

import msgspec

from ..domains import context_key
from ..errors import HeldError, HoldfastError, InvalidInputError, UnavailableError
from ..names import Context
from ..rows import SessionRow
from ..store import Loaded, Store
from .emergency import Emergency, remaining
from .health import health_of
from .modes import TroublePolicy

_log = logging.getLogger("holdfast")

_MOST_FILES = 1000


class JournalFolder:
    """The folder.

    Args:
        path: Made if there is none, in a folder that exists; on a disk of this machine.

    Raises:
        InvalidInputError: It can be no folder.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            told = f"--emergency {path!r:.200} can be no folder ({error.strerror}): name one for the journals"
            raise InvalidInputError(told) from error

    async def claim(self, store: Store, policy: TroublePolicy) -> TroublePolicy:
        """Take the first journal that no living process has, and return the policy that names it.

        Args:
            store: Open, and not in use yet.
            policy: All the rest.

        Raises:
            InvalidInputError, UnavailableError, CorruptedError: As :meth:`Emergency.open`.

        Crash: The file is whole, and free again.
        """
        for n in itertools.count(1):
            if n > _MOST_FILES:
                raise UnavailableError(f"{self.path} has {_MOST_FILES} journals, and all are in use")
            one = msgspec.structs.replace(policy, emergency=str(self.path / f"worker-{n}"))
            try:
                await health_of(store, one).emergency.open()
            except HeldError:
                continue
            return one
        raise AssertionError

    def others(self, own: str | None) -> list[str]:
        """Return the files of all other workers, living or not."""
        files = sorted(str(path) for path in self.path.glob("worker-*") if path.stat().st_size)
        return [path for path in files if path != own]


class Journals:
    """One worker's journal, and what others left.

    Args:
        store: Its store.
        emergency: Its own journal.
        policy: What the journal was opened with.
        folder: Where those of others lie; None: it looks after its own only.
        told: Told of what was left out, and of what stays.
    """

    def __init__(
        self, store: Store, emergency: Emergency, policy: TroublePolicy, folder: JournalFolder | None,
        told: Callable[[Context, str], None],
    ) -> None:  # fmt: skip
        self._store, self._emergency, self._policy, self._folder, self._told = store, emergency, policy, folder, told
        self._refused: set[str] = set()
        """Files that cannot be used; told once."""

    async def look(self, running: Collection[Context]) -> None:
        """Settle what is kept of contexts that do not run here, then take over what ended workers left.

        Raises:
            UnavailableError: The store cannot be read now.

        Crash: What is kept may be settled again, which changes nothing.
        """
        for context in self._emergency.contexts:
            if context not in running:
                await self._settle(context)
        if self._folder is not None:
            for path in await asyncio.to_thread(self._folder.others, self._policy.emergency):
                await self._take_over(path, running)

    def tell_left(self) -> None:
        """Tell what stays in the journal when this worker ends."""
        for context in self._emergency.contexts:
            self._told(context, f"an exit stays in {self._policy.emergency} until a worker starts on it again")

    async def _settle(self, context: Context) -> None:
        kept = self._emergency.kept(context)
        todo = remaining(kept, await self._stored(context))
        if todo:
            return  # nobody has gone on yet: whoever has the context will, or this worker gets it again
        if todo is None:
            self._leave_out(context, [one.number for one in kept])
        await self._emergency.done(context, kept[-1].number)

    async def _take_over(self, path: str, running: Collection[Context]) -> None:
        other = Emergency(self._store, msgspec.structs.replace(self._policy, emergency=path))
        try:
            await other.open()
        except HeldError:
            return  # that worker lives
        except HoldfastError as error:
            if path not in self._refused:
                self._refused.add(path)
                _log.error("%s: what an ended worker left cannot be read: %s", path, error)
            return
        try:
            for context in other.contexts:
                await self._take_over_one(other, context, running)
        except HoldfastError as error:
            _log.warning("%s: what an ended worker left stays there: %s", path, error)
        finally:
            await other.close()

    async def _take_over_one(self, other: Emergency, context: Context, running: Collection[Context]) -> None:
        kept = other.kept(context)
        if context in running:  # its session has gone on from the store already
            if remaining(kept, await self._stored(context)) != []:
                self._leave_out(context, [one.number for one in kept])
        elif self._emergency.kept(context):
            return  # one after the other: what is kept here builds on another row
        else:
            for one in kept:
                changes = one.changes | dict.fromkeys(one.guards)
                await self._emergency.keep(context, one.base, changes, epoch=0)
        await other.done(context, kept[-1].number)

    async def _stored(self, context: Context) -> SessionRow | None:
        key = context_key("session", context)
        found, _ = await self._store.salvage(key)
        loaded = cast("Loaded[SessionRow] | None", found.get(key))
        return None if loaded is None else loaded.row

    def _leave_out(self, context: Context, numbers: list[int]) -> None:
        which = ", ".join(map(str, numbers))
        self._told(context, f"commit {which} of the emergency journal was left out: another owner has gone on")
