"""The store: joined state, registry, routes and runs, in one schema on SQLite or Postgres."""

from loop.store.engine import open_store, write

__all__ = ["open_store", "write"]
