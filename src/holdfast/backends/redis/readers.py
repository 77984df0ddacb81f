"""Connections for reads: a few for each primary, lent out one exchange at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ...errors import UnavailableError
from .address import Address
from .lane import LOOK_ANEW
from .link import Link, LinkLostError, Refusal, UnreachableError, refusal
from .topology import Topology

MAX_READS = 4
"""How many reads are in flight at once; others wait for their turn."""
_MAX_MOVES = 5


class Readers:
    """Asks the primary of a scope; connects when it must.

    Args:
        address: Whose name errors carry.
        topology: Knows the primaries.
        connect: Makes an attested connection to the primary of a hash tag, by a deadline.
    """

    def __init__(self, address: Address, topology: Topology, connect: Callable[[str, float], Awaitable[Link]]) -> None:
        self._shown = address.shown
        self._by_host = address.kind == "cluster"
        self._topology = topology
        self._connect = connect
        self._turns = asyncio.Semaphore(MAX_READS)
        self._idle: dict[str, list[Link]] = {}
        self._closed = False

    async def ask(self, tag: str, commands: list[bytes], deadline: float) -> list[Any]:
        """Send commands to the tag's primary, and return their answers.

        Raises:
            UnavailableError: Not reached, or no answer by the deadline.
            HoldfastError: What the server's refusal means.
        """
        try:
            async with asyncio.timeout_at(deadline):
                await self._turns.acquire()
        except TimeoutError:
            raise self._unavailable("no answer in time") from None
        try:
            for _ in range(_MAX_MOVES):
                answers = await self._once(tag, commands, deadline)
                refused = first_refusal(answers)
                if refused is None:
                    return answers
                if refused.code in LOOK_ANEW:
                    await self.look_anew()
                if refused.code != "MOVED":
                    break
            assert refused is not None
            raise refused.mapped(self._shown)
        except (UnreachableError, LinkLostError) as error:
            self._topology.forget()
            raise self._unavailable(str(error)) from None
        except Refusal as refused:
            raise refused.mapped(self._shown) from None
        finally:
            self._turns.release()

    async def look_anew(self) -> None:
        """Forget the primary and the connections to it: it turned out to be none."""
        self._topology.forget()
        await self._close_idle()

    async def close(self) -> None:
        """Close what is idle now, and what is in use as soon as it is given back."""
        self._closed = True
        await self._close_idle()

    async def _close_idle(self) -> None:
        links = [link for links in self._idle.values() for link in links]
        self._idle.clear()
        for link in links:
            await link.close()

    async def _once(self, tag: str, commands: list[bytes], deadline: float) -> list[Any]:
        place = str(await self._topology.find(tag, deadline)) if self._by_host else ""
        idle = self._idle.setdefault(place, [])
        link = None
        while idle and link is None:
            link = idle.pop()
            if link.stale:
                await link.close()
                link = None
        if link is None:
            link = await self._connect(tag, deadline)
        answers = await link.ask(*commands, deadline=deadline)
        if self._closed:
            await link.close()
        else:
            self._idle.setdefault(place, []).append(link)
        return answers

    def _unavailable(self, why: str) -> UnavailableError:
        return UnavailableError(f"{self._shown}: {why}", backend=self._shown)


def first_refusal(answers: list[Any]) -> Refusal | None:
    """Return the first answer "no", also one within a transaction's answers; its reason rather than its abortion."""
    found = None
    for answer in answers:
        if isinstance(answer, Refusal):
            if answer.code != "EXECABORT":
                return answer
            found = answer
        elif isinstance(answer, list):
            for part in answer:
                if isinstance(part, Exception):
                    return refusal(part)
    return found
