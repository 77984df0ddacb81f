"""One-line defects of the S3 backend, as (name, file under ``src/holdfast``, text, its replacement, pytest arguments).

``tests/mutants.py`` makes its ``Mutant`` of each.
"""

from __future__ import annotations

# ruff: noqa: E501

_PLAIN = "tests/test_s3.py -k"
_CUTS = "tests/test_s3_cuts.py -k"
_SETTINGS = "tests/test_s3_settings.py -k"

S3: list[tuple[str, str, str, str, str]] = [
    (
        "s3: an object is replaced whatever is there now",
        "backends/s3/service.py",
        'mode: Any = {"e_tag": etag if self.quotes_etags else etag.strip(\'"\')} if etag else "create"',
        'mode: Any = "overwrite"',
        f"{_PLAIN} 'another_process'",
    ),
    (
        "s3: a conflict is told from memory",
        "backends/s3/lane.py",
        "                if not granted and not fresh:\n",
        "                if False:\n",
        f"{_PLAIN} 'another_process'",
    ),
    (
        "s3: a read is answered from memory",
        "backends/s3/lane.py",
        "        if self._next_fetch is None:\n",
        "        if self._seen is not None:\n            return self._seen\n        if self._next_fetch is None:\n",
        f"{_PLAIN} 'another_process or deleted'",
    ),
    (
        "s3: a lost answer is told as nothing written",
        "backends/s3/lane.py",
        "            case _:\n                return self._lost(why)\n",
        "            case _:\n                return self._unwritten(why)\n",
        f"{_CUTS} 'in_flight or doubt or called_unwritten'",
    ),
    (
        "s3: an earlier try in doubt is forgotten",
        "backends/s3/lane.py",
        "        elif isinstance(verdict, UnavailableError) and self._in_doubt.get(writer) == n:\n",
        "        elif False:\n",
        f"{_CUTS} called_unwritten",
    ),
    (
        "s3: after an unknown outcome it writes on what it remembers, and believes it",
        "backends/s3/lane.py",
        "        self._doubtful = True\n        if answer.kind in",
        "        if answer.kind in",
        f"{_CUTS} 'anywhere and answers and close'",
    ),
    (
        "s3: a reset connection counts as one that was never made",
        "backends/s3/service.py",
        'r"\\bkind: Connect\\b"',
        'r"kind: Connect"',
        f"{_PLAIN} never_made",
    ),
    (
        "s3: what was told as unwritten is written all the same",
        "backends/s3/lane.py",
        "                group = [one for one in group if not one.future.done()]\n",
        "",
        f"{_PLAIN} never_written",
    ),
    (
        "s3: a deleted object counts as an empty scope",
        "backends/s3/lane.py",
        "        if found.number < floor:\n",
        "        if 0 < found.number < floor:\n",
        f"{_PLAIN} was_deleted",
    ),
    (
        "s3: an object that was put back is written on",
        "backends/s3/lane.py",
        "            if lacks and number <= floor:\n",
        "            if False:\n",
        f"{_PLAIN} put_back",
    ),
    (
        "s3: a scope may outgrow its object",
        "backends/s3/document.py",
        "        if grown > 0 and self._rows_bytes + grown > MAX_ROWS_BYTES:\n",
        "        if False:\n",
        f"{_PLAIN} outgrows",
    ),
    (
        "s3: a text that does not come back is put into the object as it is",
        "backends/s3/document.py",
        "        return bytes(_RAW.decode(payload)) == payload\n",
        "        return bool(_RAW.decode(payload))\n",
        f"{_PLAIN} byte_for_byte",
    ),
    (
        "s3: a damaged object is taken for none",
        "backends/s3/lane.py",
        "                found = document.read(self._name, answer.etag, answer.body, self._shown)\n",
        "                try:\n                    found = document.read(self._name, answer.etag, answer.body, self._shown)\n                except HoldfastError:\n                    found = self._seen or NOTHING\n",
        f"{_PLAIN} another_hand",
    ),
    (
        "s3: the probe asks in turn only",
        "backends/s3/attest.py",
        "                await probe.at_once(etag)\n",
        "                del etag\n",
        f"{_SETTINGS} looks-then",
    ),
    (
        "s3: the probe does not try If-Match",
        "backends/s3/attest.py",
        "        if (await self._certain(path, first.etag)).kind is Kind.DONE:\n",
        "        if False:\n",
        f"{_SETTINGS} 'ignores-if-match'",
    ),
    (
        "s3: ETags are always quoted",
        "backends/s3/attest.py",
        "            self._service.quotes_etags = False\n",
        "            pass\n",
        f"{_SETTINGS} keeps_conditions",
    ),
    (
        "s3: any service is believed to outlive its machine",
        "backends/s3/address.py",
        'return not self.endpoint or host.endswith((".amazonaws.com", ".amazonaws.com.cn"))',
        "return True",
        f"{_SETTINGS} 'by_its_name or not_made_up'",
    ),
    (
        "s3: the service's own words are repeated in an error",
        "backends/s3/service.py",
        '        return Answer(Kind.REFUSED, _REMEDIES[code], full=code == "QuotaExceeded")\n',
        '        return Answer(Kind.REFUSED, _REMEDIES[code] + text, full=code == "QuotaExceeded")\n',
        f"{_SETTINGS} credentials_are_in_no",
    ),
    (
        "s3: the deadline is not kept",
        "backends/s3/address.py",
        "    return seconds\n",
        "    return seconds + 3\n",
        f"{_CUTS} black_hole",
    ),
]
