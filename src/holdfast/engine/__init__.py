"""The engine: sessions that run the rules over candles, live or over history, and tell of what they decide."""
