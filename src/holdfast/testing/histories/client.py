"""What one client process of a history does: tasks that read, commit, delete, repeat and re-send, each call noted.

A line is one write to a file, so what was noted survives a kill. A commit's line is written before it is sent: if no
answer follows, its outcome is unknown.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from ...contract import Backend, Op
from ...errors import ConflictError, FailedError, InvalidInputError, UnavailableError, UnknownOutcomeError
from ...urls import open_backend
from .lines import (
    KEYS,
    Answered,
    Broken,
    Line,
    Looked,
    Orders,
    Read,
    Ready,
    Repeated,
    Seen,
    Sent,
    Troubled,
    encode,
    keys_of,
)

LONGEST_CALL_SECONDS = 60.0
"""A call that takes longer is reported as one that does not return: every backend has a deadline below it."""
_PATIENCE_SECONDS = 150.0
"""How long one operation may be tried in vain, through a server's restart."""
_PAUSE_SECONDS = 0.01
_CANCELLED = 0.03
"""Share of the guarded commits that are cancelled under way, and then sent again."""

T = TypeVar("T")


def backend_of(store: str, opener: str) -> Backend:
    """Return the backend of a store, not open yet.

    Raises:
        InvalidInputError: The opener cannot be found, or returned no backend.
    """
    if not opener:
        return open_backend(store)
    module, _, name = opener.partition(":")
    try:
        call = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInputError(f"{opener!r:.200} cannot be found ({error}): give MODULE:CALLABLE") from error
    backend = call(store)
    if not isinstance(backend, Backend):
        raise InvalidInputError(f"{opener!r:.200} returned {type(backend).__name__}: it must return a Backend")
    return backend


class _Gone(Exception):
    """Something that the contract does not allow has been noted; this client ends."""


