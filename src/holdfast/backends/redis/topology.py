"""Which server is the one to write a scope to: a fixed one, the one the Sentinels name, or the slot's owner."""

from __future__ import annotations

import asyncio
from binascii import crc_hqx
from typing import Any, Protocol

from ...errors import InvalidInputError
from .address import Address
from .link import Link, LinkLostError, Refusal, UnreachableError, packed

Host = tuple[str, int]

_SLOTS = 16384


class Topology(Protocol):
    """Finds the primary."""

    async def find(self, tag: str, deadline: float) -> Host:
        """Return the primary for the keys with this hash tag.

        Raises:
            UnreachableError: Nobody knows one, or not within the deadline.
        """

    async def primaries(self, deadline: float) -> list[Host]:
        """Return all primaries."""

    def forget(self) -> None:
        """Ask anew next time: what was known turned out wrong."""


class Single:
    """One server whose place never changes."""

    def __init__(self, address: Address) -> None:
        self._host = address.hosts[0]

    async def find(self, tag: str, deadline: float) -> Host:
        """Return the one."""
        return self._host

    async def primaries(self, deadline: float) -> list[Host]:
        """Return the one."""
        return [self._host]

    def forget(self) -> None:
        """Nothing is remembered."""


async def _ask_any(address: Address, hosts: list[Host], command: bytes, deadline: float, *, sentinel: bool) -> Any:
    """Return the first usable answer of the hosts, asked one after the other, each with its share of the time."""
    reasons = []
    loop = asyncio.get_running_loop()
    for left, (host, port) in enumerate(hosts):
        now = loop.time()
        link = Link(address, host, port, sentinel=sentinel)
        share = now + (deadline - now) / (len(hosts) - left)
        try:
            await link.connect(share)
            (answer,) = await link.ask(command, deadline=share)
        except (UnreachableError, LinkLostError, Refusal) as error:
            reasons.append(f"{host}:{port} {error}")
            continue
        finally:
            await link.close()
        if isinstance(answer, Refusal) and "cluster support disabled" in answer.text:
            raise InvalidInputError(f"{address.shown} is not a cluster: use redis://", backend=address.shown)
        if answer and not isinstance(answer, Refusal):
            return answer
        reasons.append(f"{host}:{port} does not know")
    raise UnreachableError("; ".join(reasons)[:500])


class Sentinels:
    """The Sentinels tell; asked whenever a new connection is made, so that a failover is followed."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._hosts = list(address.hosts)

    async def find(self, tag: str, deadline: float) -> Host:
        """Ask the Sentinels, first the one that answered last."""
        command = packed("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._address.service)
        host, port = await _ask_any(self._address, self._hosts, command, deadline, sentinel=True)
        return host.decode(), int(port)

    async def primaries(self, deadline: float) -> list[Host]:
        """Return the one that the Sentinels name."""
        return [await self.find("", deadline)]

    def forget(self) -> None:
        """Begin with another Sentinel next time: this one may be cut off with the old primary."""
        self._hosts.append(self._hosts.pop(0))


class Cluster:
    """The cluster's nodes tell who owns which slots; remembered until one of them says that it moved."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._hosts = list(address.hosts)
        self._ranges: list[tuple[int, int, Host]] = []

    async def find(self, tag: str, deadline: float) -> Host:
        """Return the owner of the tag's slot."""
        await self._learn(deadline)
        slot = crc_hqx(tag.encode(), 0) % _SLOTS
        for first, last, host in self._ranges:
            if first <= slot <= last:
                return host
        self.forget()
        raise UnreachableError(f"no node of the cluster owns slot {slot}")

    async def primaries(self, deadline: float) -> list[Host]:
        """Return the owners of all slots."""
        await self._learn(deadline)
        return list(dict.fromkeys(host for _, _, host in self._ranges))

    def forget(self) -> None:
        """Ask for the slots anew."""
        self._ranges = []

    async def _learn(self, deadline: float) -> None:
        if self._ranges:
            return
        command = packed("CLUSTER", "SLOTS")
        answer = await _ask_any(self._address, self._hosts, command, deadline, sentinel=False)
        seed = self._hosts[0][0]
        self._ranges = [(first, last, (owner[0].decode() or seed, owner[1])) for first, last, owner, *_ in answer]
        known = dict.fromkeys([*(host for _, _, host in self._ranges), *self._address.hosts])
        self._hosts = list(known)


def topology(address: Address) -> Topology:
    """Return the finder for a kind of address."""
    if address.kind == "sentinel":
        return Sentinels(address)
    return Cluster(address) if address.kind == "cluster" else Single(address)
