"""The stores that these tests run on: SQLite, and a real Postgres."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

from loop.settings import StoreSettings
from loop.store import open_store
from tests.services_real import postgres  # noqa: F401
from tests.store.joined import empty


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def store_settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StoreSettings:
    """Of a database that holds nothing yet."""
    if request.param == "postgres":
        made: StoreSettings = request.getfixturevalue("postgres").new_store()
        return made
    return StoreSettings(url=SecretStr(f"sqlite:///{tmp_path_factory.mktemp('store')}/store.db"))


@pytest.fixture(scope="module")
def kept_store(store_settings: StoreSettings) -> Iterator[Engine]:
    """One store for many examples of a property."""
    opened = open_store(store_settings)
    yield opened
    opened.dispose()


@pytest.fixture
def store(kept_store: Engine) -> Engine:
    """An empty store."""
    empty(kept_store)
    return kept_store
