"""MongoDB: addresses, what lies in the document, limits, kills and races, and credentials that stay hidden.

The server is SecantusDB, not MongoDB's own: see ``servers/mongo.py``.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import AsyncMongoClient
from servers import require
from servers.mongo import MongoServer, sweep_sockets
from servers.shared import own_name, shared
from sql_ground import kill_a_pouring_process, race_processes

from holdfast.backends.mongo import MongoBackend
from holdfast.backends.mongo.address import parse
from holdfast.backends.mongo.document import (
    ABSENT,
    Asked,
    Known,
    Plan,
    field_of,
    key_of,
    row_bytes,
    writer_field,
    writer_of,
)
from holdfast.contract import MAX_PAYLOAD_BYTES, Key, Op, WriterOp
from holdfast.errors import (
    ConflictError,
    CorruptedError,
    FailedError,
    HoldfastError,
    InvalidInputError,
    NewerFormatError,
    UnavailableError,
    UnknownOutcomeError,
)
from holdfast.urls import open_backend

KEY = Key("signal", "BTCUSDT_my-strategy_binance", "BTCUSDT")
OTHER = Key("signal", "ETHUSDT_my-strategy_binance", "ETHUSDT")
SECRET = "canary7Zq"


def url_of(place: Path) -> str:
    return f"{shared('mongo').url}?collection={own_name(place)}"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[MongoBackend]:
    backend = MongoBackend(url_of(tmp_path))
    await backend.open()
    yield backend
    await backend.close()


@pytest.fixture
async def documents(tmp_path: Path) -> AsyncIterator[Any]:
    """The collection itself, as another hand sees it."""
    client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(shared("mongo").url)
    yield client["bots"][own_name(tmp_path)]
    await client.close()


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[MongoServer]:
    """A server of this test alone, to be killed."""
    require("mongo")
    running = MongoServer("secantus", tmp_path / "mortal")
    yield running
    running.stop()
    sweep_sockets()


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown", "uri"),
    [
        ("mongodb://h/bots", "mongodb://h/bots?collection=holdfast", "mongodb://h/bots"),
        ("mongodb://h:1,[::1]:7/b?collection=c.d&replicaSet=rs", "mongodb://h:1,[::1]:7/b?collection=c.d",
         "mongodb://h:1,[::1]:7/b?replicaSet=rs"),
        ("mongodb+srv://u:p@c0.example.net/bots?retryWrites=true&w=majority&appName=x",
         "mongodb+srv://c0.example.net/bots?collection=holdfast", "mongodb+srv://c0.example.net/bots"),
        ("mongodb://u%40:p%2F@h/bots?authSource=admin&tls=true&readPreference=secondary",
         "mongodb://h/bots?collection=holdfast", "mongodb://h/bots?authSource=admin&tls=true"),
    ],
)  # fmt: skip
def test_an_address_is_read_from_its_url(url: str, shown: str, uri: str) -> None:
    address = parse(url)
    assert (address.shown, address.uri) == (shown, uri)
    assert repr(open_backend(url)) == f"MongoBackend({shown})"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "mongodb:h/d",
        "mongodb://h",
        "mongodb://h/",
        "mongodb:///d",
        "mongodb://h/d/e",
        "mongodb://h/a.b",
        "mongodb://h h/d",
        "mongodb://h:0/d",
        "mongodb://h:99999/d",
        "mongodb://h/d?colour=red",
        "mongodb://h/d?collection=",
        "mongodb://h/d?collection=system.users",
        "mongodb://h/d?collection=a$b",
        "mongodb://h/d?deadline_seconds=0",
        "mongodb://h/d?deadline_seconds=nan",
        "mongodb://h/d?password_env=HOLDFAST_NO_SUCH_VARIABLE",
        "mongodb://h/d?directConnection=maybe",
        "mongodb+srv://h/d",
        "mongodb+srv://a.b.c:1/d",
        "mongodb+srv://a.b.c,d.e.f/d",
        f"mongodb://u:{SECRET}@@h/d",
        f"mongodb://u:{SECRET}#@h/d",
        f"mongodb://u:{SECRET}@h/d?tlsCertificateKeyFile=/nowhere/{SECRET}",
        f"mongodb://h/d?authMechanism={SECRET}",
        f"mongodb://u:{SECRET}@h/d?authMechanism=MONGODB-OIDC&tls=true&tlsInsecure=true&tlsAllowInvalidHostnames=true",
    ],
)
def test_an_address_that_cannot_be_used_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidInputError) as raised:
        MongoBackend(url)
    assert SECRET not in str(raised.value)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_a_password_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOT_MONGO_PASSWORD", SECRET)
    address = parse("mongodb://bot@h/d?password_env=BOT_MONGO_PASSWORD&authSource=admin")
    assert address.credentials() == {"username": "bot", "password": SECRET}
    assert SECRET not in repr(address) + str(address) + address.shown + address.uri


# -- what lies in the document -----------------------------------------------------------------------------------------


async def test_rows_are_read_with_the_driver_as_the_page_says(store: MongoBackend, documents: Any) -> None:
    """``mongosh`` cannot be had here; the same query by the driver."""
    await store.commit("main", {KEY: b'{"priceOpen":42000.5,"note":"\xc3\xa9"}'}, {}, op=Op("bot@1a", 7))
    found = await documents.find_one({"_id": "main"})
    row = found["rows"]["signal/BTCUSDT_my-strategy_binance/BTCUSDT"]
    assert json.loads(row["row"]) == {"priceOpen": 42000.5, "note": "é"}
    assert (row["version"], row["writer"], row["n"]) == (1, "bot@1a", 7)
    assert (found["number"], found["format"]) == (1, 1)
    assert found["writers"] == {"bot@1a": {"n": 7, "number": 1}}


def test_field_names_hold_no_dot_and_different_names_never_meet() -> None:
    parts = ["a", "a.b", "a-b", "a%2Eb", "a~b", "a=b", "a_b", "%2E", "0", "--proto--"]
    keys = [Key(one, two, "x.y") for one in parts for two in parts]
    fields = [field_of(key) for key in keys]
    assert len(set(fields)) == len(keys)
    assert not [field for field in fields if "." in field or "$" in field]
    assert [key_of(field) for field in fields] == keys
    writers = ["a", "a.b", "a%2Eb", "$a", "%24a", "%", "%25", "0", "é ✓", ".", "..", "$"]
    assert len({writer_field(writer) for writer in writers}) == len(writers)
    assert not [writer for writer in writers if "." in writer_field(writer) or "$" in writer_field(writer)]
    assert [writer_of(writer_field(writer)) for writer in writers] == writers


async def test_odd_names_large_numbers_and_dots_stay_exact(store: MongoBackend) -> None:
    top = 2**63 - 1
    key = Key("a.b", "0", "%2E.~=-_")
    for writer in ("a.b", "$where", "0", "a b  c é ✓ 12", "%2E", "__proto__", "x" * 250):
        for n in (2**53, 2**53 + 1, top):
            number = await store.commit("main", {key: b"%d" % n}, {}, op=Op(writer, n))
            assert (await store.read("main", [key]))[key].op == Op(writer, n)
            assert await store.commit("main", {key: b"x"}, {}, op=Op(writer, n)) == number
        assert (await store.head("main")).writers[writer].n == top
    assert [found async for found in store.keys("main")] == [key]


async def test_only_documents_of_its_own_are_touched(store: MongoBackend, documents: Any) -> None:
    await documents.insert_one({"_id": "mine", "colour": "red"})
    await documents.insert_one({"_id": 7, "number": 3})
    await store.commit("main", {KEY: b"1"}, {KEY: 0}, op=Op("w", 1))
    assert [scope async for scope in store.scopes()] == ["main"]
    assert await documents.find_one({"_id": "mine"}) == {"_id": "mine", "colour": "red"}
    names = {document["_id"] async for document in documents.find()}
    assert names <= {"mine", 7, "main", "~barrier"}, "the probe's document is gone"


@pytest.mark.parametrize(
    "change",
    [
        {"rows.signal/BTCUSDT_my-strategy_binance/BTCUSDT": "text"},
        {"rows.signal/BTCUSDT_my-strategy_binance/BTCUSDT": {"row": "1"}},
        {"rows.signal/BTCUSDT_my-strategy_binance/BTCUSDT.row": 7},
        {"rows.signal/BTCUSDT_my-strategy_binance/BTCUSDT.version": "x"},
        {"number": "many"},
        {"rows": [1, 2]},
    ],
    ids=lambda change: next(iter(change))[-12:],
)
async def test_what_another_hand_wrote_is_corrupted_and_nothing_else_escapes(
    store: MongoBackend, documents: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    await store.commit("main", {KEY: b"1"}, {}, op=Op("w", 1))
    await documents.update_one({"_id": "main"}, {"$set": change})
    with pytest.raises(CorruptedError, match="another hand"):
        await store.read("main", [KEY])
    other = MongoBackend(url_of(tmp_path))
    await other.open()
    before = await documents.find_one({"_id": "main"})
    try:
        await other.commit("main", {KEY: b"2"}, {KEY: 1}, op=Op("w", 2))
        assert (await other.read("main", [KEY]))[KEY].payload == b"2", "only its payload was damaged: it is replaced"
    except HoldfastError:
        assert await documents.find_one({"_id": "main"}) == before, "nothing was written over it"
    finally:
        await other.close()


@pytest.mark.parametrize("change", [{"writers.w": "x"}, {"bytes": "x"}, {"writers": None}])
async def test_a_head_that_another_hand_wrote_is_corrupted(
    store: MongoBackend, documents: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    await store.commit("main", {KEY: b"1"}, {}, op=Op("w", 1))
    await documents.update_one({"_id": "main"}, {"$set": change})
    with pytest.raises(CorruptedError, match="another hand"):
        await store.head("main")
    other = MongoBackend(url_of(tmp_path))
    await other.open()
    with pytest.raises(CorruptedError):
        await other.commit("main", {KEY: b"2"}, {KEY: 1}, op=Op("w", 2))
    await other.close()


async def test_a_newer_format_is_refused(store: MongoBackend, documents: Any, tmp_path: Path) -> None:
    await store.commit("main", {KEY: b"1"}, {}, op=Op("w", 1))
    await documents.update_one({"_id": "main"}, {"$set": {"format": 2}})
    other = MongoBackend(url_of(tmp_path))
    await other.open()

    async def names() -> list[Key]:
        return [key async for key in other.keys("main")]

    for call in (
        other.commit("main", {KEY: b"2"}, {KEY: 1}, op=Op("w", 2)),
        other.head("main"),
        other.read("main", [KEY]),
        names(),
    ):
        with pytest.raises(NewerFormatError, match="upgrade"):
            await call
    await other.close()


async def test_a_commit_that_overtakes_a_listing_of_scopes_is_no_alarm(
    store: MongoBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.commit("main", {KEY: b"1"}, {}, op=Op("w", 1))
    assert store._link is not None
    ask = store._link.aggregate

    async def overtaken(*args: Any, **options: Any) -> list[dict[str, Any]]:
        found = await ask(*args, **options)
        await store.commit("main", {KEY: b"2"}, {KEY: 1}, op=Op("w", 2))
        return found

    monkeypatch.setattr(store._link, "aggregate", overtaken)
    assert [scope async for scope in store.scopes()] == ["main"]


# -- the document's size -----------------------------------------------------------------------------------------------


async def test_what_others_commit_while_a_commit_looks_is_no_alarm(
    store: MongoBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read on another connection tells of their commit before the look's answer, which is older, comes."""
    number = await store.commit("main", {KEY: b"1"}, {KEY: 0}, op=Op("w", 1))
    lane = store._lanes["main"]
    find = lane._link.find

    async def overtaken(*arguments: Any) -> Any:
        found = await find(*arguments)
        store._floors["main"] = number + 1
        monkeypatch.setattr(lane._link, "find", find)
        return found

    lane._known = None
    monkeypatch.setattr(lane._link, "find", overtaken)
    assert await store.commit("main", {KEY: b"2"}, {KEY: number}, op=Op("w", 2)) == number + 1


