"""What the gateways of one machine remember, in one file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway import recent
from services.gateway.recent import Recent, forget_recent

texts = st.text(max_size=60)


@given(st.lists(st.tuples(st.sampled_from(["score", "prompt"]), texts, texts), max_size=30))
def test_it_answers_with_the_last_value_or_none_whatever_shares_its_slot(puts: list[tuple[Any, str, str]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recent, "SLOTS", 8)
        memory = Recent(Path("/nowhere/recent.bin"))
        last: dict[tuple[Any, str], str] = {}
        for kind, key, value in puts:
            memory.put(kind, key, value)
            assert memory.get(kind, key) == value
            last[kind, key] = value
        for (kind, key), value in last.items():
            assert memory.get(kind, key) in (value, None)
        memory.close()


def test_others_that_map_the_file_see_it_and_a_restart_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "recent.bin"
    one, other = Recent(path), Recent(path)
    one.put("score", "a", "é" * 100)
    other.put("score", "b", "2")
    assert (other.get("score", "a"), one.get("score", "b"), one.get("prompt", "a")) == ("é" * 100, "2", None)
    one.close()
    other.close()
    again = Recent(path)
    assert again.get("score", "a") == "é" * 100
    again.put("score", "a", "x" * 247)  # too long
    assert again.get("score", "a") == "é" * 100
    again.stamp = 2**62
    assert (path.stat().st_mode & 0o777, forget_recent(path)) == (0o600, True)
    assert again.get("score", "a") is None
    assert again.stamp == 2**62
    again.put("score", "a", "new")
    assert again.get("score", "a") == "new"
    again.close()


def test_what_several_write_at_once_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "recent.bin"
    write = (
        "import sys; from pathlib import Path; from services.gateway.recent import Recent\n"
        "r = Recent(Path(sys.argv[1]))\n"
        "while True:\n for letter in 'abc': r.put('score', 'key', letter * (40 if letter == 'a' else 240))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", write, str(path)]) for _ in range(2)]
    memory = Recent(path)
    seen: set[str | None] = set()
    while len(seen - {None}) < 3:
        seen |= {memory.get("score", "key") for _ in range(1_000)}
    seen |= {memory.get("score", "key") for _ in range(20_000)}
    for writer in writers:
        writer.kill()
        writer.wait()
    assert seen - {None} == {"a" * 40, "b" * 240, "c" * 240}
    memory.close()


def test_without_room_on_the_disk_it_is_the_processs_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    memory = Recent(tmp_path / "recent.bin")
    memory.put("choices", "a")
    assert memory.get("choices", "a") == ""
    assert "No space left" in caplog.text
    assert not forget_recent(tmp_path / "recent.bin")
    memory.close()
