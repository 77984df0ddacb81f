"""One-line defects of orders, as (name, file, text, its replacement, pytest arguments); see ``tests/mutants.py``."""

from __future__ import annotations

# ruff: noqa: E501

_RULES = "tests/test_orders.py"
_RUNS = "tests/test_orders_executor.py"

ORDERS: list[tuple[str, str, str, str, str]] = [
    (
        "orders: sent before they are committed",
        "session_writer.py",
        "        if not await self.send(rows | orders, expect, exits=exits):\n",
        "        if self._executor is not None:\n            self._executor.committed(orders)\n            await __import__('asyncio').sleep(0)\n        if not await self.send(rows | orders, expect, exits=exits):\n",
        f"{_RUNS} -k committed_with_its_signal",
    ),
    (
        "orders: a random client order id",
        "orders.py",
        "    exact = msgspec.json.encode([*context, signal_id, action, n])\n",
        "    exact = __import__('os').urandom(16)\n",
        f"{_RULES} -k the_same_whoever_asks",
    ),
    (
        "orders: what another may have sent is sent without asking",
        "orders.py",
        "    return _paced(Ask(order), asked_ms, terms, now_ms)\n",
        "    return _paced(Ask(order) if order.state != 'intended' else Send(order), asked_ms, terms, now_ms)\n",
        f"{_RULES} -k before_anything_is_sent",
    ),
    (
        "orders: sent again where ids may repeat",
        "orders.py",
        'refuses_repeated_ids == "always" and order.state',
        'refuses_repeated_ids != "" and order.state',
        f"{_RULES} -k knows_nothing_of",
    ),
    (
        "orders: the grace after an expiry is not waited for",
        "orders.py",
        "    if now_ms < order.expires_at_ms + terms.grace_ms:\n        return Wait(min(",
        "    if now_ms < order.expires_at_ms:\n        return Wait(min(",
        f"{_RUNS} -k grace_are_over",
    ),
    (
        "orders: an entry is sent however late",
        "orders.py",
        "        if now_ms < order.expires_at_ms and (is_exit or is_open):\n            return Send(order)\n",
        "        if not is_exit or now_ms < order.expires_at_ms:\n            return Send(order)\n",
        f"{_RULES} -k whose_time_is_over",
    ),
    (
        "orders: an exit that was never sent expires like an entry",
        "orders.py",
        "        if is_exit:  # it was never sent",
        "        if False:  # it was never sent",
        f"{_RULES} -k however_late",
    ),
    (
        "orders: a fenced session goes on sending",
        "executor.py",
        "            except UnavailableError as error:\n                if self._over:\n                    return  # whoever",
        "            except __import__('holdfast.errors').errors.FencedError:\n                break\n            except UnavailableError as error:\n                if self._over:\n                    return  # whoever",
        f"{_RUNS} -k refused_commit",
    ),
    (
        "orders: sent without the lease",
        "executor.py",
        "        if needs_lease and not self._has_lease:\n",
        "        if False:\n",
        f"{_RUNS} -k without_the_lease",
    ),
    (
        "orders: what was filled in part is forgotten when the rest is cancelled",
        "answers.py",
        "    filled = max(order.filled_quantity, report.filled_quantity)\n",
        "    filled = report.filled_quantity if report.state == 'filled' else 0.0\n",
        f"{_RUNS} -k the_rows_say",
    ),
    (
        "orders: a refusal of the second request is taken for the first one's",
        "answers.py",
        "(report.repeated or resent)",
        "report.repeated",
        f"{_RULES} -k second_request",
    ),
    (
        "orders: an id that was refused as repeated is a rejection",
        "answers.py",
        "(report.repeated or resent)",
        "resent",
        f"{_RULES} -k an_answer_makes",
    ),
    (
        "orders: a signal stays though its entry was refused",
        "orders.py",
        '    if entry.state == "rejected":\n        return "order_rejected"\n',
        '    if entry.state == "rejected":\n        return None\n',
        f"{_RULES} -k goes_when_its_entry",
    ),
    (
        "orders: what ended in doubt is not looked at again",
        "executor.py",
        '        return order.state in ("cancelled", "expired")\n',
        "        return False\n",
        f"{_RUNS} -k crosses_a_cancellation",
    ),
    (
        "orders: candles go on while it is not known what became of the entry",
        "executor.py",
        "        return not self.book.is_entered(signal_id) or withdrawal(self.book, signal_id) is not None\n",
        "        return False\n",
        f"{_RUNS} -k waits_until_it_is_known",
    ),
    (
        "orders: the next exit does not wait for the one before",
        "orders.py",
        "    if entry is None or left == 0 or not all(map(is_ended, book.of(signal_id))):\n",
        "    if entry is None or left == 0:\n",
        _RULES,
    ),
    (
        "orders: one refusal is enough to believe that nothing is left",
        "answers.py",
        "GONE_AFTER = 2",
        "GONE_AFTER = 1",
        f"{_RULES} -k refused_twice",
    ),
    (
        "orders: two of one id count once",
        "answers.py",
        "    return msgspec.structs.replace(orders[0], filled_quantity=filled), len(orders)\n",
        "    return orders[0], 1\n",
        f"{_RULES} -k adds_up",
    ),
    (
        "orders: the row of an order that the venue took is deleted",
        "orders.py",
        " and not one.venue_id and not one.missing_quantity",
        "",
        "tests/test_orders.py -k none_that_the_venue_took",
    ),
    (
        "orders: another account's orders are asked about at this one",
        "executor.py",
        "            if order.account != self.terms.account and not",
        "            if order.account == '' and not",
        f"{_RUNS} -k another_account",
    ),
    (
        "orders: an exit is valid for no longer, however slow the store",
        "executor.py",
        "max(self._exit_validity_ms * 2**self._late, _COMMITS_PER_VALIDITY * self._commit_ms)",
        "self._exit_validity_ms * 2**self._late",
        f"{_RUNS} -k each_commit_takes_longer",
    ),
    (
        "orders: an exit that came too late is followed by one that will",
        "executor.py",
        "self._exit_validity_ms * 2**self._late",
        "self._exit_validity_ms",
        f"{_RUNS} -k venue_has_it_later",
    ),
    (
        "orders: a run may end before a late fill is on record",
        "executor.py",
        "        self._pause_seconds = 0.0\n        if count > 1:\n",
        "        self._pause_seconds = 0.0\n        self._doubtful.discard(order.client_order_id)\n        if count > 1:\n",
        f"{_RUNS} -k does_not_end_between",
    ),
    (
        "orders: who is killed before it tells of a possible duplicate hides it",
        "executor.py",
        "            if report is None and may_turn_up(order, self.terms):\n",
        "            if False:\n",
        f"{_RUNS} -k by_the_next_run_too",
    ),
]
