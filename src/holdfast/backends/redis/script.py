"""The commit as one Lua script, and the keys it works on.

Layout, for the prefix ``holdfast`` and the scope ``main`` (the hash tag, so that a scope lies on one node)::

    holdfast:scopes                           set: scopes that may have had a commit
    holdfast:{main}:number                    string: the number of the last commit
    holdfast:{main}:DOMAIN/NAME/ID            string: the row's JSON, as it was given
    holdfast:{main}:versions                  hash: DOMAIN/NAME/ID -> "version n writer"
    holdfast:{main}:index                     sorted set, all scores 0: "DOMAIN NAME ID", for listing in byte order
    holdfast:{main}:writers                   hash: writer -> "n number"
    holdfast:{main}:order                     sorted set: writer by the number of its last commit, to forget the oldest

A blank sorts before every character of a key's parts and a slash does not: hence two spellings of a key.
Everything is read and compared before anything is written: an error that the server raises on a read changes
nothing, and once a script has written, the server does not refuse it any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha1

from ...contract import MAX_WRITERS, Key, KeyPrefix, Op
from .link import packed

APPLIED, REPEATED, MOVED_ON, CLASHED, TAKEN_BACK = range(5)
"""First element of the script's answer; the second is a number, or the places of the clashes in ``expect``."""

COMMIT = """
local writer, n = ARGV[1], ARGV[2]
local number = tonumber(redis.call('GET', KEYS[1]) or '0')
if number < tonumber(ARGV[3]) then return {4, number} end
local last = redis.call('HGET', KEYS[3], writer)
if last then
  local at = string.find(last, ' ', 1, true)
  local was = string.sub(last, 1, at - 1)
  if was == n then
    -- Written anew with the same value, so that the barrier after it has something of this connection to wait for.
    redis.call('SET', KEYS[1], string.format('%.0f', number))
    return {1, tonumber(string.sub(last, at + 1))}
  end
  -- As text: a Lua number holds 53 bits only.
  if #was > #n or (#was == #n and was > n) then return {2, was} end
end
local clashes = {}
local expects = tonumber(ARGV[5])
for i = 1, expects do
  local found = redis.call('HGET', KEYS[2], ARGV[4 + 2 * i])
  if (found and string.match(found, '^%d+') or '0') ~= ARGV[5 + 2 * i] then clashes[#clashes + 1] = i end
end
if #clashes > 0 then return {3, clashes} end
redis.call('HLEN', KEYS[2])
redis.call('ZCARD', KEYS[5])
local writers = redis.call('ZCARD', KEYS[4])
local text = string.format('%.0f', number + 1)
local version = text .. ' ' .. n .. ' ' .. writer
local at = 5 + 2 * expects
for i = 6, #KEYS do
  local field, kept, payload = ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  at = at + 3
  if kept == '1' then
    redis.call('SET', KEYS[i], payload)
    if redis.call('HSET', KEYS[2], field, version) == 1 then
      redis.call('ZADD', KEYS[5], 0, (string.gsub(field, '/', ' ')))
    end
  else
    redis.call('DEL', KEYS[i])
    if redis.call('HDEL', KEYS[2], field) == 1 then
      redis.call('ZREM', KEYS[5], (string.gsub(field, '/', ' ')))
    end
  end
end
redis.call('HSET', KEYS[3], writer, n .. ' ' .. text)
if redis.call('ZADD', KEYS[4], text, writer) == 1 and writers >= tonumber(ARGV[4]) then
  redis.call('HDEL', KEYS[3], redis.call('ZPOPMIN', KEYS[4])[1])
end
redis.call('SET', KEYS[1], text)
return {0, number + 1}
"""

_SOURCE = COMMIT.encode()
_SHA = sha1(_SOURCE, usedforsecurity=False).hexdigest().encode()
_IN_FULL = b"$4\r\nEVAL\r\n$%d\r\n%b\r\n" % (len(_SOURCE), _SOURCE)
_BY_SHA = b"$7\r\nEVALSHA\r\n$40\r\n%b\r\n" % _SHA

PROBE_SCOPE = "~probe"
"""Not a scope's name, so no scope's keys are touched by the probe at open."""


class ScopeKeys:
    """The names of one scope's keys."""

    __slots__ = ("base", "fixed", "index", "number", "order", "tag", "versions", "writers")

    def __init__(self, prefix: str, scope: str) -> None:
        self.tag = scope
        base = f"{prefix}:{{{scope}}}:"
        self.base = base.encode()
        self.number = f"{base}number".encode()
        self.versions = f"{base}versions".encode()
        self.writers = f"{base}writers".encode()
        self.order = f"{base}order".encode()
        self.index = f"{base}index".encode()
        self.fixed = (self.number, self.versions, self.writers, self.order, self.index)


def scopes_key(prefix: str) -> bytes:
    """Return the name of the set of scopes."""
    return f"{prefix}:scopes".encode()


class CommitCommand:
    """One commit as the server gets it: in full the first time on a connection, by the script's hash after."""

    __slots__ = ("_rest", "_words")

    def __init__(
        self,
        keys: ScopeKeys,
        changes: Mapping[Key, bytes | None],
        expect: Mapping[Key, int],
        op: Op,
        *,
        floor: int = 0,
        max_writers: int = MAX_WRITERS,
    ) -> None:
        fields = [str(key).encode() for key in changes]
        words: list[bytes] = [b"%d" % (5 + len(fields)), *keys.fixed]
        words += [keys.base + field for field in fields]
        words += [op.writer.encode(), b"%d" % op.n, b"%d" % floor, b"%d" % max_writers, b"%d" % len(expect)]
        for key, version in expect.items():
            words.append(str(key).encode())
            words.append(b"%d" % version)
        for field, payload in zip(fields, changes.values(), strict=True):
            words += (field, b"0", b"") if payload is None else (field, b"1", payload)
        self._rest = b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])
        self._words = len(words) + 2

    @property
    def size_bytes(self) -> int:
        """About how much it is to send."""
        return len(self._rest)

    def packed(self, *, in_full: bool) -> bytes:
        """Return it as it goes over the wire."""
        return b"*%d\r\n%b%b" % (self._words, _IN_FULL if in_full else _BY_SHA, self._rest)


def lex_range(prefix: KeyPrefix) -> tuple[bytes, bytes]:
    """Return where the keys under a prefix begin and end in a scope's index."""
    if not prefix.domain:
        return b"-", b"+"
    start = f"{prefix.domain} {prefix.entity_name} " if prefix.entity_name else f"{prefix.domain} "
    return f"[{start}".encode(), f"({start[:-1]}!".encode()  # "!" follows the blank


def read_commands(keys: ScopeKeys, wanted: list[Key], *, role: bool) -> list[bytes]:
    """Return the commands that read rows, the scope's number and the server's role as of one moment."""
    fields = [str(key).encode() for key in wanted]
    commands = [packed("MULTI"), packed("GET", keys.number)]
    if role:
        commands.append(packed("ROLE"))
    if fields:
        commands.append(packed("HMGET", keys.versions, *fields))
        commands.append(packed("MGET", *[keys.base + field for field in fields]))
    commands.append(packed("EXEC"))
    return commands
