"""One owner of a context on a shared store: the living are respected, the dead replaced, the replaced stop."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes import Bot, FakeMarket, candle, flat, minute_ms, proposal, session_of, stepped, until

from holdfast.backends.sqlite import SqliteBackend
from holdfast.contract import Key
from holdfast.domains import context_key, worker_key
from holdfast.engine.ownership import OnConflict
from holdfast.engine.recovery import Recovered, recover
from holdfast.engine.session import Session
from holdfast.engine.worker import Life, SignOfLife, Watch, boot_seconds, is_gone, machine, started_ticks
from holdfast.errors import ConflictError, FencedError, HeldError, InvalidInputError, UnavailableError
from holdfast.names import Context
from holdfast.rows import Owner, Worker
from holdfast.store import Store

CONTEXT = Context("binance", "BTCUSDT", "my-strategy")
OWNER = context_key("owner", CONTEXT)
LEASE_SECONDS = 20.0
LATEST_SECONDS = 2 * LEASE_SECONDS
"""Time is moved by hand, but SQLite answers from a thread, which may be late on a busy machine."""


class Time:
    """A clock that sleeping moves; ``pause`` holds every sleep that would end later."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        """Sleep: the others run first, and time passes only as the test says."""
        end = self.now + seconds
        while self.now < end:  # noqa: ASYNC110 -- the test moves the clock by hand
            await asyncio.sleep(0)

    async def pass_by(self, seconds: float, *, step: float = 0.5) -> None:
        """Let time pass, in steps in which everybody may act."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            for _ in range(20):
                await asyncio.sleep(0.0005)  # SQLite answers from a thread


class Process:
    """One process of several, as far as the store can tell."""

    def __init__(self, name: str, store: Store, time: Time) -> None:
        self.name, self.store, self.time = name, store, time
        self.sign = SignOfLife(
            store, holder=name, lease_seconds=LEASE_SECONDS, sleep=time.sleep, clock=lambda: 0, boot_clock=time
        )
        self.bot = Bot(FakeMarket({"BTCUSDT": flat(43000, -10, 30)}), lambda symbol, when: proposal())

    async def session(self, on_conflict: OnConflict = "refuse", *, recover: bool = True) -> Session:
        session = await session_of(
            self.bot, self.store, holder=self.name, recover=False, sign=self.sign, on_conflict=on_conflict
        )
        session._sleep = self.time.sleep
        if recover:
            await self.recover(session)
        return session

    @staticmethod
    async def recover(session: Session) -> None:
        await session.recover()
        for minute in range(-10, 0):
            session.window.push(candle(minute, 43000))
        if session.state.last_candle_ms == 0:
            await session.begin(minute_ms(0))

    async def die(self) -> None:
        """End without a word, as SIGKILL does; the row says that it ran on another machine."""
        assert self.sign._task is not None
        self.sign._task.cancel()
        await asyncio.gather(self.sign._task, return_exceptions=True)


@pytest.fixture
async def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Process, Process, Time]]:
    monkeypatch.setattr("holdfast.engine.worker.machine", lambda: "")  # the pids of both are this process's
    time = Time()
    stores = [Store(SqliteBackend(tmp_path / "store.db")) for _ in range(2)]
    for store in stores:
        await store.open()
    processes = [Process(name, store, time) for name, store in zip(("first", "second"), stores, strict=True)]
    yield processes[0], processes[1], time
    for process in processes:
        for session in list(process.sign._sessions):
            await process.sign.leave(session)
        await process.store.close()


async def finished(waiting: asyncio.Future[Any], time: Time, *, within: float) -> None:
    end = time.now + within
    while not waiting.done() and time.now < end:
        await time.pass_by(0.5)


async def owner_of(store: Store) -> Owner:
    loaded = await store.get(OWNER)
    assert loaded is not None
    assert isinstance(loaded.row, Owner)
    return loaded.row


