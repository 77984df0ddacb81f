"""A fleet: who should run what, and processes that do, whatever happens to them."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from backend_list import URLS
from fakes import Bot, FakeMarket, flat, memory_store, no_sleep, until
from fleets import Fire, balance

from holdfast.backends.sqlite import SqliteBackend
from holdfast.cli.contexts import read_contexts
from holdfast.domains import context_key, worker_key
from holdfast.engine.emergency import Emergency
from holdfast.engine.fleet import Fleet, assignment, chosen, fingerprint
from holdfast.engine.journals import JournalFolder
from holdfast.engine.live import Live, LiveRun
from holdfast.engine.modes import TroublePolicy
from holdfast.engine.registry import Registry
from holdfast.engine.tenure import Tenure
from holdfast.errors import InvalidInputError, UnavailableError
from holdfast.names import Context
from holdfast.rows import Owner, SessionRow, Worker
from holdfast.store import Store

CONTEXTS = [Context("binance", f"S{n}USDT", "swing") for n in range(200)]
HOLDERS = [f"{random.Random(n).getrandbits(64):016x}" for n in range(8)]


# ---------------------------------------------------------------------- who should run what


def test_whoever_knows_the_same_workers_chooses_the_same_one_in_whatever_order_they_come() -> None:
    for context in CONTEXTS:
        assert chosen(context, HOLDERS) == chosen(context, list(reversed(HOLDERS))) == chosen(context, set(HOLDERS))
    assert chosen(CONTEXTS[0], []) is None
    assert assignment(CONTEXTS, []) == {}
    fixed = chosen(Context("binance", "BTCUSDT", "swing"), ["a", "b", "c", "d"])
    assert fixed == "d", "workers of different versions must agree: this choice never changes"


def test_contexts_are_spread_evenly() -> None:
    many = [Context("binance", f"S{n}", "swing") for n in range(4000)]
    for count in (2, 3, 4, 8):
        least, *_, most = balance(many, HOLDERS[:count])
        assert 0.8 * 4000 / count < least <= most < 1.2 * 4000 / count


@pytest.mark.parametrize("seed", range(20))
def test_a_worker_that_comes_or_goes_moves_nothing_between_the_others(seed: int) -> None:
    chance = random.Random(seed)
    holders = [f"{chance.getrandbits(64):016x}" for _ in range(chance.randint(2, 9))]
    before, one = assignment(CONTEXTS, holders), chance.choice(holders)
    after = assignment(CONTEXTS, [holder for holder in holders if holder != one])
    for context, holder in before.items():
        assert (after[context] != one) if holder == one else (after[context] == holder)
    moved = [after[context] for context, holder in before.items() if holder == one]
    if len(holders) > 3 and len(moved) > 20:
        assert len(set(moved)) > 1, "what one leaves is spread over the others"


def test_a_list_of_contexts_is_known_by_its_members_not_by_their_order() -> None:
    assert fingerprint(CONTEXTS) == fingerprint([*reversed(CONTEXTS), CONTEXTS[0]])
    assert fingerprint(CONTEXTS) != fingerprint(CONTEXTS[1:])
    assert fingerprint([Context("a", "bc", "d")]) != fingerprint([Context("ab", "c", "d")])


# ---------------------------------------------------------------------- the file of contexts


@pytest.fixture
def registry() -> Registry:
    bot = Bot(FakeMarket({"BTCUSDT": flat(43000, -10, 30)}))
    return bot.registry


def test_contexts_are_read_from_lines_and_from_json(tmp_path: Path, registry: Registry) -> None:
    file = tmp_path / "contexts"
    expected = (Context("binance", "BTCUSDT", "my-strategy"), Context("binance", "ETHUSDT", "my-strategy"))
    for text in (
        "# ours\nbinance BTCUSDT my-strategy\n\n  binance\tETHUSDT my-strategy # second\n",
        '[["binance", "BTCUSDT", "my-strategy"], {"exchange": "binance", "symbol": "ETHUSDT", '
        '"strategy": "my-strategy"}]',
    ):
        file.write_text(text)
        assert read_contexts(str(file), registry) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "names no context"),
        ("# nothing\n", "names no context"),
        ("binance BTCUSDT my-strategy\nbinance ETHUSDT\n", "line 2: 'binance ETHUSDT' is no context"),
        ("binance BTCUSDT my-strategy x\n", "line 1: .* is no context: give three names"),
        ("binance A my-strategy\nbinance A my-strategy\n", "line 2: binance/A/my-strategy stands in .*line 1 already"),
        ("\nkraken A my-strategy\n", "line 2: .*kraken"),
        ("binance A other\n", "line 1: .*other"),
        ('[\n["binance", "A", "my-strategy"]\n', "line 3: neither JSON nor"),
        ('[["binance", "A", "my-strategy"], ["binance", 7, "my-strategy"]]', "entry 2: .*is no context"),
        ('[{"exchange": "binance", "symbol": "A", "strategy": "my-strategy", "x": 1}]', "entry 1: 'x' is no member"),
        ('{"exchange": "binance"}', "must be a list"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(text: str, complaint: str, tmp_path: Path, registry: Registry) -> None:
    file = tmp_path / "contexts"
    file.write_text(text)
    with pytest.raises(InvalidInputError, match=complaint):
        read_contexts(str(file), registry)


def test_a_file_that_is_not_there_is_named(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(InvalidInputError, match=r"--contexts .*/none: cannot be read"):
        read_contexts(str(tmp_path / "none"), registry)


# ---------------------------------------------------------------------- one worker


class Ground:
    """A store, a bot on a market that stands still, and workers of this process under different names."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.symbols = [f"S{n}USDT" for n in range(4)]
        self.bot = Bot(FakeMarket({symbol: flat(43000, -10, 0) for symbol in self.symbols}, hold=True))
        self.contexts = [Context("binance", symbol, "my-strategy") for symbol in self.symbols]
        self.told: list[tuple[Context, str]] = []
        self.started: list[Context] = []
        self.fleet = self.worker()

    def worker(self, **more: Any) -> Fleet:
        return Fleet(
            self.store, self.contexts, self.start, lease_seconds=0.5, clock=lambda: 0,
            told=lambda context, what: self.told.append((context, what)), **more,
        )  # fmt: skip

    def start(self, context: Context, **more: Any) -> LiveRun:
        self.started.append(context)
        return Live.run(
            context.symbol, strategy_name=context.strategy_name, exchange_name=context.exchange_name,
            store=self.store, registry=self.bot.registry, listeners=self.bot.listeners, lease_seconds=0.5, **more,
        )  # fmt: skip

    async def put(self, **rows: Any) -> None:
        lane = self.store.writer("test")
        for row in rows.values():
            await lane.commit(row)

    async def owner(self, context: Context) -> Owner | None:
        loaded = await self.store.get(context_key("owner", context))
        if loaded is None:
            return None
        assert isinstance(loaded.row, Owner)
        return loaded.row


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    store = Store(SqliteBackend(tmp_path / "store.db"))
    await store.open()
    yield Ground(store)
    await store.close()


