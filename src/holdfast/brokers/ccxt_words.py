"""What ccxt's answers and errors mean to a broker; plain functions, which never import the package.

Errors are told apart by the names along the class's ancestors, and each is mapped here once. Where an answer could
mean that the order stands, it is taken to mean that: only what is certain counts as refused or as never sent.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ..engine.broker import Features, OrderReport, ReportState
from ..errors import HoldfastError, InvalidInputError, UnavailableError, UnknownOutcomeError
from ..rows import Side
from ..rules.contracts import ONE, quantity_in

Meaning = Literal["repeated", "late", "rejected", "missing", "wrong", "unsent", "unknown"]
"""``repeated``: refused, the client order id is in use. ``late``: refused, the request's time has passed. ``wrong``:
can never work as it is set up. ``unsent``: certainly not carried out, and may work later."""


class Venue(NamedTuple):
    """What is known of one of ccxt's exchanges beyond what ccxt unifies."""

    features: Features
    by_client_id: bool = False
    """Whether an order can be asked for, and cancelled, by its client order id."""
    window_ms: int | None = None
    """How long after its time stamp the venue takes a request, at most; None: it does not look at that."""
    history_ms: int | None = None
    """How much history one question may span; None: any."""
    options: Mapping[str, Any] = MappingProxyType({})
    """ccxt's options that keep it from asking at start for more than a broker needs: each may fail."""


_DAY_MS = 86_400_000


def _binance(markets: str, *, history_days: int) -> Venue:
    # "Orders with the same newClientOrderID can be accepted only when the previous one is filled" (its documentation),
    # and a request is refused once its recvWindow, 60 s at most, has passed.
    features = Features(refuses_repeated_ids="while_open", refuses_expired=True, reduce_only=True)
    options = {"fetchMarkets": {"types": [markets]}, "fetchMargins": False, "fetchCurrencies": False}
    return Venue(features, True, 60_000, history_days * _DAY_MS, options)


VENUES: dict[str, Venue] = {
    "binance": _binance("spot", history_days=1),
    "binanceusdm": _binance("linear", history_days=7),
}
UNKNOWN_VENUE = Venue(Features(refuses_repeated_ids="never", refuses_expired=False, reduce_only=False, id_length=18))
"""What is assumed of any other exchange: nothing; its client order ids are as short as the shortest (Kraken's)."""
_ID_LENGTHS = {"gate": 28, "gateeu": 28, "kraken": 18}
_OTHER_IDS = frozenset(("backpack", "bitfinex", "dydx", "exmo", "hyperliquid", "lighter", "ndax"))


def id_length(exchange: str, wanted: int, *, is_spot: bool) -> int:
    """Return how long the client order ids of an exchange may be, ``wanted`` at most.

    Raises:
        InvalidInputError: It takes numbers only, and so no id of ours.
    """
    if exchange in _OTHER_IDS or (exchange == "htx" and not is_spot):
        raise InvalidInputError(
            f"{exchange}: its client order ids are numbers, so orders could not be found again by ours: it cannot be "
            "traded through CcxtBroker"
        )
    return min(wanted, _ID_LENGTHS.get(exchange, wanted))


# The first that is among the error's ancestors decides: the more special ones stand first.
_MEANINGS: tuple[tuple[str, Meaning], ...] = (
    ("DuplicateOrderId", "repeated"),
    ("OrderNotFound", "missing"),
    ("BadSymbol", "wrong"),
    ("AuthenticationError", "wrong"),
    ("ArgumentsRequired", "wrong"),
    ("NotSupported", "wrong"),
    ("InvalidProxySettings", "wrong"),
    ("InvalidNonce", "late"),
    ("DDoSProtection", "unsent"),  # 418: the gate refused it
    ("RateLimitExceeded", "unsent"),  # 429, likewise
    ("BadRequest", "rejected"),
    ("InsufficientFunds", "rejected"),
    ("InvalidOrder", "rejected"),
    ("OperationRejected", "rejected"),
    # Whatever is left (5xx, time-outs, unknown codes, an answer that makes no sense) may have been carried out.
)
_NEVER_CONNECTED = frozenset(("ClientConnectorError", "gaierror"))
_REPEATED = re.compile(r"duplicat|-4116\b", re.IGNORECASE)
_NOTHING_TO_CLOSE = re.compile(r"\b51023\b|reduce.?only|position (does not|doesn't|is not) exist", re.IGNORECASE)
_QUERY = re.compile(r"\?\S*")


