"""Where candles come from: the exchange protocol, files, a synthetic market, a replay server, ccxt."""
