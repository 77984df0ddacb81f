"""Holdfast keeps a live trading bot's state through anything. The names that users need; see docs/ for what they do.

Each is imported when it is first used: a backtest never imports storage, and no driver is imported here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends.file import FileBackend as FileBackend
    from .backends.memory import MemoryBackend as MemoryBackend
    from .brokers.ccxt import CcxtBroker as CcxtBroker
    from .brokers.paper import PaperBroker as PaperBroker
    from .contract import Backend as Backend
    from .contract import Guarantees as Guarantees
    from .contract import How as How
    from .contract import Key as Key
    from .contract import KeyPrefix as KeyPrefix
    from .contract import Survives as Survives
    from .documents.adapters import PersistBase as PersistBase
    from .documents.adapters import PersistPartialAdapter as PersistPartialAdapter
    from .documents.adapters import PersistRiskAdapter as PersistRiskAdapter
    from .documents.adapters import PersistScheduleAdapter as PersistScheduleAdapter
    from .documents.adapters import PersistSignalAdapter as PersistSignalAdapter
    from .documents.adapters import use_store as use_store
    from .engine.backtest import Backtest as Backtest
    from .engine.broker import Broker as Broker
    from .engine.broker import Features as Features
    from .engine.broker import OrderReport as OrderReport
    from .engine.broker import OrderRequest as OrderRequest
    from .engine.broker import VenuePosition as VenuePosition
    from .engine.context import get_average_price as get_average_price
    from .engine.context import get_candles as get_candles
    from .engine.context import get_date as get_date
    from .engine.context import get_mode as get_mode
    from .engine.context import get_position_size as get_position_size
    from .engine.listeners import Failure as Failure
    from .engine.listeners import ModeChange as ModeChange
    from .engine.listeners import Tick as Tick
    from .engine.listeners import Trouble as Trouble
    from .engine.listeners import listen_done_backtest as listen_done_backtest
    from .engine.listeners import listen_done_backtest_once as listen_done_backtest_once
    from .engine.listeners import listen_done_live as listen_done_live
    from .engine.listeners import listen_done_live_once as listen_done_live_once
    from .engine.listeners import listen_error as listen_error
    from .engine.listeners import listen_exit as listen_exit
    from .engine.listeners import listen_mode as listen_mode
    from .engine.listeners import listen_partial_loss as listen_partial_loss
    from .engine.listeners import listen_partial_loss_once as listen_partial_loss_once
    from .engine.listeners import listen_partial_profit as listen_partial_profit
    from .engine.listeners import listen_partial_profit_once as listen_partial_profit_once
    from .engine.listeners import listen_performance as listen_performance
    from .engine.listeners import listen_progress as listen_progress
    from .engine.listeners import listen_risk as listen_risk
    from .engine.listeners import listen_risk_once as listen_risk_once
    from .engine.listeners import listen_signal as listen_signal
    from .engine.listeners import listen_signal_backtest as listen_signal_backtest
    from .engine.listeners import listen_signal_backtest_once as listen_signal_backtest_once
    from .engine.listeners import listen_signal_live as listen_signal_live
    from .engine.listeners import listen_signal_live_once as listen_signal_live_once
    from .engine.listeners import listen_signal_once as listen_signal_once
    from .engine.listeners import listen_trouble as listen_trouble
    from .engine.listeners import listen_validation as listen_validation
    from .engine.live import Live as Live
    from .engine.modes import Mode as Mode
    from .engine.modes import TroublePolicy as TroublePolicy
    from .engine.registry import Callbacks as Callbacks
    from .engine.registry import add_exchange as add_exchange
    from .engine.registry import add_frame as add_frame
    from .engine.registry import add_risk as add_risk
    from .engine.registry import add_sizing as add_sizing
    from .engine.registry import add_strategy as add_strategy
    from .engine.registry import list_exchanges as list_exchanges
    from .engine.registry import list_frames as list_frames
    from .engine.registry import list_risks as list_risks
    from .engine.registry import list_sizings as list_sizings
    from .engine.registry import list_strategies as list_strategies
    from .engine.registry import validate as validate
    from .errors import ConflictError as ConflictError
    from .errors import CorruptedError as CorruptedError
    from .errors import FailedError as FailedError
    from .errors import FencedError as FencedError
    from .errors import FullError as FullError
    from .errors import HeldError as HeldError
    from .errors import HoldfastError as HoldfastError
    from .errors import InvalidInputError as InvalidInputError
    from .errors import NotFoundError as NotFoundError
    from .errors import OrderError as OrderError
    from .errors import UnavailableError as UnavailableError
    from .errors import UndecidedError as UndecidedError
    from .errors import UnknownOutcomeError as UnknownOutcomeError
    from .errors import UnsafeSettingError as UnsafeSettingError
    from .names import Context as Context
    from .process import close as close
    from .process import reset as reset
    from .rows import Event as Event
    from .rows import Levels as Levels
    from .rows import PartialLevels as PartialLevels
    from .rows import RiskPosition as RiskPosition
    from .rows import ScheduledSignal as ScheduledSignal
    from .rows import Signal as Signal
    from .rows import Trade as Trade
    from .rules.candles import Candle as Candle
    from .rules.drafts import InvalidSignalError as InvalidSignalError
    from .rules.drafts import SignalDto as SignalDto
    from .rules.params import Params as Params
    from .rules.params import get_config as get_config
    from .rules.params import get_default_config as get_default_config
    from .rules.params import set_config as set_config
    from .rules.risk import RiskPayload as RiskPayload
    from .rules.risk import Validation as Validation
    from .rules.sizing import Sizing as Sizing
    from .store import Store as Store
    from .urls import open_backend as open_backend
    from .wrappers.cached import Cached as Cached
    from .wrappers.cached import Leases as Leases
    from .wrappers.encrypted import Encrypted as Encrypted
    from .wrappers.keyring import Keyring as Keyring
    from .wrappers.replicated import Replicated as Replicated
    from .wrappers.retrying import Retry as Retry
    from .wrappers.retrying import Retrying as Retrying
    from .wrappers.stack import stack as stack
    from .wrappers.traced import Traced as Traced

_HOME = {
    "documents.adapters": """
        PersistBase PersistPartialAdapter PersistRiskAdapter PersistScheduleAdapter PersistSignalAdapter
        use_store
    """,
    "backends.file": """
        FileBackend
    """,
    "backends.memory": """
        MemoryBackend
    """,
    "brokers.ccxt": """
        CcxtBroker
    """,
    "brokers.paper": """
        PaperBroker
    """,
    "engine.backtest": """
        Backtest
    """,
    "engine.broker": """
        Broker Features OrderReport OrderRequest VenuePosition
    """,
    "rules.candles": """
        Candle
    """,
    "engine.context": """
        get_average_price get_candles get_date get_mode get_position_size
    """,
    "contract": """
        Backend Guarantees How Key KeyPrefix Survives
    """,
    "rules.drafts": """
        InvalidSignalError SignalDto
    """,
    "errors": """
        ConflictError CorruptedError FailedError FencedError FullError HeldError HoldfastError InvalidInputError
        NotFoundError OrderError UnavailableError UndecidedError UnknownOutcomeError UnsafeSettingError
    """,
    "engine.listeners": """
        Failure ModeChange Tick Trouble listen_done_backtest listen_done_backtest_once listen_done_live
        listen_done_live_once listen_error listen_exit listen_mode listen_partial_loss listen_partial_loss_once
        listen_partial_profit listen_partial_profit_once listen_performance listen_progress listen_risk
        listen_risk_once listen_signal listen_signal_backtest listen_signal_backtest_once listen_signal_live
        listen_signal_live_once listen_signal_once listen_trouble listen_validation
    """,
    "engine.live": """
        Live
    """,
    "engine.modes": """
        Mode TroublePolicy
    """,
    "names": """
        Context
    """,
    "rules.params": """
        Params get_config get_default_config set_config
    """,
    "process": """
        close reset
    """,
    "engine.registry": """
        Callbacks add_exchange add_frame add_risk add_sizing add_strategy list_exchanges list_frames list_risks
        list_sizings list_strategies validate
    """,
    "rules.risk": """
        RiskPayload Validation
    """,
    "rules.sizing": """
        Sizing
    """,
    "rows": """
        Event Levels PartialLevels RiskPosition ScheduledSignal Signal Trade
    """,
    "store": """
        Store
    """,
    "urls": """
        open_backend
    """,
    "wrappers.cached": """
        Cached Leases
    """,
    "wrappers.encrypted": """
        Encrypted
    """,
    "wrappers.keyring": """
        Keyring
    """,
    "wrappers.replicated": """
        Replicated
    """,
    "wrappers.retrying": """
        Retry Retrying
    """,
    "wrappers.stack": """
        stack
    """,
    "wrappers.traced": """
        Traced
    """,
}
_MODULE = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = sorted(_MODULE)
__version__ = "0.1.0"


if not TYPE_CHECKING:  # a type checker knows the names above, and must refuse others

    def __getattr__(name: str) -> Any:
        module = _MODULE.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{module}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE})
