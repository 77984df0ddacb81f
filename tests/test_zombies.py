"""An owner that is paused past its lease, replaced and woken writes and sends nothing, on every shared store.

It is paused anywhere, right after the intent of an order was committed, and right before the order is sent.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import fleet_bot
import pytest
from backend_list import URLS
from order_witness import Witness
from owner_records import Records
from zombies import Zombies

from holdfast.brokers.paper_wire import Heard
from holdfast.engine.broker import OrderReport, OrderRequest

RUNS = 5
LEASE_SECONDS = 0.8
SHARED = sorted(URLS.keys() - {"memory", "file"})
LASTING = {"redis"}
"""Orders there outlast the lease, at a venue that takes an id twice: the lease alone keeps a late order back."""


@pytest.mark.parametrize("name", SHARED)
def test_a_paused_owner_that_was_replaced_wakes_to_find_every_write_refused_and_the_new_owner_named(
    name: str, tmp_path: Path, record_property: Any
) -> None:
    lasting: Any = {"valid_seconds": 2.0, "repeated": "never"} if name in LASTING else {}
    zombies = Zombies(URLS[name](tmp_path), tmp_path, lease_seconds=LEASE_SECONDS, seed=len(name), **lasting)
    found = zombies.run(RUNS)
    assert found.wrong == []
    assert found.runs == RUNS
    assert found.commits > 3 * RUNS, "they worked between"
    assert found.orders > RUNS
    assert found.stopped_before_sending > 0
    assert found.late_orders_refused > 0 or lasting, "each of those reached the venue in the time of the next owner"
    record_property(
        "proof:zombies",
        {
            "owners paused past their lease": found.runs,
            "contexts that their old owner left with an error that names the new one": found.late_writes_refused,
            "commits": found.commits,
            "late writes accepted": 0,
            "orders taken": found.orders,
            "late orders refused by the venue": found.late_orders_refused,
            "orders sent after the first refused commit": 0,
        },
    )


def two_machines(*, is_namespace: bool) -> list[fleet_bot.Home]:
    """Return two whose boot clocks are 26 hours apart, and whose wall clocks 12."""
    return [
        fleet_bot.Home(host="one", boot_seconds=26 * 3600, wall_seconds=-7 * 3600, is_namespace=is_namespace),
        fleet_bot.Home(host="two", boot_seconds=0, wall_seconds=5 * 3600, is_namespace=is_namespace),
    ]


def may_unshare() -> bool:
    """Whether the kernel lets this user keep a name and a boot clock of its own."""
    command = [*two_machines(is_namespace=True)[0].command(), "true"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("is_namespace", [False, True], ids=["told", "namespaces"])
def test_machines_whose_clocks_are_hours_apart_replace_each_other_all_the_same(
    is_namespace: bool, tmp_path: Path
) -> None:
    """With namespaces name and boot clock are the kernel's own; the wall clock, else all of them, are told a lie."""
    if is_namespace and not may_unshare():
        pytest.skip("this user may not make namespaces")
    homes = two_machines(is_namespace=is_namespace)
    zombies = Zombies(URLS["sqlite"](tmp_path), tmp_path, lease_seconds=LEASE_SECONDS, seed=3, homes=homes)
    found = zombies.run(2)
    assert found.wrong == []
    assert found.runs == 2, "each of them replaced the other"
    assert found.longest_takeover_leases < 8
    one, two = sorted(zombies.records.homes.values(), key=lambda home: home["host"])
    assert (one["host"], two["host"]) == ("one", "two")
    assert one["machine"] != two["machine"]
    assert one["boot"] - two["boot"] > 25 * 3600
    assert two["wall_ms"] - one["wall_ms"] > 11 * 3600_000
    owners = {line["error"].partition(" on ")[2].partition(" ")[0] for line in zombies.records.fenced}
    assert owners <= {"one", "two"}
    assert owners


def records(place: Path, **lines: list[dict[str, Any]]) -> Records:
    for pid, those in lines.items():
        text = "".join(json.dumps({"t": float(at), **line}) + "\n" for at, line in enumerate(those))
        (place / f"{pid[1:]}.jsonl").write_text(text)
    return Records(place)


def commit(n: int, *, epoch: int = 0, released: bool = False, events: tuple[int, ...] = ()) -> dict[str, Any]:
    owner = {"epoch": epoch, "released": released} if epoch else None
    return {"kind": "commit", "n": n, "context": "A_swift_shared", "owner": owner, "events": events, "slots": {}}


def told(number: int) -> dict[str, Any]:
    return {"kind": "told", "event": f"shared/A/swift#{number}", "number": number}


def test_records_of_one_owner_after_the_other_are_sound(tmp_path: Path) -> None:
    found = records(
        tmp_path,
        p1=[commit(1, epoch=1), commit(2, events=(1,)), told(1), commit(7, epoch=3)],
        p2=[commit(3, epoch=2), told(1), commit(4, events=(2,)), told(2), commit(5, epoch=2, released=True)],
    )
    assert found.wrong() == []


def test_a_late_write_in_the_records_is_found(tmp_path: Path) -> None:
    found = records(tmp_path, p1=[commit(1, epoch=1), commit(5)], p2=[commit(3, epoch=2), commit(4)])
    assert found.wrong() == ["A_swift_shared: commit 5 of epoch 1 (process 1) was accepted in 2"]


