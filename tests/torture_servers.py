"""Torture over one storage, whose server is killed too: ``python tests/torture_servers.py NAME [options]``.

``NAME`` is one of :data:`STORES`. Starts a server of its own on loopback, runs ``holdfast torture`` on it with a hook
that kills the server with SIGKILL and starts it again, and prints the result as one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
from servers import Running, kind
from servers.s3 import credentials

from holdfast.cli.torture import add_parser, torture_plan
from holdfast.testing.torture import Round, torture

BOT = Path(__file__).parent.parent / "examples" / "bot.py"


class Stored(NamedTuple):
    """A kind of storage to torture."""

    server: str
    """Which server to start; empty for none."""
    url: Callable[[str], str]
    """The store, from where the server listens, or from a directory."""


STORES = {
    "file": Stored("", lambda place: f"{place}/data"),
    "sqlite": Stored("", lambda place: f"sqlite:{place}/store.db"),
    "redis": Stored("valkey", lambda url: f"{url}/0"),
    "postgres": Stored("postgres", lambda url: url),
    "mongo": Stored("mongo", lambda url: url),
    "s3": Stored("ceph", lambda url: url),  # moto keeps nothing over a restart
}


def run(name: str, words: list[str], place: Path, progress: Callable[[Round, int], None]) -> Round:
    """Torture a storage with these options of ``holdfast torture``.

    Args:
        name: One of :data:`STORES`.
        words: Options, without BOT.py and the store.
        place: An empty directory, for the server's data.
        progress: See :func:`holdfast.testing.torture.torture`.
    """
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    with started(name, place) as (store, running):
        options = parser.parse_args(["torture", str(BOT), *words])
        options.store = store
        hook = _again(running) if running else None
        return torture(torture_plan(options, work=options.resume or str(place / "work")), progress, server=hook)


@contextmanager
def started(name: str, place: Path) -> Iterator[tuple[str, Running | None]]:
    """Start a storage's server, if it has one, and give its store's URL."""
    stored = STORES[name]
    if not stored.server:
        yield stored.url(str(place)), None
        return
    if stored.server == "ceph":
        credentials()
    running = kind(stored.server).start(place)
    try:
        yield stored.url(running.url), running
    finally:
        running.stop()


def _again(running: Running) -> Callable[[], None]:
    def hook() -> None:
        running.kill()
        running.restart()

    return hook


def main() -> None:
    """Do what the command line says."""
    name, *words = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix=f"holdfast-torture-{name}-") as place:
        found = run(name, words, Path(place), lambda so_far, wanted: None)
    print(json.dumps({**msgspec.to_builtins(found), "ok": found.ok}))


if __name__ == "__main__":
    main()
