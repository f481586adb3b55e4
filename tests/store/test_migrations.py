"""The schema as `schema.py` has it and as the migrations make it, on SQLite and on real Postgres: one and the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import date
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, inspect, select, text

from loop.events import Choice, ResponseLogged, encode, message_digest
from loop.settings import StoreSettings
from loop.snapshot.split import load_known
from loop.store import open_store, write
from loop.store.migrate import SCRIPTS, upgrade
from loop.store.partitions import ensure_days
from loop.store.schema import REVISION, dead_letters, metadata, response_index, turn, votes
from tests.contents import content_columns
from tests.services_real import RealPostgres


@pytest.fixture
def bare(store_settings: StoreSettings) -> Iterator[Engine]:
    """A database without a table."""
    made = create_engine(store_settings.url.get_secret_value())
    cascade = "" if made.dialect.name == "sqlite" else " CASCADE"
    with made.begin() as connection:
        for name in inspect(connection).get_table_names():
            connection.execute(text(f'DROP TABLE IF EXISTS "{name}"{cascade}'))
    yield made
    made.dispose()


def differences(connection: Connection) -> list[Any]:
    context = MigrationContext.configure(connection, opts={"compare_type": True})
    return compare_metadata(context, metadata)


def test_the_last_revision_is_this_codes() -> None:
    assert ScriptDirectory(str(SCRIPTS)).get_current_head() == REVISION


def test_migrated_from_nothing_it_is_the_schema(bare: Engine) -> None:
    with bare.begin() as connection:
        upgrade(connection)
        assert differences(connection) == []
        made = {table: details(connection, table) for table in metadata.tables}
        for table in reversed(metadata.sorted_tables):
            table.drop(connection)
        metadata.create_all(connection)
        assert {table: details(connection, table) for table in metadata.tables} == made


def details(connection: Connection, table: str) -> Any:
    """What autogenerate does not compare: primary keys, collations, indexes with their conditions, partitioning."""
    if connection.dialect.name == "sqlite":
        query = text("SELECT sql FROM sqlite_master WHERE tbl_name = :table ORDER BY name")
        return [sql and sql.replace('"', "") for sql in connection.execute(query, {"table": table}).scalars()]
    queries = (
        "SELECT indexdef FROM pg_indexes WHERE tablename = :table ORDER BY indexdef",
        "SELECT column_name, data_type, collation_name, is_nullable FROM information_schema.columns"
        " WHERE table_name = :table ORDER BY ordinal_position",
        "SELECT pg_get_partkeydef(cast(:table AS regclass))",
        "SELECT reloptions FROM pg_class WHERE relname = :table",
    )
    return [[tuple(row) for row in connection.execute(text(query), {"table": table})] for query in queries]


def test_a_new_store_is_of_the_last_revision(bare: Engine, store_settings: StoreSettings) -> None:
    for _ in range(2):
        store = open_store(store_settings)
        with store.connect() as connection:
            assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == [REVISION]
            assert differences(connection) == []
        store.dispose()


def test_a_store_of_a_newer_version_is_refused(bare: Engine, store_settings: StoreSettings) -> None:
    store = open_store(store_settings)
    with write(store) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    store.dispose()
    with pytest.raises(ValueError, match=r"9999.*made by a newer version"):
        open_store(store_settings)


def test_an_older_store_is_brought_forward_with_what_it_holds(bare: Engine, store_settings: StoreSettings) -> None:
    began_ms = int(time.time() * 1000)
    with bare.begin() as connection:
        upgrade(connection, "0001")
        connection.execute(
            text("INSERT INTO dead_letters VALUES ('t', 1, 2, 'broken', 'k', :value, :sent)"),
            {"value": b"\x00", "sent": True},
        )
        connection.execute(text("INSERT INTO response_index VALUES ('r', 'm', 1, 'e'), ('s', NULL, 1, 'e')"))
        connection.execute(
            text("INSERT INTO votes VALUES ('k', 'f', NULL, 'm', 0, '', 'up', 1, 'explicit', 1, 'e', '{}', true)")
        )
        connection.execute(
            text("INSERT INTO split_units VALUES ('rater', :a, true), ('cluster', :b, false), ('cluster', :c, true)"),
            {"a": f"{7:016x}", "b": f"{2**64 - 1:016x}", "c": f"{9:016x}"},
        )
        data = rated(choices=2)
        event = encode(data, event_id="e", key=KEY, source="test", now_ms=1)
        for choice in (0, 1):
            connection.execute(
                text(
                    "INSERT INTO examples VALUES (:id, :choice, :key, '2026-01-02', 'a@v000001', 'live', NULL, 1, 0,"
                    " '[]', 7, :body)"
                ),
                {"id": data.response_id, "choice": choice, "key": KEY, "body": event},
            )
        upgrade(connection, "0008")
    known = load_known(bare)
    assert (known.held_raters.tolist(), known.held_conversations.tolist()) == ([7], [])
    assert (known.train_prompts.tolist(), known.held_prompts.tolist()) == ([2**64 - 1], [9])
    store = open_store(store_settings)
    assert [len(units) for units in vars(load_known(store)).values()] == [0, 0, 0, 0]  # of a hash that is no more
    with store.connect() as connection:
        assert differences(connection) == []
        *letter, at_ms = connection.execute(select(dead_letters)).one()
        assert letter == ["t", 1, 2, "", "broken", "k", b"\x00", True, False]
        assert began_ms <= at_ms <= time.time() * 1000
        digest = message_digest("m")  # which votes by a trace id know alone
        assert connection.execute(select(response_index.c.message_id).order_by("turned_id")).scalars().all() == [
            digest,
            None,
        ]
        assert connection.execute(select(votes.c.message_id, votes.c.correction)).one() == (digest, None)
        examples = connection.execute(select(metadata.tables["examples"]).order_by("choice_index")).all()
        bodies = connection.execute(select(metadata.tables["rated_bodies"])).all()
    assert bodies == [(turn(data.response_id), event)]
    kept = {"turned_id": turn(data.response_id), "day": date(2026, 1, 2), "arm": "live", "up": 1, "voted_at_ms": 7}
    for choice, example in enumerate(examples):
        found = example._asdict()
        assert found.items() >= (kept | {"choice_index": choice} | content_columns(data, choice)).items()
    assert len(examples) == 2
    store.dispose()


KEY = "0f" * 8


def rated(choices: int) -> ResponseLogged:
    made = [Choice(message={"content": f"Answer {n}."}, index=n, token_ids=[n, 7]) for n in range(choices)]
    return ResponseLogged(
        response_id=f"chatcmpl-{KEY}-{'0' * 36}", choices=made, prompt="Is this it?", prompt_token_ids=[1, 2]
    )


def test_autovacuum_leaves_alone_what_is_only_added(postgres: RealPostgres) -> None:
    settings = postgres.new_store()
    bare = create_engine(settings.url.get_secret_value())
    with bare.begin() as connection:
        upgrade(connection, "0006")
        connection.execute(
            text(
                "CREATE TABLE responses_20250109 PARTITION OF responses"
                " FOR VALUES FROM ('2025-01-09') TO ('2025-01-10')"
            )
        )
    bare.dispose()
    store = open_store(settings)
    ensure_days(store, ["2025-01-10"])
    thresholds = text(
        "SELECT t.relname, t.reloptions, toast.reloptions FROM pg_class t LEFT JOIN pg_class toast"
        " ON toast.oid = t.reltoastrelid WHERE t.relkind = 'r' AND t.relname LIKE 'respon%' ORDER BY 1"
    )
    with store.connect() as connection:
        found = {name: [own, toast] for name, own, toast in connection.execute(thresholds)}
    assert {"response_index", "responses_20250109", "responses_20250110"} <= found.keys()
    off = ["autovacuum_vacuum_insert_threshold=-1"]
    assert all(options == [off, off] for name, options in found.items() if name != "response_index")
    assert found["response_index"][0] == off
    store.dispose()
