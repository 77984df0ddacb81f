"""What a server's settings promise: read from INFO, ROLE and CONFIG GET, then judged by one pure function."""

from __future__ import annotations

from typing import Any

import msgspec

from ...contract import Guarantees, How, Survives
from ...errors import InvalidInputError, UnavailableError, UnsafeSettingError
from .address import Address
from .link import Link, Refusal, packed

_SETTINGS = ("appendonly", "appendfsync", "no-appendfsync-on-rewrite", "maxmemory-policy")


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a server tells of itself; None where it does not tell."""

    role: str | None = None
    """``master`` or ``slave``, as the server spells it."""
    replicas: int | None = None
    """How many are connected."""
    appendonly: bool | None = None
    appendfsync: str | None = None
    no_fsync_on_rewrite: bool | None = None
    maxmemory_policy: str | None = None
    settings_told: bool = True
    """CONFIG GET was answered."""
    role_allowed: bool = True
    waits_for_fsync: bool = False
    """It has WAITAOF (Valkey, Redis 7.2 and newer)."""
    clustered: bool | None = None
    last_write_ok: bool = True


class Barrier(msgspec.Struct, frozen=True):
    """How many copies must have a commit before it is acknowledged, and by which command that is found out."""

    local: int = 0
    replicas: int = 0
    by_fsync: bool = False

    def commands(self, timeout_ms: int) -> list[bytes]:
        """Return what to send after the commits; nothing where the answers themselves are all there is."""
        if self.by_fsync and self.replicas:
            timeout_ms = max(1, timeout_ms // 2)  # each of the two may take it
        commands = [packed("WAIT", self.replicas, timeout_ms)] if self.replicas else []
        if self.by_fsync and (self.local or self.replicas):
            # After WAIT, although it says more: a replica that is asked in the same breath answers before its fsync,
            # and then not again for a second.
            commands.append(packed("WAITAOF", self.local, self.replicas, timeout_ms))
        return commands

    def lacking(self, answers: list[Any]) -> str:
        """Tell what the barrier's answers lack; empty if enough copies have it."""
        for answer in answers:
            if isinstance(answer, Refusal):
                if "appendonly" in answer.text:
                    return "appendonly was switched off while we ran: set it to yes"
                return f"the wait for it was refused ({answer.code})"
            local, replicas = answer if isinstance(answer, list) else (self.local, answer)
            if local < self.local:
                return "its disk has not confirmed it in time"
            if replicas < self.replicas:
                return f"{replicas} of {self.replicas} replicas have confirmed it in time"
        return ""


class Attestation(msgspec.Struct, frozen=True):
    """What holds on one server."""

    guarantees: Guarantees
    barrier: Barrier
    role_allowed: bool


async def facts(link: Link, deadline: float) -> Facts:
    """Ask a server about itself.

    Raises:
        LinkLostError: The connection was lost.
        UnavailableError: It cannot be used now, such as while it loads its data.
    """
    info, role, waitaof, *settings = await link.ask(
        packed("INFO"),
        packed("ROLE"),
        packed("WAITAOF", 0, 0, 1),
        *(packed("CONFIG", "GET", name) for name in _SETTINGS),
        deadline=deadline,
    )
    for answer in (info, role):
        if isinstance(answer, Refusal) and answer.code not in ("NOPERM", "ERR"):
            raise answer
    told = {} if isinstance(info, Refusal) else _info(info)
    found = [None if isinstance(pair, Refusal) or len(pair) < 2 else pair[1].decode() for pair in settings]
    appendonly, appendfsync, on_rewrite, policy = found
    enabled = appendonly == "yes" if appendonly is not None else _flag(told.get("aof_enabled"))
    return Facts(
        role=told.get("role") if isinstance(role, Refusal) else role[0].decode(),
        replicas=int(told["connected_slaves"]) if "connected_slaves" in told else None,
        appendonly=enabled,
        appendfsync=appendfsync,
        no_fsync_on_rewrite=None if on_rewrite is None else on_rewrite == "yes",
        maxmemory_policy=policy or told.get("maxmemory_policy"),
        settings_told=appendfsync is not None,
        role_allowed=not isinstance(role, Refusal),
        waits_for_fsync=not isinstance(waitaof, Refusal),
        clustered=_flag(told.get("cluster_enabled")),
        last_write_ok=told.get("aof_last_write_status", "ok") == "ok",
    )


def _info(text: bytes) -> dict[str, str]:
    lines = text.decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _flag(text: str | None) -> bool | None:
    return None if text is None else text == "1"


