"""Examples have what training can use of their events, in the order that snapshots read them in; the events of rated
responses stand in a table of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

from loop.content import content_of, encode_content
from loop.events import Choice, decode_response
from loop.minhash import sketches
from loop.store.schema import Bytes, Json, ResponseId, turn

revision = "0008"
down_revision = "0007"

ROWS = 1_000


def upgrade() -> None:
    connection = op.get_bind()
    for name in ("examples_adapter", "examples_order"):
        op.drop_index(name, "examples")
    op.rename_table("examples", "examples_old")
    if connection.dialect.name == "postgresql":
        op.execute("ALTER INDEX examples_pkey RENAME TO examples_old_pkey")
    kept = (  # but for the ids, which are turned
        sa.Column("key", sa.String(length=16), nullable=False),
        sa.Column("adapter", sa.String(length=160), nullable=False),
        sa.Column("arm", sa.String(length=16), nullable=False),
        sa.Column("conversation_id", sa.String(length=256), nullable=True),
        sa.Column("up", sa.Integer(), nullable=False),
        sa.Column("down", sa.Integer(), nullable=False),
        sa.Column("votes", Json, nullable=False),
        sa.Column("voted_at_ms", sa.BigInteger(), nullable=False),
    )
    made = op.create_table(
        "examples",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("turned_id", ResponseId, nullable=False),
        sa.Column("choice_index", sa.Integer(), nullable=False),
        *kept,
        sa.Column("sketch", Bytes, nullable=False),
        sa.Column("content", Bytes, nullable=False),
        sa.PrimaryKeyConstraint("day", "turned_id", "choice_index"),
        sqlite_with_rowid=False,
    )
    bodies = op.create_table(
        "rated_bodies",
        sa.Column("turned_id", ResponseId, nullable=False),
        sa.Column("body", Bytes, nullable=False),
        sa.PrimaryKeyConstraint("turned_id"),
    )
    assert made is not None
    assert bodies is not None
    place = (sa.Column("day", sa.Date()), sa.Column("response_id", ResponseId), sa.Column("choice_index", sa.Integer()))
    old = sa.table("examples_old", *(sa.column(c.name, c.type) for c in (*place, *kept)), sa.column("body", Bytes))
    order = (old.c.response_id, old.c.choice_index)
    after = ("", -1)
    while rows := connection.execute(
        sa.select(old).where(sa.tuple_(*order) > after).order_by(*order).limit(ROWS)
    ).all():
        connection.execute(sa.insert(made), converted(rows, [column.name for column in kept]))
        ids = [after[0], *(row.response_id for row in rows)]
        first = [row for before, row in zip(ids, rows, strict=False) if row.response_id != before]
        if first:
            connection.execute(
                sa.insert(bodies), [{"turned_id": turn(row.response_id), "body": row.body} for row in first]
            )
        after = (rows[-1].response_id, rows[-1].choice_index)
    op.drop_table("examples_old")
    op.create_index("examples_adapter", "examples", ["adapter", "voted_at_ms"])
    op.create_index("examples_labels", "examples", ["day", "up", "down"])


def converted(rows: Sequence[Any], kept: list[str]) -> list[dict[str, Any]]:
    """Old rows as new ones."""
    contents = []
    for row in rows:
        data = decode_response(bytes(row.body)).data
        choice = next((choice for choice in data.choices if choice.index == row.choice_index), Choice(message={}))
        contents.append(content_of(data, choice))
    sketched = sketches([content.asked for content in contents])
    return [
        {name: getattr(row, name) for name in kept}
        | {"day": row.day, "turned_id": turn(row.response_id), "choice_index": row.choice_index}
        | {"sketch": sketch, "content": encode_content(content)}
        for row, content, sketch in zip(rows, contents, sketched, strict=True)
    ]
