"""Candle files: what is read, and how a bad line is named."""

from __future__ import annotations

import gzip
import math
import os
import sys
from pathlib import Path

import pytest

from holdfast.errors import InvalidInputError
from holdfast.market.candles_file import read_candles, read_history, symbol_of
from holdfast.market.history import History, infer_interval
from holdfast.market.synthetic import SyntheticMarket
from holdfast.rules.candles import Candle

# Real candles are not part of the repository: a folder beside it, or the one that HOLDFAST_CANDLES names.
REAL = Path(os.environ.get("HOLDFAST_CANDLES") or Path(__file__).parents[2] / "shared" / "data")
T0 = 1_640_995_200_000
ROWS = [(T0 + at * 60_000, 100.0 + at, 102.5 + at, 99.0 + at, 101.25 + at, 7.5) for at in range(4)]
WANTED = [Candle(*row) for row in ROWS]


def _real(name: str) -> Path:
    found = sorted(REAL.glob(f"{name}*.csv.gz"))
    if not found:
        pytest.skip(f"needs the real candle file {name}…csv.gz, which is not here")
    return found[0]


def _text(rows: list[tuple[object, ...]]) -> str:
    return "".join(",".join(map(str, row)) + "\n" for row in rows)


@pytest.mark.parametrize("header", ["", "open_time_ms,open,high,low,close,volume\n", "\ufefftime,o,h,l,c,v\r\n"])
@pytest.mark.parametrize("kind", [".csv", ".csv.gz", ".CSV"])
def test_csv_is_read_with_and_without_header_and_gzip(tmp_path: Path, header: str, kind: str) -> None:
    file = tmp_path / f"BTCUSDT-1m{kind}"
    raw = (header + _text(list(ROWS)) + "\n").encode()
    file.write_bytes(gzip.compress(raw) if kind.endswith(".gz") else raw)
    assert read_candles(file) == WANTED
    assert symbol_of(file) == "BTCUSDT"


def test_further_columns_are_ignored_and_named_columns_may_stand_in_any_order(tmp_path: Path) -> None:
    further = tmp_path / "a.csv"
    further.write_text(_text([(*row, row[0] + 59_999, "x", "") for row in ROWS]))
    assert read_candles(further) == WANTED
    moved = tmp_path / "b.csv"
    moved.write_text("close,volume,Date,open,high,low\n" + _text([(r[4], r[5], r[0], r[1], r[2], r[3]) for r in ROWS]))
    assert read_candles(moved) == WANTED


