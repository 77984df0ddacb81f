"""Torture: kill a live run again and again, and compare it with one that was never killed.

One round is a market of its own that waits for the bot, a run that nobody touches, and a run over the same
candles that is killed at random instants and at numbered steps, until the market ends. After each kill the store
is opened read-only: every invariant must hold, and every commit that was acknowledged must be there. Where a hook
kills the server too, the bot must go on by itself when it is back.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import msgspec

from ..errors import InvalidInputError
from .plan import FIRST_STEPS, PHASE_STEPS, PHASES, Plan, Round, numbered_steps
from .round import OneRound
from .zygote import Zygote

__all__ = ["FIRST_STEPS", "PHASES", "PHASE_STEPS", "Plan", "Round", "numbered_steps", "torture"]

KILLS_PER_ROUND = 100
_KILLS_PER_REPLACEMENT = 2
MOST_IDLE_ROUNDS = 5
"""Rounds in a row whose market ended before anything was killed."""


def torture(
    plan: Plan,
    progress: Callable[[Round, int], None] = lambda so_far, kills: None,
    *,
    server: Callable[[], None] | None = None,
) -> Round:
    """Run rounds until the plan's kills are done; rounds that the work directory has results of count.

    Args:
        plan: What to do.
        progress: Told after each kill: what is known so far, and how many kills there will be.
        server: Ends the store's server with SIGKILL, starts it again and returns when it answers; called while
            the bot serves, ``plan.server_kills`` times.

    Returns:
        All rounds added up; ``ok`` is False on any loss.

    Raises:
        InvalidInputError: The plan wants kills of a server and there is no hook, or names a store that cannot be used.
    """
    if plan.server_kills and (server is None or plan.expected is None):
        raise InvalidInputError(
            f"server_kills is {plan.server_kills}: that needs a hook, and what is expected after it"
        )
    began = time.monotonic()
    work = Path(plan.work)
    work.mkdir(parents=True, exist_ok=True)
    results = work / "rounds.jsonl"
    total, number = _results_of(results, plan.seed)
    steps = numbered_steps(orders=plan.orders) if plan.steps else []
    wanted = plan.kills + len(steps)
    word = _own_word(work)
    idle = 0
    unfinished: list[OneRound] = []
    with ExitStack() as stack:
        stack.callback(lambda: [one.remove() for one in unfinished])  # of a round that was interrupted
        zygote = stack.enter_context(Zygote())
        while (todo := [step for step in steps if step not in total.steps]) or _is_short_of(plan, total, wanted):
            if plan.time_cap_seconds and time.monotonic() - began > plan.time_cap_seconds:
                break
            place = work / f"round-{number}"
            one = OneRound(plan, plan.seed * 1000 + number, zygote, place, f"{word}_{number}", server)
            unfinished, one.before = [one], total
            kills, server_kills = _kills_of_round(plan, total, wanted, todo)
            found = one.run(kills, server_kills, todo[:KILLS_PER_ROUND], partial(_tell, progress, total, wanted))
            unfinished = []
            if found.ok:
                found.kept = one.remove()
                shutil.rmtree(place)
            else:
                found.kept = one.names()
            with results.open("ab") as file:
                file.write(msgspec.json.encode(found) + b"\n")
            total += found
            number += 1
            idle = 0 if found.kills or found.server_kills or found.pauses else idle + 1
            if not found.ok or idle >= MOST_IDLE_ROUNDS:
                break
    return total


def _results_of(file: Path, seed: int) -> tuple[Round, int]:
    """Return the rounds that a file has results of, added up, and how many they are."""
    total, lines = Round(seed=seed), file.read_bytes().splitlines() if file.exists() else []
    for line in lines:
        total += msgspec.json.decode(line, type=Round)
    return total, len(lines)


def _is_short_of(plan: Plan, total: Round, wanted: int) -> bool:
    """Whether something that is counted is still to be done."""
    return (
        total.kills < wanted
        or total.server_kills < plan.server_kills
        or total.takeovers < plan.takeovers
        or total.pauses < plan.pauses
    )


def _kills_of_round(plan: Plan, total: Round, wanted: int, todo: Sequence[str]) -> tuple[int, int]:
    """Return how many kills the next round is to have, of the bot and of its server."""
    left = wanted - total.kills
    servers_left = max(0, plan.server_kills - total.server_kills)
    share = -(-servers_left * KILLS_PER_ROUND // max(left, KILLS_PER_ROUND))
    # A process is replaced in the place of a kill: a round of none would replace none, and be idle.
    replacements = max(0, plan.takeovers - total.takeovers) + max(0, plan.pauses - total.pauses)
    kills = max(left, len(todo), _KILLS_PER_REPLACEMENT * replacements)
    return min(KILLS_PER_ROUND, kills), min(servers_left, max(1, share))


def _tell(progress: Callable[[Round, int], None], before: Round, wanted: int, round_: Round) -> None:
    shown = Round()
    shown += before
    shown += round_
    progress(shown, wanted)


def _own_word(work: Path) -> str:
    """Return the name of this torture's places, the same when it is resumed: then what was left is found again."""
    file = work / "places"
    if not file.exists():
        file.write_text(f"torture{secrets.token_hex(4)}")
    return file.read_text()
