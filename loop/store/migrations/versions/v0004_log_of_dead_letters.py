"""The log's identity as a part of a dead letter's place; of the letters that are there it is not known."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "dead_letters_new",
        sa.Column("topic", sa.String(length=249), nullable=False),
        sa.Column("partition", sa.Integer(), nullable=False),
        sa.Column("offset", sa.BigInteger(), nullable=False),
        sa.Column("log_id", sa.String(length=256), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("key", sa.String(length=256), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.Column("sent", sa.Boolean(), nullable=False),
        sa.Column("replayed", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("topic", "partition", "offset", "log_id"),
    )
    op.execute(
        "INSERT INTO dead_letters_new SELECT topic, partition, \"offset\", '', reason, key, value, sent, replayed"
        " FROM dead_letters"
    )
    op.drop_table("dead_letters")
    op.rename_table("dead_letters_new", "dead_letters")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER INDEX dead_letters_new_pkey RENAME TO dead_letters_pkey")
