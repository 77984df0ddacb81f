"""A seeded schedule of faults over three copies in memory, on a clock of its own: ``python replicated_model.py SEEDS``.

Two clients append tokens to one list, each append guarded by the version that was read; messages to a copy are late,
lost on the way there or back, and outlive the client that sent them; copies die and come back; clients stop for a
while, die, and start anew; promotes happen in between, two at once at times. What must hold:

* every acknowledged token is in the final list, once; a token that was refused for good is not;
* every list that any read returned is a beginning of the final list, and no client's reads get shorter;
* in the end all copies hold the same rows, versions, ops and numbers.
"""

from __future__ import annotations

import asyncio
import json
import random
import selectors
import sys
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Guarantees, Key, Op, Record
from holdfast.errors import ConflictError, HoldfastError, InvalidInputError, UnavailableError, UnknownOutcomeError
from holdfast.wrappers.around import Around
from holdfast.wrappers.replicated import Replicated
from holdfast.wrappers.replicated.copies import Copy
from holdfast.wrappers.replicated.promotion import promote
from holdfast.wrappers.replicated.repair import pages

T = TypeVar("T")
LOG = Key("risk", "model", "list")
SPARE = [Key("partial", "model", f"spare-{at}") for at in range(4)]


class _Selector(selectors.DefaultSelector):
    """Never waits: what would be waited for is added to the clock."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("everybody waits for ever")
        if timeout > 0:
            self.loop.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to whatever is next."""

    def __init__(self) -> None:
        selector = _Selector()
        super().__init__(selector)
        self.now = 0.0
        selector.loop = self

    def time(self) -> float:
        """Return the loop's own time."""
        return self.now


class Place:
    """One copy's machine."""

    def __init__(self) -> None:
        self.memory = MemoryBackend()
        self.is_up = True


class Door(Around):
    """A client's way to a copy: late, lossy, and shut while the copy is down or the client stands still."""

    def __init__(self, place: Place, world: World, client: Client | None) -> None:
        super().__init__(place.memory)
        self.place, self.world, self.client = place, world, client

    async def open(self, *, read_only: bool = False) -> Guarantees:
        await self._travel()
        return self.world.guarantees

    async def close(self) -> None:
        return None

    async def _travel(self) -> None:
        world = self.world
        await asyncio.sleep(world.random.random() ** 4 * world.slowness)
        if self.client is not None:
            await self.client.running.wait()
        if not self.place.is_up:
            raise UnavailableError("the copy is down")

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        await self._travel()
        found = await self.backend.read(scope, keys)
        await self._travel()
        return found

    async def head(self, scope: str) -> Any:
        await self._travel()
        return await self.backend.head(scope)

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        await self._travel()
        # Once on its way it arrives, whatever becomes of its sender.
        return await asyncio.shield(self.world.spawn(self._arrive(scope, changes, expect, op)))

    async def _arrive(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], op: Op
    ) -> int:  # fmt: skip
        chance = self.world.random.random
        if chance() < self.world.loss / 2:
            raise UnknownOutcomeError("lost on the way there")
        await asyncio.sleep(chance() ** 8 * 30 * self.world.slowness)
        if not self.place.is_up:
            raise UnknownOutcomeError("the copy went down")
        number = await self.backend.commit(scope, changes, expect, op=op)
        if chance() < self.world.loss / 2:
            raise UnknownOutcomeError("lost on the way back")
        await asyncio.sleep(chance() ** 6 * 5 * self.world.slowness)
        return number