def meaning_of(error: BaseException) -> Meaning:
    """Say what an error that came out of ccxt means for the request."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if _NEVER_CONNECTED & {kind.__name__ for kind in type(error.__cause__).__mro__}:
        return "unsent"
    found: Meaning = next((meaning for name, meaning in _MEANINGS if name in names), "unknown")
    if (found == "rejected" or "ExchangeError" in names) and found != "missing" and _REPEATED.search(str(error)):
        return "repeated"
    if found == "unknown" and "ExchangeError" in names and _NOTHING_TO_CLOSE.search(str(error)):
        return "rejected"  # a refusal in so many words, of which ccxt has no class
    if found == "late" and "ahead" in str(error):
        return "unsent"  # our clock is fast: nothing came too late
    return found


def as_ours(error: BaseException, *, changing: bool, secrets: tuple[str, ...]) -> HoldfastError:
    """Return the error that a caller gets; its text holds no secret.

    Args:
        changing: The request was to change something, so that whether it did is a question.
    """
    meaning, said = meaning_of(error), what_was_said(error, secrets)
    if meaning == "unknown" and changing:
        return UnknownOutcomeError(f"the venue may or may not have done it: find the order by its id ({said})")
    if meaning in ("wrong", "rejected", "repeated", "missing"):
        return InvalidInputError(f"the venue refused the request: {said}")
    return UnavailableError(f"the venue cannot be used now, and nothing was changed: {said}")


def what_was_said(error: BaseException, secrets: tuple[str, ...]) -> str:
    """Return an error as one line without the query of a URL, where the signature is, and without secrets."""
    text = f"{type(error).__name__}: {_QUERY.sub('', str(error))}"
    for secret in secrets:
        text = text.replace(secret, "***")
    return text.replace("\n", " ")[:300]


_STATES: dict[str, ReportState] = {
    "open": "open",
    "closed": "filled",
    "canceled": "cancelled",
    "expired": "cancelled",  # it was taken, and the venue ended it: ours means that it was refused because it was late
    "rejected": "rejected",
}


def report_of(
    order: Mapping[str, Any], symbol: str, client_order_id: str | None = None, unit: Decimal = ONE
) -> OrderReport:  # fmt: skip
    """Turn ccxt's order into a report.

    Args:
        client_order_id: The one that was asked for, where the answer may name another (a cancellation's own).
        unit: How much of the base currency ccxt's 1 is.
    """
    filled = _quantity(order.get("filled"), unit) or 0.0
    quantity = _quantity(order.get("amount"), unit)
    state = _STATES.get(str(order.get("status")), "sent")
    if state == "open" and filled > 0.0:
        state = "partial"
    elif state == "filled" and quantity is not None and filled < quantity:
        state = "cancelled"  # "closed" with something left is an order that was ended
    side = order.get("side")
    at_ms = next((n for name in _TIMES if (n := _number(order.get(name)))), 0)
    return OrderReport(
        client_order_id=client_order_id or str(order.get("clientOrderId") or "").removeprefix("t-"),  # Gate's mark
        symbol=symbol,
        state=state,
        filled_quantity=filled,
        average_price=(_number(order.get("average")) or None) if filled else None,
        venue_id=str(order.get("id") or ""),
        side=_side(side),
        quantity=quantity,
        reduce_only=bool(order.get("reduceOnly")),
        at_ms=int(at_ms),
    )


def report_on(order: Mapping[str, Any], symbol: str, client_order_id: str, unit: Decimal = ONE) -> OrderReport:
    """Return the report of an order; raises ValueError if the answer is not about it."""
    report = report_of(order, symbol, unit=unit)
    if not report.venue_id or report.client_order_id not in ("", client_order_id):
        raise ValueError("the answer is not about the order that was asked for")
    return report if report.client_order_id else report_of(order, symbol, client_order_id, unit)


def only_json(fetch: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Return ccxt's ``fetch``, but what is no JSON raises.

    ccxt makes an empty list of a page of HTML with status 200, as a proxy on the way sends it: no order would be open.
    """

    async def checked(*arguments: Any, **named: Any) -> Any:
        answer = await fetch(*arguments, **named)
        if not isinstance(answer, dict | list):
            raise ValueError("the answer is no JSON")
        return answer

    return checked


_TIMES = ("lastUpdateTimestamp", "lastTradeTimestamp", "timestamp")


def _side(value: object) -> Side | None:
    return value if value == "buy" or value == "sell" else None


def _quantity(value: object, unit: Decimal) -> float | None:
    return None if value is None else quantity_in(str(value), unit)


def _number(value: object) -> float | None:
    return None if value is None else float(str(value))
