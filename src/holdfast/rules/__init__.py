"""The rules: pure functions over closed candles; no input, no output, no clock, no chance."""