async def test_a_document_that_would_be_too_large_is_refused_before_anything_changes(store: MongoBackend) -> None:
    half = b'"' + b"x" * (MAX_PAYLOAD_BYTES - 2) + b'"'
    version = await store.commit("main", {KEY: half}, {KEY: 0}, op=Op("w", 1))
    refused, small = await asyncio.gather(
        store.commit("main", {OTHER: half[:-1000] + b'"'}, {OTHER: 0}, op=Op("v", 1)),  # there is room in its group
        store.commit("main", {Key("risk", "a", "b"): b"1"}, {}, op=Op("u", 1)),
        return_exceptions=True,
    )
    assert isinstance(refused, UnavailableError)
    assert "several scopes" in str(refused)
    assert "nothing was written" in str(refused)
    assert small == version + 1, "the others of its group do not suffer"
    assert set(await store.read("main", [KEY, OTHER])) == {KEY}
    assert await store.commit("another", {OTHER: half}, {OTHER: 0}, op=Op("v", 1)) == 1, "the remedy works"
    assert await store.commit("main", {KEY: None}, {KEY: version}, op=Op("w", 2)) == 3, "what shrinks it always fits"
    assert await store.commit("main", {OTHER: half}, {OTHER: 0}, op=Op("v", 1)) == 4
    both = {KEY: half, Key("risk", "c", "d"): half}
    with pytest.raises(UnavailableError, match="several scopes"):
        await store.commit("empty", both, {}, op=Op("w", 1))
    assert (await store.head("empty")).number == 0


