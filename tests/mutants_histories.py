"""One-line defects that histories catch: (name, file under ``src/holdfast``, text, its replacement, pytest arguments).

Each lets two processes, or a re-sent commit, come between. ``tests/mutants.py`` makes its ``Mutant`` of each.
"""

from __future__ import annotations

_TEN = "tests/test_histories.py -k"

HISTORIES: list[tuple[str, str, str, str, str]] = [
    (
        "races: redis: expected versions are not compared",
        "backends/redis/script.py",
        "if #clashes > 0 then return {3, clashes} end\n",
        "",
        f"{_TEN} 'ten and redis'",
    ),
    (
        "races: redis: a repeated op is judged anew",
        "backends/redis/script.py",
        "  if was == n then\n",
        "  if false then\n",
        f"{_TEN} 'ten and redis'",
    ),
    (
        "races: postgres: a commit is applied to another state than it was judged on",
        "backends/postgres/statements.py",
        "WHERE c.scope = $1 AND c.number = held.number AND {safe}",
        "WHERE c.scope = $1 AND {safe}",
        f"{_TEN} 'ten and postgres'",
    ),
    (
        "races: sqlite: what is known outlives another process's commit",
        "backends/sqlite/rows.py",
        "if known is None or known.data_version != data_version:",
        "if known is None:",
        f"{_TEN} 'ten and sqlite'",
    ),
    (
        "races: mongo: an update applies to any state",
        "backends/mongo/document.py",
        'return {"q": {"_id": scope, "number": self._known.number, "tip": self._known.tip}, "u": change}',
        'return {"q": {"_id": scope}, "u": change}',
        f"{_TEN} 'ten and mongo'",
    ),
    (
        "races: cached: what was not acknowledged is kept",
        "wrappers/cached.py",
        "        if self._writing[place] or self._doubtful[place] or",
        "        if",
        f"{_TEN} 'wrappers and cached'",
    ),
    (
        "races: memory and file: a repeated op is judged anew",
        "backends/state.py",
        "        elif n == last[0]:\n            return last[1], True\n",
        "",
        f"{_TEN} 'ten and file'",
    ),
]
