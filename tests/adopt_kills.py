"""Kills around an adoption: the operator, then the bot, die at each step in turn; the venue is the witness.

``python tests/adopt_kills.py [--part I/N]`` prints what it found as JSON. In each run a position that nobody here
opened is held at the venue; an operator adopts it, repeating the command until it is done; the bot runs, the stop is
hit, and the exit is sent. Then nothing may be left there, and nothing may have been sold twice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).parent))

from fakes import FakeMarket, candle, flat, minute_ms, no_sleep, signal_row
from order_bot import KillerBroker, forked_in

import holdfast
from holdfast.backends.file import FileBackend
from holdfast.brokers.paper import PaperBroker
from holdfast.brokers.paper_venue import VenueProcess
from holdfast.engine.broker import OrderRequest
from holdfast.engine.hands import Hands
from holdfast.engine.holdings import Holdings
from holdfast.engine.listeners import Listeners
from holdfast.engine.live import Live
from holdfast.engine.orders import Book, is_ended
from holdfast.engine.registry import Registry
from holdfast.errors import InvalidInputError
from holdfast.invariants import check_store
from holdfast.names import Context
from holdfast.rows import Audit, Order, Trade
from holdfast.store import Store
from holdfast.testing.killer import Countdown, KillerBackend

HELD = 3.0
"""What the operator's other hand has bought at the venue."""
FAR_MS = 4_000_000_000_000


class Found(msgspec.Struct, kw_only=True):
    """What the runs have come to."""

    steps: int = 0
    kills: int = 0
    wrong: list[str] = []


async def life(place: Path, broker: PaperBroker, symbol: str, kill_at: int) -> int:
    """Adopt what is held, unless that is done, then run the bot to its market's end; return how many steps it took."""
    countdown = Countdown(kill_at)
    backend = KillerBackend(FileBackend(place), 0)
    backend.countdown = countdown
    context, venue = Context("paper", symbol, "watcher"), KillerBroker(broker, countdown)
    market = FakeMarket({symbol: [*flat(43000, -10, 4), candle(5, 43000, low=41000), *flat(43000, 6, 9)]})
    registry, listeners = Registry(), Listeners()
    listeners.listen("error", lambda failure: None)
    registry.add_exchange(market, exchange_name="paper", broker=venue)
    registry.add_strategy(lambda symbol, when_ms: None, strategy_name="watcher", interval="1m")
    store = Store(backend)
    await store.open()
    try:
        row = msgspec.structs.replace(
            signal_row(at_minute=1), symbol=symbol, exchange_name="paper", strategy_name="watcher", id="adopted-1"
        )
        format_quantity = registry.exchange("paper").format_quantity
        holdings = Holdings(
            store, venue, "paper", format_quantity=format_quantity, operator="me@here", clock=lambda: FAR_MS,
        )  # fmt: skip
        hands = Hands(store, operator="me@here", clock=lambda: minute_ms(2), sleep=no_sleep)
        try:
            await hands.take_over(context, row, holdings=holdings)
        except InvalidInputError as error:
            if "is there already" not in str(error) and "used before" not in str(error):
                raise
        run = Live.run(
            symbol, strategy_name="watcher", exchange_name="paper", store=store, registry=registry,
            listeners=listeners, sleep=lambda seconds: asyncio.sleep(min(seconds, 0.01)),
        )  # fmt: skip
        async for _ in run:
            pass
    finally:
        await store.close()
    return countdown.steps


async def judge(place: Path, symbol: str, venue: VenueProcess) -> list[str]:
    """Compare what the venue holds with the rows; return what is wrong."""
    store = Store(FileBackend(place))
    await store.open(read_only=True)
    try:
        wrong = [str(one) for one in await check_store(store)]
        found, _ = await store.salvage(*await store.keys())
    finally:
        await store.close()
    rows = [loaded.row for loaded in found.values()]
    witness = venue.witness()
    held = sum(one.quantity for one in witness.positions if one.symbol == symbol)
    sold = [one for one in witness.orders if one.symbol == symbol and one.side == "sell" and one.filled_quantity]
    if held or [one.filled_quantity for one in sold] != [HELD] or not all(one.reduce_only for one in sold):
        wrong.append(f"{held} is held, sold were {[one.filled_quantity for one in sold]}")
    book = Book(row for row in rows if isinstance(row, Order))
    if book.unsettled() or not all(map(is_ended, book.orders.values())) or len(book.signal_ids()) != 1:
        wrong.append(f"the orders say {[(one.action, one.state) for one in book.orders.values()]}")
    counts = {kind.__name__: sum(isinstance(row, kind) for row in rows) for kind in (Audit, Trade)}
    if counts != {"Audit": 1, "Trade": 1}:
        wrong.append(f"adopted and closed once each would be otherwise: {counts}")
    return wrong


async def bought(broker: PaperBroker, symbol: str) -> None:
    """Hold a position that no bot opened."""
    await broker.submit(
        OrderRequest(
            symbol=symbol, client_order_id=f"byhand{symbol.lower()}", side="buy", quantity=HELD,
            expires_at_ms=FAR_MS, reference_price=43000.0,
        )
    )  # fmt: skip


def hunt(part: int, parts: int) -> Found:
    """Kill at every ``parts``-th step, counted from ``part``."""
    holdfast.set_config(entry_validity_seconds=0.15, exit_validity_seconds=0.1, order_grace_seconds=0.05)
    found = Found()
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-adopt-kills-")))
        venue = stack.enter_context(VenueProcess())
        for kill_at in [0, *range(1 + part, 1000, parts)]:
            if kill_at and kill_at > found.steps:
                break
            symbol, place, broker = f"S{kill_at}USDT", top / str(kill_at), venue.broker()
            asyncio.run(bought(broker, symbol))
            ended = forked_in(partial(life, place, broker, symbol, kill_at), symbol)
            if not kill_at:
                found.steps = ended
            elif ended < 0:
                found.kills += 1
                ended = forked_in(partial(life, place, broker, symbol, 0), symbol)
            if ended < 0:
                found.wrong.append(f"at step {kill_at}: ended with {ended}")
                continue
            found.wrong += [f"at step {kill_at}: {text}" for text in asyncio.run(judge(place, symbol, venue))]
            shutil.rmtree(place, ignore_errors=True)
    return found


def main(argv: list[str]) -> int:
    """Hunt, print what was found, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="0/1", metavar="I/N", help="part I of N, counted from 0")
    options: Any = parser.parse_args(argv)
    part, _, parts = options.part.partition("/")
    found = hunt(int(part), int(parts))
    print(json.dumps(msgspec.to_builtins(found)))
    return int(bool(found.wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
