"""Tables: with ``rich`` on a terminal, plain aligned text otherwise."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec


def fancy(*, plain: bool = False) -> bool:
    """Tell whether to draw with ``rich``: it is installed, standard output is a terminal and nobody objects."""
    return (
        not plain
        and sys.stdout.isatty()
        and os.environ.get("TERM") != "dumb"
        and importlib.util.find_spec("rich") is not None
    )


def visible(text: str) -> str:
    """Return ``text`` with what a terminal would act on, or not show, as escapes: names and notes are anybody's."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, plain: bool = False) -> None:
    """Print one table; without rows, only that there are none."""
    rows = [[visible(cell) for cell in row] for row in rows]
    if fancy(plain=plain):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table if rows else Text(f"{title}: none", style="dim"))
        return
    if not rows:
        print(f"{title}: none")
        return
    print(title)
    widths = [max(len(line[at]) for line in (columns, *rows)) for at in range(len(columns))]
    for line in (columns, *rows):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_json(value: Any) -> None:
    """Print a value as one JSON document, with members in a fixed order."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2)
    sys.stdout.write(text.decode() + "\n")


def moment(ms: int) -> str:
    """Return epoch milliseconds as ``2024-01-01 00:00`` in UTC; seconds where they matter."""
    if not ms:
        return "-"
    try:
        at = datetime.fromtimestamp(ms / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return str(ms)
    return at.strftime("%Y-%m-%d %H:%M" if not ms % 60_000 else "%Y-%m-%d %H:%M:%S")


def number(value: float | None) -> str:
    """Return a price with seven significant digits and no exponent, for people; JSON output keeps every digit."""
    if value is None:
        return "-"
    if not value or not math.isfinite(value):
        return f"{value:g}"
    decimals = min(max(6 - math.floor(math.log10(abs(value))), 0), 15)
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def percent(value: float | None) -> str:
    """Return percent units with a sign and two decimals."""
    return "-" if value is None else f"{value:+.2f} %"


@contextmanager
def progress_bar(what: str, *, plain: bool) -> Iterator[Callable[[int, int], None]]:
    """Show how much of something is done, on a terminal; the block is given what to call with (done, total)."""
    if not fancy(plain=plain):
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
