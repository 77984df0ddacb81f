"""``python -m holdfast.testing.histories STORE``: histories one after another, each checked, until all are in order.

Exit code 0: all linearizable. 1: one is not, or something happened that the contract does not allow, or one could not
be decided. 2: the command or a setting has to be mended. 3: the store cannot be used now. 130: interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from ...arguments import Parser
from ...errors import HoldfastError, InvalidInputError, UnsafeSettingError
from .hunt import Hunt, Report

OK, VIOLATED, USAGE, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 130
_FILE = "histories.jsonl"


class Settings(msgspec.Struct):
    """The first line of a kept file: what its reports are about. The store is not in it: it may hold a password."""

    token: str
    operations: int
    scopes: int
    seed: int


class Total(msgspec.Struct):
    """What all histories came to."""

    store: str
    wanted: int
    ok: bool
    histories: list[Report]


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog="python -m holdfast.testing.histories",
        description="Run histories of several processes on a store, with clients killed and stopped and connections "
        "cut, and check that each is linearizable. Its rows lie in scopes of their own and are deleted in the end.",
    )
    made.add_argument("store", metavar="STORE", help="as for holdfast run --store; anything but your bot's own, please")
    made.add_argument("--count", type=int, default=10, metavar="N", help="how many histories (default: 10)")
    made.add_argument("--operations", type=int, default=1000, metavar="N", help="in each, at least (default: 1000)")
    made.add_argument("--scopes", type=int, default=1, metavar="N", help="on how many scopes at once (default: 1)")
    made.add_argument("--seed", type=int, default=1, metavar="S", help="of the first one; it grows by 1 (default: 1)")
    made.add_argument("--resume", metavar="DIR", help="keep results there, and go on where an earlier call stopped")
    made.add_argument("--time-cap", type=float, default=0.0, metavar="SECONDS", help="begin no history after so long")
    made.add_argument(
        "--restart", metavar="COMMAND",
        help="a shell command that kills the store's server with SIGKILL and returns when it runs again; called once "
        "in each history",
    )  # fmt: skip
    made.add_argument(
        "--open", metavar="MODULE:CALLABLE", default="",
        help="called with STORE, returns the backend: for your own, which no URL names",
    )  # fmt: skip
    made.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    try:
        return asyncio.run(_run(options))
    except KeyboardInterrupt:
        print("interrupted; what is done is kept if --resume was given", file=sys.stderr)
        return INTERRUPTED
    except (InvalidInputError, UnsafeSettingError) as error:
        print(f"histories: {error}", file=sys.stderr)
        return USAGE
    except HoldfastError as error:
        print(f"histories: {error}", file=sys.stderr)
        return UNAVAILABLE


async def _run(options: argparse.Namespace) -> int:
    if options.count < 1:
        raise InvalidInputError(f"--count is {options.count}: use 1 or more")
    if options.time_cap < 0:
        raise InvalidInputError(f"--time-cap is {options.time_cap:g}: use 0 (none) or more seconds")
    with tempfile.TemporaryDirectory(prefix="holdfast-histories-") as scratch:
        kept = _Kept(Path(options.resume) if options.resume else Path(scratch), options)
        async with Hunt(
            options.store,
            kept.place,
            operations=options.operations,
            scopes=options.scopes,
            restart=_restart(options.restart) if options.restart else None,
            opener=options.open,
            token=kept.settings.token,
        ) as hunt:
            assert hunt.promised is not None
            await _all(hunt, kept, options)
            return _tell(hunt.promised.backend, kept.reports[: options.count], options)


async def _all(hunt: Hunt, kept: _Kept, options: argparse.Namespace) -> None:
    end = time.monotonic() + options.time_cap if options.time_cap else None
    for number in range(len(kept.reports), options.count):
        if end is not None and time.monotonic() >= end:
            break
        report = await hunt.history(options.seed + number, number)
        kept.add(report)
        if not options.json:
            print(_line(number, report), flush=True)
        if not report.ok:
            _show(report, None if options.resume is None else kept.place / f"history-{number}")


def _line(number: int, report: Report) -> str:
    what = "ok" if report.ok else "UNDECIDED" if not (report.violations or report.broken) else "VIOLATED"
    faults = ", ".join(f"{count} {name}" for name, count in sorted(report.faults.items()))
    return (
        f"history {number + 1} (seed {report.seed}): {what}, {report.operations} operations, {report.commits} commits, "
        f"{report.refused} refused, {report.resent} re-sent, {report.unknown} unknown; {faults or 'no faults'}; "
        f"{report.seconds:.1f} s"
    )


def _show(report: Report, place: Path | None) -> None:
    for text in (*report.violations, *report.broken):
        print(text, file=sys.stderr)
    if place is not None:
        print(f"its lines are kept in {place}", file=sys.stderr)


def _tell(store: str, reports: list[Report], options: argparse.Namespace) -> int:
    total = Total(store, options.count, all(report.ok for report in reports), reports)
    if options.json:
        print(msgspec.json.encode(total).decode())
    else:
        wrong = sum(not report.ok for report in reports)
        short = "" if len(reports) == options.count else f" of {options.count} (the time cap ended it)"
        print(
            f"{store}: {len(reports)} histories{short}, {sum(r.operations for r in reports):,} operations, "
            f"{sum(r.commits for r in reports):,} commits, {sum(r.resent for r in reports):,} re-sent, {wrong} violated"
        )
    return OK if total.ok else VIOLATED


def _restart(command: str) -> Callable[[], Awaitable[None]]:
    async def restart() -> None:
        process = await asyncio.create_subprocess_shell(command, stdout=asyncio.subprocess.DEVNULL)
        if code := await process.wait():
            raise InvalidInputError(f"--restart: {command!r:.200} ended with {code}")

    return restart


class _Kept:
    """The reports so far, in a file if they are to be resumed; a line is whole or not there.

    Crash: The history under way is run again.
    """

    def __init__(self, place: Path, options: argparse.Namespace) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.place = place
        self.reports: list[Report] = []
        self._path = place / _FILE
        settings = Settings(os.urandom(4).hex(), options.operations, options.scopes, options.seed)
        if not self._path.exists():
            self.settings = settings
            self._path.write_bytes(msgspec.json.encode(settings) + b"\n")
            return
        first, *lines = self._path.read_bytes().split(b"\n")
        try:
            self.settings = msgspec.json.decode(first, type=Settings)
        except msgspec.DecodeError as error:
            raise InvalidInputError(f"{self._path} is not a file of this command: use another directory") from error
        if (self.settings.operations, self.settings.scopes, self.settings.seed) != (
            options.operations,
            options.scopes,
            options.seed,
        ):
            raise InvalidInputError(
                f"{place} was begun with --operations {self.settings.operations} --scopes {self.settings.scopes} "
                f"--seed {self.settings.seed}: give the same, or another directory"
            )
        self.reports = [msgspec.json.decode(line, type=Report) for line in lines[:-1]]
        self._path.write_bytes(b"\n".join([first, *lines[:-1], b""]))  # without a line that a kill tore

    def add(self, report: Report) -> None:
        """Keep one more."""
        self.reports.append(report)
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    sys.exit(main())
