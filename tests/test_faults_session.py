"""The disk or the store fails at every call of a live run: the user is told, nothing is lost, it can go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from fakes import Bot, FakeMarket, candle, flat, minute_ms, sound
from power_workloads import FOCUS, make_backend

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Backend, Guarantees, How, Survives
from holdfast.errors import HoldfastError
from holdfast.invariants import check_store
from holdfast.rows import Event, Trade
from holdfast.store import Store
from holdfast.testing.disk import SimulatedDisk
from holdfast.testing.faults import ERRNOS, Fault, FaultKind, FaultyBackend, FaultyDisk
from holdfast.testing.history import History, Witnessed, observe
from holdfast.testing.medium import Medium
from holdfast.testing.power import Cuts, Ground, power_cuts
from holdfast.testing.steps import cancelled_at

MOST_CALLS = 500
LIVES = 8


class Run:
    """A market with two trades in it (one opened at once, one that waits first), and the bots that lived on it."""

    def __init__(self) -> None:
        self.market = FakeMarket(
            {
                "BTCUSDT": [
                    *flat(43000, -20, 1),
                    candle(2, 43000),  # the strategy opens here
                    candle(3, 43150),  # a milestone
                    candle(4, 43300),
                    candle(5, 43300, high=44000),  # target
                    *flat(43300, 6, 6),
                    candle(7, 43300),  # the strategy waits for a better price
                    candle(8, 43000, low=42900),  # activated
                    candle(9, 42500, low=41900),  # stopped out
                    *flat(42500, 10, 11),
                ]
            }
        )
        self.bots: list[Bot] = []

    def bot(self) -> Bot:
        """Return the bot of the next life of the process."""
        signals = {
            3: {"position": "long", "priceTakeProfit": 44000, "priceStopLoss": 42000, "minuteEstimatedTime": 60},
            8: {
                "position": "long", "priceOpen": 43000, "priceTakeProfit": 44000, "priceStopLoss": 42000,
                "minuteEstimatedTime": 60,
            },
        }  # fmt: skip
        self.bots.append(Bot(self.market, signals, risk=[lambda payload: True]))
        return self.bots[-1]

    def told(self) -> list[str]:
        """Ids of all events that callbacks were given, over all lives."""
        return [value.id for bot in self.bots for _, value in bot.told if isinstance(value, Event) and value.number]

    def complaints(self) -> list[Any]:
        return [failure for bot in self.bots for failure in bot.errors]


async def trades(store: Store) -> list[Trade]:
    return [loaded.row for loaded in (await store.scan("ledger")).values() if isinstance(loaded.row, Trade)]


async def lives(run: Run, backend: Callable[[], Backend], at: int, require: Survives = Survives.PROCESS) -> None:
    """Run until the market has ended, starting anew after each error; then look at what is stored."""
    for _ in range(LIVES):
        store = Store(backend(), require=require)
        try:
            await store.open()
            await _drain(run, store)
            break
        except HoldfastError as error:
            assert len(str(error)) > 15
        finally:
            await store.close()
    else:
        raise AssertionError(f"call {at}: it never came to its end")
    for _ in range(2):
        store = Store(backend(), require=require)
        try:
            await store.open()
            await finish(run, store, at)
            break
        except HoldfastError:
            continue  # the fault came only now
        finally:
            await store.close()
    else:
        raise AssertionError(f"call {at}: what is stored cannot be looked at")


async def finish(run: Run, store: Store, at: int) -> None:
    """What must hold at the end, whatever failed."""
    await sound(store)
    numbers = [int(text.rpartition("#")[2]) for text in run.told()]
    assert set(numbers) == set(range(1, max(numbers, default=0) + 1)), f"call {at}: an event was never told: {numbers}"
    closed = {event.id for bot in run.bots for event in bot.heard("on_close")}
    assert {trade.event_id for trade in await trades(store)} == closed, f"call {at}: ledger and events differ"


@pytest.mark.parametrize("error", ERRNOS[:2])
async def test_each_failing_call_of_a_live_run_is_told_and_loses_nothing(error: int, record_property: Any) -> None:
    hits = 0
    for at in range(1, MOST_CALLS):
        medium, history, run = Medium(), History(), Run()
        disk = FaultyDisk(SimulatedDisk(medium), at=at, error=error)
        await lives(run, partial(_witnessed, disk, history), at)
        backend = make_backend(SimulatedDisk(medium))
        disk.disk.kill()  # type: ignore[attr-defined]
        await backend.open()
        wrong = history.violation(await observe(backend), history.moment)
        await backend.close()
        assert wrong is None, f"call {at}: {wrong}"
        hits += disk.hits
        if not disk.hits:
            break
    else:
        raise AssertionError("more calls than expected")
    record_property("proof:failing disk calls", {"faults": hits, "lost": 0})
    assert hits > 30


@pytest.mark.parametrize("kind", ["unavailable", "unknown_applied", "unknown_lost", "die_before", "die_after"])
@pytest.mark.parametrize("call", ["commit", "read"])
async def test_each_failing_call_of_the_store_is_told_and_loses_nothing(kind: FaultKind, call: Any) -> None:
    for at in range(1, 80):
        memory, run = MemoryBackend(), Run()
        faulty = [FaultyBackend(memory, Fault(at, kind, call))]

        def backend(faulty: list[FaultyBackend] = faulty, memory: MemoryBackend = memory) -> Backend:
            return faulty.pop() if faulty else memory

        first = faulty[0]
        await lives(run, backend, at, Survives.NOTHING)
        if not first.hits:
            assert at > 2
            return
    raise AssertionError("more calls than expected")


async def test_a_live_run_that_is_cancelled_at_any_step_goes_on_from_there() -> None:
    for at in range(1, 400, 3):
        memory, run = MemoryBackend(), Run()
        store = Store(memory, require=Survives.NOTHING)
        await store.open()
        cancelled, _ = await cancelled_at(_drain(run, store), at)
        await asyncio.sleep(0)
        assert await check_store(store) == []
        await store.close()
        await lives(run, partial(_same, memory), at, Survives.NOTHING)
        if not cancelled:
            return
    raise AssertionError("too many steps")


def _witnessed(disk: FaultyDisk, history: History) -> Backend:
    return Witnessed(make_backend(disk), history)


def _same(backend: Backend) -> Backend:
    return backend


async def _drain(run: Run, store: Store) -> None:
    async for _ in run.bot().run(store):
        pass


async def test_the_power_fails_at_any_moment_of_a_live_run_and_every_invariant_holds(record_property: Any) -> None:
    async def workload(ground: Ground) -> None:
        run, store = Run(), Store(ground.backend())
        await store.open()
        await _drain(run, store)
        await store.close()
        assert len(run.told()) >= 5

    async def invariants(backend: Backend) -> None:
        store = Store(_Already(backend), require=Survives.NOTHING)
        await store.open()
        assert [str(broken) for broken in await check_store(store)] == []

    report = await power_cuts(workload, make_backend, Cuts(focus=FOCUS, draws=1, most_per_cut=48), check=invariants)
    record_property("proof:power cuts", {"cuts": report.cuts, "images": report.images, "distinct": report.distinct})
    assert not report.violations, report
    assert report.distinct > 100


class _Already:
    """An open backend, for a store that would open it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def open(self, *, read_only: bool = False) -> Any:
        return Guarantees(
            backend="opened", survives=Survives.HOST, survives_how=How.ASSUMED, atomic=True, atomic_how=How.ASSUMED,
            fenced=True, fenced_how=How.ASSUMED, shared=False,
        )  # fmt: skip