async def test_a_document_is_filled_to_its_brim_and_the_server_takes_it(store: MongoBackend) -> None:
    """What is counted is never less than what lies there: no commit that passes our count fails at the server."""
    payload = b'"' + b"y" * 1_500_000 + b'"'
    fitted = 0
    for at in range(20):
        try:
            await store.commit("main", {Key("signal", f"S{at}", "x"): payload}, {}, op=Op("w", at + 1))
        except UnavailableError as error:
            assert "several scopes" in str(error)
            break
        fitted += 1
    assert fitted == 11, "16 MiB hold 11 of these"
    keys = [Key("signal", f"S{at}", "x") for at in range(fitted)]
    assert len(await store.read("main", keys)) == fitted


def test_what_a_row_is_counted_as_is_never_less_than_its_bson() -> None:
    from bson import encode

    chance = random.Random(4)
    for _ in range(300):
        key = Key(*("".join(chance.choices("aZ9._-%~=", k=chance.randrange(1, 200))) for _ in range(3)))
        writer = "".join(chance.choices("aé✓.$% ", k=chance.randrange(1, 200)))
        text = "".join(chance.choices('é✓x"\\', k=chance.randrange(0, 300)))
        plan = Plan(_looked_at(key), "0" * 16, 10**9, "mongodb://h/d")
        assert plan.judge(Asked(Op(writer, 2**62), {}, {key: text}, len(text)))
        document = plan.document("main")
        assert len(encode({"rows": document["rows"]})) - len(encode({"rows": {}})) <= row_bytes(key, text, writer)
        assert len(encode(document)) <= plan.bytes + 512 + 64 + len(writer_field(writer).encode())


