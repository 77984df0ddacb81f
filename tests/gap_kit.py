"""Gaps, one by one: what was stored, which candles were missed, what must come of it; each long, and as its mirror."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from fakes import Bot, FakeMarket, candle, flat, minute_ms, no_sleep, put, signal_row
from mortal import Killer, World

from holdfast.contract import Key, Survives
from holdfast.domains import context_key, guard_key, risk_key
from holdfast.engine.gap_run import GapReport, GapRun
from holdfast.engine.reconcile import session_row, slot_of
from holdfast.names import Context
from holdfast.rows import Guard, Levels, Outage, PartialLevels, Row, Signal
from holdfast.rules.candles import Candle
from holdfast.rules.signals import State
from holdfast.store import Store

CONTEXT = Context("binance", "BTCUSDT", "my-strategy")
HISTORY = flat(43000, -20, -1)


class Gap(NamedTuple):
    """One scenario."""

    name: str
    missed: Sequence[Candle]
    verdict: str
    at: int | None = None
    """Minute of the candle that ends it."""
    row: Signal = signal_row()
    levels: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """(profit, loss) levels that the gap reaches."""
    told: tuple[int, ...] = ()
    """Profit levels that were told before."""
    both: bool = False
    missing: int = 0
    entry_passed: int | None = None
    params: Mapping[str, Any] = {}
    present: int | None = None
    """Newest closed minute, where it is not the last candle's."""
    decided: int = -1
    """Minute of the last candle that was decided before."""
    on_both_hit: Callable[..., Any] | None = None


def rising(*prices: float, first: int = 0) -> list[Candle]:
    """Return a candle for each price, flat there."""
    return [candle(first + n, price) for n, price in enumerate(prices)]


WAITS = signal_row(scheduled=True, opened=42500, signal_id="waits")
BOTH = [*flat(43000, 0, 3), candle(4, 43000, high=44100, low=41900), *flat(43000, 5, 9)]
AT = signal_row(minutes=5)


def _raises(signal: Any, one: Any) -> str:
    raise RuntimeError("cannot say")


