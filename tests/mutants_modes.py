"""One-line defects of modes and of the emergency journal: (name, file, text, its replacement, pytest arguments)."""

from __future__ import annotations

# ruff: noqa: E501

_MODES = "tests/test_modes.py"
_JOURNAL = "tests/test_emergency.py"
_STORES = "tests/test_emergency_stores.py -k"
_SERVERS = "tests/test_emergency_servers.py -k"
_STANDING = "tests/test_standing_in.py"

MODES: list[tuple[str, str, str, str, str]] = [
    (
        "modes: a full disk is a refusal like any other",
        "modes.py",
        "    if facts.is_full:\n        return Mode.CLOSE_ONLY",
        "    if facts.is_full and False:\n        return Mode.CLOSE_ONLY",
        _MODES,
    ),
    (
        "modes: one quick commit ends the trouble",
        "modes.py",
        "facts.quick_commits < calm_commits:",
        "facts.quick_commits < 1:",
        _MODES,
    ),
    (
        "modes: trouble that keeps coming back is forgiven like the first",
        "modes.py",
        "min(facts.relapses, MOST_DOUBLINGS)",
        "0 * facts.relapses",
        f"{_MODES} {_JOURNAL} -k 'worse or other_minute'",
    ),
    (
        "modes: a server that says that it is full is one that refuses",
        "modes.py",
        "isinstance(seen, FullError) or",
        "False or",
        f"{_SERVERS} memory",
    ),
    (
        "modes: PostgreSQL's word for no room is not understood",
        "connections.py",
        '("53100", FullError,',
        '("53100", UnavailableError,',
        f"{_SERVERS} 'postgres and full'",
    ),
    (
        "modes: a hook that hangs keeps a run from its end",
        "health.py",
        "timeout=self._hook_seconds)",
        "timeout=None)",
        f"{_MODES} -k hook",
    ),
    (
        "modes: a takeover that the background notices waits for a candle",
        "session_writer.py",
        "Background(self.flush, ended)",
        "Background(self.flush, self.give_up)",
        f"{_MODES} -k background",
    ),
    (
        "modes: entries go on whatever the mode",
        "engine/gate.py",
        "or self._health.mode is not Mode.NORMAL:",
        "or False:",
        f"{_MODES} {_JOURNAL}",
    ),
    (
        "modes: a change is noticed only by who asks anyway",
        "engine/gate.py",
        '        """Ask again, with the next candle, whether anything may begin."""\n        self.is_plain = False',
        '        """Ask again, with the next candle, whether anything may begin."""\n        pass',
        f"{_MODES} -k one_contexts",
    ),
    (
        "modes: nobody watches a commit that hangs",
        "health.py",
        "            self._timer = loop.call_later(self.policy.slow_seconds, self._look)\n        return",
        "            pass\n        return",
        f"{_MODES} -k hangs",
    ),
    (
        "emergency: a record counts before it is durable",
        "blocks.py",
        "            self._space.write(self._at, data)\n            self._space.sync()",
        "            self._space.write(self._at, data)",
        _JOURNAL,
    ),
    (
        "emergency: the checksum of a record is not looked at",
        "blocks.py",
        "return Entry(number, text) if good else None",
        "return Entry(number, text)",
        _JOURNAL,
    ),
    (
        "emergency: space is only set aside by its length",
        "blocks.py",
        "        for at in range(len(found), size_bytes, len(zeros)):\n            self._space.write(at, zeros[: size_bytes - at])",
        '        self._space.write(size_bytes - 1, b"\\0")\n        del zeros',
        f"{_JOURNAL} -k blocks",
    ),
    (
        "emergency: what was merged is merged again",
        "emergency.py",
        "        if one.after == stored:\n            return kept[done:]",
        "        if one.after == stored:\n            return kept",
        _JOURNAL,
    ),
    (
        "emergency: recovery leaves what was kept where it is",
        "session.py",
        "if not self.writer.lifeline.is_ahead:",
        "if True:",
        _JOURNAL,
    ),
    (
        "emergency: what another owner has gone on from is merged all the same",
        "emergency.py",
        "            return kept[done:]  # rows that followed without moving the session row are written again: the same ones\n    return None",
        "            return kept[done:]\n    return kept",
        f"{_JOURNAL} -k another_owner",
    ),
    (
        "emergency: an entry may be kept",
        "session_writer.py",
        "exits = before.signal is not None and not begins(before, after)",
        "exits = True",
        f"{_JOURNAL} -k entry",
    ),
    (
        "emergency: exits outlive the lease",
        "session.py",
        "has_lease=lambda: self.has_lease,",
        "has_lease=lambda: True,",
        f"{_STORES} lease",
    ),
    (
        "emergency: an exit waits for a store that never answers",
        "lifeline.py",
        "await (self._in_time(sending, hangs=True, exits=exits) if bounded else sending)",
        "await sending",
        f"{_JOURNAL} -k 'silent'",
    ),
    (
        "emergency: the events of a merge are told again",
        "session_writer.py",
        "        self.outbox.kept.update(event.number for event in transition.events)",
        "        pass",
        _JOURNAL,
    ),
    (
        "emergency: a merge does not rewrite the guard rows",
        "lifeline.py",
        "changes[key] = Guard(changes=old + 1)",
        "del old",
        f"{_JOURNAL} -k guard",
    ),
    (
        "emergency: a merge that takes longer than an exit waits for is given up",
        "lifeline.py",
        "        if not task.done():\n            raise",
        "        if not task.done():\n            await self._give_up_merging()\n            raise",
        f"{_JOURNAL} -k slow",
    ),
    (
        "emergency: an order with which another owner went on falls back to what is kept",
        "lifeline.py",
        "                if recovering:\n                    orders =",
        "                if False:\n                    orders =",
        f"{_JOURNAL} -k fall_back",
    ),
    (
        "emergency: a journal that was cut shorter is taken for whole",
        "blocks.py",
        "if len(found) < made_bytes:",
        "if False:",
        f"{_JOURNAL} -k cut_shorter",
    ),
    (
        "standing in: on a store where others may own",
        "standing_in.py",
        "return not store.guarantees.shared and not store.routes",
        "return not store.routes",
        _STANDING,
    ),
    (
        "standing in: what is kept already is decided anew",
        "standing_in.py",
        "    changes, _ = together(todo)",
        "    changes, _ = together(())",
        _STANDING,
    ),
    (
        "standing in: the store is asked for what only an owner may have",
        "lifeline.py",
        "        if self.predecessor is not None:\n            await self._take_over",
        "        if False:\n            await self._take_over",
        _STANDING,
    ),
]