class World:
    """One run."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.slowness = self.random.choice((0.001, 0.01, 0.05))
        self.loss = self.random.choice((0.0, 0.02, 0.1))
        self.places = [Place() for _ in range(3)]
        self.tasks: set[asyncio.Task[Any]] = set()
        self.acknowledged: list[str] = []
        self.refused: list[str] = []
        self.reads: list[list[str]] = []
        self.promotes = 0
        self.done = False
        self.guarantees: Guarantees

    def spawn(self, work: Awaitable[T]) -> asyncio.Task[T]:
        """Start what nobody's death ends."""
        task: asyncio.Task[T] = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled():
            task.exception()

    def store(self, client: Client | None) -> Replicated:
        """Return the three copies, as one client sees them; not always in the same order."""
        order = self.places if self.random.random() < 0.8 or not self.promotes else self.places[::-1]
        doors = [Door(place, self, client) for place in order]
        return Replicated(*doors, deadline_seconds=2.0, retry_seconds=0.05)

    async def run(self) -> None:
        """Let everything happen, then look."""
        for place in self.places:
            self.guarantees = await place.memory.open()
        store = self.store(None)
        self.slowness, slowness, self.loss, loss = 0.0, self.slowness, 0.0, self.loss
        await store.open()  # the copies are formed in peace: all must be there
        await store.close()
        self.slowness, self.loss = slowness, loss
        clients = [Client(self, f"c{at}") for at in range(2)]
        runs = [asyncio.ensure_future(client.run()) for client in clients]
        await self._faults(clients)
        self.done = True
        for client in clients:
            client.running.set()
        await asyncio.gather(*runs)
        await self._judge()

    async def _faults(self, clients: list[Client]) -> None:
        chance = self.random.random
        for _ in range(self.random.randrange(3, 9)):
            await asyncio.sleep(chance() * 2)
            kind = self.random.choice(("down", "down", "promote", "freeze", "kill", "force", "flicker"))
            client = self.random.choice(clients)
            if kind == "down":
                place = self.random.choice(self.places)
                place.is_up = False
                await asyncio.sleep(chance() * 3)
                if chance() < 0.8:
                    await self._promotes(force=False)
                await asyncio.sleep(chance() * 3)
                place.is_up = True
            elif kind == "flicker":
                place = self.random.choice(self.places)
                place.is_up = False
                await asyncio.sleep(chance() * 0.05)
                place.is_up = True
            elif kind == "promote":
                await self._promotes(force=False)
            elif kind == "force":  # the first answers: no acknowledged commit is lost all the same, as all copies do
                await self._promotes(force=True)
            elif kind == "freeze":
                client.running.clear()
                await asyncio.sleep(chance() * 3)
                if chance() < 0.7:
                    await self._promotes(force=True)
                client.running.set()
            else:
                client.kill()

    async def _promotes(self, *, force: bool) -> None:
        if force and not all(place.is_up for place in self.places):
            return
        works = [self._promote(force=force)]
        if self.random.random() < 0.2:
            works.append(self._promote(force=force))
        if self.random.random() < 0.2:  # one that is killed in the middle
            doomed = asyncio.ensure_future(self._promote(force=force))
            await asyncio.sleep(self.random.random() * 10 * self.slowness)
            doomed.cancel()
            with suppress(asyncio.CancelledError):
                await doomed
        await asyncio.gather(*works)

    async def _promote(self, *, force: bool) -> None:
        # Forced only as far as electing another first goes: never without enough copies.
        with suppress(HoldfastError):
            await promote(self.store(None), force=force and all(place.is_up for place in self.places))
            self.promotes += 1

    async def _judge(self) -> None:
        self.loss = self.slowness = 0.0
        for place in self.places:
            place.is_up = True
        while self.tasks:
            await asyncio.wait(self.tasks)
        with suppress(InvalidInputError):
            await promote(self.store(None))
        store = self.store(None)
        await store.open()
        final = (await store.read("main", [LOG])).get(LOG)
        tokens = json.loads(final.payload) if final else []
        assert len(set(tokens)) == len(tokens), f"applied twice: {tokens}"
        assert set(self.acknowledged) <= set(tokens), f"lost: {set(self.acknowledged) - set(tokens)}"
        assert not set(self.refused) & set(tokens), f"refused, and there: {set(self.refused) & set(tokens)}"
        for read in self.reads:
            assert read == tokens[: len(read)], f"a read was taken back: {read} of {tokens}"
        for _ in range(2000):
            if all(lag.commits == 0 and lag.state in ("the first", "follows") for lag in await store.lag()):
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError(f"not repaired: {await store.lag()}")
        await store.close()
        contents = [await self._content(copy) for copy in store.copies]
        assert contents[0] == contents[1] == contents[2], "the copies differ"

    async def _content(self, copy: Copy) -> Any:
        standing = await copy.standing("main")
        rows: dict[Key, Record] = {}
        async for page in pages(copy, standing.physical):
            rows |= await copy.backend.read(standing.physical, page)
        return standing.number, standing.charter.history, rows


