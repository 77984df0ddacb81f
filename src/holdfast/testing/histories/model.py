"""What one scope may do, and a history's lines as operations upon it.

The register is the whole scope: its commit number, each row's version and writer, each writer's last op. So what is
checked is not only that every read fits, but that commits of several rows are seen whole, that ``expect`` was judged
on the state of that moment, that numbers have no gap, and that no op was applied twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..linearizable import Operation
from .lines import KEYS, Answered, Line, Looked, Read, Repeated, Seen, Sent

_Row = tuple[int, int]
"""A row's version and the commit that wrote it (its place in the history); (0, -1) is absent."""
_ABSENT: _Row = (0, -1)
_FOREIGN = -2
"""A row that no commit of this history wrote."""


class ScopeState(NamedTuple):
    """One scope at one moment."""

    number: int
    rows: tuple[_Row, ...]
    lasts: tuple[tuple[int, int], ...]
    """Each writer's last op and its number; (-1, 0) where it had none."""


Step = Callable[[ScopeState], ScopeState | None]


class History(NamedTuple):
    """The operations of one scope."""

    scope: str
    start: ScopeState
    operations: list[Operation[ScopeState]]


class _Commit:
    """One op: everything that was sent and answered under its name."""

    def __init__(self, at: int, sent: Sent) -> None:
        self.at = at
        self.sent = sent
        self.begun = self.last_begun = sent.begun
        self.times = 1
        self.answer: Answered | None = None

    def text(self, name: str) -> str:
        """Say what it was and how it ended."""
        sent, answer = self.sent, self.answer
        rows = ", ".join(f"k{key}{' deleted' if text is None else ''}" for key, text in sorted(sent.changes.items()))
        expect = ", ".join(f"k{key} at {version}" for key, version in sorted(sent.expect.items()))
        ended = "unknown"
        if answer is not None:
            ended = f"commit {answer.number}" if answer.number else f"refused by {_names(answer.clashes or ())}"
        times = f", sent {self.times} times" if self.times > 1 else ""
        return f"{name} writes {rows or 'nothing'} if {expect or 'anything'}: {ended}{times}"


