"""Defects planted in the engine, the store and the storage, which the simulation must find; and how soon it does.

``python tests/simulation_defects.py [--starts N] [--most N] [--jobs N] [--resume FILE] [NAME …]`` plants each, plays seeds
from N places on until one history violates something that it does not violate without the defect, and prints how many
seeds that took: the median and the worst.
"""

# ruff: noqa: E501

from __future__ import annotations

import argparse
import importlib
import inspect
import multiprocessing
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import msgspec

from holdfast.testing.simulation import play


class Defect(NamedTuple):
    """One planted defect: in the source of one function, each text, which stands there once, becomes another."""

    name: str
    where: str
    """``module:function`` or ``module:class.method``, under ``holdfast``."""
    changes: tuple[tuple[str, str], ...]

    def code(self) -> tuple[Any, CodeType]:
        """Return the function, and what its code becomes."""
        module_name, _, path = self.where.partition(":")
        module = importlib.import_module(f"holdfast.{module_name}")
        found: Any = module
        for part in path.split("."):
            found = inspect.getattr_static(found, part)
        function: Any = found.__func__ if isinstance(found, staticmethod) else found
        function = function.fget if isinstance(function, property) else function
        source = textwrap.dedent(inspect.getsource(function))
        for old, new in self.changes:
            assert source.count(old) == 1, f"{self.name}: {old!r} stands {source.count(old)} times in {self.where}"
            source = source.replace(old, new)
        made: dict[str, Any] = {}
        flags = importlib.import_module("__future__").annotations.compiler_flag
        exec(compile(source, module.__file__ or "", "exec", flags, dont_inherit=True), module.__dict__, made)
        changed: Any = made[path.rpartition(".")[2]]
        changed = getattr(changed, "fget", changed)  # of a property
        return function, (changed.__func__ if isinstance(changed, staticmethod) else changed).__code__

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Plant it within the ``with`` block."""
        function, code = self.code()
        sound, function.__code__ = function.__code__, code
        try:
            yield
        finally:
            function.__code__ = sound

    def found_after(self, first: int, most: int) -> int | None:
        """Return how many seeds from ``first`` on it took to find it; None if more than ``most``."""
        for seed in range(first, first + most):
            with self.planted():
                violates = not play(seed, told=False).ok
            if violates and play(seed, told=False).ok:  # what a seed violates anyway, it does not find
                return seed - first + 1
        return None


def _one(name: str, where: str, old: str, new: str) -> Defect:
    return Defect(name, where, ((old, new),))


SPINS = _one(
    "a page of old candles is asked for again at once", "engine.driver:Driver._fetch",
    "if batch and batch[-1][0] < start_ms and session.is_behind:", "if False:",
)  # fmt: skip
"""One that ten thousand seeds may not find; the plan that did is kept."""
DEFECTS = (
    # tenure and ownership
    _one("the owner row is not expected", "engine.tenure:Tenure.commit", "self._owner_key: self._owner.version,", ""),
    _one(
        "a session goes on under the next owner's row", "engine.tenure:Tenure._look_into",
        "if owner is None or (owner.row.holder, owner.row.epoch) != (mine.holder, mine.epoch):", "if owner is None:",
    ),
    _one("the epoch is not raised", "engine.ownership:own", "old.row.epoch + 1", "old.row.epoch"),
    _one(
        "a context is taken whoever else takes it", "engine.ownership:own",
        "{key: 0 if old is None else old.version}", "{}",
    ),
    _one(
        "who was not watched counts as dead", "engine.ownership:_must_wait",
        "if life is Life.DEAD or row is None:", "if life is not Life.ALIVE or row is None:",
    ),
    _one("half a lease is enough", "engine.worker:Watch._judge", ">= row.lease_seconds", ">= row.lease_seconds / 2"),
    _one(
        "the guards of a risk check are not expected", "engine.decider:Decider.decide",
        "return Settled(outcome, rejection, allowed), checked", "return Settled(outcome, rejection, allowed), {}",
    ),
    Defect(
        "the guards are read after the slots", "engine.decider:Decider._positions",
        (
            ("    found, _ = await self._store.salvage(*(guard_key(name) for name in names))\n", ""),
            (
                "    guards = {guard_key(name): cast(\"Loaded[Guard] | None\", found.get(guard_key(name))) for name in names}\n",
                "",
            ),
            (
                "    return positions, guards",
                "    found, _ = await self._store.salvage(*(guard_key(name) for name in names))\n"
                "    return positions, {guard_key(name): found.get(guard_key(name)) for name in names}",
            ),
        ),
    ),
    _one(
        "a guard is not rewritten with its slots", "engine.commits:changes",
        "written[key] = Guard(changes=guards[key].changes + 1 if key in guards else 1)", "pass",
    ),
    _one(
        "a slot is not given back", "engine.commits:changes", "gone[risk_key(name, context)] = None", "pass",
    ),
    # the session
    _one(
        "events are told before their commit", "engine.session_writer:SessionWriter.commit",
        "    expect = {key: 0", "    self.outbox.add(transition.events)\n    expect = {key: 0",
    ),
    _one(
        "memory changes before the commit", "engine.session:Session._commit",
        "    await self.writer.commit(self.state, transition, checked)",
        "    before, self.state = self.state, transition.state\n    await self.writer.commit(before, transition, checked)",
    ),
    _one("an outage is not recorded", "engine.session_writer:SessionWriter._send", ", **forbidden", ""),
    _one("an outage is forgotten when its commit fails", "engine.commits:Outages.put_back", "self._unrecorded.setdefault(row.from_ms, row.to_ms)", "pass"),
    _one("a candle is dropped when the store is away", "engine.session:Session._settle", "self._behind.append(candle)", "pass"),
    _one(
        "levels outlive their signal", "engine.commits:changes",
        "if after.levels != before.levels:", "if after.levels != before.levels and after.signal:",
    ),
    # the outbox
    _one("the ledger is left out", "engine.outbox:Outbox._record", "trade, key =", "return\n    trade, key ="),
    _one(
        "the number of an event is used again", "rules.signals:_event",
        "number = at.state.last_event + nth", "number = at.state.last_event + 1",
    ),
    _one(
        "an event counts as delivered before its user has had it", "engine.driver:Driver.events",
        "                    yield event\n                session.delivered()",
        "                    session.delivered()\n                    yield event\n                else:\n                    session.delivered()",
    ),
    _one(
        "the row of an event goes before it is told", "engine.outbox:Outbox.add",
        "self._waiting.extend(event for event in events if event.number not in early)",
        "events = list(events)\n    self._waiting.extend(events)\n    self._delivered += [event_key(self.context, e.number) for e in events]",
    ),
    # recovery
    _one(
        "events that wait are not loaded", "engine.recovery:_load",
        "events=tuple(loaded.row for loaded in events.values())", "events=()",
    ),
    _one(
        "an outage that is on record is not heeded", "engine.recovery:_recorded_outages",
        "if not keys:", "if True:",
    ),
    _one("the price window begins empty", "engine.driver:Driver._fetch", "preload_from_ms(start_ms, self._strategy.interval_ms, self._params)", "start_ms"),
    _one("entries on candles of the past", "engine.driver:Driver._advance", "newest = not self._queue and self._is_fresh(candle)", "newest = True"),
    # orders
    _one(
        "an order is sent before its intent is on record", "engine.session_writer:SessionWriter.commit",
        "    if not await self._send(with_orders, expect, exits=exits):",
        "    if self._executor is not None:\n"
        "        self._executor.committed({key: row for key, row in with_orders().items() if key.domain == 'order'})\n"
        "    if not await self._send(with_orders, expect, exits=exits):",
    ),
    _one(
        "each time it is sent an order has another client id", "engine.venue:Venue.submit", "request_of(order)",
        "__import__('msgspec').structs.replace(request_of(order), client_order_id=order.client_order_id[:20]"
        " + str(round(asyncio.get_running_loop().time())))",
    ),
    _one("the number of an exit is used again", "engine.orders:exit_order", "default=0) + 1", "default=0) * 0 + 1"),
    _one("an order that nobody knows never came, at once", "engine.orders:unfound", "if asked_ms < over_ms:", "if False:"),
    _one("an order that nobody knows never came, once its time is over", "engine.orders:unfound", "over_ms = order.expires_at_ms + terms.grace_ms", "over_ms = order.expires_at_ms"),
    _one("an order that nobody knows is sent again everywhere", "engine.orders:unfound", 'wanted and features.refuses_repeated_ids == "always"', "wanted"),
    _one("open orders and history are not asked", "engine.venue:Venue.known", 'if found is None or self._terms.features.refuses_repeated_ids != "always":', "if False:"),
    _one("two orders with one id count as one", "engine.answers:together", "sum(one.filled_quantity for one in orders)", "orders[0].filled_quantity"),
    _one("a lost answer of the venue is taken for a refusal", "engine.executor:Executor._send", 'replaced(order, state="unknown", note=str(error)[:200])', 'replaced(order, state="rejected", note=str(error)[:200])'),
    _one("a refusal of the second request counts for the first", "engine.answers:answered", "(report.repeated or resent)", "False"),
    _one("a cancellation is not committed", "engine.executor:Executor._cancel", "await self._record(now)", "self.book.put(now)"),
    _one("orders are sent without the lease", "engine.executor:Executor._send", "if needs_lease and not self._has_lease:", "if False:"),
    _one("an entry is sent though its validity is over", "engine.orders:_under_way", "if now_ms < order.expires_at_ms and (is_exit or is_open):", "if is_exit or is_open:"),
    _one("what rests is never cancelled", "engine.orders:_under_way", "(now_ms >= order.expires_at_ms or not (is_exit or is_open))", "not (is_exit or is_open)"),
    _one("an exit that came to nothing is the last one", "engine.orders:next_step", "in book.unsettled(but=open_id))", "in [])"),
    _one("the orders of the dead are not read", "engine.executor:Executor.recover", "({key: one.row for key, one in rows.items()} | kept)", "{}"),
    _one("a partial fill is ignored", "engine.answers:answered", "max(order.filled_quantity, report.filled_quantity)", 'report.filled_quantity if report.state == "filled" else order.filled_quantity'),
    _one("an exit is for the whole entry", "engine.orders:exit_order", "quantity=left, reference_price", "quantity=entry.quantity, reference_price"),
    _one("reduce only is left out", "engine.orders:exit_order", "reduce_only=terms.features.reduce_only, ", ""),
    _one("a fill that crosses a cancellation is not looked for", "engine.executor:Executor._is_doubtful", 'return order.state in ("cancelled", "expired")', "return False"),
    _one("candles are decided before the entry is known", "engine.orders:Book.is_entered", "return entry is None or is_ended(entry) or entry.filled_quantity > 0", "return True"),
    _one("an entry begins before the last exit is done", "engine.executor:Executor.blocks_entries", "bool(self.book.unsettled(but=self._open_id))", "False"),
    _one("a candle that waited counts as new", "engine.driver:Driver._is_fresh", "<= _FRESH_MS / 1000", ">= 0"),
    _one("an order whose row is gone is asked about", "engine.executor:Executor.committed", "self._doubtful.pop(key.entity_id, None)", "pass"),
    # the emergency journal
    _one("what was merged from the journal is merged again", "engine.emergency:remaining", "return kept[done:]", "return kept"),
    _one("what is in the journal is not merged", "engine.lifeline:Lifeline._merge", "if todo:", "if False:"),
    _one("rows of events go before those of earlier ones", "engine.outbox:Outbox.delivered", "if event.number == self._unrecorded or self._early:", "if event.number == self._unrecorded:"),
    # the store and the storage
    _one(
        "a commit whose answer was lost is sent as another one", "writer:_Sent.send",
        "op=self.op", "op=Op(self.op.writer + secrets.token_hex(2), self.op.n)",
    ),
    _one(
        "a lost answer is taken for a refusal", "engine.lanes:commit_surely",
        "unknown = error\n    delay_seconds", "raise ConflictError('not applied') from error\n    delay_seconds",
    ),
    _one(
        "a refusal after a lost answer is believed", "engine.lanes:commit_surely",
        "if patient is None:", "if True:",
    ),
    _one(
        "the number of an earlier commit is taken for that of the next", "writer:Writer.commit",
        "raise UnavailableError(f", "raise error\n                raise UnavailableError(f",
    ),
    _one("versions are not compared", "backends.state:State.decide", "if (0 if found is None else found.version) != version:", "if False:"),
    _one("a repeated op is refused", "backends.state:State.decide", "elif n == last[0]:", "elif False:"),
)  # fmt: skip


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """One search for one defect, from one seed on, and how many seeds it took; None: more than ``most``."""

    name: str
    first: int
    most: int
    took: int | None = None

    def made(self) -> Search:
        """Search."""
        (defect,) = [one for one in DEFECTS if one.name == self.name]
        return msgspec.structs.replace(self, took=defect.found_after(self.first, self.most))


class _Found:
    """What was searched already, in a file that a hunt which goes on reads again."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        text = file.read_bytes() if file is not None and file.exists() else b""
        whole = text.rfind(b"\n") + 1
        if file is not None and whole < len(text):
            os.truncate(file, whole)  # a line that was cut short
        known = [msgspec.json.decode(line, type=Search) for line in text[:whole].splitlines()]
        self._took: dict[tuple[str, int, int], int | None] = {
            (one.name, one.first, one.most): one.took for one in known if one.took is not None
        }

    def has(self, one: Search) -> bool:
        return (one.name, one.first, one.most) in self._took

    def add(self, one: Search) -> None:
        self._took[one.name, one.first, one.most] = one.took
        if self._file is not None:
            with self._file.open("ab") as file:
                file.write(msgspec.json.encode(one) + b"\n")

    def told(self, searches: list[Search]) -> str:
        """Say in how many seeds each search of one defect found it."""
        took = self._counts(searches)
        if self.worst(searches) > searches[0].most:
            return f"{searches[0].name}: NOT FOUND {took}"
        return f"{searches[0].name}: median {self.median(searches):g}, worst {self.worst(searches)} seeds {took}"

    def median(self, searches: list[Search]) -> float:
        return statistics.median(self._counts(searches))

    def worst(self, searches: list[Search]) -> int:
        return max(self._counts(searches))

    def _counts(self, searches: list[Search]) -> list[int]:
        took = [self._took[one.name, one.first, one.most] for one in searches]
        return [searches[0].most + 1 if one is None else one for one in took]


