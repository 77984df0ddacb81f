"""``holdfast show --audit``: what operators did by hand, and the recovery plans with what was decided about each."""

from __future__ import annotations

from typing import Any, cast

from ..domains import to_mapping
from ..names import Context
from ..rows import Audit, Decision, GapPlan
from ..store import Store
from .tables import moment, print_json, print_table


async def as_json(store: Store) -> dict[str, Any]:
    """Return what is on record as plain values, oldest first."""
    decisions = {key: loaded.row for key, loaded in (await store.scan("decision")).items()}
    plans = []
    for key, loaded in (await store.scan("plan")).items():
        decision = decisions.get(key._replace(domain="decision"))
        plans.append({**to_mapping(loaded.row), "decision": None if decision is None else to_mapping(decision)})
    audits = [to_mapping(loaded.row) for loaded in (await store.scan("audit")).values()]
    return {
        "audit": sorted(audits, key=lambda row: (row["atMs"], row["target"])),
        "plans": sorted(plans, key=lambda row: (row["madeAtMs"], row["context"])),
    }


async def print_audit(store: Store, *, plain: bool) -> None:
    """Print what is on record, oldest first."""
    audits = [cast("Audit", loaded.row) for loaded in (await store.scan("audit")).values()]
    lines = [
        [moment(row.at_ms), row.by, row.action, row.target, row.why or "-", str(len(row.before))]
        for row in sorted(audits, key=lambda row: (row.at_ms, row.target))
    ]
    print_table("By hand", ("at", "by", "what", "target", "why", "rows"), lines, plain=plain)
    decisions = await store.scan("decision")
    told = []
    for key, loaded in (await store.scan("plan")).items():
        row = cast("GapPlan", loaded.row)
        found = decisions.get(key._replace(domain="decision"))
        decision = None if found is None else cast("Decision", found.row)
        told.append(
            [moment(row.made_at_ms), str(Context(*row.context)), row.signal_id, row.verdict,
             f"{moment(row.from_ms)} … {moment(row.until_ms)}", str(len(row.events)),
             "undecided" if decision is None else f"{decision.what} ({decision.by})"]
        )  # fmt: skip
    columns = ("made", "context", "signal", "verdict", "missed", "events", "decided")
    print_table("Recovery plans", columns, sorted(told), plain=plain)


async def show(store: Store, *, json: bool, plain: bool) -> None:
    """Print what is on record."""
    if json:
        print_json(await as_json(store))
    else:
        await print_audit(store, plain=plain)
