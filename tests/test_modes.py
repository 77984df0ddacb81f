"""Modes: what may be done while the store is slow, full or lost, told to whoever listens, and forgotten slowly."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from emergency_kit import policy_of
from fakes import Bot, FakeMarket, candle, flat, memory_store, minute_ms, proposal, session_of, sound, stepped, until

from holdfast.backends.memory import MemoryBackend
from holdfast.cli.screen import Board, PlainScreen
from holdfast.contract import KeyPrefix, Survives
from holdfast.domains import context_key
from holdfast.engine.health import Health, health_of
from holdfast.engine.listeners import ModeChange, Trouble
from holdfast.engine.live import AtRisk, Live
from holdfast.engine.modes import Facts, Mode, TroublePolicy, is_full, judge
from holdfast.engine.session import Session
from holdfast.errors import FencedError, InvalidInputError, UnavailableError
from holdfast.names import Context
from holdfast.rows import Outage
from holdfast.store import Store
from holdfast.testing.faults import Fault, FaultyBackend

POLICY = TroublePolicy()


# ---------------------------------------------------------------------- the rules alone


@pytest.mark.parametrize(
    ("facts", "mode"),
    [
        (Facts(), Mode.NORMAL),
        (Facts(refusals=1), Mode.NORMAL),
        (Facts(refusals=2), Mode.NO_ENTRIES),
        (Facts(refusals=4), Mode.CLOSE_ONLY),
        (Facts(refusals=1, is_full=True), Mode.CLOSE_ONLY),
        (Facts(latency_seconds=4.9), Mode.NORMAL),
        (Facts(latency_seconds=5.0), Mode.NO_ENTRIES),
        (Facts(waiting_seconds=5.0), Mode.NO_ENTRIES),
        (Facts(waiting_seconds=15.0), Mode.CLOSE_ONLY),
        (Facts(refusals=4, can_exit=False), Mode.HALT),
        (Facts(refusals=2, can_exit=False), Mode.NO_ENTRIES),
        (Facts(can_exit=False), Mode.NORMAL),
    ],
)
def test_the_mode_follows_from_how_the_store_answers(facts: Facts, mode: Mode) -> None:
    found, why = judge(Mode.NORMAL, facts, POLICY)
    assert found is mode
    assert bool(why) == (mode is not Mode.NORMAL)


def test_it_gets_worse_at_once_and_better_only_after_quick_commits_in_a_row() -> None:
    for before in (Mode.NO_ENTRIES, Mode.CLOSE_ONLY):
        assert judge(before, Facts(quick_commits=1), POLICY)[0] is before
        assert judge(before, Facts(quick_commits=2), POLICY)[0] is Mode.NORMAL
        assert judge(before, Facts(is_full=True), POLICY)[0] is Mode.CLOSE_ONLY
        assert judge(before, Facts(quick_commits=7, relapses=2), POLICY)[0] is before
        assert judge(before, Facts(quick_commits=8, relapses=2), POLICY)[0] is Mode.NORMAL
        assert judge(before, Facts(quick_commits=64, relapses=99), POLICY)[0] is Mode.NORMAL
    assert judge(Mode.HALT, Facts(quick_commits=1), POLICY)[0] is Mode.CLOSE_ONLY, "there is a way out again"
    assert judge(Mode.HALT, Facts(quick_commits=1, can_exit=False), POLICY)[0] is Mode.HALT


def test_worse_facts_never_allow_more(record_property: Any) -> None:
    seconds, counts, truths = (0.0, 4.0, 6.0, 20.0), (0, 1, 2, 4, 9), (False, True)
    compared = 0
    grid = list(itertools.product(seconds, seconds, counts, truths, (2, 1, 0), (True, False)))
    for before in Mode:
        judged = {
            at: judge(
                before,
                Facts(latency_seconds=at[0], waiting_seconds=at[1], refusals=at[2], is_full=at[3], quick_commits=at[4],
                      can_exit=at[5]),
                POLICY,
            )[0]
            for at in grid
        }  # fmt: skip
        for at in grid:
            for axis, worse in (
                (0, seconds),
                (1, seconds),
                (2, counts),
                (3, truths),
                (4, (2, 1, 0)),
                (5, (True, False)),
            ):
                follows = worse.index(at[axis]) + 1
                if follows < len(worse):
                    next_worse: Any = (*at[:axis], worse[follows], *at[axis + 1 :])
                    assert judged[next_worse] >= judged[at], (before, at, next_worse)
                    compared += 1
    record_property("proof:modes", {"pairs of facts compared": compared})


@pytest.mark.parametrize(
    "values",
    [
        {"slow_seconds": 0}, {"slow_seconds": float("nan")}, {"lost_seconds": 1.0}, {"lost_refusals": 1},
        {"refusals": 0},
        {"calm_commits": 0}, {"patience_seconds": -1.0}, {"emergency": ""}, {"emergency_bytes": 10},
        {"slow_seconds": "5"},
    ],
)  # fmt: skip
def test_a_policy_that_makes_no_sense_is_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(values)) if "lost" not in str(values) else "lost"):
        TroublePolicy(**values)


def test_a_full_store_is_known_by_the_cause_of_its_refusal() -> None:
    full = UnavailableError("nothing was written")
    full.__cause__ = UnavailableError("inner")
    full.__cause__.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    broken = UnavailableError("nothing was written")
    broken.__cause__ = OSError(errno.EIO, os.strerror(errno.EIO))
    assert is_full(full)
    assert not is_full(broken)
    assert not is_full(UnavailableError("cut off"))


# ---------------------------------------------------------------------- sessions


@pytest.fixture
async def faulty() -> AsyncIterator[tuple[Store, FaultyBackend]]:
    backend = FaultyBackend(MemoryBackend())
    store = await memory_store(backend)
    yield store, backend
    await store.close()


def fail_from_now(backend: FaultyBackend, count: int) -> None:
    """Refuse the next ``count`` commits."""
    done = backend.calls["commit"]
    backend.faults = [Fault(done + n, "unavailable") for n in range(1, count + 1)]


def a_bot(**signals: Any) -> Bot:
    return Bot(FakeMarket({"BTCUSDT": flat(43000, -10, 30)}), lambda symbol, when: proposal())


def judged(session: Session) -> Mode:
    """Return the mode now; a type checker must not think that it knows."""
    return session.health.mode


async def forbidden(store: Store) -> list[tuple[int, int]]:
    keys = await store.keys(KeyPrefix("outage"))
    rows = [loaded.row for loaded in (await store.load(*keys)).values()]
    return [
        ((row.from_ms - minute_ms(0)) // 60_000, (row.to_ms - minute_ms(0)) // 60_000)
        for row in rows if isinstance(row, Outage) and row.from_ms
    ]  # fmt: skip


async def test_a_store_that_refuses_again_and_again_ends_entries_until_it_has_been_quick_again(
    faulty: tuple[Store, FaultyBackend],
) -> None:
    store, backend = faulty
    mine = a_bot()
    heard: list[ModeChange] = []
    mine.listeners.listen("mode", heard.append)
    session = await session_of(mine, store)
    fail_from_now(backend, 2)
    assert await stepped(session, candle(0, 43000), candle(1, 43000)) == []
    assert session.health.mode is Mode.NO_ENTRIES
    told = await stepped(session, candle(2, 43000))
    assert told == [], "the store would take it, but it has only begun to answer"
    asked = len(mine.asked)
    await session.flush()
    assert session.health.mode is Mode.NO_ENTRIES
    assert await stepped(session, candle(3, 43000)) == []
    assert len(mine.asked) == asked, "a strategy is not even asked"
    await session.flush()
    assert judged(session) is Mode.NORMAL
    (opened,) = await stepped(session, candle(4, 43000))
    assert opened.kind == "opened"
    await session.close()
    assert [(change.before, change.after) for change in heard] == [("NORMAL", "NO_ENTRIES"), ("NO_ENTRIES", "NORMAL")]
    assert await forbidden(store) == [(0, 3)]
    await sound(store)


async def test_one_contexts_refused_commits_end_the_entries_of_all_on_the_store(
    faulty: tuple[Store, FaultyBackend],
) -> None:
    store, backend = faulty
    troubled, idle = await session_of(a_bot(), store), None
    other = Bot(FakeMarket({"BTCUSDT": flat(43000, -10, 30)}), {2: proposal()}, strategy="other")
    idle = await session_of(other, store)
    assert idle.step(candle(0, 43000)) is None
    assert idle.gate.may_enter(minute_ms(1))
    fail_from_now(backend, 9)
    await stepped(troubled, candle(0, 43000), candle(1, 43000))
    assert not idle.gate.may_enter(minute_ms(1))
    assert await stepped(idle, candle(1, 43000)) == []
    assert other.asked == [1]
    backend.faults = []
    for session in (troubled, idle):
        await session.close()


async def test_exits_are_committed_as_ever_while_nothing_may_begin(faulty: tuple[Store, FaultyBackend]) -> None:
    store, backend = faulty
    session = await session_of(a_bot(), store)
    await stepped(session, candle(0, 43000))
    fail_from_now(backend, 2)
    for _ in range(2):
        with pytest.raises(UnavailableError):
            await session.flush()
    assert session.health.mode is Mode.NO_ENTRIES
    (closed,) = await stepped(session, candle(1, 43000, high=44000))
    assert closed.kind == "closed"
    await session.close()
    await sound(store)


async def test_a_commit_that_hangs_ends_entries_before_it_ends(faulty: tuple[Store, FaultyBackend]) -> None:
    store, backend = faulty
    policy = TroublePolicy(slow_seconds=0.05, lost_seconds=0.2)
    health = Health(store, policy)
    mine = a_bot()
    heard: list[str] = []
    halted = asyncio.Event()

    def hear(change: ModeChange) -> None:
        heard.append(change.after)
        if change.after == "HALT":
            halted.set()

    mine.listeners.listen("mode", hear)
    session = await session_of(mine, store, health=health)
    backend.faults = [Fault(backend.calls["commit"] + 1, "delay")]
    outcome = session.step(candle(0, 43000))
    assert outcome is not None
    hanging = asyncio.ensure_future(outcome)
    await asyncio.wait_for(halted.wait(), 10)
    assert heard == ["NO_ENTRIES", "HALT"], "there is no journal, so nothing can be sent while the store is lost"
    backend.go_on.set()
    await hanging
    await session.close()
    assert session.health.mode is not Mode.NORMAL


async def test_runs_on_one_store_have_one_policy(faulty: tuple[Store, FaultyBackend]) -> None:
    store, _ = faulty
    session = await session_of(a_bot(), store)
    with pytest.raises(InvalidInputError, match="on_trouble"):
        health_of(store, TroublePolicy(refusals=3))
    assert health_of(store) is session.health
    await session.close()
    assert health_of(store, TroublePolicy(refusals=3)).policy.refusals == 3


async def test_somebody_is_told_of_quarantine_and_of_a_takeover() -> None:
    backend = MemoryBackend()
    store, other = await memory_store(backend), Store(backend, require=Survives.NOTHING)
    other._guarantees, other._parts = store._guarantees, store._parts  # a second view of the same place
    mine = a_bot()
    heard: list[Trouble] = []
    mine.listeners.listen("trouble", heard.append)
    session: Session = await session_of(mine, store)
    await stepped(session, candle(0, 43000))
    taken = await session_of(a_bot(), other, holder="other")
    with pytest.raises(Exception, match="epoch 2"):
        await stepped(session, candle(1, 43000, high=44000))
    await session.close()
    assert [(trouble.kind, trouble.context) for trouble in heard] == [("fenced", mine.context)]
    await taken.close()

    await store.quarantine(context_key("signal", mine.context), "a test says so")
    session = await session_of(mine, store)
    await session.close()
    assert [trouble.kind for trouble in heard] == ["fenced", "quarantine"]
    assert "a test says so" in heard[-1].why
    await store.close()


@pytest.mark.parametrize("how", ["raises", "hangs"])
async def test_a_hook_that_raises_or_hangs_stops_neither_exits_nor_the_end_of_the_run(
    faulty: tuple[Store, FaultyBackend], how: str, tmp_path: Path
) -> None:
    store, backend = faulty
    mine = a_bot()
    heard: list[str] = []

    async def hook(news: Any) -> None:
        heard.append(type(news).__name__)
        if how == "raises":
            raise ValueError("a fault of the user's")
        await asyncio.Event().wait()

    mine.listeners.listen("mode", hook)
    mine.listeners.listen("trouble", hook)
    health = Health(store, policy_of(tmp_path / "emergency"), hook_seconds=0.05)
    session = await session_of(mine, store, health=health)
    await stepped(session, candle(0, 43000))
    fail_from_now(backend, 9)
    for _ in range(4):
        with pytest.raises(UnavailableError):
            await session.note({context_key("partial", mine.context): None})
    (closed,) = await stepped(session, candle(1, 43000, high=44000))
    assert closed.kind == "closed"
    backend.faults = []
    await asyncio.wait_for(session.close(), 60)
    if how == "hangs":
        assert heard == ["ModeChange", "Trouble"], "it is not called again before it has returned"
    else:
        assert heard[:3] == ["ModeChange", "ModeChange", "Trouble"], "each was told, whatever became of the one before"
        assert {failure.where for failure in mine.errors} >= {"listener mode", "listener trouble"}
    await sound(store)


async def test_a_takeover_that_only_the_background_notices_ends_the_run_without_waiting_for_a_candle() -> None:
    backend = MemoryBackend()
    store, other = await memory_store(backend), Store(backend, require=Survives.NOTHING)
    other._guarantees, other._parts = store._guarantees, store._parts  # a second view of the same place
    mine = Bot(FakeMarket({"BTCUSDT": flat(43000, -10, 2)}, hold=True), {1: proposal()})
    told: list[str] = []

    async def drain() -> None:
        async for event in run:
            told.append(event.kind)  # noqa: PERF401 -- the test looks at it meanwhile

    run = mine.run(store)
    running = asyncio.create_task(drain())
    await until(lambda: told and mine.market.waiting.is_set())
    session = run._entry.driver.session
    assert session is not None
    taken = await session_of(a_bot(), other, holder="other")
    session.gate.forbid(minute_ms(2), minute_ms(2))  # something to put on record
    session.writer.background.start()
    with pytest.raises(FencedError, match="epoch 2"):
        await asyncio.wait_for(running, 30)
    await taken.close()
    await store.close()


async def test_what_is_at_risk_is_shown_with_the_mode_and_the_age_of_the_last_commit(
    faulty: tuple[Store, FaultyBackend],
) -> None:
    store, backend = faulty
    mine = Bot(FakeMarket({"BTCUSDT": flat(43000, -10, 5)}, hold=True), {1: proposal(quantity=2)})
    events = mine.run(store)
    opened = await anext(events)
    (line,) = [one for one in Live.status() if one.context == mine.context]
    assert (line.mode, line.why, line.unsaved) == ("NORMAL", "", 0)
    assert (line.signal_id, line.position, line.quantity, line.price) == (opened.signal.id, "long", 2, 43000)
    assert line.notional == 86000
    assert line.commit_age_seconds is not None and 0 <= line.commit_age_seconds < 30
    session = events._entry.driver.session
    assert session is not None
    fail_from_now(backend, 2)
    for _ in range(2):
        with pytest.raises(UnavailableError):
            await session.note({context_key("partial", mine.context): None})
    board = Board([mine.context], "a run")
    board.at_risk = lambda: [one for one in Live.status() if one.context == mine.context]
    assert "86000" in board.footer()
    assert "NO_ENTRIES: 2 commits in a row were refused" in board.footer()
    backend.faults = []
    await events.aclose()
    assert [one for one in Live.status() if one.context == mine.context] == []


@pytest.mark.parametrize("as_json", [False, True])
def test_a_run_without_a_table_says_what_is_at_risk_at_each_change_of_mode_and_while_trouble_lasts(
    as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context("binance", "BTCUSDT", "my-strategy")
    line = AtRisk(
        context=context, mode="CLOSE_ONLY", why="the store is full", commit_age_seconds=3.0, unsaved=1,
        signal_id="s", position="long", quantity=2.0, price=43000.0, notional=86000.0,
    )  # fmt: skip
    now = [1000.0]
    monkeypatch.setattr("holdfast.cli.screen.time.monotonic", lambda: now[0])
    board = Board([context], "a run")
    board.at_risk = lambda: [line]
    screen = PlainScreen(board, json=as_json)
    capsys.readouterr()
    said = []
    for _ in range(2):  # the second one within the minute in which a failure is not repeated
        screen.tell_mode(ModeChange(before="NORMAL", after="CLOSE_ONLY", why="the store is full"))
        said.append("".join(capsys.readouterr()))
    assert said[0] == said[1]
    screen.redraw()
    assert "".join(capsys.readouterr()) == "", "not twice in one breath"
    now[0] += 20
    screen.redraw()
    said.append("".join(capsys.readouterr()))
    screen.tell_trouble(Trouble(kind="emergency", context=context, why="look"))
    told = "".join(capsys.readouterr())
    if as_json:
        stake = {"open": 1, "notional": 86000.0, "commitAgeSeconds": None, "unsaved": 1}
        change = {"before": "NORMAL", "after": "CLOSE_ONLY", "why": "the store is full"}
        assert json.loads(said[0]) == {"mode": change | stake}
        assert json.loads(said[2]) == {"status": stake}
        assert json.loads(told) == {"trouble": {"kind": "emergency", "context": str(context), "why": "look"}}
    else:
        for one in said:
            assert "86000 at risk" in one
            assert one.count("CLOSE_ONLY: the store is full") == 1
            assert "1 in the emergency journal" in one
        assert "emergency, binance/BTCUSDT/my-strategy: look" in told
    board.at_risk = list
    now[0] += 20
    screen.redraw()
    assert "".join(capsys.readouterr()) == ""
