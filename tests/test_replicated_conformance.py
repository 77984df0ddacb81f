"""The conformance suite over copies: several backends as one keep every promise of the contract."""

from __future__ import annotations

from pathlib import Path

import pytest
from backend_list import BACKENDS

from holdfast.contract import Backend
from holdfast.testing.conformance import Bench, Check, Factory, Need, conformance_cases
from holdfast.wrappers.replicated import Replicated


def _over(*names: str, quorum: int | None = None) -> Factory:
    def make(place: Path) -> Backend:
        copies = []
        for at, name in enumerate(names):
            own = place / f"{at}-{name}"
            own.mkdir(exist_ok=True)
            copies.append(BACKENDS[name](own))
        return Replicated(*copies, quorum=quorum)

    return make


STACKS: dict[str, Factory] = {
    "three memories": _over("memory", "memory", "memory"),
    "two files": _over("file", "file"),
    "two sqlites": _over("sqlite", "sqlite"),
    "redis, sqlite, postgres": _over("redis", "sqlite", "postgres"),
    "postgres and redis, quorum 1": _over("postgres", "redis", quorum=1),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("check", conformance_cases())
async def test_copies_keep_the_contract(check: Check, name: str, tmp_path: Path) -> None:
    lacking = await check.run_on(Bench(STACKS[name], tmp_path))
    if lacking is not None and not (lacking is Need.EXCLUSIVE and "file" not in name):
        assert "memories" in name, f"{name} should promise that {lacking.value}"
