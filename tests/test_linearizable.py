"""The checker of histories: agrees with trying every order, finds planted faults, and its work is bounded."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
from ideal_scope import Fault, ideal_history

from holdfast.testing.histories.hunt import judge
from holdfast.testing.histories.lines import Answered, Line, Looked, Read, Seen, Sent
from holdfast.testing.histories.model import Scribe
from holdfast.testing.linearizable import Operation, check, shortest_failure

Register = Operation[int]


def write(begun: int, ended: int | None, value: int) -> Register:
    return Operation(begun, ended, lambda _: value, f"write {value}")


def read(begun: int, ended: int | None, value: int) -> Register:
    return Operation(begun, ended, lambda held: held if held == value else None, f"read {value}", changes=False)


def swap(begun: int, ended: int | None, old: int, new: int) -> Register:
    return Operation(begun, ended, lambda held: new if held == old else None, f"swap {old} for {new}")


def fits_in_some_order(operations: Sequence[Register], start: int) -> bool:
    """Try every order of every choice of the operations without an end."""
    sure = [one for one in operations if one.ended is not None]
    loose = [one for one in operations if one.ended is None]
    for count in range(len(loose) + 1):
        for chosen in itertools.combinations(loose, count):
            if any(_allowed(order, start) for order in itertools.permutations([*sure, *chosen])):
                return True
    return False


def _allowed(order: Sequence[Register], start: int) -> bool:
    for earlier, later in itertools.combinations(order, 2):
        if later.ended is not None and later.ended < earlier.begun:
            return False
    state = start
    for one in order:
        then = one.step(state)
        if then is None:
            return False
        state = then
    return True


def small_history(chance: random.Random) -> list[Register]:
    made = []
    for _ in range(chance.randint(2, 5)):
        begun = chance.randrange(12)
        ended = None if chance.random() < 0.2 else begun + chance.randrange(6)
        value = chance.randrange(3)
        roll = chance.random()
        if roll < 0.4:
            made.append(write(begun, ended, value))
        elif roll < 0.8:
            made.append(read(begun, ended, value))
        else:
            made.append(swap(begun, ended, value, chance.randrange(3)))
    return made


def test_it_agrees_with_trying_every_order_on_thousands_of_small_histories(
    record_property: Callable[[str, object], None],
) -> None:
    chance, verdicts = random.Random(11), {True: 0, False: 0}
    for turn in range(4000):
        operations = small_history(chance)
        expected = fits_in_some_order(operations, 0)
        assert check(operations, 0).fits is expected, (turn, operations)
        verdicts[expected] += 1
    assert min(verdicts.values()) > 1000, "both kinds came up often"
    record_property("proof:small histories", {"linearizable": verdicts[True], "not": verdicts[False]})


def test_the_order_that_it_finds_is_one_that_is_allowed() -> None:
    chance = random.Random(12)
    for _ in range(300):
        operations = small_history(chance)
        verdict = check(operations, 0)
        if verdict.fits:
            order = [operations[at] for at in verdict.order]
            assert _allowed(order, 0)
            assert {at for at, one in enumerate(operations) if one.ended is not None} <= {*verdict.order}


def test_an_unknown_outcome_may_come_late_or_never_but_not_early_and_not_twice() -> None:
    late = write(5, None, 1)
    assert check([late, read(6, 7, 0), read(20, 21, 1)], 0).fits, "late"
    assert check([late, read(6, 7, 0), read(20, 21, 0)], 0).fits, "never"
    assert check([late, read(1, 2, 1)], 0).fits is False, "before it began"
    again = [late, read(6, 7, 1), write(8, 9, 2), read(10, 11, 1)]
    assert check(again, 0).fits is False, "applied twice"


def test_a_read_that_goes_back_is_found_though_each_value_was_once_right() -> None:
    assert check([write(0, 9, 1), read(1, 2, 1), read(3, 4, 0)], 0).fits is False
    assert check([write(0, 9, 1), read(1, 3, 1), read(2, 4, 0)], 0).fits, "while they overlap either may come first"


@pytest.mark.parametrize("seed", range(10))
def test_a_history_of_an_ideal_scope_is_linearizable(seed: int) -> None:
    lines = ideal_history(random.Random(seed), operations=1000, clients=8)
    report = judge(seed, ["s"], lines)
    assert report.ok, report.violations
    assert report.operations + report.unknown >= 1000
    assert min(report.commits, report.refused, report.resent) > 5
    assert report.unknown > 0


@pytest.mark.parametrize("fault", Fault)
def test_a_planted_fault_is_found_in_ten_of_ten_histories(
    fault: Fault, record_property: Callable[[str, object], None]
) -> None:
    for seed in range(10):
        lines = ideal_history(random.Random(seed), operations=1000, clients=8, fault=fault)
        history = Scribe("s", lines).history()
        assert check(history.operations, history.start).fits is False, f"{fault.value} was not noticed, seed {seed}"
    record_property("proof:planted faults", {fault.value: 10})


@pytest.mark.parametrize("fault", Fault)
def test_the_window_that_is_shown_is_short_and_fails_by_itself(fault: Fault) -> None:
    lines = ideal_history(random.Random(3), operations=1000, clients=8, fault=fault)
    history = Scribe("s", lines).history()
    window = shortest_failure(history.operations, history.start)
    assert len(window.operations) <= 40
    assert window.stuck >= 1
    fitted = window.operations[: -window.stuck]
    assert check(fitted, window.state).fits
    assert check(window.operations, window.state).fits is False
    assert len(window.lines()) == len(window.operations)


def test_nothing_ends_after_the_window_so_it_is_the_shortest_beginning_that_fails() -> None:
    operations = [write(0, 1, 1), read(2, 3, 1), read(4, 5, 7), write(6, 7, 2), read(8, 9, 1)]
    window = shortest_failure(operations, 0)
    assert [one.text for one in window.operations] == ["write 1", "read 7"]
    assert window.stuck == 1


@pytest.mark.parametrize("fault", [None, *Fault])
@pytest.mark.parametrize("operations", [1000, 5000])
def test_its_work_grows_with_the_length_only(operations: int, fault: Fault | None) -> None:
    """Counted in tries, so that a slow machine cannot fail it."""
    lines = ideal_history(random.Random(7), operations=operations, clients=8, fault=fault)
    history = Scribe("s", lines).history()
    verdict = check(history.operations, history.start)
    assert verdict.fits is (fault is None)
    assert verdict.tries <= 60 * operations


def test_a_refusal_of_what_holds_is_found_and_so_is_one_that_names_the_wrong_keys() -> None:
    def judged(clashes: list[int]) -> bool:
        sent: list[Line] = [
            Sent(10, "s", "a", 1, {0: "x", 1: "y"}, {}),
            Answered(20, "a", 1, 1),
            Sent(30, "s", "b", 1, {0: "z"}, {0: 1, 1: 0}),
            Answered(40, "b", 1, clashes=clashes),
        ]
        return judge(1, ["s"], [Looked(1, 2, "look", "s", 0, {}), Read(3, 4, "look", "s", [0, 1], []), *sent]).ok

    assert judged([1])
    assert not judged([0])
    assert not judged([0, 1])
    assert not judged([])


def test_what_was_told_to_be_unavailable_must_never_appear() -> None:
    lines: list[Line] = [
        Looked(1, 2, "look", "s", 0, {}),
        Read(3, 4, "look", "s", [0, 1], []),
        Sent(10, "s", "a", 1, {0: "x"}, {}),
        Answered(20, "a", 1, unavailable=True),
    ]
    assert judge(1, ["s"], [*lines, Read(30, 31, "b", "s", [0], [])]).ok
    assert not judge(1, ["s"], [*lines, Read(30, 31, "b", "s", [0], [Seen(0, 1, "a", 1, "x")])]).ok


def test_a_row_that_nobody_wrote_and_one_with_another_payload_are_found() -> None:
    lines: list[Line] = [
        Looked(1, 2, "look", "s", 0, {}),
        Read(3, 4, "look", "s", [0, 1], []),
        Sent(10, "s", "a", 1, {0: "x"}, {}),
        Answered(20, "a", 1, 1),
    ]
    assert judge(1, ["s"], [*lines, Read(30, 31, "b", "s", [0], [Seen(0, 1, "a", 1, "x")])]).ok
    for wrong in (Seen(0, 1, "a", 1, "y"), Seen(0, 1, "a", 2, "x"), Seen(0, 2, "a", 1, "x"), Seen(0, 1, "q", 1, "x")):
        assert not judge(1, ["s"], [*lines, Read(30, 31, "b", "s", [0], [wrong])]).ok


def test_a_refused_op_that_was_sent_twice_may_come_late_only_where_it_expects_absence() -> None:
    """Absence comes back; a version that is gone does not."""

    def judged(expected: int) -> bool:
        start = [Seen(0, 5, "z", 9, "old")]
        lines: list[Line] = [
            Looked(1, 2, "look", "s", 5, {"z": (9, 5)}),
            Read(3, 4, "look", "s", [0], start),
            Sent(10, "s", "a", 1, {1: "late"}, {0: expected}),
            Sent(20, "s", "a", 1, {1: "late"}, {0: expected}, again=True),
            Answered(30, "a", 1, clashes=[0]),
            Sent(40, "s", "b", 1, {0: None}, {}),
            Answered(50, "b", 1, 6),
        ]
        return judge(1, ["s"], [*lines, Read(60, 61, "b", "s", [1], [Seen(1, 7, "a", 1, "late")])]).ok

    assert judged(0)
    assert not judged(4)


def test_it_gives_up_after_so_many_tries_and_says_so() -> None:
    operations = [write(0, 100, value) for value in range(12)] + [read(0, 100, 99)]
    verdict = check(operations, 0, most_tries=1000)
    assert verdict.fits is None
    assert verdict.tries == 1001
