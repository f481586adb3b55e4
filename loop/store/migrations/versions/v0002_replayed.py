"""Dead letters that an operator has replayed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("dead_letters", sa.Column("replayed", sa.Boolean(), nullable=False, server_default=sa.false()))
    with op.batch_alter_table("dead_letters") as table:
        table.alter_column("replayed", server_default=None)
