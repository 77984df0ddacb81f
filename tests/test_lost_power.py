"""Power lost under real servers, and the file system that loses it. ``make torture`` cuts 100 times."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lost_power import RIGS, cut_again_and_again
from servers import require
from servers.losing_disk import LosingDisk, Order, why_not

Note = Callable[[str, object], None]
Mount = Callable[..., LosingDisk]


@pytest.fixture
def mountable() -> None:
    """Leave the test out only where the kernel or the user cannot; what is merely not installed is an error."""
    why = why_not()
    if "make servers" in why and not os.environ.get("HOLDFAST_WITHOUT_SERVERS"):
        pytest.fail(why, pytrace=False)
    if why:
        pytest.skip(why)


@pytest.mark.parametrize("name", ["valkey", "postgres", "sqlite", "file"])
def test_what_was_acknowledged_is_there_after_the_power_was_cut(
    name: str, mountable: None, record_property: Note
) -> None:
    if RIGS[name].needs:
        require(RIGS[name].needs)
    found = cut_again_and_again(name, 2, seed=3)
    assert (found.lost, found.broken) == (0, [])
    assert found.cuts == 2 and found.commits >= 2
    record_property(
        "proof:power cut under servers", {"cuts": found.cuts, "commits acknowledged": found.commits, "lost": found.lost}
    )


@pytest.mark.parametrize("name", ["valkey", "sqlite"])
def test_the_wrong_setting_is_refused_and_where_that_is_passed_by_the_same_cut_loses(
    name: str, mountable: None
) -> None:
    if RIGS[name].needs:
        require(RIGS[name].needs)
    # Twice: once in a thousand times the server syncs, as it does each second, just before the cut.
    found = cut_again_and_again(name, 2 if name == "valkey" else 1, wrong=True, seed=3)
    assert "below the required HOST" in found.refused
    assert 0 < found.lost <= found.commits


# -- the file system that loses power ----------------------------------------------------------------------------------


@pytest.fixture
def mount(mountable: None, tmp_path: Path) -> Iterator[Mount]:
    mounted: list[LosingDisk] = []

    def begin(order: Order = "posix") -> LosingDisk:
        directory = tmp_path / f"disk{len(mounted)}"
        (directory / "folder").mkdir(parents=True)
        (directory / "old").write_text("old")
        mounted.append(LosingDisk(directory, tmp_path / f"scratch{len(mounted)}", order))
        return mounted[-1]

    yield begin
    for disk in mounted:
        disk.stop()


def write(path: Path, text: str, *, sync: bool = False) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.write(fd, text.encode())
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def texts(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_after_a_cut_only_what_was_synced_is_there(mount: Mount) -> None:
    disk = mount()
    there = disk.directory
    write(there / "old", "NEW")
    write(there / "named", "bytes")
    sync(there)
    write(there / "nameless", "bytes", sync=True)
    write(there / "folder" / "whole", "bytes", sync=True)
    sync(there / "folder")
    assert texts(there) == {"old": "NEW", "named": "bytes", "nameless": "bytes", "folder/whole": "bytes"}
    disk.cut()
    assert texts(there) == {"old": "old", "named": "", "folder/whole": "bytes"}
    disk.cut()
    assert texts(there) == {"old": "old", "named": "", "folder/whole": "bytes"}, "what was left is durable"


@pytest.mark.parametrize(("order", "left"), [("posix", {"old": "old"}), ("journal", {"b": "new", "old": "old"})])
def test_a_rename_is_durable_with_its_directory_or_as_on_ext4_with_the_next_sync(
    order: Order, left: dict[str, str], mount: Mount
) -> None:
    disk = mount(order)
    write(disk.directory / "a", "new", sync=True)
    (disk.directory / "a").rename(disk.directory / "b")
    write(disk.directory / "old", "old", sync=True)
    disk.cut()
    assert texts(disk.directory) == left


def test_a_file_cut_short_and_one_removed_are_back_until_that_is_synced(mount: Mount) -> None:
    disk = mount()
    os.truncate(disk.directory / "old", 1)
    disk.cut()
    assert texts(disk.directory) == {"old": "old"}
    (disk.directory / "old").unlink()
    disk.cut()
    assert texts(disk.directory) == {"old": "old"}
    (disk.directory / "old").unlink()
    sync(disk.directory)
    disk.cut()
    assert texts(disk.directory) == {}


def test_of_what_was_not_synced_a_part_may_be_kept_torn(mount: Mount) -> None:
    """The first few writes, the last of them up to the end of a sector."""
    disk = mount()
    kept: set[int] = set()
    for seed in range(6):
        write(disk.directory / "old", "y" * 3000, sync=True)
        fd = os.open(disk.directory / "old", os.O_WRONLY)
        for at in range(0, 3000, 600):
            os.pwrite(fd, b"x" * 600, at)
        os.close(fd)
        disk.cut("some", seed)
        found = (disk.directory / "old").read_text()
        kept.add(found.count("x"))
        assert found == "x" * found.count("x") + "y" * found.count("y") and len(found) == 3000
    assert all(count % 600 == 0 or count % 512 == 0 for count in kept), kept
    assert len(kept) > 2 and any(count % 600 for count in kept), kept