def _looked_at(*keys: Key) -> Known:
    known = Known(0, "", 0, {})
    known.rows = dict.fromkeys(keys, ABSENT)
    return known


@pytest.mark.parametrize("complete", [False, True])
def test_a_plan_and_what_it_leaves_known_agree_with_a_document_that_took_its_update(complete: bool) -> None:
    """Many groups at random: what the lane remembers is what the document would say."""
    chance = random.Random(11)
    keys = [Key("signal", f"k{at}", "x") for at in range(6)]
    known = _looked_at(*(() if complete else keys))
    known.complete = complete
    document: dict[str, Any] = {}
    ops: dict[str, int] = {}
    for turn in range(400):
        plan = Plan(known, f"tip{turn}", 10**9, "mongodb://h/d")
        for _ in range(chance.randrange(1, 6)):
            writer = f"w{chance.randrange(4)}"
            ops[writer] = ops.get(writer, 0) + chance.randrange(0, 2)
            chosen = chance.sample(keys, chance.randrange(0, 3))
            expect = {key: known.row(key).version for key in chosen if chance.random() < 0.5}
            texts = {key: None if chance.random() < 0.3 else "x" * chance.randrange(50) for key in chosen}
            plan.judge(Asked(Op(writer, ops[writer]), expect, texts, 0))
        if not plan.grants:
            continue
        if not document:
            document = plan.document("main")
        else:
            update = plan.update("main")
            assert all(document[name] == value for name, value in update["q"].items())
            for path, value in update["u"]["$set"].items():
                _set(document, path, value)
            for path in update["u"].get("$unset", {}):
                _set(document, path, None)
        known.advance(plan)
        rows = document["rows"]
        assert known.number == document["number"]
        assert not complete or len(known.rows) == len(rows), "what is gone is forgotten"
        assert {key: known.row(key).version for key in keys} == {
            key: rows[field_of(key)]["version"] if field_of(key) in rows else 0 for key in keys
        }
        assert document["bytes"] == sum(row["bytes"] for row in rows.values())
        assert known.writers == {name: WriterOp(**last) for name, last in document["writers"].items()}


