"""What a strategy may look at while it is asked: candles, the price, the time, the mode.

Nothing here ever shows what had not closed at that moment, in live no more than
in a backtest: a strategy that peeks ahead wins every backtest and loses money.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

import msgspec

from ..errors import InvalidInputError, NotFoundError
from ..rules.candles import MAX_FETCH_CANDLES, Candle, average_price, fetch_candles, interval_ms
from ..rules.params import Params
from ..rules.sizing import ATR_PERIOD, Quote, Sizing, average_true_range
from .listeners import Mode
from .registry import ExchangeSpec, default_registry
from .sizings import sized_quantity

Sleep = Callable[[float], Awaitable[None]]


class Moment(msgspec.Struct, frozen=True):
    """Where and when a strategy is being asked."""

    exchange: ExchangeSpec
    mode: Mode
    when_ms: int
    """Close time of the candle that asks: nothing later exists."""
    params: Params
    sleep: Sleep = asyncio.sleep


_moment: ContextVar[Moment] = ContextVar("holdfast_moment")


@contextmanager
def at(moment: Moment) -> Iterator[None]:
    """Let the functions of this module speak of ``moment`` inside the ``with`` block."""
    token = _moment.set(moment)
    try:
        yield
    finally:
        _moment.reset(token)


def current() -> Moment:
    """Return where and when the calling strategy is being asked.

    Raises:
        InvalidInputError: Called from elsewhere than a strategy.
    """
    moment = _moment.get(None)
    if moment is None:
        raise InvalidInputError("this works only inside a strategy, while it is being asked: call it from get_signal")
    return moment


async def get_candles(symbol: str, interval: str, limit: int) -> list[Candle]:
    """Return the last closed candles of ``symbol``, oldest first; fewer where the market has gaps.

    Args:
        interval: One of the intervals 1m to 3d. A candle counts as closed when its whole length has passed.
        limit: 1 to 1000.

    Raises:
        UnavailableError: The exchange gave none that can be trusted, however often it was asked.
    """
    moment = current()
    length_ms = interval_ms(interval)
    if type(limit) is not int or not 1 <= limit <= MAX_FETCH_CANDLES:
        raise InvalidInputError(f"limit is {limit!r:.40}: must be 1 to {MAX_FETCH_CANDLES}")
    since_ms = moment.when_ms // length_ms * length_ms - limit * length_ms
    return await fetch_candles(
        moment.exchange.get_candles, symbol, interval, since_ms=max(0, since_ms), limit=limit,
        until_ms=moment.when_ms, params=moment.params, sleep=moment.sleep,
        on_candle_data=moment.exchange.on_candle_data,
    )  # fmt: skip


async def get_average_price(symbol: str) -> float:
    """Return the price (VWAP of the last five closed one-minute candles) of ``symbol``.

    Raises:
        NotFoundError: The market had no candle in those minutes.
        UnavailableError: The exchange gave none that can be trusted.
    """
    minutes = current().params.avg_price_candles_count
    candles = await get_candles(symbol, "1m", minutes)
    if not candles:
        raise NotFoundError(f"{symbol} had no candle in the last {minutes} minutes, so there is no price")
    return average_price(candles)


async def get_position_size(
    sizing: str | Sizing,
    symbol: str,
    *,
    account_balance: float,
    price_open: float | None = None,
    price_stop_loss: float | None = None,
    win_rate: float | None = None,
    win_loss_ratio: float | None = None,
    atr: float | None = None,
    atr_interval: str = "1m",
    atr_period: int = ATR_PERIOD,
) -> float:
    """Return how much of ``symbol`` to trade now, as the exchange writes quantities; 0.0 means do not trade.

    Args:
        sizing: What ``add_sizing`` was given as a name, or what it returned.
        account_balance: Quote currency; 0 or more.
        price_open: Entry; the price of the moment if left out.
        price_stop_loss: For ``fixed-percentage``.
        win_rate, win_loss_ratio: For ``kelly-criterion``: part of the trades that won; average win over average loss.
        atr: For ``atr-based``; if left out, the mean true range of the last ``atr_period`` closed candles of
            ``atr_interval``.

    Raises:
        InvalidInputError: There is no such sizing, a value that its method needs is missing or out of range, the
            market has too few candles, or the exchange's ``format_quantity`` failed.
        NotFoundError, UnavailableError: As :func:`get_average_price`.
    """
    moment = current()
    chosen = sizing if isinstance(sizing, Sizing) else default_registry.sizing(sizing)
    if chosen.method == "atr-based" and atr is None:
        if type(atr_period) is not int or not 1 <= atr_period < MAX_FETCH_CANDLES:
            raise InvalidInputError(f"atr_period is {atr_period!r:.40}: must be 1 to {MAX_FETCH_CANDLES - 1}")
        candles = await get_candles(symbol, atr_interval, atr_period + 1)
        atr = average_true_range(candles, interval=atr_interval, now_ms=moment.when_ms, period=atr_period)
    quote = Quote(
        account_balance=account_balance,
        price_open=await get_average_price(symbol) if price_open is None else price_open,
        price_stop_loss=price_stop_loss, win_rate=win_rate, win_loss_ratio=win_loss_ratio, atr=atr,
    )  # fmt: skip
    return sized_quantity(chosen, quote, moment.exchange, symbol)


def get_date() -> datetime:
    """Return the present of the strategy, in UTC: the close time of the candle that asks."""
    return datetime.fromtimestamp(current().when_ms / 1000, UTC)


def get_mode() -> Mode:
    """Return ``live`` or ``backtest``."""
    return current().mode
