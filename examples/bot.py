"""An ordinary bot: one strategy on four symbols, and a limit that they share.

    holdfast run examples/bot.py --market synthetic:7
    holdfast torture examples/bot.py --kills 20 --seed 1

It trades often, so that there is something to see; it is no advice. It decides
from closed candles alone, never from the clock or from chance: the same candles
then give the same trades, in a backtest, live, and after a crash.
"""

from holdfast import add_risk, add_strategy, get_average_price, get_candles


@add_risk(risk_name="two-at-once", note="two positions are open already")
def two_at_once(payload):
    """All symbols together hold at most two positions: shared by every strategy that names it."""
    return payload.active_position_count < 2


@add_strategy(
    strategy_name="swing",
    interval="5m",
    risk_name="two-at-once",
    symbols=("BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT"),
)
async def swing(symbol, when_ms):
    """Follow a strong move at once; for a weaker one, wait for a better price."""
    candles = await get_candles(symbol, "1m", limit=15)
    if len(candles) < 10:
        return None
    price = await get_average_price(symbol)  # what a market entry would be booked at
    usual = sum(candle.close for candle in candles) / len(candles)
    move_percent = (price - usual) / usual * 100
    if abs(move_percent) < 0.06:
        return None
    side = 1 if move_percent > 0 else -1
    strong = abs(move_percent) > 0.2
    entry = price if strong else price * (1 - side * 0.0012)
    return {
        "position": "long" if side > 0 else "short",
        # Without an entry price it opens at once; with a better one it waits for it.
        "priceOpen": None if strong else entry,
        "priceTakeProfit": entry * (1 + side * 0.0085),
        "priceStopLoss": entry * (1 - side * 0.0070),
        "minuteEstimatedTime": 90,
        "note": f"moved {move_percent:+.2f} %",
    }