class Client:
    """A process that appends tokens, again and again."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.running = asyncio.Event()
        self.running.set()
        self._life = 0
        self._task: asyncio.Task[None] | None = None
        self._seen = 0

    def kill(self) -> None:
        """End it in the middle of whatever it does."""
        if self._task is not None:
            self._task.cancel()

    async def run(self) -> None:
        """Live, die, live again."""
        while not self.world.done:
            self._life += 1
            self._task = asyncio.ensure_future(self._live(f"{self.name}.{self._life}"))
            with suppress(asyncio.CancelledError):
                await self._task
            await asyncio.sleep(0.01)

    async def _live(self, life: str) -> None:
        store = self.world.store(self)
        before = asyncio.all_tasks()
        try:
            while not self.world.done:
                try:
                    await store.open()
                    break
                except HoldfastError:
                    await asyncio.sleep(0.2)
            self._seen = 0
            n = 0
            while not self.world.done:
                await asyncio.sleep(self.world.random.random() * 0.5)
                n += 1
                with suppress(UnavailableError, ConflictError):
                    await self._append(store, Op(life, n), f"{life}:{n}")
        finally:
            # Killed or at its end: nothing of it goes on but what is on its way to a copy.
            for task in asyncio.all_tasks() - before - self.world.tasks:
                if task.get_coro().__qualname__.startswith(("Lane.", "Follower.", "Replicated.")):  # type: ignore[union-attr]
                    owner = task.get_coro().cr_frame  # type: ignore[union-attr]
                    if owner is not None and _belongs(owner.f_locals.get("self"), store):
                        task.cancel()

    async def _append(self, store: Replicated, op: Op, token: str) -> None:
        world = self.world
        found = (await store.read("main", [LOG])).get(LOG)
        tokens = json.loads(found.payload) if found else []
        assert len(tokens) >= self._seen, f"{self.name} read {self._seen} tokens, then {len(tokens)}"
        self._seen = len(tokens)
        world.reads.append(tokens)
        changes: dict[Key, bytes | None] = {LOG: json.dumps([*tokens, token]).encode()}
        spare = world.random.choice(SPARE)
        changes[spare] = None if world.random.random() < 0.3 else json.dumps(token).encode()
        expect = {LOG: found.version if found else 0}
        while True:
            try:
                await store.commit("main", changes, expect, op=op)
                world.acknowledged.append(token)
                return
            except UnknownOutcomeError:
                await asyncio.sleep(0.05)
                if world.done and world.random.random() < 0.5:
                    return
            except (ConflictError, UnavailableError):
                world.refused.append(token)
                raise


def _belongs(owner: Any, store: Replicated) -> bool:
    lane = getattr(owner, "lane", owner)
    return owner is store or getattr(lane, "_renew", None) == store.renew


def run(seed: int) -> World:
    """Run one seed.

    Raises:
        AssertionError: A promise was broken; the same seed breaks it again.
    """
    world = World(seed)
    loop = VirtualLoop()
    try:
        loop.run_until_complete(world.run())
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
    return world


if __name__ == "__main__":
    import logging
    import time

    logging.disable(logging.CRITICAL)
    first, count = (int(sys.argv[2]) if len(sys.argv) > 2 else 0), int(sys.argv[1])
    began, tokens, promotes, failed = time.process_time(), 0, 0, 0
    for seed in range(first, first + count):
        try:
            world = run(seed)
        except Exception as error:
            failed += 1
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        tokens += len(world.acknowledged)
        promotes += world.promotes
    print(f"{count} seeds, {failed} failed, {tokens} acknowledged, {promotes} promotes, "
          f"{time.process_time() - began:.1f} s")  # fmt: skip
