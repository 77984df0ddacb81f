"""The registry: exchanges, strategies, frames and risk profiles, by name.

Each ``add_…`` works as a function and as a decorator. A name is given once;
what a name refers to may be added later, and is checked when a run starts or
when :func:`validate` is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec

from .candles import INTERVALS_MS, STRATEGY_INTERVALS, Candle
from .errors import InvalidInputError
from .params import Params
from .risk import RiskProfile, Validation

T = TypeVar("T")


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


class Registry:
    """One set of names. The module's functions use :data:`default_registry`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything (for tests)."""
        self._exchanges: dict[str, ExchangeSpec] = {}
        self._strategies: dict[str, StrategySpec] = {}
        self._frames: dict[str, FrameSpec] = {}
        self._risks: dict[str, RiskProfile] = {}

    def add_exchange(
        self,
        source: Any = None,
        *,
        exchange_name: str | None = None,
        get_candles: Callable[..., Any] | None = None,
        format_price: Callable[[str, float], str] | None = None,
        format_quantity: Callable[[str, float], str] | None = None,
        on_candle_data: Callable[..., object] | None = None,
        wait_closed: Callable[..., Awaitable[int]] | None = None,
    ) -> Any:
        """Add an exchange: by its functions, by an object or class that has them, or as a decorator.

        Args:
            source: An object with ``get_candles`` and, optionally, the others; a class is called without
                arguments first. Arguments go before its members.
            get_candles: (symbol, interval, since_ms, limit) → candles, oldest first; sync or async.
            format_price: (symbol, price) → text; without it, up to 8 decimals.

        Returns:
            ``source``, so that a decorated class stays what it was; else the :class:`ExchangeSpec`.
        """
        given: dict[str, Any] = {
            "get_candles": get_candles, "format_price": format_price, "format_quantity": format_quantity,
            "on_candle_data": on_candle_data, "wait_closed": wait_closed,
        }  # fmt: skip
        if source is None and get_candles is None:
            return lambda later: self.add_exchange(later, exchange_name=exchange_name, **given)
        made = source() if inspect.isclass(source) else source
        found: dict[str, Any] = {name: value or getattr(made, name, None) for name, value in given.items()}
        name = exchange_name or getattr(made, "exchange_name", None)
        if callable(source) and not inspect.isclass(source) and found["get_candles"] is None:
            found["get_candles"] = source  # a decorated function is the get_candles itself
        for member, value in found.items():
            if value is not None and not callable(value):
                raise InvalidInputError(f"exchange {name!r}: {member} must be callable, not {value!r:.80}")
        candles = found["get_candles"]
        if candles is None:
            raise InvalidInputError(f"exchange {name!r} has no get_candles(symbol, interval, since_ms, limit): add one")
        spec = ExchangeSpec(
            exchange_name=_name("exchange_name", name),
            get_candles=_awaitable(candles),
            format_price=found["format_price"] or _plain_number,
            format_quantity=found["format_quantity"] or _plain_number,
            on_candle_data=found["on_candle_data"],
            wait_closed=found["wait_closed"],
            source=made,
        )
        _add(self._exchanges, "exchange", spec.exchange_name, spec)
        return spec if source is None else source

    def add_strategy(
        self,
        get_signal: Callable[..., Any] | None = None,
        *,
        strategy_name: str,
        interval: str,
        risk_name: str | None = None,
        risk_list: Iterable[str] = (),
        symbols: Iterable[str] = (),
        callbacks: Callbacks | Mapping[str, Callable[..., Any]] | None = None,
        **on: Callable[..., Any] | None,
    ) -> Any:
        """Add a strategy, as a function or as a decorator.

        Args:
            get_signal: (symbol, when_ms) → mapping, SignalDto or None; sync or async.
            interval: 1m, 3m, 5m, 15m, 30m or 1h: asked on the first candle of each such slot.
            risk_name: One risk profile, asked first; ``risk_list`` names more. All must allow.
            symbols: What ``holdfast run`` starts it on.
            callbacks: ``on_open``, ``on_close``, …, together; or each as an argument of its own.

        Returns:
            ``get_signal``, so that a decorated function stays what it was.
        """
        if get_signal is None:
            return lambda later: self.add_strategy(
                later, strategy_name=strategy_name, interval=interval, risk_name=risk_name, risk_list=risk_list,
                symbols=symbols, callbacks=callbacks, **on,
            )  # fmt: skip
        if not callable(get_signal):
            raise InvalidInputError(f"strategy {strategy_name!r}: get_signal must be callable, not {get_signal!r:.80}")
        if interval not in STRATEGY_INTERVALS:
            raise InvalidInputError(
                f"strategy {strategy_name!r} has the interval {interval!r}: use one of {', '.join(STRATEGY_INTERVALS)}"
            )
        listed = _names("risk_list", risk_list)
        if len(set(listed)) != len(listed):
            raise InvalidInputError(f"strategy {strategy_name!r}: risk_list names a profile twice: {listed}")
        names = listed if risk_name is None else (_name("risk_name", risk_name), *listed)
        spec = StrategySpec(
            strategy_name=_name("strategy_name", strategy_name),
            interval=interval,
            get_signal=get_signal,
            risk_names=tuple(dict.fromkeys(names)),
            callbacks=_callbacks(strategy_name, callbacks, on),
            symbols=_names("symbols", symbols),
        )
        _add(self._strategies, "strategy", spec.strategy_name, spec)
        return get_signal

    def add_frame(
        self, *, frame_name: str, interval: str, start: int | str | datetime, end: int | str | datetime
    ) -> FrameSpec:
        """Add a piece of history.

        Args:
            interval: 1m to 3d; a strategy is asked no more often than this.
            start: Open time of the first candle: epoch ms, ISO text (UTC unless it says otherwise) or datetime.
            end: Open time of the last candle, included.
        """
        if interval not in INTERVALS_MS:
            raise InvalidInputError(
                f"frame {frame_name!r}: interval {interval!r}: use one of {', '.join(INTERVALS_MS)}"
            )
        spec = FrameSpec(
            frame_name=_name("frame_name", frame_name), interval=interval,
            start_ms=_moment("start", start), end_ms=_moment("end", end),
        )  # fmt: skip
        if spec.end_ms < spec.start_ms:
            raise InvalidInputError(f"frame {frame_name!r} ends ({end}) before it starts ({start})")
        _add(self._frames, "frame", spec.frame_name, spec)
        return spec

    def add_risk(
        self,
        validation: Callable[..., Any] | None = None,
        *,
        risk_name: str,
        validations: Iterable[Any] | None = None,
        note: str = "",
        on_rejected: Callable[..., Any] | None = None,
        on_allowed: Callable[..., Any] | None = None,
    ) -> Any:
        """Add a risk profile: its validations, or as a decorator of its one validation.

        Args:
            validations: Each a function of the RiskPayload, a :class:`~holdfast.risk.Validation`, or a mapping
                with ``validate`` and ``note``; raising or returning False rejects.
            note: Why, for a decorated validation.

        Returns:
            The function that was decorated; else the :class:`~holdfast.risk.RiskProfile`.
        """
        if validation is None and validations is None:
            return lambda later: self.add_risk(
                later, risk_name=risk_name, note=note, on_rejected=on_rejected, on_allowed=on_allowed
            )
        listed = [Validation(validate=validation, note=note)] if validation is not None else []
        listed += [_validation(risk_name, one) for one in validations or ()]
        profile = RiskProfile(
            name=_name("risk_name", risk_name), validations=tuple(listed),
            on_rejected=on_rejected, on_allowed=on_allowed,
        )  # fmt: skip
        _add(self._risks, "risk profile", profile.name, profile)
        return profile if validation is None else validation

    def remove_exchange(self, name: str) -> None:
        """Forget the exchange called ``name``, if there is one, so that another can take its place."""
        self._exchanges.pop(name, None)

    def exchange(self, name: str) -> ExchangeSpec:
        """Return the exchange called ``name``; raises InvalidInputError if there is none."""
        return _find(self._exchanges, "exchange", name)

    def strategy(self, name: str) -> StrategySpec:
        """Return the strategy called ``name``; raises InvalidInputError if there is none."""
        return _find(self._strategies, "strategy", name)

    def frame(self, name: str) -> FrameSpec:
        """Return the frame called ``name``; raises InvalidInputError if there is none."""
        return _find(self._frames, "frame", name)

    def risk(self, name: str) -> RiskProfile:
        """Return the risk profile called ``name``; raises InvalidInputError if there is none."""
        return _find(self._risks, "risk profile", name)

    def list_exchanges(self) -> list[ExchangeSpec]:
        """Return all exchanges in the order in which they were added."""
        return list(self._exchanges.values())

    def list_strategies(self) -> list[StrategySpec]:
        """Return all strategies in the order in which they were added."""
        return list(self._strategies.values())

    def list_frames(self) -> list[FrameSpec]:
        """Return all frames in the order in which they were added."""
        return list(self._frames.values())

    def list_risks(self) -> list[RiskProfile]:
        """Return all risk profiles in the order in which they were added."""
        return list(self._risks.values())

    def check_start(self, strategy_name: str, params: Params) -> StrategySpec:
        """Refuse to start a strategy that names an unknown risk profile, or that cannot answer what it will be asked.

        Raises:
            InvalidInputError: Names what is missing.
        """
        spec = self.strategy(strategy_name)
        for name in spec.risk_names:
            self.risk(name)
        if params.both_hit == "undecided" and spec.callbacks.on_both_hit is None:
            raise InvalidInputError(
                f"both_hit is 'undecided' and strategy {strategy_name!r} has no on_both_hit: add it, or set both_hit"
            )
        return spec

    def validate(self, params: Params) -> None:
        """Check every strategy as :meth:`check_start` does; one error lists all that is wrong."""
        failures = []
        for name in self._strategies:
            try:
                self.check_start(name, params)
            except InvalidInputError as error:
                failures.append(str(error))
        if failures:
            raise InvalidInputError("; ".join(failures))


