"""What only the embedded log does: it is also the gateways' spool."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from loop.log import LogUnavailableError, NewRecord
from loop.log import groups as groups_module
from loop.log.embedded import EmbeddedLog
from loop.log.groups import range_share
from loop.log.partition import murmur2


def open_log(folder: Path, **options: float) -> EmbeddedLog:
    return EmbeddedLog(folder / "log.db", 2, **options)


def test_keys_hash_as_kafkas_java_client_does() -> None:
    # From Kafka's own UtilsTest.testMurmur2, as signed ints there.
    cases = {"21": -973932308, "foobar": -790332482, "a-little-bit-long-string": -985981536, "abc": 479470107}
    assert {text: murmur2(text.encode()) for text in cases} == {text: n & 0xFFFFFFFF for text, n in cases.items()}


def test_what_was_written_survives_kill_9_of_the_process(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from loop.log import NewRecord\n"
        "from loop.log.embedded import EmbeddedLog\n"
        "log = EmbeddedLog(Path(sys.argv[1]), 2)\n"
        "log.write([NewRecord('t', 'k', b'v')], {'hlc': '7'})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "log.db"], timeout=180)
    assert done.returncode == -9
    log = open_log(tmp_path)
    assert sum(log.end_offsets("t").values()) == 1
    assert log.get_meta("hlc") == "7"
    log.close()


def test_what_a_group_has_committed_waits_no_more(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    assert log.waiting_bytes("joiner", ("t",)) == 0
    log.append([NewRecord(topic, f"{n}", bytes(5000)) for n in range(100) for topic in ("t", "u")])
    ends = log.end_offsets("t")
    assert log.waiting_bytes("joiner", ("t", "u")) == log.waiting_bytes("joiner", ("t",)) == log.used_bytes()
    consumer = log.consumer("joiner", ["t"])
    consumer.commit({("t", 0): ends[0]})
    assert log.waiting_bytes("joiner", ("t",)) == log.used_bytes() * ends[1] // 100
    assert log.waiting_bytes("another", ("t",)) == log.used_bytes()
    log.drop_before("t", 0, ends[0])
    assert log.waiting_bytes("joiner", ("t",)) == log.used_bytes()  # all that is left
    consumer.commit({("t", 1): ends[1]})
    consumer.close()
    assert log.waiting_bytes("joiner", ("t",)) == 0
    log.close()


def test_forwarded_records_make_room_and_offsets_go_on(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append([NewRecord("t", "k", bytes(5000)) for _ in range(200)])
    (partition,) = (number for number, end in log.end_offsets("t").items() if end)
    full = log.used_bytes()
    assert full > 1_000_000
    log.drop_before("t", partition, 150)
    assert log.used_bytes() < full / 2
    assert [record.offset for record in log.read("t", partition, 0, 1000)] == list(range(150, 200))
    log.append([NewRecord("t", "k", b"next")])
    assert log.end_offsets("t")[partition] == 201
    log.close()


def test_a_read_is_bounded_in_bytes_and_brings_one_record_at_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path)
    log.append([NewRecord("t", "k", bytes(1_000)) for _ in range(100)])
    (partition,) = (number for number, end in log.end_offsets("t").items() if end)
    assert [len(log.read("t", partition, 0, 100, size)) for size in (1, 1_000, 2_500, 1_000_000)] == [1, 1, 3, 100]
    monkeypatch.setattr(groups_module, "POLL_BYTES", 10_000)
    consumer = log.consumer("readers", ["t"])
    polls = []
    while sum(polls) < 100:
        polls.append(len(consumer.poll(1_000, 0)))
    assert max(polls) <= 11
    consumer.close()
    log.close()


def test_old_records_leave_by_age(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append([NewRecord("t", str(n), b"old") for n in range(2_500)])
    cut_ms = int(time.time() * 1000) + 1
    while int(time.time() * 1000) <= cut_ms:
        pass
    log.append([NewRecord("t", str(n), b"new") for n in range(10)])
    assert log.drop_older_than(cut_ms) == 2_500
    left = [record for n in range(2) for record in log.read("t", n, 0, 100)]
    assert [record.value for record in left] == [b"new"] * 10
    log.close()


def test_a_new_file_is_made_by_many_processes_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from loop.log import NewRecord\n"
        "from loop.log.embedded import EmbeddedLog\n"
        "log = EmbeddedLog(Path(sys.argv[1]), 2)\n"
        "for n in range(20): log.write([NewRecord('t', str(n), b'v')])\n"
        "log.close()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "log.db")]
    children = [subprocess.Popen(command) for _ in range(4)]
    assert [child.wait(180) for child in children] == [0] * 4
    log = open_log(tmp_path)
    assert sum(log.end_offsets("t").values()) == 80
    log.close()


def test_threads_may_share_one_log(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    threads = [
        threading.Thread(target=lambda: [log.append([NewRecord("t", str(n), b"v")]) for n in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(log.end_offsets("t").values()) == 200
    log.close()


def test_topics_of_one_file_have_equal_partition_counts(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append([NewRecord("t", "k", b"v")])
    log.close()
    log = EmbeddedLog(tmp_path / "log.db", 16)
    assert (len(log.end_offsets("t")), len(log.end_offsets("new"))) == (2, 2)
    log.close()


def test_a_poll_takes_as_many_records_of_each_partition(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append([NewRecord("t", f"{n}", b"") for n in range(100)])
    log.append([NewRecord("u", "a", b""), NewRecord("u", "a", b"")])
    consumer = log.consumer("g", ["t", "u"])
    polled = consumer.poll(22, 0.0)
    places = [(record.topic, record.partition) for record in polled]
    assert (places.count(("t", 0)), places.count(("t", 1)), len(polled)) == (10, 10, 22)
    consumer.close()
    log.close()


def test_a_dead_members_partitions_go_to_the_living(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "HEARTBEAT_S", 0.0)
    log = open_log(tmp_path)
    dead, living = log.consumer("g", ["t"]), log.consumer("g", ["t"])
    assert dead.assigned() == {0, 1}
    assert living.assigned() == set()  # the other one has not let go yet
    with sqlite3.connect(log.path) as file:  # as if the dead one had been silent for its session time-out
        file.execute("UPDATE members SET expires_at_ms = 0 WHERE member = ?", (dead.member,))
    file.close()
    assert living.assigned() == {0, 1}
    assert dead.assigned() <= {0}  # it came back as a member, and takes only what it is given
    living.close()
    dead.close()
    log.close()


def test_ranges_are_contiguous_and_differ_by_one_at_most() -> None:
    assert [sorted(range_share(list(range(7)), n, 3)) for n in range(3)] == [[0, 1, 2], [3, 4], [5, 6]]


def test_a_file_that_cannot_be_opened_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "log.db").mkdir()
    with pytest.raises(LogUnavailableError, match=r"log\.db: unable to open"):
        open_log(tmp_path)
