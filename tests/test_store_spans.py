"""Commits that span backends: whatever fails or dies in between, going on makes the whole come true."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Key, KeyPrefix, Op, Survives
from holdfast.domains import context_key
from holdfast.errors import ConflictError, HoldfastError, InvalidInputError, UnavailableError, UnknownOutcomeError
from holdfast.names import Context
from holdfast.rows import Guard, Row, SessionRow, Signal
from holdfast.spans import mark_key
from holdfast.store import Store

BTC = Context("binance", "BTCUSDT", "st")
SIGNAL, SCHEDULE, SESSION = (context_key(domain, BTC) for domain in ("signal", "schedule", "session"))
GUARD = Key("guard", "r", "guard")
OPEN = Signal(
    id="s-1",
    position="long",
    price_open=2.0,
    price_take_profit=3.0,
    price_stop_loss=1.0,
    minute_estimated_time=60,
    symbol=BTC.symbol,
    exchange_name=BTC.exchange_name,
    strategy_name=BTC.strategy_name,
    scheduled_at=1,
    pending_at=1,
)
CHANGES: dict[Key, Row | None] = {SIGNAL: OPEN, SESSION: SessionRow(context=BTC, last_candle_ms=60_000)}


class PowerLossError(BaseException):
    """Stands for the end of the process."""


class Countdown:
    """Fails the n-th commit over all backends that share it, before or after it is applied."""

    def __init__(self) -> None:
        self.left = -1
        self.error: BaseException = PowerLossError()
        self.applied = False
        self.count = 0

    def arm(self, n: int, error: BaseException, *, applied: bool) -> None:
        self.left, self.error, self.applied, self.count = n, error, applied, 0

    def hit(self) -> bool:
        self.left -= 1
        self.count += 1
        return self.left == -1


class Failing(MemoryBackend):
    def __init__(self, countdown: Countdown) -> None:
        super().__init__()
        self.countdown = countdown

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:
        hit = self.countdown.hit()
        if hit and not self.countdown.applied:
            raise self.countdown.error
        number = await super().commit(scope, changes, expect, op=op)
        if hit:
            raise self.countdown.error
        return number


class Machine:
    """A home backend and one that holds the signals; their data outlive the stores over them."""

    def __init__(self) -> None:
        self.countdown = Countdown()
        self.home, self.signals = Failing(self.countdown), Failing(self.countdown)

    async def start(self, *, read_only: bool = False) -> Store:
        await self.home.close()
        await self.signals.close()
        store = Store(self.home, routes={"signal": self.signals}, require=Survives.NOTHING)
        await store.open(read_only=read_only)
        return store


async def state(store: Store) -> dict[Key, Row]:
    return {key: loaded.row for key, loaded in (await store.load(SIGNAL, SESSION)).items()}


async def test_a_commit_over_two_backends_leaves_only_its_rows_and_the_lanes_mark() -> None:
    machine = Machine()
    store = await machine.start()
    number = await store.writer("x").commit(CHANGES, {SESSION: 0, SIGNAL: 0})
    assert await state(store) == CHANGES and await store.keys() == [SESSION, SIGNAL]
    assert [key async for key in machine.home.keys("main")] == [SESSION]
    assert [key async for key in machine.signals.keys("main")] == [SIGNAL, mark_key("x")]
    loaded = await store.get(SESSION)
    assert loaded is not None and loaded.version == number


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2])
async def test_after_a_death_between_any_two_parts_the_next_open_has_all_or_nothing(at: int, applied: bool) -> None:
    machine = Machine()
    store = await machine.start()
    machine.countdown.arm(at, PowerLossError(), applied=applied)
    with pytest.raises(PowerLossError):
        await store.writer("x").commit(CHANGES, {SESSION: 0})
    for again in range(3):  # and the roll forward may die too
        machine.countdown.arm(again, PowerLossError(), applied=applied)
        try:
            store = await machine.start()
        except PowerLossError:
            continue
        break
    machine.countdown.left = -1
    store = await machine.start()
    assert await state(store) == ({} if at == 0 and not applied else CHANGES)
    assert await store.keys(KeyPrefix("intent")) == []


@pytest.mark.parametrize(
    ("error", "applied"),
    [
        (UnknownOutcomeError("lost"), False),
        (UnknownOutcomeError("lost"), True),
        (UnavailableError("down"), False),
        (ConflictError("late"), False),
    ],
)
@pytest.mark.parametrize("at", [0, 1, 2])
async def test_a_failure_of_any_part_is_finished_by_sending_again(at: int, error: HoldfastError, applied: bool) -> None:
    machine = Machine()
    store = await machine.start()
    writer = store.writer("x")
    machine.countdown.arm(at, error, applied=applied)
    if at == 0 and not isinstance(error, UnknownOutcomeError):
        with pytest.raises(type(error)):
            await writer.commit(CHANGES, {SESSION: 0})
        with pytest.raises(InvalidInputError):
            await writer.resend()
        assert await state(store) == {} and not store.unfinished
        await writer.commit(CHANGES, {SESSION: 0})
    else:
        with pytest.raises(UnknownOutcomeError):
            await writer.commit(CHANGES, {SESSION: 0})
        await writer.resend()
    assert await state(store) == CHANGES and not store.unfinished
    assert await store.keys(KeyPrefix("intent")) == []


async def test_other_lanes_finish_an_unfinished_commit_of_the_same_rows_first() -> None:
    machine = Machine()
    store = await machine.start()
    one, two = store.writer("one"), store.writer("two")
    machine.countdown.arm(1, UnavailableError("signals are down"), applied=False)
    with pytest.raises(UnknownOutcomeError):
        await one.commit({**CHANGES, GUARD: Guard(changes=1)}, {GUARD: 0, SESSION: 0})
    with pytest.raises(ConflictError):  # it passed the guard first, so it wins, although it is not done
        await two.commit({GUARD: Guard(changes=1)}, {GUARD: 0})
    assert await state(store) == CHANGES
    loaded = await store.get(GUARD)
    assert loaded is not None and await one.resend() == loaded.version


async def test_other_rows_are_not_held_up_by_an_unfinished_commit() -> None:
    machine = Machine()
    store = await machine.start()
    machine.countdown.arm(1, UnavailableError("signals are down"), applied=False)
    with pytest.raises(UnknownOutcomeError):
        await store.writer("one").commit(CHANGES, {SESSION: 0})
    assert await store.writer("two").commit({GUARD: Guard(changes=1)}, {GUARD: 0})
    assert SIGNAL not in await store.load(SIGNAL)


async def test_a_guard_on_a_routed_row_is_compared_before_anything_is_decided() -> None:
    machine = Machine()
    store = await machine.start()
    writer = store.writer("x")
    number = await writer.commit(CHANGES, {SESSION: 0, SIGNAL: 0})
    with pytest.raises(ConflictError) as caught:
        await writer.commit({SIGNAL: None, SESSION: None}, {SESSION: number, SIGNAL: 99})
    assert caught.value.keys == (SIGNAL,) and await state(store) == CHANGES
    await writer.commit({SIGNAL: OPEN, SESSION: None}, {SIGNAL: number})  # the number that the commit returned
    loaded = await store.get(SIGNAL)
    assert loaded is not None
    await writer.commit({**CHANGES}, {SIGNAL: loaded.version})  # and the version that a load gives


async def test_a_cancelled_commit_over_two_backends_is_finished_before_the_next() -> None:
    machine = Machine()
    store = await machine.start()
    writer = store.writer("x")
    machine.countdown.arm(1, asyncio.CancelledError(), applied=True)
    with pytest.raises(asyncio.CancelledError):
        await writer.commit(CHANGES, {SESSION: 0})
    await writer.commit({GUARD: Guard(changes=1)}, {GUARD: 0})
    assert await state(store) == CHANGES and not store.unfinished


async def test_a_read_only_open_leaves_an_intent_to_its_owner() -> None:
    machine = Machine()
    store = await machine.start()
    machine.countdown.arm(1, PowerLossError(), applied=False)
    with pytest.raises(PowerLossError):
        await store.writer("x").commit(CHANGES, {SESSION: 0})
    store = await machine.start(read_only=True)
    assert len(await store.keys(KeyPrefix("intent"))) == 1


async def test_a_commit_that_touches_one_backend_needs_no_intent() -> None:
    machine = Machine()
    store = await machine.start()
    writer = store.writer("x")
    machine.countdown.count = 0
    await writer.commit({SIGNAL: OPEN}, {SIGNAL: 0})
    await writer.commit({SESSION: CHANGES[SESSION]}, {SESSION: 0})
    assert machine.countdown.count == 2 and await state(store) == CHANGES


async def test_a_damaged_routed_row_is_kept_at_home_and_removed_where_it_lay() -> None:
    machine = Machine()
    store = await machine.start()
    await machine.signals.commit("main", {SIGNAL: b"half"}, {}, op=Op("vandal", 1))
    assert await store.scan("signal") == {} and store.is_stopped(SIGNAL)
    [kept] = (await store.quarantined("signal", SIGNAL.entity_name)).values()
    assert kept.row.text == "half"
    assert [key async for key in machine.signals.keys("main")] == []


async def test_a_domain_can_be_routed_anew_while_the_store_is_open() -> None:
    machine = Machine()
    store = await machine.start()
    writer = store.writer("x")
    await writer.commit(CHANGES)
    store.route("signal", None, None)
    assert await store.get(SIGNAL) is None
    await writer.commit({SIGNAL: OPEN, SCHEDULE: None}, {SIGNAL: 0})
    assert [key async for key in machine.home.keys("main", KeyPrefix("signal"))] == [SIGNAL]
    other = MemoryBackend()
    store.route("signal", other, await other.open())
    assert await store.get(SIGNAL) is None and "memory" in store.guarantees.backend