GAPS = [
    Gap("a quiet night", flat(43000, 0, 9), "still_valid"),
    Gap("one quiet minute", flat(43000, 0, 0), "still_valid"),
    Gap("the target by a wick", [*flat(43000, 0, 3), candle(4, 43000, high=44000), *flat(43000, 5, 9)], "hit_target",
        4),
    Gap("the stop by a wick", [*flat(43000, 0, 5), candle(6, 43000, low=42000), *flat(43000, 7, 9)], "hit_stop", 6),
    Gap("the target in the first minute", [candle(0, 43000, high=44000), *flat(43000, 1, 9)], "hit_target", 0),
    Gap("the stop in the newest minute", [*flat(43000, 0, 8), candle(9, 43000, low=41999)], "hit_stop", 9),
    Gap("a fall through the stop", [*flat(43000, 0, 2), *flat(41000, 3, 9)], "hit_stop", 3),
    Gap("a jump through the target", [*flat(43000, 0, 2), *flat(45000, 3, 9)], "hit_target", 3),
    Gap("the stop, and the target later", [candle(0, 43000, low=42000), *flat(45000, 1, 5)], "hit_stop", 0),
    Gap("the target, and the stop later", [candle(0, 43000, high=44000), *flat(41000, 1, 5)], "hit_target", 0),
    Gap("both: the target is taken", BOTH, "hit_target", 4, both=True),
    Gap("both: the stop is taken", BOTH, "hit_stop", 4, both=True, params={"both_hit": "stop_loss"}),
    Gap("both: asked, the target", BOTH, "hit_target", 4, both=True, params={"both_hit": "undecided"},
        on_both_hit=lambda signal, one: "take_profit"),
    Gap("both: asked, the stop", BOTH, "hit_stop", 4, both=True, params={"both_hit": "undecided"},
        on_both_hit=lambda signal, one: "stop_loss"),
    Gap("both: asked, and it cannot say", BOTH, "hit_stop", 4, both=True, params={"both_hit": "undecided"},
        on_both_hit=_raises),
    Gap("its time was over", flat(43000, 0, 9), "expired", 4, row=AT),
    Gap("its time was over in the newest minute", flat(43000, 0, 4), "expired", 4, row=AT),
    Gap("time goes before the target", [*flat(43000, 0, 3), candle(4, 43000, high=44000)], "expired", 4, row=AT),
    Gap("the target a minute before its time", [*flat(43000, 0, 2), candle(3, 43000, high=44000), candle(4, 43000)],
        "hit_target", 3, row=AT),
    Gap("levels on the way to the target", rising(*[43150] * 6), "partial", levels=((10,), ())),
    Gap("levels on the way to the stop", rising(*[42750] * 6), "partial", levels=((), (10, 20))),
    Gap("up, down, and the stop", [*rising(*[43250] * 6), *rising(*[42700] * 6, first=6), candle(12, 42700, low=41000)],
        "hit_stop", 12, levels=((10, 20), (10, 20, 30))),
    Gap("levels, then the target", [*rising(*[43350] * 6), candle(6, 43350, high=44000)], "hit_target", 6,
        levels=((10, 20, 30), ())),
    Gap("levels that were told before", rising(*[43250] * 6), "still_valid", told=(10, 20)),
    Gap("one level more than was told", rising(*[43350] * 6), "partial", levels=((30,), ()), told=(10, 20)),
    Gap("minutes without a candle", [*flat(43000, 0, 3), *flat(43000, 8, 9)], "still_valid", missing=4),
    Gap("the stop behind a hole", [*flat(43000, 0, 3), candle(8, 41900)], "hit_stop", 8, missing=4),
    Gap("its time was over in a hole", [*flat(43000, 0, 2), candle(9, 43000)], "expired", 9, row=AT, missing=6),
    Gap("the first minutes are missing", flat(43000, 5, 9), "still_valid", missing=5),
    Gap("no candle at all", [], "no_candles", present=9),
    Gap("an exchange that lags behind what was decided", flat(43000, 0, 1), "no_candles", present=9, decided=3),
    Gap("an exchange that lags", flat(43000, 0, 3), "still_valid", present=9),
    Gap("an exchange that lags, and the stop", [*flat(43000, 0, 2), candle(3, 41000)], "hit_stop", 3, present=9),
    Gap("the rest of the minute in which it opened", [candle(0, 43000, low=41000), *flat(43000, 1, 4)], "partial",
        levels=((), (10,)), row=msgspec.structs.replace(signal_row(), pending_at=minute_ms(0) + 30_000)),
    Gap("a month", [*flat(43000, 0, 1499), candle(1500, 43000, low=41000), *flat(43000, 1501, 2300)], "hit_stop", 1500,
        row=signal_row(minutes=5000)),
    Gap("half of it was decided before", [candle(0, 43000, low=41000), *flat(43000, 1, 9)], "partial",
        levels=((), (10,)), decided=2),
    Gap("it waits on", flat(43000, 0, 9), "still_waiting", row=WAITS),
    Gap("its entry passed, and nothing is entered", [candle(0, 43000), candle(1, 43000, low=42400), *flat(43000, 2, 9)],
        "still_waiting", row=WAITS, entry_passed=1),
    Gap("its stop came before its entry", [*flat(43000, 0, 2), candle(3, 41900), candle(4, 43000)], "cancelled", 3,
        row=WAITS),
    Gap("its entry passed, then its stop", [candle(0, 42400), *flat(43000, 1, 2), candle(3, 41900)], "cancelled", 3,
        row=WAITS, entry_passed=0),
    Gap("it waited too long", flat(43000, 0, 9), "timed_out", 4, row=WAITS, params={"schedule_await_minutes": 5}),
    Gap("its entry passed, then it waited too long", [candle(0, 43000), candle(1, 42400), *flat(43000, 2, 9)],
        "timed_out", 4, row=WAITS, entry_passed=1, params={"schedule_await_minutes": 5}),
    Gap("it waited too long in a hole", [*flat(43000, 0, 1), *flat(43000, 8, 9)], "timed_out", 8, row=WAITS, missing=6,
        params={"schedule_await_minutes": 5}),
    Gap("too long goes before its stop", [*flat(43000, 0, 3), candle(4, 41900)], "timed_out", 4, row=WAITS,
        params={"schedule_await_minutes": 5}),
    Gap("no candle, and it waits", [], "no_candles", row=WAITS, present=9),
]  # fmt: skip


