"""``python -m holdfast.testing.simulation``: play histories by their seeds; a failing one is shrunk and shown.

Exit code 0: nothing was violated. 1: something was, or the kept results of an earlier call say so. 2: a setting has to
be mended. 130: interrupted.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ...arguments import Parser
from ...errors import InvalidInputError
from .hunt import Hunt
from .plan import Plan, drawn
from .shrink import shrunk
from .world import Outcome, play

OK, VIOLATED, USAGE, INTERRUPTED = 0, 1, 2, 130
_COMMAND = "python -m holdfast.testing.simulation"


class Total(msgspec.Struct, frozen=True, kw_only=True):
    """What a hunt came to."""

    ok: bool
    wanted: int
    played: int
    per_second: float
    """Histories that one core played in a second."""
    commits: int
    events: int
    failed: tuple[int, ...] = ()
    violation: str = ""
    replay: str = ""
    """The command that plays the first one that failed again, step by step."""
    shrunk: Plan | None = None
    kept: str = ""
    """The file that the shrunk plan was written to."""
    replay_shrunk: str = ""


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog="python -m holdfast.testing.simulation",
        description="Play histories of the real engine in simulated time, on a simulated storage and market, with "
        "faults drawn from a seed, and judge each.",
    )
    made.add_argument("--seeds", type=int, default=1000, metavar="N", help="how many histories (default: 1000)")
    made.add_argument("--first", type=int, default=0, metavar="S", help="seed of the first one (default: 0)")
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="on how many processes at once (default: 1)")
    made.add_argument("--resume", metavar="DIR", help="keep results there, and go on where an earlier call stopped")
    made.add_argument(
        "--keep", metavar="DIR", help="write the shrunk plan of a failing seed there (default: that of --resume)"
    )
    made.add_argument("--time-cap", type=float, default=0.0, metavar="SECONDS", help="begin nothing after so long")
    made.add_argument("--all", action="store_true", help="go on after a history that failed; the first is shrunk")
    made.add_argument("--replay", type=int, metavar="SEED", help="play one history and print it step by step")
    made.add_argument(
        "--plan", metavar="FILE", help="with the plan in a file (JSON, as it is printed) instead of a seed"
    )
    made.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    try:
        if options.replay is not None or options.plan:
            return _replay(options)
        return _hunt(options)
    except KeyboardInterrupt:
        print("interrupted; what is done is kept if --resume was given", file=sys.stderr)
        return INTERRUPTED
    except (InvalidInputError, msgspec.DecodeError, OSError) as error:
        print(f"simulation: {error}", file=sys.stderr)
        return USAGE


def _replay(options: argparse.Namespace) -> int:
    kept = Path(options.plan).read_bytes() if options.plan else None
    plan = drawn(options.replay) if kept is None else msgspec.json.decode(kept, type=Plan)
    outcome = play(plan)
    if options.json:
        print(msgspec.json.encode(outcome).decode())
    else:
        print(msgspec.json.encode(plan).decode())
        print("\n".join(outcome.lines))
        print(f"{outcome.commits} commits, {outcome.events} events, {outcome.trace}: {_verdict(outcome)}")
    return OK if outcome.ok else VIOLATED


def _verdict(outcome: Outcome) -> str:
    return "in order" if outcome.ok else f"VIOLATED: {outcome.violations[0]}"


def _hunt(options: argparse.Namespace) -> int:
    began = time.monotonic()
    resume = Path(options.resume) if options.resume else None
    hunt = Hunt(
        options.first, options.seeds, jobs=options.jobs, time_cap_seconds=options.time_cap, resume=resume,
        stops=not options.all,
    )  # fmt: skip
    hunt.run()
    total = Total(
        ok=not hunt.failed, wanted=options.seeds, played=hunt.done, per_second=round(hunt.per_second, 1),
        commits=sum(one.commits for one in hunt.chunks), events=sum(one.events for one in hunt.chunks),
        failed=tuple(hunt.failed),
    )  # fmt: skip
    if hunt.failed:
        keep = Path(options.keep) if options.keep else resume
        total = _explained(total, hunt.failed[0], keep)
    if options.json:
        print(msgspec.json.encode(total).decode())
        return OK if total.ok else VIOLATED
    print(
        f"{total.played:,} of {total.wanted:,} histories, {total.commits:,} commits, {total.events:,} events, "
        f"{total.per_second:g} histories a second and core, {time.monotonic() - began:.0f} s: "
        f"{len(total.failed)} violated"
    )
    if total.failed:
        if len(total.failed) > 1:
            print(f"seeds: {' '.join(map(str, total.failed))}")
        print(f"seed {total.failed[0]}: {total.violation}")
        print(f"replay it: {total.replay}")
        print(f"shrunk: {msgspec.json.encode(total.shrunk).decode()}")
        if total.kept:
            print(f"replay that: {total.replay_shrunk}")
    return OK if total.ok else VIOLATED


def _explained(total: Total, seed: int, keep: Path | None) -> Total:
    """Shrink the first failing seed to the least plan that violates the same kind of thing, and keep that plan."""
    outcome = play(seed)
    total = msgspec.structs.replace(total, replay=f"{_COMMAND} --replay {seed}")
    if outcome.ok:
        return msgspec.structs.replace(total, violation="in order when it was played again: the code has changed")
    kind = _kind(outcome)
    small = shrunk(outcome.plan, lambda plan: not (other := play(plan)).ok and _kind(other) == kind)
    total = msgspec.structs.replace(total, violation=play(small).violations[0], shrunk=small)
    if keep is None:
        return total
    keep.mkdir(parents=True, exist_ok=True)
    kept = keep / f"seed-{seed}.json"
    kept.write_bytes(msgspec.json.format(msgspec.json.encode(small), indent=1) + b"\n")
    return msgspec.structs.replace(total, kept=str(kept), replay_shrunk=f"{_COMMAND} --plan {shlex.quote(str(kept))}")


def _kind(outcome: Outcome) -> str:
    """Return what was violated without saying where: its words without numbers and names."""
    return " ".join(word for word in outcome.violations[0].split() if word.isalpha())


if __name__ == "__main__":
    sys.exit(main())
