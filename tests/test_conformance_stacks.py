"""The conformance suite over wrapper stacks: a wrapper keeps every promise of what it wraps."""

from __future__ import annotations

from pathlib import Path

import pytest
from stack_list import BELONG_TO_ONE_PROCESS, STACKS, material_of

from holdfast.testing.conformance import Bench, Check, Need, conformance_cases

COSTLY = "the writer that wrote longest ago is forgotten first"
"""4,096 commits: over copies on servers they would take longer than all the rest, and copies in memory show it too."""

CASES = [
    pytest.param(check, name, id=f"{check.name.replace(' ', '-')}-{name}")
    for name in STACKS
    for check in (param.values[0] for param in conformance_cases())
    if isinstance(check, Check) and not (check.name == COSTLY and "," in name and "memory" not in name)
]


@pytest.mark.parametrize(("check", "name"), CASES)
async def test_a_stack_keeps_the_contract(check: Check, name: str, tmp_path: Path) -> None:
    lacking = await check.run_on(Bench(STACKS[name], tmp_path, material_of(name)))
    if lacking is not None and not (lacking is Need.EXCLUSIVE and name not in BELONG_TO_ONE_PROCESS):
        assert "memory" in name, f"{name} should promise that {lacking.value}"
