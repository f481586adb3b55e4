"""When a dead letter was written, so that it leaves by age; those that are there count as written now. An index of the
few that are not sent.
"""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


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
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("topic", "partition", "offset", "log_id"),
    )
    op.execute(f"INSERT INTO dead_letters_new SELECT *, {time.time() * 1000:.0f} FROM dead_letters")
    op.drop_table("dead_letters")
    op.rename_table("dead_letters_new", "dead_letters")
    unsent = sa.text("NOT sent")
    op.create_index(
        "dead_letters_unsent", "dead_letters", ["topic", "partition"], sqlite_where=unsent, postgresql_where=unsent
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER INDEX dead_letters_new_pkey RENAME TO dead_letters_pkey")
