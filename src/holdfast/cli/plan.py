"""What ``holdfast run`` will run: which contexts, on which exchange, from which market."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from ..engine.registry import Registry, StrategySpec
from ..errors import InvalidInputError
from ..market.candles_file import symbol_of
from ..market.replay import ReplayMarket
from ..market.wire import Info
from ..names import Context

DEFAULT_SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT")
DEFAULT_SPEED = "60"


class Plan(NamedTuple):
    """What will run."""

    contexts: tuple[Context, ...]
    exchange_name: str
    server: tuple[str, ...]
    """Arguments of the market server to start; empty where none is needed."""
    address: str
    """Address of a market server that runs already; empty where none does."""
    market: str
    """The market in words."""


def make_plan(
    registry: Registry,
    *,
    symbols: Sequence[str] = (),
    strategies: Sequence[str] = (),
    exchange: str | None = None,
    market: str | None = None,
    speed: str | None = None,
    minutes: int | None = None,
) -> Plan:
    """Decide what to run from what the user's file added and what the command line says.

    Raises:
        InvalidInputError: Something is missing or contradicts; the message names the remedy.
    """
    chosen = [registry.strategy(name) for name in strategies] or registry.list_strategies()
    if not chosen:
        raise InvalidInputError("the file adds no strategy: decorate a function with @add_strategy(...)")
    name = _exchange_name(registry, exchange, market is not None)
    if market is None:
        if speed is not None:
            raise InvalidInputError("--speed is for a replayed market: add --market")
        return Plan(_contexts(chosen, name, symbols, None), name, (), "", f"exchange {name}")
    if market.startswith(("tcp://", "unix:")):
        if speed is not None or minutes is not None:
            raise InvalidInputError(f"the server at {market} has its own speed and length: leave --speed and --minutes")
        info = asyncio.run(_info(market))
        words = f"{'synthetic ' if info.synthetic else ''}market at {market} ({info.mode})"
        return Plan(_contexts(chosen, name, symbols, info.symbols), name, (), market, words)
    seed: int | None = None
    if market.startswith("synthetic:") or market == "synthetic":
        seed = _seed(market)
        own = [symbol for strategy in chosen for symbol in strategy.symbols]
        offered = list(dict.fromkeys(symbols or own or DEFAULT_SYMBOLS))
        server = ["--synthetic", str(seed), "--symbols", ",".join(offered)]
    else:
        files = market.split(",")
        offered = list(dict.fromkeys(one.rpartition("=")[0] or symbol_of(one) for one in files))
        server = ["--candles", market]
    contexts = _contexts(chosen, name, symbols, offered)
    pace = _pace(speed, len(contexts))
    server += [*pace, *(() if minutes is None else ("--minutes", str(minutes)))]
    words = f"synthetic market, seed {seed}" if seed is not None else f"recorded market ({', '.join(offered)})"
    return Plan(contexts, name, tuple(server), "", f"{words}, {' '.join(pace)[2:]}")


async def _info(address: str) -> Info:
    client = ReplayMarket(address)
    try:
        return await client.info()
    finally:
        await client.close()


def _seed(market: str) -> int:
    text = market.partition(":")[2] or "7"
    try:
        return int(text)
    except ValueError:
        raise InvalidInputError(f"--market {market!r:.60}: the seed must be a whole number, as synthetic:7") from None


def _pace(speed: str | None, participants: int) -> tuple[str, str]:
    speed = speed or DEFAULT_SPEED
    if speed == "wait":
        return "--wait", str(participants)
    try:
        float(speed)
    except ValueError:
        raise InvalidInputError(f"--speed is {speed!r:.40}: give a number (1 is real time), or wait") from None
    return "--speed", speed


def _exchange_name(registry: Registry, exchange: str | None, replayed: bool) -> str:
    known = [spec.exchange_name for spec in registry.list_exchanges()]
    if exchange is not None:
        if not replayed:
            registry.exchange(exchange)  # or a clear error
        return exchange
    if len(known) == 1:
        return known[0]
    if known:
        raise InvalidInputError(f"the file adds the exchanges {', '.join(known)}: choose one with --exchange")
    if replayed:
        return "replay"
    raise InvalidInputError("the file adds no exchange: call add_exchange(...) in it, or give --market synthetic:7")


def _contexts(
    strategies: Sequence[StrategySpec], exchange_name: str, wanted: Sequence[str], offered: Sequence[str] | None
) -> tuple[Context, ...]:
    if offered is not None and (absent := [symbol for symbol in wanted if symbol not in offered]):
        raise InvalidInputError(f"the market has no {', '.join(absent)}: it has {', '.join(offered)}")
    contexts: list[Context] = []
    for strategy in strategies:
        symbols = wanted or [symbol for symbol in strategy.symbols if offered is None or symbol in offered]
        if not symbols and offered is None:
            raise InvalidInputError(
                f"strategy {strategy.strategy_name!r} names no symbols: give --symbols, or symbols=… where it is added"
            )
        contexts += [Context(exchange_name, symbol, strategy.strategy_name) for symbol in symbols or offered or ()]
    return tuple(dict.fromkeys(contexts))
