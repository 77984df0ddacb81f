"""One context: decide, persist, then act; refused, unsure or fenced, memory and store agree."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import msgspec
import pytest
from fakes import (
    Bot,
    FakeMarket,
    candle,
    flat,
    memory_store,
    minute_ms,
    proposal,
    put,
    session_of,
    signal_row,
    sound,
    stepped,
    until,
)
from test_invariants import event

import holdfast.engine.background
from holdfast.contract import Key
from holdfast.domains import context_key, event_key, guard_key, ledger_key, risk_key
from holdfast.engine.listeners import Failure
from holdfast.engine.outbox import trade_of
from holdfast.engine.reconcile import session_row, slot_of
from holdfast.engine.session import Session
from holdfast.errors import FailedError, FencedError, UnavailableError, UnknownOutcomeError
from holdfast.names import Context
from holdfast.rows import Event, Guard, Levels, Outage, Owner, PartialLevels, RiskPosition, SessionRow
from holdfast.rules.params import Params
from holdfast.rules.signals import State
from holdfast.store import Store

CONTEXT = Context("binance", "BTCUSDT", "my-strategy")
ETH = Context("binance", "ETHUSDT", "my-strategy")
FREE = [lambda payload: payload.active_position_count < 1]


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    made = await memory_store()
    yield made
    if made.is_open:
        await made.close()


def bot(signals: Any = None, **more: Any) -> Bot:
    return Bot(FakeMarket({"BTCUSDT": flat(43000, -10, 0)}), signals, **more)


class Faults:
    """Makes the commits of a store fail on demand."""

    def __init__(self, store: Store) -> None:
        self.backend: Any = store.home.backend
        self.commit = self.backend.commit
        self.before: list[BaseException] = []
        """Raised instead of the next commits."""
        self.after: list[BaseException] = []
        """Raised after the next commits were made."""
        self.made: list[dict[Key, Any]] = []
        self.meanwhile: list[Any] = []
        """Awaited before the next commits, one each."""
        vars(self.backend)["commit"] = self

    async def __call__(self, scope: str, changes: Any, expect: Any, *, op: Any) -> int:
        if self.meanwhile:
            await self.meanwhile.pop(0)()
        if self.before:
            raise self.before.pop(0)
        number = int(await self.commit(scope, changes, expect, op=op))
        self.made.append(dict(changes))
        if self.after:
            raise self.after.pop(0)
        return number


async def outages(store: Store) -> list[tuple[int, int]]:
    rows = (cast("Outage", loaded.row) for loaded in (await store.scan("outage")).values())
    return [((row.from_ms - minute_ms(0)) // 60000, (row.to_ms - minute_ms(0)) // 60000) for row in rows if row.from_ms]


async def test_an_unchanged_tick_returns_none_and_calls_no_storage(store: Store) -> None:
    session = await session_of(bot({}), store)
    calls: list[str] = []
    backend: Any = store.home.backend
    for name in ("read", "commit", "head"):
        setattr(backend, name, lambda *args, **named: calls.append("called"))
    assert [session.step(candle(minute, 43000)) for minute in range(20)] == [None] * 20
    assert calls == []
    for name in ("read", "commit", "head"):
        delattr(backend, name)
    await session.close()


async def test_an_open_commits_all_its_rows_at_once_and_memory_follows(store: Store) -> None:
    session = await session_of(bot({1: proposal()}, risk=FREE), store)
    faults, seen = Faults(store), []

    async def look() -> None:
        seen.append(session.state.signal)

    faults.meanwhile = [look]
    outcome = session.step(candle(0, 43000))
    assert outcome is not None
    await outcome
    assert seen == [None]
    assert session.state.signal is not None
    (rows,) = faults.made
    assert set(rows) == {
        context_key("signal", CONTEXT), context_key("session", CONTEXT), risk_key("limit", CONTEXT),
        guard_key("limit"), event_key(CONTEXT, 1),
    }  # fmt: skip
    await session.close()
    await sound(store)


async def test_what_is_told_is_stored_already_and_writes_are_told_in_order(store: Store) -> None:
    stored: list[tuple[str, bool]] = []

    async def look(name: str) -> None:
        stored.append((name, await store.get(context_key("signal", CONTEXT)) is not None))

    callbacks = {
        "on_write": lambda symbol, row: look("row" if row else "none"),
        "on_open": lambda event: look("open"),
        "on_close": lambda event: look("close"),
    }
    session = await session_of(bot({1: proposal()}, callbacks=callbacks), store)
    await stepped(session, candle(0, 43000), candle(1, 43000, high=44000))
    assert stored == [("row", True), ("open", True), ("close", False), ("none", False)]
    await session.close()


async def test_a_store_that_was_away_delays_an_exit_but_it_is_found_at_its_candle(store: Store) -> None:
    mine = bot({1: proposal()})
    session = await session_of(mine, store)
    await stepped(session, candle(0, 43000))
    Faults(store).before = [UnavailableError("full")] * 3
    assert await stepped(session, candle(1, 43000, high=44000), candle(2, 43000), candle(3, 43000)) == []
    assert session.is_behind and session.state.signal is not None
    assert {failure.where for failure in mine.errors} == {"store"}
    (closed,) = await stepped(session, candle(4, 43000))
    assert (closed.kind, closed.candle_ms) == ("closed", minute_ms(1))
    assert not session.is_behind
    await session.close()
    await sound(store)
    assert await outages(store) == [(1, 4)]  # refused so often the store was in NO_ENTRIES when it answered again


async def test_an_entry_that_could_not_be_stored_is_not_made_up_for_later(store: Store) -> None:
    session = await session_of(bot({1: proposal(id="lost"), 3: proposal(id="made")}), store)
    Faults(store).before = [UnavailableError("full")]
    assert await stepped(session, candle(0, 43000), candle(1, 43000)) == []
    (opened,) = await stepped(session, candle(2, 43000))
    assert opened.signal.id == "made"
    assert await outages(store) == [(0, 0)]
    await session.close()


@pytest.mark.parametrize("applied", [True, False])
async def test_a_lost_answer_opens_one_position(store: Store, applied: bool) -> None:
    session = await session_of(bot({1: proposal()}, risk=FREE), store)
    faults = Faults(store)
    lost: list[BaseException] = [UnknownOutcomeError("lost"), UnknownOutcomeError("lost")]
    if applied:
        faults.after = lost
    else:
        faults.before = lost
    assert [event.kind for event in await stepped(session, candle(0, 43000))] == ["opened"]
    await session.close()
    await sound(store)


async def test_an_outcome_that_stays_unknown_stops_the_session_and_the_next_one_finds_out(store: Store) -> None:
    mine = bot({1: proposal()})
    session = await session_of(mine, store)
    Faults(store).after = [UnknownOutcomeError("lost")] * 20
    with pytest.raises(FailedError, match="still unknown"):
        await stepped(session, candle(0, 43000))
    with pytest.raises(FailedError):
        await stepped(session, candle(1, 43000))
    await session.close()
    del cast("Any", store.home.backend).commit
    again = await session_of(mine, store)
    assert again.state.signal is not None
    assert [event.kind for event in await again.deliver()] == ["opened"]
    await again.close()


async def test_a_second_owner_fences_the_first_at_its_next_commit(store: Store) -> None:
    first = await session_of(bot({1: proposal(), 3: proposal()}), store, holder="a")
    second = await session_of(bot({}), store, holder="b")
    assert first.step(candle(1, 43000)) is None
    with pytest.raises(FencedError, match="stop trading"):
        await stepped(first, candle(2, 43000))
    with pytest.raises(FencedError):
        await stepped(first, candle(3, 43000))
    assert first.state.signal is None
    assert await second.deliver() == []
    await first.close()
    await second.close()
    assert await store.get(context_key("signal", CONTEXT)) is None


async def test_the_same_owner_row_under_another_version_is_adopted(store: Store) -> None:
    session = await session_of(bot({1: proposal()}), store)
    for key in (context_key("owner", CONTEXT), context_key("session", CONTEXT)):
        loaded = await store.get(key)
        assert loaded is not None
        await put(store, {key: loaded.row})
    assert len(await stepped(session, candle(0, 43000))) == 1
    await session.close()


@pytest.mark.parametrize("domain", ["session", "owner"])
async def test_a_foreign_hand_on_the_rows_of_a_session_fences_it(store: Store, domain: str) -> None:
    session = await session_of(bot({1: proposal()}), store)
    row: Any = SessionRow(context=("binance", "BTCUSDT", "my-strategy"), last_candle_ms=5)
    await put(store, {context_key(domain, CONTEXT): row if domain == "session" else None})
    with pytest.raises(FencedError):
        await stepped(session, candle(0, 43000))
    await session.close()


async def test_a_slot_taken_between_check_and_commit_makes_the_check_anew(store: Store) -> None:
    counts: list[int] = []

    def limit(payload: Any) -> bool:
        counts.append(payload.active_position_count)
        return bool(payload.active_position_count < 1)

    session = await session_of(bot({1: proposal()}, risk=[limit]), store)
    other = signal_row(symbol="ETHUSDT", signal_id="other")

    async def take() -> None:
        await put(store, {
            risk_key("limit", ETH): slot_of(other), guard_key("limit"): Guard(changes=1),
            context_key("signal", ETH): other,
        })  # fmt: skip

    Faults(store).meanwhile = [take]
    (told,) = await stepped(session, candle(0, 43000))
    assert (told.kind, counts) == ("rejected", [0, 1])
    await session.close()
    await sound(store)


async def test_a_rejection_too_holds_only_for_the_slots_that_it_saw(store: Store) -> None:
    other = signal_row(symbol="ETHUSDT", signal_id="other")
    await put(store, {risk_key("limit", ETH): slot_of(other), context_key("signal", ETH): other})
    session = await session_of(bot({1: proposal()}, risk=FREE), store)

    async def give_back() -> None:
        await put(store, {
            risk_key("limit", ETH): None, context_key("signal", ETH): None, guard_key("limit"): Guard(changes=9),
        })  # fmt: skip

    Faults(store).meanwhile = [give_back]
    assert [told.kind for told in await stepped(session, candle(0, 43000))] == ["opened"]
    await session.close()


async def test_verdicts_are_told_after_they_are_stored(store: Store) -> None:
    mine = bot({1: proposal(), 3: proposal(id="second")}, risk=[lambda payload: payload.pending_signal.id == "second"])
    heard: list[Any] = []
    mine.listeners.listen("risk", heard.append)
    session = await session_of(mine, store)
    kinds = [told.kind for told in await stepped(session, candle(0, 43000), candle(1, 43000), candle(2, 43000))]
    assert kinds == ["rejected", "opened"]
    assert [verdict.risk_name for verdict in heard] == ["limit"]
    await session.close()


async def test_a_strategy_that_raises_thinks_too_long_or_talks_nonsense_changes_nothing(store: Store) -> None:
    async def slow(symbol: str, when_ms: int) -> Any:
        minute = (when_ms - minute_ms(0)) // 60000
        if minute == 1:
            raise RuntimeError("a bug of the strategy")
        if minute == 2:
            await asyncio.Event().wait()
        return proposal(target=1.0) if minute == 3 else None

    mine = bot(slow)
    refused: list[Failure] = []
    mine.listeners.listen("validation", refused.append)
    params = msgspec.structs.replace(Params(), max_signal_generation_seconds=0)
    session = await session_of(mine, store, params=params)
    assert await stepped(session, *flat(43000, 0, 4)) == []
    assert [str(failure.error)[:20] for failure in mine.errors] == [
        "a bug of the strategy"[:20],
        "strategy 'my-strateg",
    ]
    assert len(refused) == 1 and session.state.last_event == 0
    await session.close()


async def test_a_sync_strategy_that_raises_is_reported(store: Store) -> None:
    def broken(symbol: str, when_ms: int) -> Any:
        raise RuntimeError("a bug of the strategy")

    mine = bot(broken)
    session = await session_of(mine, store)
    assert await stepped(session, candle(0, 43000)) == []
    assert [failure.where for failure in mine.errors] == ["strategy"]
    await session.close()


async def test_an_id_that_the_ledger_knows_never_opens_again(store: Store) -> None:
    old = event(1, "closed", signal_row(signal_id="used"))
    await put(store, {ledger_key(CONTEXT, "used"): trade_of(old)})
    await put(store, {context_key("session", CONTEXT): session_row(CONTEXT, State(last_event=1, last_candle_ms=1), ())})
    mine = bot({1: proposal(id="used"), 2: proposal(id="new")})
    session = await session_of(mine, store)
    assert await stepped(session, candle(0, 43000)) == []
    assert "never opens again" in str(mine.errors[0].error)
    assert [told.signal.id for told in await stepped(session, candle(1, 43000))] == ["new"]
    await session.close()


@pytest.mark.parametrize(("reply", "reason"), [("take_profit", "take_profit"), ("nonsense", "stop_loss")])
async def test_a_candle_with_both_levels_is_asked_about(store: Store, reply: str, reason: str) -> None:
    mine = bot({1: proposal()}, callbacks={"on_both_hit": lambda signal, candle: reply})
    params = msgspec.structs.replace(Params(), both_hit="undecided")
    session = await session_of(mine, store, params=params)
    _, closed = await stepped(session, candle(0, 43000), candle(1, 43000, high=44000, low=42000))
    assert (closed.reason, closed.both_hit) == (reason, True)
    assert len(mine.errors) == (reply == "nonsense")
    await session.close()


async def test_delivered_events_go_with_the_next_commit_or_within_a_second(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await session_of(bot({1: proposal()}), store)
    faults = Faults(store)
    await stepped(session, candle(0, 43000), candle(1, 43000, high=44000))
    closing = next(rows for rows in faults.made if event_key(CONTEXT, 2) in rows)
    assert closing[event_key(CONTEXT, 1)] is None
    assert [key.entity_id for key in await store.scan("outbox")] == ["000000000002"]
    monkeypatch.setattr(holdfast.engine.background, "ACKNOWLEDGE_SECONDS", 0.0)
    session.writer.background.cancel()
    session.flush_soon()
    await until(lambda: event_key(CONTEXT, 2) in faults.made[-1])
    assert await store.scan("outbox") == {}
    await session.close()


async def test_a_background_deletion_that_is_fenced_stops_the_session(store: Store) -> None:
    first = await session_of(bot({1: proposal()}), store)
    await stepped(first, candle(0, 43000))
    second = await session_of(bot({}), store)
    first.writer.background.cancel()
    first.writer.background.start()
    await until(lambda: first.writer.background.task is not None and first.writer.background.task.done())
    with pytest.raises(FencedError):
        await stepped(first, candle(1, 43000))
    await first.close()
    await second.close()


async def test_a_cancelled_commit_stops_the_session_and_the_next_one_has_all_or_nothing(store: Store) -> None:
    mine = bot({1: proposal()}, risk=FREE)
    session = await session_of(mine, store)
    faults, inside = Faults(store), asyncio.Event()

    async def hang() -> None:
        inside.set()
        await asyncio.Event().wait()

    faults.meanwhile = [hang]
    outcome = session.step(candle(0, 43000))
    assert outcome is not None
    task = asyncio.ensure_future(outcome)
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(FailedError, match="interrupted"):
        await stepped(session, candle(1, 43000))
    await session.close()
    again = await session_of(mine, store)
    assert again.state.signal is None
    await again.close()
    await sound(store)


async def test_a_store_that_failed_stops_the_session(store: Store) -> None:
    session = await session_of(bot({1: proposal()}), store)
    Faults(store).before = [FailedError("an earlier write failed part-way")]
    with pytest.raises(FailedError, match="part-way"):
        await stepped(session, candle(0, 43000))
    with pytest.raises(FailedError, match="part-way"):
        await stepped(session, candle(1, 43000))
    await session.close()


async def test_forbidden_candles_are_recorded_as_ranges_with_the_next_commit(store: Store) -> None:
    mine = bot({6: proposal(), 9: proposal(id="again")})
    session = await session_of(mine, store)
    await stepped(session, *flat(43000, 0, 2), entries=False)
    await stepped(session, *flat(43000, 3, 3))
    await stepped(session, *flat(43000, 4, 4), entries=False)
    assert await outages(store) == []
    await stepped(session, candle(5, 43000))
    assert await outages(store) == [(0, 2), (4, 4)]
    await stepped(session, *flat(43000, 6, 7), entries=False)
    await session.close()
    assert await outages(store) == [(0, 2), (4, 4), (6, 7)]
    assert mine.asked == [4, 6]


async def test_an_outage_that_could_not_be_recorded_is_recorded_with_a_later_commit(store: Store) -> None:
    session = await session_of(bot({3: proposal(id="lost"), 5: proposal()}), store)
    await stepped(session, candle(0, 43000), entries=False)
    await stepped(session, candle(1, 43000))
    Faults(store).before = [UnavailableError("full")]
    await stepped(session, *flat(43000, 2, 4))
    assert session.state.signal is not None
    assert await outages(store) == [(0, 0), (2, 2)]
    await session.close()


async def test_a_half_full_outbox_refuses_entries_and_lets_exits_through(store: Store) -> None:
    mine = bot({1: proposal(), 5: proposal(id="refused")})
    session = await session_of(mine, store, cap_rows=4)
    for one in (candle(0, 43000), candle(1, 43000, high=44000)):
        outcome = session.step(one)
        assert outcome is not None
        await outcome  # and nothing is delivered
    assert [session.step(one) for one in flat(43000, 2, 5)] == [None] * 4
    assert mine.asked == [1]
    assert [told.kind for told in await session.deliver()] == ["opened", "closed"]
    await session.flush()
    assert session.step(candle(6, 43000)) is None
    assert mine.asked == [1, 7]
    await session.close()


async def test_what_is_in_quarantine_keeps_a_context_from_opening_until_it_is_released(store: Store) -> None:
    mine = bot(lambda symbol, when_ms: proposal())
    key = context_key("signal", CONTEXT)
    await put(store, {key: signal_row(exchange="bybit")})
    session = await session_of(mine, store, recover=False)
    report = await session.recover()
    assert len(report.stopped) == 1 and "bybit" in report.stopped[0]
    await session.begin(minute_ms(0))
    assert await stepped(session, candle(0, 43000), candle(1, 43000)) == []
    await store.release(key)
    assert [told.kind for told in await stepped(session, candle(2, 43000))] == ["opened"]
    await session.close()


async def test_a_damaged_slot_lets_nothing_open_under_its_profile(store: Store) -> None:
    from holdfast.contract import Op

    mine = bot({1: proposal()}, risk=FREE)
    await store.home.backend.commit(store.scope, {risk_key("limit", ETH): b'{"x":1}'}, {}, op=Op("vandal", 1))
    session = await session_of(mine, store)
    assert await stepped(session, candle(0, 43000)) == []
    assert "quarantine" in str(mine.errors[0].error)
    await session.close()


async def test_stopping_cancels_what_waits_and_says_so(store: Store) -> None:
    session = await session_of(bot({1: proposal(priceOpen=42500)}), store)
    await stepped(session, candle(0, 43000))
    session.gate.stopping = True
    assert await session.stop_scheduled() is not None
    (cancelled,) = await session.deliver()
    assert (cancelled.kind, cancelled.reason) == ("cancelled", "stopped")
    assert await session.stop_scheduled() is None
    await session.close()
    await sound(store)


async def test_a_session_must_recover_before_it_can_commit(store: Store) -> None:
    session = await session_of(bot({1: proposal()}), store, recover=False)
    session.window.push(candle(-1, 43000))
    with pytest.raises(FailedError, match="recover"):
        await stepped(session, candle(0, 43000))
    await session.close()
    await session.close()


async def test_the_owner_row_tells_who_holds_the_context(store: Store) -> None:
    session: Session = await session_of(bot(), store, holder="me")
    loaded = await store.get(context_key("owner", CONTEXT))
    assert loaded is not None and isinstance(loaded.row, Owner)
    assert (loaded.row.holder, loaded.row.epoch, loaded.row.since_ms) == ("me", 1, minute_ms(0))
    await session.close()


async def test_a_slot_in_the_store_is_the_one_of_the_open_signal(store: Store) -> None:
    session = await session_of(bot({1: proposal(id="mine")}, risk=FREE), store)
    events: list[Event] = await stepped(session, candle(0, 43000))
    loaded = await store.get(risk_key("limit", CONTEXT))
    assert loaded is not None and isinstance(loaded.row, RiskPosition)
    assert (loaded.row.signal_id, loaded.row.open_timestamp) == ("mine", events[0].at_ms)
    await session.close()


async def test_a_position_that_a_hand_put_there_is_never_overwritten(store: Store) -> None:
    session = await session_of(bot({2: proposal()}), store)
    await stepped(session, candle(0, 43000))
    by_hand = signal_row(signal_id="by hand")
    await put(store, {context_key("signal", CONTEXT): by_hand})
    with pytest.raises(FencedError, match="recover"):
        await stepped(session, candle(1, 43000))
    found = await store.get(context_key("signal", CONTEXT))
    assert found is not None and found.row == by_hand
    await session.close()


async def test_a_row_that_does_not_wait_keeps_nothing_from_being_scheduled(store: Store) -> None:
    odd = msgspec.structs.replace(signal_row(scheduled=True), is_scheduled=False)
    await put(store, {context_key("schedule", CONTEXT): odd})
    session = await session_of(bot({1: proposal(priceOpen=42500), 3: proposal(priceOpen=42500, id="next")}), store)
    await session.begin(minute_ms(0))
    told = await stepped(session, candle(0, 43000))
    assert [one.kind for one in told] == ["scheduled"]
    await session.stop_scheduled()
    told = await stepped(session, candle(1, 43000), candle(2, 43000))
    assert [one.kind for one in told] == ["cancelled", "scheduled"]
    await session.close()


async def test_recovering_again_lets_a_deletion_in_the_background_finish_first(store: Store) -> None:
    session = await session_of(bot({1: proposal()}), store)
    await stepped(session, candle(0, 43000))
    session.writer.background.start()
    await session.recover()
    assert await stepped(session, candle(1, 43000)) == []
    assert session.writer.broken is None and await store.scan("outbox") == {}
    await session.close()


async def test_levels_that_were_written_in_any_order_cost_no_commit_each_minute(store: Store) -> None:
    levels = PartialLevels(levels={"stored-1": Levels(profit_levels=(30, 20, 10))})
    await put(
        store, {context_key("signal", CONTEXT): signal_row(at_minute=-5), context_key("partial", CONTEXT): levels}
    )
    session = await session_of(bot(), store)
    assert [session.step(one) for one in flat(43350, 0, 8)] == [None] * 9
    await session.close()
