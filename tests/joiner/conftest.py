"""The real services that the joiner's tests run on."""

from tests.services_real import kafka, postgres  # noqa: F401
