"""One-line defects of what users meet: (name, file, text, its replacement, pytest arguments).

``tests/mutants.py`` makes its ``Mutant`` of each.
"""

from __future__ import annotations

_TENDING = "tests/test_tending.py -k"
_CLI = "tests/test_cli.py -k"
_RECOVER = "tests/test_cli_recover.py -k"
_OWNERS = "tests/test_cli_owners.py -k"

USERS: list[tuple[str, str, str, str, str]] = [
    (
        "users: a run goes on with orders for which it has no broker",
        "engine/driver.py",
        "                await self.require_broker(session)\n",
        "",
        f"{_TENDING} is_not_gone_on_with",
    ),
    (
        "users: a plan is made under the wrong key",
        "engine/gap_run.py",
        "await require_account(self._store, context, None if broker is None else broker.account)",
        "pass",
        f"{_TENDING} wrong_key",
    ),
    (
        "users: an order that cannot be read is passed over",
        "engine/tending.py",
        "for key in sorted(store.damaged) if account is None else ():",
        "for key in ():",
        f"{_TENDING} in_quarantine",
    ),
    (
        "users: orders are moved to an account that does not hold them",
        "engine/hands.py",
        "            await holdings.require_held(context, list(rows.values()))\n",
        "",
        f"{_TENDING} does_not_hold",
    ),
    (
        "users: what was settled by hand is asked about and closed again",
        "engine/settling.py",
        "rows.append(replaced(order, adopted=True))",
        "pass",
        f"{_TENDING} settled_at_the_venue",
    ),
    (
        "users: what is left of a settled position does not count as gone",
        "engine/settling.py",
        "        if left:\n",
        "        if False:\n",
        f"{_TENDING} settled_at_the_venue",
    ),
    (
        "users: a position that nothing closes is not found by check",
        "cli/check.py",
        "    findings += await _left_open(store)\n",
        "",
        f"{_TENDING} check_finds",
    ),
    (
        "users: a context that could not be planned for is not listed",
        "cli/recover.py",
        "                    reports.append(GapReport(context=context, failed=str(error)))\n",
        "",
        f"{_RECOVER} could_not_be_planned",
    ),
    (
        "users: a plan that asks does not say so",
        "engine/gap_run.py",
        'undecided = "" if outlook is None else await gap.undecided(outlook)',
        'undecided = ""',
        f"{_RECOVER} strategy_that_asks",
    ),
    (
        "users: a position that nobody would watch is adopted",
        "cli/adopt.py",
        '        if name not in known and (known or what == "strategy"):',
        "        if False:",
        f"{_RECOVER} nobody_would_watch",
    ),
    (
        "users: a dead worker owns what was taken over from it",
        "cli/owners.py",
        "contexts=counts[holder]",
        "contexts=one.row.contexts",
        f"{_OWNERS} dead_worker",
    ),
    (
        "users: lines of usage stand before what is wrong with an argument",
        "arguments.py",
        "        self.exit(USAGE, f",
        "        self.print_usage()\n        self.exit(USAGE, f",
        f"{_CLI} make_no_sense",
    ),
    (
        "users: whoever gives an argument too many is sent to the wrong help",
        "arguments.py",
        "        (command or parser).error(",
        "        parser.error(",
        f"{_CLI} make_no_sense",
    ),
]
