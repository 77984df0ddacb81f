"""A store that is away for some candles: each of them is decided afterwards, and at the price of its own moment."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from fakes import Bot, FakeMarket, flat, minute_ms, proposal, sound

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Key, Op, Survives
from holdfast.errors import UnavailableError
from holdfast.rows import Event
from holdfast.store import Store
from holdfast.wrappers.around import Around


class Away(Around):
    """A backend that takes no commit while the market is in these minutes."""

    def __init__(self, market: FakeMarket, minutes: range) -> None:
        super().__init__(MemoryBackend())
        self._market, self._minutes = market, minutes
        self.refused = 0

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:  # fmt: skip
        """Refuse, or commit."""
        if any(self._market.present_ms == minute_ms(minute) for minute in self._minutes):
            self.refused += 1
            raise UnavailableError("away")
        return await super().commit(scope, changes, expect, op=op)


async def told(minutes: range) -> list[tuple[str, int, float]]:
    """Run a bot on a store that is away in these minutes; return kind, candle and price of all that happened."""
    # The price rises past milestones and falls again while the store is away: seen from later they were never reached.
    prices = [*flat(43000, -20, 2), *flat(43600, 3, 5), *flat(42700, 6, 16)]
    scene = FakeMarket({"BTCUSDT": prices})
    backend = Away(scene, minutes)
    store = Store(backend, require=Survives.NOTHING)
    await store.open()
    bot = Bot(scene, {1: proposal(minuteEstimatedTime=10)})
    await bot.live(store)
    assert (backend.refused > 0) == bool(minutes)
    await sound(store)
    await store.close()
    events = {event.id: event for _, event in bot.told if isinstance(event, Event) and event.number}
    return [(event.kind, event.candle_ms, event.price) for event in events.values()]


@pytest.mark.parametrize("minutes", [range(5, 7), range(4, 9), range(3, 12)], ids=["2", "5", "9"])
async def test_what_was_decided_late_is_what_would_have_been_decided_at_once(minutes: range) -> None:
    at_once = await told(range(0))
    assert [kind for kind, _, _ in at_once].count("partial_profit") > 2
    assert await told(minutes) == at_once
