"""Imports run one way, the core needs msgspec only, and nothing reads data by running it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import holdfast

SOURCE = Path(holdfast.__file__).parent
CORE = ("contract", "errors", "names", "rows", "domains", "bulk", "cancellation")
STORE = ("store", "writer", "spans", "quarantine", "invariants")
DRIVERS = {"ccxt", "pyarrow", "rich", "redis", "psycopg", "pymongo", "bson", "obstore", "cryptography", "opentelemetry"}
DRIVERS |= {"boto3", "aiosqlite", "sqlite3"}
EXTRAS = {
    "market.ccxt": {"ccxt"},
    "market.candles_file": {"pyarrow"},
    "backends.postgres": {"psycopg"},
    "backends.redis": {"redis"},
    "backends.mongo": {"pymongo", "bson"},
    "backends.s3": {"obstore"},
    "wrappers.encrypted": {"cryptography"},
    "wrappers.traced": {"opentelemetry"},
    "cli": {"rich"},
    "testing": {"pytest", "_pytest", "rich"},
}
ABOVE_THE_STORE = ("engine", "documents", "rules", "market", "cli", "testing", "process")
MAY_NOT: dict[str, tuple[str, ...]] = {
    # who: which rooms it must never import
    **dict.fromkeys(CORE, (*STORE, *ABOVE_THE_STORE, "backends", "urls")),
    **dict.fromkeys(STORE, (*ABOVE_THE_STORE, "backends", "urls")),
    "backends": (*STORE, *ABOVE_THE_STORE, "domains", "rows"),
    "wrappers": (*STORE, *ABOVE_THE_STORE, "domains", "rows", "backends", "urls"),
    "rules": (*STORE, "backends", "urls", "engine", "documents", "market", "cli", "testing", "process"),
    "engine": ("backends", "urls", "cli", "testing", "process"),
    "documents": ("backends", "rules", "engine", "market", "urls", "cli", "testing", "process"),
    "brokers": (*STORE, "backends", "urls", "documents", "market", "cli", "testing", "process"),
    "market": (*STORE, "backends", "urls", "engine", "documents", "cli", "testing", "process"),
    "urls": (*STORE, *ABOVE_THE_STORE),
    "testing": ("cli",),
}
for _room in (*CORE, *STORE, "backends", "rules", "engine", "documents", "brokers", "market"):
    MAY_NOT[_room] = (*MAY_NOT[_room], "wrappers")
MAY_NOT["copying"] = (*STORE, *ABOVE_THE_STORE, "domains", "rows", "backends", "wrappers", "urls")
MAY = {("documents", "urls"), ("testing", "cli")}
"""Ways round: the documents' default store is opened by its path or URL; torture runs the command line."""


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imported(name: str, path: Path, *, at_import_only: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield (module, is it one of ours) for each import statement of a module."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for top in ast.walk(tree)
        if isinstance(top, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(top, ast.If) and "TYPE_CHECKING" in ast.dump(top.test))
        for node in ast.walk(top)
    }
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if at_import_only and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name.split(".")[0] == "holdfast") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                yield node.module or "", (node.module or "").split(".")[0] == "holdfast"
                continue
            above = package[: len(package) - node.level + 1]
            if node.module:
                yield ".".join([*above, node.module]), True
            else:
                yield from ((".".join([*above, alias.name]), True) for alias in node.names)


def test_imports_run_one_way() -> None:
    wrong = []
    for name, path in modules().items():
        room = name.split(".")[0]
        for target, ours in imported(name, path):
            other = target.removeprefix("holdfast.").split(".")[0]
            if ours and other in MAY_NOT.get(room, ()) and other != room and (room, other) not in MAY:
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_backends_do_not_import_each_other() -> None:
    own = {"memory", "file", "sqlite", "redis", "postgres", "mongo", "s3"}
    wrong = []
    for name, path in modules().items():
        if name.startswith("backends.") and name.split(".")[1] in own:
            for target, ours in imported(name, path):
                other = target.removeprefix("holdfast.").removeprefix("backends.").split(".")[0]
                if ours and other in own and other != name.split(".")[1]:
                    wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_only_urls_names_the_backends() -> None:
    known = {"urls", "cli", "testing", "backends"}
    wrong = [
        f"{name} imports {target}"
        for name, path in modules().items()
        if name.split(".")[0] not in known
        for target, ours in imported(name, path)
        if ours and target.removeprefix("holdfast.").startswith("backends")
    ]
    assert wrong == []


def test_the_core_needs_msgspec_and_the_standard_library_only() -> None:
    wrong = []
    for name, path in modules().items():
        allowed = set().union(*(extra for room, extra in EXTRAS.items() if name == room or name.startswith(f"{room}.")))
        for target, ours in imported(name, path):
            top = target.split(".")[0]
            if not ours and top != "msgspec" and top not in sys.stdlib_module_names and top not in allowed:
                wrong.append(f"{name} imports {target}")
    assert wrong == []


@pytest.mark.parametrize("banned", ["pickle", "marshal", "shelve", "yaml", "dill", "cPickle"])
def test_nothing_imports_what_runs_the_data_that_it_reads(banned: str) -> None:
    wrong = [n for n, path in modules().items() for target, _ in imported(n, path) if target.split(".")[0] == banned]
    assert wrong == []


def test_nothing_calls_eval_or_exec() -> None:
    wrong = [
        f"{name}:{node.lineno} {node.func.id}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"eval", "exec", "__import__"}
    ]
    assert wrong == []


def test_importing_holdfast_imports_no_driver_no_cli_and_no_testing() -> None:
    code = "import sys, holdfast; print(' '.join(sys.modules))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert loaded.isdisjoint(DRIVERS | {"pytest"})
    assert not [
        name for name in loaded if name.startswith(("holdfast.cli", "holdfast.testing", "holdfast.market.ccxt"))
    ]
