"""Drafts: what a strategy proposes, and how it becomes a signal or is refused with every reason at once."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import UNSET

from ..domains import require_plain
from ..errors import InvalidInputError
from ..names import Context
from ..rows import Position, ScheduledSignal, Signal
from .params import Params

MAX_SIGNAL_BYTES = 1024 * 1024
"""The largest signal, its extra members included, as JSON."""


class InvalidSignalError(InvalidInputError):
    """A strategy proposed a signal that breaks rules; nothing changed. Each failure is listed."""

    def __init__(self, failures: Iterable[str]) -> None:
        self.failures = tuple(failures)
        super().__init__("the signal was refused: " + "; ".join(self.failures))


class SignalDto(msgspec.Struct, kw_only=True):
    """What a strategy may return instead of a mapping. Prices are quote currency."""

    position: Position
    price_take_profit: float
    price_stop_loss: float
    minute_estimated_time: int
    """Longest holding time in minutes."""
    price_open: float | None = None
    """Entry price; None enters at the present price."""
    id: str | None = None
    """None derives one from the context and the candle's time."""
    note: str | None = None
    extra: dict[str, Any] = msgspec.field(default_factory=dict)
    """Members of your own, kept with the signal: plain JSON values."""


_MEMBERS = {
    "id": "id",
    "position": "position",
    "note": "note",
    "priceOpen": "price_open",
    "priceTakeProfit": "price_take_profit",
    "priceStopLoss": "price_stop_loss",
    "minuteEstimatedTime": "minute_estimated_time",
    "symbol": "symbol",
    "exchangeName": "exchange_name",
    "strategyName": "strategy_name",
}
_CANONICAL = {**_MEMBERS, **{name: name for name in _MEMBERS.values()}}
_OURS = {"scheduledAt", "pendingAt", "_isScheduled", "scheduled_at", "pending_at", "is_scheduled"}
_RESERVED = {"_schema", "_sum"}

_NOTE_STEPS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"```[^\n`]*\n?|```"), " "),  # code fences
    (re.compile(r"!?\[([^\]\n]*)\]\([^)\n]*\)"), r"\1"),  # links and pictures: their text
    (re.compile(r"^[ \t]{0,3}(?:#{1,6}[ \t]+|>[ \t]?|[-*+][ \t]+|\d+[.)][ \t]+)", re.MULTILINE), ""),
    (re.compile(r"^[ \t]*(?:[-*_][ \t]*){3,}$", re.MULTILINE), " "),  # rules
    (re.compile(r"\*\*(?=\S)(.+?)(?<=\S)\*\*", re.DOTALL), r"\1"),
    (re.compile(r"(?<![\w*])\*(?=[^\s*])([^*\n]+?)(?<=[^\s*])\*(?![\w*])"), r"\1"),
    # Underscores mark only around whole words: snake_case and __init__.py-like names stay.
    (re.compile(r"(?<!\w)__(?=[^\s_])([^\n]+?)(?<=[^\s_])__(?!\w)"), r"\1"),
    (re.compile(r"(?<!\w)_(?=[^\s_])([^_\n]+?)(?<=[^\s_])_(?!\w)"), r"\1"),
    (re.compile(r"~~(?=\S)(.+?)(?<=\S)~~", re.DOTALL), r"\1"),
    (re.compile(r"`([^`\n]*)`"), r"\1"),
)


def plain_note(text: str) -> str:
    """Return ``text`` without its markdown marks, on one line; ``snake_case`` words stay as they are."""
    if not text:
        return text
    for pattern, replacement in _NOTE_STEPS:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


