"""Holdfast keeps a live trading bot's state through anything. The names that users need; see docs/ for what they do.

Each is imported when it is first used: a backtest never imports storage, and no driver is imported here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import PersistBase as PersistBase
    from .adapters import PersistPartialAdapter as PersistPartialAdapter
    from .adapters import PersistRiskAdapter as PersistRiskAdapter
    from .adapters import PersistScheduleAdapter as PersistScheduleAdapter
    from .adapters import PersistSignalAdapter as PersistSignalAdapter
    from .adapters import use_store as use_store
    from .backends.file import FileBackend as FileBackend
    from .backends.memory import MemoryBackend as MemoryBackend
    from .backtest import Backtest as Backtest
    from .candles import Candle as Candle
    from .context import get_average_price as get_average_price
    from .context import get_candles as get_candles
    from .context import get_date as get_date
    from .context import get_mode as get_mode
    from .contract import Backend as Backend
    from .contract import Guarantees as Guarantees
    from .contract import How as How
    from .contract import Key as Key
    from .contract import KeyPrefix as KeyPrefix
    from .contract import Survives as Survives
    from .drafts import InvalidSignalError as InvalidSignalError
    from .drafts import SignalDto as SignalDto
    from .errors import ConflictError as ConflictError
    from .errors import CorruptedError as CorruptedError
    from .errors import FailedError as FailedError
    from .errors import FencedError as FencedError
    from .errors import HeldError as HeldError
    from .errors import HoldfastError as HoldfastError
    from .errors import InvalidInputError as InvalidInputError
    from .errors import NotFoundError as NotFoundError
    from .errors import UnavailableError as UnavailableError
    from .errors import UnknownOutcomeError as UnknownOutcomeError
    from .errors import UnsafeSettingError as UnsafeSettingError
    from .listeners import Failure as Failure
    from .listeners import Tick as Tick
    from .listeners import listen_done_backtest as listen_done_backtest
    from .listeners import listen_done_backtest_once as listen_done_backtest_once
    from .listeners import listen_done_live as listen_done_live
    from .listeners import listen_done_live_once as listen_done_live_once
    from .listeners import listen_error as listen_error
    from .listeners import listen_exit as listen_exit
    from .listeners import listen_partial_loss as listen_partial_loss
    from .listeners import listen_partial_loss_once as listen_partial_loss_once
    from .listeners import listen_partial_profit as listen_partial_profit
    from .listeners import listen_partial_profit_once as listen_partial_profit_once
    from .listeners import listen_performance as listen_performance
    from .listeners import listen_progress as listen_progress
    from .listeners import listen_risk as listen_risk
    from .listeners import listen_risk_once as listen_risk_once
    from .listeners import listen_signal as listen_signal
    from .listeners import listen_signal_backtest as listen_signal_backtest
    from .listeners import listen_signal_backtest_once as listen_signal_backtest_once
    from .listeners import listen_signal_live as listen_signal_live
    from .listeners import listen_signal_live_once as listen_signal_live_once
    from .listeners import listen_signal_once as listen_signal_once
    from .listeners import listen_validation as listen_validation
    from .live import Live as Live
    from .names import Context as Context
    from .params import Params as Params
    from .params import get_config as get_config
    from .params import get_default_config as get_default_config
    from .params import set_config as set_config
    from .process import close as close
    from .process import reset as reset
    from .registry import Callbacks as Callbacks
    from .registry import add_exchange as add_exchange
    from .registry import add_frame as add_frame
    from .registry import add_risk as add_risk
    from .registry import add_strategy as add_strategy
    from .registry import list_exchanges as list_exchanges
    from .registry import list_frames as list_frames
    from .registry import list_risks as list_risks
    from .registry import list_strategies as list_strategies
    from .registry import validate as validate
    from .risk import RiskPayload as RiskPayload
    from .risk import Validation as Validation
    from .rows import Event as Event
    from .rows import Levels as Levels
    from .rows import PartialLevels as PartialLevels
    from .rows import RiskPosition as RiskPosition
    from .rows import ScheduledSignal as ScheduledSignal
    from .rows import Signal as Signal
    from .rows import Trade as Trade
    from .store import Store as Store
    from .urls import open_backend as open_backend

_HOME = {
    "adapters": """
        PersistBase PersistPartialAdapter PersistRiskAdapter PersistScheduleAdapter PersistSignalAdapter
        use_store
    """,
    "backends.file": """
        FileBackend
    """,
    "backends.memory": """
        MemoryBackend
    """,
    "backtest": """
        Backtest
    """,
    "candles": """
        Candle
    """,
    "context": """
        get_average_price get_candles get_date get_mode
    """,
    "contract": """
        Backend Guarantees How Key KeyPrefix Survives
    """,
    "drafts": """
        InvalidSignalError SignalDto
    """,
    "errors": """
        ConflictError CorruptedError FailedError FencedError HeldError HoldfastError InvalidInputError
        NotFoundError UnavailableError UnknownOutcomeError UnsafeSettingError
    """,
    "listeners": """
        Failure Tick listen_done_backtest listen_done_backtest_once listen_done_live listen_done_live_once
        listen_error listen_exit listen_partial_loss listen_partial_loss_once listen_partial_profit
        listen_partial_profit_once listen_performance listen_progress listen_risk listen_risk_once listen_signal
        listen_signal_backtest listen_signal_backtest_once listen_signal_live listen_signal_live_once
        listen_signal_once listen_validation
    """,
    "live": """
        Live
    """,
    "names": """
        Context
    """,
    "params": """
        Params get_config get_default_config set_config
    """,
    "process": """
        close reset
    """,
    "registry": """
        Callbacks add_exchange add_frame add_risk add_strategy list_exchanges list_frames list_risks
        list_strategies validate
    """,
    "risk": """
        RiskPayload Validation
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
