"""Rows come back bit for bit, or are refused; damage of any kind is found."""

from __future__ import annotations

import datetime
import math
import struct
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast import domains
from holdfast.contract import MAX_PAYLOAD_BYTES, Key
from holdfast.domains import context_key, decode, encode, from_mapping, to_mapping
from holdfast.errors import CorruptedError, InvalidInputError, NewerFormatError
from holdfast.names import Context
from holdfast.rows import Entity, Guard, PartialLevels, Row, Signal

BTC = Context("binance", "BTCUSDT", "my-strategy")
KEY = context_key("signal", BTC)
ROW = Signal(
    id="s-1",
    position="long",
    note="breakout",
    price_open=43000.0,
    price_take_profit=44000.0,
    price_stop_loss=42000.0,
    minute_estimated_time=60,
    symbol=BTC.symbol,
    exchange_name=BTC.exchange_name,
    strategy_name=BTC.strategy_name,
    scheduled_at=1_704_067_200_000,
    pending_at=1_704_067_200_000,
)
ENTITY = Key("entity", "e", "1")

text = st.text(st.characters(codec="utf-8"), max_size=40)
plain: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=15,
)


def same(one: Any, other: Any) -> bool:
    """Equal in type and in every bit (1, 1.0 and True differ; 0.0 and -0.0 differ)."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    return bool(one == other)


@given(plain)
@settings(max_examples=300, deadline=None)
def test_plain_values_come_back_bit_for_bit(value: Any) -> None:
    back = decode(ENTITY, encode(ENTITY, Entity(id=1, value=value)))
    assert isinstance(back, Entity) and same(back.value, value)


@given(st.floats(allow_nan=False, allow_infinity=False), st.dictionaries(text, plain, max_size=3))
@settings(max_examples=200, deadline=None)
def test_floats_and_unknown_members_of_a_row_come_back_bit_for_bit(price: float, extra: dict[str, Any]) -> None:
    unknown = {f"x-{name}": value for name, value in extra.items()}
    row = from_mapping("signal", {**to_mapping(ROW), "priceOpen": price, **unknown})
    back = decode(KEY, encode(KEY, row))
    assert isinstance(back, Signal) and same(back.price_open, price)
    assert same(to_mapping(back), to_mapping(row))


@pytest.mark.parametrize(
    "price", [-0.0, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 0.1 + 0.2, 1e16, 2**53]
)
def test_awkward_floats_come_back_bit_for_bit(price: float) -> None:
    back = decode(KEY, encode(KEY, msgspec.structs.replace(ROW, price_open=price)))
    assert isinstance(back, Signal) and same(back.price_open, float(price))


def test_large_finite_floats_whose_sum_overflows_are_no_fault() -> None:
    huge = msgspec.structs.replace(ROW, price_open=1.7e308, price_take_profit=1.7e308)
    assert decode(KEY, encode(KEY, huge)) == huge


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (math.nan, "finite"),
        (math.inf, "finite"),
        ({"a": [-math.inf]}, r"value\.a\[0\]"),
        (2**64, "64 bits"),
        (-(2**63) - 1, "64 bits"),
        (b"bytes", "bytes"),
        (Decimal("1.5"), "Decimal"),
        (datetime.datetime(2024, 1, 1), "datetime"),
        ({1: "x"}, "keys must be text"),
        ("\ud800", "surrogate"),
        ({"\udfff": 1}, "surrogate"),
        ((1, 2), "tuple"),
        ({1, 2}, "set"),
        (object(), "object"),
        (deep(101), "deep"),
        (deep(100_000), "deep"),
    ],
)
def test_what_json_would_not_give_back_is_refused(value: Any, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        encode(ENTITY, Entity(id=1, value=value))
    with pytest.raises(InvalidInputError, match=says.replace("value", "signal.extra.x")):
        encode(KEY, msgspec.structs.replace(ROW, extra={"x": value}))


@pytest.mark.parametrize("price", [math.nan, math.inf, -math.inf, Decimal("1"), "1", None])
def test_a_price_that_is_no_finite_number_is_refused(price: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"signal\.price_open"):
        encode(KEY, msgspec.structs.replace(ROW, price_open=price))


def test_a_row_of_a_hundred_megabytes_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="at most"):
        encode(ENTITY, Entity(id=1, value="x" * 100_000_000))
    with pytest.raises(InvalidInputError, match="at most"):
        encode(KEY, msgspec.structs.replace(ROW, note="x" * MAX_PAYLOAD_BYTES))


def test_a_row_of_another_kind_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="takes a Signal"):
        encode(KEY, Guard(changes=1))


def test_a_member_that_takes_a_reserved_name_is_refused() -> None:
    for name in ("_sum", "_schema", "priceOpen"):
        with pytest.raises(InvalidInputError, match=name):
            encode(KEY, msgspec.structs.replace(ROW, extra={name: 1}))


def test_every_flipped_bit_is_found() -> None:
    payload = encode(KEY, ROW)
    for at in range(len(payload) * 8):
        broken = bytearray(payload)
        broken[at // 8] ^= 1 << at % 8
        with pytest.raises(CorruptedError):
            decode(KEY, bytes(broken))


def test_every_truncation_and_every_emptying_is_found() -> None:
    payload = encode(KEY, ROW)
    for length in range(len(payload)):
        for broken in (payload[:length], payload[:length].ljust(len(payload), b"\0"), payload[length + 1 :]):
            with pytest.raises(CorruptedError):
                decode(KEY, broken)


@pytest.mark.parametrize(
    "other",
    [
        KEY._replace(entity_id="ETHUSDT"),
        KEY._replace(entity_name="ETHUSDT_my-strategy_binance"),
        KEY._replace(domain="schedule"),
        Key("signal", "BTCUSDT", "my-strategy_binance/BTCUSDT"),
    ],
)
def test_a_record_under_another_key_is_found(other: Key) -> None:
    with pytest.raises(CorruptedError, match="another key"):
        decode(other, encode(KEY, ROW))


@pytest.mark.parametrize("payload", [b"", b"{}", b"null", b"\xff" * 40, b"\0" * 4096, b'{"id":"s-1"}', b"[" * 100_000])
def test_foreign_bytes_are_found(payload: bytes) -> None:
    with pytest.raises(CorruptedError):
        decode(KEY, payload)


def sealed(key: Key, text: bytes) -> bytes:
    """Return ``text`` (without its closing brace) with a true checksum."""
    return b'%b,"_sum":"%08x"}' % (text, domains._checksum(key, text))


def test_a_newer_schema_is_refused_by_an_error_of_its_own() -> None:
    with pytest.raises(NewerFormatError, match="upgrade holdfast"):
        decode(KEY, sealed(KEY, b'{"id":"s-1","_schema":2'))
    unknown = Key("future", "a", "b")
    with pytest.raises(NewerFormatError, match="newer version"):
        decode(unknown, sealed(unknown, b'{"_schema":1'))


@pytest.mark.parametrize(
    "text",
    [
        b'{"_schema":1',
        b'{"id":5,"_schema":1',
        b'{"id":"s-1"',
        b'{"_schema":"1"',
        b'{"_schema":0',
        b'[{"_schema":1',
        b'{"priceTakeProfit":null,"_schema":1',
    ],
)
def test_a_true_checksum_does_not_excuse_a_wrong_shape(text: bytes) -> None:
    with pytest.raises(CorruptedError):
        decode(KEY, sealed(KEY, text))


def test_an_older_schema_is_upgraded_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Key("guard", "r", "guard")
    old = sealed(key, b'{"count":"7","kept":[1],"_schema":1')

    def one(plain: dict[str, Any]) -> dict[str, Any]:
        return {"count": int(plain.pop("count")), **plain}

    def two(plain: dict[str, Any]) -> dict[str, Any]:
        return {"changes": plain.pop("count") + 1, **plain}

    monkeypatch.setitem(domains.DOMAINS, "guard", domains.Domain("guard", Guard, 3, {1: one, 2: two}))
    codec = domains._CODECS["guard"]._replace(suffix=b',"_schema":3')
    monkeypatch.setitem(domains._CODECS, "guard", codec)
    row = decode(key, old)
    assert isinstance(row, Guard) and row.changes == 8 and row.extra == {"kept": [1]}
    assert decode(key, encode(key, row)) == row
    with pytest.raises(CorruptedError, match="wrong shape"):
        decode(key, sealed(key, b'{"count":null,"_schema":1'))


def test_a_stored_row_reads_as_the_documents_json() -> None:
    plain = msgspec.json.decode(encode(KEY, ROW))
    assert plain["priceOpen"] == 43000.0 and plain["_isScheduled"] is False and plain["_schema"] == 1
    assert list(plain)[-2:] == ["_schema", "_sum"]


def test_signal_ids_that_are_names_of_object_members_elsewhere_are_ordinary() -> None:
    key = context_key("partial", BTC)
    row = from_mapping("partial", {"levels": {"__proto__": {"profitLevels": [10], "lossLevels": []}}})
    back = decode(key, encode(key, row))
    assert isinstance(back, PartialLevels) and back.levels["__proto__"].profit_levels == (10,)


def test_every_domain_encodes_what_it_decodes() -> None:
    assert {domain.row for domain in domains.DOMAINS.values()} <= set(_all_subclasses(Row))


def _all_subclasses(cls: type[Row]) -> list[type[Row]]:
    return [one for sub in cls.__subclasses__() for one in (sub, *_all_subclasses(sub))]
