"""Opens the event log that the settings name."""

from __future__ import annotations

from loop.log import EventLog
from loop.settings import LogSettings


def open_log(settings: LogSettings) -> EventLog:
    """The log of the settings, with its topics made or checked. Raises LogUnavailableError, ValueError."""
    if settings.kind == "embedded":
        from loop.log.embedded import EmbeddedLog

        return EmbeddedLog(settings.path, settings.partitions, settings.retention_s)
    from loop.log.kafka import KafkaLog

    return KafkaLog(settings)
