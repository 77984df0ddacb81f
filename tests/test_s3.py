"""S3: the object of a scope, as people and other processes see it, and what is done when they change it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from s3_fake import FakeS3
from servers.s3 import S3Server, credentials
from servers.shared import own_name, shared

from holdfast.backends.s3 import S3Backend, document
from holdfast.backends.s3.document import MAX_ROWS_BYTES
from holdfast.cli import main
from holdfast.contract import Key, Op
from holdfast.errors import (
    ConflictError,
    CorruptedError,
    FailedError,
    InvalidInputError,
    NewerFormatError,
    UnavailableError,
)

KEY = Key("signal", "BTCUSDT_my-strategy_binance", "BTCUSDT")
OTHER = Key("signal", "ETHUSDT_my-strategy_binance", "ETHUSDT")


@pytest.fixture(autouse=True)
def with_credentials() -> Iterator[None]:
    credentials()
    yield


@pytest.fixture
async def fake() -> AsyncIterator[FakeS3]:
    async with FakeS3() as service:
        yield service


async def opened(fake: FakeS3) -> S3Backend:
    backend = S3Backend(fake.url())
    await backend.open()
    return backend


def document_of(fake: FakeS3) -> dict[str, object]:
    found: dict[str, object] = json.loads(fake.objects["holdfast/main.json"].body)
    return found


async def test_a_scope_is_one_readable_object(fake: FakeS3) -> None:
    backend = await opened(fake)
    await backend.commit("main", {KEY: b'{"priceOpen":43000.25}', OTHER: b"[]"}, {}, op=Op("bot", 1))
    await backend.commit("main", {OTHER: None}, {OTHER: 1}, op=Op("bot", 2))
    assert document_of(fake) == {
        "holdfast": 1,
        "scope": "main",
        "number": 2,
        "writers": {"bot": [2, 2]},
        "rows": {str(KEY): {"version": 1, "n": 1, "writer": "bot", "row": {"priceOpen": 43000.25}}},
    }
    sent = [headers for method, path, headers in fake.requests if (method, path) == ("PUT", "holdfast/main.json")]
    assert [headers["content-type"] for headers in sent] == ["application/json"] * 2
    assert [("if-none-match" in headers, "if-match" in headers) for headers in sent] == [(True, False), (False, True)]
    await backend.close()


@pytest.mark.parametrize(
    "payload",
    [
        b' {"a":1}\n',
        b"[" * 5000 + b"]" * 5000,
        b'"\\ud800"',
        '"\u2028 \U0001f600"'.encode(),
        b"not json at all",
        b"1e400",
    ],
)
async def test_any_text_comes_back_byte_for_byte_and_the_object_stays_json(fake: FakeS3, payload: bytes) -> None:
    backend = await opened(fake)
    await backend.commit("main", {KEY: payload, OTHER: b"{}"}, {}, op=Op("bot", 1))
    await backend.close()
    backend = await opened(fake)
    found = await backend.read("main", [KEY, OTHER])
    assert (found[KEY].payload, found[OTHER].payload) == (payload, b"{}")
    assert json.loads(fake.objects["holdfast/main.json"].body)["number"] == 1
    await backend.close()


async def test_bytes_that_are_no_text_are_refused(fake: FakeS3) -> None:
    backend = await opened(fake)
    with pytest.raises(InvalidInputError, match="not JSON text"):
        await backend.commit("main", {KEY: b"\xff"}, {}, op=Op("bot", 1))
    assert fake.objects == {}
    await backend.close()


async def test_a_scope_that_outgrows_its_object_is_refused_before_anything_changes(fake: FakeS3) -> None:
    backend = await opened(fake)
    row = b'"' + b"x" * (MAX_ROWS_BYTES // 2 - 100) + b'"'
    await backend.commit("main", {KEY: row}, {}, op=Op("bot", 1))
    before = fake.objects["holdfast/main.json"]
    with pytest.raises(UnavailableError, match="nothing was written; name several scopes"):
        await backend.commit("main", {OTHER: row, OTHER._replace(entity_id="X"): row}, {}, op=Op("bot", 2))
    assert fake.objects["holdfast/main.json"] == before
    assert await backend.commit("main", {KEY: b"{}"}, {KEY: 1}, op=Op("bot", 3)) == 2, "what shrinks is taken"
    await backend.close()


async def test_a_warm_commit_is_one_request_and_a_read_asks_whether_it_changed(fake: FakeS3) -> None:
    backend = await opened(fake)
    await backend.commit("main", {KEY: b"1"}, {}, op=Op("bot", 1))
    fake.requests.clear()
    await backend.commit("main", {KEY: b"2"}, {KEY: 1}, op=Op("bot", 2))
    assert [method for method, *_ in fake.requests] == ["PUT"]
    await backend.read("main", [KEY])
    assert fake.requests[-1][2]["if-none-match"] == fake.objects["holdfast/main.json"].etag
    await backend.close()


async def test_commits_that_wait_share_one_write_and_a_clash_of_one_does_not_touch_the_others(fake: FakeS3) -> None:
    backend = await opened(fake)
    await backend.commit("main", {KEY: b"1"}, {}, op=Op("bot", 1))
    fake.requests.clear()
    told = await asyncio.gather(
        *(backend.commit("main", {}, {}, op=Op(f"w{i}", 1)) for i in range(50)),
        backend.commit("main", {KEY: b"2"}, {KEY: 7}, op=Op("late", 1)),
        return_exceptions=True,
    )
    assert sorted(one for one in told if isinstance(one, int)) == list(range(2, 52))
    assert isinstance(told[-1], ConflictError)
    assert told[-1].keys == (KEY,)
    assert sum(method == "PUT" for method, *_ in fake.requests) <= 2
    await backend.close()


async def test_what_another_process_wrote_is_seen_by_reads_and_by_commits(fake: FakeS3) -> None:
    one, two = await opened(fake), await opened(fake)
    assert await one.commit("main", {KEY: b"1"}, {KEY: 0}, op=Op("one", 1)) == 1
    assert (await two.read("main", [KEY]))[KEY].payload == b"1"
    assert await two.commit("main", {KEY: b"2"}, {KEY: 1}, op=Op("two", 1)) == 2
    assert await one.commit("main", {KEY: b"3"}, {KEY: 2}, op=Op("one", 2)) == 3, "though it remembers version 1"
    with pytest.raises(ConflictError):
        await two.commit("main", {KEY: b"4"}, {KEY: 2}, op=Op("two", 2))
    assert await one.commit("main", {KEY: b"3"}, {KEY: 2}, op=Op("one", 2)) == 3, "a repeated op"
    await one.close()
    await two.close()


async def test_an_object_that_was_deleted_is_found_out(fake: FakeS3) -> None:
    backend = await opened(fake)
    await backend.commit("main", {KEY: b"1"}, {}, op=Op("bot", 1))
    del fake.objects["holdfast/main.json"]
    with pytest.raises(FailedError, match="deleted, or put back to an older version"):
        await backend.read("main", [KEY])
    with pytest.raises(FailedError, match="stands at commit 0, though commit 1 was acknowledged"):
        await backend.commit("main", {KEY: b"2"}, {}, op=Op("bot", 2))
    assert fake.objects == {}, "nothing was written over the loss"
    await backend.close()


async def test_an_object_that_was_put_back_and_written_on_is_found_out(fake: FakeS3) -> None:
    backend, other = await opened(fake), S3Backend(fake.url())
    await backend.commit("main", {KEY: b"1"}, {}, op=Op("bot", 1))
    older = fake.objects["holdfast/main.json"]
    await backend.commit("main", {KEY: b"2"}, {}, op=Op("bot", 2))
    fake.objects["holdfast/main.json"] = older
    await other.open()
    for n in range(1, 4):
        await other.commit("main", {}, {}, op=Op("other", n))
    with pytest.raises(FailedError, match="stands at commit 4 without commit 2"):
        await backend.commit("main", {KEY: b"3"}, {KEY: 2}, op=Op("bot", 3))
    with pytest.raises(FailedError, match="without commit 2"):
        await backend.head("main")
    await backend.close()
    await other.close()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", CorruptedError),
        (b"[]", CorruptedError),
        (b'{"holdfast":1,"scope":"main","number":1,"writers":{},"rows":{"a/b":{}}}', CorruptedError),
        (b'{"holdfast":1,"scope":"other","number":1,"writers":{},"rows":{}}', CorruptedError),
        (b'{"holdfast":1,"scope":"main","number":0,"writers":{},"rows":{}}', CorruptedError),
        (b'{"holdfast":2,"scope":"main","whatever":1}', NewerFormatError),
    ],
)
async def test_an_object_of_another_hand_is_reported_and_left_as_it_is(
    fake: FakeS3, body: bytes, kind: type[CorruptedError]
) -> None:
    backend = await opened(fake)
    await backend.commit("main", {KEY: b"1"}, {}, op=Op("bot", 1))
    found = fake.objects["holdfast/main.json"] = fake.objects["holdfast/main.json"]._replace(etag='"x"', body=body)
    with pytest.raises(kind):
        await backend.read("main", [KEY])
    with pytest.raises(kind):
        await backend.commit("main", {KEY: b"2"}, {}, op=Op("bot", 2))
    assert fake.objects["holdfast/main.json"] == found
    await backend.close()


async def test_a_commit_that_was_told_as_unwritten_is_never_written(fake: FakeS3) -> None:
    """Its deadline passes while it waits, with another, for the read that comes before their write."""
    backend = S3Backend(fake.url("holdfast", "deadline_seconds=1"))
    await backend.open()
    lane, held = backend._lane("main"), asyncio.Event()
    current = lane.current

    async def late() -> document.Snapshot:
        await held.wait()
        return await current()

    lane.current = late  # type: ignore[method-assign]

    async def patiently() -> int:
        lane._deadline_seconds = 20
        return await backend.commit("main", {OTHER: b"2"}, {}, op=Op("patient", 1))

    hasty = asyncio.ensure_future(backend.commit("main", {KEY: b"1"}, {}, op=Op("hasty", 1)))
    patient = asyncio.ensure_future(patiently())
    with pytest.raises(UnavailableError, match="nothing was written"):
        await hasty
    held.set()
    assert await patient == 1
    assert list(document_of(fake)["writers"]) == ["patient"]  # type: ignore[call-overload]
    await backend.close()


@pytest.mark.parametrize("line", ["kind: ConnectionReset", "kind: ConnectionAborted"])
def test_a_connection_that_was_reset_is_not_taken_for_one_that_was_never_made(line: str) -> None:
    from holdfast.backends.s3.service import Kind, _by_status

    assert _by_status(f"HttpError {{\n    kind: Interrupted,\n source: Os {{ {line}, }}").kind is Kind.UNKNOWN
    assert _by_status("HttpError {\n    kind: Connect,\n source: Os { kind: ConnectionRefused, }").kind is Kind.NOT_SENT


def test_no_two_bodies_of_a_scope_are_alike() -> None:
    bodies = set()
    for op in (Op("a", 1), Op("b", 1), Op("a", 2)):
        draft = document.Draft("main", document.NOTHING)
        draft.add({}, {}, op)
        bodies.add(draft.body())
    assert len(bodies) == 3


def test_a_process_ends_in_order_right_after_its_last_request(tmp_path: Path) -> None:
    """obstore's asynchronous calls let the interpreter abort at its end now and then: in 11 of 100 processes here."""
    import subprocess
    import sys

    server = shared("moto")
    assert isinstance(server, S3Server)
    code = (
        "import asyncio, sys\n"
        "from holdfast.backends.s3 import S3Backend\n"
        "from holdfast.contract import Op\n"
        "async def run():\n"
        "    backend = S3Backend(sys.argv[1])\n"
        "    await backend.open(read_only=True)\n"
        "    await backend.head('main')\n"
        "asyncio.run(run())\n"
    )
    ends = [
        subprocess.run([sys.executable, "-c", code, server.store(own_name(tmp_path))], check=False).returncode
        for _ in range(6)
    ]
    assert ends == [0] * 6


async def test_show_and_check_read_it_by_url(fake: FakeS3, capsys: pytest.CaptureFixture[str]) -> None:
    backend = await opened(fake)
    await backend.commit("main", {KEY: b"{}"}, {}, op=Op("bot", 1))
    await backend.close()
    assert await asyncio.to_thread(main, ["show", fake.url(), "--plain"]) in (0, 1)
    assert "BTCUSDT" in capsys.readouterr().out
    assert not [path for method, path, _ in fake.requests if method == "DELETE" and "~probe" not in path]
