"""The disk of simulated processes, as far as emergency journals need one: files in memory that outlive a crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from ...contract import Key
from ...domains import decode
from ...engine.blocks import text_of
from ...engine.emergency import Emergency
from ...engine.modes import TroublePolicy
from ...errors import HeldError
from ...rows import Row
from ...store import Store

Kept = Callable[[dict[Key, Row | None]], None]


def path_of(file: str, holder: str) -> str:
    """Return what a policy names: the file, and who opens it."""
    return f"{file}@{holder}"


class Disk:
    """All journal files of one history; each is locked by one life at a time."""

    def __init__(self) -> None:
        self.restart(lambda rows: None)

    def restart(self, kept: Kept) -> None:
        """Begin anew, for another history.

        Args:
            kept: Told the rows of each record that is written.
        """
        self._files: dict[str, bytearray] = {}
        self._holders: dict[str, str] = {}
        self.kept = kept

    def open(self, path: str) -> Space:
        """Open a file for one life.

        Raises:
            HeldError: Another life has it.
        """
        file, _, holder = path.partition("@")
        if self._holders.setdefault(file, holder) != holder:
            raise HeldError(f"{self._holders[file]} uses the emergency journal {file}")
        return Space(self, file, self._files.setdefault(file, bytearray()))

    def release(self, holder: str) -> None:
        """A life is over: whoever comes next may open what it had."""
        self._holders = {file: other for file, other in self._holders.items() if other != holder}

    def close(self, file: str) -> None:
        """Unlock one file."""
        self._holders.pop(file, None)


class Space:
    """One open file; see :class:`holdfast.engine.blocks.Space`."""

    def __init__(self, disk: Disk, file: str, data: bytearray) -> None:
        self._disk, self._file, self._data = disk, file, data

    def read(self) -> bytes:
        """Return the whole file."""
        return bytes(self._data)

    def write(self, at: int, data: bytes) -> None:
        """Write in place, or at the end."""
        self._data[at : at + len(data)] = data
        text = text_of(data)
        if text is not None:
            plain: dict[str, Any] = msgspec.json.decode(text)
            rows = [(Key(*key), text) for *key, text in plain.get("changes", ())]
            self._disk.kept({key: None if text is None else decode(key, text.encode()) for key, text in rows})

    def sync(self) -> None:
        """What was written stays."""

    def close(self) -> None:
        """Let go of it."""
        self._disk.close(self._file)


disk = Disk()


def simulated_emergency(store: Store, policy: TroublePolicy) -> Emergency:
    """Return a journal on the simulated disk."""
    return Emergency(store, policy, open_space=disk.open)


async def at_once(work: Callable[[], Any]) -> Any:
    """Do on the spot what would go to a thread."""
    return work()
