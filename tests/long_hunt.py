"""The long hunt, ``make torture``: over every storage kills of the bot and of its server, races, lost power, owners.

``python tests/long_hunt.py [--resume DIR] [--time-cap SECONDS] [--seed S] [--share F] [PART …]``; a part is
``kills:NAME``, ``histories:NAME``, ``power:NAME``, ``zombies:NAME``, ``fleet:NAME``, ``orders:NAME``,
``simulation:seeds`` or ``simulation:defects``. Each part but a fleet and the last keeps what it has done in the
directory, so that the hunt goes on where it stopped; ``--share 0.01`` takes a hundredth of all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lost_power
import msgspec
import torture_servers
from servers.losing_disk import why_not

from holdfast.testing.torture import Round

KILLS = {"file": 2000}
"""SIGKILLs of the bot, where it is not :data:`KILLS_ON_A_SERVER`; numbered steps come on top."""
KILLS_ON_A_SERVER, KILLS_OF_A_SERVER = 1000, 100
HISTORIES = 200
CUTS = 100
ZOMBIES = 1000
_ZOMBIES_AT_ONCE = 50
_ZOMBIE_LEASE_SECONDS = {"mongo": 2.0}
"""Where it is not 0.8: SecantusDB answers slowly on a busy machine, and a lease must hold several calls."""
FLEET_SECONDS = 300.0
_FLEET_SPARE_SECONDS = 120.0
"""For its start, its end and the comparison."""
_CUTS_AT_ONCE = 10
ORDER_RUNS = {"file": 5_000, "sqlite": 600, "redis": 500, "postgres": 400, "mongo": 250, "s3": 250}
"""About three kills, or pauses, in two runs: 10,000."""
_AT_ONCE = 4
SIMULATED = 1_000_000
_STARTS = 5
"""How often each planted defect is looked for, from other seeds on."""


class Done(NamedTuple):
    """What a part has come to."""

    part: str
    did: str
    wrong: int
    complete: bool
    seconds: float


class Hunt:
    """All parts, one after the other, within a cap of time.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.place = Path(options.resume).resolve()
        self.place.mkdir(parents=True, exist_ok=True)
        self.ends = time.monotonic() + options.time_cap
        self.parts = {
            **{f"kills:{name}": self.kills for name in torture_servers.STORES},
            **{f"histories:{name}": self.histories for name in torture_servers.STORES if name != "file"},
            **{f"power:{name}": self.power for name in lost_power.RIGS},
            **{f"zombies:{name}": self.zombies for name in torture_servers.STORES if name != "file"},
            **{f"fleet:{name}": self.fleet for name in ("redis", "postgres", "sqlite")},
            **{f"orders:{name}": self.orders for name in ORDER_RUNS},
            "simulation:seeds": self.simulation,
            "simulation:defects": self.defects,
        }

    def run(self, chosen: Sequence[str]) -> list[Done]:
        """Do the parts; each gets an even share of what is left of the time."""
        done = []
        names = list(chosen) or list(self.parts)
        for at, part in enumerate(names):
            left = self.ends - time.monotonic()
            if left <= 0:
                print(f"{part}: not begun: the time is up; call again to go on", flush=True)
                done.append(Done(part, "not begun", 0, False, 0.0))
                continue
            began = time.monotonic()
            did, wrong, complete = self.parts[part](part.partition(":")[2], left / (len(names) - at))
            done.append(Done(part, did, wrong, complete, time.monotonic() - began))
            print(f"{part}: {did}{'' if complete else ' (to be continued)'}; {wrong} wrong", flush=True)
        return done

    def _wanted(self, full: int) -> int:
        share: float = self.options.share
        return max(1, math.ceil(full * share))

    def _kept(self, part: str) -> Path:
        """Return where a part keeps its results: another seed or share is another hunt."""
        return self.place / f"{part.replace(':', '-')}-{self.options.seed}-{self.options.share:g}"

    def kills(self, name: str, seconds: float) -> tuple[str, int, bool]:
        """Torture a storage."""
        server = bool(torture_servers.STORES[name].server)
        kills = self._wanted(KILLS.get(name, KILLS_ON_A_SERVER))
        server_kills = self._wanted(KILLS_OF_A_SERVER) if server else 0
        words = ["--kills", str(kills), "--server-kills", str(server_kills), "--every-step"]
        words += ["--seed", str(self.options.seed), "--time-cap", f"{seconds:.0f}"]
        words += ["--resume", str(self._kept(f"kills:{name}"))]
        # A process of its own: the bot's file is loaded into it, and can be only once.
        command = [sys.executable, torture_servers.__file__, name, *words]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if not ended.stdout:
            return f"ended with {ended.returncode}", 1, False
        found = msgspec.json.decode(ended.stdout, type=Round)
        for text in (*found.lost, *found.duplicated, *found.broken, *found.differences)[:5]:
            print(text, file=sys.stderr)
        wrong = len(found.lost) + len(found.duplicated) + len(found.broken) + len(found.differences)
        did = (
            f"{found.kills} kills of the bot, {found.server_kills} of the server, {found.commits} commits acknowledged"
        )
        return did, wrong, found.kills >= kills and found.server_kills >= server_kills

    def histories(self, name: str, seconds: float) -> tuple[str, int, bool]:
        """Run histories and check them."""
        with (
            tempfile.TemporaryDirectory(prefix=f"holdfast-histories-{name}-") as place,
            torture_servers.started(name, Path(place)) as (store, _),
        ):
            wanted = self._wanted(HISTORIES)
            command = [sys.executable, "-m", "holdfast.testing.histories", store, "--json", "--count", str(wanted)]
            command += ["--resume", str(self._kept(f"histories:{name}"))]
            command += ["--seed", str(self.options.seed), "--time-cap", f"{seconds:.0f}"]
            ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        try:
            found: dict[str, Any] = json.loads(ended.stdout)
        except ValueError:
            return f"ended with {ended.returncode}", 1, False
        count = len(found["histories"])
        return f"{count} histories", int(ended.returncode != 0), count >= wanted

    def zombies(self, name: str, seconds: float) -> tuple[str, int, bool]:
        """Pause owners past their lease, have them replaced, and wake them; what is done is kept in chunks."""
        file = self._kept(f"zombies:{name}").with_suffix(".jsonl")
        kept = [json.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []
        wanted, ends = self._wanted(ZOMBIES), time.monotonic() + seconds
        while (so_far := sum(one["runs"] for one in kept)) < wanted and time.monotonic() < ends:
            runs = min(_ZOMBIES_AT_ONCE, wanted - so_far)
            words = ["--runs", str(runs), "--seed", str(self.options.seed * 1000 + so_far)]
            if len(kept) % 2:  # nothing but the lease keeps a late order back, and the venue takes it twice
                words += ["--valid", "2", "--repeated", "never"]
            words += ["--lease", f"{_ZOMBIE_LEASE_SECONDS.get(name, 0.8):g}"]
            found = self._owners("zombies.py", name, [*words, "--time-cap", f"{max(ends - time.monotonic(), 1):.0f}"])
            if found is None:
                return "it ended without a result", 1, False
            kept.append(found)
            with file.open("ab") as results:
                results.write(json.dumps(found).encode() + b"\n")
            if found["wrong"] or not found["runs"]:
                break
        wrong = [text for one in kept for text in one["wrong"]]
        for text in wrong[:5]:
            print(text, file=sys.stderr)
        sums = {what: sum(one.get(what, 0) for one in kept) for what in kept[-1] if what != "wrong"} if kept else {}
        did = "{runs} owners paused, replaced and woken, {stopped_before_sending} of them about to send an order; "
        did += "{late_writes_refused} contexts refused, {late_orders_refused} late orders refused, {orders:,} taken; "
        did += "{blocked} held a lock meanwhile, {orderless} sent nothing"
        did = did.format_map(sums) if sums else "nothing"
        return did, len(wrong), so_far >= wanted

    def fleet(self, name: str, seconds: float) -> tuple[str, int, bool]:
        """A fleet of 4 workers and 200 contexts under fire for five minutes."""
        lasts = FLEET_SECONDS * min(1.0, self.options.share * 10)
        if seconds < lasts + _FLEET_SPARE_SECONDS:
            return f"not begun: it takes {lasts + _FLEET_SPARE_SECONDS:.0f} s", 0, False
        found = self._owners("fleets.py", name, ["--seconds", f"{lasts:.0f}", "--seed", str(self.options.seed)])
        if found is None:
            return "it ended without a result", 1, False
        for text in found["wrong"][:5]:
            print(text, file=sys.stderr)
        slow = ""
        if found["takeovers_unjudged"]:
            slow = f" (and {found['takeovers_unjudged']} of up to {found['slowest_unjudged_leases']}, "
            slow += f"while commits took up to {found['slowest_commit_seconds']} s)"
        did = (
            f"{found['kills']} workers killed, {found['pauses']} paused, {found['leaves']} told to leave; "
            f"{found['takeovers']} contexts taken over, the slowest in {found['slowest_takeover_leases']} leases"
            f"{slow}; {found['trades']} trades as the pure step has them"
        )
        return did, len(found["wrong"]), True

    def orders(self, name: str, seconds: float) -> tuple[str, int, bool]:
        """Kill a bot around its orders, several at once: a run mostly waits for expiries."""
        wanted = self._wanted(ORDER_RUNS[name])
        words = [sys.executable, str(Path(__file__).with_name("order_kills.py")), "--runs", str(wanted)]
        words += ["--seed", str(self.options.seed), "--time-cap", f"{seconds:.0f}"]
        with (
            tempfile.TemporaryDirectory(prefix=f"holdfast-orders-{name}-") as place,
            torture_servers.started(name, Path(place)) as (store, _),
        ):
            running = [
                subprocess.Popen(
                    [*words, *(["--store", store] if name != "file" else []), "--part", f"{part}/{_AT_ONCE}",
                     "--resume", f"{self._kept(f'orders:{name}')}-{part}"],
                    stdout=subprocess.PIPE,
                )
                for part in range(_AT_ONCE)
            ]  # fmt: skip
            told = [process.communicate()[0] for process in running]
        if not all(told):
            return "ended without a word", 1, False
        found = [json.loads(text) for text in told]
        wrong = [text for one in found for kind in ("twice", "forgotten", "without_row", "other") for text in one[kind]]
        for text in wrong[:5]:
            print(text, file=sys.stderr)
        counted = ("runs", "kills", "pauses", "takeovers", "lost", "told", "surprises", "venue_orders")
        sums = {what: sum(one[what] for one in found) for what in counted}
        did = (
            f"{sums['runs']:,} runs, {sums['kills']:,} kills around orders, {sums['pauses']:,} owners paused past "
            f"their lease, {sums['takeovers']:,} takeovers by one that waited, {sums['lost']:,} answers or requests "
            f"lost or late; {sums['venue_orders']:,} orders at the venue; {sums['surprises']:,} late or double where a "
            f"venue allows it, all told (possible ones in {sums['told']:,} runs)"
        )
        return did, len(wrong), sums["runs"] >= wanted

    def simulation(self, name: str, seconds: float) -> tuple[str, int, bool]:
        """Play histories of the simulation on all cores; another seed of the hunt plays others."""
        wanted = self._wanted(SIMULATED)
        command = [sys.executable, "-m", "holdfast.testing.simulation", "--json", "--jobs", str(os.cpu_count() or 1)]
        command += ["--seeds", str(wanted), "--first", str(self.options.seed * 10_000_000)]
        command += ["--time-cap", f"{seconds:.0f}", "--resume", str(self._kept(f"simulation:{name}"))]
        command += ["--keep", str(Path(__file__).with_name("simulation_plans"))]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        try:
            found: dict[str, Any] = json.loads(ended.stdout)
        except ValueError:
            return f"ended with {ended.returncode}", 1, False
        if not found["ok"]:
            told = ("failed", "violation", "replay", "shrunk", "kept", "replay_shrunk")
            print(json.dumps({key: found[key] for key in told}), file=sys.stderr)
        did = (
            f"{found['played']:,} histories, {found['commits']:,} commits, {found['events']:,} events, "
            f"{found['per_second']:g} a second and core"
        )
        return did, len(found["failed"]), found["played"] >= wanted

    def defects(self, name: str, seconds: float) -> tuple[str, int, bool]:
        """Plant defects in the engine, and count the seeds that it takes the simulation to find each."""
        script = Path(__file__).with_name("simulation_defects.py")
        command = [sys.executable, str(script), "--starts", str(_STARTS), "--jobs", str(os.cpu_count() or 1)]
        command += ["--time-cap", f"{seconds:.0f}", "--resume", f"{self._kept(name)}.jsonl"]
        ended = subprocess.run(command, check=False)
        return f"planted defects, {_STARTS} times each", int(ended.returncode not in (0, 3)), ended.returncode == 0

    @staticmethod
    def _owners(script: str, name: str, words: list[str]) -> dict[str, Any] | None:
        with (
            tempfile.TemporaryDirectory(prefix=f"holdfast-owners-{name}-") as place,
            torture_servers.started(name, Path(place)) as (store, _),
        ):
            command = [sys.executable, str(Path(__file__).with_name(script)), store, *words]
            ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        try:
            found: dict[str, Any] = json.loads(ended.stdout)
        except ValueError:
            return None
        return found

    def power(self, name: str, seconds: float) -> tuple[str, int, bool]:
        """Cut the power, ten times at once, so that a hunt can stop between."""
        if why := why_not():
            return why, 0, False
        file = self._kept(f"power:{name}").with_suffix(".jsonl")
        lines = file.read_bytes().splitlines() if file.exists() else []
        all_found = [msgspec.json.decode(line, type=lost_power.Found) for line in lines]
        wanted, ends = self._wanted(CUTS), time.monotonic() + seconds
        while (so_far := sum(one.cuts for one in all_found)) < wanted and time.monotonic() < ends:
            cuts = min(_CUTS_AT_ONCE, wanted - so_far)
            all_found.append(self._cuts(name, cuts, self.options.seed * 1000 + so_far, file))
            if all_found[-1].lost or all_found[-1].broken:
                break
        rig = lost_power.RIGS[name]
        lost = sum(one.lost for one in all_found)
        broken = [text for one in all_found for text in one.broken]
        for text in broken:
            print(text, file=sys.stderr)
        commits = sum(one.commits for one in all_found)
        did, wrong = f"{so_far} cuts, {commits} commits acknowledged, {lost} lost", lost + len(broken)
        if rig.wrong and time.monotonic() < ends:
            bitten = lost_power.cut_again_and_again(name, max(2, wanted // 20), wrong=True, seed=self.options.seed)
            did += f"; {rig.wrong}: {'refused' if bitten.refused else 'NOT REFUSED'}, else {bitten.lost} lost"
            did += f" of {bitten.commits}"
            wrong += int(not bitten.refused) + int(not bitten.lost)
        return did, wrong, so_far >= wanted

    @staticmethod
    def _cuts(name: str, cuts: int, seed: int, file: Path) -> lost_power.Found:
        found = lost_power.cut_again_and_again(name, cuts, seed=seed)
        with file.open("ab") as results:
            results.write(msgspec.json.encode(found) + b"\n")
        return found


def main(argv: Sequence[str]) -> int:
    """Hunt, and print a table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--resume", default="build/torture", metavar="DIR")
    parser.add_argument("--time-cap", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--share", type=float, default=1.0, help="of the full counts")
    options = parser.parse_args(argv)
    hunt = Hunt(options)
    if unknown := [part for part in options.parts if part not in hunt.parts]:
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(hunt.parts)}")
    done = hunt.run(options.parts)
    print(f"\n{'part':<20}{'seconds':>9}{'wrong':>7}  what")
    for one in done:
        print(f"{one.part:<20}{one.seconds:>9.0f}{one.wrong:>7}  {one.did}{'' if one.complete else ' (not all)'}")
    return int(any(one.wrong for one in done))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