async def test_a_context_that_a_live_process_owns_is_refused_and_the_error_names_that_process(
    two: tuple[Process, Process, Time],
) -> None:
    first, second, time = two
    held = await first.session()
    refused = asyncio.ensure_future(second.session())
    await finished(refused, time, within=LEASE_SECONDS)
    with pytest.raises(HeldError, match=rf"owned by process {os.getpid()} on .*alive.*takeover"):
        await refused
    assert (await owner_of(first.store)).epoch == 1
    assert await stepped(held, candle(0, 43000)) != [], "the owner goes on"
    await held.close()


async def test_a_process_that_let_go_is_followed_at_once(two: tuple[Process, Process, Time]) -> None:
    first, second, time = two
    await (await first.session()).close()
    assert (await owner_of(first.store)).released
    assert await first.store.get(worker_key("first")) is None
    began = time.now
    session = await second.session()
    assert time.now == began
    assert (await owner_of(second.store)).epoch == 2
    await session.close()


async def test_what_was_let_go_of_stays_so_though_the_lease_ran_out_as_the_session_ended(
    two: tuple[Process, Process, Time], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, _ = two
    session = await first.session()
    flush_last = session.writer.flush_last

    async def slow() -> None:
        await flush_last()
        first.sign.lapses += 1  # the store took that long
        session.lapsed()
        session.writer.background.start()  # the second has passed

    monkeypatch.setattr(session.writer, "flush_last", slow)
    await session.close()
    await session.writer.background.finish()
    assert (await owner_of(first.store)).released, "or nobody would have it while this process lives"


async def test_a_dead_process_is_followed_when_its_lease_is_over_and_no_sooner(
    two: tuple[Process, Process, Time],
) -> None:
    first, second, time = two
    zombie = await first.session()
    await first.die()
    began = time.now
    following = asyncio.ensure_future(second.session())
    await finished(following, time, within=3 * LEASE_SECONDS)
    session = await following
    assert LEASE_SECONDS <= time.now - began <= LATEST_SECONDS
    assert (await owner_of(second.store)).holder == "second"
    with pytest.raises(FencedError, match="epoch 2"):
        await stepped(zombie, candle(0, 43000))
    await zombie.close()
    await session.close()


async def test_waiting_ends_within_the_lease_after_the_owners_death(two: tuple[Process, Process, Time]) -> None:
    first, second, time = two
    zombie = await first.session()
    waiting = asyncio.ensure_future(second.session("wait"))
    await time.pass_by(3 * LEASE_SECONDS)
    assert not waiting.done(), "the owner lives, however long it takes"
    await first.die()
    began = time.now
    await finished(waiting, time, within=2 * LEASE_SECONDS)
    assert time.now - began <= LATEST_SECONDS
    await (await waiting).close()
    await zombie.close()


async def test_whoever_stops_while_it_waits_owns_nothing(two: tuple[Process, Process, Time]) -> None:
    first, second, time = two
    held = await first.session()
    session = await second.session("wait", recover=False)
    waiting = asyncio.ensure_future(second.recover(session))
    await time.pass_by(LEASE_SECONDS)
    session.gate.stopping = True
    await finished(waiting, time, within=2.0)
    with pytest.raises(HeldError):
        await waiting
    await session.close()
    assert (await owner_of(first.store)).holder == "first"
    await held.close()


async def test_a_takeover_fences_at_once_and_goes_on_when_the_old_owner_has_noticed_though_it_had_nothing_to_commit(
    two: tuple[Process, Process, Time],
) -> None:
    first, second, time = two
    idle = await first.session()
    began = time.now
    taking = asyncio.ensure_future(second.session("takeover"))
    await time.pass_by(LEASE_SECONDS / 10)
    assert (await owner_of(second.store)).epoch == 2
    assert not taking.done(), "the old owner may still serve rows from memory, or send to a venue"
    assert not idle.fenced.is_set()
    await time.pass_by(LEASE_SECONDS / 5)
    assert idle.fenced.is_set()
    await finished(taking, time, within=LEASE_SECONDS)
    assert time.now - began < 0.75 * LEASE_SECONDS, "it noticed long before its lease was over"
    session = await taking
    with pytest.raises(FencedError, match="epoch 2"):
        await stepped(idle, candle(0, 43000))
    await idle.close()
    assert (await owner_of(second.store)).holder == "second", "a fenced session lets go of nothing"
    assert not (await owner_of(second.store)).released
    await session.close()


async def test_a_session_that_is_replaced_while_it_recovers_finds_out_before_it_goes_on(
    two: tuple[Process, Process, Time], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, time = two
    successors = []

    async def slow(*arguments: Any, holder: str, **named: Any) -> Recovered:
        found = await recover(*arguments, holder=holder, **named)
        if holder == "first":
            taking = asyncio.ensure_future(second.session("takeover"))
            await finished(taking, time, within=LEASE_SECONDS / 2)
            assert taking.done(), "it took two signs of life for those of a worker that had looked"
            successors.append(await taking)
        return found

    monkeypatch.setattr("holdfast.engine.session.recover", slow)
    session = await first.session(recover=False)
    with pytest.raises(FencedError, match="epoch 2"):
        await session.recover()
    assert session.owner is None
    await session.close()
    assert (await owner_of(second.store)).holder == "second"
    await successors[0].close()


async def test_a_takeover_outlasts_the_lease_of_a_paused_owner_which_gives_it_up_by_itself_before(
    two: tuple[Process, Process, Time],
) -> None:
    first, second, time = two
    paused = await first.session()
    await first.die()  # no further beat, and no word that it is gone
    began = time.now
    taking = asyncio.ensure_future(second.session("takeover"))
    while first.sign.is_held:
        assert not taking.done()
        await time.pass_by(0.5)
    await finished(taking, time, within=LEASE_SECONDS)
    session = await taking
    assert time.now - began <= 1.1 * LEASE_SECONDS
    await session.close()
    await paused.close()


async def test_a_sign_of_life_counts_only_when_the_owner_rows_were_looked_at_after_it(
    two: tuple[Process, Process, Time], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, time = two
    session = await first.session()

    async def unreachable(*keys: Key) -> Any:
        raise UnavailableError("unreachable: try again")

    with monkeypatch.context() as broken:
        broken.setattr(first.store, "salvage", unreachable)
        await time.pass_by(0.8 * LEASE_SECONDS)
        beats = await first.store.home.backend.read("main.beats", [worker_key("first")])
        assert beats[worker_key("first")].version > 1, "others see that it lives"
        assert not first.sign.is_held, "but it may have been replaced, so nothing irrevocable is done"
    await time.pass_by(LEASE_SECONDS / 4)
    assert first.sign.is_held
    await session.close()


async def test_a_process_of_this_machine_that_is_gone_is_followed_at_once(
    two: tuple[Process, Process, Time], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, time = two
    zombie = await first.session()
    await first.die()
    loaded = await first.store.get(worker_key("first"))
    assert loaded is not None
    gone = msgspec.structs.replace(loaded.row, machine="here", pid=os.getpid(), started=1)
    await first.store.writer("test").commit({worker_key("first"): gone})
    second.sign.watch._machine = "here"
    began = time.now
    session = await second.session()
    assert time.now == began
    await session.close()
    await zombie.close()


async def test_an_outage_of_the_store_is_not_taken_for_the_death_of_a_worker(
    two: tuple[Process, Process, Time], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, time = two
    row = Worker(holder="first", beat=1, lease_seconds=LEASE_SECONDS, host="elsewhere", pid=1, at_ms=0)
    await first.store.writer("test").commit({worker_key("first"): row})
    watch = Watch(second.store, boot_clock=time)
    assert (await watch.look("first"))["first"][0] is Life.UNKNOWN
    time.now += LEASE_SECONDS - 1

    async def unreachable(*keys: Key) -> Any:
        raise UnavailableError("unreachable: try again")

    with monkeypatch.context() as broken, pytest.raises(UnavailableError):
        broken.setattr(second.store, "salvage", unreachable)
        await watch.look("first")
    time.now += 2
    assert (await watch.look("first"))["first"][0] is Life.UNKNOWN, "neither could reach the store"
    time.now += LEASE_SECONDS
    assert (await watch.look("first"))["first"][0] is Life.DEAD


async def test_the_holder_gives_up_its_lease_earlier_than_others_may_take_it(
    two: tuple[Process, Process, Time],
) -> None:
    first, _, time = two
    session = await first.session()
    assert first.sign.is_held
    await first.die()
    time.now += 0.74 * LEASE_SECONDS
    assert first.sign.is_held
    time.now += 0.02 * LEASE_SECONDS
    assert not first.sign.is_held
    await first.sign.leave(session)


async def test_a_lease_that_ran_out_and_was_taken_again_counts_once_a_takeover_decided_meanwhile_is_refused(
    two: tuple[Process, Process, Time], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.engine.background.ACKNOWLEDGE_SECONDS", 0.001)
    first, second, time = two
    session = await first.session()
    seen = await second.store.get(OWNER)
    assert seen is not None
    await first.die()
    time.now += LEASE_SECONDS  # the second one decides now that the first is gone
    assert not session.has_lease
    await first.sign.renew()
    assert first.sign.is_held
    assert not session.has_lease, "the second one's commit may be on its way"
    async with asyncio.timeout(20):
        while not session.has_lease:  # noqa: ASYNC110 -- it writes its owner row by itself
            await asyncio.sleep(0.001)
    late = Owner(holder="second", epoch=2, host="elsewhere", pid=1, since_ms=0)
    with pytest.raises(ConflictError):
        await second.store.writer("test").commit({OWNER: late}, {OWNER: seen.version})
    assert (await owner_of(second.store)).epoch == 1
    assert await stepped(session, candle(0, 43000)) != [], "the owner goes on"
    await session.close()


async def test_a_takeover_that_comes_before_the_owner_row_is_written_anew_ends_the_session_without_the_lease(
    two: tuple[Process, Process, Time],
) -> None:
    first, second, time = two
    session = await first.session()
    await first.die()
    time.now += LEASE_SECONDS
    await first.sign.renew()
    taking = Owner(holder="second", epoch=2, host="elsewhere", pid=1, since_ms=0)
    await second.store.writer("test").commit({OWNER: taking}, {OWNER: 1})
    assert first.sign.is_held
    assert not session.has_lease
    with pytest.raises(FencedError, match="epoch 2"):
        await session.flush()
    await session.close()
    assert (await owner_of(second.store)).holder == "second"


async def test_a_run_ends_with_the_error_that_names_the_new_owner_while_it_waits_for_a_candle(
    two: tuple[Process, Process, Time],
) -> None:
    first, second, time = two
    market = FakeMarket({"BTCUSDT": flat(43000, -10, 0)}, hold=True)
    bot = Bot(market)
    run = bot.run(first.store, lease_seconds=0.5)
    watching = asyncio.ensure_future(anext(run))
    await until(lambda: run._entry.driver.session is not None and run._entry.driver.session.owner is not None)
    taking = asyncio.ensure_future(second.session("takeover"))
    with pytest.raises(FencedError, match="stop trading it"):
        await asyncio.wait_for(watching, 60)
    await finished(taking, time, within=LEASE_SECONDS)
    await (await taking).close()


async def test_a_lease_is_bounded_and_the_same_for_all_runs_on_a_store(two: tuple[Process, Process, Time]) -> None:
    first, _, _ = two
    for lease_seconds in (0.1, 5000.0, float("nan")):
        with pytest.raises(InvalidInputError, match="lease_seconds is"):
            await anext(first.bot.run(first.store, lease_seconds=lease_seconds))
    with pytest.raises(InvalidInputError, match="on_conflict is 'ask': use refuse, wait, takeover"):
        first.bot.run(first.store, on_conflict="ask")


def test_a_process_is_known_by_its_machine_and_its_start() -> None:
    assert machine().count("/") >= 1
    assert (started_ticks(os.getpid()) or 0) > 0
    assert started_ticks(2**22 + 1) is None and is_gone(2**22 + 1, 1)
    assert is_gone(os.getpid(), 1) and not is_gone(os.getpid(), started_ticks(os.getpid()) or 0)


def test_a_lease_is_measured_by_a_clock_that_nobody_sets_and_that_goes_on_while_the_machine_sleeps() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= boot_seconds() <= time.clock_gettime(time.CLOCK_BOOTTIME)
