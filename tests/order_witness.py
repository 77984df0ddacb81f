"""What a venue heard of processes that owned contexts one after the other, against what these put on record.

The venue is the witness: it knows when each request reached it, from which process, and what it made of it. All clocks
are one machine's ``CLOCK_MONOTONIC``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from owner_records import Commit, Records, Sending

from holdfast.brokers.paper_wire import Heard

_DUST = 1e-9


class Witness:
    """The rules that orders must keep.

    Args:
        records: Of every process.
        heard: Every submission that reached the venue, in the order in which they did.
        names: The entity name of the context that trades each symbol; no two trade one.
        quantity: Of each entry.
    """

    def __init__(self, records: Records, heard: Sequence[Heard], names: Mapping[str, str], quantity: float) -> None:
        self._records, self._heard, self._names, self._quantity = records, heard, names, quantity
        self._sent: dict[tuple[str, int, str], list[Sending]] = defaultdict(list)
        for name, those in records.sendings.items():
            for one in those:
                self._sent[name, one.pid, one.order].append(one)
        self.accepted = sum(_is_accepted(one) for one in heard)
        self.late_refused = 0
        """Requests of an owner that had been replaced, sent before it could know, and refused by the venue."""

    def wrong(self) -> list[str]:
        """Return how the venue contradicts that one owner after the other sent orders; empty if it does not."""
        self.late_refused = 0
        found = [
            f"{name}: process {one.pid} sent order {one.order} after it was told that it no longer owns the context"
            for name, those in self._records.sendings.items()
            for one in those
            if one.after_refusal
        ]
        found += [
            f"{name}: process {one.pid} decided on order {one.order} of epoch {one.epoch} in the time of a later owner"
            for name, those in self._records.sendings.items()
            for one in those
            if self._replaced(name, one.epoch, before=one.held_at)
        ]
        for one in self._heard:
            found += self._late(one)
        return [*found, *self._twice(), *self._too_much()]

    def _late(self, heard: Heard) -> Iterable[str]:
        """What reaches the venue in the time of a later owner was sent before, and is refused; or was waited for."""
        name, order = self._names[heard.request.symbol], heard.request.client_order_id
        sent = [one for one in self._sent[name, heard.sender, order] if one.at <= heard.at_seconds]
        if not sent:
            yield f"{name}: order {order} of process {heard.sender} reached the venue; no record says that it was sent"
            return
        epoch = sent[-1].epoch
        told = [at for at, pid in self._records.refusals[name] if pid == heard.sender and at <= heard.at_seconds]
        was_told = bool(told) and not any(
            one.taking and one.pid == heard.sender and one.at > told[-1] for one in self._owners(name, heard.at_seconds)
        )
        replaced = self._replaced(name, epoch, before=heard.at_seconds)
        if not (was_told or replaced):
            return
        if not _is_accepted(heard):
            self.late_refused += 1
            return
        if heard.at_ms >= heard.request.expires_at_ms:
            yield f"{name}: order {order} of epoch {epoch} was accepted after its expiry"
        new = [
            one
            for one in self._heard
            if one.request.symbol == heard.request.symbol and one.at_seconds < heard.at_seconds
            and any(s.epoch > epoch for s in self._sent[name, one.sender, one.request.client_order_id])
        ]  # fmt: skip
        if new:
            yield f"{name}: order {order} of epoch {epoch} was accepted after an order of the owner that came later"

    def _owners(self, name: str, before: float) -> list[Commit]:
        return [one for one in self._records.commits[name] if one.taking and one.at < before]

    def _replaced(self, name: str, epoch: int, *, before: float) -> bool:
        return any(one.epoch > epoch for one in self._owners(name, before))

    def _twice(self) -> Iterable[str]:
        taken: set[str] = set()
        for one in self._heard:
            order = one.request.client_order_id
            if _is_accepted(one):
                if order in taken:
                    yield f"order {order} was accepted twice"
                taken.add(order)

    def _too_much(self) -> Iterable[str]:
        """Each context has one position at a time: what its symbol holds is never more than one entry."""
        held: dict[str, float] = defaultdict(float)
        for one in self._heard:
            signed = one.report.filled_quantity * (1 if one.request.side == "buy" else -1)
            held[one.request.symbol] += signed
            if signed and abs(held[one.request.symbol]) > self._quantity + _DUST:
                yield f"{one.request.symbol}: {held[one.request.symbol]} is held after {one.request.client_order_id}"


def _is_accepted(heard: Heard) -> bool:
    return heard.report.state not in ("rejected", "expired")
