"""The registry: exchanges, strategies, frames, risk profiles and sizings, by name.

Each ``add_…`` works as a function and as a decorator. A name is given once;
what a name refers to may be added later, and is checked when a run starts or
when :func:`validate` is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, TypeVar, overload

from ..errors import InvalidInputError
from ..rules.candles import INTERVALS_MS, STRATEGY_INTERVALS
from ..rules.params import Params, get_config
from ..rules.risk import RiskProfile, Validation
from .broker import Broker
from .plan import RECOVERY_POLICIES, RecoveryPolicy
from .sizings import Sizings, add_once, find
from .specs import (
    Callbacks,
    ExchangeSpec,
    FrameSpec,
    StrategySpec,
    as_async,
    as_callbacks,
    as_instance,
    as_moment_ms,
    as_validation,
    check_broker,
    checked_name,
    checked_names,
    plain_number,
)

__all__ = [
    "Callbacks",
    "ExchangeSpec",
    "FrameSpec",
    "Registry",
    "StrategySpec",
    "add_exchange",
    "add_frame",
    "add_risk",
    "add_sizing",
    "add_strategy",
    "default_registry",
    "list_exchanges",
    "list_frames",
    "list_risks",
    "list_sizings",
    "list_strategies",
    "reset",
    "validate",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Sizings):
    """One set of names. The module's functions use :data:`default_registry`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything (for tests)."""
        self._exchanges: dict[str, ExchangeSpec] = {}
        self._strategies: dict[str, StrategySpec] = {}
        self._frames: dict[str, FrameSpec] = {}
        self._risks: dict[str, RiskProfile] = {}
        self._sizings = {}

    @overload
    def add_exchange(self, source: T, *, exchange_name: str | None = None, broker: Broker | None = None) -> T: ...

    @overload
    def add_exchange(self, *, exchange_name: str, broker: Broker | None = None) -> Callable[[T], T]: ...

    @overload
    def add_exchange(
        self,
        *,
        exchange_name: str,
        get_candles: Callable[..., Any],
        format_price: Callable[[str, float], str] | None = None,
        format_quantity: Callable[[str, float], str] | None = None,
        on_candle_data: Callable[..., object] | None = None,
        wait_closed: Callable[..., Awaitable[int]] | None = None,
        broker: Broker | None = None,
    ) -> ExchangeSpec: ...

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
        broker: Broker | None = None,
    ) -> Any:
        """Add an exchange: by its functions, by an object or class that has them, or as a decorator.

        Args:
            source: An object with ``get_candles`` and, optionally, the others; a class is called without
                arguments first. Arguments go before its members.
            get_candles: (symbol, interval, since_ms, limit) → candles, oldest first; sync or async.
            format_price: (symbol, price) → text; without it, up to 8 decimals.
            broker: Where live runs send orders; a backtest never does. Without one, events are all that comes of a
                signal.

        Returns:
            ``source``, so that a decorated class stays what it was; else the :class:`ExchangeSpec`.
        """
        given: dict[str, Any] = {
            "get_candles": get_candles, "format_price": format_price, "format_quantity": format_quantity,
            "on_candle_data": on_candle_data, "wait_closed": wait_closed,
        }  # fmt: skip
        if source is None and get_candles is None:
            return lambda later: self.add_exchange(later, exchange_name=exchange_name, broker=broker, **given)
        made = as_instance(source) if inspect.isclass(source) else source
        found: dict[str, Any] = {name: value or getattr(made, name, None) for name, value in given.items()}
        name = exchange_name or getattr(made, "exchange_name", None)
        if callable(source) and not inspect.isclass(source) and found["get_candles"] is None:
            found["get_candles"] = source  # a decorated function is the get_candles itself
        for member, value in found.items():
            if value is not None and not callable(value):
                raise InvalidInputError(f"exchange {name!r}: {member} must be callable, not {value!r:.80}")
        broker = broker if broker is not None else getattr(made, "broker", None)
        if broker is not None:
            check_broker(str(name), broker)
        candles = found["get_candles"]
        if candles is None:
            raise InvalidInputError(f"exchange {name!r} has no get_candles(symbol, interval, since_ms, limit): add one")
        spec = ExchangeSpec(
            exchange_name=checked_name("exchange_name", name),
            get_candles=as_async(candles),
            format_price=found["format_price"] or plain_number,
            format_quantity=found["format_quantity"] or plain_number,
            on_candle_data=found["on_candle_data"],
            wait_closed=found["wait_closed"],
            broker=broker,
            source=made,
        )
        add_once(self._exchanges, "exchange", spec.exchange_name, spec)
        return spec if source is None else source

    @overload
    def add_strategy(
        self,
        get_signal: F,
        *,
        strategy_name: str,
        interval: str,
        risk_name: str | None = None,
        risk_list: Iterable[str] = (),
        symbols: Iterable[str] = (),
        recovery: RecoveryPolicy = "step",
        callbacks: Callbacks | Mapping[str, Callable[..., Any]] | None = None,
        **on: Callable[..., Any] | None,
    ) -> F: ...

    @overload
    def add_strategy(
        self,
        get_signal: None = None,
        *,
        strategy_name: str,
        interval: str,
        risk_name: str | None = None,
        risk_list: Iterable[str] = (),
        symbols: Iterable[str] = (),
        recovery: RecoveryPolicy = "step",
        callbacks: Callbacks | Mapping[str, Callable[..., Any]] | None = None,
        **on: Callable[..., Any] | None,
    ) -> Callable[[F], F]: ...

    def add_strategy(
        self,
        get_signal: Callable[..., Any] | None = None,
        *,
        strategy_name: str,
        interval: str,
        risk_name: str | None = None,
        risk_list: Iterable[str] = (),
        symbols: Iterable[str] = (),
        recovery: RecoveryPolicy = "step",
        callbacks: Callbacks | Mapping[str, Callable[..., Any]] | None = None,
        **on: Callable[..., Any] | None,
    ) -> Any:
        """Add a strategy, as a function or as a decorator.

        Args:
            get_signal: (symbol, when_ms) → mapping, SignalDto or None; sync or async.
            interval: 1m, 3m, 5m, 15m, 30m or 1h: asked on the first candle of each such slot.
            risk_name: One risk profile, asked first; ``risk_list`` names more. All must allow.
            symbols: What ``holdfast run`` starts it on.
            recovery: What is done about candles that were missed while something of it was open or waiting: ``step``
                does what the rules say; ``ask`` stops the context until an operator has decided (``holdfast
                recover``); ``close_at_market`` does what the rules say, and closes what is still open then.
            callbacks: ``on_open``, ``on_close``, …, together; or each as an argument of its own.

        Returns:
            ``get_signal``, so that a decorated function stays what it was.
        """
        if get_signal is None:
            return lambda later: self.add_strategy(
                later, strategy_name=strategy_name, interval=interval, risk_name=risk_name, risk_list=risk_list,
                symbols=symbols, recovery=recovery, callbacks=callbacks, **on,
            )  # fmt: skip
        if not callable(get_signal):
            raise InvalidInputError(f"strategy {strategy_name!r}: get_signal must be callable, not {get_signal!r:.80}")
        if interval not in STRATEGY_INTERVALS:
            raise InvalidInputError(
                f"strategy {strategy_name!r} has the interval {interval!r}: use one of {', '.join(STRATEGY_INTERVALS)}"
            )
        if recovery not in RECOVERY_POLICIES:
            raise InvalidInputError(
                f"strategy {strategy_name!r} has the recovery {recovery!r:.40}: use {', '.join(RECOVERY_POLICIES)}"
            )
        listed = checked_names("risk_list", risk_list)
        if len(set(listed)) != len(listed):
            raise InvalidInputError(f"strategy {strategy_name!r}: risk_list names a profile twice: {listed}")
        names = listed if risk_name is None else (checked_name("risk_name", risk_name), *listed)
        spec = StrategySpec(
            strategy_name=checked_name("strategy_name", strategy_name),
            interval=interval,
            get_signal=get_signal,
            risk_names=tuple(dict.fromkeys(names)),
            callbacks=as_callbacks(strategy_name, callbacks, on),
            symbols=checked_names("symbols", symbols),
            recovery=recovery,
        )
        add_once(self._strategies, "strategy", spec.strategy_name, spec)
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
            frame_name=checked_name("frame_name", frame_name), interval=interval,
            start_ms=as_moment_ms("start", start), end_ms=as_moment_ms("end", end),
        )  # fmt: skip
        if spec.end_ms < spec.start_ms:
            raise InvalidInputError(f"frame {frame_name!r} ends ({end}) before it starts ({start})")
        add_once(self._frames, "frame", spec.frame_name, spec)
        return spec

    @overload
    def add_risk(
        self,
        *,
        risk_name: str,
        validations: Iterable[Any],
        on_rejected: Callable[..., Any] | None = None,
        on_allowed: Callable[..., Any] | None = None,
    ) -> RiskProfile: ...

    @overload
    def add_risk(
        self,
        validation: None = None,
        *,
        risk_name: str,
        note: str = "",
        on_rejected: Callable[..., Any] | None = None,
        on_allowed: Callable[..., Any] | None = None,
    ) -> Callable[[F], F]: ...

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
            validations: Each a function of the RiskPayload, a :class:`~holdfast.rules.risk.Validation`, or a mapping
                with ``validate`` and ``note``; raising or returning False rejects.
            note: Why, for a decorated validation.

        Returns:
            The function that was decorated; else the :class:`~holdfast.rules.risk.RiskProfile`.
        """
        if validations is None:

            def decorate(validation: F) -> F:
                self.add_risk(
                    risk_name=risk_name, validations=[Validation(validate=validation, note=note)],
                    on_rejected=on_rejected, on_allowed=on_allowed,
                )  # fmt: skip
                return validation

            return decorate if validation is None else decorate(validation)
        if validation is not None:
            raise InvalidInputError(f"risk profile {risk_name!r}: give one validation or validations=, not both")
        several: Any = validations
        if isinstance(several, str | Mapping) or not isinstance(several, Iterable):
            raise InvalidInputError(f"risk profile {risk_name!r}: validations is a list, not {several!r:.80}")
        listed = [as_validation(risk_name, one) for one in several]
        profile = RiskProfile(
            name=checked_name("risk_name", risk_name), validations=tuple(listed),
            on_rejected=on_rejected, on_allowed=on_allowed,
        )  # fmt: skip
        add_once(self._risks, "risk profile", profile.name, profile)
        return profile

    def remove_exchange(self, name: str) -> None:
        """Forget the exchange called ``name``, if there is one, so that another can take its place."""
        self._exchanges.pop(name, None)

    def exchange(self, name: str) -> ExchangeSpec:
        """Return the exchange called ``name``; raises InvalidInputError if there is none."""
        return find(self._exchanges, "exchange", name)

    def strategy(self, name: str) -> StrategySpec:
        """Return the strategy called ``name``; raises InvalidInputError if there is none."""
        return find(self._strategies, "strategy", name)

    def frame(self, name: str) -> FrameSpec:
        """Return the frame called ``name``; raises InvalidInputError if there is none."""
        return find(self._frames, "frame", name)

    def risk(self, name: str) -> RiskProfile:
        """Return the risk profile called ``name``; raises InvalidInputError if there is none."""
        return find(self._risks, "risk profile", name)

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


default_registry = Registry()
"""What the module's functions add to, and every run that is given no other."""

add_exchange = default_registry.add_exchange
add_strategy = default_registry.add_strategy
add_frame = default_registry.add_frame
add_risk = default_registry.add_risk
add_sizing = default_registry.add_sizing
list_exchanges = default_registry.list_exchanges
list_strategies = default_registry.list_strategies
list_frames = default_registry.list_frames
list_risks = default_registry.list_risks
list_sizings = default_registry.list_sizings


def validate() -> None:
    """Check every reference of every strategy against the parameters in force; one error lists all that is wrong."""
    default_registry.validate(get_config())


def reset() -> None:
    """Forget every exchange, strategy, frame, risk profile and sizing (for tests)."""
    default_registry.reset()
