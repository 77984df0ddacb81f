"""One-line defects of ownership, leases and fleets, as (name, file, text, its replacement, pytest arguments).

``tests/mutants.py`` makes its ``Mutant`` of each.
"""

from __future__ import annotations

_OWNER = "tests/test_ownership.py -k"
_LEASES = "tests/test_leases.py -k"
_FLEET = "tests/test_fleet.py -k"

OWNERS: list[tuple[str, str, str, str, str]] = [
    (
        "owners: a session that was replaced while it recovered goes on until it commits",
        "engine/session.py",
        "        if self._sign is not None and self._sign.begun != begun:\n",
        "        if False:\n",
        f"{_OWNER} replaced_while_it_recovers",
    ),
    (
        "owners: neither owner nor session row is expected",
        "engine/tenure.py",
        "                self._owner_key: self._owner.version,\n"
        "                self._session_key: 0 if self._session is None else self._session.version,\n",
        "",
        "tests/test_zombies.py -k 'paused_owner and redis'",
    ),
    (
        "owners: a shared limit is checked, but its guard is not expected",
        "engine/tenure.py",
        "                **guards,\n            }\n",
        "            }\n",
        "tests/test_shared_limits.py -k redis",
    ),
    (
        "owners: a lease is measured by the wall clock",
        "engine/worker.py",
        "    return time.clock_gettime(time.CLOCK_BOOTTIME)\n",
        "    return time.time()\n",
        f"{_OWNER} nobody_sets",
    ),
    (
        "owners: when a process started is read by another boot clock",
        "engine/worker.py",
        "{Path('/proc/self/ns/pid').readlink()}{clock}",
        "{Path('/proc/self/ns/pid').readlink()}",
        "tests/test_zombies.py -k 'hours_apart and namespaces'",
    ),
    (
        "owners: dead after one look",
        "engine/worker.py",
        "        return (Life.DEAD if before - since >= row.lease_seconds else Life.UNKNOWN), row\n",
        "        return Life.DEAD, row\n",
        f"{_OWNER} 'lease_is_over or waiting_ends'",
    ),
    (
        "owners: an outage is taken for a death",
        "engine/worker.py",
        "            self._seen.clear()\n            raise\n",
        "            raise\n",
        f"{_OWNER} outage",
    ),
    (
        "owners: nothing is let go of",
        "engine/session_writer.py",
        "                await self.tenure.release()\n",
        "                pass\n",
        f"{_OWNER} let_go",
    ),
    (
        "owners: what was let go of is written anew",
        "engine/session_writer.py",
        "        await self.background.finish()\n        await self.lifeline.settle()\n",
        "",
        f"{_OWNER} let_go_of_stays",
    ),
    (
        "fleet: what could not be released stays owned",
        "engine/fleet.py",
        "        await self._let_go(self._left - self._runs.keys() - mine)\n",
        "",
        f"{_FLEET} could_not_be_released",
    ),
    (
        "fleet: a run that went on for long rests as if it had not",
        "engine/fleet.py",
        "leases = 1 if before is None or went_on else",
        "leases = 1 if before is None else",
        f"{_FLEET} fails_again_and_again",
    ),
    (
        "owners: no margin on the holder's side",
        "engine/worker.py",
        "< self.lease_seconds * (1 - MARGIN)",
        "< self.lease_seconds",
        f"{_OWNER} earlier",
    ),
    (
        "owners: a session that was replaced goes on",
        "engine/worker.py",
        "                session.fence(fenced(session.context, mine, row))\n",
        "                pass\n",
        f"{_OWNER} 'has_noticed or names_the_new_owner'",
    ),
    (
        "owners: a sign of life counts before the look",
        "engine/worker.py",
        "            await self.look_for_new_owners(*self._sessions)\n            self._looks += 1\n",
        "            self._sent_at = before\n"
        "            await self.look_for_new_owners(*self._sessions)\n            self._looks += 1\n",
        f"{_OWNER} counts_only",
    ),
    (
        "owners: a lease that was taken again counts at once",
        "engine/session.py",
        "(self._sign.is_held and self.is_proven)",
        "self._sign.is_held",
        f"{_OWNER} ran_out",
    ),
    (
        "owners: rows are leased again at once",
        "engine/leases.py",
        "session is not None and session.is_proven and",
        "session is not None and",
        f"{_LEASES} taken_again",
    ),
    (
        "owners: a replaced session sends what it was asking about",
        "engine/executor.py",
        "        if self._over or self._session.owner is None:\n            return  # closed",
        "        if False:\n            return  # closed",
        "tests/test_orders_executor.py -k replaced_while",
    ),
    (
        "owners: a takeover does not outlast the other's lease",
        "engine/ownership.py",
        "                await _outlast(claim.watch, old.row.holder, sleep)\n",
        "                pass\n",
        f"{_LEASES} taken_over",
    ),
    (
        "owners: rows are leased after the lease",
        "engine/leases.py",
        "session.is_proven and self._sign.is_held\n",
        "session.is_proven\n",
        f"{_LEASES} paused",
    ),
    (
        "owners: rows are leased that an adapter may write",
        "engine/leases.py",
        'frozenset(("session", "outbox", "outage"))',
        'frozenset(("session", "outbox", "outage", "signal"))',
        f"{_LEASES} nothing_is_leased",
    ),
    (
        "owners: what a living owner has is started all the same",
        "engine/fleet.py",
        "            if one is None or one.row.released or one.row.holder not in living\n",
        "",
        f"{_FLEET} living_owner",
    ),
    (
        "owners: a worker that leaves is still given contexts",
        "engine/fleet.py",
        "if row.fleet == self._fleet and not row.leaving}",
        "if row.fleet == self._fleet}",
        f"{_FLEET} says_that_it_leaves",
    ),
    (
        "owners: contexts are dealt out by counting",
        "engine/fleet.py",
        "    return max(holders, key=lambda holder: (_weight(holder, name), holder), default=None)\n",
        "    ordered = sorted(holders)\n"
        '    return ordered[int.from_bytes(_weight("", name)) % len(ordered)] if ordered else None\n',
        f"{_FLEET} moves_nothing",
    ),
    (
        "owners: what an ended worker left in its journal is not taken over",
        "engine/journals.py",
        "                await self._emergency.keep(context, one.base, changes, epoch=0)\n",
        "                pass\n",
        "tests/test_journals.py -k that_died",
    ),
    (
        "owners: an exit of a context that moved on stays in the journal for ever",
        "engine/journals.py",
        "        await self._emergency.done(context, kept[-1].number)\n",
        "        pass\n",
        "tests/test_journals.py -k moved",
    ),
    (
        "owners: contexts are begun before what was left of them is taken over",
        "engine/fleet.py",
        "        await self._journals.look(self._runs)\n",
        "",
        f"{_FLEET} journal",
    ),
    (
        "owners: an account is claimed whoever has claimed it meanwhile",
        "engine/account.py",
        "{self._key: self._fresh}, {self._key: 0}",
        "{self._key: self._fresh}, {}",
        "tests/test_accounts.py -k 'redis or sqlite'",
    ),
    (
        "owners: a run that is left keeps its context",
        "engine/driver.py",
        "                if self._leaving.is_set():\n                    return\n",
        "",
        f"{_FLEET} is_left_ends",
    ),
]
