"""The SQL of the PostgreSQL backend. A group of commits is decided and applied by one statement, in one round trip.

How one statement can be enough, without a lock taken beforehand: all of it sees one snapshot, and each commit raises
its scope's number. ``bumped`` raises it only from the number that the snapshot shows; when another process was
faster, PostgreSQL waits for that one, looks at the number anew, finds it raised, and ``bumped`` is empty. Everything
that writes hangs on ``bumped``, so then nothing was written, and the statement is sent again.

Invariants:

* Within a group no commit expects a key that an earlier one writes, and no writer comes twice
  (:func:`take_group` sees to it); so all can be judged by the same snapshot.
* A repeated op raises nothing but still rewrites the scope's row: waiting for that is the durability barrier.
* ``guard`` reads the settings that make a commit durable in the very transaction that relies on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from ...contract import MAX_WRITERS, Key, Op
from ..sql import FORMAT, MAX_GROUP, MAX_GROUP_BYTES, PAGE


class Statements(NamedTuple):
    """Every statement, for one schema."""

    has_schema: str
    add_schema: str
    tables: tuple[str, ...]
    persistence: str
    format: str
    barrier: str
    add_scope: str
    lock_scope: str
    commit: str
    commit_one: str
    """A single commit that deletes nothing: quicker, but when it writes nothing it does not say why."""
    read: str
    read_range: str
    """All rows between two keys, up to a limit."""
    head: str
    keys: str
    """With a place for more conditions, which begin with parameter 5."""
    scopes: str


def statements(schema: str) -> Statements:
    """Return the statements; ``schema`` is a plain lower-case name."""
    pieces = _pieces(schema)
    s, row_of = pieces.s, pieces.row_of
    return Statements(
        has_schema=f"SELECT FROM pg_namespace WHERE nspname = '{schema}'",
        add_schema=f"CREATE SCHEMA {s}",
        tables=_tables(s),
        persistence=(
            "SELECT c.relname, c.relpersistence::text FROM pg_class AS c JOIN pg_namespace AS n "
            f"ON n.oid = c.relnamespace WHERE n.nspname = '{schema}' "
            "AND c.relname IN ('format', 'scopes', 'writers', 'rows') AND c.relkind = 'r'"
        ),
        format=f"SELECT number FROM {s}.format",
        barrier=(f"UPDATE {s}.format SET number = number WHERE set_config('synchronous_commit', $1, true) IS NOT NULL"),
        add_scope=f"INSERT INTO {s}.scopes VALUES ($1, 0, 0) ON CONFLICT DO NOTHING",
        lock_scope=f"SELECT FROM {s}.scopes WHERE scope = $1 FOR UPDATE",
        commit=_commit(pieces),
        commit_one=_commit_one(pieces),
        read=(
            "SELECT r.domain, r.entity_name, r.entity_id, convert_to(r.row::text, 'UTF8'), r.version, r.writer, r.n "
            f"FROM json_to_recordset($2::json) AS k(d text, e text, i text) {row_of.format('k')} WHERE r.scope = $1"
        ),
        read_range=(
            f"SELECT domain, entity_name, entity_id, convert_to(row::text, 'UTF8'), version, writer, n FROM {s}.rows "
            "WHERE scope = $1 AND (domain, entity_name, entity_id) >= ($2, $3, $4) "
            "AND (domain, entity_name, entity_id) <= ($5, $6, $7) LIMIT $8::bigint"
        ),
        head=(
            f"SELECT s.number, w.writer, w.n, w.number FROM {s}.scopes AS s LEFT JOIN {s}.writers AS w USING (scope) "
            "WHERE s.scope = $1 ORDER BY w.number"
        ),
        keys=(
            f"SELECT domain, entity_name, entity_id FROM {s}.rows WHERE scope = $1 "
            "AND (domain, entity_name, entity_id) > ($2, $3, $4){} "
            f"ORDER BY domain, entity_name, entity_id LIMIT {PAGE}"
        ),
        scopes=f"SELECT scope FROM {s}.scopes WHERE number > 0 ORDER BY scope",
    )


class _Pieces(NamedTuple):
    """What several statements are made of."""

    s: str
    """The schema, as SQL writes it."""
    match: str
    """That ``r`` is the row of a key, which is taken from the table named."""
    row_of: str
    """Joins that row, if there is one, as ``r``."""
    writer_of: str
    """Joins what is known of a writer, as ``l``."""
    put: str
    """Writes rows."""
    safe: str
    """That this transaction is durable."""


def _pieces(schema: str) -> _Pieces:
    s = f'"{schema}"'
    match = "r.domain = {0}.d AND r.entity_name = {0}.e AND r.entity_id = {0}.i"
    # OFFSET 0 keeps these apart from the rest, so that each row is looked up by its key, whatever the planner thinks
    # of the table's size. The scope is compared afterwards, lest all rows of the scope are looked through.
    row_of = f"LEFT JOIN LATERAL (SELECT * FROM {s}.rows AS r WHERE {match} OFFSET 0) AS r ON true"
    writer_of = (
        f"LEFT JOIN LATERAL (SELECT * FROM {s}.writers WHERE scope = $1 AND writer = {{}} OFFSET 0) AS l ON true"
    )
    # A row that lies in another scope gets no text, which the table refuses: two scopes may race for a key.
    put = (
        f"INSERT INTO {s}.rows AS r SELECT $1, {{}} ON CONFLICT (domain, entity_name, entity_id) DO UPDATE "
        "SET row = CASE WHEN r.scope = excluded.scope THEN excluded.row END, "
        "version = excluded.version, writer = excluded.writer, n = excluded.n"
    )
    safe = (
        "set_config('synchronous_commit', $5, true) IS NOT NULL AND current_setting('fsync') = 'on' "
        "AND current_setting('full_page_writes') = 'on' "
        "AND (NOT $6::bool OR current_setting('synchronous_standby_names') <> '')"
    )
    return _Pieces(s, match, row_of, writer_of, put, safe)


def _tables(s: str) -> tuple[str, ...]:
    return (
        f"CREATE TABLE IF NOT EXISTS {s}.format (number int NOT NULL)",
        f"INSERT INTO {s}.format SELECT {FORMAT} WHERE NOT EXISTS (SELECT FROM {s}.format)",
        f'CREATE TABLE IF NOT EXISTS {s}.scopes (scope text COLLATE "C" PRIMARY KEY, number bigint NOT NULL, '
        "writers int NOT NULL) WITH (fillfactor = 50)",
        f'CREATE TABLE IF NOT EXISTS {s}.writers (scope text COLLATE "C", writer text COLLATE "C", '
        "n bigint NOT NULL, number bigint NOT NULL, PRIMARY KEY (scope, writer)) WITH (fillfactor = 50)",
        f'CREATE TABLE IF NOT EXISTS {s}.rows (scope text COLLATE "C" NOT NULL, domain text COLLATE "C", '
        'entity_name text COLLATE "C", entity_id text COLLATE "C", row json NOT NULL, version bigint NOT NULL, '
        "writer text NOT NULL, n bigint NOT NULL, PRIMARY KEY (domain, entity_name, entity_id)) "
        "WITH (fillfactor = 70)",
        f"CREATE INDEX IF NOT EXISTS rows_by_scope ON {s}.rows (scope, domain, entity_name, entity_id)",
    )


def _commit(pieces: _Pieces) -> str:
    """Return what decides and applies a group, and says of each what became of it."""
    s, match, row_of, writer_of, put, safe = pieces
    return f"""
