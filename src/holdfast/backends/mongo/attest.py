"""What a server really promises: read from its own answers, probed where it can be, judged by one pure function.

Nothing here writes: the probes are updates that match no document. A server checks and waits for their write concern
all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from ...contract import Guarantees, How, Survives
from ...errors import HoldfastError, UnavailableError, UnsafeSettingError
from .link import UNAUTHORIZED, Link, RefusedError

_IMPOSSIBLE_COPIES = 50
"""More members than any set has that votes; the largest number that a server takes for one."""
_NOWHERE = "~nowhere"


class Member(msgspec.Struct, frozen=True):
    """One voting member of a replica set."""

    host: str
    """The machine's name, without the port."""
    holds_data: bool


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a server tells of itself; None where it does not tell."""

    writable: bool | None = None
    """It is a primary, or stands alone."""
    set_name: str = ""
    router: bool = False
    """It is a mongos: what lies behind it is not seen."""
    members: tuple[Member, ...] | None = None
    """Who votes; from the set's configuration where that may be read, else those that ``hello`` names."""
    members_told: bool = False
    """``members`` is from the configuration."""
    journal_default: bool | None = None
    """``writeConcernMajorityJournalDefault`` of the set."""
    persistent: bool | None = None
    """Its storage engine keeps data on a disk."""
    journal: bool | None = None
    """``storage.journal.enabled`` or ``nojournal`` among its options, where they are set."""
    impossible_refused: bool | None = None
    """A write that 50 copies must confirm was refused, as it must be; None: it may not be asked."""
    journaled_taken: bool | None = None
    """A write with ``j: true`` was not refused, as a server without a journal does."""
    majority_confirms: bool | None = None
    """A majority has confirmed such a write."""
    max_document_bytes: int = 16 * 1024 * 1024


class Attestation(msgspec.Struct, frozen=True):
    """What holds, and how reads have to be made so that they return nothing less durable."""

    guarantees: Guarantees
    read_level: str
    """The read concern."""
    confirms_reads: bool
    """What is ahead of what this process knows to be durable is made so before it is returned."""
    max_document_bytes: int


async def facts(link: Link, deadline: float) -> Facts:
    """Ask a server about itself.

    Raises:
        UnavailableError: No primary can be reached.
    """
    try:
        hello = await link.ask({"hello": 1}, deadline, admin=True)
    except RefusedError as refused:
        raise link.mapped(refused) from None
    set_name = str(hello.get("setName") or "")
    told = await _told(link, {"replSetGetConfig": 1}, deadline) if set_name else {}
    status = await _told(link, {"serverStatus": 1, "metrics": 0, "locks": 0, "wiredTiger": 0}, deadline)
    options = await _told(link, {"getCmdLineOpts": 1}, deadline)
    config = told.get("config")
    configured = isinstance(config, dict) and isinstance(config.get("members"), list)
    writable = hello.get("isWritablePrimary", hello.get("ismaster"))
    keeps, taken, confirmed = None, None, None
    if writable:
        keeps = await _impossible_refused(link, deadline)
        taken, confirmed = await _journaled(link, deadline)
    return Facts(
        writable=None if writable is None else bool(writable),
        set_name=set_name,
        router=hello.get("msg") == "isdbgrid",
        members=_members(config) if configured and isinstance(config, dict) else _named(hello) if set_name else None,
        members_told=configured,
        journal_default=_flag(config, "writeConcernMajorityJournalDefault") if configured else None,
        persistent=_flag(status.get("storageEngine"), "persistent"),
        journal=_journal(options),
        impossible_refused=keeps,
        journaled_taken=taken,
        majority_confirms=confirmed,
        max_document_bytes=int(hello.get("maxBsonObjectSize", 16 * 1024 * 1024)),
    )


async def _told(link: Link, command: dict[str, Any], deadline: float) -> dict[str, Any]:
    """Return the answer to a question that a user may not be allowed, or a server may not know; else nothing."""
    try:
        return await link.ask(command, deadline, admin=True)
    except RefusedError:
        return {}


def _flag(found: object, name: str) -> bool | None:
    value = found.get(name) if isinstance(found, dict) else None
    return value if isinstance(value, bool) else None


def _journal(options: dict[str, Any]) -> bool | None:
    found = options.get("parsed")
    for name in ("storage", "journal"):
        found = found.get(name) if isinstance(found, dict) else None
    enabled = _flag(found, "enabled")
    argv = options.get("argv")
    return False if isinstance(argv, list) and "--nojournal" in argv else enabled


def _members(config: dict[str, Any]) -> tuple[Member, ...]:
    return tuple(
        Member(_machine(str(member.get("host"))), not member.get("arbiterOnly"))
        for member in config["members"]
        if member.get("votes", 1)
    )


def _named(hello: dict[str, Any]) -> tuple[Member, ...]:
    holding = [*hello.get("hosts", ()), *hello.get("passives", ())]
    return (
        *(Member(_machine(str(host)), True) for host in holding),
        *(Member(_machine(str(host)), False) for host in hello.get("arbiters", ())),
    )


def _machine(host: str) -> str:
    return host.rpartition(":")[0].lower() or host.lower()


async def _impossible_refused(link: Link, deadline: float) -> bool | None:
    """Ask for a write that 50 copies confirm: whoever says yes to that says yes to anything."""
    concern = {"w": _IMPOSSIBLE_COPIES, "wtimeout": 500}
    try:
        answer = await link.ask(_harmless(link, concern), deadline)
    except RefusedError as refused:
        return None if refused.code == UNAUTHORIZED else True
    return bool(answer.get("writeConcernError") or answer.get("writeErrors"))


