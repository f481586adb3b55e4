"""Autovacuum leaves Postgres' bodies alone as long as rows are only added: see `schema.ONLY_ADDED`."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    children = sa.text("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'responses'::regclass")
    for table in ["response_index", *op.get_bind().execute(children).scalars()]:
        op.execute(
            f"ALTER TABLE {table} SET"
            " (autovacuum_vacuum_insert_threshold = -1, toast.autovacuum_vacuum_insert_threshold = -1)"
        )
