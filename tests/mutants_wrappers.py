"""One-line defects of the wrappers, as (name, file under ``src/holdfast``, text, its replacement, pytest arguments).

``tests/mutants.py`` makes its ``Mutant`` of each.
"""

from __future__ import annotations

# ruff: noqa: E501

_RETRYING = "tests/test_retrying.py -k"
_CACHED = "tests/test_cached.py -k"
_TRACED = "tests/test_traced.py -k"
_URLS = "tests/test_urls.py -k"

_RETRIED = [
    (
        "retrying: the next attempt has a new op",
        "return await self.backend.commit(scope, changes, expect, op=op)",
        "return await self.backend.commit(scope, changes, expect, op=Op(op.writer, op.n + patience._attempt))",
        "own_op",
    ),
    (
        "retrying: a commit is sent again without its guards",
        "                unknown = last = error\n                if not expect:\n",
        "                unknown = last = error\n                expect = {} if len(expect) else expect\n                if False:\n",
        "own_op",
    ),
    (
        "retrying: a conflict is tried again",
        "            except UnavailableError as error:\n                if isinstance(error, HeldError):\n",
        "            except (UnavailableError, __import__('holdfast').ConflictError) as error:\n                if isinstance(error, HeldError):\n",
        "refused",
    ),
    (
        "retrying: a held store is asked again and again",
        "            except HeldError:\n                raise\n            except UnavailableError as error:\n                if not await patience.wait(error):\n",
        "            except UnavailableError as error:\n                if not await patience.wait(error):\n",
        "refused",
    ),
    (
        "retrying: an unknown outcome becomes unavailable at the deadline",
        "            if not await patience.wait(last):\n                raise unknown or last\n",
        "            if not await patience.wait(last):\n                raise last\n",
        "stays_unknown",
    ),
    (
        "retrying: an unknown outcome becomes unavailable at a held store",
        "raise (unknown or error) from error",
        "raise error",
        "stays_unknown",
    ),
    (
        "retrying: the deadline is ignored",
        "        if owner._clock() + delay >= self._ends:\n            return False\n",
        "        if self._attempt > 200:\n            return False\n",
        "deadline",
    ),
    (
        "retrying: the deadline begins anew with each attempt",
        "        if owner._clock() + delay >= self._ends:\n            return False\n",
        "        if delay >= owner.deadline_seconds or self._attempt > 200:\n            return False\n",
        "'deadline or attempts_take'",
    ),
    (
        "retrying: no jitter",
        "        delay = most * owner._random()\n",
        "        delay = most\n",
        "drawn",
    ),
    (
        "retrying: waits grow without a bound",
        "        most = min(owner.most_delay_seconds, ",
        "        most = max(owner.first_delay_seconds, ",
        "double",
    ),
    (
        "retrying: an unguarded commit is sent again after an unknown outcome",
        "                if not expect:\n                    return await self._look(scope, op, unknown, patience)\n",
        "",
        "unguarded",
    ),
    (
        "retrying: keys begin anew after a failure",
        "                        if last is None or item > last:\n",
        "                        if True:\n",
        "keys_go_on",
    ),
    (
        "retrying: the deadline of a listing is that of the whole",
        "                            last, patience = item, None\n",
        "                            last = item\n",
        "keys_go_on",
    ),
]
_KEPT = [
    (
        "cached: set before the store",
        "        self._begin_writing(places)\n",
        "        self._begin_writing(places)\n        for key, epoch in epochs.items():\n            self._writing[scope, key] -= 1\n            self._keep((scope, key), None if changes[key] is None else Record(changes[key] or b'', 1, op), epoch)\n            self._writing[scope, key] += 1\n",
        "'refused or under_way'",
    ),
    (
        "cached: kept after an unknown outcome",
        "        for place in places:\n            self._drop(place)\n",
        "        for place in places:\n",
        "may_have",
    ),
    (
        "cached: what may land later is kept",
        "                self._doubt(scope, op, places)\n",
        "                pass\n",
        "lands_late",
    ),
    (
        "cached: a conflict of a repeated op ends its doubt",
        "        except ConflictError as error:\n            if life == self._life:\n",
        "        except ConflictError as error:\n            if life == self._life:\n                self._settle(scope, op)\n",
        "conflict_does_not",
    ),
    (
        "cached: a conflict drops nothing",
        "                        self._drop((scope, key))  # somebody",
        "                        pass  # somebody",
        "conflict_drops",
    ),
    (
        "cached: a read that raced a commit puts its row back",
        "                if epoch is not None and place not in look.spoiled:\n",
        "                if epoch is not None:\n",
        "raced",
    ),
    (
        "cached: the end of a commit spoils no read",
        "                self._overlapped.discard(place)\n        for look in self._looks:\n            look.spoiled.update(places)\n",
        "                self._overlapped.discard(place)\n",
        "began_during",
    ),
    (
        "cached: the end of a doubt spoils no read",
        "            look.spoiled.update(known[1])",
        "            pass",
        "doubt_ended",
    ),
    (
        "cached: of overlapping commits the one answered last is kept",
        "            if place not in self._overlapped:\n",
        "            if True:\n",
        "overlapped",
    ),
    (
        "cached: a repeated op brings its old row back",
        "fresh = floor is not None and number > floor and not repeated",
        "fresh = not repeated",
        "older_number",
    ),
    (
        "cached: an op sent again after a doubt brings its old row back",
        "fresh = floor is not None and number > floor and not repeated",
        "fresh = floor is not None and number > floor",
        "was_unknown",
    ),
    (
        "cached: rows outlive their lease",
        "            if entry is None or entry.epoch != epoch(scope, key):\n",
        "            if entry is None:\n",
        "lease",
    ),
    (
        "cached: a lease that ended meanwhile is not noticed",
        " or self._leases.epoch(*place) != epoch:\n            return\n",
        ":\n            return\n        epoch = self._leases.epoch(*place) or epoch\n",
        "ended_during",
    ),
    (
        "cached: a shared store without leases is cached",
        "        elif found.shared:\n",
        "        elif False:\n",
        "shared_store",
    ),
    (
        "cached: a reader beside the owner keeps rows",
        "        if read_only:\n            return found  # another",
        "        if False:\n            return found  # another",
        "beside",
    ),
    (
        "cached: rows outlive the store's closing",
        "        self._leases = _NoLease()\n        self._begin()\n        await self.backend.close()\n",
        "        await self.backend.close()\n",
        "closing",
    ),
    (
        "cached: no bound",
        "        while len(self._rows) > self._most_rows or self._size_bytes > self._most_bytes:\n",
        "        while False:\n",
        "no_more",
    ),
    (
        "cached: rows in memory are mixed with rows of another moment",
        "            found = await self.backend.read(scope, keys)\n        finally:",
        "            old = {k: e.record for k in keys if (e := self._rows.get((scope, k))) and e.record}\n            found = {**await self.backend.read(scope, keys), **old}\n        finally:",
        "another_moment",
    ),
]
_TOLD = [
    (
        "traced: errors are recorded with their messages",
        "record_exception=False",
        "record_exception=True",
        "no_row",
    ),
    (
        "traced: keys are told",
        '        "holdfast.keys": len(names),\n',
        '        "holdfast.keys": str(names),\n',
        "no_row",
    ),
    (
        "traced: a conflict is not counted",
        "            meters.conflicts.add(1, ",
        "            meters.conflicts.add(0, ",
        "every_call",
    ),
    (
        "traced: an unknown outcome is not counted",
        "            meters.unknowns.add(1, ",
        "            meters.unknowns.add(0, ",
        "unknown_outcome",
    ),
]
_NAMED = [
    (
        "urls: a URL is repeated in an error",
        "there is a blank in the {scheme!r} URL",
        "there is a blank in the {scheme!r} URL {place}",
        "not_repeated",
    ),
    (
        "stack: the cache lies below the encryption",
        '    if keys is not None:\n        inner = _class("encrypted", "Encrypted")(inner, keys, witness=witness)\n    if cached:\n        inner = Cached(inner, leases=leases)\n',
        '    if cached:\n        inner = Cached(inner, leases=leases)\n    if keys is not None:\n        inner = _class("encrypted", "Encrypted")(inner, keys, witness=witness)\n',
        "one_order",
    ),
    (
        "stack: the retries are told to nobody",
        "            one.observer = outer.retried",
        "            one.observer = None",
        "far_below",
    ),
]

