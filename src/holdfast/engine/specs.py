"""What is registered: the description of each exchange, strategy and frame, and how user input becomes one."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from ..errors import InvalidInputError
from ..rules.candles import INTERVALS_MS, Candle
from ..rules.risk import Validation
from .broker import Broker, Features
from .plan import RecoveryPolicy


class ExchangeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Where candles come from, and how its prices and quantities are written."""

    exchange_name: str
    get_candles: Callable[[str, str, int, int], Awaitable[Sequence[Any]]]
    """(symbol, interval, since in epoch ms, limit) → candles, oldest first."""
    format_price: Callable[[str, float], str]
    format_quantity: Callable[[str, float], str]
    on_candle_data: Callable[[str, str, int, int, Sequence[Candle]], object] | None = None
    """Called after each fetch with (symbol, interval, since, limit, candles)."""
    wait_closed: Callable[[str, int | None], Awaitable[int]] | None = None
    """Waits until a candle newer than the given one has closed; without it, the wall clock decides."""
    broker: Broker | None = None
    """Where orders go in live; None: events are all that comes of a signal."""
    source: Any = None
    """The object or class that was added, if one was."""


class Callbacks(msgspec.Struct, frozen=True, kw_only=True):
    """What a strategy is told, sync or async. Most take the Event (or Tick) and are called after it was committed."""

    on_tick: Callable[[Any], Any] | None = None
    """Every Event and every Tick."""
    on_open: Callable[[Any], Any] | None = None
    on_active: Callable[[Any], Any] | None = None
    """A Tick with an open signal: each candle that changed nothing, the first after a restart included."""
    on_idle: Callable[[Any], Any] | None = None
    on_close: Callable[[Any], Any] | None = None
    on_schedule: Callable[[Any], Any] | None = None
    on_cancel: Callable[[Any], Any] | None = None
    on_write: Callable[[str, Any], Any] | None = None
    """(symbol, Signal or None): the open signal was written, or cleared."""
    on_partial_profit: Callable[[Any], Any] | None = None
    on_partial_loss: Callable[[Any], Any] | None = None
    on_both_hit: Callable[[Any, Candle], Any] | None = None
    """(Signal, Candle) → ``take_profit`` or ``stop_loss``; asked while ``both_hit`` is ``undecided``."""


class StrategySpec(msgspec.Struct, frozen=True, kw_only=True):
    """Who proposes signals, how often, and under which risk profiles."""

    strategy_name: str
    interval: str
    get_signal: Callable[[str, int], Any]
    """(symbol, close time in epoch ms) → mapping, SignalDto or None; sync or async."""
    risk_names: tuple[str, ...] = ()
    callbacks: Callbacks = Callbacks()
    symbols: tuple[str, ...] = ()
    """What ``holdfast run`` starts it on."""
    recovery: RecoveryPolicy = "step"
    """What is done about candles that were missed while something of it was open or waiting."""

    @property
    def interval_ms(self) -> int:
        """Length of its slots in milliseconds."""
        return INTERVALS_MS[self.interval]


class FrameSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of history: candles that open from ``start_ms`` to ``end_ms``, both included."""

    frame_name: str
    interval: str
    """A strategy is asked no more often than this."""
    start_ms: int
    end_ms: int


_CALLBACK_NAMES = tuple(field.name for field in msgspec.structs.fields(Callbacks))


def checked_name(what: str, value: object) -> str:
    """Return ``value`` if it can be a name, else raise InvalidInputError."""
    if not isinstance(value, str) or not value:
        raise InvalidInputError(f"{what} is {value!r:.80}: must be text of at least one character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{what} {value!r:.80} holds a lone surrogate: use valid Unicode text") from error
    return value


def checked_names(what: str, values: Iterable[str]) -> tuple[str, ...]:
    """Return ``values`` if each can be a name, else raise InvalidInputError."""
    if isinstance(values, str):
        raise InvalidInputError(f"{what} is the text {values!r:.80}: use a list of names")
    return tuple(checked_name(what, value) for value in values)


def as_callbacks(
    strategy_name: str,
    together: Callbacks | Mapping[str, Callable[..., Any]] | None,
    single: Mapping[str, Callable[..., Any] | None],
) -> Callbacks:
    """Put callbacks given together and one by one into one :class:`Callbacks`."""
    base = msgspec.structs.asdict(together) if isinstance(together, Callbacks) else dict(together or {})
    for name, value in {**base, **single}.items():
        if name not in _CALLBACK_NAMES:
            raise InvalidInputError(
                f"strategy {strategy_name!r}: there is no callback {name!r}: use one of {', '.join(_CALLBACK_NAMES)}"
            )
        if value is not None and not callable(value):
            raise InvalidInputError(f"strategy {strategy_name!r}: {name} must be callable, not {value!r:.80}")
        base[name] = value
    return Callbacks(**base)


def as_validation(risk_name: str, given: Any) -> Validation:
    """Turn a function, a mapping or an object into a Validation."""
    if isinstance(given, Validation):
        pass
    elif isinstance(given, Mapping):
        given = Validation(validate=given.get("validate"), note=given.get("note") or "")  # type: ignore[arg-type]
    elif not inspect.isclass(given) and callable(getattr(given, "validate", None)):
        given = Validation(validate=given.validate, note=getattr(given, "note", "") or "")
    elif callable(given):
        given = Validation(validate=given)
    if not isinstance(given, Validation) or not callable(given.validate):
        raise InvalidInputError(
            f"risk profile {risk_name!r}: a validation is a function, or has validate and note, not {given!r:.80}"
        )
    return given


def as_moment_ms(what: str, value: object) -> int:
    """Turn epoch milliseconds, ISO text or a datetime into epoch milliseconds."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError as error:
            raise InvalidInputError(f"{what} is {value!r:.40}: use epoch milliseconds or ISO text") from error
    if isinstance(value, datetime):
        aware = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
        return round(aware.timestamp() * 1000)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidInputError(f"{what} is {value!r:.40}: use epoch milliseconds or ISO text")
    return value


_BROKER_CALLS = ("submit", "find", "cancel", "open_orders", "history", "positions", "close")


def check_broker(exchange_name: str, broker: object) -> None:
    """Refuse what cannot be a broker before anything is open: a fault that shows at the first order comes too late.

    Raises:
        InvalidInputError: The message names what it lacks, or what of it is something else.
    """
    who = f"exchange {exchange_name!r}: its broker {type(broker).__name__}"
    if inspect.isclass(broker):
        raise InvalidInputError(f"exchange {exchange_name!r}: its broker is the class {broker.__name__}: make one")
    missing = [name for name in (*_BROKER_CALLS, "account", "features") if not hasattr(broker, name)]
    if missing:
        raise InvalidInputError(f"{who} lacks {', '.join(missing)}: see holdfast.Broker")
    plain = [name for name in _BROKER_CALLS if not inspect.iscoroutinefunction(getattr(broker, name))]
    if plain:
        raise InvalidInputError(f"{who}: {', '.join(plain)} must be `async def`")
    account, features = getattr(broker, "account"), getattr(broker, "features")  # noqa: B009 -- of any object
    if not isinstance(account, str) or not account:
        raise InvalidInputError(f"{who}: its account is {account!r:.40}: use a text, the same for the same account")
    if not isinstance(features, Features):
        raise InvalidInputError(f"{who}: its features are {features!r:.80}: use holdfast.Features(...)")


def as_instance(cls: type) -> object:
    """Make one of ``cls`` without arguments."""
    try:
        return cls()
    except Exception as error:
        raise InvalidInputError(
            f"{cls.__name__}() could not be made without arguments ({error}): add an instance of it instead"
        ) from error


def as_async(function: Callable[..., Any]) -> Callable[[str, str, int, int], Awaitable[Any]]:
    """Return ``function`` if it is async, else an async one that calls it."""
    if inspect.iscoroutinefunction(function):
        return function

    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> Any:
        result = function(symbol, interval, since_ms, limit)
        return await result if inspect.isawaitable(result) else result

    return get_candles


def plain_number(symbol: str, value: float) -> str:
    """Return ``value`` with at most eight decimals."""
    text = f"{value:.8f}"
    return text.rstrip("0").rstrip(".")