def _set(document: dict[str, Any], path: str, value: object) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        document = document[parent]
    if value is None:
        document.pop(name, None)
    else:
        document[name] = value


# -- several at once ---------------------------------------------------------------------------------------------------


async def test_commits_that_wait_together_share_one_update(store: MongoBackend, documents: Any) -> None:
    await store.commit("main", {}, {}, op=Op("w", 1))
    tips = {(await documents.find_one({"_id": "main"}))["tip"]}
    numbers = await asyncio.gather(*(store.commit("main", {}, {}, op=Op(f"w{i}", 1)) for i in range(100)))
    found = await documents.find_one({"_id": "main"})
    assert sorted(numbers) == list(range(2, 102))
    assert found["number"] == 101
    assert found["tip"] not in tips


async def test_a_conflict_in_a_group_does_not_disturb_the_others(store: MongoBackend) -> None:
    keys = [Key("signal", f"k{i}", "x") for i in range(40)]
    outcomes = await asyncio.gather(
        *(store.commit("main", {key: b"1"}, {key: i % 2}, op=Op(f"w{i}", 1)) for i, key in enumerate(keys)),
        return_exceptions=True,
    )
    assert sorted(o for o in outcomes if isinstance(o, int)) == list(range(1, 21))
    clashes = [o for o in outcomes if isinstance(o, ConflictError)]
    assert [error.key for error in clashes] == keys[1::2]
    assert set(await store.read("main", keys)) == set(keys[::2])


async def test_two_backends_on_one_scope_share_it_without_losing_an_increment(
    store: MongoBackend, tmp_path: Path
) -> None:
    """Both commit groups at the same time, so each often finds that the other was faster."""
    other = MongoBackend(url_of(tmp_path))
    await other.open()

    async def some(backend: MongoBackend, name: str) -> list[int]:
        keys = [Key("signal", name, f"S{at}") for at in range(6)]
        numbers: list[int] = []
        for n in range(1, 11):
            numbers += await asyncio.gather(
                *(backend.commit("main", {key: b"1"}, {}, op=Op(f"{name}-{key.entity_id}", n)) for key in keys)
            )
        return numbers

    one, two = await asyncio.gather(some(store, "one"), some(other, "two"))
    assert sorted(one + two) == list(range(1, 121))
    assert (await store.head("main")).number == 120
    await other.close()


async def test_of_two_who_make_a_scopes_document_at_once_one_is_first(store: MongoBackend, tmp_path: Path) -> None:
    other = MongoBackend(url_of(tmp_path))
    await other.open()
    for turn in range(12):
        answers = await asyncio.gather(
            store.commit(f"s{turn}", {KEY: b"1"}, {KEY: 0}, op=Op("one", 1)),
            other.commit(f"s{turn}", {KEY: b"2"}, {KEY: 0}, op=Op("two", 1)),
            return_exceptions=True,
        )
        won = answers.index(1)
        assert isinstance(answers[1 - won], ConflictError), answers
        assert (await store.read(f"s{turn}", [KEY]))[KEY].payload == (b"1", b"2")[won]
    await other.close()


async def test_a_conflict_is_told_from_what_lies_there_now_not_from_what_is_remembered(
    store: MongoBackend, tmp_path: Path
) -> None:
    other = MongoBackend(url_of(tmp_path))
    await other.open()
    version = await store.commit("main", {KEY: b"1"}, {KEY: 0}, op=Op("w", 1))
    newer = await other.commit("main", {KEY: b"2"}, {KEY: version}, op=Op("v", 1))
    # This backend still remembers the first version; its caller has read the second.
    assert (await store.read("main", [KEY]))[KEY].version == newer
    assert await store.commit("main", {KEY: b"3"}, {KEY: newer}, op=Op("w", 2)) == newer + 1
    with pytest.raises(ConflictError):
        await other.commit("main", {KEY: b"4"}, {KEY: newer}, op=Op("v", 2))
    await other.close()


async def test_processes_that_race_lose_no_increment(tmp_path: Path) -> None:
    await race_processes(url_of(tmp_path), processes=3, times=30)


