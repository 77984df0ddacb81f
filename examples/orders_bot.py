"""A bot that sends orders: to a paper venue, in quantities that a sizing finds.

    python -m holdfast.market.serve --synthetic 7 --listen 127.0.0.1:5555 --linger &
    python -m holdfast.brokers.paper_venue --listen tcp://127.0.0.1:5556 --linger &
    holdfast run examples/orders_bot.py
    holdfast torture examples/orders_bot.py --orders --kills 20 --seed 1

Market and venue are processes of their own: kill the bot and start it again, and
both are still there, as a real exchange would be. It trades often, so that there
is something to see; it is no advice.
"""

import os

from holdfast import (
    PaperBroker,
    add_exchange,
    add_sizing,
    add_strategy,
    get_average_price,
    get_candles,
    get_position_size,
)
from holdfast.market.replay import ReplayMarket

ACCOUNT_BALANCE = 10_000

market = ReplayMarket(os.environ.get("PAPER_MARKET", "tcp://127.0.0.1:5555"))
venue = PaperBroker(os.environ.get("PAPER_VENUE", "tcp://127.0.0.1:5556"))
add_exchange(market, exchange_name="paper", broker=venue)

# A stop that is hit costs 1 % of the account; no position costs more than half of it.
add_sizing(sizing_name="careful", method="fixed-percentage", risk_percentage=1, max_position_percentage=50)


@add_strategy(strategy_name="trend", interval="5m", symbols=("BTCUSDT", "ETHUSDT"))
async def trend(symbol, when_ms):
    """Follow a move that is stronger than usual, with as much as the distance of its stop allows."""
    candles = await get_candles(symbol, "1m", limit=15)
    if len(candles) < 10:
        return None
    price = await get_average_price(symbol)  # what a market entry would be booked at
    usual = sum(candle.close for candle in candles) / len(candles)
    if abs(price / usual - 1) < 0.0006:
        return None
    side = 1 if price > usual else -1
    stop = price * (1 - side * 0.025)
    quantity = await get_position_size("careful", symbol, account_balance=ACCOUNT_BALANCE, price_stop_loss=stop)
    if not quantity:
        return None  # less than the exchange trades
    return {
        "position": "long" if side > 0 else "short",
        "priceTakeProfit": price * (1 + side * 0.0085),
        "priceStopLoss": stop,
        "minuteEstimatedTime": 90,
        "quantity": quantity,
    }
