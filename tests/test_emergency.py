"""The emergency journal: positions are closed while the store is away, and nothing is lost or repeated afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest
from emergency_kit import (
    CONTEXT,
    TARGET,
    How,
    Place,
    closed_by_hand,
    ends_as_if_nothing_had_happened,
    forbidden,
    kept_exit,
    kills,
    opened,
    policy_of,
    settled,
    stored,
    untroubled,
)
from fakes import candle, memory_store, minute_ms, session_of, sound, stepped

from holdfast.contract import Key
from holdfast.domains import context_key, ledger_key, order_key
from holdfast.engine.blocks import Blocks, FileSpace
from holdfast.engine.emergency import Emergency
from holdfast.engine.health import Health
from holdfast.engine.modes import Mode
from holdfast.errors import CorruptedError, FailedError, HeldError, InvalidInputError, UnavailableError
from holdfast.rows import Guard, Order

AWAY: list[How] = ["refuses", "full", "gone", "silent", "answer lost", "request lost"]
FREE = [lambda payload: None]


@pytest.mark.parametrize("how", AWAY)
@pytest.mark.parametrize("risk", [None, FREE], ids=["no profile", "profile"])
async def test_a_position_is_closed_while_the_store_is_away_and_stored_once_when_it_is_back(
    tmp_path: Path, how: How, risk: Any
) -> None:
    place = Place(tmp_path, patience_seconds=0.2 if how in ("silent", "answer lost", "request lost") else 5.0)
    process = await opened(place, flushed=False, risk=risk)
    session = process.session
    process.backend.go(how)
    async with asyncio.timeout(30):
        told = await stepped(session, TARGET)
    assert [(event.kind, event.number, event.candle_ms) for event in told] == [("closed", 2, minute_ms(1))]
    assert session.state.signal is None
    assert session.unsaved == 1
    assert await stepped(session, candle(2, 43000), entries=False) == []
    process.backend.go("")
    await settled(process)
    assert session.unsaved == 0
    await session.close()
    assert [event.number for event in place.told] == [1, 2], "nobody is told twice"
    assert [trouble.kind for trouble in process.trouble] == ["emergency"]
    await sound(process.store)
    assert await stored(process.store) == await untroubled(tmp_path, candle(0, 43000), TARGET, risk=risk)


async def test_levels_on_the_way_to_an_exit_are_kept_in_their_order(tmp_path: Path) -> None:
    way = [candle(0, 43000), candle(1, 43200), candle(2, 43450), candle(3, 43900, high=44000)]
    place = Place(tmp_path)
    process = await place.process()
    session = await process.start()
    await stepped(session, way[0])
    process.backend.go("gone")
    told = await stepped(session, *way[1:])
    assert [event.number for event in told] == list(range(2, 2 + len(told)))
    assert told[-1].kind == "closed"
    assert {event.kind for event in told} == {"partial_profit", "closed"}
    process.backend.go("")
    await settled(process)
    await session.close()
    await sound(process.store)
    assert await stored(process.store) == await untroubled(tmp_path, *way)
    assert [event.number for event in place.told] == [1, *(event.number for event in told)]


async def test_a_store_that_is_slow_at_every_commit_gets_what_was_kept_all_the_same(tmp_path: Path) -> None:
    place = Place(tmp_path, patience_seconds=0.05)
    process = await opened(place)
    session = process.session
    process.backend.delay_seconds = 0.2  # four times as long as an exit waits for it
    (closed,) = await stepped(session, TARGET)
    assert session.unsaved == 1
    for _ in range(100):
        try:
            await session.flush()
        except UnavailableError:
            continue
        break
    assert session.unsaved == 0, "however often nobody waited for its end, the merge came to one"
    assert closed.kind == "closed"
    process.backend.delay_seconds = 0.0
    await settled(process)
    await session.close()
    await sound(process.store)
    assert await stored(process.store) == await untroubled(tmp_path, candle(0, 43000), TARGET)
    assert [event.number for event in place.told] == [1, 2]


async def test_an_entry_is_never_kept(tmp_path: Path) -> None:
    place = Place(tmp_path)
    process = await place.process()
    session = await process.start()
    process.backend.go("refuses")
    assert await stepped(session, candle(0, 43000)) == []
    assert session.state.signal is None
    assert session.unsaved == 0
    process.backend.go("")
    await session.close()
    assert session.unsaved == 0


async def test_a_store_that_counts_as_lost_is_not_waited_for_and_nothing_begins_until_it_was_quick_again(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path)
    process = await place.process(signals=lambda symbol, when: {
        "position": "long", "priceTakeProfit": 44000, "priceStopLoss": 42000, "minuteEstimatedTime": 60,
    })  # fmt: skip
    session = await process.start()
    await stepped(session, candle(0, 43000))
    process.backend.go("full")
    await stepped(session, TARGET)
    assert session.health.mode is Mode.CLOSE_ONLY
    asked = len(process.bot.asked)
    assert await stepped(session, candle(2, 43000), candle(3, 43000)) == []
    assert len(process.bot.asked) == asked
    process.backend.go("")
    await settled(process)
    told: list[Any] = []
    minute = 4
    while not told:
        told += await stepped(session, candle(minute, 43000))
        await session.flush()
        minute += 1
    assert told[0].kind == "opened"
    assert [change.after for change in process.modes] == ["CLOSE_ONLY", "NORMAL"]
    await session.close()
    first, last = (await forbidden(process.store))[-1]
    assert first == 2
    assert last == minute - 2
    await sound(process.store)


async def test_without_a_journal_or_without_room_nothing_is_sent_and_the_exit_waits(tmp_path: Path) -> None:
    for values in ({"emergency": None}, {"emergency_bytes": 64 * 1024}):
        place = Place(tmp_path, **values)
        process = await opened(place, flushed=False)
        session = process.session
        if place.policy.emergency is not None:
            emergency = process.health.emergency
            assert emergency._blocks is not None
            emergency._blocks.append(b"x" * (emergency._blocks.room_bytes() - 1000))
        process.backend.go("full")
        assert await stepped(session, TARGET) == []
        assert session.health.mode is Mode.HALT
        assert session.is_behind
        process.backend.go("")
        (closed,) = await stepped(session, candle(2, 43000))
        assert (closed.kind, closed.candle_ms) == ("closed", minute_ms(1))
        await session.close()
        await sound(process.store)


# ---------------------------------------------------------------------- killed


@pytest.mark.parametrize("how", ["gone", "answer lost"])
async def test_killed_at_any_step_of_keeping_and_merging_the_next_start_ends_as_if_nothing_had_happened(
    tmp_path: Path, how: How, record_property: Any
) -> None:
    expected = await untroubled(tmp_path, candle(0, 43000), TARGET)

    async def run(place: Place, step: int, dies_after: int) -> bool:
        process = await place.process()
        await process.start()
        process.by_hand()
        await stepped(process.session, candle(0, 43000))
        return await closed_by_hand(process, how, step, dies_after)

    count = 0
    async for place, what in kills(tmp_path, run, patience_seconds=0.2 if how == "answer lost" else 5.0):
        count += 1
        place.policy = policy_of(place.path)
        await ends_as_if_nothing_had_happened(place, expected, what)
    record_property("proof:emergency", {"kills while keeping and merging": count})
    assert count > 5


async def test_an_exit_that_was_kept_outlives_the_process_though_the_candle_that_caused_it_never_comes_again(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path)
    first, _ = await kept_exit(place)
    first.die()
    second = await place.process()
    session = await second.start()
    assert session.state.signal is None
    assert session.state.last_candle_ms == minute_ms(1)
    (closed,) = await session.deliver()
    assert closed.id == place.told[1].id
    loaded = await second.store.get(ledger_key(CONTEXT, closed.signal.id))
    assert loaded is not None
    await session.close()
    await sound(second.store)


async def test_what_another_owner_has_gone_on_from_is_left_out(tmp_path: Path) -> None:
    place = Place(tmp_path)
    first, _ = await kept_exit(place)
    first.die()
    # Meanwhile another machine, which cannot see the journal, saw other candles: it closed a minute later.
    other = await session_of(first.bot, await memory_store(place.memory), holder="other")
    (closed,) = await stepped(other, candle(1, 43000), candle(2, 43000, low=42000))
    await other.close()
    second = await place.process()
    session = await second.start()
    assert session.unsaved == 0
    assert await session.deliver() == []
    await session.close()
    assert [trouble.kind for trouble in second.trouble] == ["emergency"]
    assert "another owner" in second.trouble[0].why
    await sound(second.store)
    assert closed.id == place.told[1].id, "a consumer that drops repeats by their id acts once"
    third = await place.process()
    session = await third.start()
    await session.close()
    assert third.trouble == []


@pytest.mark.parametrize(
    ("kept", "known", "wins"),
    [
        (("filled", 1, 2.0), None, "kept"),
        (("filled", 1, 2.0), ("sent", 1, 0.0), "kept"),
        (("partial", 1, 1.0), ("filled", 1, 2.0), "known"),
        (("unknown", 1, 0.0), ("cancelled", 1, 0.0), "known"),
        (("expired", 1, 0.0), ("filled", 1, 2.0), "known"),
        (("filled", 1, 2.0), ("open", 2, 0.0), "known"),
    ],
)
async def test_an_order_with_which_another_owner_went_on_does_not_fall_back_to_what_is_kept(
    tmp_path: Path, kept: Any, known: Any, wins: str
) -> None:
    """Two that make the same exit write the same session row: what follows it is still to be told apart."""
    place = Place(tmp_path)
    first, _ = await kept_exit(place)
    key, mine = order_key(CONTEXT, "hx"), _order(*kept)
    await first.health.emergency.keep(CONTEXT, first.session.writer.lifeline.kept[-1].after, {key: mine}, epoch=1)
    first.die()
    other = await session_of(first.bot, await memory_store(place.memory), holder="other")
    await stepped(other, TARGET)
    if known is not None:
        await other.note({key: _order(*known)})
    await other.close()
    second = await place.process()
    session = await second.start()
    assert session.unsaved == 0
    await session.close()
    loaded = await second.store.get(key)
    assert loaded is not None
    assert loaded.row == (mine if wins == "kept" else _order(*known))


def _order(state: Any, epoch: int, filled: float) -> Order:
    return Order(
        client_order_id="hx", context=("binance", "BTCUSDT", "my-strategy"), signal_id="s", action="close",
        side="sell", quantity=2.0, state=state, filled_quantity=filled, epoch=epoch, intended_at_ms=minute_ms(1),
        expires_at_ms=minute_ms(2),
    )  # fmt: skip


async def test_what_is_kept_of_another_store_stays_where_it_is(tmp_path: Path) -> None:
    place = Place(tmp_path)
    first, _ = await kept_exit(place, flushed=False)
    first.die()

    store = await memory_store()
    object.__setattr__(store, "scope", "elsewhere")
    health = Health(store, policy_of(place.path))
    await health.emergency.open()
    assert health.emergency.kept(CONTEXT) == []
    await health.emergency.keep(CONTEXT, None, {context_key("signal", CONTEXT): None}, epoch=1)
    await health.emergency.done(CONTEXT, 2)
    await health.emergency.close()

    second = await place.process()
    assert (await second.start()).state.signal is None
    await second.session.close()


# ---------------------------------------------------------------------- the file


def recorded(path: Path, size: int = 65536) -> Blocks:
    space = FileSpace(str(path))
    try:
        return Blocks(space, str(path), size)
    except BaseException:
        space.close()
        raise


class Images:
    """A journal file in memory that keeps what a power cut may leave before each call."""

    def __init__(self) -> None:
        self.durable, self.volatile = bytearray(), bytearray()
        self.images: list[tuple[int, bytes]] = []
        """How many records had been acknowledged, and the bytes."""
        self.acknowledged = 0

    def read(self) -> bytes:
        return bytes(self.volatile)

    def write(self, at: int, data: bytes) -> None:
        old = bytes(self.volatile)
        self.volatile[at : at + len(data)] = data
        if len(old) >= 65536:
            for cut in range(0, len(data) + 1, 8):
                torn = bytearray(self.durable)
                torn[at : at + cut] = data[:cut]
                self.images.append((self.acknowledged, bytes(torn)))
            torn = bytearray(self.durable)  # the parts come in any order
            torn[at + len(data) // 2 : at + len(data)] = data[len(data) // 2 :]
            self.images.append((self.acknowledged, bytes(torn)))

    def sync(self) -> None:
        self.durable[:] = self.volatile

    def cut(self, size_bytes: int) -> None:
        del self.volatile[size_bytes:]

    def close(self) -> None:
        pass


class Image:
    """A journal file as a cut left it."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    def read(self) -> bytes:
        return bytes(self.data)

    def write(self, at: int, data: bytes) -> None:
        self.data[at : at + len(data)] = data

    def sync(self) -> None:
        pass

    def cut(self, size_bytes: int) -> None:
        del self.data[size_bytes:]

    def close(self) -> None:
        pass


