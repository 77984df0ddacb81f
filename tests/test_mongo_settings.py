"""MongoDB: what ``open`` says of right and wrong servers, real ones and (where none can be had) a small fake.

None of the real ones is MongoDB's own server: see ``servers/mongo.py``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from mongo_fake import FakeMongo
from servers import require
from servers.mongo import MongoServer
from servers.shared import own_name, shared

from holdfast.backends.mongo import MongoBackend
from holdfast.backends.mongo.attest import Facts, Member, judge
from holdfast.contract import Guarantees, How, Key, Op, Survives
from holdfast.errors import (
    ConflictError,
    FailedError,
    FullError,
    HoldfastError,
    UnavailableError,
    UnknownOutcomeError,
    UnsafeSettingError,
)

KEY = Key("signal", "BTCUSDT_a_x", "BTCUSDT")


async def opened(url: str, *, read_only: bool = False) -> Guarantees:
    backend = MongoBackend(url)
    try:
        return await backend.open(read_only=read_only)
    finally:
        await backend.close()


def members(*hosts: str, arbiters: int = 0, silent: int = 0) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = [{"_id": at, "host": f"{host}:27017"} for at, host in enumerate(hosts)]
    told += [{"_id": 50 + at, "host": f"arbiter{at}:27017", "arbiterOnly": True} for at in range(arbiters)]
    return told + [{"_id": 90 + at, "host": f"silent{at}:27017", "votes": 0} for at in range(silent)]


# -- real servers ------------------------------------------------------------------------------------------------------


async def test_one_member_is_a_host_attested_and_what_is_missing_is_told(tmp_path: Path) -> None:
    promised = await opened(f"{shared('mongo').url}?collection={own_name(tmp_path)}")
    assert (promised.survives, promised.survives_how) == (Survives.HOST, How.ATTESTED)
    assert (promised.atomic, promised.fenced, promised.shared) == (True, True, True)
    assert (promised.atomic_how, promised.fenced_how) == (How.ASSUMED, How.ATTESTED)
    assert "1 of the 3 members" in promised.warnings[0]


async def test_a_server_that_stands_alone_is_a_host_and_warned_of(tmp_path: Path) -> None:
    require("mongo")
    server = MongoServer("secantus", tmp_path / "alone", "--standalone")
    try:
        promised = await opened(server.url)
        assert (promised.survives, promised.survives_how) == (Survives.HOST, How.ATTESTED)
        assert any("stands alone" in warning for warning in promised.warnings)
    finally:
        server.stop()


@pytest.mark.parametrize("read_only", [False, True], ids=["to-write", "to-read"])
async def test_nx_which_confirms_what_it_cannot_have_is_found_out(tmp_path: Path, read_only: bool) -> None:
    """A real server that says yes to ``w: 50``; also ``holdfast doctor``, which opens to read, must say so."""
    with pytest.raises(UnsafeSettingError, match="copies must have"):
        await opened(shared("mongo-nx").url, read_only=read_only)


async def test_a_default_write_concern_of_one_is_irrelevant_since_each_commit_sets_its_own(tmp_path: Path) -> None:
    url = f"{shared('mongo').url}?collection={own_name(tmp_path)}&w=1&journal=false&retryWrites=true"
    assert (await opened(url)).survives is Survives.HOST


# -- the fake ----------------------------------------------------------------------------------------------------------

THREE = members("a", "b", "c")
RIGHT: list[tuple[str, FakeMongo, Survives, How, str]] = [
    ("three members", FakeMongo(*THREE), Survives.SERVER, How.ATTESTED, ""),
    ("five members", FakeMongo(*members("a", "b", "c", "d", "e")), Survives.SERVER, How.ATTESTED, ""),
    ("three and one that has no vote", FakeMongo(*members("a", "b", "c", silent=1)), Survives.SERVER, How.ATTESTED, ""),
    ("two and an arbiter", FakeMongo(*members("a", "b", arbiters=1)), Survives.SERVER, How.ATTESTED, "arbiter"),
    ("two members", FakeMongo(*members("a", "b")), Survives.HOST, How.ATTESTED, "2 of the 3"),
    ("one with a vote and two without", FakeMongo(*members("a", silent=2)), Survives.HOST, How.ATTESTED, "1 of the 3"),
    ("one and two arbiters", FakeMongo(*members("a", arbiters=2)), Survives.HOST, How.ATTESTED, "1 of the 3"),
    ("three on one machine", FakeMongo(*members("a", "a", "a")), Survives.HOST, How.ATTESTED, "on one machine"),
    ("two of three on one machine", FakeMongo(*members("a", "a", "b")), Survives.HOST, How.ATTESTED, "on one machine"),
    ("the configuration is hidden", FakeMongo(*THREE, forbidden=("replSetGetConfig",)), Survives.SERVER, How.ASSUMED,
     "clusterMonitor"),
    ("the storage engine is hidden", FakeMongo(*THREE, forbidden=("serverStatus",)), Survives.SERVER, How.ASSUMED,
     "storage engine"),
    ("options are hidden", FakeMongo(*THREE, forbidden=("getCmdLineOpts",)), Survives.SERVER, How.ATTESTED, ""),
    ("no journal by default", FakeMongo(*THREE, journal_default=False), Survives.SERVER, How.ATTESTED,
     "writeConcernMajorityJournalDefault"),
    ("in memory", FakeMongo(*THREE, persistent=False), Survives.NOTHING, How.ATTESTED, "wiredTiger"),
    ("alone", FakeMongo(), Survives.HOST, How.ATTESTED, "stands alone"),
    ("a router", FakeMongo(router=True), Survives.HOST, How.ASSUMED, "mongos"),
]  # fmt: skip


@pytest.mark.parametrize(("fake", "survives", "how", "warned"), [case[1:] for case in RIGHT], ids=[c[0] for c in RIGHT])
async def test_what_survives_is_never_told_better_than_it_is(
    fake: FakeMongo, survives: Survives, how: How, warned: str
) -> None:
    async with fake:
        promised = await opened(fake.url)
    assert (promised.survives, promised.survives_how) == (survives, how)
    assert warned in " ".join(promised.warnings)
    assert bool(promised.warnings) == bool(warned)


WRONG: list[tuple[str, FakeMongo, type[HoldfastError], str]] = [
    ("a secondary", FakeMongo(*THREE, secondary=True), UnsafeSettingError, "secondary"),
    ("no journal", FakeMongo(journal=False), UnsafeSettingError, "journal"),
    ("the journal is off among the options", FakeMongo(parsed={"storage": {"journal": {"enabled": False}}}),
     UnsafeSettingError, "journal"),
    ("it confirms the impossible", FakeMongo(*THREE, honest=False), UnsafeSettingError, "copies must have"),
    ("a majority is away", FakeMongo(*THREE, confirms=False), UnavailableError, "majority"),
    ("updates win that should not", FakeMongo(*THREE, careless=True), UnsafeSettingError, "4 of 4 updates"),
    ("a user who may not write", FakeMongo(*THREE, forbidden=("insert", "update", "delete")), UnavailableError,
     "readWrite"),
]  # fmt: skip


@pytest.mark.parametrize(("fake", "kind", "said"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
async def test_what_voids_the_promise_is_refused_with_the_setting_to_change(
    fake: FakeMongo, kind: type[HoldfastError], said: str
) -> None:
    async with fake:
        with pytest.raises(kind, match=said):
            await opened(fake.url)
        assert not [name for name in fake.documents if not name.startswith("~probe:")], "nothing of ours is left"


async def test_a_reader_who_may_not_write_is_told_that_nothing_was_probed() -> None:
    async with FakeMongo(*THREE, forbidden=("insert", "update", "delete")) as fake:
        promised = await opened(fake.url, read_only=True)
        assert fake.documents == {}
    assert (promised.survives_how, promised.fenced_how) == (How.ASSUMED, How.ASSUMED)
    assert "readWrite" in " ".join(promised.warnings)


@pytest.mark.parametrize("secondary", [True, False])
async def test_opening_to_read_writes_nothing(secondary: bool) -> None:
    async with FakeMongo(*THREE, secondary=secondary) as fake:
        if secondary:
            with pytest.raises(UnsafeSettingError):
                await opened(fake.url, read_only=True)
        else:
            await opened(fake.url, read_only=True)
        writes = [command for command in fake.seen if next(iter(command)) in ("insert", "update", "delete")]
        assert {command["updates"][0]["q"]["_id"] for command in writes} <= {"~nowhere"}, "they match no document"
        assert not any(command["updates"][0].get("upsert") for command in writes)
        assert fake.documents == {}


@pytest.mark.parametrize(
    "facts",
    [
        Facts(),
        Facts(writable=False),
        Facts(writable=True, impossible_refused=False, journaled_taken=True, persistent=True),
        Facts(writable=True, impossible_refused=True, journaled_taken=False),
        Facts(writable=True, impossible_refused=True, journaled_taken=True, majority_confirms=False),
        Facts(writable=True, impossible_refused=True, journaled_taken=True, journal=False),
    ],
)
def test_facts_that_do_not_suffice_are_refused(facts: Facts) -> None:
    with pytest.raises(HoldfastError):
        judge(facts, "mongodb://h/d")


def test_nothing_is_attested_of_a_server_that_tells_nothing() -> None:
    three = tuple(Member(host, True) for host in "abc")
    told = judge(Facts(writable=True, set_name="rs", members=three), "mongodb://h/d").guarantees
    assert told.survives_how is How.ASSUMED
    assert len(told.warnings) == 3


# -- what every call sets, and what answers mean -----------------------------------------------------------------------


@pytest.fixture
async def fake() -> AsyncIterator[FakeMongo]:
    async with FakeMongo(*THREE) as running:
        yield running


async def put(backend: MongoBackend, n: int, expect: int) -> int:
    return await backend.commit("main", {KEY: b"%d" % n}, {KEY: expect}, op=Op("w", n))


async def test_every_write_asks_a_majority_and_its_journals_whatever_the_url_says(fake: FakeMongo) -> None:
    backend = MongoBackend(f"{fake.url}&w=1&journal=false&readConcernLevel=local&retryWrites=true&retryReads=true")
    await backend.open()
    version = await put(backend, 1, 0)
    await put(backend, 2, version)
    await backend.read("main", [KEY])
    await backend.close()
    ours = [command for command in fake.seen if next(iter(command)) in ("insert", "update", "delete")]
    concerns = [command["writeConcern"] for command in ours if command["writeConcern"]["w"] != 50]
    assert len(concerns) >= 9
    assert {(concern["w"], concern["j"]) for concern in concerns} == {("majority", True)}
    assert all(0 < concern["wtimeout"] <= 5000 for concern in concerns)
    assert all("txnNumber" not in command for command in fake.seen), "the driver repeats nothing by itself"
    assert fake.seen[-1]["readConcern"] == {"level": "linearizable"} or "endSessions" in fake.seen[-1]


async def test_a_majority_that_goes_away_makes_outcomes_unknown_and_reads_wait_for_it(fake: FakeMongo) -> None:
    backend = MongoBackend(fake.url)
    await backend.open()
    version = await put(backend, 1, 0)
    fake.confirms = False
    with pytest.raises(UnknownOutcomeError, match="majority"):
        await put(backend, 2, version)
    with pytest.raises(UnknownOutcomeError):
        await put(backend, 2, version)  # it is there now, but not safe
    fake.confirms = True
    assert await put(backend, 2, version) == version + 1
    await backend.close()


async def test_what_one_member_alone_has_is_made_durable_before_it_is_returned() -> None:
    """On a single server, a row that another process has written may not be in the journal yet when it is read."""
    async with FakeMongo() as fake:
        writer, reader = MongoBackend(fake.url), MongoBackend(fake.url)
        await writer.open()
        await reader.open()
        await put(writer, 1, 0)

        def barriers() -> int:
            return sum(c.get("updates", [{}])[0].get("q", {}).get("_id") == "~barrier" for c in fake.seen)

        await writer.read("main", [KEY])
        assert barriers() == 0, "its own commit is known to be durable"
        assert (await reader.read("main", [KEY]))[KEY].payload == b"1"
        assert barriers() == 1
        await reader.read("main", [KEY])
        assert barriers() == 1
        await put(writer, 2, 1)
        fake.refuse = lambda command: (
            {"ok": 0.0, "code": 10107, "codeName": "NotWritablePrimary", "errmsg": "not primary"}
            if "update" in command
            else None
        )
        with pytest.raises(UnavailableError):
            await reader.read("main", [KEY])
        await writer.close()
        await reader.close()


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ({"ok": 0.0, "code": 10107, "codeName": "NotWritablePrimary"}, UnavailableError, "not the primary"),
        ({"ok": 0.0, "code": 13, "codeName": "Unauthorized"}, UnavailableError, "readWrite"),
        ({"ok": 0.0, "code": 59, "codeName": "CommandNotFound"}, FailedError, "MongoDB 4.2"),
        ({"ok": 0.0, "code": 2, "codeName": "BadValue"}, UnsafeSettingError, "journaling"),
        ({"ok": 0.0, "code": 11602, "codeName": "InterruptedDueToReplStateChange"}, UnknownOutcomeError, "same op"),
        ({"ok": 0.0, "code": 91, "codeName": "ShutdownInProgress"}, UnknownOutcomeError, "same op"),
        ({"ok": 0.0, "code": 50, "codeName": "MaxTimeMSExpired"}, UnknownOutcomeError, "same op"),
        ({"ok": 0.0, "code": 1, "codeName": "InternalError"}, UnknownOutcomeError, "same op"),
        ({"ok": 1.0, "n": 0, "writeErrors": [{"index": 0, "code": 112}]}, UnavailableError, "WriteConflict"),
        ({"ok": 1.0, "n": 0, "writeErrors": [{"index": 0, "code": 14031}]}, FullError, "disk is full"),
        ({"ok": 1.0, "n": 0, "writeErrors": [{"index": 0, "code": 17419}]}, FullError, "several scopes"),
        ({"ok": 1.0, "n": 0, "writeErrors": [{"index": 0, "code": 8}]}, UnknownOutcomeError, "same op"),
        ({"ok": 1.0, "n": 1, "writeConcernError": {"code": 64, "codeName": "WriteConcernFailed"}}, UnknownOutcomeError,
         "majority"),
        ({"ok": 1.0, "n": 1, "writeConcernError": {"code": 11602}}, UnknownOutcomeError, "majority"),
    ],
    ids=lambda value: str(value.get("codeName") or value.get("writeErrors") or "concern") if isinstance(value, dict)
    else None,
)  # fmt: skip
async def test_each_answer_of_the_server_says_what_the_caller_may_do(
    fake: FakeMongo, answer: dict[str, Any], kind: type[HoldfastError], said: str
) -> None:
    backend = MongoBackend(fake.url)
    await backend.open()
    version = await put(backend, 1, 0)
    answers = [{"errmsg": "canary7Zq", **answer}]

    def refuse(command: dict[str, Any]) -> dict[str, Any] | None:
        return answers.pop() if "update" in command and answers else None

    fake.refuse = refuse
    with pytest.raises(kind, match=said) as raised:
        await put(backend, 2, version)
    assert type(raised.value) is kind
    assert "canary" not in str(raised.value), "the server's own text may hold rows"
    assert await put(backend, 2, version) == version + 1
    await backend.close()


async def test_a_server_that_lost_commits_is_neither_written_to_nor_read(fake: FakeMongo) -> None:
    backend = MongoBackend(fake.url)
    await backend.open()
    await put(backend, 1, 0)
    kept = dict(fake.documents)
    await put(backend, 2, 1)
    old = {"_id": "main", "format": 1, "number": 1, "tip": "old", "bytes": 9, "rows": {}, "writers": {}}
    for lost in ({}, {**kept, "main": old}):
        fake.documents = dict(lost)
        for call in (put(backend, 3, 2), backend.read("main", [KEY]), backend.head("main")):
            with pytest.raises(FailedError, match="lost commits"):
                await call
    await backend.close()


async def test_a_state_that_was_taken_back_is_not_taken_for_a_new_one_with_the_same_number(fake: FakeMongo) -> None:
    """A failover may take back what nobody was told of, and another process may then write the same number."""
    one, two = MongoBackend(fake.url), MongoBackend(fake.url)
    await one.open()
    await two.open()
    version = await put(one, 1, 0)
    other = Key("signal", "ETHUSDT_a_x", "ETHUSDT")
    document = fake.documents["main"]
    document["tip"] = "another"  # the same number, other rows
    document["rows"]["signal/ETHUSDT_a_x/ETHUSDT"] = {"version": 1, "writer": "x", "n": 1, "bytes": 90, "row": "7"}
    del document["rows"]["signal/BTCUSDT_a_x/BTCUSDT"]
    with pytest.raises(HoldfastError):
        await put(one, 2, version)
    assert (await two.read("main", [KEY, other])).keys() == {other}
    await one.close()
    await two.close()


async def test_who_alone_writes_a_scope_needs_one_round_trip_for_a_commit_also_for_keys_that_are_new(
    fake: FakeMongo,
) -> None:
    first = MongoBackend(fake.url)
    await first.open()
    old = Key("event", "old", "x")
    await first.commit("main", {KEY: b"1", old: b"1"}, {}, op=Op("w", 1))
    await first.close()
    backend = MongoBackend(fake.url)
    await backend.open()
    version = await put(backend, 2, 1)
    with pytest.raises(ConflictError):
        await backend.commit("main", {}, {old: 0}, op=Op("v", 1))  # it has not looked at that one yet
    await backend.commit("main", {Key("event", "e", "0"): b"1"}, {old: 1}, op=Op("w", 3))
    fake.seen.clear()
    for n in range(4, 24):
        keys = {Key("event", "e", str(n)): b"1", Key("event", "e", str(n - 1)): None}
        version = await backend.commit("main", keys, {KEY: 2}, op=Op("w", n))
    assert [next(iter(command)) for command in fake.seen] == ["update"] * 20
    assert version == 23
    assert len(fake.documents["main"]["rows"]) == 4, "the row, the old event, the first and the last of the new"
    with pytest.raises(ConflictError):
        await backend.commit("main", {}, {Key("event", "e", "22"): 22}, op=Op("w", 24))
    await backend.close()
