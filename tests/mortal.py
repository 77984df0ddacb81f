"""Dying at a numbered step: a backend and a four-method class that end the "process" before or after a call.

What they hold survives, as a disk would; everything after the death raises, as nothing runs any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Backend, Key, Op, Record, Survives
from holdfast.documents.custom import CustomBackend
from holdfast.store import Store
from holdfast.wrappers.around import Around


class Death(BaseException):
    """The process has been killed; not an Exception, so that no handler of errors catches it."""


class Killer:
    """Counts storage calls and kills at one of them.

    Args:
        at: Which half-call dies: an even number before its call, an odd one after it; None never.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.steps = 0
        self.giving_way = False
        """Let other tasks run before and after each write, so that it can be cancelled there."""

    def pass_by(self) -> None:
        """Live on, or die here; once dead, die at every call."""
        step = self.steps
        self.steps += 1
        if self.at is not None and step >= self.at:
            raise Death(f"at step {step}")

    async def pass_by_slowly(self) -> None:
        """As :meth:`pass_by`, and give way if so told."""
        self.pass_by()
        if self.giving_way:
            await asyncio.sleep(0)


class MortalBackend(Around):
    """A backend that dies when its killer says so; what it wraps keeps its rows."""

    def __init__(self, backend: Backend, killer: Killer) -> None:
        super().__init__(backend)
        self.killer = killer

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        self.killer.pass_by()
        return await super().read(scope, keys)

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:
        await self.killer.pass_by_slowly()
        number = await super().commit(scope, changes, expect, op=op)
        await self.killer.pass_by_slowly()
        return number


Shelf = dict[tuple[str, str, str], Any]
"""What four-method classes hold: (base dir, entity name, id) → value."""


def four_method_class(shelf: Shelf, killer: Killer | None = None, calls: list[tuple[str, ...]] | None = None) -> type:
    """Return a user's class as the documents show it; it inherits nothing and keeps its values in ``shelf``."""
    doom = killer or Killer()

    class Shelved:
        def __init__(self, entity_name: str, base_dir: str) -> None:
            self.place = (base_dir, entity_name)

        async def wait_for_init(self, initial: bool) -> None:
            pass

        async def has_value(self, entity_id: str) -> bool:
            self._note("has", entity_id)
            return (*self.place, entity_id) in shelf

        async def read_value(self, entity_id: str) -> Any:
            self._note("read", entity_id)
            return shelf[(*self.place, entity_id)]

        async def write_value(self, entity_id: str, value: Any) -> None:
            self._note("write", entity_id)
            await doom.pass_by_slowly()
            shelf[(*self.place, entity_id)] = value
            await doom.pass_by_slowly()

        def _note(self, what: str, entity_id: str) -> None:
            if calls is not None:
                calls.append((what, *self.place, entity_id))

    return Shelved


class World:
    """What outlives a process: a memory backend's rows and, if asked, the four domains in four-method classes.

    Args:
        classes: Keep signal, schedule, risk and partial in four-method classes.
    """

    def __init__(self, *, classes: bool = False) -> None:
        self.classes = classes
        self.memory = MemoryBackend()
        self.shelf: Shelf = {}
        self.calls: list[tuple[str, ...]] = []

    async def boot(self, killer: Killer | None = None) -> Store:
        """Open a store for a new process; whatever process there was is dead."""
        await self.memory.close()
        doom = killer or Killer()
        home: Any = MortalBackend(self.memory, doom)
        routes = {}
        if self.classes:
            cls = four_method_class(self.shelf, doom, self.calls)
            routes = {
                domain: CustomBackend(cls, f"./dump/data/{domain}/", domain)
                for domain in ("signal", "schedule", "risk", "partial")
            }
        store = Store(home, routes=routes, require=Survives.NOTHING)
        await store.open()
        return store
