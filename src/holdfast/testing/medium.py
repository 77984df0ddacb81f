"""A disk in memory that keeps, at a power cut, only what POSIX makes it keep.

What is modelled:

* A file's bytes are written in sectors of 512 bytes; each sector of each write
  persists or not, and so does each change of the file's length. A file that
  grew without its data reads as zeros there.
* A directory's pending changes (create, rename, unlink, mkdir, rmdir) persist in
  any subset (``order="posix"``) or only from the first on (``order="journal"``).
  A rename is one change.
* ``fsync`` and ``fdatasync`` make durable what is pending of that one object.
* After a failed sync (:attr:`holdfast.testing.disk.SimulatedDisk.failing_syncs`) the bytes stay readable, and no later
  sync makes them durable: Linux marks such pages clean.

What is not: drives that ignore a flush, sectors that tear, bytes that rot. See ``docs/proof.md``.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

SECTOR_BYTES = 512

Image = tuple[tuple[str, bytes | None], ...]
"""What a cut leaves: (path, bytes), or (path, None) for a directory; in order of the paths."""


class Grow(NamedTuple):
    size: int


class Sector(NamedTuple):
    at: int
    data: bytes


class Cut(NamedTuple):
    size: int


class NewName(NamedTuple):
    """A change of a directory: ``name`` now stands for ``node`` (None: for nothing); ``gone`` goes with it."""

    name: str
    node: Node | None
    gone: str = ""


Change = Grow | Sector | Cut | NewName


class Node:
    """A file or a directory: what the cache holds now, what is durable, and the changes between the two."""

    def __init__(self, inode: int, path: str, *, directory: bool) -> None:
        self.inode = inode
        self.path = path
        self.directory = directory
        self.data = bytearray()
        self.names: dict[str, Node] = {}
        self.durable_data = b""
        self.durable_names: dict[str, Node] = {}
        self.pending: list[Change] = []
        self.stuck: list[Change] = []
        self.holder: object = None

    def note(self, *changes: Change) -> None:
        """Make changes in the cache and note them as pending."""
        self.pending.extend(changes)
        if self.directory:
            _apply_names(self.names, changes)
        else:
            _apply_data(self.data, changes)

    def sync(self) -> None:
        """Make durable what is pending, in order, except what an earlier sync failed to write."""
        if self.directory:
            _apply_names(self.durable_names, self.pending)
        else:
            data = bytearray(self.durable_data)
            _apply_data(data, self.pending)
            self.durable_data = bytes(data)
        self.pending.clear()

    def doom(self) -> None:
        """Note that a sync of what is pending failed: it may persist, and no later sync changes that."""
        self.stuck.extend(self.pending)
        self.pending.clear()

    def data_after(self, changes: list[Change]) -> bytes:
        data = bytearray(self.durable_data)
        _apply_data(data, changes)
        return bytes(data)

    def names_after(self, changes: list[Change]) -> dict[str, Node]:
        names = dict(self.durable_names)
        _apply_names(names, changes)
        return names


def _apply_data(data: bytearray, changes: tuple[Change, ...] | list[Change]) -> None:
    for change in changes:
        match change:
            case Grow(size):
                data.extend(bytes(max(0, size - len(data))))
            case Sector(at, piece):
                room = max(0, len(data) - at)  # bytes beyond the length that persisted are not seen
                data[at : at + min(room, len(piece))] = piece[:room]
            case Cut(size):
                del data[size:]


def _apply_names(names: dict[str, Node], changes: tuple[Change, ...] | list[Change]) -> None:
    for change in changes:
        assert isinstance(change, NewName)
        if change.gone:
            names.pop(change.gone, None)
        if change.node is None:
            names.pop(change.name, None)
        else:
            names[change.name] = change.node


class Medium:
    """What the simulated processes share: files and directories, cached and durable.

    Args:
        image: What lies there, all of it durable; from an earlier cut.
        base: The directory that exists from the start, absolute.
    """

    def __init__(self, image: Image = (), *, base: str = "/disk") -> None:
        self.lock = threading.RLock()
        self.before_change: Callable[[], None] = lambda: None
        self.calls = 0
        """Calls that change something or sync it, so far."""
        self._inodes = itertools.count(2)
        self.root = Node(1, "", directory=True)
        self.base = base
        self._lay(base, None)
        for path, data in image:
            self._lay(path, data)

    def _lay(self, path: str, data: bytes | None) -> None:
        node = self.root
        *parents, last = path.strip("/").split("/")
        for at, part in enumerate((*parents, last)):
            if part not in node.names:
                made = Node(next(self._inodes), f"{node.path}/{part}", directory=data is None or at < len(parents))
                node.names[part] = node.durable_names[part] = made
            node = node.names[part]
        if data is not None:
            node.data = bytearray(data)
            node.durable_data = data

    def make(self, parent: Node, name: str, *, directory: bool) -> Node:
        """Make a file or directory in the cache."""
        node = Node(next(self._inodes), f"{parent.path}/{name}", directory=directory)
        parent.note(NewName(name, node))
        return node

    def now(self) -> Image:
        """Return what a process sees: everything that was written, durable or not."""
        return self._image(lambda node: node.names, lambda node: bytes(node.data))

    def _image(self, names: Callable[[Node], dict[str, Node]], data: Callable[[Node], bytes]) -> Image:
        found: list[tuple[str, bytes | None]] = []

        def walk(node: Node, path: str) -> None:
            for name, child in names(node).items():
                under = f"{path}/{name}"
                found.append((under, None if child.directory else data(child)))
                if child.directory:
                    walk(child, under)

        walk(self.root, "")
        found.sort(key=lambda item: item[0])
        return tuple(found)

    def _nodes(self) -> list[Node]:
        """Everything that some image may reach."""
        seen: dict[int, Node] = {}
        todo = [self.root]
        while todo:
            node = todo.pop()
            if node.inode in seen:
                continue
            seen[node.inode] = node
            todo.extend(node.names.values())
            todo.extend(node.durable_names.values())
            todo.extend(c.node for c in (*node.stuck, *node.pending) if isinstance(c, NewName) and c.node is not None)
        return list(seen.values())

    def images(
        self,
        *,
        rng: random.Random,
        order: Literal["posix", "journal"] = "posix",
        most: int = 1024,
        focus: Callable[[str], bool] = lambda path: True,
    ) -> Iterator[Image]:
        """Yield the images that a power cut at this moment may leave; some may be equal.

        Args:
            rng: Draws what is not enumerated.
            order: How a directory's changes persist.
            most: Yield at most so many; beyond that a sample, which always has "nothing" and "everything" persisted.
            focus: Which paths to enumerate in full. What happens to other paths is drawn for each image.
        """
        nodes = [(node, [*node.stuck, *node.pending]) for node in self._nodes() if node.stuck or node.pending]
        sharp: list[list[int]] = []
        for node, changes in nodes:
            sharp.append([at for at, change in enumerate(changes) if focus(_path_of(node, change))])
        for picked in _selections([len(some) for some in sharp], rng, most, order, [n.directory for n, _ in nodes]):
            kept: dict[int, list[Change]] = {}
            for (node, changes), some, bits in zip(nodes, sharp, picked, strict=True):
                chosen = {at for place, at in enumerate(some) if bits >> place & 1}
                rest = set(range(len(changes))) - set(some)
                if rest:
                    chosen |= _draw(sorted(rest), rng, ordered=node.directory and order == "journal")
                kept[node.inode] = [change for at, change in enumerate(changes) if at in chosen]
            yield self._image(
                lambda node, kept=kept: node.names_after(kept.get(node.inode, [])),  # type: ignore[misc]
                lambda node, kept=kept: node.data_after(kept.get(node.inode, [])),  # type: ignore[misc]
            )


def _path_of(node: Node, change: Change) -> str:
    return f"{node.path}/{change.name}" if isinstance(change, NewName) else node.path


def _draw(places: list[int], rng: random.Random, *, ordered: bool) -> set[int]:
    if ordered:
        return set(places[: rng.randint(0, len(places))])
    odds = rng.choice((0.0, 0.3, 0.7, 1.0))
    return {at for at in places if rng.random() < odds}


def _selections(
    sizes: list[int], rng: random.Random, most: int, order: Literal["posix", "journal"], directories: list[bool]
) -> Iterator[tuple[int, ...]]:
    """Yield one bit mask per object: all combinations if there are few, else a sample with both ends."""
    prefixed = [order == "journal" and directory for directory in directories]
    total = 1
    for size, prefix in zip(sizes, prefixed, strict=True):
        total *= size + 1 if prefix else 1 << min(size, 60)
    if total <= most:
        ways = [
            [(1 << n) - 1 for n in range(size + 1)] if prefix else list(range(1 << size))
            for size, prefix in zip(sizes, prefixed, strict=True)
        ]
        yield from itertools.product(*ways)
        return
    yield tuple(0 for _ in sizes)
    yield tuple((1 << size) - 1 for size in sizes)
    for _ in range(most - 2):
        odds = rng.choice((0.15, 0.5, 0.85))
        masks = []
        for size, prefix in zip(sizes, prefixed, strict=True):
            some = sum(1 << at for at in range(size) if rng.random() < odds)
            masks.append((1 << rng.randint(0, size)) - 1 if prefix or rng.random() < 0.3 else some)
        yield tuple(masks)
