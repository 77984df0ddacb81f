"""A user's own four-method class as the place of one domain."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import pytest
from process_store import signal, slot

from holdfast.contract import How, Key, KeyPrefix, Op, Survives
from holdfast.documents.custom import CustomBackend
from holdfast.documents.shapes import positions_of, row_of
from holdfast.domains import context_key, encode, risk_key
from holdfast.errors import (
    ConflictError,
    CorruptedError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
    UnknownOutcomeError,
)
from holdfast.names import Context
from holdfast.rows import RiskPosition

BTC = Context("binance", "BTCUSDT", "my-strategy")
KEY = context_key("signal", BTC)


class Plain:
    """Inherits nothing; its methods are ordinary functions."""

    values: ClassVar[dict[tuple[str, str, str], Any]] = {}
    calls: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, entity_name: str, base_dir: str) -> None:
        self.place = (base_dir, entity_name)
        self.calls.append(("made", entity_name))

    def wait_for_init(self, initial: bool) -> None:
        self.calls.append(("init", initial))

    def has_value(self, entity_id: str) -> bool:
        self.calls.append(("has", entity_id))
        return (*self.place, entity_id) in self.values

    def read_value(self, entity_id: str) -> Any:
        self.calls.append(("read", entity_id))
        return self.values[(*self.place, entity_id)]

    def write_value(self, entity_id: str, entity: Any) -> None:
        self.calls.append(("write", entity_id, entity))
        self.values[(*self.place, entity_id)] = entity


class Awaited(Plain):
    """The same with coroutines."""

    async def wait_for_init(self, initial: bool) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().wait_for_init(initial)

    async def has_value(self, entity_id: str) -> bool:  # type: ignore[override]
        return super().has_value(entity_id)

    async def read_value(self, entity_id: str) -> Any:
        return super().read_value(entity_id)

    async def write_value(self, entity_id: str, entity: Any) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().write_value(entity_id, entity)


@pytest.fixture(autouse=True)
def empty() -> None:
    Plain.values.clear()
    Plain.calls.clear()


def of(domain: str, cls: type = Plain) -> CustomBackend:
    return CustomBackend(cls, f"./dump/data/{domain}/", domain)


def payload(key: Key, value: Any) -> bytes:
    row = row_of(key, value)
    assert row is not None
    return encode(key, row)


@pytest.mark.parametrize("cls", [Plain, Awaited])
async def test_the_class_is_given_the_documents_plain_values(cls: type) -> None:
    backend = of("signal", cls)
    number = await backend.commit("main", {KEY: payload(KEY, signal())}, {KEY: 0}, op=Op("w", 1))
    assert Plain.calls[-1] == ("write", "BTCUSDT", signal())
    assert ("made", "BTCUSDT_my-strategy_binance") in Plain.calls
    record = (await backend.read("main", [KEY]))[KEY]
    assert (record.payload, record.version, record.op) == (payload(KEY, signal()), number, Op("w", 1))
    await backend.commit("main", {KEY: None}, {KEY: number}, op=Op("w", 2))
    assert Plain.calls[-1][2] is None
    assert await backend.read("main", [KEY]) == {}  # null means nothing


async def test_read_value_is_not_called_where_has_value_says_no() -> None:
    assert await of("signal").read("main", [KEY]) == {}
    assert not [call for call in Plain.calls if call[0] == "read"]


@pytest.mark.parametrize("cls", [Plain, Awaited])
async def test_wait_for_init_runs_once_however_many_callers_come_first(cls: type) -> None:
    backend = of("signal", cls)
    await asyncio.gather(*(backend.read("main", [KEY]) for _ in range(10)))
    await backend.commit("main", {KEY: None}, {}, op=Op("w", 1))
    assert [call for call in Plain.calls if call[0] in ("made", "init")] == [("made", KEY.entity_name), ("init", True)]


async def test_a_failed_wait_for_init_is_tried_again() -> None:
    class Late(Plain):
        tries = 0

        def wait_for_init(self, initial: bool) -> None:
            type(self).tries += 1
            if self.tries == 1:
                raise OSError("refused")

    backend = of("signal", Late)
    with pytest.raises(UnavailableError, match="refused") as caught:
        await backend.read("main", [KEY])
    assert isinstance(caught.value.__cause__, OSError)
    assert await backend.read("main", [KEY]) == {} and Late.tries == 2


@pytest.mark.parametrize("method", ["__init__", "wait_for_init", "has_value", "read_value"])
async def test_what_the_class_raises_before_a_write_is_unavailable(method: str) -> None:
    def broken(self: Any, *args: Any) -> Any:
        raise RuntimeError("boom")

    Plain.values["./dump/data/signal/", KEY.entity_name, "BTCUSDT"] = signal()
    backend = of("signal", type("Broken", (Plain,), {method: broken}))
    with pytest.raises(UnavailableError) as caught:
        await backend.read("main", [KEY])
    assert isinstance(caught.value.__cause__, RuntimeError)


async def test_what_write_value_raises_is_an_unknown_outcome_and_the_same_op_may_be_sent_again() -> None:
    class Flaky(Plain):
        broken = True

        def write_value(self, entity_id: str, entity: Any) -> None:
            super().write_value(entity_id, entity)
            if self.broken:
                raise TimeoutError("no answer")

    backend = of("signal", Flaky)
    changes = {KEY: payload(KEY, signal())}
    with pytest.raises(UnknownOutcomeError) as caught:
        await backend.commit("main", changes, {KEY: 0}, op=Op("w", 1))
    assert isinstance(caught.value.__cause__, TimeoutError)
    Flaky.broken = False
    number = await backend.commit("main", changes, {KEY: 0}, op=Op("w", 1))
    assert await backend.commit("main", changes, {KEY: 0}, op=Op("w", 1)) == number
    assert (await backend.head("main")).writers["w"].number == number
    with pytest.raises(ConflictError):
        await backend.commit("main", {KEY: None}, {}, op=Op("w", 0))


async def test_a_row_that_somebody_else_wrote_has_a_new_version() -> None:
    backend = of("signal")
    first = await backend.commit("main", {KEY: payload(KEY, signal())}, {}, op=Op("w", 1))
    assert (await backend.read("main", [KEY]))[KEY].version == first
    Plain.values["./dump/data/signal/", KEY.entity_name, "BTCUSDT"] = signal(note="changed")
    assert (await backend.read("main", [KEY]))[KEY].version > first
    with pytest.raises(ConflictError):
        await backend.commit("main", {KEY: None}, {KEY: first}, op=Op("w", 2))


@pytest.mark.parametrize(
    "missing", [("note",), ("pendingAt",), ("scheduledAt",), ("_isScheduled",), ("note", "symbol")]
)
async def test_members_that_the_documents_leave_out_are_filled_in(missing: tuple[str, ...]) -> None:
    value = {name: item for name, item in signal(note="").items() if name not in missing}
    Plain.values["./dump/data/signal/", KEY.entity_name, "BTCUSDT"] = value
    assert (await of("signal").read("main", [KEY]))[KEY].payload == payload(KEY, signal(note=""))


@pytest.mark.parametrize(
    "value",
    [5, "text", [], {}, {"id": "x"}, signal(priceOpen="1"), signal(position="up"), signal(priceOpen=float("nan"))],
)
async def test_a_value_of_the_wrong_shape_is_damage_and_stays_where_it_is(value: Any) -> None:
    place = ("./dump/data/signal/", KEY.entity_name, "BTCUSDT")
    Plain.values[place] = value
    with pytest.raises(CorruptedError) as caught:
        await of("signal").read("main", [KEY])
    assert caught.value.key == KEY and Plain.values[place] is value


async def test_a_profile_is_the_documents_list_under_positions() -> None:
    backend = of("risk")
    rows = positions_of("r", [slot("b", "BTCUSDT"), slot("a", "ETHUSDT")])
    changes = {key: encode(key, row) for key, row in rows.items()}
    await backend.commit("main", changes, dict.fromkeys(rows, 0), op=Op("w", 1))
    assert Plain.calls[-1][:2] == ("write", "positions")
    written = Plain.values["./dump/data/risk/", "r", "positions"]
    assert [name for name, _ in written] == ["b:BTCUSDT", "a:ETHUSDT"] and written[0][1]["openTimestamp"]
    slot_key = risk_key("r", BTC)
    one = RiskPosition(strategy_name="my-strategy", exchange_name="binance", symbol="BTCUSDT", open_timestamp=1)
    await backend.commit("main", {slot_key: encode(slot_key, one)}, {}, op=Op("w", 2))
    names = [name for name, _ in Plain.values["./dump/data/risk/", "r", "positions"]]
    assert names == ["b:BTCUSDT", "a:ETHUSDT", "my-strategy:BTCUSDT"]
    found = await backend.read("main", [slot_key, *rows])
    assert set(found) == {slot_key, *rows}
    assert {key async for key in backend.keys("main", KeyPrefix("risk", "r"))} == set(found)
    first = next(iter(rows))
    await backend.commit("main", {first: None}, {first: found[first].version}, op=Op("w", 3))
    names = [name for name, _ in Plain.values["./dump/data/risk/", "r", "positions"]]
    assert names == ["a:ETHUSDT", "my-strategy:BTCUSDT"]


async def test_one_bad_pair_stops_only_itself_and_is_kept() -> None:
    bad = ["a:B", {"strategyName": "other"}]
    Plain.values["./dump/data/risk/", "r", "positions"] = [slot("b", "BTCUSDT"), bad]
    backend = of("risk")
    good, *_ = positions_of("r", [slot("b", "BTCUSDT")])
    assert list(await backend.read("main", [good])) == [good]
    damaged = [key async for key in backend.keys("main", KeyPrefix("risk", "r")) if key != good]
    with pytest.raises(CorruptedError):
        await backend.read("main", damaged)
    await backend.commit("main", {good: None}, {}, op=Op("w", 1))
    assert Plain.values["./dump/data/risk/", "r", "positions"] == [bad]


async def test_levels_are_the_documents_object_under_levels() -> None:
    backend, key = of("partial"), context_key("partial", BTC)
    value = {"s-1": {"profitLevels": [10, 20], "lossLevels": []}}
    await backend.commit("main", {key: payload(key, value)}, {}, op=Op("w", 1))
    assert Plain.calls[-1] == ("write", "levels", value)
    await backend.commit("main", {key: None}, {}, op=Op("w", 2))
    assert Plain.calls[-1] == ("write", "levels", {}) and await backend.read("main", [key]) == {}


async def test_keys_are_those_of_the_entity_asked_for_or_met() -> None:
    Plain.values["./dump/data/signal/", KEY.entity_name, "BTCUSDT"] = signal()
    backend = of("signal")
    assert [key async for key in backend.keys("main")] == []
    assert [key async for key in backend.keys("main", KeyPrefix("signal", KEY.entity_name))] == [KEY]
    assert [key async for key in backend.keys("main", KeyPrefix("signal"))] == [KEY]
    assert [key async for key in backend.keys("main", KeyPrefix("risk"))] == []
    assert [scope async for scope in backend.scopes()] == []


async def test_it_promises_little_and_says_so() -> None:
    found = await of("signal").open()
    assert found.survives is Survives.PROCESS and found.survives_how is How.ASSUMED
    assert not found.atomic and not found.fenced and "Plain" in found.warnings[0]


async def test_close_closes_the_instances_and_the_next_use_makes_new_ones() -> None:
    class Closing(Plain):
        closed: ClassVar[list[str]] = []

        async def close(self) -> None:
            self.closed.append(self.place[1])
            if len(self.closed) == 2:
                raise OSError("stuck")

    backend = of("signal", Closing)
    await backend.read("main", [KEY])
    await backend.close()
    await backend.read("main", [KEY])
    assert Closing.closed == [KEY.entity_name]
    assert Plain.calls.count(("init", True)) == 2
    with pytest.raises(UnavailableError, match="stuck"):
        await backend.close()


@pytest.mark.parametrize("cls", [object, Plain("a", "b"), "Plain", None, type("Half", (), {"has_value": lambda s: 1})])
def test_what_is_no_persistence_class_is_refused(cls: Any) -> None:
    with pytest.raises(InvalidInputError):
        of("signal", cls)
    with pytest.raises(InvalidInputError):
        of("owner")


def test_it_works_from_one_event_loop_to_the_next() -> None:
    backend = of("signal", Awaited)

    async def busy() -> None:
        reads = [backend.read("main", [KEY]) for _ in range(5)]
        writes = [backend.commit("main", {KEY: payload(KEY, signal())}, {}, op=Op(f"w{n}", 1)) for n in range(5)]
        await asyncio.gather(*reads, *writes)

    for _ in range(3):
        asyncio.run(busy())
    assert Plain.calls.count(("init", True)) == 1


async def test_a_class_that_raises_our_own_not_found_is_taken_at_its_word() -> None:
    class Missing(Plain):
        def has_value(self, entity_id: str) -> bool:
            return True

        def read_value(self, entity_id: str) -> Any:
            raise NotFoundError("gone meanwhile")

    with pytest.raises(UnavailableError):
        await of("signal", Missing).read("main", [KEY])
