#!/usr/bin/env python
"""Make a picture of a command's terminal output: docs/run.svg, by default of ``make run``.

    .venv/bin/python scripts/picture.py [--output FILE] [--width COLUMNS] [--lines N] [COMMAND …]

The command runs on a pseudo-terminal of its own, so it shows what a person would
see; the picture holds what stands there at its end. Works offline, and the SVG
refers to nothing outside itself.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

_CODE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b\][^\x07]*\x07|[\r\n]|[^\x1b\r\n]+|\x1b")
_FONT_FACE = re.compile(r"@font-face\s*\{[^}]*\}", re.DOTALL)
_NAMESPACE = "http://www.w3.org/2000/svg"


def run(command: list[str], columns: int, rows: int) -> tuple[int, str]:
    """Run a command on a terminal of this size; return its exit code and all that it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(rows)}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    written = bytearray()
    try:
        while piece := os.read(ours, 65536):
            written += piece
            sys.stdout.buffer.write(piece)
            sys.stdout.flush()
    except OSError:
        pass  # the other side is closed: the command has ended
    finally:
        os.close(ours)
    return process.wait(), written.decode(errors="replace")


def final_lines(written: str) -> list[str]:
    """Return the lines that stand on the terminal at the end, colours kept, as far as ``rich`` moves its cursor."""
    lines, row, fresh = [""], 0, False
    for found in _CODE.finditer(written):
        piece, count, code = found[0], found[1], found[2]
        if piece == "\n":
            row, fresh = row + 1, False
            if row == len(lines):
                lines.append("")
        elif piece == "\r":
            fresh = True
        elif code == "A":
            row = max(0, row - int(count or 1))
        elif code == "K":
            lines[row] = ""
        elif code == "J":
            lines[row:] = [""]
        elif code == "m" or not piece.startswith("\x1b"):
            lines[row] = (piece if fresh else lines[row] + piece) if piece else lines[row]
            fresh = False
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def draw(lines: list[str], columns: int, title: str) -> str:
    """Return the lines as an SVG that refers to nothing outside itself."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), no_wrap=True, overflow="crop", crop=True)
    svg = _FONT_FACE.sub("", console.export_svg(title=title))
    svg = svg.replace("font-family: Fira Code, monospace", "font-family: monospace")
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    outside = [
        url for url in re.findall(r"https?://[^\s\"')]+|url\((?!#)[^)]*\)", svg) if not url.startswith(_NAMESPACE)
    ]
    if outside:
        raise SystemExit(f"the picture refers to {outside[0]}: it must stand alone")
    return svg


def main() -> int:
    """Run the command and write its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="docs/run.svg", metavar="FILE")
    parser.add_argument("--width", type=int, default=118, metavar="COLUMNS")
    parser.add_argument("--lines", type=int, default=60, metavar="N", help="keep the last N lines")
    parser.add_argument("--title", help="default: the command")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    options = parser.parse_args()
    given = options.command[1:] if options.command[:1] == ["--"] else options.command
    command = given or ["make", "--no-print-directory", "run"]
    code, written = run(command, options.width, 50)
    if code:
        print(f"{' '.join(command)} ended with exit code {code}: no picture made", file=sys.stderr)
        return code
    title = options.title or " ".join(part for part in command if part != "--no-print-directory")
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(draw(final_lines(written)[-options.lines :], options.width, title))
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
