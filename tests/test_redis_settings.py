"""Redis: what open reports for right and wrong configurations of real servers, old and new; none is misreported."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest
from servers import require
from servers.valkey import RedisServer, redis_binary, valkey_binary

from holdfast.backends.redis import RedisBackend
from holdfast.contract import How, Key, Op, Survives
from holdfast.errors import (
    FailedError,
    HoldfastError,
    InvalidInputError,
    UnavailableError,
    UnknownOutcomeError,
    UnsafeSettingError,
)

LIMITED = "user default off\nuser bot on >secret ~holdfast:* &* +@all {}\n"
BOT = "bot:secret@"
RIGHTS = (
    "+get +set +del +mget +hget +hset +hdel +hlen +hmget +hgetall +zadd +zrem +zrangebylex +sadd +smembers +incr "
    "+multi +exec +eval +evalsha +wait +waitaof +info +role +config|get"
)
PAGE_RIGHTS = f"user bot on >secret ~holdfast:* -@all {RIGHTS}\n"


NO_SETTINGS: Mapping[str, str] = MappingProxyType({})


class Case(NamedTuple):
    """A configuration, and what open must report for it."""

    name: str
    expected: tuple[Survives, How] | type[HoldfastError]
    says: str = ""
    """What a warning, or the error, must name; empty: there is none."""
    settings: Mapping[str, str] = NO_SETTINGS
    lines: str = ""
    login: str = ""
    options: str = ""
    replicas: int = 0
    replica_settings: Mapping[str, str] = NO_SETTINGS
    at_replica: bool = False
    old: bool = False
    """Redis 7.0 instead of Valkey 9."""


HOST, PROCESS, NOTHING, SERVER = Survives.HOST, Survives.PROCESS, Survives.NOTHING, Survives.SERVER
ATTESTED, ASSUMED, UNKNOWN = How.ATTESTED, How.ASSUMED, How.UNKNOWN
EVERYSEC, NO_AOF = {"appendfsync": "everysec"}, {"appendonly": "no"}

CASES = [
    Case("append-only, always", (HOST, ATTESTED)),
    Case("every second", (PROCESS, ATTESTED), "appendfsync always", EVERYSEC),
    Case("whenever", (PROCESS, ATTESTED), "appendfsync always", {"appendfsync": "no"}),
    Case("no file", (NOTHING, ATTESTED), "appendonly yes", NO_AOF),
    Case("snapshots only", (NOTHING, ATTESTED), "appendonly yes", {**NO_AOF, "save": "60 1"}),
    Case("evicts by age", UnsafeSettingError, "noeviction", {"maxmemory-policy": "allkeys-lru", "maxmemory": "64mb"}),
    Case("evicts by use", UnsafeSettingError, "noeviction", {"maxmemory-policy": "allkeys-lfu", "maxmemory": "64mb"}),
    Case("evicts by chance", UnsafeSettingError, "noeviction", {"maxmemory-policy": "allkeys-random"}),
    Case("evicts what expires", (HOST, ATTESTED), "", {"maxmemory-policy": "volatile-lru", "maxmemory": "64mb"}),
    Case("a limit, nothing evicted", (HOST, ATTESTED), "", {"maxmemory": "64mb"}),
    Case("rewrites without fsync", (HOST, ASSUMED), "no-appendfsync-on-rewrite", {"no-appendfsync-on-rewrite": "yes"}),
    Case("old: always", (HOST, ATTESTED), old=True),
    Case("old: every second", (PROCESS, ATTESTED), "appendfsync always", EVERYSEC, old=True),
    Case("old: no file", (NOTHING, ATTESTED), "appendonly yes", NO_AOF, old=True),
    Case(
        "old: rewrites without fsync",
        (PROCESS, ATTESTED),
        "no-appendfsync-on-rewrite",
        {"no-appendfsync-on-rewrite": "yes"},
        old=True,
    ),
    Case("old: evicts", UnsafeSettingError, "noeviction", {"maxmemory-policy": "allkeys-lru"}, old=True),
    Case("CONFIG forbidden", (HOST, ASSUMED), "CONFIG", lines=LIMITED.format("-config"), login=BOT),
    Case("old: CONFIG forbidden", (PROCESS, UNKNOWN), "CONFIG", lines=LIMITED.format("-config"), login=BOT, old=True),
    Case("nothing told", (PROCESS, UNKNOWN), "CONFIG", lines=LIMITED.format("-@dangerous -waitaof"), login=BOT),
    Case(
        "evicts, CONFIG forbidden",
        UnsafeSettingError,
        "noeviction",
        {"maxmemory-policy": "allkeys-lru"},
        LIMITED.format("-config"),
        BOT,
    ),
    Case("only the rights that the page lists", (HOST, ATTESTED), lines=PAGE_RIGHTS, login=BOT),
    Case("a command forbidden", FailedError, "permit", lines=LIMITED.format("-zrem"), login=BOT),
    Case("a foreign prefix", UnavailableError, "permit", lines=LIMITED.format(""), login=BOT, options="prefix=other"),
    Case("a wrong password", UnavailableError, "password", lines=LIMITED.format(""), login="bot:wrong@"),
    Case("no password", UnavailableError, "password", {"requirepass": "secret"}),
    Case("a replica", UnsafeSettingError, "primary", replicas=1, at_replica=True),
    Case("old: a replica", UnsafeSettingError, "primary", replicas=1, at_replica=True, old=True),
    Case("replicas not asked for", (HOST, ASSUMED), "replicas=1", replicas=1),
    Case("a replica waited for", (SERVER, ATTESTED), "", replicas=1, options="replicas=1"),
    Case("one of two waited for", (SERVER, ASSUMED), "replicas=2", replicas=2, options="replicas=1"),
    Case("old: a replica waited for", (SERVER, ATTESTED), "WAITAOF", replicas=1, options="replicas=1", old=True),
    Case("a replica that is not there", UnsafeSettingError, "replicas", options="replicas=1&deadline_seconds=0.5"),
    Case(
        "a replica without a file",
        UnsafeSettingError,
        "replicas",
        replicas=1,
        replica_settings=NO_AOF,
        options="replicas=1&deadline_seconds=0.5",
    ),
    Case("a replica, but every second", (PROCESS, ATTESTED), "always", EVERYSEC, replicas=1, options="replicas=1"),
    Case("too few replicas to write", UnavailableError, "min-replicas", {"min-replicas-to-write": "1"}),
    Case("a node of a cluster", InvalidInputError, "redis+cluster", {"cluster-enabled": "yes"}),
]

Start = Callable[..., RedisServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[RedisServer] = []

    def begin(settings: Mapping[str, str], *, old: bool = False, lines: str = "") -> RedisServer:
        require("redis" if old else "valkey")
        binary = redis_binary() if old else valkey_binary()
        started.append(RedisServer(binary, tmp_path / f"server{len(started)}", dict(settings), lines=lines))
        return started[-1]

    yield begin
    for server in reversed(started):
        server.stop()


def replicas_of(primary: RedisServer, case: Case, start: Start) -> list[RedisServer]:
    quick = {"replicaof": f"127.0.0.1 {primary.port}", "repl-diskless-sync-delay": "0"}
    return [start({**quick, **case.replica_settings}, old=case.old) for _ in range(case.replicas)]


async def linked(server: RedisServer) -> None:
    """Wait until a replica follows its primary."""
    for _ in range(1000):
        if b"master_link_status:up" in server.call("INFO", "replication"):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the replica never followed")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
async def test_a_configuration_is_reported_as_it_is(
    case: Case, start: Start, record_property: Callable[[str, object], None]
) -> None:
    settings = {"repl-diskless-sync-delay": "0", **case.settings}
    primary = start(settings, old=case.old, lines=case.lines)
    replicas = replicas_of(primary, case, start)
    for replica in replicas:
        await linked(replica)
    port = (replicas[0] if case.at_replica else primary).port
    backend = RedisBackend(f"redis://{case.login}127.0.0.1:{port}/?{case.options}")
    try:
        if isinstance(case.expected, tuple):
            found = await backend.open()
            assert (found.survives, found.survives_how) == case.expected, found.warnings
            assert found.atomic
            assert found.fenced
            assert found.fenced_how is How.ATTESTED
            assert found.shared
            assert case.says in " ".join(found.warnings)
            assert bool(found.warnings) == bool(case.says), found.warnings
            key = Key("signal", "a", "b")
            assert await backend.commit("main", {key: b"{}"}, {key: 0}, op=Op("w", 1)) == 1
            assert (await backend.read("main", [key]))[key].version == 1
        else:
            with pytest.raises(case.expected, match=re.escape(case.says)) as raised:
                await backend.open()
            assert type(raised.value) is case.expected
            assert "secret" not in str(raised.value)
    finally:
        await backend.close()
    record_property("proof:redis attestation", {"configurations": 1})


async def test_a_server_that_is_no_cluster_is_told_apart(start: Start) -> None:
    server = start({})
    with pytest.raises(InvalidInputError, match="not a cluster"):
        await RedisBackend(f"redis+cluster://127.0.0.1:{server.port}").open()


async def test_a_setting_that_is_spoilt_while_we_run_is_found_at_the_next_commit(start: Start) -> None:
    server = start({})
    backend = RedisBackend(f"{server.url}/?deadline_seconds=1")
    await backend.open()
    await backend.commit("main", {}, {}, op=Op("w", 1))
    server.call("CONFIG", "SET", "appendonly", "no")
    with pytest.raises(UnknownOutcomeError, match="appendonly"):
        await backend.commit("main", {}, {}, op=Op("w", 2))
    server.call("CONFIG", "SET", "appendonly", "yes")
    for _ in range(100):
        try:
            assert await backend.commit("main", {}, {}, op=Op("w", 2)) == 2, "the same op: it was applied"
            break
        except UnknownOutcomeError:
            await asyncio.sleep(0.05)  # the file is being written anew
    await backend.close()


async def test_a_server_that_comes_back_with_less_is_not_written_to(start: Start, tmp_path: Path) -> None:
    server = start({})
    backend = RedisBackend(server.url)
    await backend.open()
    await backend.commit("main", {}, {}, op=Op("w", 1))
    server.stop()
    file = tmp_path / "server0" / "server.conf"
    file.write_text(file.read_text().replace('appendfsync "always"', 'appendfsync "everysec"'))
    server.restart()
    with pytest.raises(UnsafeSettingError, match=r"less than at open.*appendfsync"):
        await backend.commit("main", {}, {}, op=Op("w", 2))
    assert b":1" in server.call("STRLEN", "holdfast:{main}:number")
    await backend.close()


async def test_a_commit_that_replicas_do_not_confirm_is_not_acknowledged(start: Start) -> None:
    primary = start({"repl-diskless-sync-delay": "0"})
    case = Case("", UnsafeSettingError, replicas=1)
    (replica,) = replicas_of(primary, case, start)
    await linked(replica)
    backend = RedisBackend(f"{primary.url}/?replicas=1&deadline_seconds=1")
    other = RedisBackend(f"{primary.url}/?replicas=1&deadline_seconds=1")
    await backend.open()
    await other.open()
    key = Key("signal", "a", "b")
    await backend.commit("main", {key: b"1"}, {}, op=Op("w", 1))
    await other.commit("main", {}, {}, op=Op("other", 1))
    replica.stop()
    with pytest.raises(UnknownOutcomeError, match="0 of 1 replicas"):
        await backend.commit("main", {key: b"2"}, {key: 1}, op=Op("w", 2))
    for sender in (backend, other):  # the repetition waits anew, also on another connection
        with pytest.raises(UnknownOutcomeError, match="0 of 1 replicas"):
            await sender.commit("main", {key: b"2"}, {key: 1}, op=Op("w", 2))
    with pytest.raises(UnavailableError, match="not safe yet"):
        await other.read("main", [key])  # it is there, and could still be lost: nobody may act on it
    replica.restart()
    await linked(replica)
    assert await backend.commit("main", {key: b"2"}, {key: 1}, op=Op("w", 2)) == 3
    assert (await other.read("main", [key]))[key].payload == b"2"
    await backend.close()
    await other.close()