class Client:
    """One process's store, log, and what is left to do."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.backend = backend_of(orders.store, orders.opener)
        self.chance = random.Random(orders.seed)
        self.left = orders.operations
        self.unknowns = orders.unknowns
        self.keys = {scope: keys_of(scope) for scope in orders.scopes}
        self.places = {scope: {key: at for at, key in enumerate(keys)} for scope, keys in self.keys.items()}
        self._log = os.open(orders.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._opening = asyncio.Lock()
        self._opened = 0

    async def run(self) -> None:
        """Do what was ordered."""
        orders = self.orders
        try:
            await self._open(self._opened)
            self.note(Ready())
            if orders.look_first:
                await self._look()
            hands = [Hand(self, name) for name in orders.hands]
            await asyncio.gather(*(hand.work() for hand in hands))
            if orders.look_last:
                await self._look()
            if orders.sweep:
                await self._sweep()
            await self.backend.close()
        except _Gone:
            pass
        except Exception as error:
            self.note(Broken(f"{type(error).__name__} escaped: {error}"))
            raise

    def note(self, line: Line) -> None:
        """Write a line."""
        os.write(self._log, encode(line))

    def broken(self, what: str) -> _Gone:
        """Note what the contract does not allow, and return the error that ends this client."""
        self.note(Broken(what))
        return _Gone(what)

    async def call(self, what: str, call: Callable[[], Awaitable[T]]) -> tuple[int, int, T]:
        """Return when a call that changes nothing began and ended, and its answer; try again where it may be."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while True:
            opened = self._opened
            begun = time.monotonic_ns()
            try:
                async with asyncio.timeout(LONGEST_CALL_SECONDS) as limit:
                    found = await call()
                return begun, time.monotonic_ns(), found
            except UnavailableError as error:
                last: Exception = error
                self.note(Troubled(f"{what} unavailable"))
            except FailedError as error:
                last = error
                self.note(Troubled("reopened"))
                await self._open(opened)
            except TimeoutError as error:
                raise self.broken(await self._late(what, limit.expired(), error)) from error
            if time.monotonic() > end:
                raise self.broken(f"{what} failed for {_PATIENCE_SECONDS:.0f} s: {last}")
            await asyncio.sleep(_PAUSE_SECONDS)

    async def commit(self, sent: Sent, *, cancel: bool = False, note: bool = True) -> int:
        """Send a commit once; the caller makes of its errors what they are. A cancelled one is of unknown outcome."""
        keys, opened = self.keys[sent.scope], self._opened
        changes = {keys[at]: None if text is None else text.encode() for at, text in sent.changes.items()}
        expect = {keys[at]: version for at, version in sent.expect.items()}
        sent.begun = time.monotonic_ns()
        if note:
            self.note(sent)
        call = asyncio.ensure_future(self.backend.commit(sent.scope, changes, expect, op=Op(sent.writer, sent.n)))
        try:
            if cancel:
                await asyncio.wait([call], timeout=self.chance.uniform(0.0, 0.003))
                call.cancel()
            async with asyncio.timeout(LONGEST_CALL_SECONDS) as limit:
                return await call
        except asyncio.CancelledError:
            if not cancel:
                raise
            self.note(Troubled("cancelled"))
            raise UnknownOutcomeError("cancelled under way") from None
        except TimeoutError as error:
            raise self.broken(await self._late("commit", limit.expired(), error)) from error
        except FailedError as error:
            self.note(Troubled("reopened"))
            await self._open(opened)
            raise UnknownOutcomeError(f"the store failed: {error}") from error

    async def _late(self, what: str, ours: bool, error: Exception) -> str:
        return f"{what} did not return in {LONGEST_CALL_SECONDS:.0f} s" if ours else f"{what}: {error!r} escaped"

    async def _open(self, opened: int) -> None:
        """Open the store, or open it again if nobody has since; through a server's restart."""
        async with self._opening:
            if opened != self._opened:
                return
            end = time.monotonic() + _PATIENCE_SECONDS
            if opened:
                await self.backend.close()
            while True:
                try:
                    await self.backend.open()
                    break
                except UnavailableError as error:
                    if time.monotonic() > end:
                        raise self.broken(f"could not be opened for {_PATIENCE_SECONDS:.0f} s: {error}") from error
                await asyncio.sleep(_PAUSE_SECONDS)
            self._opened += 1

    async def head(self, by: str, scope: str) -> None:
        """Ask the head and note it."""
        begun, ended, head = await self.call("head", lambda: self.backend.head(scope))
        writers = {writer: (last.n, last.number) for writer, last in head.writers.items()}
        self.note(Looked(begun, ended, by, scope, head.number, writers))

    async def read(self, by: str, scope: str, asked: list[int]) -> dict[int, int]:
        """Read some keys, note what was found, and return the version of each; 0 for absent."""
        keys = [self.keys[scope][at] for at in asked]
        begun, ended, rows = await self.call("read", lambda: self.backend.read(scope, keys))
        places = self.places[scope]
        found = [
            Seen(places[key], record.version, record.op.writer, record.op.n, record.payload.decode())
            for key, record in rows.items()
        ]
        self.note(Read(begun, ended, by, scope, asked, found))
        return dict.fromkeys(asked, 0) | {seen.key: seen.version for seen in found}

    async def _look(self) -> None:
        for scope in self.orders.scopes:
            await self.head("look", scope)
            await self.read("look", scope, list(range(KEYS)))

    async def _sweep(self) -> None:
        """Leave no row behind; what has been counted stays counted."""
        for scope, keys in self.keys.items():
            op = Op("sweep", self.orders.first_n)
            await self.call("sweep", lambda scope=scope, keys=keys, op=op: self._delete(scope, keys, op))  # type: ignore[misc]

    async def _delete(self, scope: str, keys: list[object], op: Op) -> None:
        try:
            await self.backend.commit(scope, dict.fromkeys(keys), {}, op=op)  # type: ignore[arg-type]
        except UnknownOutcomeError as error:
            raise UnavailableError(str(error)) from error


