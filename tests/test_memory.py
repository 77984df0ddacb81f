"""The memory backend, and the names by which backends are opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.backends.file import FileBackend
from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Key, Op, Record, Survives
from holdfast.errors import FailedError, InvalidInputError
from holdfast.urls import open_backend

KEY = Key("signal", "BTCUSDT_trend_binance", "BTCUSDT")


async def test_rows_outlive_close_but_nothing_is_promised() -> None:
    backend = MemoryBackend()
    found = await backend.open()
    assert found.survives is Survives.NOTHING
    assert "file store" in found.warnings[0]
    assert await backend.commit("main", {KEY: b"{}"}, {KEY: 0}, op=Op("w", 1)) == 1
    await backend.close()
    with pytest.raises(FailedError, match="open it first"):
        await backend.read("main", [KEY])
    await backend.open()
    assert await backend.read("main", [KEY]) == {KEY: Record(b"{}", 1, Op("w", 1))}


async def test_a_memory_store_that_is_read_only_takes_no_commit() -> None:
    backend = MemoryBackend()
    await backend.open(read_only=True)
    with pytest.raises(FailedError, match="read-only"):
        await backend.commit("main", {KEY: b"{}"}, {}, op=Op("w", 1))


@pytest.mark.parametrize("url", ["memory:", "MEMORY:", "memory://"])
def test_memory_is_opened_by_its_scheme(url: str) -> None:
    assert isinstance(open_backend(url), MemoryBackend)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:/srv/bot/data", "/srv/bot/data"),
        ("file:///srv/a%20b", "/srv/a b"),
        ("file://localhost/srv", "/srv"),
        ("/srv/bot", "/srv/bot"),
        ("dump/data", str(Path.cwd() / "dump/data")),
        ("./with:colon", str(Path.cwd() / "with:colon")),
        ("file:dump", str(Path.cwd() / "dump")),
    ],
)
def test_a_path_or_a_file_url_is_a_directory(url: str, path: str) -> None:
    backend = open_backend(url)
    assert isinstance(backend, FileBackend)
    assert repr(backend) == f"FileBackend({path!r})"


@pytest.mark.parametrize(
    "url", ["", "  ", "rabbit://u:secret@host/0", "file:", "sqlite:", "file://host/path", "memory:x", "ftp://b"]
)
def test_what_names_no_backend_is_refused_with_what_exists_and_without_secrets(url: str) -> None:
    with pytest.raises(InvalidInputError, match="memory:") as caught:
        open_backend(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("bad", ["", "a\0b"])
def test_a_path_that_cannot_be_one_is_refused(bad: str) -> None:
    with pytest.raises(InvalidInputError, match="not a path"):
        FileBackend(bad)
    with pytest.raises(InvalidInputError, match="view_delay_seconds"):
        FileBackend("x", view_delay_seconds=2)
    with pytest.raises(InvalidInputError, match="checkpoint_bytes"):
        FileBackend("x", checkpoint_bytes=0)
