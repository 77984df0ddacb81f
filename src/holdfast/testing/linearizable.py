"""Is a history linearizable? A small checker, and the shortest failing piece where it is not.

A history is linearizable if each operation can be given one moment between its begin and its end, so that the
operations, one after another in the order of these moments, are all as the sequential rules allow. An operation
without an end has an unknown outcome: its moment may come at any time after its begin, or never.

The search is that of Wing and Gong with a memo: place any operation that no unplaced one precedes, go on from there,
and never look twice at the same (set of placed operations, state). Linearizability is local: histories of different
objects, such as scopes, are checked one by one. Its cost grows with the operations in flight at once, not with the
length: keep them to eight or so, and unknown outcomes to a dozen.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

S = TypeVar("S", bound=Hashable)

MOST_TRIES = 2_000_000
"""After so many tries (an operation put to a state) the answer is that it was not decided."""
_CONTEXT = 6
"""So many of the operations that still fitted are shown before those that did not."""


class Operation(NamedTuple, Generic[S]):
    """One operation: when it ran and what it does to a state.

    ``step`` returns the state after it, or None if it cannot happen in that state with the answer that it got. It
    must be a pure function.
    """

    begun: int
    """In any unit, of one clock for all operations."""
    ended: int | None
    """None: its outcome is unknown."""
    step: Callable[[S], S | None]
    text: str = ""
    """For people."""
    changes: bool = True
    """Whether ``step`` may return another state than it was given."""


class Verdict(NamedTuple, Generic[S]):
    """What a search found."""

    fits: bool | None
    """Whether there is an order; None: not decided within the tries."""
    tries: int
    order: tuple[int, ...]
    """Places of the operations in the longest order found: all with an end if it fits."""
    state: S
    """The state after them."""


class Window(NamedTuple, Generic[S]):
    """The end of the shortest failing beginning of a history, without what plays no part in the failure."""

    state: S
    """The state before it."""
    before: int
    """How many operations, in order, led to that state."""
    operations: list[Operation[S]]
    """They fit in no order: those that still did, in theirs, and then those that did not."""
    stuck: int
    """How many of them, at the end of the list, fitted nowhere."""

    def lines(self) -> list[str]:
        """Return a line for each operation, with its times from the beginning of the window."""
        first = min(one.begun for one in self.operations)
        fitted = len(self.operations) - self.stuck
        return [
            f"{'  ' if at < fitted else '> '}{(one.begun - first) / 1000:10.1f} to "
            f"{'?' if one.ended is None else f'{(one.ended - first) / 1000:.1f}':>10} µs  {one.text}"
            for at, one in enumerate(self.operations)
        ]


def check(operations: Sequence[Operation[S]], start: S, *, most_tries: int = MOST_TRIES) -> Verdict[S]:
    """Look for an order in which all operations that have an end, and any of the others, can have happened.

    Args:
        operations: In any order.
        start: The state before all of them.
        most_tries: Give up after so many.
    """
    known = sorted((i for i, one in enumerate(operations) if one.ended is not None), key=lambda i: operations[i].begun)
    loose = [i for i, one in enumerate(operations) if one.ended is None and one.changes]
    search = _Search(operations, known, loose)
    path: list[int] = []
    best: tuple[int, ...] = ()
    best_state, most = start, -1
    node: _Node[S] = (0, 0, 0, start)
    stack = [(node, search.next_of(node))]
    seen: set[_Node[S]] = set()
    tries = 0
    while stack:
        node, candidates = stack[-1]
        if node[0] == len(known):
            return Verdict(True, tries, tuple(path), node[3])
        for at in candidates:
            tries += 1
            if tries > most_tries:
                return Verdict(None, tries, tuple(path), node[3])
            then = search.after(node, at)
            if then is None or then in seen:
                continue
            seen.add(then)
            place = known[at] if at >= 0 else loose[~at]
            # What changes nothing loses nothing by going first: whatever order there is from here, it can.
            further = search.next_of(then)
            stack[-1] = (node, candidates if operations[place].changes else iter(()))
            stack.append((then, further))
            path.append(place)
            break
        else:
            placed = node[0] + node[1].bit_count()
            if placed > most:
                best, best_state, most = tuple(path), node[3], placed
            stack.pop()
            if path:
                path.pop()
    return Verdict(False, tries, best, best_state)


_Node = tuple[int, int, int, S]
"""How many of the known operations are placed from the first on without a gap; a bit for each one placed after that;
a bit for each placed one of unknown outcome; the state."""


class _Search(Generic[S]):
    """What may come next, and what comes of it. A candidate is a place in ``known``, or the complement of one in
    ``loose``."""

    def __init__(self, operations: Sequence[Operation[S]], known: Sequence[int], loose: Sequence[int]) -> None:
        self.known = [operations[i] for i in known]
        self.ends = [operations[i].ended or 0 for i in known]
        self.loose = [operations[i] for i in loose]

    def next_of(self, node: _Node[S]) -> Iterator[int]:
        """Return the unplaced operations that no other unplaced one precedes, first those that ended first."""
        first, done, used, _ = node
        known, ends = self.known, self.ends
        horizon: int | None = None  # the earliest end of an unplaced operation
        found = []
        for at in range(first, len(known)):
            if horizon is not None and known[at].begun > horizon:
                break
            if not done >> (at - first) & 1:
                found.append(at)
                horizon = ends[at] if horizon is None else min(horizon, ends[at])
        found.sort(key=ends.__getitem__)
        found += [
            ~at for at, one in enumerate(self.loose) if not used >> at & 1 and (horizon is None or one.begun <= horizon)
        ]
        return iter(found)

    def after(self, node: _Node[S], at: int) -> _Node[S] | None:
        """Return where placing an operation leads; None if it cannot happen there."""
        first, done, used, state = node
        then = (self.known[at] if at >= 0 else self.loose[~at]).step(state)
        if then is None:
            return None
        if at < 0:
            return (first, done, used | 1 << ~at, then)
        done |= 1 << (at - first)
        while done & 1:
            done >>= 1
            first += 1
        return (first, done, used, then)


def shortest_failure(operations: Sequence[Operation[S]], start: S, *, most_tries: int = MOST_TRIES) -> Window[S]:
    """Return the failing window of a history that :func:`check` found not to fit.

    A beginning of a linearizable history is linearizable: so the earliest end at which it no longer is can be found
    by halving.
    """
    ends = sorted(one.ended for one in operations if one.ended is not None)
    low, high = 0, len(ends) - 1  # up to ends[high] it fails
    while low < high:
        middle = (low + high) // 2
        if check(_beginning(operations, ends[middle]), start, most_tries=most_tries).fits is False:
            high = middle
        else:
            low = middle + 1
    beginning = _beginning(operations, ends[high])
    verdict = check(beginning, start, most_tries=most_tries)
    placed = set(verdict.order)
    stuck = [one for at, one in enumerate(beginning) if at not in placed and one.ended is not None]
    since = min((one.begun for one in stuck), default=0)
    keep = min(_CONTEXT, len(verdict.order))
    while keep < len(verdict.order):
        ended = beginning[verdict.order[-keep - 1]].ended
        if keep >= 4 * _CONTEXT or (ended is not None and ended < since):
            break
        keep += 1
    before = len(verdict.order) - keep
    state = start
    for at in verdict.order[:before]:
        then = beginning[at].step(state)
        assert then is not None, "it was placed there"
        state = then
    shown = [beginning[at] for at in verdict.order[before:]]
    return _without_the_needless(Window(state, before, [*shown, *stuck], len(stuck)), most_tries)


def _without_the_needless(window: Window[S], most_tries: int) -> Window[S]:
    """Leave out, one by one, what changed nothing and without which the rest fits no better."""
    kept, stuck = list(window.operations), window.stuck
    for one in window.operations:
        if one.changes:
            continue
        at = next(at for at, other in enumerate(kept) if other is one)
        rest = kept[:at] + kept[at + 1 :]
        if check(rest, window.state, most_tries=most_tries).fits is False:
            stuck -= at >= len(kept) - stuck
            kept = rest
    return window._replace(operations=kept, stuck=stuck)


def _beginning(operations: Sequence[Operation[S]], moment: int) -> list[Operation[S]]:
    """Return what had begun by a moment; what had not ended by then has no end yet."""
    return [
        one if one.ended is not None and one.ended <= moment else one._replace(ended=None)
        for one in operations
        if one.begun <= moment
    ]