WITH sent AS MATERIALIZED (SELECT * FROM json_to_recordset($2::json) AS x(at int, w text, n bigint)),
wanted AS MATERIALIZED (SELECT * FROM json_to_recordset($3::json) AS x(at int, d text, e text, i text, v bigint)),
change AS MATERIALIZED (SELECT * FROM json_to_recordset($4::json) AS x(at int, d text, e text, i text, r text)),
held AS MATERIALIZED (SELECT number, writers FROM {s}.scopes WHERE scope = $1),
guard AS MATERIALIZED (SELECT {safe} AS safe),
clash AS MATERIALIZED (SELECT wanted.* FROM wanted {row_of.format("wanted")}
  WHERE coalesce(CASE WHEN r.scope = $1 THEN r.version END, 0) <> v),
stranger AS MATERIALIZED (SELECT change.at, r.scope, d, e, i FROM change {row_of.format("change")} WHERE r.scope <> $1),
judged AS MATERIALIZED (SELECT at, w, sent.n, l.number AS last,
  CASE WHEN l.n = sent.n THEN 'repeated' WHEN l.n > sent.n THEN 'behind'
    WHEN at IN (SELECT at FROM clash) THEN 'clash' WHEN at IN (SELECT at FROM stranger) THEN 'stranger'
    ELSE 'granted' END AS verdict
  FROM sent {writer_of.format("sent.w")}),
granted AS MATERIALIZED (SELECT at, w, n, held.number + row_number() OVER (ORDER BY at) AS number
  FROM judged, held WHERE verdict = 'granted'),
tally AS MATERIALIZED (SELECT count(*) FILTER (WHERE verdict = 'granted') AS more,
  count(*) FILTER (WHERE verdict = 'granted' AND last IS NULL) AS newcomers,
  count(*) FILTER (WHERE verdict IN ('granted', 'repeated')) AS due FROM judged),
bumped AS (UPDATE {s}.scopes AS c SET number = c.number + more, writers = least(c.writers + newcomers, {MAX_WRITERS})
  FROM held, tally WHERE c.scope = $1 AND c.number = held.number AND due > 0 AND (SELECT safe FROM guard)
  RETURNING held.writers + newcomers - {MAX_WRITERS} AS excess),