async def test_an_event_that_the_iterator_gave_stays_stored_until_the_next_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever dies while it handles an event is given it again."""
    monkeypatch.setattr("holdfast.engine.background.ACKNOWLEDGE_SECONDS", 0.0)
    memory, run = MemoryBackend(), Run()
    store = Store(memory, require=Survives.NOTHING)
    await store.open()
    events = run.bot().run(store)
    first = await anext(events)
    for _ in range(50):
        await asyncio.sleep(0)
    stored = [loaded.row for loaded in (await store.scan("outbox")).values()]
    assert first in stored
    await events.aclose()
    await store.close()
    again = Store(memory, require=Survives.NOTHING)
    await again.open()
    events = run.bot().run(again)
    assert await anext(events) == first
    await events.aclose()
    await again.close()


async def test_nothing_opens_on_candles_that_were_missed() -> None:
    """The position closes in the gap; the strategy would have opened another one there, and is not asked."""
    memory, run = MemoryBackend(), Run()
    store = Store(memory, require=Survives.NOTHING)
    await store.open()
    first = run.bot()
    events = first.run(store)
    opened = await anext(events)
    assert opened.kind == "opened"
    await events.aclose()
    run.market.present_ms = minute_ms(11)
    second = run.bot()
    told = [event async for event in second.run(store)]
    assert [event.kind for event in told if event.id != opened.id] == ["closed"]
    assert second.asked == [12]
    await sound(store)
    await store.close()
