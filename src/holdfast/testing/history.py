"""What was asked of a backend and when, so that any recovered state can be judged.

The rule: a recovered scope stands at some commit number ``h`` with every commit up to ``h`` whole and none
beyond it, where every commit acknowledged before the cut is at most ``h``, and every commit up to ``h`` had
begun before the cut. Rows, versions, ops and the writers' last ops must all be those of ``h``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..contract import Backend, Guarantees, Head, Key, Op, Record, WriterOp
from ..errors import ConflictError, CorruptedError, InvalidInputError, UnavailableError
from ..wrappers.around import Around


class ScopeState(NamedTuple):
    """What one scope holds."""

    number: int
    writers: dict[str, WriterOp]
    rows: dict[Key, Record]


State = dict[str, ScopeState]


async def observe(backend: Backend) -> State:
    """Read everything that an open backend holds; rows that it reports as damaged are left out."""
    found: State = {}
    async for scope in backend.scopes():
        head = await backend.head(scope)
        keys = [key async for key in backend.keys(scope)]
        while True:
            try:
                rows = await backend.read(scope, keys)
                break
            except CorruptedError as error:
                if error.key not in keys:
                    raise
                keys.remove(error.key)
        assert len(rows) == len(keys), f"{scope}: keys() names rows that read() does not return"
        found[scope] = ScopeState(head.number, dict(head.writers), rows)
    return found


class _Commit:
    def __init__(self, op: Op, changes: Mapping[Key, bytes | None], begun: int) -> None:
        self.op = op
        self.changes = dict(changes)
        self.begun = begun
        self.sent = 1
        self.acknowledged: int | None = None
        self.number: int | None = None


class History:
    """Commits with the moments at which they began and were acknowledged."""

    def __init__(self) -> None:
        self.moment = 0
        self._base: State = {}
        self._commits: dict[str, list[_Commit]] = {}

    def begin(self, scope: str, op: Op, changes: Mapping[Key, bytes | None]) -> _Commit:
        """Note that a commit was sent."""
        self.moment += 1
        known = self._commits.setdefault(scope, [])
        for commit in known:
            if commit.op == op:
                commit.sent += 1
                return commit
        known.append(_Commit(op, changes, self.moment))
        return known[-1]

    def acknowledge(self, commit: _Commit, number: int) -> None:
        """Note that a commit returned its number."""
        self.moment += 1
        assert commit.number in (None, number), f"op {commit.op} was answered {commit.number}, then {number}"
        commit.number = number
        if commit.acknowledged is None:
            commit.acknowledged = self.moment

    def forget(self, scope: str, commit: _Commit) -> None:
        """Note that a commit was refused: it must never appear. (Of one that was sent twice, the first may.)"""
        self.moment += 1
        if commit.number is None and commit.sent == 1:
            self._commits[scope].remove(commit)

    def acted_on(self, state: State) -> None:
        """Note that somebody read ``state`` and acted on it: from now on all of it counts as acknowledged.

        A commit that was under way and is not in it must never appear.
        """
        self.moment += 1
        for scope in set(self._commits) - set(state):
            self._commits[scope] = []
        for scope, found in state.items():
            known = self._commits.setdefault(scope, [])
            if not known and scope not in self._base:
                self._base[scope] = found
            for commit in [c for c in known if c.acknowledged is None]:
                number = _number_of(commit.op, found)
                if number is None:
                    known.remove(commit)
                else:
                    commit.number, commit.acknowledged = number, self.moment

    def learn(self, scope: str, op: Op, number: int) -> None:
        """Note that somebody saw the number of a commit whose own answer never came (it was cancelled, say)."""
        for commit in self._commits.get(scope, []):
            if commit.op == op and commit.number is None:
                self.acknowledge(commit, number)

    def violation(self, state: State, moment: int) -> str | None:
        """Tell what is wrong with a state recovered after a cut at ``moment``; None if nothing is."""
        for scope in set(self._commits) | set(self._base) | set(state):
            base = self._base.get(scope, ScopeState(0, {}, {}))
            found = state.get(scope, ScopeState(0, {}, {}))
            wrong = self._scope_violation(scope, base, found, moment)
            if wrong:
                return f"{scope}: {wrong}"
        return None

    def _scope_violation(self, scope: str, base: ScopeState, found: ScopeState, moment: int) -> str | None:
        commits = sorted((c for c in self._commits.get(scope, []) if c.number is not None), key=lambda c: c.number or 0)
        sure = max((c.number or 0 for c in commits if c.acknowledged and c.acknowledged <= moment), default=base.number)
        if found.number < sure:
            return f"lost: commit {sure} was acknowledged, the scope stands at {found.number}"
        rows, writers = dict(base.rows), dict(base.writers)
        at = base.number
        for commit in commits:
            if at >= found.number:
                break
            assert commit.number is not None
            if commit.number != at + 1 or commit.begun > moment:
                break
            at = commit.number
            writers[commit.op.writer] = WriterOp(commit.op.n, at)
            for key, payload in commit.changes.items():
                if payload is None:
                    rows.pop(key, None)
                else:
                    rows[key] = Record(payload, at, commit.op)
        if at != found.number:
            return f"the scope stands at {found.number}, of which only {at} commits had begun"
        if rows != found.rows:
            odd = [str(key) for key in {*rows, *found.rows} if rows.get(key) != found.rows.get(key)]
            return f"half: at commit {at} these rows differ: {', '.join(sorted(odd))}"
        if writers != found.writers:
            return f"the writers' last ops at commit {at} differ: {found.writers} instead of {writers}"
        return None


def _number_of(op: Op, state: ScopeState) -> int | None:
    last = state.writers.get(op.writer)
    if last is not None and last.n == op.n:
        return last.number
    return next((record.version for record in state.rows.values() if record.op == op), None)


class Witnessed(Around):
    """A backend that notes every commit in a :class:`History`; otherwise the one that it is put around."""

    def __init__(self, backend: Backend, history: History) -> None:
        super().__init__(backend)
        self.history = history

    async def open(self, *, read_only: bool = False) -> Guarantees:
        """Open the backend; what it holds counts as acted on, since its user goes on from there."""
        guarantees = await self.backend.open(read_only=read_only)
        self.history.acted_on(await observe(self.backend))
        return guarantees

    async def read(self, scope: str, keys: Sequence[Key]) -> dict[Key, Record]:
        """Read from the backend."""
        found = await self.backend.read(scope, keys)
        for record in found.values():
            self.history.learn(scope, record.op, record.version)
        return found

    async def commit(
        self, scope: str, changes: Mapping[Key, bytes | None], expect: Mapping[Key, int], *, op: Op
    ) -> int:
        """Commit, and note when it began and when it was acknowledged or refused."""
        noted = self.history.begin(scope, op, changes)
        try:
            number = await self.backend.commit(scope, changes, expect, op=op)
        except (ConflictError, InvalidInputError, UnavailableError):
            self.history.forget(scope, noted)
            raise
        self.history.acknowledge(noted, number)
        return number

    async def head(self, scope: str) -> Head:
        """Ask the backend."""
        head = await self.backend.head(scope)
        for writer, last in head.writers.items():
            self.history.learn(scope, Op(writer, last.n), last.number)
        return head
