"""Different names never meet, on any medium."""

from __future__ import annotations

import unicodedata
from itertools import combinations
from typing import Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from holdfast.backends.state import require_key
from holdfast.contract import Key
from holdfast.errors import InvalidInputError
from holdfast.names import entity_name, quote, unquote

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=300)
awkward = st.sampled_from(
    [
        "..",
        ".",
        "a_b",
        "a%5Fb",
        "BTC/USDT:USDT",
        "CON",
        "a ",
        "a.",
        "\0",
        "é",
        "e\u0301",
        "A",
        "a",
        "~",
        "=1",
        "1",
        "x" * 300,
    ]
)
either = names | awkward


@given(either, either)
@settings(max_examples=400, deadline=None)
def test_different_names_are_quoted_differently(one: str, other: str) -> None:
    assume(one != other)
    assert quote(one) != quote(other)
    assert quote(one, keep_underscore=True) != quote(other, keep_underscore=True)


@given(either)
@settings(max_examples=300, deadline=None)
def test_a_quoted_name_is_short_and_safe_and_gives_the_name_back(name: str) -> None:
    for quoted in (quote(name), quote(name, keep_underscore=True)):
        require_key(Key(quoted, quoted, quoted))
        assert len(quoted.encode()) <= 250
        assert unquote(quoted) in (name, None)
        assert (unquote(quoted) is None) == ("~" in quoted)


@given(st.tuples(either, either, st.none() | either), st.tuples(either, either, st.none() | either))
@settings(max_examples=400, deadline=None)
def test_different_contexts_have_different_entity_names(
    one: tuple[str, str, str | None], other: tuple[str, str, str | None]
) -> None:
    assume(one != other)
    assert entity_name(*one) != entity_name(*other)
    require_key(Key("signal", entity_name(*one), "x"))


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_names_in_different_normal_forms_or_cases_differ(form: Literal["NFC", "NFD", "NFKC", "NFKD"]) -> None:
    look_alikes = {"Ångström", unicodedata.normalize(form, "Ångström"), "ångström", "\u212bngström", "ANGSTRÖM"}
    for one, other in combinations(look_alikes, 2):
        assert quote(one) != quote(other)


def test_names_that_differ_only_after_the_cut_differ() -> None:
    assert quote("x" * 300 + "a") != quote("x" * 300 + "b")
    assert entity_name("s" * 119, "t" * 119, "a") != entity_name("s" * 119, "t" * 119, "b")


def test_a_number_and_its_text_differ() -> None:
    assert quote(1) != quote("1") and unquote(quote(1)) == 1 and unquote(quote("1")) == "1"
    assert quote(-5) != quote("-5") and quote("=1") != quote(1)


@pytest.mark.parametrize("name", ["", True, None, 1.5, b"x", "\ud800", 2**70, ["a"]])
def test_what_is_no_name_is_refused(name: object) -> None:
    with pytest.raises(InvalidInputError):
        quote(name)  # type: ignore[arg-type]
