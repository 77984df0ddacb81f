"""An owner that is paused past its lease, replaced and woken writes nothing, on every store that processes share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from backend_list import URLS
from owner_records import Records
from zombies import Zombies

RUNS = 5
LEASE_SECONDS = 0.8
SHARED = sorted(URLS.keys() - {"memory", "file"})


@pytest.mark.parametrize("name", SHARED)
def test_a_paused_owner_that_was_replaced_wakes_to_find_every_write_refused_and_the_new_owner_named(
    name: str, tmp_path: Path, record_property: Any
) -> None:
    found = Zombies(URLS[name](tmp_path), tmp_path, lease_seconds=LEASE_SECONDS, seed=len(name)).run(RUNS)
    assert found.wrong == []
    assert found.runs == RUNS
    assert found.commits > 3 * RUNS, "they worked between"
    record_property(
        "proof:zombies",
        {
            "owners paused past their lease": found.runs,
            "contexts that their old owner left with an error that names the new one": found.late_writes_refused,
            "commits": found.commits,
            "late writes accepted": 0,
        },
    )


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
