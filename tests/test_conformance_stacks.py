"""The conformance suite over wrapper stacks: a wrapper keeps every promise of what it wraps."""

from __future__ import annotations

from pathlib import Path

import pytest
from stack_list import BELONG_TO_ONE_PROCESS, STACKS, material_of

from holdfast.testing.conformance import Bench, Check, Need, conformance_cases


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("check", conformance_cases())
async def test_a_stack_keeps_the_contract(check: Check, name: str, tmp_path: Path) -> None:
    lacking = await check.run_on(Bench(STACKS[name], tmp_path, material_of(name)))
    if lacking is not None and not (lacking is Need.EXCLUSIVE and name not in BELONG_TO_ONE_PROCESS):
        assert "memory" in name, f"{name} should promise that {lacking.value}"
