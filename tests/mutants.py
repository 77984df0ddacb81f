"""One-line defects, and the quick tests that must catch each. Run them all with ``make mutants``.

A mutant names a file, a text that stands exactly once in the one file of that name that has it, what to put in its
place, and the arguments of the pytest run that must fail. Files are named without their folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mutants_encrypted import ENCRYPTED
from mutants_histories import HISTORIES
from mutants_kills import KILLS
from mutants_modes import MODES
from mutants_mongo import MONGO
from mutants_orders import ORDERS
from mutants_owners import OWNERS
from mutants_plan import PLAN
from mutants_redis import REDIS
from mutants_replicated import REPLICATED
from mutants_s3 import S3
from mutants_sizing import SIZING
from mutants_sql import SQL
from mutants_users import USERS
from mutants_wrappers import WRAPPERS

# ruff: noqa: E501


class Mutant(NamedTuple):
    """One planted defect."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def found_in(self, source: Path) -> list[Path]:
        """Return where the text stands under ``source``, once for each time; one place is as it should be."""
        return [p for p in sorted(source.rglob(self.file)) for _ in range(p.read_text().count(self.old))]


def _power(name: str) -> str:
    return f"tests/test_power_cuts.py -k '{name}'"


_ACTED = "tests/test_power_cuts.py -k acted_on"
_CONTRACT = "tests/test_conformance.py -k"
_ENGINE = "tests/test_session.py tests/test_outbox.py tests/test_faults_session.py"
_RECONCILE = "tests/test_recovery.py tests/scenarios/test_live_scenarios.py"
_GAVE = "tests/test_faults_session.py -k iterator_gave"
_MISSED = "tests/test_faults_session.py -k missed"

STORAGE = [
    Mutant(
        "no fdatasync of a commit",
        "journal.py",
        "            self._disk.fdatasync(self._log)\n        except OSError as error:\n            # The kernel",
        "            pass\n        except OSError as error:\n            # The kernel",
        _power("overwrite"),
    ),
    Mutant(
        "no fsync of the directory after a checkpoint",
        "journal.py",
        "            self._disk.fsync(self._directory.meta)\n            self._inode",
        "            self._inode",
        _power("checkpoint"),
    ),
    Mutant(
        "no fsync of the directory at open",
        "journal.py",
        "            self._disk.fsync(here.meta)\n",
        "            pass\n",
        _power("first and write"),
    ),
    Mutant(
        "the directory's own name is not synced",
        "journal.py",
        "        here.sync_parents()\n",
        "",
        _power("first and write"),
    ),
    Mutant(
        "rename before fsync",
        "directory.py",
        "            if sync:\n                disk.fdatasync(fd)\n            disk.rename(temporary, name, at=self.meta)",
        "            disk.rename(temporary, name, at=self.meta)",
        _power("checkpoint"),
    ),
    Mutant(
        "no sync at open of what was read",
        "journal.py",
        '            self._disk.fdatasync(self._log)\n            if self._seal("open"):\n'
        "                self._disk.fdatasync(self._log)\n",
        "            pass\n",
        _ACTED,
    ),
    Mutant(
        "the torn tail is not cut",
        "journal.py",
        "        self._disk.truncate(self._log, self.length)\n        _logger.info(",
        "        _logger.info(",
        _power("torn"),
    ),
    Mutant(
        "the checksum of a frame is not checked",
        "log.py",
        "trusted = crc32(whole[start:end]) == head.crc",
        "trusted = True",
        _power("overwrite"),
    ),
    Mutant(
        "a frame that is missing is not noticed",
        "log.py",
        "if at and head.number != found.number + 1:",
        "if False:",
        "tests/test_faults.py -k taken_out",
    ),
    Mutant(
        "the versions are not compared",
        "state.py",
        "            if (0 if found is None else found.version) != version:\n                raise",
        "            if False:\n                raise",
        f"{_CONTRACT} expect",
    ),
    Mutant(
        "a repeated op is applied again",
        "state.py",
        "        elif n == last[0]:\n",
        "        elif n < 0:\n",
        f"{_CONTRACT} repeated",
    ),
    Mutant(
        "a lower op is taken",
        "state.py",
        "        elif n < last[0]:\n",
        "        elif n < 0:\n",
        f"{_CONTRACT} lower",
    ),
    Mutant(
        "seen before it is durable",
        "committer.py",
        "            found = self._durable.scopes.get(scope)\n",
        "            found = self._newest.scopes.get(scope)\n",
        "tests/test_faults.py -k not_seen",
    ),
    Mutant(
        "acknowledged before it is written",
        "committer.py",
        "        if body:\n            self._journal.append(body)\n",
        "        wake(group)\n        if body:\n            self._journal.append(body)\n",
        _power("overwrite"),
    ),
    Mutant(
        "a short write is taken for a whole one",
        "quarantine.py",
        "    if taken == len(data):\n        return\n",
        "    return\n",
        "tests/test_faults.py -k short",
    ),
    Mutant(
        "after a failed sync it goes on with the same file",
        "journal.py",
        "            self.broken = self.suspect = True\n            raise self._unknown(error) from error\n        self._number",
        "            raise self._unknown(error) from error\n        self._number",
        "tests/test_faults.py -k failed_sync",
    ),
    Mutant(
        "what a failed write left is not taken back",
        "journal.py",
        "            self._take_back(error)\n",
        "",
        "tests/test_faults.py -k short",
    ),
    Mutant(
        "the lock is not taken",
        "directory.py",
        "            if not disk.lock(self._lock):\n",
        "            if False:\n",
        f"{_CONTRACT} second-owner",
    ),
    Mutant(
        "the checksum of a row is not compared",
        "domains.py",
        """if payload[-_TAIL:] != b',"_sum":"%08x"}' % _checksum(key, text):""",
        "if False:",
        "tests/test_domains.py",
    ),
]