async def eventually(condition: Any, *, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 -- the store tells nobody that it changed
            await asyncio.sleep(0.01)


def other(beat: int, **more: Any) -> dict[Any, Any]:
    row = Worker(holder="other", beat=beat, lease_seconds=0.5, host="elsewhere", pid=1, at_ms=0, **more)
    return {worker_key("other"): row}


async def test_a_worker_alone_runs_everything_and_lets_go_of_it_when_it_is_told_to_leave(ground: Ground) -> None:
    working = asyncio.ensure_future(ground.fleet.work())

    async def all_owned() -> bool:
        return all([await ground.owner(context) for context in ground.contexts])

    await eventually(all_owned)
    assert sorted(ground.fleet.running) == sorted(ground.contexts)
    ground.fleet.leave()
    await asyncio.wait_for(working, 20)
    for context in ground.contexts:
        owner = await ground.owner(context)
        assert owner is not None
        assert owner.released
    assert await ground.store.keys() != []
    assert [key for key in await ground.store.keys() if key.domain == "worker"] == []
    assert ground.bot.errors == []


async def test_what_another_living_worker_should_run_is_left_to_it_until_it_says_that_it_leaves(
    ground: Ground,
) -> None:
    beat, leaving = 0, False

    async def living() -> None:
        nonlocal beat
        while True:
            beat += 1
            await ground.put(row=other(beat, fleet=fingerprint(ground.contexts), leaving=leaving))
            await asyncio.sleep(0.05)

    await ground.put(row=other(0, fleet=fingerprint(ground.contexts)))
    beating = asyncio.ensure_future(living())
    should = assignment(ground.contexts, ["other", ground.fleet._sign.holder])
    ours = {context for context, holder in should.items() if holder != "other"}
    working = asyncio.ensure_future(ground.fleet.work())
    try:
        await asyncio.sleep(0.6)  # more than a lease: long enough to take what it should not
        assert set(ground.started) == ours
        leaving = True

        async def all_started() -> bool:
            return set(ground.started) == set(ground.contexts)

        await eventually(all_started)
    finally:
        beating.cancel()
        ground.fleet.leave()
        await asyncio.wait_for(working, 20)


async def test_what_could_not_be_released_when_it_was_handed_over_is_released_later_though_its_worker_lives(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, refused = Tenure.release, 0

    async def release(tenure: Tenure) -> None:
        nonlocal refused
        if ground.fleet._leaving.is_set():
            await really(tenure)
            return
        refused += 1
        raise UnavailableError("the store is away: nothing was written")

    monkeypatch.setattr(Tenure, "release", release)
    working = asyncio.ensure_future(ground.fleet.work())

    async def all_owned() -> bool:
        return all([await ground.owner(context) for context in ground.contexts])

    async def living() -> None:
        for beat in itertools.count():
            await ground.put(row=other(beat, fleet=fingerprint(ground.contexts)))
            await asyncio.sleep(0.05)

    await eventually(all_owned)
    should = assignment(ground.contexts, ["other", ground.fleet._sign.holder])
    theirs = [context for context, holder in should.items() if holder == "other"]
    beating = asyncio.ensure_future(living())

    async def all_released() -> bool:
        owners = [await ground.owner(context) for context in theirs]
        return all(owner is not None and owner.released for owner in owners)

    try:
        await eventually(all_released)
        assert refused == len(theirs) > 0
        assert not set(ground.fleet.running) & set(theirs)
    finally:
        beating.cancel()
        ground.fleet.leave()
        await asyncio.wait_for(working, 20)


async def test_a_living_owner_of_another_fleet_keeps_what_it_owns_and_a_dead_one_is_followed_and_buried(
    ground: Ground,
) -> None:
    owned = context_key("owner", ground.contexts[0])
    owner = Owner(holder="other", epoch=5, host="elsewhere", pid=1, since_ms=0)
    await ground.put(first={owned: owner}, second=other(0))
    lives, beat = True, 0

    async def living() -> None:
        nonlocal beat
        while lives:
            beat += 1
            await ground.put(row=other(beat))
            await asyncio.sleep(0.05)

    beating = asyncio.ensure_future(living())
    working = asyncio.ensure_future(ground.fleet.work())
    try:
        await asyncio.sleep(0.7)
        assert ground.contexts[0] not in ground.started
        assert set(ground.started) == set(ground.contexts[1:])
        lives = False
        await beating

        async def taken() -> bool:
            found = await ground.owner(ground.contexts[0])
            return found is not None and found.epoch == 6

        await eventually(taken)
        assert (ground.contexts[0], "taken over from process 1 on elsewhere") in ground.told

        async def buried() -> bool:
            return await ground.store.get(worker_key("other")) is None

        await eventually(buried)
    finally:
        ground.fleet.leave()
        await asyncio.wait_for(working, 20)


async def test_a_context_that_cannot_be_run_is_told_of_and_tried_again_later_while_the_others_go_on(
    ground: Ground,
) -> None:
    really, tries = ground.start, 0

    def start(context: Context) -> LiveRun:
        nonlocal tries
        if context == ground.contexts[1] and (tries := tries + 1) < 3:
            raise UnavailableError("its exchange is away: try again")
        return really(context)

    fleet = Fleet(
        ground.store, ground.contexts, start, lease_seconds=0.5, clock=lambda: 0,
        told=lambda context, what: ground.told.append((context, what)),
    )  # fmt: skip
    working = asyncio.ensure_future(fleet.work())

    async def all_running() -> bool:
        return set(fleet.running) == set(ground.contexts)

    try:
        await eventually(all_running)
        assert ground.told.count((ground.contexts[1], "ended: its exchange is away: try again")) == 2
    finally:
        fleet.leave()
        await asyncio.wait_for(working, 20)


async def test_what_fails_again_and_again_rests_longer_each_time_and_what_went_on_for_long_does_not(
    ground: Ground,
) -> None:
    now, fleet, context = 100.0, ground.fleet, ground.contexts[0]
    fleet._sign.watch.boot_clock = lambda: now

    def rest_leases(after_leases: float) -> float:
        nonlocal now
        now += after_leases * 0.5
        fleet._failed(context, UnavailableError("the store is away: try again"))
        rest = fleet._rests[context]
        leases, now = (rest.until_seconds - now) / 0.5, rest.until_seconds
        return leases

    assert [rest_leases(0.5) for _ in range(5)] == [1, 2, 4, 8, 16]
    assert rest_leases(15.0) == 32, "it did not last"
    assert rest_leases(33.0) == 1
    assert rest_leases(0.5) == 2


async def test_what_an_ended_worker_left_in_its_journal_is_merged_when_its_context_is_taken_over(
    ground: Ground, tmp_path: Path
) -> None:
    folder, bounds = JournalFolder(str(tmp_path / "journals")), TroublePolicy(emergency_bytes=64 * 1024)
    context = ground.contexts[0]
    left = Emergency(ground.store, TroublePolicy(emergency=str(folder.path / "worker-7"), emergency_bytes=64 * 1024))
    await left.open()
    names = (context.exchange_name, context.symbol, context.strategy_name)
    key, row = context_key("session", context), SessionRow(context=names, last_candle_ms=60_000, last_event=77)
    await left.keep(context, None, {key: row}, epoch=1)
    await left.close()
    policy = await folder.claim(ground.store, bounds)
    fleet = Fleet(
        ground.store, ground.contexts, lambda context: ground.start(context, on_trouble=policy), lease_seconds=0.5,
        clock=lambda: 0, listeners=ground.bot.listeners, on_trouble=policy, folder=folder,
    )  # fmt: skip
    working = asyncio.ensure_future(fleet.work())

    async def merged() -> bool:
        loaded = await ground.store.get(key)
        return loaded is not None and isinstance(loaded.row, SessionRow) and loaded.row.last_event >= 77

    try:
        await eventually(merged)
    finally:
        fleet.leave()
        await asyncio.wait_for(working, 20)
    await left.open()
    assert left.contexts == []
    await left.close()


async def test_a_worker_ends_when_every_market_has_ended(ground: Ground) -> None:
    ground.bot.market.finish()
    await asyncio.wait_for(ground.fleet.work(), 20)
    assert ground.fleet.ended == set(ground.contexts)


async def test_a_run_that_is_left_ends_between_two_candles_with_its_position_stored_and_the_context_released(
    ground: Ground,
) -> None:
    run = ground.start(ground.contexts[0])
    reading = asyncio.ensure_future(anext(run, None))
    await until(lambda: run._entry.driver.session is not None and run._entry.driver.session.owner is not None)
    run.leave()
    assert await asyncio.wait_for(reading, 20) is None
    owner = await ground.owner(ground.contexts[0])
    assert owner is not None
    assert owner.released


async def test_a_store_that_belongs_to_one_process_is_refused_for_a_fleet() -> None:
    store = await memory_store()
    with pytest.raises(InvalidInputError, match="belongs to one process: a fleet needs"):
        Fleet(store, CONTEXTS, lambda context: None, lease_seconds=20, clock=lambda: 0, sleep=no_sleep)  # type: ignore[arg-type, return-value]
    await store.close()


# ---------------------------------------------------------------------- many processes


@pytest.mark.parametrize(("name", "blows"), [("sqlite", ("kill", "leave")), ("redis", ("pause", "kill"))])
def test_workers_are_killed_paused_and_told_to_leave_and_each_context_has_one_owner_at_a_time(
    name: str, blows: tuple[str, ...], tmp_path: Path, record_property: Any
) -> None:
    fire = Fire(
        URLS[name](tmp_path), tmp_path, workers=3, contexts=12, lease_seconds=1.5, minute_seconds=0.25, seed=len(name)
    )
    found = fire.run(10.0, (1.0, 2.0), blows)
    assert found.wrong == []
    assert found.kills + found.pauses >= 1
    assert found.takeovers + found.handovers > 0
    assert found.trades > 12
    # Twice the lease; and a second for the other tests, or as long as a busy machine keeps four steps of it waiting.
    assert found.slowest_takeover_leases <= 2 + max(1.0, 4 * found.late_seconds) / 1.5
    record_property(
        "proof:fleet",
        {
            "workers killed": found.kills, "paused": found.pauses, "told to leave": found.leaves,
            "contexts taken over": found.takeovers, "contexts handed over": found.handovers, "trades": found.trades,
        },
    )  # fmt: skip