def _add(table: dict[str, T], what: str, name: str, spec: T) -> None:
    if name in table:
        raise InvalidInputError(f"there is a {what} {name!r} already: use another name")
    table[name] = spec


def _find(table: Mapping[str, T], what: str, name: str) -> T:
    found = table.get(name)
    if found is None:
        known = ", ".join(map(repr, table)) or "none was added"
        raise InvalidInputError(f"there is no {what} {name!r}: add it first, or use one of: {known}")
    return found


def _name(what: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidInputError(f"{what} is {value!r:.80}: must be text of at least one character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{what} {value!r:.80} holds a lone surrogate: use valid Unicode text") from error
    return value


def _names(what: str, values: Iterable[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise InvalidInputError(f"{what} is the text {values!r:.80}: use a list of names")
    return tuple(_name(what, value) for value in values)


def _callbacks(
    strategy_name: str,
    together: Callbacks | Mapping[str, Callable[..., Any]] | None,
    single: Mapping[str, Callable[..., Any] | None],
) -> Callbacks:
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


def _validation(risk_name: str, given: Any) -> Validation:
    if isinstance(given, Validation):
        return given
    if isinstance(given, Mapping):
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


def _moment(what: str, value: object) -> int:
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


def _awaitable(function: Callable[..., Any]) -> Callable[[str, str, int, int], Awaitable[Any]]:
    if inspect.iscoroutinefunction(function):
        return function

    async def get_candles(symbol: str, interval: str, since_ms: int, limit: int) -> Any:
        result = function(symbol, interval, since_ms, limit)
        return await result if inspect.isawaitable(result) else result

    return get_candles


def _plain_number(symbol: str, value: float) -> str:
    text = f"{value:.8f}"
    return text.rstrip("0").rstrip(".")


default_registry = Registry()
"""What the module's functions add to, and every run that is given no other."""

add_exchange = default_registry.add_exchange
add_strategy = default_registry.add_strategy
add_frame = default_registry.add_frame
add_risk = default_registry.add_risk
list_exchanges = default_registry.list_exchanges
list_strategies = default_registry.list_strategies
list_frames = default_registry.list_frames
list_risks = default_registry.list_risks


def validate() -> None:
    """Check every reference of every strategy against the parameters in force; one error lists all that is wrong."""
    from .params import get_config

    default_registry.validate(get_config())


def reset() -> None:
    """Forget every exchange, strategy, frame and risk profile (for tests)."""
    default_registry.reset()
