"""What ``holdfast run`` shows: a live table on a terminal, one line for each event elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ..contract import Key
from ..domains import to_mapping
from ..engine.listeners import Failure, ModeChange, Tick, Trouble
from ..engine.live import AtRisk
from ..names import Context
from ..rows import Event, Row, Signal
from .loading import own_place
from .tables import moment, number, percent, visible

if TYPE_CHECKING:
    from rich.console import Group

_STATED_SECONDS = 15.0
_SAME_FAILURE_SECONDS = 60.0
_COLOURS = {"opened": "cyan", "scheduled": "blue", "partial_profit": "green", "partial_loss": "red"}


class Line:
    """What is known of one context."""

    def __init__(self) -> None:
        self.price: float | None = None
        self.at_ms = 0
        self.signal: Signal | None = None
        self.waiting: Signal | None = None
        self.percent = 0.0
        self.pnl_percent = 0.0
        self.closed = 0
        self.ended = ""

    def take(self, news: Event | Tick) -> None:
        """Learn from an event or a tick."""
        self.price, self.at_ms = news.price, news.at_ms
        if isinstance(news, Tick):
            self.percent = news.percent
            self.signal = news.signal if news.kind == "active" else None
            self.waiting = news.signal if news.kind == "waiting" else None
            return
        match news.kind:
            case "opened":
                self.signal, self.waiting, self.percent = news.signal, None, 0.0
            case "scheduled":
                self.waiting = news.signal
            case "closed":
                self.signal, self.percent = None, 0.0
                self.closed += 1
                self.pnl_percent += news.pnl_percent or 0.0
            case "cancelled":
                self.waiting = None
            case "partial_profit" | "partial_loss":
                self.signal = news.signal
                self.percent = float(news.level or 0) * (1 if news.kind == "partial_profit" else -1)


def sentence(event: Event) -> str:
    """Return what one event says, in one line, without its time and context."""
    signal = event.signal
    prices = f"{signal.position} {number(signal.price_open)}"
    aims = f"target {number(signal.price_take_profit)}, stop {number(signal.price_stop_loss)}"
    match event.kind:
        case "opened":
            return f"{'activated' if event.activated else 'opened'} {prices}, {aims}"
        case "scheduled":
            return f"scheduled {prices}, {aims}"
        case "closed":
            both = ", both in one candle" if event.both_hit else ""
            why = (event.reason or "").replace("_", " ")
            return f"closed {signal.position} at {number(event.price_close)}, {why}{both}, {percent(event.pnl_percent)}"
        case "partial_profit" | "partial_loss":
            side = "target" if event.kind == "partial_profit" else "stop"
            return f"{event.level} % of the way to its {side}"
    return f"{event.kind} {prices}: {event.reason or ''}".rstrip(": ")


class Board:
    """Everything that a run knows of itself; the two screens draw it.

    Args:
        contexts: What runs, in the order in which it is shown.
        title: What runs, on which market, in which store.
        now: Seconds of a clock that never goes back.
    """

    def __init__(self, contexts: Sequence[Context], title: str, *, now: Callable[[], float] = time.monotonic) -> None:
        self.lines = {context: Line() for context in contexts}
        self.title = title
        self.commits = 0
        self.recent: deque[Event] = deque(maxlen=8)
        self.failures: deque[str] = deque(maxlen=3)
        self._now = now
        self._committed_at: float | None = None
        self.at_risk: Callable[[], Sequence[AtRisk]] = tuple
        """What the runs have at stake now."""

    def take(self, news: Event | Tick) -> None:
        """Learn from an event or a tick."""
        context = news.context if isinstance(news, Tick) else news.signal.context
        if (line := self.lines.get(context)) is not None:
            line.take(news)
        if isinstance(news, Event):
            self.recent.append(news)

    def committed(self, scope: str, number: int, changes: Mapping[Key, Row | None]) -> None:
        """Count an acknowledged commit."""
        self.commits += 1
        self._committed_at = self._now()

    @property
    def commit_age_seconds(self) -> float | None:
        """How long ago the last commit was acknowledged."""
        return None if self._committed_at is None else self._now() - self._committed_at

    def summary(self) -> dict[str, Any]:
        """Return how the run ended, as plain values."""
        return {
            "contexts": len(self.lines),
            "open": sum(line.signal is not None for line in self.lines.values()),
            "closed": sum(line.closed for line in self.lines.values()),
            "pnlPercent": round(sum(line.pnl_percent for line in self.lines.values()), 6),
            "commits": self.commits,
        }

    def footer(self) -> str:
        """Return the last line of the table."""
        age = self.commit_age_seconds
        done = self.summary()
        return (
            f"{done['open']} open, {done['closed']} closed, PnL {percent(done['pnlPercent'])}; "
            f"{self.commits} commits" + ("" if age is None else f", the last one {age:.1f} s ago") + self._at_stake()
        )

    def stake(self) -> dict[str, Any]:
        """Return what is at risk and how the store is doing, as plain values."""
        runs, age = self.at_risk(), self.commit_age_seconds
        notional = [one.notional for one in runs if one.signal_id is not None and one.notional is not None]
        return {
            "open": sum(one.signal_id is not None for one in runs),
            "notional": round(sum(notional), 6) if notional else None,
            "commitAgeSeconds": None if age is None else round(age, 1),
            "unsaved": sum(one.unsaved for one in runs),
        }

    @property
    def is_troubled(self) -> bool:
        """Whether the mode of a run is not the normal one."""
        return any(one.why for one in self.at_risk())

    def _at_stake(self) -> str:
        """Return what is at risk where quantities are known, and what a store in trouble leaves to do."""
        runs = self.at_risk()
        said = ""
        notional = [one.notional for one in runs if one.signal_id is not None and one.notional is not None]
        if notional:
            said = f"; {number(sum(notional))} at risk"
        if troubled := [one for one in runs if one.why]:
            said += f"; {troubled[0].mode}: {troubled[0].why}"
        if unsaved := sum(one.unsaved for one in runs):
            said += f"; {unsaved} in the emergency journal"
        return said


def draw(board: Board) -> Group:
    """Draw the board as a table of ``rich``."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=board.title, title_justify="left", title_style="bold", header_style="dim", expand=True)
    for name, side in (("context", "left"), ("candle", "left"), ("price", "right"), ("open signal", "left")):
        table.add_column(name, justify="right" if side == "right" else "left", no_wrap=name != "open signal")
    table.add_column("way", justify="right")
    table.add_column("trades", justify="right")
    table.add_column("PnL", justify="right", no_wrap=True)
    for context, line in board.lines.items():
        table.add_row(
            Text(visible(str(context))),
            moment(line.at_ms)[5:],
            number(line.price),
            _signal_text(line),
            Text(f"{line.percent:+.0f} %", "green" if line.percent >= 0 else "red")
            if line.signal
            else Text("-", "dim"),
            str(line.closed),
            Text(percent(line.pnl_percent), "green" if line.pnl_percent >= 0 else "red"),
        )
    parts: list[Any] = [table]
    for event in board.recent:
        colour = _COLOURS.get(event.kind, "white")
        if event.kind == "closed":
            colour = "bold green" if (event.pnl_percent or 0) >= 0 else "bold red"
        text = Text.assemble(
            (f"{moment(event.at_ms)}  ", "dim"), visible(f"{event.signal.symbol}  "), (visible(sentence(event)), colour)
        )
        text.no_wrap, text.overflow = True, "ellipsis"
        parts.append(text)
    parts += [Text(failure, "bold red", no_wrap=True, overflow="ellipsis") for failure in board.failures]
    parts.append(Text(board.footer(), "dim"))
    return Group(*parts)


