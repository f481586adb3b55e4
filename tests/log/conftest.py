"""The real services that the log's contract suite runs on."""

from tests.services_real import kafka  # noqa: F401
