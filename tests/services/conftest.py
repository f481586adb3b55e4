"""The real Postgres."""

from tests.services_real import postgres  # noqa: F401
