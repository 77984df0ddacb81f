"""Redis: servers and clients killed, restarted, failed over; processes that race. Nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis_racer import COUNTER, raised
from servers import require
from servers.shared import own_name, shared
from servers.valkey import RedisServer, redis_binary, valkey_binary

from holdfast.backends.redis import RedisBackend
from holdfast.contract import Key, Op, Record
from holdfast.errors import FailedError, UnavailableError, UnknownOutcomeError

KEY = Key("signal", "BTCUSDT_a_x", "BTCUSDT")
Start = Callable[..., RedisServer]
RACER = Path(__file__).parent / "redis_racer.py"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[RedisServer] = []

    def begin(settings: dict[str, str] | None = None, *, old: bool = False, **more: object) -> RedisServer:
        require("redis" if old else "valkey")
        binary = redis_binary() if old else valkey_binary()
        place = tmp_path / f"server{len(started)}"
        started.append(RedisServer(binary, place, settings, **more))  # type: ignore[arg-type]
        return started[-1]

    yield begin
    for server in reversed(started):
        server.stop()


async def settle(backend: RedisBackend, n: int, expect: int, seen: Counter[str] | None = None) -> int:
    """Commit as a caller must, through restarts and failovers; note in ``seen`` what it went through."""
    for _ in range(2000):
        try:
            return await backend.commit("main", {KEY: b'{"n":%d}' % n}, {KEY: expect}, op=Op("w", n))
        except (UnknownOutcomeError, UnavailableError) as error:
            if seen is not None:
                seen[type(error).__name__] += 1
            await asyncio.sleep(0.01)
    raise AssertionError("the server never came back")


def start_racer(url: str, name: str, count: int, ledger: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(RACER), url, name, str(count), str(ledger)])


def acknowledged(ledger: Path) -> list[tuple[int, int]]:
    """Return (number, value) of each whole line."""
    if not ledger.exists():
        return []
    lines = [line.split() for line in ledger.read_text().splitlines(keepends=False) if line.count(" ") == 2]
    return [(int(number), int(value)) for number, value, _ in lines]


@pytest.mark.parametrize("old", [False, True], ids=["valkey", "redis-7.0"])
async def test_a_server_killed_again_and_again_loses_nothing_that_was_acknowledged(
    start: Start, old: bool, record_property: Callable[[str, object], None]
) -> None:
    server = start(old=old)
    backend = RedisBackend(f"{server.url}/?deadline_seconds=2")
    await backend.open()
    chance, kills, version, n, seen = random.Random(3), 10, 0, 0, Counter[str]()
    done = asyncio.Event()

    async def killer() -> None:
        for _ in range(kills):
            await asyncio.sleep(chance.uniform(0.02, 0.15))
            await asyncio.to_thread(server.process.signal, signal.SIGKILL)  # while commits are under way
            server.kill()
            server.restart()
        done.set()

    task = asyncio.ensure_future(killer())
    while not done.is_set():
        n += 1
        number = await settle(backend, n, version, seen)
        assert number == version + 1, "each op is counted once"
        version = number
    await task
    fresh = RedisBackend(server.url)
    await fresh.open()
    record = (await fresh.read("main", [KEY]))[KEY]
    assert (record.version, record.op) == (version, Op("w", n))
    assert n > kills
    await fresh.close()
    await backend.close()
    record_property("proof:redis kills", {"of the server": kills, "commits meanwhile": n, **seen})


async def test_a_client_killed_in_its_commits_loses_nothing_that_it_was_told(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    url = f"{shared('valkey').url}/?prefix={own_name(tmp_path)}"
    chance, kills, ledger = random.Random(5), 20, tmp_path / "ledger"
    for turn in range(kills):
        before = len(acknowledged(ledger))
        racer = start_racer(url, f"racer-{turn}", 100_000, ledger)
        try:
            while len(acknowledged(ledger)) < before + chance.randrange(2, 25):
                assert racer.poll() is None
                await asyncio.sleep(0.005)
        finally:
            racer.send_signal(signal.SIGKILL)
            racer.wait()
    backend = RedisBackend(url)
    await backend.open()
    told = acknowledged(ledger)
    record = (await backend.read("main", [COUNTER]))[COUNTER]
    assert record.version == int(record.payload), "every commit counted one up"
    last = max(number for number, _ in told)
    assert last <= record.version <= last + kills, "at most the one under way was not told"
    assert all(number == value for number, value in told)
    await backend.close()
    record_property("proof:redis kills", {"of a client": kills, "commits told before": len(told)})


async def test_two_processes_and_a_third_race_and_no_increment_is_lost(tmp_path: Path) -> None:
    url = f"{shared('valkey').url}/?prefix={own_name(tmp_path)}"
    ledgers = [tmp_path / f"ledger{i}" for i in range(2)]
    racers = [start_racer(url, f"racer-{i}", 150, ledgers[i]) for i in range(2)]
    backend = RedisBackend(url)
    await backend.open()
    try:
        ours = [await raised(backend, Op("third", n)) for n in range(1, 151)]
        for racer in racers:
            assert await asyncio.to_thread(racer.wait, 60) == 0
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    everything = sorted([*ours, *acknowledged(ledgers[0]), *acknowledged(ledgers[1])])
    assert everything == [(i, i) for i in range(1, 451)], "one winner for each version"
    await backend.close()


async def test_a_restart_between_two_commits_is_not_even_noticed(start: Start) -> None:
    server = start()
    backend = RedisBackend(server.url)
    await backend.open()
    version = await backend.commit("main", {KEY: b"1"}, {}, op=Op("w", 1))
    await backend.read("main", [KEY])
    server.kill()
    server.restart()
    assert (await backend.read("main", [KEY]))[KEY].version == version
    assert await backend.commit("main", {KEY: b"2"}, {KEY: version}, op=Op("w", 2)) == version + 1
    await backend.close()


async def test_a_script_that_the_server_forgot_is_sent_again(start: Start) -> None:
    server = start()
    backend = RedisBackend(server.url)
    await backend.open()
    for n in range(1, 6):
        server.call("SCRIPT", "FLUSH")
        numbers = await asyncio.gather(*(backend.commit("main", {}, {}, op=Op(f"w{i}", n)) for i in range(7)))
        assert sorted(numbers) == list(range(7 * n - 6, 7 * n + 1))
    await backend.close()


async def test_a_server_that_lost_commits_is_found_out_and_refused(start: Start) -> None:
    server = start({"appendonly": "no"})
    backend = RedisBackend(server.url)
    await backend.open()
    for n in range(1, 4):
        await backend.commit("main", {KEY: b"%d" % n}, {}, op=Op("w", n))
    server.kill()
    server.restart()
    with pytest.raises(FailedError, match="stands at commit 0, though commit 3 was acknowledged"):
        await backend.commit("main", {KEY: b"4"}, {}, op=Op("w", 4))
    with pytest.raises(FailedError, match="lost commits"):
        await backend.read("main", [KEY])
    with pytest.raises(FailedError, match="lost commits"):
        await backend.head("main")
    assert server.call("EXISTS", "holdfast:{main}:number") == b":0\r\n", "nothing was written over the loss"
    await backend.close()


async def test_a_frozen_server_costs_the_deadline_and_is_used_again_when_it_thaws(start: Start) -> None:
    server = start()
    backend = RedisBackend(f"{server.url}/?deadline_seconds=0.3")
    await backend.open()
    version = await backend.commit("main", {KEY: b"1"}, {}, op=Op("w", 1))
    server.process.signal(signal.SIGSTOP)
    clock = asyncio.get_running_loop().time
    begun = clock()
    with pytest.raises(UnknownOutcomeError):
        await backend.commit("main", {KEY: b"2"}, {KEY: version}, op=Op("w", 2))
    with pytest.raises(UnavailableError):
        await backend.read("main", [KEY])
    assert clock() - begun < 2.6, "twice the deadline, and what a busy machine may take longer"
    server.process.signal(signal.SIGCONT)
    assert await settle(backend, 2, version) == version + 1
    await backend.close()


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_closing_leaves_no_task_and_no_descriptor(start: Start) -> None:
    server = start()
    tasks, fds = len(asyncio.all_tasks()), descriptors()
    for _ in range(3):
        backend = RedisBackend(server.url)
        await backend.open()
        await asyncio.gather(*(backend.commit("main", {}, {}, op=Op(f"w{i}", 1)) for i in range(30)))
        await asyncio.gather(*(backend.read("main", [KEY]) for _ in range(30)))
        await backend.close()
        await backend.close()
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == tasks
    assert descriptors() <= fds


# -- Sentinel and Cluster ----------------------------------------------------------------------------------------------


async def until(answers: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something that the servers do by themselves."""
    end = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            if answers():
                return
        except OSError:
            pass  # a server that changes its role ends its connections
        assert asyncio.get_running_loop().time() < end, "it never happened"
        await asyncio.sleep(0.02)


