"""Brings a store's schema to this code's revision, by Alembic. A new revision: change `schema.py`, raise `REVISION`
there, and write the file that goes there from the one before into `migrations/versions`; a test compares the two ways.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Connection

from loop.store.schema import REVISION

SCRIPTS = Path(__file__).parent / "migrations"


def upgrade(connection: Connection, revision: str = REVISION) -> None:
    """Go forward to `revision` in the connection's transaction, all of it or nothing.

    Raises ValueError where the store's revision is not known here: it was made by a newer version.
    """
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    config.attributes["connection"] = connection  # for `migrations/env.py`
    try:
        command.upgrade(config, revision)
    except CommandError as exc:
        raise ValueError(
            f"the store's schema cannot be brought to revision {revision}: {exc}; was it made by a newer version?"
        ) from exc
