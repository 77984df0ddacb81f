"""The commit as one Lua script, and the keys it works on.

Layout, for the prefix ``holdfast`` and the scope ``main`` (the hash tag, so that a scope lies on one node)::

    holdfast:scopes                           set: scopes that may have had a commit
    holdfast:{main}:number                    string: the number of the last commit
    holdfast:{main}:DOMAIN/NAME/ID            string: the row's JSON, as it was given
    holdfast:{main}:versions                  hash: DOMAIN/NAME/ID -> "version n writer"
    holdfast:{main}:index                     sorted set, all scores 0: "DOMAIN NAME ID", for listing in byte order
    holdfast:{main}:writers                   hash: writer -> "n number"

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
    -- Written anew with the same value: WAIT and WAITAOF are documented to cover this connection's writes only.
    redis.call('SET', KEYS[1], string.format('%.0f', number))
    return {1, tonumber(string.sub(last, at + 1))}
  end
  -- As text: a Lua number holds 53 bits only.
  if #was > #n or (#was == #n and was > n) then return {2, was} end
end
local expects, changes = tonumber(ARGV[5]), #KEYS - 4
local clashes, known = {}, {}
-- The rows that are expected, then those that change; looked up by hundreds, as Lua's stack is small.
for first = 1, expects + changes, 100 do
  local final = math.min(first + 99, expects + changes)
  local found = redis.call('HMGET', KEYS[2], unpack(ARGV, 6 + first, 6 + final))
  for i = first, final do known[i] = found[i - first + 1] end
end
local at = 6 + expects + changes
for i = 1, expects do
  if (known[i] and string.match(known[i], '^%d+') or '0') ~= ARGV[at + i] then clashes[#clashes + 1] = i end
end
if #clashes > 0 then return {3, clashes} end
at = at + expects
local text = string.format('%.0f', number + 1)
local version = text .. ' ' .. n .. ' ' .. writer
-- The index first: it is the only key that nothing was read from, so if another type lies there, nothing was written.
for i = 1, changes do
  local kept, there = string.byte(ARGV[6], i) == 49, known[expects + i]
  if kept and not there then
    redis.call('ZADD', KEYS[4], 0, (string.gsub(ARGV[6 + expects + i], '/', ' ')))
  elseif there and not kept then
    redis.call('ZREM', KEYS[4], (string.gsub(ARGV[6 + expects + i], '/', ' ')))
  end
end
for i = 1, changes do
  local field = ARGV[6 + expects + i]
  if string.byte(ARGV[6], i) == 49 then
    redis.call('SET', KEYS[4 + i], ARGV[at + i])
    redis.call('HSET', KEYS[2], field, version)
  else
    redis.call('DEL', KEYS[4 + i])
    if known[expects + i] then redis.call('HDEL', KEYS[2], field) end
  end
end
redis.call('SET', KEYS[1], text)
if redis.call('HSET', KEYS[3], writer, n .. ' ' .. text) == 1
    and redis.call('HLEN', KEYS[3]) > tonumber(ARGV[4]) then
  -- A new writer is a rare thing (one for each start of a process): looking at all of them then is the cheapest.
  local all = redis.call('HGETALL', KEYS[3])
  local oldest, least = nil, nil
  for i = 1, #all, 2 do
    local when = tonumber(string.match(all[i + 1], '%d+$'))
    if not least or when < least then oldest, least = all[i], when end
  end
  redis.call('HDEL', KEYS[3], oldest)
end
return {0, number + 1}
"""

_SOURCE = COMMIT.encode()
_SHA = sha1(_SOURCE, usedforsecurity=False).hexdigest().encode()
_IN_FULL = b"$4\r\nEVAL\r\n$%d\r\n%b\r\n" % (len(_SOURCE), _SOURCE)
_BY_SHA = b"$7\r\nEVALSHA\r\n$40\r\n%b\r\n" % _SHA

PROBE_SCOPE = "~probe"
"""Not a scope's name, so no scope's keys are touched by the probe at open."""


_MAX_SPELLED = 65_536
"""How many keys' spellings a scope remembers, to spare the work for keys that are written again and again."""


def _word(raw: bytes) -> bytes:
    """Return a word as it goes over the wire."""
    return b"$%d\r\n%b\r\n" % (len(raw), raw)


class ScopeKeys:
    """The names of one scope's keys, and how its rows are spelled on the wire."""

    __slots__ = ("base", "fixed", "index", "number", "spelled", "tag", "versions", "writers")

    def __init__(self, prefix: str, scope: str) -> None:
        self.tag = scope
        base = f"{prefix}:{{{scope}}}:"
        self.base = base.encode()
        self.number = f"{base}number".encode()
        self.versions = f"{base}versions".encode()
        self.writers = f"{base}writers".encode()
        self.index = f"{base}index".encode()
        self.fixed = b"".join(map(_word, (self.number, self.versions, self.writers, self.index)))
        self.spelled: dict[Key, tuple[bytes, bytes]] = {}
        """For keys that were committed: the field in ``versions``, and the row's own key; only valid keys get here."""

    def spell(self, key: Key) -> tuple[bytes, bytes]:
        """Return the two spellings of a valid key."""
        found = self.spelled.get(key)
        if found is None:
            if len(self.spelled) >= _MAX_SPELLED:
                self.spelled.clear()
            field = str(key).encode()
            found = self.spelled[key] = (_word(field), _word(self.base + field))
        return found


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
        rows = [keys.spell(key) for key in changes]
        guards = [keys.spell(key)[0] for key in expect]
        flags = b"".join([b"0" if payload is None else b"1" for payload in changes.values()])
        head = (op.writer.encode(), b"%d" % op.n, b"%d" % floor, b"%d" % max_writers, b"%d" % len(expect), flags)
        parts = [_word(b"%d" % (4 + len(rows))), keys.fixed]
        parts += [row for _, row in rows]
        parts += map(_word, head)
        parts += guards
        parts += [field for field, _ in rows]
        parts += [_word(b"%d" % version) for version in expect.values()]
        parts += [_word(payload or b"") for payload in changes.values()]
        self._rest = b"".join(parts)
        self._words = 2 + 1 + 4 + len(head) + 3 * len(rows) + 2 * len(guards)

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
