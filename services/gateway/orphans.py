"""What gateways of other names have left on this machine: one with another `gateway_id`, or of more `processes`. Nobody
may ever start under that name again, so what it has accepted is taken into a spool that is forwarded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from loop.log import NewRecord
from loop.log.embedded import EmbeddedLog
from services.gateway.journal import is_in_use, recover

RECORDS = 500  # moved at once
BYTES = 4 * 1024 * 1024  # about, of their values

_log = logging.getLogger(__name__)


def adopt(own: EmbeddedLog, topics: Sequence[str]) -> int:
    """Take up the journals and spools beside this one whose gateway has ended; returns how many records that were. What
    a kill in the midst of it leaves in both counts once, as every event does.
    """
    folder = own.path.parent
    journals = {path.with_suffix("") for path in folder.glob("journal-*.*")}
    spools = {path for path in folder.glob("spool-*.db") if path != own.path and not is_in_use(_journal_of(path))}
    count = 0
    for path in sorted(journals | spools):
        try:
            if path in journals:
                count += recover(path, own.append)
            else:
                with closing(EmbeddedLog(path)) as left:
                    count += sum(_move(left, own, topic) for topic in topics)
        except Exception as exc:  # supervisor: one that cannot be read must not keep the others
            message = "what another gateway has left in %s is not taken up: %s; the next start tries again"
            _log.error(message, path, exc, extra={"action": "orphan_left"})
    if count:
        _log.warning("%d records of gateways that are no more taken up", count, extra={"action": "orphans_adopted"})
    return count


def _journal_of(spool: Path) -> Path:
    return spool.with_name(f"journal-{spool.stem.removeprefix('spool-')}")


def _move(left: EmbeddedLog, own: EmbeddedLog, topic: str) -> int:
    count = 0
    for partition in left.end_offsets(topic):
        while records := left.read(topic, partition, 0, RECORDS, BYTES):
            own.append([NewRecord(topic, record.key, record.value) for record in records])
            left.drop_before(topic, partition, records[-1].offset + 1)
            count += len(records)
    return count
