"""On every kind of store, as it really fails: positions are closed, and nothing is lost or repeated."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from emergency_kit import Watched, policy_of, reached, session_in
from fakes import candle, flat, sound
from order_kit import Desk, orders_in
from troubled_stores import HOLES, TROUBLES

from holdfast.brokers.paper_venue import VenueProcess
from holdfast.contract import Survives
from holdfast.engine.live import Live, LiveRun
from holdfast.store import Store
from holdfast.urls import open_backend


@pytest.mark.parametrize("kind", TROUBLES)
async def test_a_position_is_closed_whatever_befalls_the_store_and_nothing_is_lost_or_repeated(
    tmp_path: Path, kind: str
) -> None:
    async with TROUBLES[kind](tmp_path) as trouble:
        store = Store(open_backend(trouble.url), require=Survives.NOTHING)
        await store.open()
        watched = Watched()
        desk = watched.desk
        run = _run(desk, store, (trouble.journal or tmp_path) / "emergency")
        running = watched.start(run)
        await watched.holds()
        await reached(lambda: _settled(run))
        await trouble.begin()
        desk.market.go_on([candle(4, 43000, high=44100)])
        await watched.has_sold()
        if trouble.refuses_exits:
            await reached(lambda: [event.kind for event in watched.told] == ["opened", "closed"])
            assert [one.kind for one in watched.trouble] == ["emergency"]
            assert session_in(run).unsaved > 0
        if trouble.is_full:
            told = ("CLOSE_ONLY", "the store is full")
            await reached(lambda: told in [(one.after, one.why) for one in watched.modes])
        await trouble.end()
        desk.market.go_on(flat(43000, 5, 9))
        await reached(lambda: desk.market.waiting.is_set() and _settled(run))
        desk.market.finish()
        await running
        await watched.is_sound(store)
        await store.close()


class Child:
    """A process that runs :mod:`emergency_process`, and what it has said."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("emergency_process.py")), *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(json.loads(line))

    def go(self) -> None:
        """Let it go on to its next step."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def has_said(self, **words: Any) -> bool:
        """Whether one of its lines says this."""
        return any(words.items() <= line.items() for line in self.said)

    def end(self, seconds: float = 0.0) -> None:
        """Wait for its end, or end it."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.mark.parametrize("name", [name for name in HOLES if name != "s3"])  # moto is too slow for a lease so short
async def test_a_successor_finds_the_exit_at_the_venue_that_one_who_was_cut_off_had_sent(
    tmp_path: Path, name: str
) -> None:
    """The first one is cut off, closes from its journal, and its lease ends; the second one knows nothing of that."""
    children: list[Child] = []

    def start(url: str, journal: str) -> Child:
        children.append(Child(url, str(tmp_path / journal), venue.address, "4.0", "wait"))
        return children[-1]

    venue = await asyncio.to_thread(VenueProcess)
    try:
        async with HOLES[name](tmp_path) as trouble:
            first = start(trouble.url, "journal")
            await reached(lambda: first.has_said(kind="opened") and _held(venue) == 2.0)
            second = start(trouble.beside, "other")
            await trouble.begin()
            first.go()
            await reached(lambda: _held(venue) == 0.0)
            await reached(lambda: first.has_said(kind="closed"))
            assert first.has_said(trouble="emergency"), "it was the journal that allowed it"
            second.go()
            await reached(lambda: second.has_said(kind="closed"))
            closed = {json.dumps(line) for child in children for line in child.said if line.get("kind") == "closed"}
            assert len(closed) == 1, "the same event, by the same id, at the same price"
            await trouble.end()
            await reached(lambda: first.has_said(error="FencedError"))
            assert first.has_said(trouble="fenced")
            second.go()
            await reached(lambda: second.has_said(end="the market ended"))
            witness = venue.witness()
            taken = [(order.side, order.quantity, order.filled_quantity, order.reduce_only) for order in witness.orders]
            assert taken == [("buy", 2, 2, False), ("sell", 2, 2, True)], "each once, whoever sent it how often"
            # The first machine comes back with its journal: what it kept is known to be done.
            last = start(trouble.url, "journal")
            last.go()
            last.go()
            await reached(lambda: last.has_said(end="the market ended"))
            assert [line for line in last.said if "kind" in line] == []
            assert len(venue.witness().orders) == 2
            store = Store(open_backend(trouble.beside), require=Survives.NOTHING)
            await store.open()
            await sound(store)
            orders = (await orders_in(store)).orders.values()
            assert [(order.action, order.state) for order in orders] == [("open", "filled"), ("close", "filled")]
            await store.close()
    finally:
        for child in children:
            await asyncio.to_thread(child.end)
        venue.close()


def _held(venue: VenueProcess) -> float:
    return sum(position.quantity for position in venue.witness().positions)


def _run(desk: Desk, store: Store, emergency: Path) -> LiveRun:
    """Set up a run whose time is the real one."""
    return Live.run(
        "BTCUSDT", strategy_name=desk.bot.strategy, exchange_name=desk.bot.exchange, store=store,
        registry=desk.bot.registry, listeners=desk.bot.listeners, clock=desk.time,
        on_trouble=policy_of(emergency, patience_seconds=0.4),
    )  # fmt: skip


def _settled(run: Any) -> bool:
    """Whether the store has everything that was decided and told."""
    session = session_in(run)
    return session.unsaved == 0 and len(session.outbox) == 0
