"""The emergency journal: what was decided about open positions while the store could not be written.

One file for each process, its blocks set aside when the run starts, so that it works though every disk is full. A
record is a commit that the store could not take: the rows of one exit (or of a level on the way to it, or of an order's
answer), and the session row that they build on. When the store returns, a session commits what it kept as one commit;
a process that was killed does so when it recovers.

Invariants:

* Only what ends or watches an exposure is kept; an entry never is.
* What is kept is acted on only once it is durable here, and only under the lease, unless the user sets
  ``exit_without_lease``.
* It is merged only onto the very session row that it builds on. One that was merged before, or overtaken by another
  owner, is recognised by the session row alone, so merging twice is merging once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar, cast

import msgspec

from ..contract import Key
from ..domains import context_key, decode, encode
from ..errors import CorruptedError, HoldfastError
from ..names import Context
from ..rows import Decision, GapPlan, Order, Row, SessionRow
from ..store import Store
from .blocks import Blocks, FileSpace, Space
from .modes import TroublePolicy
from .orders import ENDS, EXITS, replaced

_log = logging.getLogger("holdfast")

T = TypeVar("T")

RESERVE_BYTES = 16 * 1024
"""Room for an exit: its session row remembers up to 100 ids. With less than that the journal counts as full."""


class Kept(NamedTuple):
    """One commit that the store could not take."""

    number: int
    base: SessionRow | None
    """The session row on which it builds."""
    changes: dict[Key, Row | None]
    guards: tuple[Key, ...]
    """Guard rows of risk profiles to rewrite with it: their slots change."""

    @property
    def after(self) -> SessionRow | None:
        """The session row that it leaves."""
        for key, row in self.changes.items():
            if key.domain == "session":
                return cast("SessionRow", row)
        return self.base


def remaining(kept: Sequence[Kept], stored: SessionRow | None) -> Sequence[Kept] | None:
    """Return what is still to be merged onto the stored session row; None where another owner has gone on.

    Args:
        kept: Of one context, oldest first.
    """
    if not kept or kept[0].base == stored:
        return kept
    for done, one in enumerate(kept, 1):
        if one.after == stored:
            return kept[done:]  # rows that followed without moving the session row are written again: the same ones
    return None


def together(kept: Sequence[Kept]) -> tuple[dict[Key, Row | None], tuple[Key, ...]]:
    """Put what is kept into one commit: the newest row of each key, and the guard rows that go with it."""
    changes: dict[Key, Row | None] = {}
    for one in kept:
        changes |= one.changes
    return changes, tuple(dict.fromkeys(key for one in kept for key in one.guards))


def beside_others(changes: Mapping[Key, Row | None], stored: Mapping[Key, Row]) -> dict[Key, Row | None]:
    """Return what is to be merged of ``changes``, where another owner may have gone on with the orders since.

    Left out is what the store knows more about. An exit that may have been sent, of a signal for which another owner
    has made one of its own, is recorded as over: the venue is asked about it once more, and it is not sent again.

    Args:
        changes: What is kept.
        stored: All orders of the context.
    """
    overtaken = _overtaken(changes, stored)
    exits = [one for one in stored.values() if isinstance(one, Order) and one.action in EXITS]

    def merged(row: Row | None) -> Row | None:
        if not isinstance(row, Order) or row.action not in EXITS or row.state in ENDS:
            return row
        if not any(one.signal_id == row.signal_id and one.epoch > row.epoch for one in exits):
            return row
        return replaced(row, state="expired", note="another owner has made an exit of its own")

    return {key: merged(row) for key, row in changes.items() if key not in overtaken}


def _overtaken(changes: Mapping[Key, Row | None], stored: Mapping[Key, Row]) -> set[Key]:
    overtaken: set[Key] = set()
    newest = _highest(stored.values(), lambda order: order.n)
    epochs = _highest(changes.values(), lambda order: order.epoch)
    for key, row in changes.items():
        known = stored.get(key)
        if row is None and isinstance(known, Order):
            if known.filled_quantity or known.epoch > epochs.get((known.signal_id, known.action), 0):
                overtaken.add(key)  # it came to nothing here, and another owner has made one of that number since
        elif not isinstance(row, Order):
            continue
        elif isinstance(known, Order):
            went_on = known.state in ENDS and row.state not in ENDS
            if known.epoch > row.epoch or went_on or known.filled_quantity > row.filled_quantity:
                overtaken.add(key)
        elif not row.filled_quantity and row.n < newest.get((row.signal_id, row.action), 0):
            overtaken.add(key)  # it came to nothing there too, and was deleted when the next one followed
    return overtaken


def _highest(rows: Iterable[Row | None], number: Callable[[Order], int]) -> dict[tuple[str, str], int]:
    """Return the highest number among the orders of each signal and action."""
    highest: dict[tuple[str, str], int] = {}
    for row in rows:
        if isinstance(row, Order):
            which = row.signal_id, row.action
            highest[which] = max(number(row), highest.get(which, 0))
    return highest


def may_be_kept(rows: Mapping[Key, Row | None]) -> bool:
    """Whether rows that belong to no transition are about an exposure that exists: exits, answers, recovery plans."""
    orders = [row for row in rows.values() if row is not None]
    return bool(orders) and all(
        isinstance(row, GapPlan | Decision)
        or (isinstance(row, Order) and (row.action in EXITS or row.state != "intended"))
        for row in orders
    )


class Emergency:
    """The journal of one process for one store; does nothing where the policy names no file.

    Args:
        store: Whose commits are kept.
        policy: Where, and how much.
        open_space: A seam for tests.
    """

    def __init__(self, store: Store, policy: TroublePolicy, *, open_space: Callable[[str], Space] = FileSpace) -> None:
        self._store_name = ""
        self._store = store
        self._path, self._size_bytes = policy.emergency, policy.emergency_bytes
        self._open_space = open_space
        self._blocks: Blocks | None = None
        self._kept: dict[Context, list[Kept]] = {}
        self._strangers = 0
        self._turn = asyncio.Lock()

    @property
    def is_named(self) -> bool:
        """Whether there is to be a journal."""
        return self._path is not None

    @property
    def has_room(self) -> bool:
        """Whether it is open and an exit fits."""
        return self._blocks is not None and self._blocks.room_bytes() >= RESERVE_BYTES

    async def open(self) -> None:
        """Set the space aside and read what an earlier process left. Repeatable.

        Raises:
            HeldError: Another process uses the file.
            InvalidInputError: The path cannot be used.
            UnavailableError: There is no room now.
            CorruptedError: The file is damaged; it was left as it is.

        Crash: The file is whole, or holds nothing and is set up anew.
        """
        if self._path is None or self._blocks is not None:
            return
        async with self._turn:
            if self._blocks is not None:
                return
            self._store_name = f"{self._store.guarantees.backend} {self._store.scope}"
            self._kept, self._strangers = {}, 0
            path = self._path
            blocks = await _in_thread(lambda: self._opened(path))
            try:
                for entry in blocks.entries:
                    self._take(entry.number, entry.text)
            except BaseException as error:
                blocks.close()
                if isinstance(error, KeyError | TypeError | ValueError | LookupError | msgspec.MsgspecError):
                    raise CorruptedError(
                        f"{path} holds what this version cannot read ({error!r:.100}): start the version that wrote it"
                    ) from error
                raise
            self._blocks = blocks
            if self._strangers:
                _log.error("%s holds %d commits of another store: start with that store", path, self._strangers)

    def _opened(self, path: str) -> Blocks:
        space = self._open_space(path)
        try:
            return Blocks(space, path, self._size_bytes)
        except BaseException:
            space.close()
            raise

    def kept(self, context: Context) -> list[Kept]:
        """Return what is kept of a context and not merged yet, oldest first."""
        return self._kept.get(context, [])

    @property
    def contexts(self) -> list[Context]:
        """Of which something is kept and not merged yet."""
        return [context for context, kept in self._kept.items() if kept]

    async def keep(
        self, context: Context, base: SessionRow | None, changes: Mapping[Key, Row | None], *, epoch: int
    ) -> Kept:
        """Keep a commit that the store cannot take.

        Args:
            base: The session row on which it builds.
            epoch: Of the owner, for people.

        Raises:
            UnavailableError: There is no room; nothing was kept.
            FailedError: It cannot be written; it may be found there after a restart.

        Crash: Before the return it is kept or not; after it, it is.
        """
        rows = {key: row for key, row in changes.items() if key.domain != "guard"}
        guards = tuple(key for key in changes if key.domain == "guard")
        plain = {
            "store": self._store_name, "context": list(context), "epoch": epoch,
            "base": None if base is None else _written(context_key("session", context), base),
            "changes": [[*key, None if row is None else _written(key, row)] for key, row in rows.items()],
            "guards": [list(key) for key in guards],
        }  # fmt: skip
        async with self._turn:
            blocks = self._blocks
            assert blocks is not None
            if not any(self._kept.values()) and not self._strangers:
                await _in_thread(blocks.forget_all)
            number = await _in_thread(lambda: blocks.append(msgspec.json.encode(plain)))
            kept = Kept(number, base, rows, guards)
            self._kept.setdefault(context, []).append(kept)
            return kept

    async def withdraw(self, context: Context, number: int) -> None:
        """Forget one commit that was kept and not acted on.

        Crash: It may be merged, as if the store had taken it and nobody had been told yet.
        """
        self._kept[context] = [one for one in self.kept(context) if one.number != number]
        await self._note({"void": number}, context)

    async def done(self, context: Context, number: int) -> None:
        """Forget what is kept of a context up to a number: it was merged, or another owner has gone on.

        Crash: It may be merged again, which changes nothing.
        """
        self._kept[context] = [one for one in self.kept(context) if one.number > number]
        await self._note({"done": number}, context)

    async def _note(self, what: dict[str, int], context: Context) -> None:
        async with self._turn:
            blocks = self._blocks
            if blocks is None:
                return
            try:
                if not any(self._kept.values()) and not self._strangers:
                    await _in_thread(blocks.forget_all)
                else:
                    plain = {"store": self._store_name, "context": list(context), **what}
                    await _in_thread(lambda: blocks.append(msgspec.json.encode(plain)))
            except HoldfastError as error:
                _log.warning("%s: %s", self._path, error)

    async def close(self) -> None:
        """Let go of the file; what is kept stays. Repeatable."""
        async with self._turn:
            blocks, self._blocks = self._blocks, None
            if blocks is not None:
                await _in_thread(blocks.close)

    def _take(self, number: int, text: bytes) -> None:
        plain = msgspec.json.decode(text)
        if plain["store"] != self._store_name:
            self._strangers += 1
            return
        context = Context(*plain["context"])
        if "done" in plain:
            self._kept[context] = [one for one in self.kept(context) if one.number > plain["done"]]
            return
        if "void" in plain:
            self._kept[context] = [one for one in self.kept(context) if one.number != plain["void"]]
            return
        base = plain["base"]
        self._kept.setdefault(context, []).append(
            Kept(
                number,
                None if base is None else cast("SessionRow", _read(context_key("session", context), base)),
                {Key(*key): None if text is None else _read(Key(*key), text) for *key, text in plain["changes"]},
                tuple(Key(*key) for key in plain["guards"]),
            )
        )


def _written(key: Key, row: Row) -> str:
    return encode(key, row).decode()


def _read(key: Key, text: str) -> Row:
    return decode(key, text.encode())


async def _in_thread(work: Callable[[], T]) -> T:
    """Run in a thread to its end, whoever is cancelled meanwhile: half of a write is worse than a late cancellation."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
