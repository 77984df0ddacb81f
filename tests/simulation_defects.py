"""Defects planted in the engine, the store and the storage, which the simulation must find; and how soon it does.

``python tests/simulation_defects.py [--starts N] [--most N] [NAME …]`` plants each, plays seeds from N places on until
one history violates something, and prints how many seeds that took.
"""

# ruff: noqa: E501

from __future__ import annotations

import argparse
import importlib
import inspect
import statistics
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any, NamedTuple

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
        changed = made[path.rpartition(".")[2]]
        changed = changed.fget if isinstance(changed, property) else changed
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
        with self.planted():
            for seed in range(first, first + most):
                if not play(seed).ok:
                    return seed - first + 1
        return None


def _one(name: str, where: str, old: str, new: str) -> Defect:
    return Defect(name, where, ((old, new),))


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
    _one("an outage is not recorded", "engine.session_writer:SessionWriter.send", ", **forbidden", ""),
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
        "    if not await self.send(rows | orders, expect, exits=exits):",
        "    if self._executor is not None:\n        self._executor.committed(orders)\n"
        "    if not await self.send(rows | orders, expect, exits=exits):",
    ),
    _one(
        "each time it is sent an order has another client id", "engine.venue:Venue.submit", "request_of(order)",
        "__import__('msgspec').structs.replace(request_of(order), client_order_id=order.client_order_id[:20]"
        " + str(round(asyncio.get_running_loop().time())))",
    ),
    _one("the number of an exit is used again", "engine.orders:exit_order", "default=0) + 1", "default=0) * 0 + 1"),
    _one("an order that nobody knows never came, at once", "engine.orders:unfound", "if now_ms < order.expires_at_ms + terms.grace_ms:", "if False:"),
    _one("an order that nobody knows never came, once its time is over", "engine.orders:unfound", "if now_ms < order.expires_at_ms + terms.grace_ms:", "if now_ms < order.expires_at_ms:"),
    _one("an order that nobody knows is sent again everywhere", "engine.orders:unfound", 'wanted and features.refuses_repeated_ids == "always"', "wanted"),
    _one("open orders and history are not asked", "engine.venue:Venue.known", 'if found is None or self._terms.features.refuses_repeated_ids != "always":', "if False:"),
    _one("two orders with one id count as one", "engine.answers:together", "sum(one.filled_quantity for one in orders)", "orders[0].filled_quantity"),
    _one("a lost answer of the venue is taken for a refusal", "engine.executor:Executor._send", 'replaced(order, state="unknown", note=str(error)[:200])', 'replaced(order, state="rejected", note=str(error)[:200])'),
    _one("a refusal of the second request counts for the first", "engine.answers:answered", "(report.repeated or resent)", "False"),
    _one("a cancellation is not committed", "engine.executor:Executor._cancel", "await self._record(now)", "self.book.put(now)"),
    _one("orders are sent without the lease", "engine.executor:Executor._send", "if needs_lease and not self._has_lease:", "if False:"),
    _one("a fenced session sends on", "engine.session_writer:SessionWriter.owner", "self.tenure is None or self.broken is not None or self._letting_go", "self.tenure is None or self._letting_go"),
    _one("an entry is sent though its validity is over", "engine.orders:_under_way", "if now_ms < order.expires_at_ms and (is_exit or is_open):", "if is_exit or is_open:"),
    _one("what rests is never cancelled", "engine.orders:_under_way", "(now_ms >= order.expires_at_ms or not (is_exit or is_open))", "not (is_exit or is_open)"),
    _one("an exit that came to nothing is the last one", "engine.orders:next_step", "in book.unsettled(but=open_id))", "in [])"),
    _one("the orders of the dead are not read", "engine.executor:Executor.recover", "self.book = Book(cast(\"Order\", loaded.row) for loaded in rows.values())", "self.book = Book()"),
    _one("a partial fill is ignored", "engine.answers:answered", "max(order.filled_quantity, report.filled_quantity)", 'report.filled_quantity if report.state == "filled" else order.filled_quantity'),
    _one("an exit is for the whole entry", "engine.orders:exit_order", "quantity=left, reference_price", "quantity=entry.quantity, reference_price"),
    _one("reduce only is left out", "engine.orders:exit_order", "reduce_only=terms.features.reduce_only, ", ""),
    _one("a fill that crosses a cancellation is not looked for", "engine.executor:Executor._is_doubtful", 'return order.state in ("cancelled", "expired")', "return False"),
    _one("candles are decided before the entry is known", "engine.executor:Executor.holds_candles", "return not self.book.is_entered(signal_id) or withdrawal(self.book, signal_id) is not None", "return False"),
    _one("an entry begins before the last exit is done", "engine.executor:Executor.blocks_entries", "bool(self.book.unsettled(but=self._open_id))", "False"),
    _one("a candle that waited counts as new", "engine.driver:Driver._is_fresh", "<= _FRESH_MS / 1000", ">= 0"),
    _one("an order whose row is gone is asked about", "engine.executor:Executor.committed", "self._doubtful.discard(key.entity_id)", "pass"),
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


def main() -> int:
    """Plant them all; 1 if one was not found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=3, help="how often each is looked for, from another seed on")
    parser.add_argument("--most", type=int, default=20_000, help="after so many seeds it counts as not found")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only those whose name has this in it")
    options = parser.parse_args()
    missed = 0
    for defect in DEFECTS:
        if options.names and not any(name in defect.name for name in options.names):
            continue
        took = [defect.found_after(1_000_000 * (start + 1), options.most) for start in range(options.starts)]
        missed += None in took
        middle = statistics.median(options.most if one is None else one for one in took)
        print(f"{defect.name}: {'NOT FOUND' if None in took else f'{middle:g} seeds'} {took}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