async def test_a_failover_by_sentinels_is_followed_and_loses_nothing(start: Start) -> None:
    quick = {"repl-diskless-sync-delay": "0", "min-replicas-max-lag": "2"}
    primary = start(quick)
    replica = start({**quick, "replicaof": f"127.0.0.1 {primary.port}"})
    await until(lambda: b"master_link_status:up" in replica.call("INFO", "replication"))
    lines = (
        f"sentinel monitor bots 127.0.0.1 {primary.port} 1\n"
        "sentinel down-after-milliseconds bots 300\nsentinel failover-timeout bots 3000\n"
    )
    sentinel = start(lines=lines, sentinel=True)
    await until(lambda: b"num-slaves\r\n$1\r\n1" in sentinel.call("SENTINEL", "MASTER", "bots"))
    backend = RedisBackend(f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/bots?replicas=1&deadline_seconds=1")
    promised = await backend.open()
    assert promised.survives.name == "SERVER"
    version = 0
    for n in range(1, 21):
        version = await settle(backend, n, version)
    assert version == 20
    primary.kill()
    await until(lambda: b"role:master" in replica.call("INFO", "replication"))
    record = await asyncio.wait_for(_read(backend), 10)
    assert (record.version, record.op) == (20, Op("w", 20)), "what was acknowledged is on the new primary"
    with pytest.raises((UnknownOutcomeError, UnavailableError)):
        await backend.commit("main", {KEY: b"21"}, {KEY: 20}, op=Op("w", 21))  # it has no replica yet
    primary.restart()
    primary.call("REPLICAOF", "127.0.0.1", str(replica.port))  # as the Sentinel does after ten seconds
    assert await settle(backend, 21, 20) == 21
    await backend.close()


async def _read(backend: RedisBackend) -> Record:
    while True:
        try:
            return (await backend.read("main", [KEY]))[KEY]
        except UnavailableError:
            await asyncio.sleep(0.02)


async def test_a_cluster_spreads_scopes_over_its_nodes_and_a_moved_scope_is_followed(start: Start) -> None:
    nodes = [start({"cluster-enabled": "yes", "cluster-node-timeout": "2000"}) for _ in range(3)]
    for i, node in enumerate(nodes):
        node.call("CLUSTER", "ADDSLOTSRANGE", str(5461 * i), str(5461 * (i + 1) - 1 if i < 2 else 16383))
        node.call("CLUSTER", "SET-CONFIG-EPOCH", str(i + 1))
    for node in nodes[1:]:
        nodes[0].call("CLUSTER", "MEET", "127.0.0.1", str(node.port))
    await until(lambda: all(b"cluster_state:ok" in node.call("CLUSTER", "INFO") for node in nodes))
    await until(lambda: all(b"cluster_known_nodes:3" in node.call("CLUSTER", "INFO") for node in nodes))
    backend = RedisBackend(f"redis+cluster://127.0.0.1:{nodes[0].port},127.0.0.1:{nodes[1].port}")
    promised = await backend.open()
    assert promised.survives.name == "HOST"
    scopes = [f"scope{i}" for i in range(12)]
    for at, scope in enumerate(scopes):
        key = Key("signal", scope, "X")
        assert await backend.commit(scope, {key: b"%d" % at}, {key: 0}, op=Op("w", 1)) == 1
    assert [scope async for scope in backend.scopes()] == sorted(scopes)
    for scope in scopes:
        assert [key async for key in backend.keys(scope)] == [Key("signal", scope, "X")]
        assert (await backend.head(scope)).number == 1
    holders = {
        node.port for node in nodes for scope in scopes if b":1" in node.call("EXISTS", f"holdfast:{{{scope}}}:number")
    }
    assert len(holders) == 3, "the scope is the hash tag"
    await _move_slot(nodes, scopes[0])
    key = Key("signal", scopes[0], "X")
    assert (await backend.read(scopes[0], [key]))[key].payload == b"0"
    await _move_slot(nodes, scopes[0])
    assert await backend.commit(scopes[0], {key: b"9"}, {key: 1}, op=Op("w", 2)) == 2
    await backend.close()


async def _move_slot(nodes: list[RedisServer], scope: str) -> None:
    """Move the slot of a scope from its node to the next one, as ``redis-cli --cluster reshard`` does."""
    slot = nodes[0].call("CLUSTER", "KEYSLOT", f"{{{scope}}}").strip(b":\r\n").decode()
    ids = [node.call("CLUSTER", "MYID").split(b"\r\n")[1].decode() for node in nodes]
    at = next(i for i, node in enumerate(nodes) if not node.call("GET", f"x{{{scope}}}").startswith(b"-MOVED"))
    source, target = nodes[at], nodes[(at + 1) % 3]
    target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[at])
    source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[(at + 1) % 3])
    names = source.call("CLUSTER", "GETKEYSINSLOT", slot, "100").split(b"\r\n")[2:-1:2]
    assert names
    done = source.call("MIGRATE", "127.0.0.1", str(target.port), "", "0", "5000", "KEYS", *names)
    assert done == b"+OK\r\n", done
    for node in (target, source, *nodes):
        node.call("CLUSTER", "SETSLOT", slot, "NODE", ids[(at + 1) % 3])