class _Members:
    """A proposal taken apart: known members under one name each, the others apart, failures collected."""

    def __init__(self, reply: object) -> None:
        self.failures: list[str] = []
        self.known: dict[str, Any] = {}
        self.extra: dict[str, Any] = {}
        if isinstance(reply, SignalDto):
            reply = msgspec.structs.asdict(reply)
        if not isinstance(reply, Mapping):
            raise InvalidSignalError(
                [f"a strategy returns None, a mapping or a SignalDto, not {type(reply).__name__}: {reply!r:.80}"]
            )
        for name, value in reply.items():
            self._sort(name, value)

    def _sort(self, name: object, value: object) -> None:
        if not isinstance(name, str):
            self.failures.append(f"the member name {name!r:.40} is not text")
        elif name in _CANONICAL:
            # An explicit None means "not given": it must not clobber a default.
            if value is not None:
                canonical = _CANONICAL[name]
                if canonical in self.known and self.known[canonical] != value:
                    self.failures.append(f"{canonical} is given twice, and differently")
                self.known[canonical] = value
        elif name == "extra":
            if isinstance(value, Mapping):
                for inner, content in value.items():
                    self._keep(inner, content)
            elif value is not None:
                self.failures.append("extra must be a mapping: put your own members in it, or beside it")
        elif name not in _OURS:
            self._keep(name, value)

    def _keep(self, name: object, value: object) -> None:
        if not isinstance(name, str) or name in _RESERVED or name in _CANONICAL or name in _OURS or name == "extra":
            self.failures.append(f"a member of your own cannot be called {name!r:.40}: rename it")
            return
        if isinstance(value, tuple):
            value = list(value)
        try:
            require_plain(value, name)
        except InvalidInputError as error:
            self.failures.append(str(error))
        else:
            self.extra[name] = value

    def text(self, name: str, default: str) -> str:
        value = self.known.get(name, default)
        if not isinstance(value, str):
            self.failures.append(f"{name} is {value!r:.40}: must be text")
            return default
        try:
            require_plain(value, name)
        except InvalidInputError as error:
            self.failures.append(str(error))
            return default
        return str(value)

    def price(self, name: str, default: float | None = None) -> float | None:
        value = self.known.get(name, default)
        number = _number(value)
        if number is None or not 0 < number < float("inf"):
            shown = "missing" if value is None else f"{value!r:.40}"
            self.failures.append(f"{name} is {shown}: must be a finite number above 0")
            return None
        return number


def _number(value: object) -> float | None:
    # numpy's floats are numbers.Real; Decimal is not, and would not come back from JSON as it was.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _minutes(members: _Members, params: Params) -> int:
    value = members.known.get("minute_estimated_time")
    number = _number(value)
    if number is None or number != number or number <= 0 or number == float("inf") or number != int(number):
        shown = "missing" if value is None else f"{value!r:.40}"
        members.failures.append(f"minute_estimated_time is {shown}: must be a whole number of minutes above 0")
        return 0
    if number > params.max_signal_lifetime_minutes:
        members.failures.append(
            f"minute_estimated_time is {int(number)}: at most max_signal_lifetime_minutes, "
            f"{params.max_signal_lifetime_minutes}"
        )
    return int(number)


def price_failures(position: str, opened: float, target: float, stop: float) -> list[str]:
    """Return what is wrong with the order of a signal's three prices; empty when nothing is."""
    if position == "long" and not target > opened > stop:
        return [f"a long needs price_take_profit > price_open > price_stop_loss, not {target}, {opened}, {stop}"]
    if position == "short" and not target < opened < stop:
        return [f"a short needs price_take_profit < price_open < price_stop_loss, not {target}, {opened}, {stop}"]
    return []


def _distance_failures(opened: float, target: float, stop: float, params: Params) -> list[str]:
    to_target, to_stop = abs(target - opened) / opened * 100, abs(stop - opened) / opened * 100
    failures = []
    if to_target < params.min_takeprofit_distance_percent:
        failures.append(
            f"price_take_profit is {to_target:.4g} % from price_open: "
            f"at least {params.min_takeprofit_distance_percent} %"
        )
    if to_stop < params.min_stoploss_distance_percent:
        failures.append(
            f"price_stop_loss is {to_stop:.4g} % from price_open: at least {params.min_stoploss_distance_percent} %"
        )
    if 0 < params.max_stoploss_distance_percent < to_stop:
        failures.append(
            f"price_stop_loss is {to_stop:.4g} % from price_open: at most {params.max_stoploss_distance_percent} %"
        )
    return failures


def enters_at_once(position: Position, opened: float, price: float) -> bool:
    """Tell whether the entry price is already reached, so that the signal opens instead of waiting."""
    return price <= opened if position == "long" else price >= opened


