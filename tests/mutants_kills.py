"""One-line defects of torture and of what it found, as (name, file, text, its replacement, pytest arguments).

``tests/mutants.py`` makes its ``Mutant`` of each.
"""

from __future__ import annotations

_KILLS = "tests/test_kills.py -k"

KILLS: list[tuple[str, str, str, str, str]] = [
    (
        "torture: no step after a commit's answer",
        "testing/killer.py",
        "        number = await super().commit(scope, changes, expect, op=op)\n        self.countdown.step()\n",
        "        number = await super().commit(scope, changes, expect, op=op)\n",
        f"{_KILLS} dies_before",
    ),
    (
        "torture: how a bot ended is told once only",
        "testing/zygote.py",
        "            self._ended = self._answer().ended\n        return self._ended\n",
        "            return self._answer().ended\n        return None\n",
        f"{_KILLS} asked_again",
    ),
    (
        "torture: a round without kills replaces nobody",
        "testing/torture.py",
        "max(left, len(todo), _KILLS_PER_REPLACEMENT * replacements)",
        "max(left, len(todo))",
        f"{_KILLS} rounds_that_are_left",
    ),
    (
        "torture: every round pauses first",
        "testing/round.py",
        "pauses = self.before.pauses + found.pauses\n",
        "pauses = found.pauses\n",
        f"{_KILLS} rounds_that_are_left",
    ),
    (
        "torture: in the user's own prefix",
        "testing/places.py",
        '[: most - len(word) - 1]}_{word}"',
        '[: most - len(word) - 1]}"',
        f"{_KILLS} 'each_place'",
    ),
    (
        "torture: removes what merely begins like its own",
        "testing/places.py",
        'f"{address.prefix}:*"',
        'f"{address.prefix}*"',
        f"{_KILLS} 'removed_alone and redis'",
    ),
    (
        "torture: leaves its schema behind",
        "testing/places.py",
        'DROP SCHEMA IF EXISTS "{schema.schema}" CASCADE',
        "SELECT 1",
        f"{_KILLS} 'removed_alone and postgres'",
    ),
    (
        "torture: leaves the log of SQLite behind",
        "testing/places.py",
        'for ending in ("", "-wal", "-shm", "-journal"):',
        "for ending in ():",
        f"{_KILLS} 'removed_alone and sqlite'",
    ),
    (
        "torture: the witness forgets what was acknowledged",
        "testing/witness.py",
        "            if head.number < number:",
        "            if False:",
        f"{_KILLS} witness_finds",
    ),
    (
        "a candle that waits for the store is decided at a later price",
        "engine/driver.py",
        "if not session.is_behind:  # else they wait",
        "if True:  # else they wait",
        "tests/test_live_outage.py",
    ),
    (
        "sqlite: full is NORMAL",
        "backends/sqlite/file.py",
        '"full": 2',
        '"full": 1',
        "tests/test_lost_power.py -k 'acknowledged and sqlite'",
    ),
    (
        "redis: everysec is taken for always",
        "backends/redis/attest.py",
        'if found.appendfsync != "always":',
        "if False:",
        "tests/test_lost_power.py -k 'wrong and valkey'",
    ),
    (
        "redis: a server that goes away during open is taken for one with unsafe settings",
        "backends/redis/backend.py",
        '_GONE = ("the connection was lost", "no answer in time")',
        "_GONE: tuple[str, ...] = ()",
        "tests/test_redis_cuts.py -k probe_is_cut",
    ),
]