def _signal_text(line: Line) -> Any:
    from rich.text import Text

    signal = line.signal or line.waiting
    if signal is None:
        return Text(line.ended or "-", "dim")
    side = "bold green" if signal.position == "long" else "bold magenta"
    what = "" if line.signal else "waits for "
    aims = f" → {number(signal.price_take_profit)} | {number(signal.price_stop_loss)}"
    return Text.assemble((f"{signal.position} ", side), what, number(signal.price_open), (aims, "dim"))


class PlainScreen:
    """One line for each event; with ``json``, one JSON object for each."""

    def __init__(self, board: Board, *, json: bool) -> None:
        self._board, self._json = board, json
        self._stated_at = -math.inf
        self._failures: dict[str, tuple[float, int]] = {}
        """When each was told, and how often it came since."""
        if not json:
            self._write(board.title)

    def show(self, event: Event) -> None:
        """Write an event."""
        if self._json:
            self._write(msgspec.json.encode({"event": to_mapping(event)}).decode())
        else:
            self._write(visible(f"{moment(event.at_ms)}  {event.signal.context}  {sentence(event)}"))

    def fail(self, text: str) -> None:
        """Tell of a failure, on standard error; one that goes on (a full disk, say) once a minute, with a count."""
        now = time.monotonic()
        told_at, again = self._failures.get(text, (-math.inf, 0))
        if now - told_at < _SAME_FAILURE_SECONDS:
            self._failures[text] = (told_at, again + 1)
            return
        self._failures[text] = (now, 0)
        print(f"holdfast: {visible(text)}" + _times(again), file=sys.stderr, flush=True)

    def tell_mode(self, change: ModeChange) -> None:
        """Tell of another mode, every time, with what is at risk."""
        self._stated_at = time.monotonic()
        if self._json:
            plain = {"before": change.before, "after": change.after, "why": change.why, **self._board.stake()}
            self._write(msgspec.json.encode({"mode": plain}).decode())
        else:
            said, stake = describe_mode(change), self._board.footer()
            told = stake if said in stake else f"{said}; {stake}"
            print(f"holdfast: {visible(told)}", file=sys.stderr, flush=True)

    def tell_trouble(self, trouble: Trouble) -> None:
        """Tell of what somebody should look at."""
        if self._json:
            context = None if trouble.context is None else str(trouble.context)
            plain = {"kind": trouble.kind, "context": context, "why": trouble.why}
            self._write(msgspec.json.encode({"trouble": plain}).decode())
        else:
            self.fail(describe_trouble(trouble))

    def redraw(self) -> None:
        """While the store is in trouble, say now and then what is at risk; every other line was written at once."""
        if self._board.is_troubled and time.monotonic() - self._stated_at >= _STATED_SECONDS:
            self._stated_at = time.monotonic()
            if self._json:
                self._write(msgspec.json.encode({"status": self._board.stake()}).decode())
            else:
                print(f"holdfast: {visible(self._board.footer())}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Write how it ended."""
        for text, (_, again) in self._failures.items():
            if again:
                print(f"holdfast: {visible(text)}" + _times(again), file=sys.stderr, flush=True)
        if self._json:
            self._write(msgspec.json.encode({"summary": self._board.summary()}).decode())
        else:
            self._write(self._board.footer())

    def _write(self, text: str) -> None:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            # Whoever read our lines is gone (``| head``). That is no reason to leave positions unwatched.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.fail("nobody reads standard output any more; the run goes on without it")


class LiveScreen:
    """A table that is drawn again and again, with ``rich``."""

    def __init__(self, board: Board) -> None:
        from rich.live import Live

        self._board = board
        # No thread of its own: the run redraws it, so a table never shows half of a change.
        self._live = Live(draw(board), auto_refresh=False, transient=False)
        self._live.start(refresh=True)

    def show(self, event: Event) -> None:
        """Nothing to do: the next drawing shows it."""

    def fail(self, text: str) -> None:
        """Keep a failure for the next drawing, each once."""
        if text in self._board.failures:
            self._board.failures.remove(text)
        self._board.failures.append(text)

    def tell_mode(self, change: ModeChange) -> None:
        """Keep it for the next drawing, whose last line says what is at risk."""
        self.fail(describe_mode(change))

    def tell_trouble(self, trouble: Trouble) -> None:
        """Keep it for the next drawing."""
        self.fail(describe_trouble(trouble))

    def redraw(self) -> None:
        """Draw the table again."""
        self._live.update(draw(self._board), refresh=True)

    def close(self) -> None:
        """Draw it for the last time."""
        self.redraw()
        self._live.stop()


def _times(again: int) -> str:
    return f" ({again} more time{'s' if again != 1 else ''})" if again else ""


def describe_mode(change: ModeChange) -> str:
    """Return one line for what may still be done."""
    return f"{change.after}: {change.why}" if change.why else f"{change.after}: the store answers again"


def describe_trouble(trouble: Trouble) -> str:
    """Return one line for what somebody should look at."""
    return f"{trouble.kind}, {trouble.context}: {trouble.why}" if trouble.context else f"{trouble.kind}: {trouble.why}"


def describe(failure: Failure) -> str:
    """Return one line for what went wrong while running."""
    where = f"{failure.where}, {failure.context}" if failure.context else failure.where
    place = own_place(failure.error)
    return f"{where}: {type(failure.error).__name__}: {failure.error}" + (f" ({place})" if place else "")