def stored_failures(signal: Signal) -> list[str]:
    """Return what makes a stored signal impossible to watch (used by recovery); empty when nothing does."""
    failures = price_failures(signal.position, signal.price_open, signal.price_take_profit, signal.price_stop_loss)
    failures += [
        f"{name} is {getattr(signal, name)!r}: must be a finite number above 0"
        for name in ("price_open", "price_take_profit", "price_stop_loss")
        if not 0 < getattr(signal, name) < float("inf")
    ]
    failures += [
        f"{name} is {getattr(signal, name)}: must be above 0"
        for name in ("minute_estimated_time", "scheduled_at", "pending_at")
        if getattr(signal, name) <= 0
    ]
    failures += [
        f"{name} is empty" for name in ("id", "symbol", "exchange_name", "strategy_name") if not getattr(signal, name)
    ]
    return failures


def draft_signal(
    reply: object, context: Context, *, now_ms: int, price: float, params: Params, closed_ids: Iterable[str] = ()
) -> Signal:
    """Turn a strategy's reply into the signal that opens now, or the scheduled one that waits.

    Args:
        reply: A mapping with the documents' camelCase or with snake_case names, or a SignalDto. Members that
            are not known are kept in ``extra``; a known one that is None counts as not given.
        now_ms: Close time of the candle that asked.
        price: The price (VWAP) at that candle.
        closed_ids: Ids that may not be used again.

    Returns:
        A :class:`~holdfast.rows.Signal` to open, or a :class:`~holdfast.rows.ScheduledSignal`.

    Raises:
        InvalidSignalError: Lists every failure.
    """
    members = _Members(reply)
    failures = members.failures
    position: Any = members.known.get("position")
    if position not in ("long", "short"):
        shown = "missing" if position is None else f"{position!r:.40}"
        failures.append(f"position is {shown}: must be 'long' or 'short'")
    for name, ours in (
        ("symbol", context.symbol),
        ("exchange_name", context.exchange_name),
        ("strategy_name", context.strategy_name),
    ):
        if members.known.get(name, ours) != ours:
            failures.append(f"{name} is {members.known[name]!r:.40}: this is {ours!r}")
    signal_id = members.text("id", f"{context.exchange_name}:{context.symbol}:{context.strategy_name}:{now_ms}")
    if not signal_id:
        failures.append("id is empty: leave it out, and one is derived")
    elif signal_id in closed_ids:
        failures.append(f"id {signal_id!r:.80} was used before, and a closed id never opens again: use a new one")
    note = plain_note(members.text("note", ""))
    present = _number(price)
    if present is None or not 0 < present < float("inf"):
        failures.append(f"the present price is {price!r}: must be a finite number above 0")
    opened = members.price("price_open", price)
    target, stop = members.price("price_take_profit"), members.price("price_stop_loss")
    minutes = _minutes(members, params)
    at_once = True
    if opened is not None and target is not None and stop is not None and position in ("long", "short"):
        at_once = "price_open" not in members.known or enters_at_once(position, opened, price)
        failures += price_failures(position, opened, target, stop)
        failures += _distance_failures(opened, target, stop, params)
        if at_once and not (stop < price < target if position == "long" else target < price < stop):
            failures.append(
                f"the present price {price:g} is not between price_stop_loss {stop:g} and "
                f"price_take_profit {target:g}: it would close as soon as it opened"
            )
    if failures or opened is None or target is None or stop is None:
        raise InvalidSignalError(failures)
    row = Signal if at_once else ScheduledSignal
    signal = row(
        id=signal_id, position=position, note=note,
        price_open=opened, price_take_profit=target, price_stop_loss=stop, minute_estimated_time=minutes,
        symbol=context.symbol, exchange_name=context.exchange_name, strategy_name=context.strategy_name,
        scheduled_at=now_ms, pending_at=now_ms, extra=members.extra or UNSET,
    )  # fmt: skip
    size = len(msgspec.json.encode(signal)) if members.extra or len(note) + len(signal_id) > 10_000 else 0
    if size > MAX_SIGNAL_BYTES:
        raise InvalidSignalError(
            [f"the signal has {size} bytes; at most {MAX_SIGNAL_BYTES} can be kept: make it smaller"]
        )
    return signal