async def test_a_killed_process_leaves_every_acknowledged_commit(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    acknowledged = 0
    for at in range(4):
        acknowledged += await kill_a_pouring_process(url_of(tmp_path), 15 + 7 * at, writer=f"poured-{at}")
    record_property("proof:mongo clients killed", {"kills": 4, "commits acknowledged, none lost": acknowledged})


async def test_a_server_killed_again_and_again_loses_nothing_that_was_acknowledged(
    mortal: MongoServer, record_property: Callable[[str, object], None]
) -> None:
    backend = MongoBackend(f"{mortal.url}?deadline_seconds=2")
    await backend.open()
    chance, kills, version, n, unknown = random.Random(3), 4, 0, 0, 0
    done = asyncio.Event()

    async def killer() -> None:
        for at in range(1, kills + 1):
            while n < 5 * at:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.sleep(chance.uniform(0, 0.05))
            await asyncio.to_thread(mortal.process.signal, signal.SIGKILL)  # while commits are under way
            await asyncio.to_thread(mortal.kill)
            await asyncio.to_thread(mortal.restart)
        done.set()

    task = asyncio.ensure_future(killer())
    while not done.is_set():
        n += 1
        for _ in range(2000):
            try:
                number = await backend.commit("main", {KEY: b"%d" % n}, {KEY: version}, op=Op("w", n))
                break
            except (UnknownOutcomeError, UnavailableError):
                unknown += 1
                await asyncio.sleep(0.01)
        assert number == version + 1, "each op is counted once"
        version = number
    await task
    fresh = MongoBackend(mortal.url)
    await fresh.open()
    record = (await fresh.read("main", [KEY]))[KEY]
    assert (record.version, record.op) == (version, Op("w", n))
    assert n >= 5 * kills
    await fresh.close()
    await backend.close()
    record_property("proof:mongo kills", {"of the server": kills, "commits meanwhile": n})


# -- credentials, the command line -------------------------------------------------------------------------------------


async def test_credentials_are_never_seen(
    mortal: MongoServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("BOT_MONGO_PASSWORD", SECRET)
    seen: list[str] = []

    async def refused(url: str) -> None:
        backend = MongoBackend(url)
        with pytest.raises(HoldfastError) as raised:
            await backend.open()
        error: BaseException | None = raised.value
        while error is not None:
            seen.extend((str(error), repr(error.__dict__)))
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        seen.append("".join(traceback.format_exception(raised.value)))
        seen.append(repr(backend))

    here = f"127.0.0.1:{mortal.port}"
    await refused(f"mongodb://{SECRET}:{SECRET}@{here}/bots?deadline_seconds=2")
    await refused(f"mongodb://bot@{here}/bots?password_env=BOT_MONGO_PASSWORD&deadline_seconds=2")
    await refused(f"mongodb://bot:{SECRET}@127.0.0.1:1/bots?deadline_seconds=0.3")
    backend = MongoBackend(f"{mortal.url}?deadline_seconds=1.5")
    await backend.open()
    await backend.commit("main", {KEY: b"1"}, {}, op=Op("w", 1))
    mortal.kill()
    for call in (
        backend.commit("main", {KEY: b'"row-canary"'}, {}, op=Op("w", 2)),
        backend.read("main", [KEY]),
        backend.head("main"),
    ):
        with pytest.raises((UnavailableError, UnknownOutcomeError)) as raised:
            await call
        seen.append("".join(traceback.format_exception(raised.value)))
    await backend.close()
    assert SECRET not in "\n".join(seen)
    assert "row-canary" not in "\n".join(seen)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("holdfast")]
    assert SECRET not in "\n".join(ours)
    assert SECRET not in caplog.text


async def test_a_backend_is_opened_once_and_leaves_nothing_running(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    backend = MongoBackend(url_of(tmp_path))
    await backend.open()
    with pytest.raises(FailedError, match="open already"):
        await backend.open()
    await backend.commit("main", {KEY: b"1"}, {}, op=Op("w", 1))
    await backend.close()
    assert asyncio.all_tasks() == before
    await backend.open()
    assert (await backend.read("main", [KEY]))[KEY].payload == b"1"
    await backend.close()


async def test_the_command_line_takes_the_url(store: MongoBackend, tmp_path: Path) -> None:
    await store.commit("main", {KEY: b"1"}, {}, op=Op("w", 1))
    for words, said in ((["doctor"], "a power cut of the machine"), (["check"], "")):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "holdfast.cli", *words, url_of(tmp_path), "--plain",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        out, _ = await process.communicate()
        assert said in out.decode(), out.decode()
        assert "Traceback" not in out.decode()
