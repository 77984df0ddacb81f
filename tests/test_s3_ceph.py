"""S3 on Ceph's own gateway, which keeps what it was given: killed, restarted and raced for."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from s3_racer import COUNTER, raised
from servers.s3 import CephServer
from servers.shared import own_name, shared

from holdfast.backends.s3 import S3Backend, attest
from holdfast.contract import How, Key, Op, Survives
from holdfast.errors import UnavailableError, UnknownOutcomeError
from holdfast.testing.conformance import Bench, Check, conformance_cases

KEY = Key("signal", "BTCUSDT_a_x", "BTCUSDT")
RACER = Path(__file__).parent / "s3_racer.py"
ON_CEPH = (
    "racing committers have one winner per version",
    "a commit cancelled at any step is whole or absent",
    "reopening keeps everything",
    "payloads come back byte for byte",
    "scopes do not touch each other",
    "a version never comes back",
    "a repeated op gets its number and is not applied again",
    "a conflict names the keys and changes nothing",
)
"""The part of the conformance suite that meets the service itself; all of it runs on moto."""


def ceph() -> CephServer:
    server = shared("ceph")
    assert isinstance(server, CephServer)
    return server


async def settle(backend: S3Backend, n: int, expect: int, seen: Counter[str]) -> int:
    """Commit as a caller must, through a restart; note in ``seen`` what it went through."""
    for _ in range(2000):
        try:
            return await backend.commit("main", {KEY: b'{"n":%d}' % n}, {KEY: expect}, op=Op("w", n))
        except (UnknownOutcomeError, UnavailableError) as error:
            seen[type(error).__name__] += 1
            await asyncio.sleep(0.02)
    raise AssertionError("the service never came back")


def start_racer(url: str, name: str, ledger: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(RACER), url, name, "25", str(ledger)])


CASES = [case for case in conformance_cases() if case.values[0].name in ON_CEPH]  # type: ignore[union-attr]


@pytest.mark.parametrize("check", CASES)
async def test_ceph_keeps_what_the_contract_asks_of_the_service(check: Check, tmp_path: Path) -> None:
    server = ceph()
    bench = Bench(lambda place: S3Backend(server.store(own_name(place), "deadline_seconds=20")), tmp_path)
    assert await check.run_on(bench) is None


def test_the_chosen_part_of_the_suite_exists() -> None:
    assert len(CASES) == len(ON_CEPH)


async def test_ceph_passes_the_probe_with_etags_unquoted_as_its_16th_version_wants_them() -> None:
    server = ceph()
    attest._RACED.clear()
    backend = S3Backend(server.store("probe", "survives=host"))
    promise = await backend.open()
    assert (promise.survives, promise.survives_how) == (Survives.HOST, How.ASSUMED)
    assert promise.fenced_how is How.ATTESTED
    assert backend._service is not None
    assert not backend._service.quotes_etags
    assert server.listed("probe/") == []
    await backend.close()


async def test_two_processes_and_a_third_race_and_no_increment_is_lost(tmp_path: Path) -> None:
    url = ceph().store(own_name(tmp_path), "deadline_seconds=20")
    ledgers = [tmp_path / f"ledger{i}" for i in range(2)]
    racers = [start_racer(url, f"racer-{i}", ledgers[i]) for i in range(2)]
    backend = S3Backend(url)
    await backend.open()
    try:
        ours = [await raised(backend, Op("third", n)) for n in range(1, 26)]
        for racer in racers:
            assert await asyncio.to_thread(racer.wait, 90) == 0
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    lines = [line.split() for ledger in ledgers for line in ledger.read_text().splitlines()]
    everything = sorted([*ours, *((int(number), int(value)) for number, value, _ in lines)])
    assert everything == [(i, i) for i in range(1, 76)], "one winner for each version"
    assert (await backend.read("main", [COUNTER]))[COUNTER].version == 75
    await backend.close()


async def test_a_gateway_killed_again_and_again_loses_nothing_and_is_used_again_without_a_restart_of_the_bot(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    server = ceph()
    backend = S3Backend(server.store(own_name(tmp_path), "deadline_seconds=10"))
    await backend.open()
    kills, version, n, seen = 4, 0, 0, Counter[str]()
    done, busy = asyncio.Event(), asyncio.Event()

    async def killer() -> None:
        try:
            for _ in range(kills):
                busy.clear()
                await busy.wait()
                await asyncio.to_thread(server.gateway.signal, signal.SIGKILL)  # while a commit is under way
                server.gateway.kill()
                server.gateway.start()  # by this thread: what it starts ends with it
        finally:
            done.set()

    task = asyncio.ensure_future(killer())
    while not done.is_set():
        n += 1
        if n % 5 == 0:
            busy.set()
        number = await settle(backend, n, version, seen)
        assert number == version + 1, "each op is counted once"
        version = number
    await task
    record = (await backend.read("main", [KEY]))[KEY]
    assert (record.version, record.op) == (version, Op("w", n))
    await backend.close()
    record_property("proof:s3 kills", {"of the gateway": kills, "commits meanwhile": n, **seen})


async def test_the_disk_daemon_killed_too_loses_nothing_that_was_acknowledged(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    server = ceph()
    backend = S3Backend(server.store(own_name(tmp_path), "deadline_seconds=2"))
    await backend.open()
    seen = Counter[str]()
    version = 0
    for n in range(1, 31):
        version = await settle(backend, n, version, seen)
    await asyncio.to_thread(server.disk.signal, signal.SIGKILL)
    under_way = asyncio.ensure_future(settle(backend, 31, version, seen))
    async with asyncio.timeout(20):
        while not seen["UnknownOutcomeError"]:  # noqa: ASYNC110  (bounded by the line above)
            await asyncio.sleep(0.01)
    server.kill()
    server.restart()
    assert await under_way == version + 1
    stored = json.loads(server.get(f"{own_name(tmp_path)}/main.json"))
    assert (stored["number"], stored["rows"][str(KEY)]["row"]) == (31, {"n": 31})
    await backend.close()
    record_property("proof:s3 kills", {"of the disk daemon": 1, "commits before": 30, **seen})
