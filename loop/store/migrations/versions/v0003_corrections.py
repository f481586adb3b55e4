"""Corrections of votes; message ids by their digest."""

from __future__ import annotations

import hashlib
import sqlite3

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    connection = op.get_bind()
    is_sqlite = connection.dialect.name == "sqlite"
    with op.batch_alter_table("votes", recreate="always" if is_sqlite else "never") as table:
        table.add_column(sa.Column("correction", sa.String(), nullable=True))
    digest = "substr(encode(sha256(convert_to(message_id, 'UTF8')), 'hex'), 1, 32)"
    if is_sqlite:
        digest = "message_digest(message_id)"
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        driver.create_function("message_digest", 1, _digest)
    for table_name in ("response_index", "votes"):
        op.execute(f"UPDATE {table_name} SET message_id = {digest} WHERE message_id IS NOT NULL")


def _digest(message_id: str) -> str:
    return hashlib.sha256(message_id.encode()).hexdigest()[:32]