final AS MATERIALIZED (SELECT DISTINCT ON (d, e, i) d, e, i, r, number, w, n
  FROM change JOIN granted USING (at) CROSS JOIN bumped ORDER BY d, e, i, at DESC),
put AS ({put.format("d, e, i, final.r::json, number, w, n FROM final WHERE final.r IS NOT NULL")}),
cut AS (DELETE FROM {s}.rows AS r USING final WHERE final.r IS NULL AND {match.format("final")}
  AND (r.scope = $1) IS TRUE),
wrote AS (INSERT INTO {s}.writers SELECT $1, w, n, number FROM granted CROSS JOIN bumped
  ON CONFLICT (scope, writer) DO UPDATE SET n = excluded.n, number = excluded.number),
forgot AS (DELETE FROM {s}.writers WHERE scope = $1 AND writer = ANY (ARRAY(SELECT writer FROM {s}.writers
  WHERE scope = $1 AND writer NOT IN (SELECT w FROM granted)
  ORDER BY number LIMIT (SELECT greatest(excess, 0) FROM bumped))) AND EXISTS (SELECT FROM bumped WHERE excess > 0))
SELECT at, verdict, coalesce(g.number, last), (SELECT count(*) FROM bumped), (SELECT safe FROM guard),
  CASE verdict WHEN 'clash' THEN (SELECT json_agg(json_build_array(d, e, i)) FROM clash WHERE at = judged.at)
    WHEN 'stranger' THEN (SELECT json_build_array(scope, d, e, i) FROM stranger WHERE at = judged.at LIMIT 1) END::text
FROM judged LEFT JOIN granted AS g USING (at)
"""


def _commit_one(pieces: _Pieces) -> str:
    """Return what decides and applies a single commit."""
    s, _, row_of, writer_of, put, safe = pieces
    return f"""
WITH held AS MATERIALIZED (SELECT c.number, c.writers, l.n FROM (SELECT * FROM {s}.scopes WHERE scope = $1) AS c
  {writer_of.format("$2")}),
bumped AS (UPDATE {s}.scopes AS c SET number = c.number + 1, writers = c.writers + (held.n IS NULL)::int FROM held
  WHERE c.scope = $1 AND c.number = held.number AND {safe}
  AND CASE WHEN held.n IS NULL THEN held.writers < {MAX_WRITERS} ELSE held.n < $7::bigint END
  AND NOT EXISTS (SELECT FROM json_to_recordset($3::json) AS x(d text, e text, i text, v bigint) {row_of.format("x")}
    WHERE coalesce(CASE WHEN r.scope = $1 THEN r.version END, 0) <> v)
  RETURNING c.number),
put AS ({
        put.format('''d, e, i, x.r::json, number, $2, $7::bigint
  FROM bumped CROSS JOIN json_to_recordset($4::json) AS x(d text, e text, i text, r text)''')
    }),
wrote AS (INSERT INTO {s}.writers SELECT $1, $2, $7::bigint, number FROM bumped
  ON CONFLICT (scope, writer) DO UPDATE SET n = excluded.n, number = excluded.number)
SELECT number FROM bumped
"""


ATTEST = """
SELECT current_setting('server_version_num')::int, current_setting('server_encoding'), pg_is_in_recovery(),
  current_setting('fsync'), current_setting('full_page_writes'), current_setting('synchronous_commit'),
  current_setting('synchronous_standby_names'), current_setting('transaction_read_only'),
  (SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum') AND state = 'streaming'),
  (SELECT count(*) FROM pg_stat_replication WHERE state IS NULL)
"""
"""What a commit survives hangs on these."""


class Facts(NamedTuple):
    """The answer to :data:`ATTEST`."""

    version: int
    encoding: str
    in_recovery: bool
    fsync: str
    full_page_writes: str
    synchronous_commit: str
    standby_names: str
    read_only: str
    synchronous_standbys: int
    hidden_standbys: int
    """Connected ones that this user may not look at."""


class Asked(NamedTuple):
    """One commit, as it is sent."""

    op: Op
    expect: dict[Key, int]
    texts: dict[Key, str | None]
    size: int


def take_group(waiting: Sequence[Asked]) -> list[int]:
    """Return which of ``waiting`` can be judged together: the first, and all after it that depend on none before."""
    taken: list[int] = []
    writers: set[str] = set()
    written: set[Key] = set()
    size = 0
    for at, asked in enumerate(waiting):
        if taken and (
            asked.op.writer in writers or size + asked.size > MAX_GROUP_BYTES or not written.isdisjoint(asked.expect)
        ):
            continue
        taken.append(at)
        writers.add(asked.op.writer)
        written.update(asked.texts)
        size += asked.size
        if len(taken) == MAX_GROUP:
            break
    return taken


def recordset(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return rows as the JSON that ``json_to_recordset`` takes."""
    return msgspec.json.encode([dict(zip(names, row, strict=True)) for row in rows]).decode()
