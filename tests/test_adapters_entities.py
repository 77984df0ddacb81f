"""``PersistBase``: values of the user's own, in files."""

from __future__ import annotations

import asyncio
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from process_store import fresh_process

from holdfast.contract import Op
from holdfast.documents.adapters import PersistBase, close_stores, default_store
from holdfast.documents.entities import natural_order
from holdfast.documents.shared import store_at
from holdfast.errors import CorruptedError, InvalidInputError, NotFoundError
from holdfast.names import quote

__all__ = ["fresh_process"]
pytestmark = pytest.mark.usefixtures("fresh_process")


async def collected(values: Any) -> list[Any]:
    return [value async for value in values]


@pytest.fixture(params=["./notes", "./dump/data"])
def entity(request: pytest.FixtureRequest, fresh_process: Path) -> PersistBase:
    return PersistBase("my-entity", request.param)


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True, "é"]}, [], 0, -0.0, "", None, 5e-324, 2**63])
async def test_a_value_comes_back_after_a_restart(entity: PersistBase, value: Any) -> None:
    await entity.wait_for_init(True)
    assert not await entity.has_value("x")
    await entity.write_value("x", value)
    await close_stores()
    assert await entity.has_value("x")
    assert repr(await entity.read_value("x")) == repr(value)  # the sign of zero too


async def test_a_missing_value_is_a_clear_error(entity: PersistBase) -> None:
    for call in (entity.read_value, entity.remove_value):
        with pytest.raises(NotFoundError, match="my-entity"):
            await call("nothing")
    await entity.write_value("x", 1)
    await entity.remove_value("x")
    assert not await entity.has_value("x") and await entity.get_count() == 0


async def test_ids_are_listed_in_natural_order_as_they_were_given(entity: PersistBase) -> None:
    given: list[str | int] = ["b10", "b2", 10, 2, "B1", "a", "Á2", "á1", "x" * 400, "z", 0, -3, "1_000", "9" * 5000]
    for number, entity_id in enumerate(given):
        await entity.write_value(entity_id, number)
    ids = await collected(entity.keys())
    assert {(type(i), i) for i in ids} == {(type(i), i) for i in given}
    assert [i for i in ids if i in ("b10", "b2", "B1")] == ["B1", "b2", "b10"]
    assert [i for i in ids if isinstance(i, int) and i >= 0] == [0, 2, 10]
    assert [i for i in ids if i in ("a", "Á2", "á1")] == ["a", "á1", "Á2"]
    assert await collected(entity.values()) == await collected(entity) == [given.index(i) for i in ids]


def test_natural_order_is_total() -> None:
    texts = ["", "1", "01", "a1", "A1", "a01", "1a", "a", "á", "10", "2", "-", "_", "٣", "²"]
    assert sorted(texts, key=natural_order) == sorted(sorted(texts, reverse=True), key=natural_order)


async def test_filter_and_take(entity: PersistBase) -> None:
    for number in range(12):
        await entity.write_value(number, number)
    assert await collected(entity.filter(lambda value: value % 2 == 1)) == [1, 3, 5, 7, 9, 11]
    assert await collected(entity.take(0)) == []
    assert await collected(entity.take(3)) == [0, 1, 2]
    assert await collected(entity.take(2, lambda value: value > 4)) == [5, 6]
    assert await collected(entity.take(100)) == list(range(12))
    assert await entity.get_count() == 12
    for bad in (-1, 1.5, True, None):
        with pytest.raises(InvalidInputError):
            await collected(entity.take(bad))  # type: ignore[arg-type]


async def test_remove_all_removes_this_entity_only(entity: PersistBase) -> None:
    other = PersistBase("my-entity*", entity.base_dir)
    await entity.write_value("a", 1)
    await other.write_value("a", 2)
    await entity.remove_all()
    await entity.remove_all()
    assert await collected(entity) == [] and await collected(other) == [2]


async def test_a_damaged_value_stops_only_itself(entity: PersistBase) -> None:
    for number in range(3):
        await entity.write_value(number, number)
    store = await entity._shared().store()
    key = entity._key(1)
    await store.home.backend.commit("main", {key: b"torn"}, {}, op=Op("vandal", 1))
    seen = []
    with pytest.raises(CorruptedError) as caught:
        async for value in entity:
            seen.append(value)  # noqa: PERF401
    assert seen == [0, 2] and caught.value.key == key
    assert await entity.read_value(2) == 2
    with pytest.raises(CorruptedError):
        await entity.read_value(1)
    await entity.write_value(1, "new")
    assert await collected(entity) == [0, "new", 2]


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, 2**64, b"x", Decimal(1), {1: 2}, (1,), "\ud800", "x" * 100_000_000, object()]
)
async def test_what_cannot_be_given_back_is_refused_and_nothing_is_written(entity: PersistBase, value: Any) -> None:
    await entity.write_value("x", "before")
    with pytest.raises(InvalidInputError):
        await entity.write_value("x", value)
    assert await entity.read_value("x") == "before"


@pytest.mark.parametrize("entity_id", ["", None, True, 1.5, b"x", 2**70, "\ud800"])
async def test_what_is_no_id_is_refused(entity: PersistBase, entity_id: Any) -> None:
    for call in (entity.read_value(entity_id), entity.has_value(entity_id), entity.write_value(entity_id, 1)):
        with pytest.raises(InvalidInputError):
            await call


@pytest.mark.parametrize(("name", "base_dir"), [("", "./x"), (5, "./x"), ("a", 5), ("a", "x\0y"), ("\ud800", "./x")])
def test_what_is_no_name_or_directory_is_refused(name: Any, base_dir: Any) -> None:
    with pytest.raises(InvalidInputError):
        PersistBase(name, base_dir)


async def test_instances_over_one_directory_share_its_store(fresh_process: Path) -> None:
    one, two = PersistBase("e", "./notes"), PersistBase("e", fresh_process / "notes")
    await asyncio.gather(one.wait_for_init(True), two.wait_for_init(True), one.write_value("x", 1))
    assert await two.read_value("x") == 1
    assert await store_at(fresh_process / "notes").store() is await one._shared().store()
    assert PersistBase("e")._shared() is not one._shared()
    assert await PersistBase("e")._shared().store() is await default_store()


async def test_values_lie_in_the_documents_layout(fresh_process: Path) -> None:
    await PersistBase("my-entity", "./notes").write_value("key1", {"data": "value"})
    await close_stores()
    [file] = [path for path in (fresh_process / "notes").rglob("*.json") if ".holdfast" not in path.parts]
    assert file.relative_to(fresh_process / "notes").as_posix() == "my-entity/key1.json"
    assert '"value":{"data":"value"}' in file.read_text().replace(" ", "").replace("\n", "")


async def test_overlapping_writes_end_on_the_last_call(entity: PersistBase) -> None:
    for round_ in range(10):
        await asyncio.gather(*(entity.write_value("x", (round_ * 20) + n) for n in range(20)))
        assert await entity.read_value("x") == round_ * 20 + 19


async def test_a_cut_name_does_not_hide_its_id(entity: PersistBase) -> None:
    long = "é" * 400
    assert "~" in quote(long)
    await entity.write_value(long, 1)
    assert await collected(entity.keys()) == [long]
