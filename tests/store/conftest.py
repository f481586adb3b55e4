"""The real services that the store's tests run on."""

from tests.services_real import postgres  # noqa: F401