def main() -> int:
    """Plant them all; 1: one was not found; 3: the time was up before all were searched."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=5, help="how often each is looked for, from another seed on")
    parser.add_argument("--most", type=int, default=20_000, help="after so many seeds it counts as not found")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="on how many processes at once")
    parser.add_argument("--resume", metavar="FILE", help="keep results there, and go on where an earlier call stopped")
    parser.add_argument("--time-cap", type=float, default=0.0, metavar="SECONDS", help="begin nothing after so long")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only those whose name has this in it")
    options = parser.parse_args()
    ends = time.monotonic() + options.time_cap if options.time_cap else float("inf")
    found = _Found(Path(options.resume) if options.resume else None)
    searches = {
        one.name: [Search(name=one.name, first=1_000_000 * n, most=options.most) for n in range(1, options.starts + 1)]
        for one in DEFECTS
        if not options.names or any(name in one.name for name in options.names)
    }
    todo = [one for every in searches.values() for one in every if not found.has(one)]

    def told(name: str) -> None:
        if all(map(found.has, searches[name])):
            print(found.told(searches[name]), flush=True)

    for name in searches:
        told(name)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        running: set[Future[Search]] = set()
        while todo or running:
            while todo and len(running) < options.jobs and time.monotonic() < ends:
                running.add(pool.submit(todo.pop(0).made))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for one in done:
                found.add(one.result())
                told(one.result().name)
    whole = [every for every in searches.values() if all(map(found.has, every))]
    counts = [found.median(every) for every in whole]
    print(
        f"{len(whole)} of {len(searches)} defects searched {options.starts} times each: "
        f"the median of their medians is {statistics.median(counts) if counts else 0:g} seeds, "
        f"the worst search took {max((found.worst(every) for every in whole), default=0):g}"
    )
    if any(count > options.most for count in (found.worst(every) for every in whole)):
        return 1
    return 0 if len(whole) == len(searches) else 3


if __name__ == "__main__":
    sys.exit(main())
