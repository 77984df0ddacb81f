"""One-line defects of the Redis backend, as (name, file under ``src/holdfast``, text, its replacement, pytest arguments).

``tests/mutants.py`` makes its ``Mutant`` of each.
"""

from __future__ import annotations

# ruff: noqa: E501

_CUTS = "tests/test_redis_cuts.py -k"
_SETTINGS = "tests/test_redis_settings.py -k"
_CRASHES = "tests/test_redis_crashes.py -k"
_PLAIN = "tests/test_redis.py -k"
_CONTRACT = "tests/test_conformance.py -k"

REDIS: list[tuple[str, str, str, str, str]] = [
    (
        "redis: expected versions are not compared",
        "backends/redis/script.py",
        "if #clashes > 0 then return {3, clashes} end\n",
        "",
        f"{_CONTRACT} 'expect and redis'",
    ),
    (
        "redis: a repeated op is applied again",
        "backends/redis/script.py",
        "  if was == n then\n",
        "  if false then\n",
        f"{_CONTRACT} 'repeated and redis'",
    ),
    (
        "redis: op numbers are compared as Lua numbers",
        "backends/redis/script.py",
        "if #was > #n or (#was == #n and was > n) then",
        "if tonumber(was) > tonumber(n) then",
        f"{_PLAIN} large_numbers",
    ),
    (
        "redis: a deleted row stays in the index",
        "backends/redis/script.py",
        "redis.call('ZREM', KEYS[4],",
        "redis.call('ZSCORE', KEYS[4],",
        f"{_CONTRACT} 'keys-come and redis'",
    ),
    (
        "redis: the index is written after the rows",
        "backends/redis/script.py",
        "-- The index first: it is the only key that nothing was read from, so if another type lies there, nothing was written.\n",
        "for i = 1, changes do redis.call('SET', KEYS[4 + i], ARGV[at + i]) end\n",
        f"{_PLAIN} another_type",
    ),
    (
        "redis: a server that lost commits is written to",
        "backends/redis/script.py",
        "if number < tonumber(ARGV[3]) then return {4, number} end\n",
        "",
        f"{_CRASHES} lost_commits",
    ),
    (
        "redis: a server that lost commits is read from",
        "backends/redis/backend.py",
        "        if number < floor:\n",
        "        if False:\n",
        f"{_CRASHES} lost_commits",
    ),
    (
        "redis: the barrier's counts are not looked at",
        "backends/redis/attest.py",
        "            if replicas < self.replicas:\n",
        "            if False:\n",
        f"{_SETTINGS} 'replica'",
    ),
    (
        "redis: a barrier that was refused counts as passed",
        "backends/redis/attest.py",
        '                if "appendonly" in answer.text:\n                    return "appendonly was switched off while we ran: set it to yes"\n                return f"the wait for it was refused ({answer.code})"\n',
        "                continue\n",
        f"{_SETTINGS} spoilt",
    ),
    (
        "redis: a commit is acknowledged before its barrier",
        "backends/redis/lane.py",
        "        return self._barrier.lacking([await link.answer() for _ in barrier])\n",
        "        [await link.answer() for _ in barrier]\n        return ''\n",
        f"{_SETTINGS} 'spoilt or confirm'",
    ),
    (
        "redis: a read does not wait for the replicas",
        "backends/redis/backend.py",
        "            await self._confirm(names, number)\n",
        "            pass\n",
        f"{_SETTINGS} confirm",
    ),
    (
        "redis: a lost answer is told as nothing written",
        "backends/redis/lane.py",
        "        return UnknownOutcomeError(\n            f",
        "        return UnavailableError(\n            f",
        f"{_CUTS} 'black_hole or in_flight'",
    ),
    (
        "redis: what was sent is sent again after the link was lost",
        "backends/redis/lane.py",
        "        for one in group[len(answers) :]:\n            one.give(self._lost(lacking))\n",
        "        for one in group[len(answers) :]:\n            again.append(one)\n",
        f"{_CUTS} 'in_flight or anywhere'",
    ),
    (
        "redis: no deadline for a commit",
        "backends/redis/lane.py",
        "        one.timer = loop.call_at(deadline, self._expire, one)\n",
        "        one.timer = loop.call_at(deadline + 3, self._expire, one)\n        one.deadline += 3\n",
        f"{_CUTS} 'black_hole'",
    ),
    (
        "redis: no deadline for a read",
        "backends/redis/link.py",
        "            async with asyncio.timeout_at(deadline):\n                await self.send(commands)\n",
        "            async with asyncio.timeout_at(deadline + 3):\n                await self.send(commands)\n",
        f"{_CUTS} reads_are_bounded",
    ),
    (
        "redis: a forgotten script ends the commit",
        "backends/redis/lane.py",
        'elif answer.code == "NOSCRIPT" or (',
        "elif (",
        f"{_CRASHES} script",
    ),
    (
        "redis: a moved slot is not followed",
        "backends/redis/lane.py",
        "        if codes & LOOK_ANEW:\n            self._forget()\n",
        "        if codes & LOOK_ANEW:\n",
        f"{_CRASHES} cluster",
    ),
    (
        "redis: the Sentinels are not asked again",
        "backends/redis/topology.py",
        "        return host.decode(), int(port)\n",
        "        self.__dict__.setdefault('first', (host.decode(), int(port)))\n        return self.__dict__['first']\n",
        f"{_CRASHES} failover",
    ),
    (
        "redis: eviction is overlooked",
        "backends/redis/attest.py",
        'if (found.maxmemory_policy or "").startswith("allkeys-"):',
        "if False:",
        f"{_SETTINGS} evicts",
    ),
    (
        "redis: every second is taken for always",
        "backends/redis/attest.py",
        '    if found.appendfsync != "always":\n',
        '    if found.appendfsync == "no":\n',
        f"{_SETTINGS} every",
    ),
    (
        "redis: a replica is taken for a primary",
        "backends/redis/attest.py",
        '    if found.role not in ("master", None):\n',
        "    if False:\n",
        f"{_SETTINGS} a-replica",
    ),
    (
        "redis: a demoted primary is read from",
        "backends/redis/backend.py",
        'rest.pop(0)[0] != b"master":',
        "not rest.pop(0):",
        f"{_PLAIN} becomes_a_replica",
    ),
    (
        "redis: a primary that came back with less is used",
        "backends/redis/backend.py",
        "if opened is not None and now.survives < opened.guarantees.survives:",
        "if False:",
        f"{_SETTINGS} comes_back",
    ),
    (
        "redis: the server's text is repeated in an error",
        "backends/redis/link.py",
        "it should know ({self.code}): is it a Redis?",
        "it should know ({self.text}): is it a Redis?",
        f"{_PLAIN} refusal",
    ),
]
