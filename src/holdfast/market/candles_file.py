"""Candle files: CSV (also gzipped) in the common kline order, Parquet and Feather."""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidInputError
from ..rules.candles import Candle
from .history import History, infer_interval
from .protocol import MINUTE_MS

_COLUMNS = ("open_time", "open", "high", "low", "close", "volume")
_TIME_NAMES = frozenset(("open_time", "open_time_ms", "opentime", "time", "timestamp", "date", "datetime", "ts"))


def read_candles(path: str | os.PathLike[str]) -> list[Candle]:
    """Read a file of candles: ``.csv``, ``.csv.gz``, ``.parquet`` or ``.feather``.

    CSV columns are open time, open, high, low, close, volume; more columns are
    ignored. A header is optional; where it names all six, columns are taken by
    name. Times are epoch milliseconds; seconds, micro- and nanoseconds are
    recognised by their size. Candles may be missing, but times must ascend.

    Raises:
        InvalidInputError: The file cannot be read, or a line is bad: the message names file, line and value.
            For Parquet and Feather also when ``pyarrow`` is not installed.
    """
    file = Path(path)
    name = file.name.lower()
    if name.endswith((".csv", ".csv.gz")):
        return _check(str(file), _csv_rows(file))
    if name.endswith((".parquet", ".feather")):
        return _check(str(file), _arrow_rows(file))
    raise InvalidInputError(f"{file}: not a kind of file that is read: use .csv, .csv.gz, .parquet or .feather")


def symbol_of(path: str | os.PathLike[str]) -> str:
    """Return the symbol that a file is named after: ``BTCUSDT`` for ``BTCUSDT-1m-2022-01.csv.gz``."""
    return Path(path).name.split(".")[0].split("-")[0]


def read_history(files: Sequence[str], symbols: Sequence[str] = ()) -> History:
    """Read files into one market.

    Args:
        files: Paths, or ``SYMBOL=PATH``. A file of a longer interval may stand beside the
            one-minute file of its symbol.
        symbols: The symbol of each file, in order, where the names of the files do not tell it.

    Raises:
        InvalidInputError: A file is bad, or a symbol has no one-minute file, or no minute is in all of them.
    """
    if symbols and len(symbols) != len(files):
        raise InvalidInputError(f"{len(symbols)} symbols for {len(files)} candle files: name one symbol for each file")
    one_minute: dict[str, list[Candle]] = {}
    longer: dict[tuple[str, str], list[Candle]] = {}
    sources: dict[tuple[str, str], str] = {}
    for at, given in enumerate(files):
        named, _, path = given.rpartition("=") if not Path(given).exists() else ("", "", given)
        symbol = symbols[at] if symbols else named or symbol_of(path)
        candles = read_candles(path)
        interval = infer_interval(candles, path)
        if (symbol, interval) in sources:
            raise InvalidInputError(
                f"{path}: {symbol} has {interval} candles already, from {sources[symbol, interval]}: "
                "write SYMBOL=FILE to name it otherwise"
            )
        sources[symbol, interval] = path
        if interval == "1m":
            one_minute[symbol] = candles
        else:
            longer[symbol, interval] = candles
    for symbol, interval in longer:
        if symbol not in one_minute:
            raise InvalidInputError(
                f"{sources[symbol, interval]}: these are {interval} candles, and the engine steps over one-minute "
                f"candles: add a one-minute file of {symbol} (this one can then stay beside it)"
            )
    history = History(one_minute, longer)
    if history.first_ms >= history.last_ms:
        spans = ", ".join(f"{s} {c[0].open_time_ms}..{c[-1].open_time_ms}" for s, c in one_minute.items())
        raise InvalidInputError(f"no minute is in all candle files ({spans}): give files of the same days")
    return history


def _csv_rows(file: Path) -> Iterable[tuple[int, Sequence[Any]]]:
    try:
        raw = file.read_bytes()
        if file.name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8-sig")
    except OSError as error:  # gzip.BadGzipFile is one
        raise InvalidInputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise InvalidInputError(f"{file}: cut short or damaged: {error}: fetch it again") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{file}: not text at byte {error.start}: use UTF-8 CSV") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    order: Sequence[int] = range(6)
    first = True
    try:
        for row in reader:
            if not row or (len(row) == 1 and not row[0].strip()):
                continue
            if first:
                first = False
                if not _is_number(row[0]):
                    order = _header_order(file, row)
                    if not _is_number(row[-1]):
                        continue
            if len(row) < 6:
                raise InvalidInputError(
                    f"{file}, line {reader.line_num}: {len(row)} columns where 6 are needed "
                    f"(open time, open, high, low, close, volume, parted by commas): {','.join(row)[:60]!r}"
                )
            yield reader.line_num, [row[at] for at in order]
    except csv.Error as error:
        raise InvalidInputError(f"{file}, line {reader.line_num}: not CSV: {error}") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _header_order(file: Path, row: Sequence[str]) -> Sequence[int]:
    """Return where the six columns stand by the header, or the common order where it does not name them."""
    names = [name.strip().lower() for name in row]
    order = _order(names)
    if order is not None:
        return order
    for at, name in enumerate(_COLUMNS):
        if name in names and names.index(name) != at:
            raise InvalidInputError(
                f"{file}, line 1: the header has {name} in another place than the common order, and does not name "
                f"all of {', '.join(_COLUMNS)}: name all six"
            )
    return range(6)


