"""`thumbwheel import`: existing logs become the same examples as live traffic, twice imported as once."""

from __future__ import annotations

import json
import threading
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from pydantic import SecretStr

from loop.importing import import_rows
from loop.log.open import open_log
from loop.settings import LogSettings, Settings, StoreSettings
from loop.store import open_store
from loop.store.examples import count_labels
from services.joiner import Joiner
from tests.join.joined import Stored, read_examples

OASST = Path(__file__).parents[3] / "shared" / "data" / "oasst" / "oasst_thumbs_kto.jsonl"
ROW: dict[str, Any] = {"prompt": "Is it?", "completion": "Yes.", "label": True}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        log=LogSettings(path=tmp_path / "log.db"), store=StoreSettings(url=SecretStr(f"sqlite:///{tmp_path}/store.db"))
    )


def join_all(settings: Settings) -> list[Stored]:
    """Join what is in the log; returns the examples."""
    store, log = open_store(settings.store), open_log(settings.log)
    joiner = Joiner(settings, store, log)
    topics = (settings.log.responses_topic, settings.log.feedback_topic)
    ends = {(topic, n): end for topic in topics for n, end in log.end_offsets(topic).items()}
    stop = threading.Event()

    class UntilRead(threading.Event):
        def is_set(self) -> bool:
            return stop.is_set() or joiner.positions == ends

    joiner.run(UntilRead())
    examples = read_examples(store)
    assert count_labels(store, date.min) == sum(e.up != e.down for e in examples)
    log.close()
    store.dispose()
    return examples


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.skipif(not OASST.is_file(), reason="the shared OpenAssistant votes are not beside the repository")
def test_real_votes_twice_imported_are_as_once(settings: Settings) -> None:
    assert import_rows(settings, OASST)["rows"] == 430
    import_rows(settings, OASST, now_ms=1_900_000_000_000)
    examples = join_all(settings)
    assert (sum(e.up for e in examples), sum(e.down for e in examples)) == (334, 96)
    assert len(examples) == 430
    assert len({e.conversation_id for e in examples}) == 90
    assert all(e.body.imported and "rank" in e.body.extra for e in examples)


def test_the_three_formats_give_the_same_examples(settings: Settings, tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "completion": "No.", "label": False}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for file in (write(tmp_path / "rows.jsonl", rows), tmp_path / "rows.json", tmp_path / "rows.parquet"):
        assert import_rows(settings, file) | {"file": ""} == {"file": "", "rows": 2, "desirable": 1, "undesirable": 1}
    examples = join_all(settings)
    assert sorted((e.body.prompt, e.body.choices[0].message["content"], e.up, e.down) for e in examples) == [
        ("Is it?", "No.", 0, 1),
        ("Is it?", "Yes.", 1, 0),
    ]


def test_messages_ids_raters_and_other_columns_are_kept(settings: Settings, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Is it?"}]
    answer = [{"role": "assistant", "content": "Yes."}]
    row = {"prompt": messages, "completion": answer, "id": "m1", "conversation_id": 7, "score": 0.5}
    rows = [{**row, "rater": "ann", "label": True}, {**row, "rater": "bob", "label": False}]
    import_rows(settings, write(tmp_path / "rows.jsonl", rows))
    (example,) = join_all(settings)
    assert (example.up, example.down, example.conversation_id) == (1, 1, "7")
    assert (example.body.messages, example.body.message_id, example.body.extra) == (messages, "m1", {"score": 0.5})
    assert all(len(vote["rater"]) == 32 for vote in example.votes)


def test_rows_without_a_rater_are_never_one_raters_change_of_mind(settings: Settings, tmp_path: Path) -> None:
    import_rows(settings, write(tmp_path / "rows.jsonl", [ROW, {**ROW, "label": False}]))
    assert sorted((e.up, e.down) for e in join_all(settings)) == [(0, 1), (1, 0)]


BAD = {
    "no object": ("[1]", "expected an object with prompt"),
    "no JSON": ("{", "is no JSON"),
    "no prompt": ('{"completion": "a", "label": true}', "prompt is None, expected text or a list of messages"),
    "a message without a role": ('{"prompt": [{"content": "a"}], "completion": "a", "label": true}', "prompt is"),
    "two answers": (
        '{"prompt": "a", "label": true, "completion": [{"role": "assistant", "content": "a"}, {"role": "assistant",'
        ' "content": "b"}]}',
        "expected text or a list with one assistant message",
    ),
    "a label in words": ('{"prompt": "a", "completion": "b", "label": "good"}', "label is 'good', expected true or"),
}


@pytest.mark.parametrize(("line", "reason"), BAD.values(), ids=BAD.keys())
def test_of_a_file_with_a_bad_row_nothing_is_imported(
    settings: Settings, tmp_path: Path, line: str, reason: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: .*" + reason):
        import_rows(settings, file)
    assert not settings.log.path.exists()


def test_a_file_of_another_kind_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected \.jsonl, \.json or \.parquet"):
        import_rows(settings, tmp_path / "rows.csv")
