"""Contexts that share a risk profile decide in the order of their names, and nobody is waited for for ever."""

from __future__ import annotations

import asyncio
import random

import pytest
from fakes import minute_ms, until

from holdfast.engine.turns import Turn, Turns
from holdfast.names import Context


def context(name: str) -> Context:
    return Context("binance", name, "strategy")


async def decide(turn: Turn, minutes: range, order: list[tuple[int, str]], chance: random.Random | None = None) -> None:
    for minute in minutes:
        for _ in range(chance.randrange(5) if chance else 0):
            await asyncio.sleep(0)
        if not turn.free(minute_ms(minute)):
            await turn.wait(minute_ms(minute))
        order.append((minute, turn.context.symbol))
        turn.done(minute_ms(minute))


@pytest.mark.parametrize("seed", range(10))
async def test_every_candle_is_decided_in_the_order_of_names_whoever_is_ready_first(seed: int) -> None:
    chance, turns, order = random.Random(seed), Turns(), []  # type: ignore[var-annotated]
    names = ["A", "B", "C", "D"]
    members = {name: turns.join(context(name), ("limit",)) for name in chance.sample(names, 4)}
    await asyncio.gather(*(decide(members[name], range(5), order, chance) for name in chance.sample(names, 4)))
    assert order == [(minute, name) for minute in range(5) for name in names]


async def test_a_context_without_profiles_waits_for_nobody() -> None:
    turns = Turns()
    turns.join(context("A"), ("limit",))
    alone = turns.join(context("B"), ())
    assert alone.free(minute_ms(0))
    other = turns.join(context("C"), ("another",))
    assert other.free(minute_ms(0))


async def test_profiles_that_share_a_member_share_their_order() -> None:
    turns, order = Turns(), []  # type: ignore[var-annotated]
    last = turns.join(context("Z"), ("one",))
    first = turns.join(context("A"), ("two",))
    both = turns.join(context("M"), ("two", "one"))
    await asyncio.gather(*(decide(turn, range(3), order) for turn in (last, both, first)))
    assert order == [(minute, name) for minute in range(3) for name in ("A", "M", "Z")]


async def test_who_leaves_or_gives_up_a_candle_is_not_waited_for() -> None:
    turns = Turns()
    early, late = turns.join(context("A"), ("limit",)), turns.join(context("B"), ("limit",))
    assert not late.free(minute_ms(0))
    early.done(minute_ms(0))  # its exchange gave nothing
    assert late.free(minute_ms(0))
    late.done(minute_ms(0))
    assert not late.free(minute_ms(1))
    waiting = asyncio.ensure_future(late.wait(minute_ms(1)))
    await asyncio.sleep(0)
    early.leave()
    early.leave()
    await asyncio.wait_for(waiting, 10)
    assert early.free(minute_ms(1))


async def test_who_is_late_for_too_long_loses_its_place_until_it_asks_again(caplog: pytest.LogCaptureFixture) -> None:
    turns = Turns(limit_seconds=0.0)
    stuck, other = turns.join(context("A"), ("limit",)), turns.join(context("B"), ("limit",))
    await asyncio.wait_for(other.wait(minute_ms(0)), 10)
    assert "goes on without it" in caplog.text
    other.done(minute_ms(0))
    assert other.free(minute_ms(1))
    assert stuck.free(minute_ms(0))  # it is placed anew, before the others' next candle
    assert not other.free(minute_ms(1))
    stuck.done(minute_ms(0))
    stuck.done(minute_ms(1))
    assert other.free(minute_ms(1))


async def test_a_wait_that_is_cancelled_leaves_the_others_in_order() -> None:
    turns, order = Turns(), []  # type: ignore[var-annotated]
    a, b, c = (turns.join(context(name), ("limit",)) for name in "ABC")
    task = asyncio.ensure_future(decide(b, range(1), order))
    rest = asyncio.ensure_future(decide(c, range(1), order))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    b.leave()
    await decide(a, range(1), order)
    await until(rest.done)
    assert order == [(0, "A"), (0, "C")]


async def test_a_group_that_all_have_left_is_begun_anew() -> None:
    turns = Turns()
    turns.join(context("A"), ("limit",)).leave()
    again = turns.join(context("B"), ("limit",))
    assert again.free(minute_ms(0))
