"""Redis: addresses, what lies on the server, what the server's refusals become, and credentials that stay hidden."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import socket
import subprocess
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import require
from servers.shared import own_name, shared
from servers.valkey import RedisServer, redis_binary, valkey_binary

from holdfast.backends.redis import RedisBackend
from holdfast.backends.redis.address import Address, parse
from holdfast.backends.redis.link import refusal
from holdfast.contract import Key, KeyPrefix, Op, Survives
from holdfast.errors import (
    ConflictError,
    CorruptedError,
    FailedError,
    FullError,
    HoldfastError,
    InvalidInputError,
    UnavailableError,
)

KEY = Key("signal", "BTCUSDT_my-strategy_binance", "BTCUSDT")
SECRET = "canary7Zq"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    require("valkey")
    running = RedisServer(valkey_binary(), tmp_path / "server", {"busy-reply-threshold": "30"})
    yield running
    running.stop()


def backend_on(place: Path) -> RedisBackend:
    return RedisBackend(f"{shared('valkey').url}/?prefix={own_name(place)}")


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", Address(kind="single", hosts=(("localhost", 6379),))),
        ("redis://h", Address(kind="single", hosts=(("h", 6379),))),
        ("rediss://h:1/3", Address(kind="single", hosts=(("h", 1),), db=3, tls=True)),
        ("redis://[::1]:7/", Address(kind="single", hosts=(("::1", 7),))),
        ("redis://u%40:p%2F@h", Address(kind="single", hosts=(("h", 6379),), username="u@", password="p/")),
        ("redis://:p@h?prefix=a:b", Address(kind="single", hosts=(("h", 6379),), password="p", prefix="a:b")),
        (
            "redis+sentinel://a,b:2/bots/1?replicas=2&deadline_seconds=0.5",
            Address(
                kind="sentinel",
                hosts=(("a", 26379), ("b", 2)),
                service="bots",
                db=1,
                replicas=2,
                deadline_seconds=0.5,
            ),
        ),
        ("rediss+cluster://a:1,b:2", Address(kind="cluster", hosts=(("a", 1), ("b", 2)), tls=True)),
    ],
)
def test_an_address_is_read_from_its_url(url: str, expected: Address) -> None:
    assert parse(url) == expected
    assert parse(expected.shown).hosts == expected.hosts


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://h",
        "redis:h",
        "redis://a,b",
        "redis://h:0",
        "redis://h:99999",
        "redis://h h",
        "redis://h/x",
        "redis://h/1/2",
        "redis://h?colour=red",
        "redis://h?prefix=a{b}",
        "redis://h?prefix=",
        "redis://h?replicas=-1",
        "redis://h?replicas=1.5",
        "redis://h?deadline_seconds=0",
        "redis://h?deadline_seconds=nan",
        "redis://h?password_env=HOLDFAST_NO_SUCH_VARIABLE",
        "redis+sentinel://h",
        "redis+cluster://h/1",
        f"redis://u:{SECRET}@a,b",
        f"redis://u:{SECRET}@h/x",
        f"redis://u:{SECRET}@@h",
        f"redis://u:{SECRET}#@h",
    ],
)
def test_an_address_that_cannot_be_used_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidInputError) as raised:
        RedisBackend(url)
    assert SECRET not in str(raised.value)


def test_a_password_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOT_REDIS_PASSWORD", SECRET)
    address = parse("redis://bot@h?password_env=BOT_REDIS_PASSWORD")
    assert (address.username, address.password) == ("bot", SECRET)
    assert SECRET not in repr(address) + str(address) + address.shown


# -- what lies on the server -------------------------------------------------------------------------------------------


def redis_cli(*words: str) -> str:
    cli = shutil.which("redis-cli")
    assert cli, "redis-cli comes with Debian's redis-server: run `make servers`"
    port = shared("valkey").url.rpartition(":")[2]
    return subprocess.run([cli, "-p", port, *words], capture_output=True, text=True, check=True).stdout.rstrip("\n")


async def test_rows_are_read_with_redis_cli_as_the_page_says(tmp_path: Path) -> None:
    require("redis")
    backend, prefix = backend_on(tmp_path), own_name(tmp_path)
    await backend.open()
    payload = b'{"priceOpen":42000.5,"note":"\xc3\xa9"}'
    await backend.commit("main", {KEY: payload}, {}, op=Op("bot@1a", 7))
    row = redis_cli("--raw", "get", f"{prefix}:{{main}}:{KEY}")
    assert json.loads(row) == {"priceOpen": 42000.5, "note": "é"}
    assert redis_cli("hget", f"{prefix}:{{main}}:versions", str(KEY)) == "1 7 bot@1a"
    assert redis_cli("get", f"{prefix}:{{main}}:number") == "1"
    assert redis_cli("zrange", f"{prefix}:{{main}}:index", "0", "-1") == " ".join(KEY)
    assert redis_cli("smembers", f"{prefix}:scopes") == "main"
    await backend.close()


async def test_only_keys_under_the_prefix_are_touched(server: RedisServer) -> None:
    server.call("SET", "mine", "1")
    server.call("SET", "holdfast:{main}", "2")
    for prefix in ("one", "two"):
        backend = RedisBackend(f"{server.url}/?prefix={prefix}")
        await backend.open()
        await backend.commit("main", {KEY: prefix.encode()}, {KEY: 0}, op=Op("w", 1))
        assert (await backend.read("main", [KEY]))[KEY].payload == prefix.encode()
        await backend.close()
    names = [line for line in server.call("KEYS", "*").decode().split("\r\n") if line and line[0] not in "$*"]
    assert sorted(name for name in names if not name.startswith(("one:", "two:"))) == ["holdfast:{main}", "mine"]
    assert len([name for name in names if name.startswith("one:")]) <= 8


async def test_a_row_that_another_hand_deleted_is_corrupted_and_can_be_replaced(tmp_path: Path) -> None:
    backend, prefix = backend_on(tmp_path), own_name(tmp_path)
    other = Key("signal", "a", "b")
    await backend.open()
    await backend.commit("main", {KEY: b"1", other: b"2"}, {}, op=Op("w", 1))
    server = shared("valkey")
    assert isinstance(server, RedisServer)
    server.call("DEL", f"{prefix}:{{main}}:{KEY}")
    with pytest.raises(CorruptedError) as raised:
        await backend.read("main", [other, KEY])
    assert raised.value.key == KEY
    assert set(await backend.read("main", [other])) == {other}
    await backend.commit("main", {KEY: None}, {}, op=Op("w", 2))
    assert await backend.read("main", [KEY]) == {}
    await backend.close()


@pytest.mark.parametrize("name", ["number", "versions", "writers", "index"])
async def test_a_key_of_another_type_under_our_prefix_stops_commits_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    backend, prefix = backend_on(tmp_path), own_name(tmp_path)
    server = shared("valkey")
    assert isinstance(server, RedisServer)
    server.call("RPUSH", f"{prefix}:{{main}}:{name}", "foreign")
    await backend.open()
    with pytest.raises(CorruptedError, match="another type"):
        await backend.commit("main", {KEY: b"1", Key("risk", "a", "b"): b"2"}, {}, op=Op("w", 1))
    assert server.call("EXISTS", f"{prefix}:{{main}}:{KEY}") == b":0\r\n"
    await backend.close()


async def test_what_another_hand_wrote_into_our_keys_is_corrupted_and_nothing_else_escapes(tmp_path: Path) -> None:
    backend, prefix = backend_on(tmp_path), own_name(tmp_path)
    await backend.open()
    await backend.commit("main", {KEY: b"1"}, {}, op=Op("w", 1))
    server = shared("valkey")
    assert isinstance(server, RedisServer)
    for value in ("", "x", "1", "1 x w", "\xff"):
        server.call("HSET", f"{prefix}:{{main}}:versions", str(KEY), value)
        with pytest.raises(CorruptedError, match="another hand"):
            await backend.read("main", [KEY])
        server.call("HSET", f"{prefix}:{{main}}:writers", "v", value)
        with pytest.raises(CorruptedError, match="another hand"):
            await backend.head("main")
    server.call("ZADD", f"{prefix}:{{main}}:index", "0", "one two")
    with pytest.raises(CorruptedError, match="another hand"):
        assert [key async for key in backend.keys("main")]
    server.call("SET", f"{prefix}:{{main}}:number", "many")
    with pytest.raises(CorruptedError, match="another hand"):
        await backend.read("main", [KEY])
    with pytest.raises(HoldfastError):
        await backend.commit("main", {KEY: b"1"}, {}, op=Op("w", 2))
    await backend.close()


async def test_closing_during_reads_leaves_no_connection(server: RedisServer) -> None:
    backend = RedisBackend(server.url)
    await backend.open()
    reads = [asyncio.ensure_future(backend.read("main", [KEY])) for _ in range(20)]
    await asyncio.sleep(0)
    await backend.close()
    await asyncio.gather(*reads, return_exceptions=True)
    for _ in range(200):
        if server.call("CLIENT", "LIST", "TYPE", "normal").count(b"id=") == 1:
            break
        await asyncio.sleep(0.01)
    assert server.call("CLIENT", "LIST", "TYPE", "normal").count(b"id=") == 1, "only the one that asks"


async def test_listing_pages_through_many_keys_in_byte_order(tmp_path: Path) -> None:
    backend = backend_on(tmp_path)
    await backend.open()
    # "-" and "%" sort before "/", the dot too: names of which one begins with the other.
    names = sorted(
        {f"{a}{b}{i}" for a in ("a", "a-", "a%2F", "a.", "A", "~") for b in ("", "-", "x") for i in range(70)}
    )
    keys = [Key(domain, name, "id") for domain in ("risk", "risk-2", "signal") for name in names]
    for at in range(0, len(keys), 500):
        await backend.commit("main", dict.fromkeys(keys[at : at + 500], b"{}"), {}, op=Op("w", at + 1))
    assert [key async for key in backend.keys("main")] == sorted(keys)
    for prefix in (KeyPrefix("risk"), KeyPrefix("risk", "a-1"), KeyPrefix("", "a-1"), KeyPrefix("none")):
        assert [key async for key in backend.keys("main", prefix)] == [k for k in sorted(keys) if prefix.matches(k)]
    assert len(await backend.read("main", keys)) == len(keys)
    await backend.close()


async def test_large_numbers_and_odd_writers_stay_exact(tmp_path: Path) -> None:
    backend = backend_on(tmp_path)
    await backend.open()
    top = 2**63 - 1
    writer = "a b  c é ✓ 12"
    for n in (2**53, 2**53 + 1, top - 1, top):
        number = await backend.commit("main", {KEY: b"%d" % n}, {}, op=Op(writer, n))
        assert (await backend.read("main", [KEY]))[KEY].op == Op(writer, n)
        assert await backend.commit("main", {KEY: b"x"}, {}, op=Op(writer, n)) == number
        with pytest.raises(ConflictError):
            await backend.commit("main", {KEY: b"x"}, {}, op=Op(writer, n - 1))
    assert (await backend.head("main")).writers[writer].n == top
    await backend.close()


async def test_a_conflict_in_a_group_does_not_disturb_the_others(tmp_path: Path) -> None:
    backend = backend_on(tmp_path)
    await backend.open()
    keys = [Key("signal", f"k{i}", "x") for i in range(40)]
    outcomes = await asyncio.gather(
        *(backend.commit("main", {key: b"1"}, {key: i % 2}, op=Op(f"w{i}", 1)) for i, key in enumerate(keys)),
        return_exceptions=True,
    )
    assert sorted(o for o in outcomes if isinstance(o, int)) == list(range(1, 21))
    clashes = [o for o in outcomes if isinstance(o, ConflictError)]
    assert [error.key for error in clashes] == keys[1::2]
    assert set(await backend.read("main", keys)) == set(keys[::2])
    await backend.close()


async def test_commits_that_wait_together_share_one_flush(server: RedisServer) -> None:
    backend = RedisBackend(server.url)
    await backend.open()
    await backend.commit("main", {}, {}, op=Op("w", 1))

    def barriers() -> int:
        found = re.search(rb"cmdstat_waitaof:calls=(\d+)", server.call("INFO", "commandstats"))
        assert found
        return int(found[1])

    before = barriers()
    await asyncio.gather(*(backend.commit("main", {}, {}, op=Op(f"w{i}", 1)) for i in range(100)))
    assert barriers() - before <= 2
    await backend.close()


# -- refusals ----------------------------------------------------------------------------------------------------------


async def test_a_primary_that_becomes_a_replica_is_neither_written_to_nor_read(server: RedisServer) -> None:
    backend = RedisBackend(server.url)
    await backend.open()
    await backend.commit("main", {KEY: b"1"}, {}, op=Op("w", 1))
    await backend.read("main", [KEY])
    server.call("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(UnavailableError, match="nothing was written"):
        await backend.commit("main", {KEY: b"2"}, {KEY: 1}, op=Op("w", 2))
    with pytest.raises(HoldfastError, match="replica"):
        await backend.read("main", [KEY])
    server.call("REPLICAOF", "NO", "ONE")
    assert await backend.commit("main", {KEY: b"2"}, {KEY: 1}, op=Op("w", 2)) == 2
    await backend.close()


async def until_ping(server: RedisServer, answer: bytes) -> None:
    for _ in range(1000):
        if server.call("PING").startswith(answer):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"PING was never answered with {answer!r}")


async def test_full_memory_and_a_busy_server_are_told_and_nothing_was_written(server: RedisServer) -> None:
    backend = RedisBackend(server.url)
    await backend.open()
    await backend.commit("main", {KEY: b"1"}, {}, op=Op("w", 1))
    server.call("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(UnavailableError, match="maxmemory"):
        await backend.commit("main", {KEY: b"2"}, {KEY: 1}, op=Op("w", 2))
    server.call("CONFIG", "SET", "maxmemory", "0")
    with socket.create_connection(("127.0.0.1", server.port)) as link:
        link.sendall(b"EVAL 'while true do end' 0\r\n")
        await until_ping(server, b"-BUSY")
        with pytest.raises(UnavailableError, match="SCRIPT KILL"):
            await backend.commit("main", {KEY: b"2"}, {KEY: 1}, op=Op("w", 2))
        with pytest.raises(UnavailableError, match="SCRIPT KILL"):
            await backend.read("main", [KEY])
        server.call("SCRIPT", "KILL")
        await until_ping(server, b"+PONG")
    assert await backend.commit("main", {KEY: b"2"}, {KEY: 1}, op=Op("w", 2)) == 2
    await backend.close()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("LOADING Redis is loading the dataset in memory", UnavailableError),
        ("READONLY You can't write against a read only replica. script: 1a, on @user_script:1.", UnavailableError),
        ("ERR Error running script (call to f_1a): @user_script:12: -OOM command not allowed", FullError),
        ("MISCONF Errors writing to the AOF file: No space left on device", FullError),
        ("MISCONF Redis is configured to save RDB snapshots, but it's unable to persist to disk", UnavailableError),
        ("BUSY Redis is busy running a script.", UnavailableError),
        ("NOAUTH Authentication required.", UnavailableError),
        ("WRONGPASS invalid username-password pair or user is disabled.", UnavailableError),
        ("CLUSTERDOWN The cluster is down", UnavailableError),
        ("MASTERDOWN Link with MASTER is down", UnavailableError),
        ("TRYAGAIN Multiple keys request during rehashing of slot", UnavailableError),
        ("NOREPLICAS Not enough good replicas to write.", UnavailableError),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", CorruptedError),
        ("ERR ACL failure in script: User bot has no permissions to run the 'hdel' command", FailedError),
        (f"ERR unknown command 'X', with args beginning with: '{SECRET}'", FailedError),
    ],
)
def test_every_refusal_of_the_server_becomes_one_of_our_errors(text: str, kind: type[HoldfastError]) -> None:
    from redis._parsers.base import BaseParser

    error = refusal(BaseParser.parse_error(text)).mapped("redis://h")  # type: ignore[no-untyped-call]
    assert type(error) is kind
    assert SECRET not in str(error)


async def test_a_password_is_in_no_error_log_or_repr(
    server: RedisServer, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    server.call("CONFIG", "SET", "requirepass", f"{SECRET}-right")
    server.settings["requirepass"] = f"{SECRET}-right"
    seen: list[str] = []

    async def refused(backend: RedisBackend) -> None:
        with pytest.raises(HoldfastError) as raised:
            await backend.open()
        error: BaseException | None = raised.value
        while error is not None:  # also what lies behind it
            seen.extend((str(error), repr(error), repr(error.__dict__)))
            error = error.__cause__ or error.__context__
        seen.append("".join(traceback.format_exception(raised.value)))
        seen.append(repr(backend))

    await refused(RedisBackend(f"redis://:{SECRET}-wrong@127.0.0.1:{server.port}"))
    await refused(RedisBackend(f"redis://{SECRET}:{SECRET}@127.0.0.1:{server.port}"))
    await refused(RedisBackend(f"redis://:{SECRET}@127.0.0.1:1"))
    await refused(RedisBackend(f"rediss://:{SECRET}@127.0.0.1:{server.port}?deadline_seconds=1"))
    await refused(RedisBackend(f"redis+sentinel://:{SECRET}@127.0.0.1:{server.port}/{'bots'}"))
    right = RedisBackend(f"redis://:{SECRET}-right@127.0.0.1:{server.port}?deadline_seconds=0.3")
    promised = await right.open()
    seen.extend((repr(promised), repr(right)))
    await right.commit("main", {KEY: b"1"}, {}, op=Op("w", 1))
    server.kill()
    for call in (right.commit("main", {}, {}, op=Op("w", 2)), right.read("main", [KEY])):
        with pytest.raises(HoldfastError) as raised:
            await call
        seen.append("".join(traceback.format_exception(raised.value)))
    await right.close()
    assert SECRET not in "\n".join(seen)
    assert SECRET not in caplog.text


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A directory with ``key.pem`` and ``cert.pem`` for 127.0.0.1."""
    openssl = shutil.which("openssl")
    assert openssl, "openssl makes the certificate of this test: install it"
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([openssl, *words.split(), *files], check=True, capture_output=True, cwd=tmp_path)
    return tmp_path


