"""Stores' names: a path or a URL, prefixes that wrap it, copies of it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.backends.file import FileBackend
from holdfast.backends.memory import MemoryBackend
from holdfast.backends.sqlite import SqliteBackend
from holdfast.contract import Backend
from holdfast.errors import InvalidInputError
from holdfast.urls import WRAPPERS, open_backend, parse_store
from holdfast.wrappers.around import Around


def layers(backend: Backend) -> list[str]:
    """Name the wrappers of a backend and the backend, outermost first."""
    names = []
    while isinstance(backend, Around):
        names.append(type(backend).__name__)
        backend = backend.backend
    return [*names, type(backend).__name__]


def test_prefixes_wrap_in_the_one_order_whatever_order_they_are_written_in() -> None:
    for name in ("traced+cached+retrying+memory:", "retrying+cached+traced+memory:", "Cached+RETRYING+traced+memory:"):
        assert layers(open_backend(name)) == ["Traced", "Cached", "Retrying", "MemoryBackend"]


def test_the_cache_lies_above_the_encryption_in_the_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_KEYS", "k1=" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWY=")
    for name in ("encrypted+retrying+cached+traced+memory:", "cached+traced+encrypted+retrying+memory:"):
        assert layers(open_backend(name)) == ["Traced", "Cached", "Encrypted", "Retrying", "MemoryBackend"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cached+./dump/data", FileBackend),
        ("cached+dump/data", FileBackend),
        ("cached+/srv/bot data", FileBackend),
        ("cached+file:dump", FileBackend),
        ("cached+sqlite:bot.db", SqliteBackend),
        ("cached+memory:", MemoryBackend),
    ],
)
def test_a_prefix_stands_before_a_path_or_a_url(name: str, kind: type[Backend]) -> None:
    assert layers(open_backend(name)) == ["Cached", kind.__name__]


@pytest.mark.parametrize("name", ["./my dump/data", "a b", "./one ./two", "a+b", "data+old/x", "/srv/a+b c", "./x+y:z"])
def test_a_path_with_blanks_or_plus_signs_is_a_path(name: str) -> None:
    parsed = parse_store(name)
    assert (parsed.places, parsed.wrappers, parsed.quorum) == ((name,), frozenset(), None)
    assert repr(open_backend(name)) == f"FileBackend({str(Path(name).absolute())!r})"


def test_schemes_that_hold_a_plus_sign_are_no_prefixes() -> None:
    name = parse_store("traced+redis+sentinel://a:1,b:2/main")
    assert name == (frozenset(["traced"]), ("redis+sentinel://a:1,b:2/main",), None)
    assert parse_store("mongodb+srv://host/db").places == ("mongodb+srv://host/db",)


def test_urls_with_blanks_between_are_copies() -> None:
    name = parse_store("retrying+traced+redis://u:p@a/0  postgresql://b/x\tfile:./my data s3://c/d quorum=2")
    assert name.wrappers == {"retrying", "traced"}
    assert name.places == ("redis://u:p@a/0", "postgresql://b/x", "file:./my data", "s3://c/d")
    assert name.quorum == 2
    assert name.folders == (None, None, "./my data", None)
    assert parse_store("file:a quorum=1 file:b").quorum == 1


REFUSED = {
    "an unknown prefix": ("chached+redis://u:secret@a", "no wrapper 'chached'.*cached"),
    "an unknown prefix before a path": ("chached+./dump", "no wrapper 'chached'"),
    "an unknown prefix behind a known one": ("traced+x+redis://u:secret@a", "no wrapper 'x'"),
    "a prefix twice": ("cached+traced+cached+redis://u:secret@a", "cached\\+ stands twice"),
    "a prefix before a follower": ("redis://u:secret@a cached+redis://u:secret@b", "before the first copy"),
    "an unknown scheme": ("traced+rabbit://u:secret@host", "rabbit.*names no store"),
    "a quorum without copies": ("redis://u:secret@a quorum=1", "without copies"),
    "a quorum of none": ("redis://u:secret@a redis://b quorum=0", "out of range.*2 copies"),
    "a quorum of more than there are": ("redis://u:secret@a redis://b quorum=3", "out of range.*2 copies"),
    "a quorum that is no number": ("redis://u:secret@a redis://b quorum=all", "out of range"),
    "a quorum twice": ("redis://u:secret@a redis://b quorum=1 quorum=2", "quorum= stands twice"),
    "memory as a copy": ("memory: file:x", "memory: cannot be a copy"),
    "memory as a follower": ("redis://u:secret@a memory:", "memory: cannot be a copy"),
    "the same server twice": ("redis://u:secret@a/0 redis://v:secret2@A/0", "same place"),
    "the same folder twice": (f"file:x sqlite:y file:{Path.cwd() / 'x'}", "same place"),
    "a path as a copy without file:": ("redis://u:secret@a ./dump", "blank in the 'redis' URL.*file:PATH"),
    "nothing": ("  ", "not a store"),
    "a prefix before nothing": ("cached+", r"no store stands behind cached\+"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_name_that_cannot_be_read_is_refused_and_not_repeated(why: str) -> None:
    name, message = REFUSED[why]
    with pytest.raises(InvalidInputError, match=message) as caught:
        open_backend(name)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_no_repr_of_a_wrapped_store_tells_its_password(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_KEYS", "k1=" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWY=")
    shown = repr(open_backend(f"{prefix}+redis://user:hunter2@127.0.0.1:1/0"))
    assert "hunter2" not in shown
    assert "QUJD" not in shown
    assert "redis" in shown.lower()
