"""What a cache may serve of a shared store: rows of contexts that this process owns, while its lease runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fakes import candle, stepped
from test_ownership import CONTEXT, LEASE_SECONDS, Process, Time, finished

from holdfast.contract import Backend, Key
from holdfast.domains import context_key, guard_key, ledger_key, risk_key
from holdfast.engine.worker import sign_of_life
from holdfast.rows import SessionRow
from holdfast.store import Store
from holdfast.urls import open_backend
from holdfast.wrappers.cached import Cached

SESSION = context_key("session", CONTEXT)


def cache_of(store: Store) -> Cached:
    backend: Backend = store.home.backend
    while not isinstance(backend, Cached):
        backend = backend.backend  # type: ignore[attr-defined]
    return backend


@pytest.fixture
async def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Process, Process, Time]]:
    monkeypatch.setattr("holdfast.engine.worker.machine", lambda: "")
    time = Time()
    stores = [Store(open_backend(f"traced+cached+retrying+sqlite:{tmp_path}/store.db")) for _ in range(2)]
    processes = []
    for name, store in zip(("first", "second"), stores, strict=True):
        await store.open()
        process = Process(name, store, time)
        sign = sign_of_life(
            store, holder=name, lease_seconds=LEASE_SECONDS, sleep=time.sleep, clock=lambda: 0, boot_clock=time
        )
        assert sign is not None
        process.sign = sign
        processes.append(process)
    yield processes[0], processes[1], time
    for process in processes:
        for session in list(process.sign._sessions):
            await process.sign.leave(session)
        await process.store.close()


async def row_of(store: Store) -> SessionRow:
    loaded = await store.get(SESSION)
    assert loaded is not None
    assert isinstance(loaded.row, SessionRow)
    return loaded.row


async def test_a_store_named_cached_serves_the_rows_of_an_owned_context_from_memory(
    two: tuple[Process, Process, Time],
) -> None:
    first, _, _ = two
    session = await first.session()
    await stepped(session, candle(0, 43000))
    before = cache_of(first.store).figures
    assert before.rows > 0
    for _ in range(5):
        assert (await row_of(first.store)).last_event == 1
    after = cache_of(first.store).figures
    assert (after.hits - before.hits, after.misses) == (5, before.misses)
    await session.close()


async def test_nothing_is_leased_that_another_process_may_write(two: tuple[Process, Process, Time]) -> None:
    first, second, _ = two
    session = await first.session()
    leases = first.sign.leases
    assert leases.epoch("main", SESSION) == 1
    assert leases.epoch("main", context_key("outbox", CONTEXT)) == 1
    for key in (
        context_key("owner", CONTEXT),  # by whoever takes over
        guard_key("limit"), risk_key("limit", CONTEXT),  # by every context of the profile
        ledger_key(CONTEXT, "s-1"),
        *(context_key(domain, CONTEXT) for domain in ("signal", "schedule", "partial")),  # by an adapter, anywhere
        context_key("session", CONTEXT._replace(symbol="ETHUSDT")),
        Key("entity", "mine", "1"),
    ):  # fmt: skip
        assert leases.epoch("main", key) is None, key
    assert leases.epoch("other", SESSION) is None
    assert second.sign.leases.epoch("main", SESSION) is None
    await session.close()
    assert leases.epoch("main", SESSION) is None, "it was let go of"


async def test_a_paused_owner_serves_nothing_from_memory_when_it_wakes_after_its_lease(
    two: tuple[Process, Process, Time],
) -> None:
    first, second, time = two
    zombie = await first.session()
    await stepped(zombie, candle(0, 43000))
    assert (await row_of(first.store)).last_event == 1
    await first.die()  # no beat from now on, as under SIGSTOP
    following = asyncio.ensure_future(second.session("wait"))
    await finished(following, time, within=3 * LEASE_SECONDS)
    session = await following
    await stepped(session, candle(1, 43000, high=44100))
    written = await row_of(second.store)
    assert written.last_event > 1
    hits = cache_of(first.store).figures.hits
    assert await row_of(first.store) == written, "not what it remembers, but what the new owner wrote"
    assert cache_of(first.store).figures.hits == hits
    await session.close()
    await zombie.close()


async def test_a_lease_that_was_taken_again_serves_nothing_before_the_context_was_shown_to_be_its_own(
    two: tuple[Process, Process, Time],
) -> None:
    first, _, time = two
    session = await first.session()
    await first.die()
    time.now += LEASE_SECONDS
    await first.sign.renew()
    assert first.sign.leases.epoch("main", SESSION) is None, "a takeover may be on its way"
    await session.flush()
    assert first.sign.leases.epoch("main", SESSION) == 1
    await session.close()


async def test_a_living_owner_that_is_taken_over_never_serves_what_the_new_one_has_replaced(
    two: tuple[Process, Process, Time],
) -> None:
    first, second, time = two
    old = await first.session()
    await stepped(old, candle(0, 43000))
    remembered = await row_of(first.store)
    taking = asyncio.ensure_future(second.session("takeover"))
    while not taking.done():
        assert await row_of(first.store) == remembered, "nobody has written it yet"
        await time.pass_by(0.5)
    session = await taking
    await stepped(session, candle(1, 43000, high=44100))
    assert await row_of(first.store) == await row_of(second.store) != remembered
    await session.close()
    await old.close()


async def test_a_context_that_was_let_go_of_is_not_served_from_memory_while_the_process_lives_on(
    two: tuple[Process, Process, Time],
) -> None:
    first, second, _ = two
    session = await first.session()
    await stepped(session, candle(0, 43000))
    await session.close()
    following = await second.session()
    await stepped(following, candle(1, 43000, high=44100))
    assert await row_of(first.store) == await row_of(second.store)
    await following.close()


async def test_leases_lent_to_a_closed_cache_or_to_one_that_has_its_own_change_nothing(tmp_path: Path) -> None:
    class Own:
        def epoch(self, scope: str, key: Key) -> int | None:
            return None

    class Everything:
        def epoch(self, scope: str, key: Key) -> int | None:
            return 1

    own = Cached(open_backend(f"sqlite:{tmp_path}/a.db"), leases=Own())
    closed = Cached(open_backend(f"sqlite:{tmp_path}/b.db"))
    reader = Cached(open_backend(f"sqlite:{tmp_path}/b.db"))
    closed.lend(Everything())
    await own.open()
    own.lend(Everything())
    await closed.open()
    await reader.open(read_only=True)
    reader.lend(Everything())
    for cache in (own, closed, reader):
        await cache.read("main", [SESSION])
        assert cache.figures.rows == 0
        await cache.close()
