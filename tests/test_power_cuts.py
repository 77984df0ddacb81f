"""Power cuts before every file-system call: each image that may be left is opened, and nothing is lost or half."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from power_workloads import BASE, FOCUS, WORKLOADS, make_backend

from holdfast.testing.power import Cuts, PowerReport, power_cuts

Note = Callable[[str, object], None]


def counted(report: PowerReport) -> dict[str, int]:
    return {
        "cuts": report.cuts,
        "images": report.images,
        "distinct": report.distinct,
        "violations": len(report.violations),
    }


@pytest.mark.parametrize("name", WORKLOADS)
async def test_a_power_cut_loses_nothing_acknowledged_and_leaves_nothing_half(name: str, record_property: Note) -> None:
    one = WORKLOADS[name]
    cuts = Cuts(focus=FOCUS, nested=one.nested, most_per_cut=one.most_per_cut)
    report = await power_cuts(one.workload, make_backend, cuts, image=await one.before())
    record_property("proof:power cuts", counted(report))
    assert not report.violations, report
    assert report.distinct >= 20, f"{name}: {report}: too few images to prove anything"


@pytest.mark.parametrize("at", range(4))
async def test_what_was_acted_on_after_a_kill_survives_a_power_cut(at: int, record_property: Note) -> None:
    """Kill, restart, act on what was read, then the power goes: killed before each call of the workload."""
    one = WORKLOADS["overwrite"]
    image = await one.before()
    total = PowerReport(violations=[])
    for kill_at in range(at, 40, 4):
        done = True

        async def killed_then_restarted(ground, kill_at: int = kill_at) -> None:  # type: ignore[no-untyped-def]
            nonlocal done
            from holdfast.errors import HoldfastError

            try:
                await one.steps(await ground.start(kill_at=kill_at))
            except HoldfastError:
                done = False
            await ground.kill()
            backend = await ground.start()
            await one.steps(backend, again=True)
            await ground.kill()

        total += await power_cuts(
            killed_then_restarted, make_backend, Cuts(focus=FOCUS, most_per_cut=64, draws=1), image=image
        )
        if done:
            break
    record_property("proof:power cuts", counted(total))
    assert not total.violations, total


async def test_the_views_are_whole_after_a_close_and_a_cut_or_damage_to_them_changes_nothing() -> None:
    """Views are for people: images in which all of them are gone or garbage give the same rows."""
    from holdfast.testing.medium import Medium
    from holdfast.testing.power import recovered

    image = await WORKLOADS["three domains"].before()
    rows = await recovered(make_backend, image)
    views = [path for path, data in image if data is not None and not path.startswith(f"{BASE}/.holdfast")]
    assert views, "a close leaves views"
    spoiled = tuple((path, b"\0garbage" if path in views else data) for path, data in image)
    missing = tuple((path, data) for path, data in image if path not in views)
    assert Medium(spoiled).now() != Medium(image).now()
    assert await recovered(make_backend, spoiled) == await recovered(make_backend, missing) == rows
    await asyncio.sleep(0)
