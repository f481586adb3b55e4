"""The stores of what is read in another way from each: SQLite, and a real Postgres."""

from tests.services_real import postgres  # noqa: F401
from tests.store.conftest import store_settings  # noqa: F401
