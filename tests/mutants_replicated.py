"""One-line defects of copies: (name, file under ``src/holdfast``, text, its replacement, pytest arguments).

``tests/mutants.py`` makes its ``Mutant`` of each.
"""

from __future__ import annotations

_HERE = "wrappers/replicated/"
_PLAIN = "tests/test_replicated.py -k"

REPLICATED: list[tuple[str, str, str, str, str]] = [
    (
        "replicated: a commit returns when the first copy has it",
        f"{_HERE}lane.py",
        "            await self.hold(number, config, deadline)\n",
        "",
        f"{_PLAIN} 'did_not_confirm or not_read'",
    ),
    (
        "replicated: what only the first copy has is read",
        f"{_HERE}lane.py",
        "            if number > self.confirmed:\n",
        "            if False:\n",
        f"{_PLAIN} 'is_not_read'",
    ),
    (
        "replicated: the first copy does not expect its generation",
        f"{_HERE}lane.py",
        "physical, changes, {**expect, guard: standing.charter_version}, op=op",
        "physical, changes, expect, op=op",
        f"{_PLAIN} 'older_generation or late_message or schedule'",
    ),
    (
        "replicated: a follower does not expect the generation",
        f"{_HERE}follower.py",
        "expect = {guard: version, number_row: until}",
        "expect = {number_row: until}",
        f"{_PLAIN} 'numbers_fit'",
    ),
    (
        "replicated: a follower does not expect the commit before",
        f"{_HERE}follower.py",
        "expect = {guard: version, number_row: until}",
        "expect = {guard: version}",
        f"{_PLAIN} 'overtakes'",
    ),
    (
        "replicated: a commit of an older generation is offered in the next one",
        f"{_HERE}lane.py",
        "        if self.standing is None or self.config is not config:\n            # Never",
        "        if False:\n            # Never",
        f"{_PLAIN} 'not_passed_on'",
    ),
    (
        "replicated: rows that are gone stay after a repair",
        f"{_HERE}repair.py",
        "            changes |= dict.fromkeys(gone)\n",
        "",
        f"{_PLAIN} 'deleted_while'",
    ),
    (
        "replicated: a copy under repair counts as whole",
        f"{_HERE}standing.py",
        'self.charter.moved_to == "" and self.number >= self.charter.whole_from',
        'self.charter.moved_to == ""',
        f"{_PLAIN} 'operator_insists'",
    ),
    (
        "replicated: a copy that diverged is taken for one that is behind",
        f"{_HERE}standing.py",
        "return behind if copy.data <= following.data else Relation.DIVERGED",
        "return behind",
        f"{_PLAIN} 'dropped'",
    ),
    (
        "replicated: what a promote dropped is not kept",
        f"{_HERE}repair.py",
        "        count = await _keep(scope, target, before, source, other)\n",
        "        count = 0\n",
        f"{_PLAIN} 'dropped'",
    ),
    (
        "replicated: the first named copy is promoted, not the newest",
        f"{_HERE}promotion.py",
        "key=lambda copy: (copy.id != config.first, best[copy], -copy.at)",
        "key=lambda copy: (copy.id != config.first, -copy.at)",
        f"{_PLAIN} 'newest_becomes'",
    ),
    (
        "replicated: a generation begins without the promises",
        f"{_HERE}election.py",
        "gather(*(copy.promise(scope, generation) for copy in asked)",
        "gather(*(copy.standing(scope) for copy in asked)",
        f"{_PLAIN} 'late_message or schedule'",
    ),
    (
        "replicated: a promote does not count the copies that answer",
        f"{_HERE}promotion.py",
        "        if len(members) < config.election:\n",
        "        if False:\n",
        f"{_PLAIN} 'so_many_copies'",
    ),
    (
        "replicated: a first copy that lost commits goes on",
        f"{_HERE}lane.py",
        "                    raise lost(self.scope, first, copy, standing, stands)\n",
        "                    return stands\n",
        f"{_PLAIN} 'first_copy_that_lost'",
    ),
    (
        "replicated: nothing written is said of an op in doubt",
        f"{_HERE}lane.py",
        "            if self._in_doubt.get(op.writer) == op.n:\n",
        "            if False:\n",
        f"{_PLAIN} 'did_not_confirm'",
    ),
    (
        "replicated: a first commit goes to whoever is the first by now",
        f"{_HERE}lane.py",
        "        if ground.config is not config:  # of its first copy",
        "        if False:  # of its first copy",
        f"{_PLAIN} 'waited_during'",
    ),
    (
        "replicated: a look leaves a scope's first commit in doubt",
        f"{_HERE}lane.py",
        "                if not standing.charter_version:\n                    async with self._bearing:",
        "                if False:\n                    async with self._bearing:",
        f"{_PLAIN} 'look_that_meets'",
    ),
    (
        "replicated: what was in use before it had copies cannot be repaired from",
        f"{_HERE}repair.py",
        "(found[guard].version if guard in found else 0)",
        "found[guard].version",
        f"{_PLAIN} 'first_opening_died'",
    ),
    (
        "replicated: a newer version's charter is believed",
        f"{_HERE}standing.py",
        "    if found.format > FORMAT:\n",
        "    if False:\n",
        f"{_PLAIN} 'newer_version'",
    ),
]