_COPIED = [
    (
        "copy: what came back is taken from memory",
        "    await target.close()\n    await target.open()",
        "    pass",
        "from_the_medium",
    ),
    (
        "copy: what came back is not compared",
        "        if await _sum(target, scope) != expected:\n",
        "        if False:\n",
        "other_bytes",
    ),
    (
        "copy: another copy's mark is written over",
        "{_MARK: msgspec.json.encode(_Mark(name))}, {_MARK: 0})",
        "{_MARK: msgspec.json.encode(_Mark(name))})",
        "begin_at_once",
    ),
    (
        "copy: a source that goes on is taken for copied",
        "async for scope in _scopes(source)} != heads:\n",
        "async for scope in _scopes(source)} is None:\n",
        "changes_meanwhile",
    ),
    (
        "copy: what the source has deleted since stays",
        "        await writer.commit(scope, dict.fromkeys(page))\n",
        "        pass\n",
        "after_an_interruption",
    ),
]

WRAPPERS: list[tuple[str, str, str, str, str]] = [
    *((name, "wrappers/retrying.py", old, new, f"{_RETRYING} {tests}") for name, old, new, tests in _RETRIED),
    *((name, "wrappers/cached.py", old, new, f"{_CACHED} {tests}") for name, old, new, tests in _KEPT),
    *((name, "wrappers/traced.py", old, new, f"{_TRACED} {tests}") for name, old, new, tests in _TOLD),
    *(
        (
            name,
            "urls.py" if name.startswith("urls") else "wrappers/stack.py",
            old,
            new,
            f"{_TRACED if tests == 'far_below' else _URLS} {tests}",
        )
        for name, old, new, tests in _NAMED
    ),
    *((name, "copying.py", old, new, f"tests/test_copy.py -k {tests}") for name, old, new, tests in _COPIED),
]
