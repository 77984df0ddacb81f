"""docs/rivals.md and its chart, from what was measured: no figure is typed by hand."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from .catalogue import ROOT, Entry
from .flushes import Flushes


class Result(NamedTuple):
    """What one side did."""

    entry: Entry
    single_us: float
    single_per_second: float
    group_per_second: float
    cold_ms: float
    flushed: tuple[Flushes, Flushes] | None

    @property
    def flushes_nothing(self) -> bool:
        """Whether an acknowledged write is not on the disk."""
        return self.flushed is not None and sum(self.flushed[0]) < 0.5

    def as_dict(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        one, many = self.flushed or (None, None)
        return {
            "side": self.entry.label,
            "sequence_us": round(self.single_us, 1),
            "sequence_per_second": round(self.single_per_second),
            "group_per_second": round(self.group_per_second),
            "cold_ms": round(self.cold_ms, 1),
            "flushes_sequence": one and one._asdict(),
            "flushes_group": many and many._asdict(),
        }


_TEXT = """\
# Beside other ways of keeping a row

<!-- Written by `make bench-rivals`; edit bench/rivals/page.py, not this. -->

One 600-byte signal row, written by `make bench-rivals` on one machine: {machine}.
Every side runs in a process of its own and takes turns with the others on the same disk, {rounds} rounds in a shuffled
order; medians. Absolute figures differ from machine to machine, and from day to day: compare the rows of this table
with each other only.

![Writes a second of each side, in sequence and 64 at once](rivals.svg)

| | in sequence: µs | writes/s | 64 at once: writes/s | cold start: ms | flushes per write, in sequence | at once |
|---|---:|---:|---:|---:|---:|---:|
{table}

**Flushes** are the calls of `fsync`, `fdatasync`, `sync_file_range`, `msync` and `sync` that `strace` counted, on a
run of its own, between the first write and the last acknowledgement, divided by the writes: those of the side's
process and of its server. `+ dir` are flushes of a directory, without which a rename may be lost in a power cut.
{none}

What the sides do:

- **append + fdatasync**, **sqlite3**, **redis-py**, **psycopg 3**: the bare drivers, JSON encoded, nothing else: no
  versions, no atomic commit over several rows, no checksum, no fencing. In sequence the first two block the caller;
  64 at once is 64 threads (append), one writing thread (sqlite3), 64 tasks over 64 connections (redis-py, psycopg).
- **npm backtest-kit** is the reference's own package: `PersistBase` as one entity with a file an id, and its signal
  adapter as the live engine calls it. {reference}
- **npm write-file-atomic**: a temporary file, flushed, renamed.
- **diskcache**, **sqlitedict**, **SQLAlchemy** (an ORM session and a commit each), **py-key-value**: with their
  defaults, but a minute's wait for SQLite's lock, which the 64 threads need.
- **Holdfast** commits through its typed store: the row encoded and checksummed, its version expected and compared by
  the medium, the writer's op recorded. A commit of several rows is as atomic as that of one, and costs one flush.

Redis is Valkey with `appendonly yes` and `appendfsync always`, PostgreSQL 15 has its defaults; both run on the same
machine and disk. A cold start opens the store in a new process and reads all rows, parsed; the code is loaded before
and the page cache is warm.