class Hand:
    """One task of a client: a writer of its own, one operation after another."""

    def __init__(self, client: Client, name: str) -> None:
        self.client = client
        self.name = name
        self.n = client.orders.first_n
        self.versions: dict[str, dict[int, int]] = {scope: {} for scope in client.orders.scopes}
        """What it last saw; others may have written since."""
        self.last: dict[str, Sent] = {}
        """Its last op in each scope, if it was acknowledged and may be sent again."""

    async def work(self) -> None:
        """Go on until the client has done its share."""
        client, chance = self.client, self.client.chance
        while client.left > 0:
            client.left -= 1
            scope = chance.choice(client.orders.scopes)
            roll = chance.random()
            if roll < 0.36:
                await self._read(scope, self._some(KEYS))
            elif roll < 0.41:
                await client.head(self.name, scope)
            elif roll < 0.46 and scope in self.last:
                await self._repeat(scope)
            elif roll < 0.58 and client.unknowns > 0:
                await self._commit(scope, self._some(3), {})
            else:
                await self._guarded(scope)

    def _some(self, most: int) -> list[int]:
        chance = self.client.chance
        return sorted(chance.sample(range(KEYS), chance.randint(1, most)))

    async def _read(self, scope: str, asked: list[int]) -> None:
        self.versions[scope].update(await self.client.read(self.name, scope, asked))

    async def _guarded(self, scope: str) -> None:
        """Commit on what was read just now, or on what is remembered, which others may have written since."""
        expected, client = self._some(3), self.client
        known = self.versions[scope]
        if client.chance.random() < 0.6 or any(key not in known for key in expected):
            client.left -= 1
            await self._read(scope, expected)
        changed = expected if client.chance.random() < 0.6 else self._some(3)
        if client.chance.random() < 0.03:
            changed = []
        await self._commit(scope, changed, {key: known[key] for key in expected})

    async def _commit(self, scope: str, changed: list[int], expect: Mapping[int, int]) -> None:
        """Send a commit until its outcome is known, as a caller must: the same op, with the same ``expect``."""
        client, chance = self.client, self.client.chance
        self.n += 1
        self.last.pop(scope, None)
        changes = {
            key: None if chance.random() < 0.2 else f'{{"by":"{self.name}","n":{self.n},"k":{key}}}' for key in changed
        }
        sent = Sent(0, scope, self.name, self.n, changes, dict(expect))
        end = time.monotonic() + _PATIENCE_SECONDS
        while True:
            cancel = bool(expect) and chance.random() < _CANCELLED
            try:
                number = await client.commit(sent, cancel=cancel)
            except ConflictError as error:
                places = client.places[scope]
                clashes = sorted(places[key] for key in error.keys if key in places)
                client.note(Answered(time.monotonic_ns(), self.name, self.n, clashes=clashes))
                self.versions[scope] = {}
                return
            except UnavailableError as error:
                client.note(Troubled("commit unavailable"))
                if not sent.again:  # never sent in doubt before: nothing was written, and nothing ever will be
                    client.note(
                        Answered(time.monotonic_ns(), self.name, self.n, unavailable=True, why=f"{error!s:.300}")
                    )
                    await asyncio.sleep(_PAUSE_SECONDS)
                    return
            except UnknownOutcomeError:
                client.note(Troubled("commit of unknown outcome"))
                if not expect:  # may not be sent again: it stays unknown
                    client.unknowns -= 1
                    return
                sent.again = True
            else:
                client.note(Answered(time.monotonic_ns(), self.name, self.n, number))
                if expect:
                    self.last[scope] = sent
                self.versions[scope].update({key: number if text else 0 for key, text in changes.items()})
                return
            if time.monotonic() > end:
                raise client.broken(f"a commit had no outcome for {_PATIENCE_SECONDS:.0f} s")
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _repeat(self, scope: str) -> None:
        """Send the last acknowledged op again: it must be answered with its number."""
        sent = self.last[scope]
        begun, ended, number = await self.client.call("repeat", lambda: self._again(sent))
        if number is not None:
            self.client.note(Repeated(begun, ended, scope, self.name, sent.n, number))

    async def _again(self, sent: Sent) -> int | None:
        try:
            return await self.client.commit(sent, note=False)
        except ConflictError:
            return 0  # no op was ever given this number: the checker will say so
        except UnknownOutcomeError:
            return None
