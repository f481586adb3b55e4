"""What a gateway of another name has left on this machine is not lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from loop.log import NewRecord
from loop.log.embedded import EmbeddedLog
from loop.settings import LogSettings
from services.gateway.journal import Journal
from services.gateway.orphans import RECORDS, adopt
from tests.gateway.conftest import StartGateway, until

TOPICS = (LogSettings().responses_topic, LogSettings().feedback_topic)
LEAVE = """
import os, signal, sys
from pathlib import Path
from loop.log import NewRecord
from loop.log.embedded import EmbeddedLog
from services.gateway.journal import Journal
folder, topic = Path(sys.argv[1]), sys.argv[2]
EmbeddedLog(folder / "spool-gateway-1-2.db", 8).append([NewRecord(topic, f"k{n}", b"%d" % n) for n in range(1_200)])
journal = Journal(folder / "journal-gateway-1-2")
for n in (1_200, 1_201):
    journal.append(NewRecord(topic, "journaled", b"%d" % n))
os.kill(os.getpid(), signal.SIGKILL)
"""


def values(log: EmbeddedLog, topic: str) -> list[int]:
    read = [log.read(topic, partition, 0, 10_000) for partition in log.end_offsets(topic)]
    return sorted(int(record.value) for records in read for record in records)


def killed(folder: Path) -> None:
    """A gateway called gateway-1-2 is killed, with 1,200 records in its spool and two in its journal."""
    child = subprocess.run([sys.executable, "-c", LEAVE, folder, TOPICS[1]], check=False)
    assert child.returncode == -signal.SIGKILL


def test_what_a_killed_gateway_of_another_name_has_accepted_moves_to_one_that_runs(tmp_path: Path) -> None:
    killed(tmp_path)
    with closing(EmbeddedLog(tmp_path / "spool-gateway-1.db")) as own:
        own.append([NewRecord(TOPICS[1], "own", b"9999")])
        assert adopt(own, TOPICS) == 1_202
        assert values(own, TOPICS[1]) == [*range(1_202), 9999]
        of_one_key = [r.value for p in own.end_offsets(TOPICS[1]) for r in own.read(TOPICS[1], p, 0, 10_000, 1 << 40)]
        assert of_one_key.index(b"1200") < of_one_key.index(b"1201")
        assert adopt(own, TOPICS) == 0
    assert not list(tmp_path.glob("journal-*"))


def test_what_one_that_runs_has_stays_where_it_is(tmp_path: Path) -> None:
    with closing(EmbeddedLog(tmp_path / "spool-gateway-2.db")) as other:
        other.append([NewRecord(TOPICS[0], "k", b"1")])
        journal = Journal(tmp_path / "journal-gateway-2")
        journal.append(NewRecord(TOPICS[0], "k", b"2"))
        with closing(EmbeddedLog(tmp_path / "spool-gateway-1.db")) as own:
            assert adopt(own, TOPICS) == 0
            assert values(other, TOPICS[0]) == [1]
            journal.close()  # it has ended
            assert adopt(own, TOPICS) == 1
            assert values(own, TOPICS[0]) == [1]


def test_a_kill_in_the_midst_of_it_loses_nothing(tmp_path: Path) -> None:
    killed(tmp_path)
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom loop.log.embedded import EmbeddedLog\n"
        "from services.gateway.orphans import adopt\n"
        "drop, calls = EmbeddedLog.drop_before, []\n"
        "def die(*args):\n"
        "    calls.append(args)\n"
        "    if len(calls) == int(sys.argv[3]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    drop(*args)\n"
        "EmbeddedLog.drop_before = die\n"
        "adopt(EmbeddedLog(Path(sys.argv[1]) / 'spool-gateway-1.db'), [sys.argv[2]])\n"
    )
    for kill_at in (1, 2, 3):
        child = subprocess.run([sys.executable, "-c", program, tmp_path, TOPICS[1], str(kill_at)], check=False)
        assert child.returncode == -signal.SIGKILL
    with closing(EmbeddedLog(tmp_path / "spool-gateway-1.db")) as own:
        adopt(own, TOPICS)
        assert set(values(own, TOPICS[1])) == set(range(1_202))


def test_a_spool_that_cannot_be_read_is_told_of_and_costs_no_other_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "spool-gateway-0.db").write_bytes(b"no database at all" * 1_000)
    killed(tmp_path)
    with caplog.at_level("ERROR"), closing(EmbeddedLog(tmp_path / "spool-gateway-1.db")) as own:
        assert adopt(own, TOPICS) == 1_202  # of those behind it
    (told,) = caplog.messages
    assert "spool-gateway-0.db is not taken up: file is not a database" in told


async def test_a_gateway_takes_them_up_when_it_starts(start: StartGateway, tmp_path: Path) -> None:
    killed(tmp_path)
    gateway = await start()
    log = gateway.parts.routes._spool
    await until(lambda: len(values(log, TOPICS[1])) == 1_202)
    assert 2 * RECORDS < 1_202  # of one partition or not, there was more than one move
    assert os.path.exists(tmp_path / "spool-gateway-1-2.db")
