"""The picture of a terminal's output: it shows what stands there at the end, and refers to nothing outside itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "picture.py"
SHOWS = (
    "from rich.console import Console\n"
    "from rich.live import Live\n"
    "console = Console()\n"
    "console.print('[bold green]before[/]')\n"
    "with Live('first', console=console, auto_refresh=False) as live:\n"
    "    live.update('second\\nof two lines', refresh=True)\n"
    "    live.update('third', refresh=True)\n"
)


def picture(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "made" / "a.svg"), "--title", "a title"]
    return subprocess.run(
        [*command, "--", sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_picture_shows_the_end_of_a_live_display_and_stands_alone(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    done = picture(tmp_path, SHOWS)
    assert done.returncode == 0, done.stderr
    svg = (tmp_path / "made" / "a.svg").read_text()
    text = re.sub(r"<[^>]*>", " ", svg).replace("&#160;", " ")
    assert all(word in text for word in ("before", "third", "a title"))
    assert not any(word in text for word in ("first", "second", "of two lines"))
    assert re.findall(r"https?://[^\"\s]*", svg) == ["http://www.w3.org/2000/svg"]
    assert "@font-face" not in svg


def test_no_picture_is_made_of_a_command_that_failed(tmp_path: Path) -> None:
    pytest.importorskip("rich")
    done = picture(tmp_path, "raise SystemExit(7)")
    assert done.returncode == 7
    assert "no picture made" in done.stderr
    assert not (tmp_path / "made").exists()
