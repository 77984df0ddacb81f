"""Every Python example in the README and in docs/ runs, and every link between the pages leads somewhere."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def examples(page: Path) -> list[str]:
    return FENCE.findall(page.read_text())


@pytest.mark.parametrize("page", [p for p in PAGES if examples(p)], ids=lambda p: p.name)
def test_the_examples_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page share one namespace, top-level await allowed, in an empty folder."""
    import holdfast

    monkeypatch.chdir(tmp_path)
    blocks = [
        compile(text, f"{page.name}, block {at}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for at, text in enumerate(examples(page), 1)
    ]
    names: dict[str, object] = {"__name__": "__docs__"}

    async def run() -> None:
        try:
            for block in blocks:
                function = types.FunctionType(block, names)
                outcome = function()
                if inspect.isawaitable(outcome):
                    await outcome
        finally:
            await holdfast.close()

    try:
        asyncio.run(run())
    finally:
        holdfast.reset()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_links_of_a_page_lead_to_files(page: Path) -> None:
    missing = [
        target
        for target in LINK.findall(page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not missing