async def test_tls_is_spoken_and_a_stranger_is_refused(certificate: Path) -> None:
    require("redis")
    key, cert = certificate / "key.pem", certificate / "cert.pem"
    plain = RedisServer(redis_binary(), certificate / "server")
    try:
        from servers.process import free_port

        port = free_port()
        for name, value in (
            ("tls-cert-file", cert),
            ("tls-key-file", key),
            ("tls-ca-cert-file", cert),
            ("tls-auth-clients", "no"),
        ):
            plain.call("CONFIG", "SET", name, str(value))
        assert plain.call("CONFIG", "SET", "tls-port", str(port)) == b"+OK\r\n"
        backend = RedisBackend(f"rediss://127.0.0.1:{port}/?tls_ca_file={cert}")
        assert (await backend.open()).survives is Survives.HOST
        assert await backend.commit("main", {KEY: b"1"}, {KEY: 0}, op=Op("w", 1)) == 1
        assert (await backend.read("main", [KEY]))[KEY].payload == b"1"
        await backend.close()
        with pytest.raises(UnavailableError):
            await RedisBackend(f"rediss://127.0.0.1:{port}/").open()
    finally:
        plain.stop()


async def test_a_backend_is_opened_once_and_a_reader_writes_nothing(tmp_path: Path) -> None:
    backend = backend_on(tmp_path)
    await backend.open()
    with pytest.raises(FailedError, match="open already"):
        await backend.open()
    reader = backend_on(tmp_path / "elsewhere")
    await reader.open(read_only=True)
    server = shared("valkey")
    assert isinstance(server, RedisServer)
    assert server.call("KEYS", f"{own_name(tmp_path / 'elsewhere')}:*") == b"*0\r\n"
    assert [scope async for scope in reader.scopes()] == []
    await reader.close()
    await backend.close()