def test_one_epoch_of_two_processes_in_the_records_is_found(tmp_path: Path) -> None:
    found = records(tmp_path, p1=[commit(1, epoch=1)], p2=[commit(3, epoch=1)])
    assert found.wrong() == ["A_swift_shared: epoch 1 belongs to the processes 1 and 2 (commit 3)"]


def test_an_event_that_the_old_owner_tells_though_the_new_one_wrote_it_is_found(tmp_path: Path) -> None:
    found = records(tmp_path, p1=[commit(1, epoch=1), told(1)], p2=[commit(3, epoch=2), commit(4, events=(1,))])
    assert found.wrong() == ["A_swift_shared: process 1 (epoch 1) told event 1 of epoch 2"]


# ---------------------------------------------------------------------- the witness


def sending(order: str, *, held_at: float | None = None) -> dict[str, Any]:
    return {"kind": "sending", "symbol": "A", "order": order, "held_at": held_at}


IDLE = {"kind": "idle"}
REFUSED = {"kind": "refused", "context": "shared/A/swift"}


def heard(at: float, pid: int, order: str, state: Any = "filled", side: Any = "buy", *, at_ms: int = 500) -> Heard:
    request = OrderRequest(symbol="A", client_order_id=order, side=side, quantity=1.0, expires_at_ms=1000)
    filled = 1.0 if state == "filled" else 0.0
    report = OrderReport(client_order_id=order, symbol="A", state=state, filled_quantity=filled)
    return Heard(at_seconds=at, at_ms=at_ms, sender=pid, account="", request=request, report=report)


def contradictions(found: Records, *told: Heard) -> list[str]:
    return Witness(found, told, {"A": "A_swift_shared"}, 1.0).wrong()


def test_orders_of_one_owner_after_the_other_are_sound(tmp_path: Path) -> None:
    found = records(
        tmp_path,
        p1=[commit(1, epoch=1), sending("one"), commit(2), sending("two"), IDLE, commit(6, epoch=3), sending("three")],
        p2=[IDLE, IDLE, IDLE, IDLE, commit(3, epoch=2)],
    )
    told = [heard(1.5, 1, "one"), heard(3.5, 1, "two", side="sell"), heard(6.5, 1, "three")]
    assert contradictions(found, *told) == []


def test_an_order_that_is_sent_after_a_refused_commit_is_found(tmp_path: Path) -> None:
    found = records(tmp_path, p1=[commit(1, epoch=1), REFUSED, sending("one")])
    assert contradictions(found, heard(2.5, 1, "one", "expired")) == [
        "A_swift_shared: process 1 sent order one after it was told that it no longer owns the context"
    ]


def test_an_order_that_is_sent_in_the_time_of_a_later_owner_is_found(tmp_path: Path) -> None:
    found = records(tmp_path, p1=[commit(1, epoch=1), commit(2), sending("one")], p2=[IDLE, commit(4, epoch=2)])
    assert contradictions(found, heard(2.5, 1, "one", "expired")) == [
        "A_swift_shared: process 1 decided on order one of epoch 1 in the time of a later owner"
    ]


def test_an_order_on_which_was_decided_under_the_lease_is_on_its_way_however_long_its_process_is_held_up(
    tmp_path: Path,
) -> None:
    found = records(
        tmp_path, p1=[commit(1, epoch=1), commit(2), sending("one", held_at=0.5)], p2=[IDLE, commit(4, epoch=2)]
    )
    assert contradictions(found, heard(2.5, 1, "one", "expired")) == []


def test_an_order_that_was_on_its_way_is_refused_or_comes_before_those_of_the_later_owner(tmp_path: Path) -> None:
    found = records(
        tmp_path, p1=[commit(1, epoch=1), sending("one")],
        p2=[IDLE, IDLE, commit(5, epoch=2), commit(6), sending("two")],
    )  # fmt: skip
    late = Witness(found, [heard(2.5, 1, "one", "expired")], {"A": "A_swift_shared"}, 1.0)
    assert (late.wrong(), late.late_refused, late.accepted) == ([], 1, 0)
    assert contradictions(found, heard(2.5, 1, "one"), heard(4.5, 2, "two", side="sell")) == []
    assert contradictions(found, heard(2.5, 1, "one", at_ms=1000)) == [
        "A_swift_shared: order one of epoch 1 was accepted after its expiry"
    ]
    assert contradictions(found, heard(4.2, 2, "two"), heard(4.5, 1, "one", side="sell")) == [
        "A_swift_shared: order one of epoch 1 was accepted after an order of the owner that came later"
    ]


def test_an_order_that_is_there_twice_or_that_nobody_put_on_record_is_found(tmp_path: Path) -> None:
    found = records(tmp_path, p1=[commit(1, epoch=1), sending("one")])
    assert contradictions(found, heard(1.5, 1, "one"), heard(1.6, 1, "one"), heard(1.7, 2, "two", "rejected")) == [
        "A_swift_shared: order two of process 2 reached the venue; no record says that it was sent",
        "order one was accepted twice",
        "A: 2.0 is held after one",
    ]