async def _journaled(link: Link, deadline: float) -> tuple[bool | None, bool | None]:
    """Ask for a write with the concern of every commit; tell whether it is taken, and whether a majority confirms."""
    concern = {"w": "majority", "j": True, "wtimeout": 2000}
    try:
        answer = await link.ask(_harmless(link, concern), deadline)
    except RefusedError as refused:
        return (None if refused.code == UNAUTHORIZED else False), None
    return True, not (answer.get("writeConcernError") or answer.get("writeErrors"))


def _harmless(link: Link, concern: dict[str, Any]) -> dict[str, Any]:
    update = {"q": {"_id": _NOWHERE}, "u": {"$set": {"n": 1}}}
    return {"update": link.collection, "updates": [update], "writeConcern": concern}


def judge(found: Facts, shown: str) -> Attestation:
    """Return what a commit on this server survives.

    Raises:
        UnsafeSettingError: What it does would void any promise; the message names it.
        UnavailableError: A majority does not confirm now.
    """
    wrong = _wrong(found, shown)
    if wrong is not None:
        raise wrong
    warnings: list[str] = []
    survives, how = _survives(found, warnings)
    if found.impossible_refused is None:
        how = _weaker(how, How.ASSUMED)
        warnings.append("this user may not write, so whether write concerns are kept was not probed: grant readWrite")
    members = found.members or ()
    distributed = found.router or sum(member.holds_data for member in members) > 1
    if found.journal_default is False:
        warnings.append(
            "writeConcernMajorityJournalDefault is false: each commit of ours asks for the journal itself; whatever "
            "else is written does not"
        )
    return Attestation(
        Guarantees(
            backend=shown,
            survives=survives,
            survives_how=how,
            atomic=True,
            atomic_how=How.ASSUMED,  # one update of one document: as documented
            fenced=True,
            fenced_how=How.ASSUMED,  # until the probe has seen that one of several updates wins
            shared=True,
            warnings=tuple(warnings),
        ),
        read_level="linearizable" if distributed else "local",
        confirms_reads=not distributed or found.journal_default is not True,
        max_document_bytes=found.max_document_bytes,
    )


def _wrong(found: Facts, shown: str) -> HoldfastError | None:
    if not found.writable:
        return UnsafeSettingError(
            f"{shown} is a secondary, or has no primary: what it shows may be old, and it takes no commits; give the "
            "whole set's hosts, with replicaSet= and without directConnection=",
            backend=shown,
        )
    if found.impossible_refused is False and len(found.members or ()) < _IMPOSSIBLE_COPIES:
        return UnsafeSettingError(
            f"{shown} confirms a write that {_IMPOSSIBLE_COPIES} copies must have, though it has not so many: nothing "
            "that it confirms can be relied on; use a MongoDB server that keeps write concerns",
            backend=shown,
        )
    if found.journal is False or found.journaled_taken is False:
        return UnsafeSettingError(
            f"{shown} does not take writes with j:true: start it with its journal (without --nojournal)", backend=shown
        )
    if found.majority_confirms is False:
        return UnavailableError(
            f"{shown}: a majority of its members does not confirm writes now: start those that are missing",
            backend=shown,
        )
    return None


def _survives(found: Facts, warnings: list[str]) -> tuple[Survives, How]:
    if found.persistent is False:
        warnings.append("its storage engine keeps nothing on a disk: start it with storage.engine: wiredTiger")
        return Survives.NOTHING, How.ATTESTED
    how = How.ATTESTED
    if found.persistent is None or found.journaled_taken is None:
        how = How.ASSUMED
    if found.persistent is None:
        warnings.append("it does not tell its storage engine: grant the role clusterMonitor, or look at serverStatus")
    if found.router:
        warnings.append("it is a mongos: its shards' members were not seen; each should be a set of three")
        return Survives.HOST, How.ASSUMED
    if found.members is None:
        warnings.append("it stands alone: a lost machine takes the store with it; use a replica set of three members")
        return Survives.HOST, how
    if not _survives_a_machine(found.members, warnings):
        return Survives.HOST, how
    if not found.members_told:
        how = _weaker(how, How.ASSUMED)
        warnings.append(
            "who votes was taken from what the set shows of itself: grant the role clusterMonitor, so that its "
            "configuration can be read"
        )
    return Survives.SERVER, how


def _survives_a_machine(members: Sequence[Member], warnings: list[str]) -> bool:
    """Tell whether what a majority has is still there, and found by an election, when any one machine is lost."""
    holding = [member for member in members if member.holds_data]
    copies = min(len(members) // 2 + 1, len(holding))
    most_on_one = max(Counter(member.host for member in holding).values(), default=0)
    if len(members) < 3 or copies < 2:
        warnings.append(
            f"the set has {len(holding)} of the 3 members that it takes to survive the loss of one: add some"
        )
        return False
    if most_on_one >= copies:
        warnings.append("too many of its members lie on one machine: spread them, so that one loss leaves a copy")
        return False
    if len(holding) < 3:
        warnings.append(
            "with an arbiter in place of a third copy, commits stop while one of the two is away: add a member with "
            "data"
        )
    return True


_STRENGTH = [How.UNKNOWN, How.ASSUMED, How.ATTESTED]


def _weaker(one: How, other: How) -> How:
    return min(one, other, key=_STRENGTH.index)