def mirrored(gap: Gap) -> Gap:
    """Return the same scenario for the other side: each price on the other side of 43000."""

    def turned(one: Candle) -> Candle:
        first, high, low, close = (86_000 - price for price in one[1:5])
        return Candle(one[0], first, low, high, close, one[5])

    row = msgspec.structs.replace(
        gap.row, position="short", price_open=86_000 - gap.row.price_open,
        price_take_profit=86_000 - gap.row.price_take_profit, price_stop_loss=86_000 - gap.row.price_stop_loss,
    )  # fmt: skip
    return gap._replace(name=f"{gap.name} (short)", missed=[turned(one) for one in gap.missed], row=row)


ALL = [*GAPS, *(mirrored(gap) for gap in GAPS)]


def bot_of(gap: Gap, **more: Any) -> Bot:
    """Return the bot that was down, at a market that stands where the gap ends."""
    last = gap.present
    if last is None:
        last = (gap.missed[-1].open_time_ms - minute_ms(0)) // 60_000
    market = FakeMarket({"BTCUSDT": [*HISTORY, *gap.missed]}, start=last)
    calls = {"on_both_hit": gap.on_both_hit} if gap.on_both_hit else {}
    return Bot(market, risk=[lambda payload: True], callbacks=calls, **more)


def rows_of(gap: Gap) -> dict[Key, Row]:
    """Return what the bot had stored when it went down."""
    state = State(last_candle_ms=minute_ms(gap.decided), last_event=1)
    waits = gap.row.is_scheduled
    session = session_row(CONTEXT, state, () if waits else ("limit",))
    rows: dict[Key, Row] = {
        context_key("session", CONTEXT): session,
        context_key("schedule" if waits else "signal", CONTEXT): gap.row,
    }
    if not waits:
        rows |= {risk_key("limit", CONTEXT): slot_of(gap.row), guard_key("limit"): Guard(changes=1)}
    if gap.told:
        rows[context_key("partial", CONTEXT)] = PartialLevels(levels={gap.row.id: Levels(profit_levels=gap.told)})
    return rows


async def filled(gap: Gap) -> World:
    """Return the store as the bot left it."""
    world = World()
    store = await world.boot()
    await put(store, rows_of(gap))
    await store.close()
    return world


def run_of(bot: Bot, store: Store, **more: Any) -> GapRun:
    """Return what plans and recovers, with nothing real to wait for."""
    return GapRun(
        store, operator="me@here", registry=bot.registry, listeners=bot.listeners, clock=lambda: minute_ms(10_000),
        sleep=no_sleep, holder="test", **more,
    )  # fmt: skip


async def planned(gap: Gap, world: World, **more: Any) -> GapReport:
    """Return the plan, made on a store that was opened for reading alone."""
    await world.memory.close()
    store = Store(world.memory, require=Survives.NOTHING)
    await store.open(read_only=True)
    try:
        return await run_of(bot_of(gap), store, **more).plan(CONTEXT)
    finally:
        await store.close()


async def recovered(gap: Gap, world: World, killer: Killer | None = None, **more: Any) -> GapReport:
    """Recover in a process of its own."""
    store = await world.boot(killer)
    return await run_of(bot_of(gap), store, **more).recover(CONTEXT)


async def stored(world: World) -> tuple[dict[Key, Row], set[int]]:
    """Return everything that is stored but the owner row, which counts recoveries, and the minutes of its outages."""
    store = await world.boot()
    found, damaged = await store.salvage(*await store.keys())
    assert not damaged
    rows = {key: loaded.row for key, loaded in found.items()}
    out: set[int] = set()
    for row in rows.values():
        if isinstance(row, Outage):
            out |= set(range(row.from_ms, row.to_ms + 1, 60_000))
    await store.close()
    return {key: row for key, row in rows.items() if key.domain not in ("owner", "outage")}, out