ENGINE = [
    Mutant(
        "memory is changed before the commit",
        "session.py",
        "        await self.writer.commit(self.state, transition, checked)\n        self.state = transition.state\n",
        "        before, self.state = self.state, transition.state\n"
        "        await self.writer.commit(before, transition, checked)\n",
        _ENGINE,
    ),
    Mutant(
        "events are told before the commit",
        "session_writer.py",
        "        if not await self._send(with_orders, expect, exits=exits):\n            self._tell_kept(transition)\n"
        "        self.held = held\n        self.outbox.add(transition.events)\n",
        "        self.outbox.add(transition.events)\n        await self.outbox.tell_next()\n"
        "        if not await self._send(with_orders, expect, exits=exits):\n            self._tell_kept(transition)\n"
        "        self.held = held\n",
        _ENGINE,
    ),
    Mutant(
        "the owner row is not expected",
        "tenure.py",
        "                self._owner_key: self._owner.version,\n",
        "",
        _ENGINE,
    ),
    Mutant("the guard rows are not expected", "tenure.py", "                **guards,\n", "", _ENGINE),
    Mutant(
        "an event counts as delivered before the iterator gave it",
        "driver.py",
        "                    if event.kind in _YIELDED:\n                        yield event\n"
        "                    session.delivered()\n",
        "                    session.delivered()\n                    if event.kind in _YIELDED:\n"
        "                        yield event\n",
        _GAVE,
    ),
    Mutant(
        "a closed trade is not written to the ledger",
        "outbox.py",
        '        elif event.kind == "closed":\n            await self._record(event)\n        return event\n',
        "        return event\n",
        _ENGINE,
    ),
    Mutant(
        "an exit that was merged while its listener was told is not written to the ledger",
        "outbox.py",
        "if event.number == self._unrecorded or self._early:",
        "if event.number in self.kept or self._early:",
        "tests/test_simulation.py -k plan_that_once",
    ),
    Mutant(
        "an entry is committed though a late fill turned up since it was decided",
        "session_writer.py",
        "                if begins(before, after) and self._executor.blocks_entries:\n",
        "                if False:\n",
        "tests/test_simulation.py -k plan_that_once",
    ),
    Mutant(
        "what was kept while a merge was under way is passed by",
        "lifeline.py",
        "        while self.owes:  # more",
        "        if self.owes:  # more",
        "tests/test_simulation.py -k plan_that_once",
    ),
    Mutant(
        "a session that is about to own its context anew commits on under the old tenure",
        "session.py",
        "        self.writer.own_anew()\n",
        "",
        "tests/test_simulation.py -k plan_that_once",
    ),
    Mutant(
        "rows of delivered events are forgotten when their deletion failed",
        "session_writer.py",
        "            except BaseException as error:\n                self.outbox.put_back(delivered)\n",
        "            except BaseException as error:\n",
        _ENGINE,
    ),
    Mutant(
        "a failed write of an exit is not tried again",
        "session.py",
        "            return await self.decider.carry_out(outcome, candle, reply, before=self.state, commit=self._commit)\n        except UnavailableError as error:\n"
        "            self._behind.append(candle)\n",
        "            return await self.decider.carry_out(outcome, candle, reply, before=self.state, commit=self._commit)\n        except UnavailableError as error:\n",
        _ENGINE,
    ),
    Mutant(
        "the epoch is not raised",
        "ownership.py",
        "epoch=1 if old is None else old.row.epoch + 1",
        "epoch=1 if old is None else old.row.epoch",
        _ENGINE,
    ),
    Mutant(
        "entries are allowed in the gap",
        "driver.py",
        "changed = session.step(candle, entries=newest)",
        "changed = session.step(candle, entries=True)",
        _MISSED,
    ),
    Mutant(
        "a lost slot is not restored",
        "reconcile.py",
        "            if key not in self.found.slots:\n",
        "            if False:\n",
        _RECONCILE,
    ),
    Mutant(
        "a closed signal comes back",
        "reconcile.py",
        "        if signal is not None and signal.id in closed_ids:\n",
        "        if False:\n",
        _RECONCILE,
    ),
    Mutant(
        "events that were not delivered are forgotten at the start",
        "session.py",
        "        self.outbox.add(found.events)\n",
        "",
        _GAVE,
    ),
    Mutant(
        "levels that were reached are forgotten at the start",
        "reconcile.py",
        "            levels=levels,\n",
        "",
        _RECONCILE,
    ),
    Mutant(
        "a row that contradicts its key is believed",
        "recovery.py",
        "        if key in found and (reason := _contradiction(domain, found[key].row, context)):\n",
        "        if False:\n",
        _ENGINE,
    ),
]

MUTANTS = (
    STORAGE
    + ENGINE
    + [
        Mutant(*planted)
        for planted in (
            *REDIS,
            *SQL,
            *S3,
            *MONGO,
            *WRAPPERS,
            *ENCRYPTED,
            *HISTORIES,
            *KILLS,
            *REPLICATED,
            *PLAN,
            *USERS,
            *OWNERS,
            *SIZING,
            *ORDERS,
            *MODES,
        )
    ]
)
HANDFUL = (
    "no fdatasync of a commit",
    "the versions are not compared",
    "seen before it is durable",
    "a short write is taken for a whole one",
    "an event counts as delivered before the iterator gave it",
    "entries are allowed in the gap",
)
"""Those that ``make test`` tries; ``make mutants`` tries all."""