@pytest.mark.parametrize(("times", "by"), [(1000, "s"), (1, "ms"), (0.001, "us"), (0.000001, "ns")])
def test_seconds_micro_and_nanoseconds_are_recognised(tmp_path: Path, times: float, by: str) -> None:
    file = tmp_path / "a.csv"
    factor = round(1 / times) if times < 1 else 1
    file.write_text(_text([(row[0] * factor // (1000 if by == "s" else 1), *row[1:]) for row in ROWS]))
    assert read_candles(file) == WANTED


def test_a_header_that_hints_at_another_order_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("time,low,high,open,close,amount\n" + _text(list(ROWS)))
    with pytest.raises(InvalidInputError, match="line 1: the header has open in another place"):
        read_candles(file)


BAD = [
    (2, ("x", 1, 1, 1, 1, 1), "line 2: open_time is 'x', not a number"),
    (3, (T0 + 120_000, 1, "", 1, 1, 1), "line 3: high is '', not a number"),
    (2, (T0 + 60_000, "nan", 1, 1, 1, 1), "line 2: open is 'nan': every value must be finite"),
    (2, (T0 + 60_000, 1, "inf", 1, 1, 1), "line 2: high is 'inf': every value must be finite"),
    (4, (T0 + 180_000, 5, 4, 6, 5, 1), "line 4: high 4.0 is lower than low 6.0"),
    (4, (T0 + 180_000, 5, 6, 4, 7, 1), "line 4: open 5.0 or close 7.0 lies outside"),
    (2, (T0 + 60_000, 0, 1, 0, 1, 1), "line 2: low is 0.0: prices must be over 0"),
    (2, (T0 + 60_000, 1, 1, 1, 1, -2), "line 2: volume is -2.0"),
    (3, (T0 + 60_000, 1, 1, 1, 1, 1), f"line 3: open_time '{T0 + 60_000}' is not after the line before it"),
    (1, (0, 1, 1, 1, 1, 1), "line 1: open_time is '0', not a time in epoch milliseconds"),
    (2, (T0 // 1000 + 60, 1, 1, 1, 1, 1), "not in the unit of the first line"),
    (2, (T0 + 60_001, 1, 1, 1, 1, 1), "is not the beginning of a minute"),
    (2, (T0 + 60_000, 1, 1), "line 2: 3 columns where 6 are needed"),
    (1, ("2022-01-01 00:00", 1, 1, 1, 1, 1), "line 1: open_time is '2022-01-01 00:00', not a number"),
]


@pytest.mark.parametrize(("line", "row", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_a_bad_line_is_refused_by_file_line_and_value(
    tmp_path: Path, line: int, row: tuple[object, ...], message: str
) -> None:
    file = tmp_path / "bad.csv"
    rows: list[tuple[object, ...]] = list(ROWS)
    rows[line - 1] = row
    file.write_text(_text(rows))
    with pytest.raises(InvalidInputError) as caught:
        read_candles(file)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.csv", b"", "there is no candle in it"),
        ("a.csv", b"open_time,open,high,low,close,volume\n", "there is no candle in it"),
        ("a.csv", b"\xff\xfe\x00", "not text"),
        ("a.csv.gz", b"plain", "cannot be read"),
        ("a.csv.gz", gzip.compress(b"1,2,3\n" * 99, mtime=0)[:-9], "cut short"),
        ("a.xlsx", b"", "use .csv, .csv.gz, .parquet or .feather"),
        ("a.parquet", b"nothing of the kind", "cannot be read"),
        ("a.feather", b"nothing of the kind", "cannot be read"),
    ],
    ids=["empty", "header only", "not text", "not gzip", "cut short", "unknown kind", "not parquet", "not feather"],
)
def test_a_bad_file_is_one_clear_error(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InvalidInputError, match=message):
        read_candles(tmp_path / name)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_candles(tmp_path / f"absent-{name}".replace(".xlsx", ".csv"))


def test_parquet_and_feather_are_read_with_times_as_numbers_or_timestamps(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.feather as feather
    import pyarrow.parquet as parquet

    columns = {
        name: [row[at] for row in ROWS] for at, name in enumerate(("date", "open", "high", "low", "close", "volume"))
    }
    numbers = pyarrow.table(columns)
    stamps = numbers.set_column(
        0, "Date", numbers["date"].cast(pyarrow.timestamp("ms")).cast(pyarrow.timestamp("ns", "UTC"))
    )
    for at, table in enumerate((numbers, stamps)):
        parquet.write_table(table, tmp_path / f"{at}.parquet")
        feather.write_feather(table, str(tmp_path / f"{at}.feather"))
        assert read_candles(tmp_path / f"{at}.parquet") == WANTED
        assert read_candles(tmp_path / f"{at}.feather") == WANTED
    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "c.parquet")
    with pytest.raises(InvalidInputError, match="the columns are a: name them open_time"):
        read_candles(tmp_path / "c.parquet")


def test_a_missing_extra_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(InvalidInputError, match=r"pip install 'holdfast\[parquet\]'"):
        read_candles(tmp_path / "a.parquet")


@pytest.mark.candles
@pytest.mark.parametrize(
    ("name", "count", "interval"),
    [
        ("BTCUSDT-1m", 29_720, "1m"),
        ("ALTBTC-1m", 13_681, "1m"),
        ("XRPETH-1m", 2_469, "1m"),
        ("XRPUSDT-5m", 1_999, "5m"),
    ],
)
def test_real_files_are_read_whole_gaps_and_all(name: str, count: int, interval: str) -> None:
    candles = read_candles(_real(name))
    assert len(candles) == count
    assert infer_interval(candles) == interval


@pytest.mark.candles
def test_five_minute_files_cannot_be_the_base_but_stand_beside_one_minute_ones(tmp_path: Path) -> None:
    five = _real("XRPUSDT-5m")
    with pytest.raises(InvalidInputError, match="engine steps over one-minute candles: add a one-minute file of XRPUS"):
        read_history([str(five)])
    longer = read_candles(five)
    first_ms = longer[0].open_time_ms
    one = tmp_path / "XRPUSDT-1m.csv"
    one.write_text(_text([(first_ms + at * 60_000, 1, 1, 1, 1, 1) for at in range(60)]))
    history = read_history([str(one), str(five)])
    end_ms = first_ms + 59 * 60_000
    assert history.candles("XRPUSDT", "5m", first_ms, 99, closed_ms=end_ms) == longer[:12]
    assert history.candles("XRPUSDT", "15m", first_ms, 99, closed_ms=end_ms)[0].volume == 15


def test_files_are_named_by_symbol_and_must_share_some_minutes(tmp_path: Path) -> None:
    for name, shift in (("A", 0), ("B", 60_000), ("C", 10**9 // 60_000 * 60_000)):
        (tmp_path / f"{name}.csv").write_text(_text([(row[0] + shift, *row[1:]) for row in ROWS]))
    a, b, c = (str(tmp_path / f"{name}.csv") for name in "ABC")
    both = read_history([a, f"ETH={b}"])
    assert (both.symbols, both.first_ms, both.last_ms) == (("A", "ETH"), T0 + 60_000, T0 + 180_000)
    assert read_history([a, b], ["X", "Y"]).symbols == ("X", "Y")
    with pytest.raises(InvalidInputError, match="no minute is in all candle files"):
        read_history([a, c])
    with pytest.raises(InvalidInputError, match="name one symbol for each file"):
        read_history([a, b], ["X"])
    with pytest.raises(InvalidInputError, match="has 1m candles already"):
        read_history([a, f"A={b}"])


def test_nothing_that_has_not_closed_is_shown_in_any_interval() -> None:
    market = SyntheticMarket(3, ["BTCUSDT"], minutes=600)
    whole = market.candles("BTCUSDT", "1m", 0, 10_000, closed_ms=market.last_ms)
    for closed in range(0, 600, 37):
        closed_ms = market.first_ms + closed * 60_000
        for interval, minutes in (("1m", 1), ("5m", 5), ("15m", 15), ("1h", 60)):
            got = market.candles("BTCUSDT", interval, 0, 10_000, closed_ms=closed_ms)
            assert all(c.open_time_ms + minutes * 60_000 <= closed_ms + 60_000 for c in got)
            assert len(got) >= (closed + 1) // minutes - (closed // 100 + 3 if minutes == 1 else 0)
            for candle in got:
                part = [c for c in whole if 0 <= c.open_time_ms - candle.open_time_ms < minutes * 60_000]
                assert candle == Candle(
                    candle.open_time_ms,
                    part[0].open,
                    max(c.high for c in part),
                    min(c.low for c in part),
                    part[-1].close,
                    math.fsum(c.volume for c in part),
                )


def test_a_longer_candle_is_left_out_where_the_data_begin_or_end_inside_it() -> None:
    history = History({"A": [Candle(T0 + at * 60_000, 1, 1, 1, 1, 1) for at in range(2, 13)]})
    assert [c.open_time_ms - T0 for c in history.candles("A", "5m", 0, 9, closed_ms=T0 + 10**7)] == [300_000]
    assert history.candles("A", "1m", T0, 2, closed_ms=T0 + 10**7) == [
        Candle(T0 + 120_000, 1, 1, 1, 1, 1),
        Candle(T0 + 180_000, 1, 1, 1, 1, 1),
    ]


@pytest.mark.parametrize(
    ("symbol", "interval", "limit", "message"),
    [("B", "1m", 1, "no symbol 'B'"), ("A", "7m", 1, "unknown interval '7m'"), ("A", "1m", 0, "limit is 0")],
)
def test_a_wrong_question_is_refused(symbol: str, interval: str, limit: int, message: str) -> None:
    history = History({"A": WANTED})
    with pytest.raises(InvalidInputError, match=message):
        history.candles(symbol, interval, 0, limit, closed_ms=T0)


def test_the_synthetic_market_is_the_same_everywhere_and_looks_like_a_market() -> None:
    market = SyntheticMarket(7, ["BTCUSDT", "ABC"], minutes=3000)
    again = SyntheticMarket(7, ["ABC", "BTCUSDT"], minutes=3000)
    assert SyntheticMarket(8, ["ABC"], minutes=9).candles("ABC", "1m", 0, 9, closed_ms=10**13) != again.candles(
        "ABC", "1m", 0, 9, closed_ms=10**13
    )
    for symbol in market.symbols:
        candles = market.candles(symbol, "1m", 0, 10_000, closed_ms=market.last_ms)
        assert candles == again.candles(symbol, "1m", 0, 10_000, closed_ms=market.last_ms)
        assert 2950 < len(candles) < 3000
        assert all(c.low <= min(c.open, c.close) <= max(c.open, c.close) <= c.high and c.low > 0 for c in candles)
        assert all(c.volume > 0 and c.open_time_ms % 60_000 == 0 for c in candles)
    # Pinned: another Python version, or another machine, must not change a bit of it.
    assert market.candles("BTCUSDT", "1m", 0, 1, closed_ms=10**13) == [
        Candle(1704067200000, 43000.0, 43014.01, 42999.66, 43005.59, 32.6137)
    ]


@pytest.mark.parametrize(
    "wrong", [{"minutes": 1}, {"start_ms": 7}, {"symbols": ["A", "A"]}, {"symbols": [""]}, {"symbols": []}]
)
def test_wrong_arguments_of_the_synthetic_market_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        SyntheticMarket(1, **wrong)  # type: ignore[arg-type]
