"""By which name a process knows its own rows on a store that others share: a random text for each open store."""

from __future__ import annotations

import os
import secrets
from weakref import WeakKeyDictionary

from ..store import Store

_holders: WeakKeyDictionary[Store, str] = WeakKeyDictionary()


def holder_of(store: Store) -> str:
    """Return this process's holder on ``store``: always the same one for the same object.

    Two stores of one process have two, even on one database: each gives a sign of life of its own, and must not be
    taken for the other. A forked child has others than its parent, whose contexts are not its own.
    """
    holder = _holders.get(store)
    if holder is None:
        holder = _holders[store] = secrets.token_hex(8)
    return holder


os.register_at_fork(after_in_child=_holders.clear)