def _order(names: Sequence[str]) -> list[int] | None:
    """Return where the six columns stand by these names, or None where not all are named."""
    time = next((at for at, name in enumerate(names) if name in _TIME_NAMES), None)
    if time is None or any(name not in names for name in _COLUMNS[1:]):
        return None
    return [time, *(names.index(name) for name in _COLUMNS[1:])]


def _arrow_rows(file: Path) -> Iterable[tuple[int, Sequence[Any]]]:
    try:
        import pyarrow
        import pyarrow.feather
        import pyarrow.parquet
    except ImportError as error:
        raise InvalidInputError(f"{file}: reading it needs pyarrow: pip install 'holdfast[parquet]'") from error
    try:
        if file.name.lower().endswith(".parquet"):
            table = pyarrow.parquet.read_table(file)
        else:
            table = pyarrow.feather.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise InvalidInputError(f"{file}: cannot be read: {error!s:.200}") from error
    order = _order([str(name).lower() for name in table.column_names])
    if order is None:
        raise InvalidInputError(
            f"{file}: the columns are {', '.join(table.column_names)[:120]}: "
            "name them open_time, open, high, low, close, volume"
        )
    columns = []
    for at in order:
        column = table.column(at)
        if pyarrow.types.is_timestamp(column.type):
            column = column.cast(pyarrow.timestamp("ms", tz=column.type.tz), safe=False).cast("int64")
        columns.append(column.to_pylist())
    yield from enumerate(zip(*columns, strict=True), 1)


def _milliseconds_scale(value: float) -> tuple[float, str]:
    """Return what to multiply a time with to have milliseconds, judged by its size (years 1973 to 5138)."""
    for low, scale in ((1e8, 1000.0), (1e11, 1.0), (1e14, 1e-3), (1e17, 1e-6)):
        if low <= value < low * 1000:
            return scale, ""
    return 0.0, "not a time in epoch milliseconds (nor seconds, micro- or nanoseconds)"


def _check(source: str, rows: Iterable[tuple[int, Sequence[Any]]]) -> list[Candle]:
    candles: list[Candle] = []
    scale, before_ms = 0.0, -1

    def bad(line: int, what: str) -> InvalidInputError:
        return InvalidInputError(f"{source}, line {line}: {what}")

    for line, row in rows:
        numbers: list[float] = []
        for name, value in zip(_COLUMNS, row, strict=True):
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise bad(line, f"{name} is {value!r:.40}, not a number") from None
            if not math.isfinite(number):
                raise bad(line, f"{name} is {value!r:.40}: every value must be finite")
            numbers.append(number)
        time, open_, high, low, close, volume = numbers
        if not scale:
            scale, wrong = _milliseconds_scale(time)
            if wrong:
                raise bad(line, f"{_COLUMNS[0]} is {row[0]!r:.40}, {wrong}")
        # Whole numbers stay exact: a time in nanoseconds does not fit a float.
        exact = int(row[0]) if isinstance(row[0], int) or str(row[0]).strip().isdigit() else time
        time_ms = exact * int(scale) if scale >= 1 else exact // round(1 / scale)
        if time_ms != int(time_ms) or not 1e11 <= time_ms < 1e14:
            raise bad(line, f"open_time is {row[0]!r:.40}, not in the unit of the first line: use one unit")
        open_ms = int(time_ms)
        if open_ms % MINUTE_MS:
            raise bad(line, f"open_time {row[0]!r:.40} is not the beginning of a minute: use the open time in UTC")
        if open_ms <= before_ms:
            raise bad(line, f"open_time {row[0]!r:.40} is not after the line before it: sort the lines, no repeats")
        if high < low:
            raise bad(line, f"high {high!r} is lower than low {low!r}")
        if not low <= open_ <= high or not low <= close <= high:
            raise bad(
                line, f"open {open_!r} or close {close!r} lies outside low {low!r} to high {high!r}: check columns"
            )
        if low <= 0:
            raise bad(line, f"low is {low!r}: prices must be over 0")
        if volume < 0:
            raise bad(line, f"volume is {volume!r}: it must not be negative")
        candles.append(Candle(open_ms, open_, high, low, close, volume))
        before_ms = open_ms
    if not candles:
        raise InvalidInputError(f"{source}: there is no candle in it")
    return candles
