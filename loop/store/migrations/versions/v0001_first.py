"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

Counter = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
ResponseId = sa.String(80).with_variant(postgresql.VARCHAR(80, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "adapter_history",
        sa.Column("id", Counter, autoincrement=True, nullable=False),
        sa.Column("version", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "adapters",
        sa.Column("version", sa.String(length=16), nullable=False),
        sa.Column("alias", sa.String(length=128), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("parent", sa.String(length=16), nullable=True),
        sa.Column("run_id", sa.String(length=64), nullable=True),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("manifest", Json, nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("version"),
    )
    op.create_table(
        "dead_letters",
        sa.Column("topic", sa.String(length=249), nullable=False),
        sa.Column("partition", sa.Integer(), nullable=False),
        sa.Column("offset", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("key", sa.String(length=256), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.Column("sent", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("topic", "partition", "offset"),
    )
    op.create_table(
        "examples",
        sa.Column("response_id", ResponseId, nullable=False),
        sa.Column("choice_index", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(length=16), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("adapter", sa.String(length=160), nullable=False),
        sa.Column("arm", sa.String(length=16), nullable=False),
        sa.Column("conversation_id", sa.String(length=256), nullable=True),
        sa.Column("up", sa.Integer(), nullable=False),
        sa.Column("down", sa.Integer(), nullable=False),
        sa.Column("votes", Json, nullable=False),
        sa.Column("voted_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("response_id", "choice_index"),
    )
    op.create_index("examples_adapter", "examples", ["adapter", "voted_at_ms"])
    op.create_index("examples_order", "examples", ["day", "response_id", "choice_index"])
    op.create_table(
        "leases",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("holder", sa.String(length=128), nullable=False),
        sa.Column("expires_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "positions",
        sa.Column("consumer_group", sa.String(length=128), nullable=False),
        sa.Column("partition", sa.Integer(), nullable=False),
        sa.Column("log_id", sa.String(length=256), nullable=False),
        sa.Column("responses_next", sa.BigInteger(), nullable=False),
        sa.Column("feedback_next", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("consumer_group", "partition"),
    )
    op.create_table(
        "response_index",
        sa.Column("turned_id", ResponseId, nullable=False),
        sa.Column("message_id", sa.String(length=256), nullable=True),
        sa.Column("started_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("event_id", sa.String(length=256), nullable=False),
        sa.PrimaryKeyConstraint("turned_id"),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "response_index_message",
        "response_index",
        ["message_id"],
        sqlite_where=sa.text("message_id IS NOT NULL"),
        postgresql_where=sa.text("message_id IS NOT NULL"),
    )
    op.create_table(
        "responses",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("turned_id", ResponseId, nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("day", "turned_id"),
        postgresql_partition_by="RANGE (day)",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "route_acks",
        sa.Column("gateway_id", sa.String(length=128), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("oldest_open", sa.BigInteger(), nullable=False),
        sa.Column("seen_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("gateway_id"),
    )
    op.create_table(
        "routes",
        sa.Column("alias", sa.String(length=128), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("live", sa.String(length=16), nullable=True),
        sa.Column("canary", sa.String(length=16), nullable=True),
        sa.Column("canary_share", sa.Float(), nullable=False),
        sa.Column("since_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("alias"),
    )
    op.create_table(
        "run_stages",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("stage", sa.String(length=32), nullable=False),
        sa.Column("output", Json, nullable=False),
        sa.Column("started_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("finished_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "stage"),
    )
    op.create_table(
        "runs",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("trigger", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("finished_at_ms", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("run_id"),
    )
    op.create_table(
        "split_units",
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("unit", sa.String(length=64), nullable=False),
        sa.Column("held_out", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "unit"),
    )
    op.create_table(
        "votes",
        sa.Column("key", sa.String(length=16), nullable=False),
        sa.Column("feedback_id", sa.String(length=256), nullable=False),
        sa.Column("response_id", ResponseId, nullable=True),
        sa.Column("message_id", sa.String(length=256), nullable=True),
        sa.Column("choice_index", sa.Integer(), nullable=False),
        sa.Column("rater", sa.String(length=64), nullable=False),
        sa.Column("value", sa.String(length=8), nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("source", sa.String(length=64), nullable=False),
        sa.Column("hlc", sa.BigInteger(), nullable=False),
        sa.Column("event_id", sa.String(length=256), nullable=False),
        sa.Column("detail", Json, nullable=False),
        sa.Column("pending", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("key", "feedback_id"),
    )
    op.create_index("votes_message", "votes", ["message_id"])
    op.create_index(
        "votes_pending", "votes", ["hlc"], sqlite_where=sa.text("pending"), postgresql_where=sa.text("pending")
    )
    op.create_index("votes_response", "votes", ["response_id"])