def test_whatever_a_power_cut_leaves_the_journal_opens_with_every_record_that_was_acknowledged(
    record_property: Any,
) -> None:
    disk = Images()
    blocks = Blocks(disk, "images", 65536)
    for generation in range(3):
        for number in range(1, 5):
            blocks.append(f"{generation} {number} ".encode() * (number * 11))
            disk.acknowledged = number
        sizes = len(disk.images)
        blocks.forget_all()
        # Forgetting is a wish: a cut in the middle of it leaves all of them, or none.
        disk.images[sizes:] = [(-4, data) for _, data in disk.images[sizes:]]
        disk.acknowledged = 0
    for acknowledged, data in disk.images:
        found = [entry.number for entry in Blocks(Image(data), "image", 65536).entries]
        if acknowledged < 0:
            assert found in ([], [1, 2, 3, 4])
        else:
            assert found in ([*range(1, acknowledged + 1)], [*range(1, acknowledged + 2)])
    record_property("proof:emergency", {"images of the journal file after a power cut": len(disk.images)})


def test_a_record_damaged_before_a_good_one_is_no_end_of_the_journal_but_damage(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    blocks = recorded(path)
    for text in (b"one", b"two", b"three"):
        blocks.append(text)
    blocks.close()
    whole = path.read_bytes()
    at = whole.index(b"two")
    path.write_bytes(whole[:at] + b"t" + b"\xff" + whole[at + 2 :])
    with pytest.raises(CorruptedError, match="record 3"):
        recorded(path)
    at = whole.index(b"three")
    path.write_bytes(whole[:at] + b"T" + whole[at + 1 :])
    blocks = recorded(path)
    assert [entry.text for entry in blocks.entries] == [b"one", b"two"]
    blocks.close()


def test_the_file_has_its_blocks_before_anything_is_written_to_it(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    blocks = recorded(path, 128 * 1024)
    before = path.stat()
    assert before.st_blocks * 512 >= 128 * 1024
    while blocks.room_bytes() > 3000:
        blocks.append(b"x" * 2000)
    after = path.stat()
    assert (after.st_size, after.st_blocks) == (before.st_size, before.st_blocks)
    assert path.stat().st_mode & 0o777 == 0o600
    blocks.close()


def test_a_journal_that_was_cut_shorter_is_refused_and_one_that_cannot_grow_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    blocks = recorded(path)
    blocks.append(b"one")
    blocks.close()
    whole = path.read_bytes()

    class Full(FileSpace):
        def write(self, at: int, data: bytes) -> None:
            if at + len(data) > 3 * len(whole):
                raise OSError(28, "No space left on device")
            super().write(at, data)

    blocks = Blocks(Full(str(path)), "journal", 512 * 1024)
    assert [entry.text for entry in blocks.entries] == [b"one"]
    assert path.stat().st_size == len(whole), "the last room of a disk is not the journal's to take"
    blocks.append(b"two")
    blocks.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:8300])  # of its second record, all is gone
    with pytest.raises(CorruptedError, match="cut from 65536 to 8300 bytes"):
        recorded(path)
    assert path.read_bytes() == whole[:8300], "it is left as it is"


