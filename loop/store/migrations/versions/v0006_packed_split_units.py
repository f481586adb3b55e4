"""The split's units by many to a row: 8 bytes each, not a row of their own."""

from __future__ import annotations

import numpy as np
import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

UNITS_A_ROW = 65_536


def upgrade() -> None:
    op.rename_table("split_units", "split_units_old")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER INDEX split_units_pkey RENAME TO split_units_old_pkey")
    packed = op.create_table(
        "split_units",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("held_out", sa.Boolean(), nullable=False),
        sa.Column("units", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    assert packed is not None
    old = sa.table("split_units_old", sa.column("kind"), sa.column("unit"), sa.column("held_out", sa.Boolean()))
    query = sa.select(old.c.kind, old.c.held_out, old.c.unit).order_by(old.c.kind, old.c.held_out)
    for rows in op.get_bind().execute(query).partitions(UNITS_A_ROW):
        for kind, held_out in {(row.kind, row.held_out) for row in rows}:
            units = [int(row.unit, 16) for row in rows if (row.kind, row.held_out) == (kind, held_out)]
            stored = np.array(units, "<u8").tobytes()
            op.get_bind().execute(sa.insert(packed).values(kind=kind, held_out=held_out, units=stored))
    op.drop_table("split_units_old")