Made with {versions}.
"""


def _flushes(found: Flushes | None) -> str:
    if found is None:
        return "not counted"
    files, folders = (f"{value:.2f}".rstrip("0").rstrip(".") for value in found)
    if found.files + found.directories < 0.005:
        return "**none**"
    return files if folders == "0" else f"{files} + {folders} dir"


def line(result: Result) -> str:
    """Return its row of the table."""
    label = f"**{result.entry.label}**" if result.entry.kind == "holdfast" else result.entry.label
    one, many = result.flushed or (None, None)
    return (
        f"| {label} | {result.single_us:,.0f} | {result.single_per_second:,.0f} | {result.group_per_second:,.0f} | "
        f"{result.cold_ms:,.0f} | {_flushes(one)} | {_flushes(many)} |"
    )


def _machine() -> str:
    cores = os.cpu_count()
    found = subprocess.run(["findmnt", "-no", "FSTYPE", "-T", str(ROOT)], capture_output=True, text=True, check=False)
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    return f"{cores} cores, {system}, {found.stdout.strip() or 'unknown file system'}"


def _versions() -> str:
    import psycopg
    import redis

    wanted = ROOT / "bench" / "rivals"
    named = [line for line in (wanted / "requirements.txt").read_text().splitlines() if "==" in line]
    shown = [line.replace("==", " ") for line in named if line.split("==")[0] in _SHOWN]
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return ", ".join(
        [f"Python {platform.python_version()}", f"redis-py {redis.__version__}", f"psycopg {psycopg.__version__}",
         *shown, f"Node {node.lstrip('v')}"]
    ) + "; the npm versions stand in [package.json](../bench/rivals/node/package.json)"  # fmt: skip


_SHOWN = ("diskcache", "sqlitedict", "SQLAlchemy", "py-key-value-aio")
_REFERENCE = (
    "The registry lacks the versions of its dependencies that it asks for: it runs with older ones and a stand-in of "
    "five lines for one that is not there at all (`bench/rivals/node`); none of them has a part in writing the file."
)


def write_page(results: list[Result], without: dict[str, str], *, rounds: int) -> None:
    """Write docs/rivals.md and docs/rivals.svg."""
    bare = [result.entry.label for result in results if result.flushes_nothing]
    none = f"These flush nothing before they acknowledge, so a power cut takes writes back: {', '.join(bare)}."
    text = _TEXT.format(
        machine=_machine(),
        rounds=rounds,
        table="\n".join(line(result) for result in results),
        none=none if bare else "",
        reference=_REFERENCE if "node" not in without else f"It could not be installed: `{without['node']}`.",
        versions=_versions(),
    )
    (ROOT / "docs" / "rivals.md").write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")
    (ROOT / "docs" / "rivals.svg").write_text(draw(results))


_WIDTH, _LEFT, _RIGHT, _TOP, _STEP = 860, 250, 30, 64, 26
_COLOURS = {"bare": "#7a8594", "rival": "#b0701e", "reference": "#8a3ffc", "holdfast": "#0a7d48"}
_FONT = "font-family='system-ui, sans-serif' font-size='13'"


def draw(results: list[Result]) -> str:
    """Return the chart: for each side a dot for writes in sequence and a bar's end for 64 at once, on a log scale."""
    rates = [rate for result in results for rate in (result.single_per_second, result.group_per_second)]
    low, high = math.floor(math.log10(min(rates))), math.ceil(math.log10(max(rates)))
    bottom = _TOP + _STEP * len(results)

    def x(rate: float) -> float:
        return _LEFT + (math.log10(rate) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {bottom + 58}' {_FONT}>",
        f"<rect width='{_WIDTH}' height='{bottom + 58}' fill='#ffffff'/>",
        "<text x='16' y='26' font-size='16' font-weight='600' fill='#1b1f24'>"
        "Acknowledged writes a second of a 600-byte row</text>",
        "<text x='16' y='46' fill='#57606a'>○ one after another · ● 64 at once · "
        "* acknowledges before anything is flushed</text>",
    ]
    for power in range(low, high + 1):
        at = x(10**power)
        parts.append(f"<line x1='{at:.1f}' x2='{at:.1f}' y1='{_TOP}' y2='{bottom}' stroke='#d0d7de'/>")
        parts.append(f"<text x='{at:.1f}' y='{bottom + 20}' text-anchor='middle' fill='#57606a'>{10**power:,}</text>")
    for at, result in enumerate(results):
        y, colour = _TOP + _STEP * (at + 0.5), _COLOURS[result.entry.kind]
        one, many = x(result.single_per_second), x(result.group_per_second)
        dashes = " stroke-dasharray='3 4'" if result.flushes_nothing else ""
        weight = " font-weight='600'" if result.entry.kind == "holdfast" else ""
        parts += [
            f"<text x='{_LEFT - 14}' y='{y + 4.5:.1f}' text-anchor='end' fill='#1b1f24'{weight}>"
            f"{escape(result.entry.label)}{' *' if result.flushes_nothing else ''}</text>",
            f"<line x1='{one:.1f}' x2='{many:.1f}' y1='{y:.1f}' y2='{y:.1f}' stroke='{colour}' "
            f"stroke-width='2'{dashes}/>",
            f"<circle cx='{one:.1f}' cy='{y:.1f}' r='5' fill='#ffffff' stroke='{colour}' stroke-width='2'/>",
            f"<circle cx='{many:.1f}' cy='{y:.1f}' r='5.5' fill='{colour}'/>",
        ]
    names = (("bare", "bare driver"), ("rival", "library"), ("reference", "the reference"), ("holdfast", "Holdfast"))
    for at, (kind, name) in enumerate(names):
        left = _LEFT + at * 140
        parts.append(f"<circle cx='{left}' cy='{bottom + 42}' r='5' fill='{_COLOURS[kind]}'/>")
        parts.append(f"<text x='{left + 12}' y='{bottom + 46}' fill='#1b1f24'>{name}</text>")
    return "\n".join([*parts, "</svg>"]) + "\n"