async def test_a_new_journal_that_finds_no_room_does_not_keep_a_bot_from_watching_its_position(tmp_path: Path) -> None:
    class Full(FileSpace):
        def write(self, at: int, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    place = Place(tmp_path)
    process = await place.process()
    process.health.emergency = Emergency(process.store, place.policy, open_space=Full)
    session = await process.start()
    assert [event.kind for event in await stepped(session, candle(0, 43000), TARGET)] == ["opened", "closed"]
    await session.close()
    assert [trouble.kind for trouble in process.trouble] == ["emergency"]
    assert "no emergency journal until the next start" in process.trouble[0].why
    second = await place.process()
    await second.start()
    assert second.health.emergency.has_room
    await second.session.close()


@pytest.mark.parametrize(
    "text", [b"{}", b"[1]", b"no json", b'{"store":"memory main","context":[],"base":null}', b'{"store":"memory main"}']
)
async def test_a_record_of_another_version_is_refused_and_left_alone(tmp_path: Path, text: bytes) -> None:
    place = Place(tmp_path)
    blocks = recorded(place.path)
    blocks.append(text)
    blocks.close()
    before = place.path.read_bytes()
    process = await place.process()
    with pytest.raises(CorruptedError, match="start the version that wrote it"):
        await process.start()
    assert place.path.read_bytes() == before
    recorded(place.path).close()  # nothing holds it


async def test_a_journal_copied_from_another_bot_changes_nothing_here(tmp_path: Path) -> None:
    theirs, ours = Place(tmp_path), Place(tmp_path)
    ours.path, ours.policy = tmp_path / "copy", policy_of(tmp_path / "copy")
    first, _ = await kept_exit(theirs)
    first.die()
    mine = await ours.process(signals={3: _PROPOSAL})
    session = await mine.start()
    await stepped(session, *(candle(minute, 43000) for minute in range(4)))
    await session.close()
    before = await stored(mine.store)
    ours.path.write_bytes(theirs.path.read_bytes())  # the same context, the same name of the store, another history
    mine = await ours.process(signals={})
    session = await mine.start()
    assert session.state.signal is not None
    assert session.unsaved == 0
    await session.close()
    assert await stored(mine.store) == before
    assert [trouble.kind for trouble in mine.trouble] == ["emergency"]


_PROPOSAL = {"position": "long", "priceTakeProfit": 44000, "priceStopLoss": 42000, "minuteEstimatedTime": 60}


async def test_a_store_that_is_full_every_other_minute_is_soon_trusted_no_more_and_gets_each_exit_once(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path)
    process = await place.process(signals=lambda symbol, when: _PROPOSAL)
    session = await process.start()
    process.be_patient()
    told = []
    for minute in range(60):
        process.backend.go("full" if minute % 2 else "")
        told += await stepped(session, candle(minute, 43000, high=44000 if minute % 2 else 43000))
        with contextlib.suppress(UnavailableError):
            await session.flush()
    assert [event.kind for event in told] == ["opened", "closed"] * (len(told) // 2)
    trusted = [change.after for change in process.modes].count("NORMAL")
    assert 1 <= trusted <= 3, "each time it takes twice as many quick commits in a row"
    assert len(told) <= 2 * (trusted + 1)
    process.backend.go("")
    await settled(process)
    await session.close()
    await sound(process.store)
    assert [event.number for event in place.told] == list(range(1, len(told) + 1))


def test_a_path_that_cannot_be_a_journal_is_refused_and_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("mine\n" * 3000)
    with pytest.raises(InvalidInputError, match="no emergency journal"):
        recorded(other)
    assert other.read_text() == "mine\n" * 3000
    for path in (tmp_path / "missing" / "journal", tmp_path):
        with pytest.raises(InvalidInputError, match="name a file"):
            recorded(path)
    blocks = recorded(tmp_path / "journal")
    with pytest.raises(HeldError, match="name one for each"):
        recorded(tmp_path / "journal")
    blocks.close()


def test_a_journal_that_cannot_be_written_takes_nothing_more(tmp_path: Path) -> None:
    class Broken(FileSpace):
        def sync(self) -> None:
            raise OSError(5, "Input/output error")

    path = tmp_path / "journal"
    recorded(path).close()
    blocks = Blocks(Broken(str(path)), "journal", 65536)
    with pytest.raises(FailedError, match="Input/output"):
        blocks.append(b"one")
    assert blocks.room_bytes() == 0
    with pytest.raises(UnavailableError):
        blocks.append(b"two")
    blocks.close()


async def test_guard_rows_are_rewritten_at_the_merge_from_what_they_are_then(tmp_path: Path) -> None:
    place = Place(tmp_path)
    process = await opened(place, flushed=False, risk=FREE)
    process.backend.go("gone")
    await stepped(process.session, TARGET)
    process.backend.go("")
    guard = Key("guard", "limit", "guard")
    await process.store.writer("another process").commit({guard: Guard(changes=41)})
    await settled(process)
    loaded = await process.store.get(guard)
    assert loaded is not None
    assert loaded.row == Guard(changes=42)
    await process.session.close()
    await sound(process.store)


async def test_an_exit_that_was_kept_and_told_stands_though_the_profiles_were_changed_before_the_restart(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path)
    first, closed = await kept_exit(place, flushed=False)
    first.die()

    second = await place.process(signals={}, risk=[])
    session = await second.start()

    assert session.state.signal is None
    again = await session.deliver()
    assert [(event.id, event.price_close) for event in again if event.kind == "closed"] == [(closed.id, 44000)]
    await session.close()
