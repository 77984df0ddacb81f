"""A bot with a broker and an emergency journal: ``emergency_process.py STORE JOURNAL VENUE LEASE_SECONDS CONFLICT``.

It opens a long of 2 and waits; the first line that it reads brings the candle that closes it, the second one ends the
market. What it is told it prints, a line of JSON each.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from emergency_kit import policy_of
from fakes import Bot, FakeMarket, candle, flat, proposal

from holdfast.brokers.paper import PaperBroker
from holdfast.contract import Survives
from holdfast.engine.live import Live
from holdfast.engine.ownership import OnConflict
from holdfast.errors import HoldfastError
from holdfast.store import Store
from holdfast.urls import open_backend

TO_THE_END = [candle(4, 43000, high=44100), *flat(43000, 5, 6)]


def say(**words: Any) -> None:
    """Tell whoever started it."""
    print(json.dumps(words), flush=True)


async def run(url: str, journal: str, broker: PaperBroker, lease_seconds: float, on_conflict: OnConflict) -> None:
    """Run the bot until its market ends, or it must."""
    store = Store(open_backend(url), require=Survives.NOTHING)
    await store.open()
    market = FakeMarket({"BTCUSDT": flat(43000, -10, 3)}, hold=True)
    market.broker = broker  # type: ignore[attr-defined]
    bot = Bot(market, {1: proposal(quantity=2)})
    bot.listeners.listen("trouble", lambda trouble: say(trouble=trouble.kind))
    bot.listeners.listen("mode", lambda change: say(mode=change.after))

    async def obey() -> None:
        read = asyncio.to_thread(sys.stdin.readline)
        if await read:
            market.go_on([TO_THE_END[0]])
        if await asyncio.to_thread(sys.stdin.readline):
            market.go_on(TO_THE_END[1:])
        market.finish()

    obeying = asyncio.create_task(obey())
    live = Live.run(
        "BTCUSDT", strategy_name=bot.strategy, exchange_name=bot.exchange, store=store, registry=bot.registry,
        listeners=bot.listeners, on_conflict=on_conflict, lease_seconds=lease_seconds,
        on_trouble=policy_of(journal, patience_seconds=0.3),
    )  # fmt: skip
    try:
        async for event in live:
            say(kind=event.kind, number=event.number, id=event.id, price=event.price_close)
    except HoldfastError as error:
        say(error=type(error).__name__)
    else:
        say(end="the market ended")
    await live.aclose()
    await store.close()
    await obeying


if __name__ == "__main__":
    _, url, journal, venue, lease, conflict = sys.argv
    asyncio.run(run(url, journal, PaperBroker(venue), float(lease), conflict))  # type: ignore[arg-type]