class Scribe:
    """Gathers the lines of all processes of a history into operations, scope by scope."""

    def __init__(self, scope: str, lines: Iterable[Line]) -> None:
        self.scope = scope
        self._lines = [line for line in lines if getattr(line, "scope", scope) == scope]
        self._commits: dict[tuple[str, int], _Commit] = {}
        self._writers: dict[str, int] = {}
        self._first_n = min((line.n for line in self._lines if isinstance(line, Sent)), default=0)
        self._before: dict[tuple[int, int, str, int, str], int] = {}
        """Rows that were there at the first look, by what was seen of them; their places lie below -2."""

    def history(self) -> History:
        """Return the history; the first look at the scope gives the state that it starts from."""
        for line in self._lines:
            if isinstance(line, Sent):
                self._send(line)
            elif isinstance(line, Answered) and (found := self._commits.get((line.writer, line.n))):
                found.answer = line
            elif isinstance(line, Looked):
                for writer in line.writers:
                    self._writer(writer)
        start = self._start()
        operations = [one for line in self._lines for one in self._plain(line)]
        operations += [one for commit in self._commits.values() for one in self._of(commit)]
        return History(self.scope, start, operations)

    def _send(self, line: Sent) -> None:
        known = self._commits.get((line.writer, line.n))
        if known is None:
            self._commits[line.writer, line.n] = _Commit(len(self._commits), line)
            self._writer(line.writer)
        else:
            known.last_begun = line.begun
            known.times += 1

    def _writer(self, name: str) -> int:
        return self._writers.setdefault(name, len(self._writers))

    def _name(self, writer: str, n: int) -> str:
        """Name an op for people: counted from the history's first, as the numbers themselves are long."""
        return f"{writer}.{n - self._first_n}" if n >= self._first_n else f"{writer}.before"

    def _start(self) -> ScopeState:
        rows, lasts, number = [_ABSENT] * KEYS, [(-1, 0)] * len(self._writers), 0
        looks = [line for line in self._lines if isinstance(line, Read | Looked)]
        for line in looks[:2]:  # a client that looks first writes these two before anything else
            if isinstance(line, Looked):
                number = line.number
                for writer, last in line.writers.items():
                    lasts[self._writers[writer]] = last
            else:
                for seen in line.found:
                    rows[seen.key] = (seen.version, self._written(seen, from_before=True))
        return ScopeState(number, tuple(rows), tuple(lasts))

    def _written(self, seen: Seen, *, from_before: bool = False) -> int:
        """Return which commit wrote what was read; each payload is unique."""
        found = self._commits.get((seen.writer, seen.n))
        if found is not None:
            return found.at if found.sent.changes.get(seen.key) == seen.payload else _FOREIGN
        name = (seen.key, seen.version, seen.writer, seen.n, seen.payload)
        if from_before:
            return self._before.setdefault(name, -3 - len(self._before))
        return self._before.get(name, _FOREIGN)

    # -- lines that are operations by themselves -----------------------------------------------------------------------

    def _plain(self, line: Line) -> Iterable[Operation[ScopeState]]:
        match line:
            case Read():
                step, text = self._read(line)
            case Looked():
                step, text = self._look(line)
            case Repeated():
                step, text = self._repeat(line)
            case _:
                return
        yield Operation(line.begun, line.ended, step, text, changes=False)

    def _read(self, line: Read) -> tuple[Step, str]:
        found = {seen.key: (seen.version, self._written(seen)) for seen in line.found}
        rows = [(key, found.get(key, _ABSENT)) for key in line.asked]

        def step(state: ScopeState) -> ScopeState | None:
            held = state.rows
            for key, row in rows:
                if held[key] != row:
                    return None
            return state

        said = {
            seen.key: f"k{seen.key} at {seen.version} by {self._name(seen.writer, seen.n)}"
            + self._doubt(seen, found[seen.key][1])
            for seen in line.found
        }
        return step, f"{line.by} reads " + ", ".join(said.get(key, f"no k{key}") for key in line.asked)

    def _doubt(self, seen: Seen, at: int) -> str:
        """Say what is odd about a row whatever the order may be."""
        if at == _FOREIGN:
            return " with a payload that it did not write"
        commit = self._commits.get((seen.writer, seen.n))
        if commit is not None and commit.answer is not None and commit.answer.unavailable:
            return f" (which was told that nothing was written: {commit.answer.why})"
        return ""

    def _look(self, line: Looked) -> tuple[Step, str]:
        lasts = [(-1, 0)] * len(self._writers)
        for writer, last in line.writers.items():
            lasts[self._writers[writer]] = last
        expected = (line.number, tuple(lasts))

        def step(state: ScopeState) -> ScopeState | None:
            return state if (state.number, state.lasts) == expected else None

        said = ", ".join(
            f"{self._name(writer, n)} was {number}" for writer, (n, number) in sorted(line.writers.items())
        )
        return step, f"{line.by} asks the head: {line.number}; {said}"

    def _repeat(self, line: Repeated) -> tuple[Step, str]:
        who, last = self._writers.get(line.writer, 0), (line.n, line.number)

        def step(state: ScopeState) -> ScopeState | None:
            return state if state.lasts[who] == last else None

        return step, f"{self._name(line.writer, line.n)} is repeated: {line.number}"

    # -- commits -------------------------------------------------------------------------------------------------------

    def _of(self, commit: _Commit) -> Iterable[Operation[ScopeState]]:
        answer, text = commit.answer, commit.text(self._name(commit.sent.writer, commit.sent.n))
        if answer is None:
            yield Operation(commit.begun, None, self._applied(commit, None), text)
        elif answer.number:
            yield Operation(commit.begun, answer.ended, self._applied(commit, answer.number), text)
        elif answer.clashes is not None:
            refused = self._refused(commit, answer.clashes)
            yield Operation(commit.last_begun, answer.ended, refused, text, changes=False)
            # A version that is gone does not come back, but absence does: an earlier sending that is still under way
            # may yet find the rows absent that it expects to be.
            if commit.times > 1 and not any(commit.sent.expect[key] for key in answer.clashes):
                late = f"{text} (an earlier sending of it)"
                yield Operation(commit.last_begun, None, self._applied(commit, None), late)

    def _applied(self, commit: _Commit, number: int | None) -> Step:
        sent = commit.sent
        expect = sorted(sent.expect.items())
        changes = [(key, text is not None) for key, text in sorted(sent.changes.items())]
        who, n, at = self._writer(sent.writer), sent.n, commit.at

        def step(state: ScopeState) -> ScopeState | None:
            new = state.number + 1
            if (number is not None and new != number) or state.lasts[who][0] >= n:
                return None
            for key, version in expect:
                if state.rows[key][0] != version:
                    return None
            rows, lasts = list(state.rows), list(state.lasts)
            for key, there in changes:
                rows[key] = (new, at) if there else _ABSENT
            lasts[who] = (n, new)
            return ScopeState(new, tuple(rows), tuple(lasts))

        return step

    def _refused(self, commit: _Commit, clashes: list[int]) -> Step:
        expect = commit.sent.expect
        reported = set(clashes)

        def step(state: ScopeState) -> ScopeState | None:
            wrong = {key for key, version in expect.items() if state.rows[key][0] != version}
            return state if wrong and wrong == reported else None

        return step


def _names(keys: Iterable[int]) -> str:
    return ", ".join(f"k{key}" for key in sorted(keys)) or "nothing"
