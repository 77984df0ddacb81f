"""The log under damage: a torn tail is cut, all else is found, pinned to its key or refused; nothing is deleted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from file_ground import closed_store, crashed_store, everything, get, key, payload, put

from holdfast.backends import log
from holdfast.backends.file import FileBackend
from holdfast.contract import MAX_WRITERS, Op, Record, WriterOp
from holdfast.errors import CorruptedError

FORMATS = Path(__file__).parent / "formats"


def rows_of(found: log.Replay) -> dict[str, bytes]:
    """Return every undamaged row."""
    scope = found.state.scopes.get("main")
    return {str(at): r.payload for at, r in scope.rows.items() if at not in scope.damaged} if scope else {}


async def open_and_list(place: Path) -> dict[str, bytes]:
    """Open, read all, close."""
    backend = FileBackend(place)
    await backend.open()
    try:
        found = await everything(backend)
    finally:
        await backend.close()
    return {str(at): record.payload for _, rows in found.values() for at, record in rows.items()}


async def test_a_torn_tail_is_cut_wherever_the_last_frame_was_torn(tmp_path: Path) -> None:
    path = await crashed_store(tmp_path / "data")
    whole = path.read_bytes()
    last = whole.rindex(b"HF1 ")
    kept = rows_of(log.replay(whole[:last]))
    assert len(kept) == 2
    for length in range(last, len(whole)):
        for torn in (whole[:length], whole[:length] + bytes(len(whole) - length)):
            if torn[last:].rstrip(b"\0") == whole[last:].rstrip(b"\0"):
                continue
            found = log.replay(torn)
            assert found.length == last
            assert rows_of(found) == kept
    for length in range(last, len(whole), 29):
        path.write_bytes(whole[:length])
        assert await open_and_list(tmp_path / "data") == kept
        (path.parent / "witness").unlink()
    tails = [tail.read_bytes() for tail in (path.parent / "quarantine").iterdir()]
    assert sorted(tails) == [whole[last:length] for length in range(last + 29, len(whole), 29)]


async def test_a_tail_of_zeros_is_cut_without_a_copy(tmp_path: Path) -> None:
    path = await crashed_store(tmp_path / "data")
    path.write_bytes(path.read_bytes() + bytes(4096))
    assert len(await open_and_list(tmp_path / "data")) == 3
    assert not (path.parent / "quarantine").exists()


async def test_after_a_cut_the_next_commit_and_opening_work(tmp_path: Path) -> None:
    path = await crashed_store(tmp_path / "data")
    path.write_bytes(path.read_bytes()[:-5])
    backend = FileBackend(tmp_path / "data")
    await backend.open()
    assert await put(backend, key(7), payload(7)) == 3
    await backend.close()
    assert len(await open_and_list(tmp_path / "data")) == 3


async def test_every_flipped_bit_of_a_closed_log_is_found_or_harmless(tmp_path: Path) -> None:
    path = await closed_store(tmp_path / "data")
    whole = path.read_bytes()
    rows = rows_of(log.replay(whole))
    refused = pinned = harmless = 0
    for at in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        try:
            found = log.replay(bytes(flipped))
        except (log.Damaged, log.NotOurs):
            refused += 1
            continue
        kept = rows_of(found)
        assert all(rows[name] == value for name, value in kept.items()), f"bit {at} changed a row unseen"
        damaged = found.state.scopes["main"].damaged
        assert len(kept) + len(damaged) == len(rows), f"bit {at} lost a row"
        assert len(damaged) <= 1, f"bit {at} stopped more than its key"
        pinned += len(damaged)
        harmless += not damaged
    assert pinned == sum(8 * len(value) for value in rows.values())
    # Harmless: the newlines behind the payloads, and the seal, which is cut like any torn tail.
    assert harmless == 8 * (len(rows) + len(whole) - whole.rindex(b"HF1 "))
    assert refused == 8 * len(whole) - pinned - harmless


async def test_a_flip_in_a_payload_stops_only_its_key_and_keeps_the_bytes(tmp_path: Path) -> None:
    path = await closed_store(tmp_path / "data", rows=3)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"note":"n1"', b'"note":"nX"'))
    backend = FileBackend(tmp_path / "data", checkpoint_bytes=1)
    found = await backend.open()
    assert any(str(key(1)) in warning for warning in found.warnings)
    for _ in range(3):
        with pytest.raises(CorruptedError) as caught:
            await backend.read("main", [key(0), key(1)])
        assert caught.value.key == key(1)
        assert await get(backend, key(0)) == payload(0)
        assert await get(backend, key(2)) == payload(2)
        await put(backend, key(5), payload(5))  # a checkpoint follows: the damage must not be blessed by it
        await backend.close()
        await backend.open()
    kept = [kept.read_bytes() for kept in (path.parent / "quarantine").iterdir()]
    assert kept == [payload(1).replace(b"n1", b"nX")]
    view = tmp_path / "data" / "signal" / "S1_trend_binance" / "S1.json"
    assert view.read_bytes() == payload(1) + b"\n", "the view of a damaged row may be the last good copy"
    assert await put(backend, key(1), payload(11), expect=2) == 7
    assert await get(backend, key(1)) == payload(11)
    await backend.close()
    assert len(await open_and_list(tmp_path / "data")) == 4


async def test_a_flip_elsewhere_refuses_the_log_and_keeps_a_copy(tmp_path: Path) -> None:
    path = await closed_store(tmp_path / "data")
    spoiled = path.read_bytes().replace(b'"number":2', b'"number":3')
    path.write_bytes(spoiled)
    backend = FileBackend(tmp_path / "data")
    for _ in range(2):
        with pytest.raises(CorruptedError, match=r"copy is in .*quarantine/commit\.log.*backup"):
            await backend.open()
    assert path.read_bytes() == spoiled
    assert [kept.read_bytes() for kept in (path.parent / "quarantine").iterdir()] == [spoiled]


async def test_a_log_cut_at_any_length_after_a_close_is_refused_or_loses_nothing(tmp_path: Path) -> None:
    path = await closed_store(tmp_path / "data")
    whole = path.read_bytes()
    rows = rows_of(log.replay(whole))
    seal = whole.rindex(b"HF1 ")
    for length in range(0, len(whole), 13):
        shutil.copytree(tmp_path / "data", tmp_path / "cut")
        (tmp_path / "cut" / ".holdfast" / "commit.log").write_bytes(whole[:length])
        if length >= seal:
            assert await open_and_list(tmp_path / "cut") == rows
        else:
            with pytest.raises(CorruptedError):
                await open_and_list(tmp_path / "cut")
            assert (tmp_path / "cut" / ".holdfast" / "commit.log").read_bytes() == whole[:length]
        shutil.rmtree(tmp_path / "cut")


async def test_an_older_log_put_in_the_place_of_the_newest_is_refused(tmp_path: Path) -> None:
    path = await closed_store(tmp_path / "data")
    older = path.read_bytes()
    backend = FileBackend(tmp_path / "data")
    await backend.open()
    await put(backend, key(8), payload(8))
    await backend.close()
    path.write_bytes(older)
    with pytest.raises(CorruptedError, match="ends at commit 2 of scope main, but commit 3 was durable"):
        await backend.open()


@pytest.mark.parametrize("damage", ["repeated", "left out", "swapped"])
async def test_frames_out_of_order_are_refused(tmp_path: Path, damage: str) -> None:
    path = await closed_store(tmp_path / "data", rows=4)
    first, *frames = [b"HF1 " + part for part in path.read_bytes().split(b"HF1 ")[1:]]
    if damage == "repeated":
        frames.insert(1, frames[0])
    elif damage == "left out":
        del frames[1]
    else:
        frames[1], frames[2] = frames[2], frames[1]
    path.write_bytes(b"".join([first, *frames]))
    with pytest.raises(CorruptedError, match="damaged"):
        await FileBackend(tmp_path / "data").open()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "empty"),
        (b"HF2 00000010 00000000 0000000000000001 00000000\n" + bytes(16), "newer version: upgrade"),
        (b"SQLite format 3\0" + bytes(100), "not a Holdfast log"),
        (bytes(4096), "not a Holdfast log"),
        (b"HF1 garbage", "damaged"),
    ],
)
async def test_a_log_that_is_not_ours_is_refused_and_not_touched(tmp_path: Path, text: bytes, says: str) -> None:
    path = await closed_store(tmp_path / "data")
    path.write_bytes(text)
    with pytest.raises(CorruptedError, match=says):
        await FileBackend(tmp_path / "data").open()
    with pytest.raises(CorruptedError, match=says):
        await FileBackend(tmp_path / "data").open(read_only=True)
    assert path.read_bytes() == text


async def test_a_missing_log_beside_rows_is_refused_not_started_empty(tmp_path: Path) -> None:
    path = await closed_store(tmp_path / "data")
    path.unlink()
    with pytest.raises(CorruptedError, match="missing"):
        await FileBackend(tmp_path / "data").open()
    shutil.rmtree(path.parent)
    with pytest.raises(CorruptedError, match="missing"):
        await FileBackend(tmp_path / "data").open()
    assert not path.exists()


async def test_damage_to_the_witness_only_costs_its_check(tmp_path: Path) -> None:
    path = await closed_store(tmp_path / "data")
    for text in (b"", b"garbage", bytes(40)):
        (path.parent / "witness").write_bytes(text)
        assert len(await open_and_list(tmp_path / "data")) == 2


def test_a_snapshot_gives_back_rows_heads_and_writers() -> None:
    found = log.Replay()
    scope = found.state.scope("main")
    for number in range(1, 40):
        op = Op(f'w"{number % 7}', number)
        changes = {key(number % 11): None if number % 4 == 0 else Record(payload(number), number, op)}
        scope.apply(number, op.writer, WriterOp(op.n, number), changes)
    again = log.replay(log.frame(9, log.snapshot_body(found.state, [key(77)])))
    assert again.state.scopes["main"].rows == scope.rows
    assert again.state.scopes["main"].writers == scope.writers
    assert again.state.scopes["main"].number == 39
    assert again.gone == {key(77)}
    assert again.number == 9
    assert again.sealed


def test_only_the_writers_that_wrote_last_are_remembered() -> None:
    scope = log.Replay().state.scope("main")
    for number in range(1, MAX_WRITERS + 3):
        scope.apply(number, f"w{number % (MAX_WRITERS + 1)}", WriterOp(1, number), {})
    assert len(scope.writers) == MAX_WRITERS
    assert "w2" not in scope.writers
    assert scope.writers["w1"].number == MAX_WRITERS + 2


@pytest.mark.parametrize("path", sorted(FORMATS.glob("*.log")), ids=lambda path: path.stem)
def test_every_log_that_was_ever_written_can_be_read(path: Path) -> None:
    found = log.replay(path.read_bytes())
    scope = found.state.scopes["main"]
    assert scope.number == 12
    assert scope.rows[key(3)] == Record(payload(3), 4, Op("w3", 1))
    assert key(1) not in scope.rows
    assert scope.rows[key(8)].payload == b'{"multi":\n"line"}'
    assert scope.writers["w3"] == WriterOp(1, 4)
    assert found.state.scopes["main.ledger"].number == 1
    assert key(1) in found.gone


async def test_foreign_files_are_reported_and_left_alone(tmp_path: Path) -> None:
    path = await closed_store(tmp_path / "data")
    (tmp_path / "data" / "notes.txt").write_text("mine")
    (path.parent / "other").write_text("mine")
    (path.parent / "commit.log.tmp").write_text("leftover")
    backend = FileBackend(tmp_path / "data")
    found = await backend.open()
    await backend.close()
    assert len([w for w in found.warnings if "not Holdfast's" in w]) == 2
    assert (tmp_path / "data" / "notes.txt").read_text() == "mine"
    assert (path.parent / "other").read_text() == "mine"
    assert not (path.parent / "commit.log.tmp").exists()
