"""One-line defects of recovery plans and the operator's hands: (name, file, text, its replacement, pytest arguments).

``tests/mutants.py`` makes its ``Mutant`` of each.
"""

from __future__ import annotations

_PLAN = "tests/test_recovery_plan.py -k"
_HANDS = "tests/test_hands.py -k"
_VENUE = "tests/test_recovery_venue.py -k"
_REKEYED = "tests/test_rekeyed_rows.py -k"
_ADOPT = "tests/test_adopt_venue.py -k"

PLAN: list[tuple[str, str, str, str, str]] = [
    (
        "plan: the past may be entered in a plan",
        "engine/plan.py",
        "outcome = step(state, candle, window, spec, entries=entries)",
        "outcome = step(state, candle, window, spec, entries=True)",
        f"{_PLAN} 'the_plan_says and entry'",
    ),
    (
        "plan: the plan begins with an empty price window",
        "engine/gap.py",
        "        for candle in session.window.candles:\n            window.push(candle)\n",
        "",
        f"{_PLAN} 'the_plan_says and levels'",
    ),
    (
        "plan: candles that wait to be stepped come into the price while more are fetched",
        "engine/driver.py",
        "reached_to_ms = self._queue[-1][0] if self._queue else session.window.newest_ms",
        "reached_to_ms = session.window.newest_ms",
        f"{_PLAN} 'the_plan_says and lags'",
    ),
    (
        "plan: it is on record after what it foresaw was done",
        "engine/gap_run.py",
        "                    await self._step(session, candles)\n                    await gap.finish()\n",
        "                    await gap.finish()\n",
        f"{_PLAN} 'the_plan_says and wick'",
    ),
    (
        "plan: a decision is not looked for after a kill",
        "engine/gap.py",
        "        standing = _newest(decisions)\n        if standing is not None:\n",
        "        standing = None\n        if standing is not None:\n",
        f"{_PLAN} 'killed and close and quiet'",
    ),
    (
        "plan: a plan that is half done is made anew",
        "engine/plan.py",
        "said = tuple(one for one in row.events if one.number > done)",
        "said = row.events",
        f"{_PLAN} 'killed and levels'",
    ),
    (
        "plan: what an operator decided covers what came later",
        "engine/gap.py",
        "return all(event.at_ms - MINUTE_MS <= decision.until_ms for event in outlook.events)",
        "return True",
        f"{_PLAN} came_later",
    ),
    (
        "plan: a strategy that asks is not asked",
        "engine/gap.py",
        '        elif self._policy == "ask":\n            return None\n',
        "",
        f"{_PLAN} 'asks_decides_nothing'",
    ),
    (
        "plan: live candles are asked about too",
        "engine/gap.py",
        "if self._to_ms is None or queue[0][0] > self._to_ms:",
        "if self._to_ms is None:",
        f"{_PLAN} while_a_run_is_live",
    ),
    (
        "plan: a closing that the store refused once is forgotten",
        "engine/gap.py",
        "self._over = self._reason is None",
        "self._over = True",
        f"{_PLAN} refused_once",
    ),
    (
        "plan: closing at the market enters first",
        "engine/driver.py",
        "newest = not self._queue and self._is_fresh(candle) and not (gap is not None and gap.is_closing)",
        "newest = not self._queue and self._is_fresh(candle)",
        f"{_PLAN} enters_nothing_first",
    ),
    (
        "plan: who says which was first is asked anew after a kill",
        "engine/gap.py",
        "        session.decider.remember_replies(replies(plans.values()))\n",
        "",
        f"{_PLAN} asked_once",
    ),
    (
        "plan: a foreign order is taken for ours",
        "engine/venue_plan.py",
        "if report.symbol == context.symbol and report.client_order_id not in known",
        "if report.symbol == context.symbol and not known",
        f"{_VENUE} foreign",
    ),
    (
        "hands: the owner is not asked whether it lives",
        "engine/audited.py",
        "if loaded is None or self._watch is None or loaded.row.released:",
        "if loaded is not None:",
        f"{_HANDS} owner_lives",
    ),
    (
        "hands: the epoch stays, so a sleeping owner goes on",
        "engine/audited.py",
        "                rows[owner_key] = self._next_owner(owner.row)\n",
        "                rows[owner_key] = owner.row\n",
        f"{_HANDS} 'need_not_wait'",
    ),
    (
        "hands: what is adopted is not reconciled",
        "engine/hands.py",
        "{**freed, key: row, **plan.changes, **await self._audited.guards(plan.profiles, expect)}",
        "{**freed, key: row}",
        f"{_HANDS} names_another",
    ),
    (
        "hands: a commit that came between is not noticed",
        "engine/audited.py",
        "expect.setdefault(key, seen.versions.get(key, 0))",
        "pass",
        f"{_HANDS} between_look",
    ),
    (
        "hands: what is cleared is thrown away",
        "engine/hands.py",
        "**{released_key(one): row for one, row in kept.items()},",
        "",
        f"{_HANDS} slot_of_nothing",
    ),
    (
        "adopt: what is adopted gets no order",
        "engine/hands.py",
        "changes={**moved.changes, **orders}",
        "changes={**moved.changes}",
        f"{_ADOPT} planned_adopted",
    ),
    (
        "adopt: what the bot itself holds is taken for somebody else's",
        "engine/holdings.py",
        "        left = shown - ours\n",
        "        left = shown\n",
        f"{_ADOPT} bot_itself",
    ),
    (
        "adopt: an order that is under way is not minded",
        "engine/holdings.py",
        "if moving or {",
        "if {",
        f"{_ADOPT} 'under_way'",
    ),
    (
        "adopt: the rows are not looked at again after the venue",
        "engine/holdings.py",
        "        after = await self._orders()\n",
        "        after = before\n",
        f"{_ADOPT} while_the_venue_is_asked",
    ),
    (
        "adopt: two may act on the account at once",
        "engine/holdings.py",
        "        await self._record.still()\n",
        "",
        f"{_ADOPT} two_operators",
    ),
    (
        "rekeyed: a row that means nothing fences an entry when its number changes",
        "engine/tenure.py",
        "        self.ignored = Loaded(known.row, found.version)\n        return True\n",
        "        return False\n",
        f"{_REKEYED} ignored_and_re_keyed",
    ),
    (
        "rekeyed: another row passes for the one that was ignored",
        "engine/tenure.py",
        "found is None or found.row != known.row or found.version == known.version",
        "found is None or found.version == known.version",
        f"{_REKEYED} another_by_now",
    ),
    (
        "rekeyed: a new number of a worker's row is a sign of life",
        "engine/worker.py",
        "since if row == known else self.boot_clock())",
        "self.boot_clock())",
        f"{_REKEYED} again_and_again",
    ),
    (
        "recovery: an intent that was found at open is forgotten where nothing is routed",
        "store.py",
        "return bool(self.routes) or lane in self._left",
        "return bool(self.routes)",
        "tests/test_store_spans_shared.py -k without_routes",
    ),
    (
        "recovery: every start of a context lists the intents of its scope",
        "engine/recovery.py",
        "if store.may_be_unfinished(str(context)):",
        "if True:",
        "tests/test_store_spans_shared.py -k without_routes",
    ),
]
