"""S3: what open finds out about a service, and what it says of it: right and wrong ones, none misreported."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3_fake import FakeS3, Quirk
from servers.s3 import KEY, SECRET, S3Server, credentials
from servers.shared import own_name, shared

from holdfast.backends.s3 import S3Backend, attest
from holdfast.backends.s3.address import parse
from holdfast.cli import main
from holdfast.contract import Guarantees, How, Key, Op, Survives
from holdfast.errors import HoldfastError, InvalidInputError, UnavailableError, UnsafeSettingError

ROW = Key("signal", "BTCUSDT_a_x", "BTCUSDT")


@pytest.fixture(autouse=True)
def with_credentials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_REGION", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    credentials()
    attest._RACED.clear()  # so that each test makes the whole probe
    yield


async def opened(url: str, *, read_only: bool = False) -> Guarantees:
    backend = S3Backend(url)
    try:
        return await backend.open(read_only=read_only)
    finally:
        await backend.close()


BAD: list[tuple[Quirk, type[HoldfastError], str]] = [
    ("ignores-all-conditions", UnsafeSettingError, "ignores If-None-Match"),
    ("ignores-if-none-match", UnsafeSettingError, "ignores If-None-Match"),
    ("ignores-if-match", UnsafeSettingError, "ignores If-Match: it replaced"),
    ("looks-then-makes", UnsafeSettingError, "win that made one object at once"),
    ("looks-then-replaces", UnsafeSettingError, "win that replaced one object at once"),
    ("refuses-if-match", UnsafeSettingError, "refuses If-Match"),
    ("shows-old-objects", UnsafeSettingError, "shows an object other than"),
    ("gives-no-etag", UnsafeSettingError, "no ETag"),
    ("has-no-conditions", UnsafeSettingError, "refuses conditional writes"),
    ("forbids", UnavailableError, "does not permit"),
    ("has-no-bucket", UnavailableError, "no such bucket"),
    ("is-down", UnavailableError, "503"),
]


@pytest.mark.parametrize(("quirk", "kind", "says"), BAD)
async def test_a_service_that_would_void_the_promise_is_refused(
    quirk: Quirk, kind: type[HoldfastError], says: str, record_property: Callable[[str, object], None]
) -> None:
    async with FakeS3(quirk) as fake:
        with pytest.raises(kind, match=says) as refused:
            await opened(fake.url())
        assert type(refused.value) is kind
        if kind is UnsafeSettingError:
            assert "another store" in str(refused.value), "the remedy is named"
            assert fake.objects == {}, "the probe cleans up behind itself"
    record_property("proof:s3 settings", {"refused": 1})


@pytest.mark.parametrize(
    ("quirks", "warns"),
    [
        ((), "nothing tells"),
        (("wants-etags-unquoted",), "nothing tells"),
        (("says-409-to-losers",), "nothing tells"),
        (("keeps-versions",), "lifecycle rule"),
    ],
)
async def test_a_service_that_keeps_conditions_is_taken_and_its_durability_is_not_made_up(
    quirks: tuple[Quirk, ...], warns: str, record_property: Callable[[str, object], None]
) -> None:
    async with FakeS3(*quirks) as fake:
        promise = await opened(fake.url())
        assert (promise.survives, promise.survives_how) == (Survives.PROCESS, How.UNKNOWN)
        assert (promise.fenced, promise.fenced_how, promise.shared) == (True, How.ATTESTED, True)
        assert any(warns in warning for warning in promise.warnings)
        assert fake.objects == {}
        looked = await opened(fake.url(), read_only=True)
        assert looked.fenced_how is How.ASSUMED, "who changes nothing has tried nothing"
        assert not [1 for method, *_ in fake.requests[-1:] if method != "GET"]
    record_property("proof:s3 settings", {"accepted": 1})


async def test_a_service_that_fails_for_some_who_come_second_as_ceph_does_is_taken_and_used() -> None:
    async with FakeS3("says-500-to-rivals") as fake:
        one, other = S3Backend(fake.url()), S3Backend(fake.url())
        assert (await one.open()).fenced_how is How.ATTESTED
        await other.open()
        numbers = await asyncio.gather(
            *(
                backend.commit("main", {}, {}, op=Op(f"{at}-{i}", 1))
                for i in range(5)
                for at, backend in enumerate((one, other))
            )
        )
        assert sorted(numbers) == list(range(1, 11))
        await one.close()
        await other.close()


@pytest.mark.parametrize(
    ("options", "survives", "how", "warns"),
    [
        (("survives=process",), Survives.PROCESS, How.ASSUMED, ""),
        (("survives=host",), Survives.HOST, How.ASSUMED, ""),
        (("survives=server",), Survives.HOST, How.ASSUMED, "runs on this machine"),
    ],
)
async def test_what_the_user_says_of_the_service_is_taken_as_said_but_not_beyond_reason(
    options: tuple[str, ...], survives: Survives, how: How, warns: str
) -> None:
    async with FakeS3() as fake:
        promise = await opened(fake.url("holdfast", *options))
        assert (promise.survives, promise.survives_how) == (survives, how)
        assert bool(promise.warnings) == bool(warns)
        assert all(warns in warning for warning in promise.warnings)


@pytest.mark.parametrize(
    ("url", "survives", "how", "warnings"),
    [
        ("s3://bucket", Survives.SERVER, How.ASSUMED, ()),
        ("s3://bucket/x?endpoint=https://s3.eu-central-1.amazonaws.com", Survives.SERVER, How.ASSUMED, ()),
        ("s3://bucket/x?endpoint=https://amazonaws.com.example.org", Survives.PROCESS, How.UNKNOWN, ("nothing tells",)),
        (
            "s3://bucket/x?endpoint=http://10.0.0.1:9000",
            Survives.PROCESS,
            How.UNKNOWN,
            ("nothing tells", "unencrypted"),
        ),
        ("s3://bucket/x?endpoint=https://s3.example.org&survives=server", Survives.SERVER, How.ASSUMED, ()),
        ("s3://bucket/x?endpoint=http://localhost:1&survives=server", Survives.HOST, How.ASSUMED, ("this machine",)),
    ],
)
def test_only_amazons_own_service_is_believed_by_its_name(
    url: str, survives: Survives, how: How, warnings: tuple[str, ...]
) -> None:
    promise = attest._judge(parse(url), probed=True, keeps_versions=False)
    assert (promise.survives, promise.survives_how) == (survives, how)
    assert len(promise.warnings) == len(warnings)
    assert all(part in warning for part, warning in zip(warnings, promise.warnings, strict=True))


async def test_rclone_ignores_conditions_and_is_refused() -> None:
    server = shared("rclone")
    assert isinstance(server, S3Server)
    with pytest.raises(UnsafeSettingError, match="ignores If-None-Match"):
        await opened(server.url)
    assert server.listed("holdfast/") == [], "the probe cleans up behind itself"


async def test_moto_in_turn_is_taken(tmp_path: Path) -> None:
    server = shared("moto")
    assert isinstance(server, S3Server)
    place = own_name(tmp_path)
    assert (await opened(server.store(place))).fenced_how is How.ATTESTED
    assert server.listed(f"{place}/") == []


async def test_what_a_killed_probe_left_is_swept_by_a_later_open() -> None:
    async with FakeS3() as fake:
        await opened(fake.url())
        fake.objects["holdfast/~probe/dead-0.json"] = next(iter(fake.before.values()))
        fake.objects["other/~probe/dead-0.json"] = next(iter(fake.before.values()))
        await opened(fake.url())
        assert list(fake.objects) == ["other/~probe/dead-0.json"], "under its own prefix only"


async def test_races_are_run_once_for_a_bucket_and_conditions_are_tried_at_each_open() -> None:
    async with FakeS3() as fake:
        await opened(fake.url())
        first = len(fake.requests)
        await opened(fake.url("second"))
        assert 6 <= len(fake.requests) - first < 20 < first
        fake.quirks.add("ignores-if-match")
        with pytest.raises(UnsafeSettingError):
            await opened(fake.url("third"))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://", "bucket"),
        ("s3://a", "'a' is not a bucket"),
        ("s3://bucket/../x", "prefix"),
        ("s3://bucket/a b", "prefix"),
        ("s3://bucket/x?colour=red", "no option"),
        ("s3://bucket/x?survives=everything", "survives="),
        ("s3://bucket/x?deadline_seconds=0", "deadline_seconds="),
        ("s3://bucket/x?deadline_seconds=nan", "deadline_seconds="),
        ("s3://bucket/x?region=a/b", "region="),
        ("s3://bucket/x?endpoint=ftp://host", "endpoint"),
        ("s3://bucket/x?endpoint=http://user:canary@host", "endpoint"),
        ("s3://bucket/x?endpoint=http://host:99999", "endpoint"),
        ("s3://AKIA:canary@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("s3://bucket/x#canary", "s3://BUCKET/PREFIX"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_repeating_secrets(url: str, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says) as refused:
        S3Backend(url)
    assert "canary" not in str(refused.value)


async def test_the_endpoint_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeS3() as fake:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{fake.port}")
        assert (await opened("s3://bucket")).backend == f"s3://bucket/holdfast?endpoint=http://127.0.0.1:{fake.port}"


async def test_credentials_are_in_no_error_log_or_repr(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "canary-session")
    caplog.set_level(0)
    told = []
    quirks: list[Quirk] = ["forbids", "is-down", "ignores-all-conditions", "has-no-bucket"]
    for quirk in quirks:
        async with FakeS3() as fake:
            backend = S3Backend(fake.url())
            await backend.open()
            assert any(KEY in headers.get("authorization", "") for *_, headers in fake.requests), "they were used"
            fake.quirks.add(quirk)
            calls = (
                backend.commit("main", {ROW: b"{}"}, {}, op=Op("w", 1)),
                backend.read("main", [ROW]),
                opened(fake.url("other")),
            )
            for call in calls:
                try:
                    await call
                except HoldfastError as error:
                    told += traceback.format_exception(error)
                    told += traceback.format_exception(error.__context__) if error.__context__ else []
            told += [repr(backend), repr(backend._service), str(vars(backend))]
            await backend.close()
    monkeypatch.setenv("AWS_SSE_CUSTOMER_KEY_BASE64", "canary-not-base64")
    try:
        await opened(fake.url())
    except HoldfastError as error:
        told += traceback.format_exception(error)
    output = capsys.readouterr()
    everything = "".join([*told, caplog.text, output.out, output.err])
    assert len(told) > 20
    for secret in (SECRET, KEY, "canary"):
        assert secret not in everything


async def test_without_credentials_open_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    # Where an instance would be given its credentials there is nobody: not a word to the real one.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    async with FakeS3() as fake:
        with pytest.raises(UnavailableError, match="AWS_ACCESS_KEY_ID"):
            await opened(fake.url())


def test_doctor_tells_it_by_url(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    server = shared("moto")
    assert isinstance(server, S3Server)
    url = server.store(own_name(tmp_path), "survives=host")
    assert main(["doctor", url, "--plain"]) == 0
    told = capsys.readouterr().out
    assert "a power cut of the machine that holds the data" in told
    assert "as documented, not checked" in told
    assert main(["doctor", server.store(own_name(tmp_path)), "--plain"]) == 1
    assert "ask who runs it" in capsys.readouterr().out.replace("\n", " ")
