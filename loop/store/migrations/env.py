"""What Alembic runs to get at the store: the connection that `loop.store.migrate` has opened, in its transaction."""

from __future__ import annotations

from alembic import context

from loop.store.schema import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    transactional_ddl=True,
    render_as_batch=connection.dialect.name == "sqlite",  # where most of ALTER TABLE is a copy of the table
)
context.run_migrations()
