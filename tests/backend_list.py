"""Every backend, by name: a new backend is one line here. A factory takes a directory of its own."""

from __future__ import annotations

from pathlib import Path

from holdfast.backends.file import FileBackend
from holdfast.backends.memory import MemoryBackend
from holdfast.testing.conformance import Factory


def _memory(place: Path) -> MemoryBackend:
    return MemoryBackend()


def _file(place: Path) -> FileBackend:
    return FileBackend(place / "data")


BACKENDS: dict[str, Factory] = {"memory": _memory, "file": _file}
