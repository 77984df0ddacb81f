"""One-line defects of sizing and of the broker over ccxt, as (name, file, text, its replacement, pytest arguments).

``tests/mutants.py`` makes its ``Mutant`` of each.
"""

from __future__ import annotations

# ruff: noqa: E501

_SIZING = "tests/test_sizing.py"
_BROKER = "tests/test_broker_ccxt.py"
_WORDS = "tests/test_broker_ccxt_words.py"

SIZING: list[tuple[str, str, str, str, str]] = [
    (
        "sizing: the least size is applied before the percent of the account",
        "rules/sizing.py",
        "    if sizing.max_position_percentage is not None:\n",
        "    quantity = max(quantity, sizing.min_position_size or 0)\n    sizing = msgspec.structs.replace(sizing, min_position_size=None)\n    if sizing.max_position_percentage is not None:\n",
        _SIZING,
    ),
    (
        "sizing: a losing game is staked on",
        "rules/sizing.py",
        "max(0.0, edge)",
        "abs(edge)",
        _SIZING,
    ),
    (
        "sizing: the whole Kelly fraction is staked",
        "rules/sizing.py",
        "DEFAULT_KELLY_MULTIPLIER = 0.25",
        "DEFAULT_KELLY_MULTIPLIER = 1.0",
        _SIZING,
    ),
    (
        "sizing: the forming candle counts",
        "rules/sizing.py",
        "if candle.open_time_ms + length_ms <= now_ms]",
        "if candle.open_time_ms <= now_ms]",
        _SIZING,
    ),
    (
        "sizing: a gap between candles does not count as range",
        "rules/sizing.py",
        "max(candle.high, before.close) - min(candle.low, before.close)",
        "candle.high - candle.low",
        _SIZING,
    ),
    (
        "sizing: the exchange's rounding is left out",
        "engine/sizings.py",
        "    return written\n",
        "    return exact\n",
        _SIZING,
    ),
    (
        "sizing: whatever the exchange writes is taken",
        "engine/sizings.py",
        "    if not 0.0 <= written <= 2 * exact:\n",
        "    if written != written:\n",
        _SIZING,
    ),
    (
        "ccxt: a time-out is told as refused",
        "brokers/ccxt_words.py",
        '    ("BadRequest", "rejected"),\n',
        '    ("BadRequest", "rejected"),\n    ("RequestTimeout", "rejected"),\n',
        f"{_BROKER} -k 'lost or time_out'",
    ),
    (
        "ccxt: what may have arrived is told as never sent",
        "brokers/ccxt_words.py",
        '    if meaning == "unknown" and changing:\n',
        "    if False:\n",
        f"{_BROKER} -k lost",
    ),
    (
        "ccxt: a lost connection counts as none",
        "brokers/ccxt_words.py",
        'frozenset(("ClientConnectorError", "gaierror"))',
        'frozenset(("ClientConnectionError", "gaierror"))',
        f"{_BROKER} -k lost",
    ),
    (
        "ccxt: a refused connection counts as a lost answer",
        "brokers/ccxt_words.py",
        'frozenset(("ClientConnectorError", "gaierror"))',
        'frozenset(("gaierror",))',
        f"{_BROKER} -k never_reached",
    ),
    (
        "ccxt: the client order id is left out",
        "brokers/ccxt.py",
        'more: dict[str, Any] = {"clientOrderId": request.client_order_id}',
        "more: dict[str, Any] = {}",
        f"{_BROKER} -k under_our_id",
    ),
    (
        "ccxt: a repeated id is taken for any refusal",
        "brokers/ccxt_words.py",
        'r"duplicat|-4116\\b"',
        'r"-4116\\b"',
        f"{_BROKER} -k second_order",
    ),
    (
        "ccxt: a failed order is repeated by ccxt",
        "brokers/ccxt_access.py",
        '        client.options["maxRetriesOnFailure"] = 0\n',
        "",
        f"{_BROKER} -k does_not_repeat",
    ),
    (
        "ccxt: the expiry is counted from when the rate limit lets it go",
        "brokers/ccxt.py",
        '            more["timestamp"] = now_ms',
        '            more["unused"] = now_ms',
        f"{_BROKER} -k held_back",
    ),
    (
        "ccxt: the expiry is left out",
        "brokers/ccxt.py",
        '            more["recvWindow"] = min(left_ms, self._venue.window_ms)\n',
        "",
        f"{_BROKER} -k 'under_our_id or held_back'",
    ),
    (
        "ccxt: what has expired is sent",
        "brokers/ccxt.py",
        "        if left_ms <= 0:\n",
        "        if False:\n",
        f"{_BROKER} -k time_has_passed_is_not",
    ),
    (
        "ccxt: a page of HTML is an empty list of orders",
        "brokers/ccxt_words.py",
        "        if not isinstance(answer, dict | list):\n",
        "        if answer is None:\n",
        f"{_BROKER} -k questions",
    ),
    (
        "ccxt: the answer for another order is taken",
        "brokers/ccxt_words.py",
        "    if not report.venue_id or report.client_order_id not in",
        "    if not report.venue_id or report.client_order_id in",
        f"{_BROKER} -k lost",
    ),
    (
        "ccxt: a late cancellation is an order that never was",
        "brokers/ccxt.py",
        "            else await self.find(symbol, client_order_id)\n        )\n",
        "            else None\n        )\n",
        f"{_BROKER} -k too_late",
    ),
    (
        "ccxt: the history ends with its first page",
        "brokers/ccxt_history.py",
        "            if not fresh or (",
        "            if True or (",
        f"{_BROKER} -k whole_over_pages",
    ),
    (
        "ccxt: the driver's own words, with the key, ride along",
        "brokers/ccxt_words.py",
        '        text = text.replace(secret, "***")\n',
        "        text = text[:]\n",
        f"{_BROKER} -k fingerprint",
    ),
    (
        "ccxt: the clocks are measured once and for all",
        "brokers/ccxt_access.py",
        "            self._clock_until_s = 0.0  # the clocks",
        "            pass  # the clocks",
        f"{_BROKER} -k drifted",
    ),
    (
        "ccxt: an exit sells more than the account holds",
        "brokers/ccxt.py",
        "return min(request.quantity, free)",
        "return request.quantity",
        f"{_BROKER} -k 'fee_has_left or not_short'",
    ),
]
