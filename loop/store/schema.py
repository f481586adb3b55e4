"""The one schema of the store, for SQLite and Postgres: tables and what their columns mean. No queries."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Date,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    text,
)
from sqlalchemy.dialects import postgresql

from loop.events import KEY, UUID

# Of `migrations/versions`; to be raised with every change below.
REVISION = "0010"

metadata = MetaData()
Json = JSON().with_variant(postgresql.JSONB(), "postgresql")
Bytes = LargeBinary()
# Sorted by bytes on both, so that what streams in the order of ids has one order everywhere.
ResponseId = String(80).with_variant(postgresql.VARCHAR(80, collation="C"), "postgresql")
# Of tables to which rows are added until retention takes them away. Autovacuum would read and write all that was added
# once more, so as to save work for later readers, of whom there are none.
ONLY_ADDED = {"autovacuum_vacuum_insert_threshold": -1, "toast.autovacuum_vacuum_insert_threshold": -1}
_autoincrement = BigInteger().with_variant(Integer(), "sqlite")

# --- written by the joiner -------------------------------------------------------------------------------------------

# Responses are found by their response_id turned round (`turned_id`): <uuid7>-<key>-<chatcmpl|cmpl>. It begins with the
# time, so that new rows go to the end of the index; by the id as it is, each would dirty a page of its own.

# Bodies, by the event's day so that retention drops whole days; the event's own bytes, never re-encoded.
responses = Table(
    "responses",
    metadata,
    Column("day", Date, primary_key=True),
    Column("turned_id", ResponseId, primary_key=True),
    Column("body", Bytes, nullable=False),
    postgresql_partition_by="RANGE (day)",
    sqlite_with_rowid=False,
)

# What the join needs to know of a response without its body.
response_index = Table(
    "response_index",
    metadata,
    Column("turned_id", ResponseId, primary_key=True),
    Column("message_id", String(256)),  # as `loop.events.message_digest` has it; so in `votes`
    Column("started_at_ms", BigInteger, nullable=False),
    Column("event_id", String(256), nullable=False),
    Index(
        "response_index_message",
        "message_id",
        sqlite_where=text("message_id IS NOT NULL"),
        postgresql_where=text("message_id IS NOT NULL"),
    ),
    sqlite_with_rowid=False,
    postgresql_with=ONLY_ADDED,
)

IS_PENDING = text("pending")  # as its index says it: to SQLite, SQLAlchemy's `pending = 1` is another condition

# One row for each feedback_id, at its earliest stamp. The key is a part of the identity: so a partition's votes are
# its joiner's alone, even where an app uses one feedback_id for two responses. `pending`: its response is not seen yet.
votes = Table(
    "votes",
    metadata,
    Column("key", String(16), primary_key=True),
    Column("feedback_id", String(256), primary_key=True),
    Column("response_id", ResponseId),
    Column("message_id", String(256)),
    Column("choice_index", Integer, nullable=False),
    Column("rater", String(64), nullable=False),
    Column("value", String(8), nullable=False),
    Column("weight", Float, nullable=False),
    Column("source", String(64), nullable=False),
    Column("hlc", BigInteger, nullable=False),
    Column("event_id", String(256), nullable=False),
    Column("detail", Json, nullable=False),
    Column("pending", Boolean, nullable=False),
    Column("correction", String),
    Index("votes_response", "response_id"),
    Index("votes_message", "message_id"),
    Index("votes_pending", "hlc", sqlite_where=IS_PENDING, postgresql_where=IS_PENDING),
)

# A response's choice with the votes that stand on it: what snapshots read, in the order of its key. Of the event itself
# it has what training can use.
examples = Table(
    "examples",
    metadata,
    Column("day", Date, primary_key=True),
    Column("turned_id", ResponseId, primary_key=True),
    Column("choice_index", Integer, primary_key=True, autoincrement=False),
    Column("key", String(16), nullable=False),
    Column("adapter", String(160), nullable=False),
    Column("arm", String(16), nullable=False),
    Column("conversation_id", String(256)),
    Column("up", Integer, nullable=False),
    Column("down", Integer, nullable=False),
    # [{"rater", "value": "up" | "down", "weight", "source", "hlc", "correction"?}], one for each rater whose last vote
    # stands; `up` and `down` count those of them that are thumbs
    Column("votes", Json, nullable=False),
    Column("voted_at_ms", BigInteger, nullable=False),
    Column("sketch", Bytes, nullable=False),  # the `loop.minhash.SKETCH` of what was asked
    Column("content", Bytes, nullable=False),  # a `loop.content.Content`
    Index("examples_adapter", "adapter", "voted_at_ms"),
    Index("examples_labels", "day", "up", "down"),  # to be counted
    sqlite_with_rowid=False,
)

# The events of responses that have examples, for the votes that come when `responses` has dropped their day.
rated_bodies = Table(
    "rated_bodies",
    metadata,
    Column("turned_id", ResponseId, primary_key=True),
    Column("body", Bytes, nullable=False),
)

# One row for each partition number: whoever moves it has this partition's keys, of both topics, to himself until he
# commits. `log_id` is the log's identity, so that topics which were made anew are read from their beginning.
positions = Table(
    "positions",
    metadata,
    Column("consumer_group", String(128), primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("log_id", String(256), nullable=False),
    Column("responses_next", BigInteger, nullable=False),
    Column("feedback_next", BigInteger, nullable=False),
)

IS_UNSENT = text("NOT sent")

# Outbox: written in the join's transaction, sent to `<topic>.dlt` afterwards. `replayed`: was appended to its own topic
# again, by an operator. A topic that was made anew begins at offset 0 again, so `log_id` is a part of the place.
dead_letters = Table(
    "dead_letters",
    metadata,
    Column("topic", String(249), primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("offset", BigInteger, primary_key=True),
    Column("log_id", String(256), primary_key=True),
    Column("reason", String, nullable=False),
    Column("key", String(256), nullable=False),
    Column("value", Bytes, nullable=False),
    Column("sent", Boolean, nullable=False),
    Column("replayed", Boolean, nullable=False),
    Column("at_ms", BigInteger, nullable=False),  # when it was written here: Unix time
    Index("dead_letters_unsent", "topic", "partition", sqlite_where=IS_UNSENT, postgresql_where=IS_UNSENT),
)

# Tombstones, which stay: what they name (see `loop.erasure`) was erased and is not joined again. `at_ms`: when, in Unix
# time; none where it follows from another row.
erasures = Table(
    "erasures",
    metadata,
    Column("kind", String(16), primary_key=True),  # rater | user | response | message
    Column("subject", String(80), primary_key=True),
    Column("at_ms", BigInteger),
    Index("erasures_subject", "subject"),
)

# --- written by the nightly run --------------------------------------------------------------------------------------

# Salted split, kept across nights: a unit once held out stays held out. There are as many units as distinct prompts, so
# rows have many, of 64 bits in little-endian order, and are only added. A unit that is in rows of both is held out.
split_units = Table(
    "split_units",
    metadata,
    Column("id", _autoincrement, primary_key=True, autoincrement=True),
    Column("kind", String(16), nullable=False),  # rater | conversation | cluster
    Column("held_out", Boolean, nullable=False),
    Column("units", Bytes, nullable=False),
)

adapters = Table(
    "adapters",
    metadata,
    Column("version", String(16), primary_key=True),  # v000012
    Column("alias", String(128), nullable=False),
    Column("state", String(16), nullable=False),
    Column("parent", String(16)),
    Column("run_id", String(64)),
    Column("path", String, nullable=False),
    Column("manifest", Json, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
)

# One row for each change of an adapter's state, with its reason.
adapter_history = Table(
    "adapter_history",
    metadata,
    Column("id", _autoincrement, primary_key=True, autoincrement=True),
    Column("version", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
)

# Which adapters serve an alias. Each change makes a new generation; gateways acknowledge it.
routes = Table(
    "routes",
    metadata,
    Column("alias", String(128), primary_key=True),
    Column("generation", BigInteger, nullable=False),
    Column("live", String(16)),  # None: the base model
    Column("canary", String(16)),
    Column("canary_share", Float, nullable=False),
    Column("since_ms", BigInteger, nullable=False),  # of this live / canary / share
)

route_acks = Table(
    "route_acks",
    metadata,
    Column("gateway_id", String(128), primary_key=True),
    Column("generation", BigInteger, nullable=False),
    # The oldest generation that a request still open on this gateway was routed by: what may not be unloaded yet.
    Column("oldest_open", BigInteger, nullable=False),
    Column("seen_ms", BigInteger, nullable=False),
)

# What callers of the gateways present: the SHA-256, never the key. Rows are never deleted: a gateway is open to its own
# machine only as long as there never was a key.
api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", String(12), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("scopes", Json, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("revoked_at_ms", BigInteger),
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", String(64), primary_key=True),
    Column("trigger", String(16), nullable=False),  # clock | operator
    Column("state", String(16), nullable=False),  # requested | running | done | skipped | failed
    Column("outcome", String, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("finished_at_ms", BigInteger),
)

# A finished stage of a run, with what it produced; a resumed run goes on behind the last one.
run_stages = Table(
    "run_stages",
    metadata,
    Column("run_id", String(64), primary_key=True),
    Column("stage", String(32), primary_key=True),
    Column("output", Json, nullable=False),
    Column("started_at_ms", BigInteger, nullable=False),
    Column("finished_at_ms", BigInteger, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("holder", String(128), nullable=False),
    Column("expires_at_ms", BigInteger, nullable=False),
)


def turn(response_id: str) -> str:
    """chatcmpl-<key>-<uuid> as <uuid>-<key>-chatcmpl, the order of the store's indexes."""
    return f"{response_id[UUID]}-{response_id[KEY]}-{response_id[:-54]}"


def turn_back(turned_id: str) -> str:
    """The response_id that was turned."""
    return f"{turned_id[54:]}-{turned_id[37:53]}-{turned_id[:36]}"
