"""A process whose context shares a risk profile with those of other processes: ``limits_process.py URL NAME ENTRIES``.

It opens whenever the profile lets it, closes soon after, and ends when it has opened so often. What it
committed is in its record (:mod:`fleet_bot`).
"""

from __future__ import annotations

import asyncio
import random
import sys

import fleet_bot
from fakes import Bot, FakeMarket, candle, flat, proposal, session_of, stepped

from holdfast.contract import Survives
from holdfast.store import Store
from holdfast.urls import open_backend

LIMIT = 3


class Entries:
    """How often this process may still open, and how often it was refused."""

    def __init__(self, most: int) -> None:
        self.left, self.opened, self.rejected = most, 0, 0


async def trade(store: Store, name: str, entries: Entries) -> None:
    """Open and close until there are no entries left."""
    chance = random.Random(name)
    bot = Bot(
        FakeMarket({"BTCUSDT": flat(43000, -10, 0)}), lambda symbol, when: proposal(),
        strategy=name, risk=[lambda payload: payload.active_position_count < LIMIT],
    )  # fmt: skip
    session = await session_of(bot, store, holder=name)
    minute = 0
    while entries.left > 0:
        opened = [event.kind for event in await stepped(session, candle(minute, 43000))]
        if "opened" in opened:
            entries.left -= 1
            entries.opened += 1
            await asyncio.sleep(chance.uniform(0.02, 0.06))  # long enough that others meet it
            minute += 1
            assert "closed" in [event.kind for event in await stepped(session, candle(minute, 43000, high=44100))]
        else:
            entries.rejected += "rejected" in opened
            await asyncio.sleep(chance.uniform(0.02, 0.06))
        minute += 1
    await session.close()


async def main(url: str, name: str, entries: int) -> None:
    """Trade with one context, and say how often it opened and was refused."""
    store = Store(open_backend(url), require=Survives.NOTHING)
    await store.open()
    own = Entries(entries)
    await trade(store, name, own)
    await store.close()
    print(own.opened, own.rejected, flush=True)


if __name__ == "__main__":
    assert fleet_bot.RECORD is not None
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
