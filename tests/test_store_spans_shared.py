"""Commits that span shared backends: a live owner's is left alone, a dead one's is finished, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from test_store_spans import BTC, CHANGES, OPEN, SESSION, SIGNAL

from holdfast.backends.sqlite import SqliteBackend
from holdfast.contract import Key, KeyPrefix, Op
from holdfast.domains import encode
from holdfast.engine.recovery import recover
from holdfast.errors import ConflictError, UnavailableError
from holdfast.names import Context
from holdfast.rows import Signal
from holdfast.store import Store
from holdfast.testing.faults import Fault, FaultyBackend
from holdfast.wrappers.around import Around


class Ground:
    """A home and a place elsewhere, for any number of processes."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.stores: list[Store] = []

    async def process(self, *, home: tuple[Fault, ...] = (), elsewhere: tuple[Fault, ...] = ()) -> Store:
        """Open the store as a process of its own, with faults of its own."""
        store = Store(
            FaultyBackend(SqliteBackend(self.place / "home.db"), *home),
            routes={"signal": FaultyBackend(SqliteBackend(self.place / "elsewhere.db"), *elsewhere)},
        )
        await store.open()
        self.stores.append(store)
        return store

    async def intents(self) -> int:
        return len(await self.stores[0].keys(KeyPrefix("intent")))


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    made = Ground(tmp_path)
    yield made
    for store in made.stores:
        await store.close()


async def signal_in(store: Store) -> Signal | None:
    loaded = await store.get(SIGNAL)
    if loaded is None:
        return None
    assert isinstance(loaded.row, Signal)
    return loaded.row


async def test_opening_leaves_the_commit_of_a_context_to_its_next_owner_which_finishes_it(ground: Ground) -> None:
    first = await ground.process(elsewhere=(Fault(1, "die_before"),))
    with pytest.raises(Exception, match="decided, but not yet carried out"):
        await first.writer(str(BTC)).commit(CHANGES)
    second = await ground.process()
    assert await ground.intents() == 1
    assert await signal_in(second) is None
    found = await recover(
        second, second.writer(str(BTC)), BTC, holder="second", risk_names=(), lifetime_ms=1, clock=lambda: 0, sleep=_no
    )
    assert await ground.intents() == 0
    assert await signal_in(second) == OPEN
    assert found.state.signal == OPEN


async def test_opening_finishes_a_commit_of_any_other_lane(ground: Ground) -> None:
    first = await ground.process(elsewhere=(Fault(1, "die_before"),))
    with pytest.raises(Exception, match="decided"):
        await first.writer("desk-0").commit(CHANGES)
    second = await ground.process()
    assert await ground.intents() == 0
    assert await signal_in(second) == OPEN


async def test_a_late_request_of_a_replaced_owner_changes_nothing_elsewhere(ground: Ground) -> None:
    """The old owner sleeps between its decision and what it writes elsewhere; by then a later row stands there."""
    sleeper = await ground.process(elsewhere=(Fault(1, "delay"),))
    backend = sleeper.routes["signal"].backend
    assert isinstance(backend, FaultyBackend)
    late = asyncio.ensure_future(sleeper.writer(str(BTC)).commit(CHANGES))
    await backend.waiting.wait()
    second = await ground.process()
    lane = second.writer(str(BTC))
    await recover(second, lane, BTC, holder="second", risk_names=(), lifetime_ms=1, clock=lambda: 0, sleep=_no)
    assert await signal_in(second) == OPEN
    await lane.commit({SIGNAL: None, SESSION: None})
    backend.go_on.set()
    with pytest.raises(ConflictError):
        await late
    assert await signal_in(second) is None, "it was closed meanwhile, and stays closed"
    assert await ground.intents() == 0


async def test_whoever_comes_second_to_the_same_commit_finds_it_written_and_goes_on(ground: Ground) -> None:
    first = await ground.process(home=(Fault(2, "unavailable"),))
    lane = first.writer(str(BTC))
    with pytest.raises(Exception, match="decided"):
        await lane.commit(CHANGES)  # elsewhere it is written, at home not yet
    second = await ground.process()
    await recover(
        second, second.writer(str(BTC)), BTC, holder="second", risk_names=(), lifetime_ms=1, clock=lambda: 0, sleep=_no
    )
    assert await signal_in(second) == OPEN
    with pytest.raises((ConflictError, UnavailableError)):
        await lane.resend()
    assert await signal_in(second) == OPEN


async def test_an_intent_of_an_earlier_version_names_no_guards_and_is_carried_out(ground: Ground) -> None:
    first = await ground.process(elsewhere=(Fault(1, "die_before"),))
    with pytest.raises(Exception, match="decided"):
        await first.writer("desk-0").commit({**CHANGES, SESSION: None})
    (key,) = await first.keys(KeyPrefix("intent"))
    loaded = await first.get(key)
    assert loaded is not None
    old = msgspec.structs.replace(loaded.row, guards={}, lane="")
    home = first.home
    await home.backend.commit(home.scope, {key: encode(key, old)}, {}, op=Op("older", 1))
    second = await ground.process()
    assert await signal_in(second) == OPEN


async def _no(seconds: float) -> None:
    return


class Listing(Around):
    """Counts how often it is asked for intents."""

    asked = 0

    def keys(self, scope: str, prefix: KeyPrefix = KeyPrefix()) -> AsyncIterator[Key]:
        self.asked += prefix.domain == "intent"
        return super().keys(scope, prefix)


async def test_without_routes_a_recovery_asks_for_intents_only_where_one_was_found_at_open(ground: Ground) -> None:
    first = await ground.process(elsewhere=(Fault(1, "die_before"),))
    with pytest.raises(Exception, match="decided"):
        await first.writer(str(BTC)).commit(CHANGES)
    listing = Listing(SqliteBackend(ground.place / "home.db"))
    unrouted = Store(listing)
    await unrouted.open()
    ground.stores.append(unrouted)
    other = Context(BTC.exchange_name, "ETHUSDT", BTC.strategy_name)
    for context, asked, left in ((other, 1, 1), (BTC, 2, 0)):
        lane = unrouted.writer(str(context))
        await recover(unrouted, lane, context, holder="x", risk_names=(), lifetime_ms=1, clock=lambda: 0, sleep=_no)
        assert (listing.asked, await ground.intents()) == (asked, left), context
    assert await signal_in(unrouted) == OPEN, "carried out, to where it belongs now"
