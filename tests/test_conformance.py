"""The conformance suite over every backend, and over the wrappers of the proof kit."""

from __future__ import annotations

from pathlib import Path

import pytest
from backend_list import BACKENDS

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Backend, Key, Op
from holdfast.testing.conformance import Bench, Check, Need, certify, conformance_cases
from holdfast.testing.faults import Fault, FaultyBackend
from holdfast.testing.history import History, Witnessed
from holdfast.testing.races import overlapping_writes

ONE_PROCESS = ("memory", "file")
"""Backends that belong to one process at a time; the others are shared."""


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("check", conformance_cases())
async def test_a_backend_keeps_the_contract(check: Check, name: str, tmp_path: Path) -> None:
    lacking = await check.run_on(Bench(BACKENDS[name], tmp_path))
    if lacking is not None and not (lacking is Need.EXCLUSIVE and name not in ONE_PROCESS):
        assert name == "memory", f"{name} should promise that {lacking.value}"


@pytest.mark.parametrize("check", conformance_cases())
async def test_the_kits_own_wrappers_keep_the_contract(check: Check, tmp_path: Path) -> None:
    await check.run_on(Bench(lambda place: Witnessed(FaultyBackend(MemoryBackend()), History()), tmp_path))


@pytest.mark.parametrize("name", BACKENDS)
async def test_twenty_overlapping_writers_leave_the_last_value_in_500_rounds(name: str, tmp_path: Path) -> None:
    bench = Bench(BACKENDS[name], tmp_path)
    try:
        await overlapping_writes(bench, await bench.open(), rounds=500)
    finally:
        await bench.close()


async def test_certify_works_without_pytest_and_prints_a_table() -> None:
    report = await certify(lambda place: MemoryBackend())
    assert report.ok, str(report)
    assert "passed" in str(report)


class _Forgetful(MemoryBackend):
    """Says yes to everything and does not look at ``expect``."""

    async def commit(self, scope, changes, expect, *, op):  # type: ignore[no-untyped-def]
        return await super().commit(scope, changes, {}, op=op)


class _Halved(MemoryBackend):
    """Applies its changes one by one."""

    async def commit(self, scope, changes, expect, *, op):  # type: ignore[no-untyped-def]
        number = 0
        for at, (key, payload) in enumerate(changes.items()):
            number = await super().commit(scope, {key: payload}, expect if not at else {}, op=Op(op.writer, op.n + at))
        return number or await super().commit(scope, {}, expect, op=op)


@pytest.mark.parametrize("broken", [_Forgetful, _Halved])
async def test_certify_finds_a_backend_that_breaks_the_contract(broken: type[MemoryBackend]) -> None:
    report = await certify(lambda place: broken())
    assert not report.ok
    assert report.count("failed") >= 3, str(report)


async def test_a_delayed_commit_is_not_seen_before_it_returns() -> None:
    import asyncio

    backend = FaultyBackend(MemoryBackend(), Fault(1, "delay"))
    await backend.open()
    key = Key("signal", "a", "b")
    task = asyncio.ensure_future(backend.commit("main", {key: b"{}"}, {}, op=Op("w", 1)))
    await backend.waiting.wait()
    assert await backend.read("main", [key]) == {}
    backend.go_on.set()
    assert await task == 1
    await backend.close()


def test_the_kits_backends_are_backends() -> None:
    assert isinstance(FaultyBackend(MemoryBackend()), Backend)
