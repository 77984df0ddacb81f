"""One-line defects of the MongoDB backend: (name, file under ``src/holdfast``, text, its replacement, pytest arguments).

``tests/mutants.py`` makes its ``Mutant`` of each.
"""

from __future__ import annotations

# ruff: noqa: E501

_CUTS = "tests/test_mongo_cuts.py -k"
_SETTINGS = "tests/test_mongo_settings.py -k"
_PLAIN = "tests/test_mongo.py -k"
_CONTRACT = "tests/test_conformance.py -k"

MONGO: list[tuple[str, str, str, str, str]] = [
    (
        "mongo: expected versions are not compared",
        "backends/mongo/document.py",
        "if self._row(key).version != version]",
        "if False]",
        f"{_CONTRACT} 'expect and mongo'",
    ),
    (
        "mongo: a repeated op is applied again",
        "backends/mongo/document.py",
        "        if last is not None and n == last.n:\n            return last.number\n",
        "",
        f"{_CONTRACT} 'repeated and mongo'",
    ),
    (
        "mongo: an update applies to whatever state there is",
        "backends/mongo/document.py",
        '"q": {"_id": scope, "number": self._known.number, "tip": self._known.tip}',
        '"q": {"_id": scope}',
        f"{_PLAIN} 'two_backends or race'",
    ),
    (
        "mongo: a number is taken for a state",
        "backends/mongo/document.py",
        ', "number": self._known.number, "tip": self._known.tip}',
        ', "number": self._known.number}',
        f"{_SETTINGS} taken_back",
    ),
    (
        "mongo: an update that matched nothing counts as written",
        "backends/mongo/lane.py",
        "        if not matched:\n            return False\n",
        "",
        f"{_PLAIN} 'two_backends or race'",
    ),
    (
        "mongo: a document that another made first is taken for ours",
        "backends/mongo/lane.py",
        "  # another process made the document first\n            return False\n",
        "\n            matched = 1\n",
        f"{_PLAIN} one_is_first",
    ),
    (
        "mongo: conflicts are told from memory",
        "backends/mongo/lane.py",
        "            if not all(granted) and not fresh:\n",
        "            if False:\n",
        f"{_PLAIN} told_from_what_lies_there",
    ),
    (
        "mongo: rows that were not looked at are taken for absent",
        "backends/mongo/lane.py",
        '    rows = {} if found is None else found.get("rows", {})\n',
        '    rows = {} if found is None else found.get("rows", {})\n    known.complete = True\n',
        f"{_SETTINGS} alone_writes",
    ),
    (
        "mongo: rows that are gone are remembered for ever",
        "backends/mongo/document.py",
        "                if not state.version:\n",
        "                if False:\n",
        f"{_PLAIN} agree",
    ),
    (
        "mongo: each new key costs a round trip",
        "backends/mongo/document.py",
        "        if self.complete:\n            return False\n",
        "",
        f"{_SETTINGS} alone_writes",
    ),
    (
        "mongo: dots stay in field names",
        "backends/mongo/document.py",
        'f"{key[0]}/{key[1]}/{key[2]}".replace(".", ",")',
        'f"{key[0]}/{key[1]}/{key[2]}"',
        f"{_PLAIN} 'dot or odd_names'",
    ),
    (
        "mongo: writers' names are not quoted",
        "backends/mongo/document.py",
        'return writer.replace("%", "%25").replace(".", "%2E").replace("$", "%24")',
        "return writer",
        f"{_PLAIN} 'dot or odd_names'",
    ),
    (
        "mongo: writers are never forgotten",
        "backends/mongo/document.py",
        "            self._forget_one()\n",
        "            pass\n",
        f"{_CONTRACT} 'forgotten and mongo'",
    ),
    (
        "mongo: the document's size is left to the server",
        "backends/mongo/document.py",
        "        if total > self._limit and grows > 0:\n",
        "        if False:\n",
        f"{_PLAIN} too_large",
    ),
    (
        "mongo: a deleted row stays in the count",
        "backends/mongo/document.py",
        "            self.bytes += size - self._row(key).bytes\n",
        "            self.bytes += max(0, size - self._row(key).bytes)\n",
        f"{_PLAIN} 'agree or too_large'",
    ),
    (
        "mongo: a row's text is counted in characters",
        "backends/mongo/document.py",
        "payload = len(text) if text.isascii() else len(text.encode())",
        "payload = len(text)",
        f"{_PLAIN} counted_as",
    ),
    (
        "mongo: one member's word is enough",
        "backends/mongo/link.py",
        '"w": "majority", "j": True, "wtimeout"',
        '"w": 1, "wtimeout"',
        f"{_SETTINGS} every_write",
    ),
    (
        "mongo: what a majority has not confirmed counts as written",
        "backends/mongo/link.py",
        "        if unconfirmed:\n",
        "        if False:\n",
        f"{_SETTINGS} 'majority or each_answer'",
    ),
    (
        "mongo: a lost answer is told as nothing written",
        "backends/mongo/link.py",
        "            sending.begun = True\n",
        "            pass\n",
        f"{_CUTS} 'in_flight or black_hole'",
    ),
    (
        "mongo: an interrupted write is told as refused",
        "backends/mongo/link.py",
        "frozenset((2, 9, 14,",
        "frozenset((91, 11602, 2, 9, 14,",
        f"{_SETTINGS} each_answer",
    ),
    (
        "mongo: an earlier try is forgotten",
        "backends/mongo/lane.py",
        "            self._in_doubt[op.writer] = op.n\n",
        "            pass\n",
        f"{_CUTS} nobody_there",
    ),
    (
        "mongo: no deadline for a commit",
        "backends/mongo/lane.py",
        "        deadline = loop.time() + self._deadline_seconds\n",
        "        deadline = loop.time() + self._deadline_seconds + 3\n",
        f"{_CUTS} black_hole",
    ),
    (
        "mongo: no deadline for a read",
        "backends/mongo/link.py",
        "            async with asyncio.timeout_at(deadline):\n                return await database.command(command)\n",
        "            async with asyncio.timeout_at(deadline + 3):\n                return await database.command(command)\n",
        f"{_CUTS} reads_are_bounded",
    ),
    (
        "mongo: a repetition is answered before it is durable",
        "backends/mongo/lane.py",
        "        if plan.repeats:\n            await barrier(self._link, deadline)\n",
        "        pass\n",
        f"{_SETTINGS} goes_away",
    ),
    (
        "mongo: a read does not wait for the journal",
        "backends/mongo/backend.py",
        "        if ahead and self._attested.confirms_reads and not self._read_only:\n",
        "        if False:\n",
        f"{_SETTINGS} made_durable",
    ),
    (
        "mongo: reads may come from a primary that was deposed",
        "backends/mongo/attest.py",
        'read_level="linearizable" if distributed else "local"',
        'read_level="local"',
        f"{_SETTINGS} every_write",
    ),
    (
        "mongo: a server that lost commits is written to",
        "backends/mongo/lane.py",
        "        if known.number < floor:\n",
        "        if False:\n",
        f"{_SETTINGS} lost_commits",
    ),
    (
        "mongo: a server that lost commits is read from",
        "backends/mongo/backend.py",
        "        if number < floor:\n",
        "        if False:\n",
        f"{_SETTINGS} lost_commits",
    ),
    (
        "mongo: false confirmations are overlooked",
        "backends/mongo/attest.py",
        "    if found.impossible_refused is False and",
        "    if False and",
        f"{_SETTINGS} 'nx or voids'",
    ),
    (
        "mongo: a secondary is taken for a primary",
        "backends/mongo/attest.py",
        "    if not found.writable:\n",
        "    if False:\n",
        f"{_SETTINGS} 'voids'",
    ),
    (
        "mongo: members on one machine count as several",
        "backends/mongo/attest.py",
        "    if most_on_one >= copies:\n",
        "    if False:\n",
        f"{_SETTINGS} never_told_better",
    ),
    (
        "mongo: an arbiter counts as a copy",
        "backends/mongo/attest.py",
        "    copies = min(len(members) // 2 + 1, len(holding))\n",
        "    copies = len(members) // 2 + 1\n",
        f"{_SETTINGS} never_told_better",
    ),
    (
        "mongo: updates that all win are overlooked",
        "backends/mongo/backend.py",
        "        if won != 1:\n",
        "        if won < 1:\n",
        f"{_SETTINGS} voids",
    ),
    (
        "mongo: the password is shown",
        "backends/mongo/address.py",
        '        return f"{self.scheme}://{self.hosts}/',
        '        return f"{self.scheme}://{self.password}@{self.hosts}/',
        f"{_PLAIN} 'password or credentials'",
    ),
]
