"""The journal by itself: what is whole is found again, whatever else became of its file."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loop.log import NewRecord
from services.gateway import journal as module
from services.gateway.journal import Journal, left_in, recover

texts = st.text(max_size=8)
records = st.lists(
    st.builds(NewRecord, texts, texts, st.binary(max_size=300), st.dictionaries(texts, texts, max_size=2)), max_size=12
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal")


def files(stem: Path) -> list[Path]:
    return list(stem.parent.glob(f"{stem.name}.*"))


@given(records, st.integers(0, 12), st.integers(0, 5000))
def test_what_is_not_done_is_found_up_to_where_the_file_was_cut(
    folder: Path, given_records: list[NewRecord], done: int, cut: int
) -> None:
    for path in files(folder / "any"):  # of an example that failed
        path.unlink()
    journal = Journal(folder / "any")
    (path,) = files(folder / "any")
    places = [journal.append(record) for record in given_records]
    ends = [place.end for place in places]
    if places[:done]:
        journal.done(places[:done][-1])
    assert left_in(path) == given_records[done:]
    os.truncate(path, min(cut, path.stat().st_size))
    whole = [record for record, end in zip(given_records, ends, strict=True) if end <= cut]
    assert left_in(path) == whole[done:]
    journal.close()
    assert files(folder / "any") == []


def test_what_is_done_is_said_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from loop.log import NewRecord\n"
        "from services.gateway.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "place = journal.append(NewRecord('t', 'k', b'v'))\n"
        "journal.done(place); print('going', flush=True)\n"
        "while True: journal.done(place)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, tmp_path / "j"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"going\n"
    (path,) = files(tmp_path / "j")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ) as seen:
        found = {bytes(seen[:8]) for _ in range(100_000)}  # as after a kill -9 at that moment
    child.kill()
    child.communicate()
    assert len(found) == 1


def test_a_record_that_was_damaged_ends_what_is_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    first, second, _ = (journal.append(NewRecord("t", "k", value)) for value in (b"one", b"two", b"three"))
    (path,) = files(tmp_path / "j")
    with path.open("r+b") as file:
        file.seek(second.end - 1)
        file.write(b"\xff")
    assert left_in(path) == [NewRecord("t", "k", b"one")]
    assert first.end < second.end
    journal.close()


def test_files_are_followed_by_others_and_go_when_they_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 200)
    journal = Journal(tmp_path / "j")
    places = [journal.append(NewRecord("t", "k", bytes(60))) for _ in range(6)]
    assert len(files(tmp_path / "j")) == 3
    journal.done(places[2])
    assert len(files(tmp_path / "j")) == 2
    assert sum(len(left_in(path)) for path in files(tmp_path / "j")) == 3
    journal.close()


def test_where_the_disk_is_full_nothing_is_written_and_the_file_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(module, "FILE_BYTES", 100)
    journal = Journal(tmp_path / "j")
    with monkeypatch.context() as broken:
        broken.setattr(module.os, "posix_fallocate", full)
        with pytest.raises(OSError, match="no space left"):
            journal.append(NewRecord("t", "k", bytes(200)))
        journal.append(NewRecord("t", "k", b"small"))
    journal.append(NewRecord("t", "k", bytes(200)))
    found = [record.value for path in files(tmp_path / "j") for record in left_in(path)]
    assert sorted(found) == [bytes(200), b"small"]
    journal.close()


def test_the_files_of_dead_processes_are_taken_up_and_those_of_living_ones_left_alone(tmp_path: Path) -> None:
    living, dead = Journal(tmp_path / "j"), Journal(tmp_path / "j")
    living.append(NewRecord("t", "k", b"living"))
    dead.append(NewRecord("t", "k", b"dead"))
    for file in dead._files:  # as the kernel does when a process ends
        fcntl.flock(file.handle, fcntl.LOCK_UN)
    found: list[NewRecord] = []
    assert recover(tmp_path / "j", found.extend) == 1
    assert found == [NewRecord("t", "k", b"dead")]
    assert len(files(tmp_path / "j")) == 1
    living.close()
    dead.close()
