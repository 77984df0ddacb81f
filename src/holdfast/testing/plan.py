"""What to torture and how much, which steps there are, and what a round showed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec

from ..contract import Key
from ..rows import Outage

FIRST_STEPS = 30
"""Steps from the start of a process: all of its opening and recovery."""
PHASE_STEPS = 4
"""Steps from the beginning of a commit: its own two, and what follows."""
ORDER_PHASES = ("ordering", "submitting")
"""Besides, of a bot with a broker: an answer is put on record, an order is sent."""
PHASES = (
    "recovering",
    "opening",
    "scheduling",
    "activating",
    "partial",
    "closing",
    "cancelled",
    "rejected",
    "delivering",
)


class Plan(msgspec.Struct, kw_only=True):
    """What to torture, and how much."""

    bot: str
    kills: int
    seed: int = 1
    steps: bool = False
    """First kill at every numbered step, besides the random kills."""
    server_kills: int = 0
    """How often the server is killed while the bot serves; needs :func:`~holdfast.testing.torture.torture`'s hook."""
    work: str
    """Directory for the logs and the result of each round, and for the stores where ``store`` names none."""
    store: str = ""
    """A store beside which each run gets a place of its own; empty for files under ``work``. May hold a password."""
    time_cap_seconds: float = 0.0
    """Begin no round after so many seconds; 0 for no cap."""
    market: Callable[[int], Sequence[str]]
    """Arguments of the market server for a seed."""
    waits: bool = True
    """The market waits for its participants, so that a killed run misses nothing of it."""
    expected: Callable[[int, Mapping[str, Sequence[Outage]]], Awaitable[dict[Key, bytes]]] | None = None
    """For a market that does not wait: what must be stored at its end, by seed and recorded outages."""
    run_seconds: float = 1.0
    """For a market that does not wait: how long it takes."""
    orders: bool = False
    """The bot trades at a paper venue that loses answers and requests."""
    takeovers: int = 0
    """How often a second process waits when the first is killed; needs a store that processes share."""
    pauses: int = 0
    """How often the first is not killed but stopped past its lease, replaced, and woken."""
    lease_seconds: float = 1.0
    """Of both."""
    shares_limits: bool = False
    """Contexts of the bot share risk profiles: who asks first decides, and after a take-over that is another order."""
    run: Sequence[str] = ()
    """More arguments for ``holdfast run``."""


class Round(msgspec.Struct, kw_only=True):
    """What one round, or several added up, showed."""

    seed: int = 0
    kills: int = 0
    server_kills: int = 0
    """How often the server was killed under a bot that went on by itself."""
    steps: list[str] = []
    """Numbered steps that were tried: killed there, or the market ended before it came."""
    during: dict[str, int] = {}
    """How many kills hit a process that was doing this."""
    lives: int = 0
    recoveries: int = 0
    """Restarts after a kill that came to serve again."""
    commits: int = 0
    """Acknowledged to the witness."""
    lost: list[str] = []
    duplicated: list[str] = []
    broken: list[str] = []
    """Invariants that did not hold, and runs that failed."""
    events_repeated: int = 0
    trades: int = 0
    twice_in_a_row: int = 0
    """Kills of a process that was still recovering from the one before."""
    order_kills: int = 0
    """Kills while an order was being sent, or an answer put on record."""
    orders: int = 0
    """That the venue took."""
    answers_lost: int = 0
    """Requests whose answer, or which themselves, were lost or late."""
    takeovers: int = 0
    """By a process that waited already when the one before was killed."""
    pauses: int = 0
    """Owners that were stopped past their lease, replaced and woken: each ended by itself."""
    blocked: int = 0
    """Owners that were stopped while they held a lock of the store's, so that nobody could replace them."""
    uncompared: int = 0
    """Rounds whose ledger cannot be that of one process: contexts that share limits were taken over one by one."""
    identical: bool = True
    differences: list[str] = []
    kept: list[str] = []
    """Names of places that were not removed: evidence, or out of reach."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing was lost, duplicated, broken or different."""
        return self.identical and not (self.lost or self.duplicated or self.broken)

    def __iadd__(self, other: Round) -> Round:
        during = Counter(self.during)
        during.update(other.during)
        self.during = dict(during)
        for name in ("kills", "server_kills", "steps", "lives", "recoveries", "commits", "lost", "duplicated",
                     "broken", "events_repeated", "trades", "twice_in_a_row", "order_kills", "orders",
                     "answers_lost", "takeovers", "pauses", "blocked", "uncompared", "differences", "kept",
                     "seconds"):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.identical = self.identical and other.identical
        return self


def numbered_steps(*, orders: bool = False) -> list[str]:
    """Return every numbered step: of the opening and recovery, and of a commit of each phase."""
    return [str(n) for n in range(1, FIRST_STEPS + 1)] + [
        f"{phase}:{n}" for phase in (*PHASES, *(ORDER_PHASES if orders else ())) for n in range(1, PHASE_STEPS + 1)
    ]
