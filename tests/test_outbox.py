"""Events are told in order, at least once; a trade is in the ledger before its event counts as delivered."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from fakes import memory_store, no_sleep, signal_row
from test_invariants import event

from holdfast.contract import Key
from holdfast.domains import ledger_key
from holdfast.engine.lanes import MAX_RESENDS
from holdfast.engine.listeners import Listeners
from holdfast.engine.outbox import Outbox, trade_of
from holdfast.engine.registry import Callbacks
from holdfast.errors import FailedError, UnavailableError, UnknownOutcomeError
from holdfast.names import Context
from holdfast.rows import Event
from holdfast.store import Store

CONTEXT = Context("binance", "BTCUSDT", "my-strategy")


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    made = await memory_store()
    yield made
    await made.close()


def box(store: Store, listeners: Listeners | None = None, **more: Any) -> Outbox:
    return Outbox(CONTEXT, more.pop("callbacks", Callbacks()), listeners or Listeners(), store, sleep=no_sleep, **more)


async def emptied(outbox: Outbox) -> list[Event]:
    told = []
    while (one := await outbox.tell_next()) is not None:
        told.append(one)
        outbox.delivered()
    return told


async def test_events_are_told_in_order_callbacks_first_then_live_then_all(store: Store) -> None:
    heard: list[str] = []
    listeners = Listeners()
    listeners.listen("signal", lambda one: heard.append(f"all {one.number}"))
    listeners.listen("signal_live", lambda one: heard.append(f"live {one.number}"))
    outbox = box(store, listeners, callbacks=Callbacks(on_open=lambda one: heard.append(f"on_open {one.number}")))
    outbox.add([event(1), event(2)])
    assert [one.number for one in await emptied(outbox)] == [1, 2]
    assert heard == ["on_open 1", "live 1", "all 1", "on_open 2", "live 2", "all 2"]


async def test_the_iterator_may_take_its_time_without_anybody_being_told_twice(store: Store) -> None:
    heard: list[int] = []
    listeners = Listeners()
    listeners.listen("signal", lambda one: heard.append(one.number))
    outbox = box(store, listeners)
    outbox.add([event(1)])
    assert await outbox.tell_next() is await outbox.tell_next()
    assert heard == [1] and len(outbox) == 1


async def test_the_trade_is_in_the_ledger_before_the_event_is_delivered(store: Store) -> None:
    closed = event(1, "closed")
    outbox = box(store)
    outbox.add([closed])
    await outbox.tell_next()
    loaded = await store.get(ledger_key(CONTEXT, closed.signal.id))
    assert loaded is not None and loaded.row == trade_of(closed)
    assert outbox.take_delivered() == []
    outbox.delivered()
    assert [key.entity_id for key in outbox.take_delivered()] == ["000000000001"]


async def test_a_repeated_closing_finds_its_trade_and_writes_no_other(store: Store) -> None:
    closed = event(1, "closed")
    for _ in range(2):
        outbox = box(store)
        outbox.add([closed])
        await emptied(outbox)
    assert len(await store.keys()) == 1


async def test_another_trade_under_the_same_id_is_reported_and_kept(store: Store) -> None:
    errors: list[Any] = []
    listeners = Listeners()
    listeners.listen("error", errors.append)
    first, second = event(1, "closed"), event(2, "closed")
    outbox = box(store, listeners)
    outbox.add([first, second])
    await emptied(outbox)
    assert "another trade" in str(errors[0].error)
    loaded = await store.get(ledger_key(CONTEXT, first.signal.id))
    assert loaded is not None and loaded.row == trade_of(first)


async def test_a_listener_that_raises_is_reported_and_delivery_goes_on(store: Store) -> None:
    errors: list[Any] = []
    listeners = Listeners()
    listeners.listen("error", errors.append)

    def broken(one: object) -> None:
        raise ValueError("broken listener")

    listeners.listen("signal", broken)
    outbox = box(store, listeners, callbacks=Callbacks(on_open=broken))
    outbox.add([event(1), event(2)])
    assert len(await emptied(outbox)) == 2
    assert [str(one.error) for one in errors] == ["broken listener"] * 4


async def test_a_ledger_that_cannot_be_written_delays_the_event_and_tells_nobody_twice(store: Store) -> None:
    heard: list[int] = []
    listeners = Listeners()
    listeners.listen("signal", lambda one: heard.append(one.number))
    backend: Any = store.home.backend
    commit, full = backend.commit, [True]

    async def failing(scope: str, *arguments: Any, **named: Any) -> int:
        if full:
            raise UnavailableError("no space left")
        return int(await commit(scope, *arguments, **named))

    backend.commit = failing
    outbox = box(store, listeners)
    outbox.add([event(1, "closed"), event(2)])
    for _ in range(3):
        with pytest.raises(UnavailableError):
            await outbox.tell_next()
    assert heard == [1]
    full.clear()
    assert [one.number for one in await emptied(outbox)] == [1, 2]
    assert heard == [1, 2]


@pytest.mark.parametrize("lost", [1, 3, MAX_RESENDS + 5])
async def test_a_lost_answer_is_asked_for_again_by_the_same_op(store: Store, lost: int) -> None:
    backend: Any = store.home.backend
    commit, ops = backend.commit, []

    async def deaf(scope: str, *arguments: Any, op: Any) -> int:
        number = int(await commit(scope, *arguments, op=op))
        ops.append(op)
        if len(ops) <= lost:
            raise UnknownOutcomeError("the answer was lost")
        return number

    backend.commit = deaf
    outbox = box(store)
    outbox.add([event(1, "closed")])
    if lost > MAX_RESENDS:
        with pytest.raises(FailedError, match="still unknown"):
            await outbox.tell_next()
    else:
        assert await outbox.tell_next() is not None
        assert len(ops) == lost + 1
    assert len(set(ops)) == 1


def test_half_a_full_outbox_refuses_entries_and_the_rest_is_for_exits() -> None:
    outbox = Outbox(CONTEXT, Callbacks(), Listeners(), Store(_Never()), cap_rows=6)  # type: ignore[arg-type]
    outbox.add([event(1), event(2)])
    assert not outbox.crowded
    outbox.add([event(3)])
    assert outbox.crowded
    outbox.delivered()
    assert outbox.crowded  # its row is still there
    keys = outbox.take_delivered()
    assert not outbox.crowded
    outbox.put_back(keys)
    assert outbox.crowded and isinstance(keys[0], Key)


class _Never:
    """A backend that is not used."""


def test_a_trade_says_what_the_closing_says() -> None:
    row = trade_of(event(4, "closed", signal_row(signal_id="t", note="why")))
    assert (row.id, row.event_id, row.note, row.reason, row.price_close) == (
        "t", f"{CONTEXT}#4", "why", "take_profit", 44000.0,
    )  # fmt: skip