def judge(found: Facts, address: Address) -> Attestation:
    """Return what a commit on this server survives, and how that is waited for.

    Raises:
        UnsafeSettingError: A setting would void any promise; the message names it.
        InvalidInputError: The URL's scheme does not fit the server.
        UnavailableError: Its disk refuses writes now.
    """
    shown = address.shown
    _refuse(found, address)
    warnings: list[str] = []
    local, how = _local(found, warnings)
    survives = local
    connected = found.replicas or 0
    if address.replicas:
        if local >= Survives.HOST:
            survives = Survives.SERVER
        else:
            warnings.append(
                f"replicas={address.replicas} is waited for, but a primary that restarts with less than it had takes "
                "it from its replicas too: set appendonly yes and appendfsync always"
            )
        if connected > address.replicas:
            how = min(how, How.ASSUMED, key=_STRENGTH.index)
            warnings.append(
                f"{address.replicas} of {connected} replicas are waited for: after a failover to another one, commits "
                f"may be missing: ask for replicas={connected}"
            )
        if not found.waits_for_fsync:
            warnings.append("this server has no WAITAOF: replicas confirm that they received a commit, not its fsync")
    elif connected or address.kind == "sentinel":
        # A plain URL may well be one that Sentinels or a service move; only the user can know.
        if address.kind != "single":
            survives = min(survives, Survives.PROCESS)
        else:
            how = min(how, How.ASSUMED, key=_STRENGTH.index)
        warnings.append("replicas are not waited for: a failover may lose acknowledged commits: add replicas=1")
    guarantees = Guarantees(
        backend=shown,
        survives=survives,
        survives_how=how,
        atomic=True,
        atomic_how=How.ASSUMED,  # one script, one MULTI in the append-only file: as documented
        fenced=True,
        fenced_how=How.ASSUMED,  # until the probe has seen a wrong version refused
        shared=True,
        warnings=tuple(warnings),
    )
    fsync = found.waits_for_fsync and local >= Survives.HOST
    barrier = Barrier(
        local=int(fsync), replicas=address.replicas, by_fsync=fsync or (found.waits_for_fsync and address.replicas > 0)
    )
    return Attestation(guarantees, barrier, found.role_allowed)


_STRENGTH = [How.UNKNOWN, How.ASSUMED, How.ATTESTED]


def _refuse(found: Facts, address: Address) -> None:
    shown = address.shown
    if found.role not in ("master", None):
        raise UnsafeSettingError(
            f"{shown} is a replica ({found.role}): what it is told is lost; give the primary, or redis+sentinel://",
            backend=shown,
        )
    if (found.maxmemory_policy or "").startswith("allkeys-"):
        raise UnsafeSettingError(
            f"{shown} throws rows away when memory is short: set maxmemory-policy to noeviction "
            f"(it is {found.maxmemory_policy})",
            backend=shown,
        )
    if found.clustered and address.kind != "cluster":
        raise InvalidInputError(f"{shown} is a node of a cluster: use redis+cluster://", backend=shown)
    if not found.last_write_ok:
        raise UnavailableError(
            f"{shown} could not write its append-only file (aof_last_write_status): look into its disk", backend=shown
        )


def _local(found: Facts, warnings: list[str]) -> tuple[Survives, How]:
    """Return what the server's own disk promises."""
    if found.appendonly is False:
        warnings.append(
            "this server keeps rows in memory only, its restart loses all: set appendonly yes, appendfsync always"
        )
        return Survives.NOTHING, How.ATTESTED
    if not found.settings_told:
        if found.appendonly and found.waits_for_fsync:
            # Every commit is confirmed by WAITAOF itself; that reads are as durable is not known without appendfsync.
            warnings.append(
                "CONFIG GET is not permitted: each commit waits for its fsync, appendfsync could not be checked"
            )
            return Survives.HOST, How.ASSUMED
        warnings.append(
            "CONFIG GET is not permitted, so nothing is known of appendonly and appendfsync: permit CONFIG|GET, or ask "
            "the one who runs this server"
        )
        return Survives.PROCESS, How.UNKNOWN
    if found.appendfsync != "always":
        last = "the last second of" if found.appendfsync == "everysec" else "the last half minute, or more, of"
        warnings.append(
            f"appendfsync is {found.appendfsync}: a power cut of the server loses {last} acknowledged commits: "
            "set appendfsync always"
        )
        return Survives.PROCESS, How.ATTESTED
    if found.no_fsync_on_rewrite and found.waits_for_fsync:
        warnings.append(
            "no-appendfsync-on-rewrite is yes: while the server rewrites its file, commits wait for its end, and "
            "reads may be ahead of the disk: set it to no"
        )
        return Survives.HOST, How.ASSUMED
    if found.no_fsync_on_rewrite:
        warnings.append(
            "no-appendfsync-on-rewrite is yes: while the server rewrites its file, a power cut loses acknowledged "
            "commits: set it to no"
        )
        return Survives.PROCESS, How.ATTESTED
    return Survives.HOST, How.ATTESTED


async def attest(link: Link, address: Address, deadline: float) -> Attestation:
    """Ask the server behind a link, and judge it.

    Raises:
        LinkLostError: The connection was lost.
        UnsafeSettingError, InvalidInputError, UnavailableError: See :func:`judge`.
    """
    return judge(await facts(link, deadline), address)
