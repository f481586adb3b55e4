import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loop.kto.pack import Prompted, pack
from loop.kto.rows import Row, fit, read_records, row_of

MESSAGES = [{"role": "user", "content": "Hi"}]
EOS = 2


def load(records: list[dict[str, Any]], folder: Path, tokenizer: Any, template: str | None = None) -> list[Row]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [row_of(record, place, tokenizer, template, (1.5, 0.5)) for place, record in read_records(path)]


def text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def test_messages_go_through_the_chat_template_and_the_completion_ends_with_eos(tmp_path: Path, tokenizer: Any) -> None:
    answer = [{"role": "assistant", "content": "Hello."}]
    for completion in ("Hello.", answer):
        (row,) = load([{"prompt": MESSAGES, "completion": completion, "label": True}], tmp_path, tokenizer)
        assert text(tokenizer, row.prompt_ids) == "<user>Hi\n<assistant>"
        assert text(tokenizer, row.completion_ids) == "Hello.</s>"
        assert row.completion_ids.count(EOS) == 1


def test_the_completion_ends_with_the_token_that_the_template_ends_a_turn_with(tmp_path: Path, tokenizer: Any) -> None:
    gemmas = copy.deepcopy(tokenizer)
    gemmas.add_special_tokens({"extra_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    gemmas.chat_template = (
        "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
    )
    (row,) = load([{"prompt": MESSAGES, "completion": "Hello.", "label": True}], tmp_path, gemmas)
    assert text(gemmas, row.completion_ids) == "Hello.<end_of_turn>"
    (plain,) = load([{"prompt": "Hi", "completion": "Hello.", "label": True}], tmp_path, gemmas)
    assert plain.completion_ids[-1] == EOS


def test_nothing_but_the_assistants_last_words_is_scored(tmp_path: Path, tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": "I look."},
        {"role": "tool", "content": "shipped"},
        {"role": "user", "content": "Well?"},
    ]
    (row,) = load([{"prompt": turns, "completion": "Under way.", "label": True}], tmp_path, tokenizer)
    batch = pack([Prompted(row.prompt_ids, (row.completion_ids,))])
    assert text(tokenizer, batch.targets.tolist()) == "Under way.</s>"
    assert batch.scored.tolist() == list(range(len(row.prompt_ids) - 1, len(row.prompt_ids) + len("Under way.")))


def test_a_named_template_takes_the_place_of_the_models_own(tmp_path: Path, tokenizer: Any) -> None:
    record = {"prompt": MESSAGES, "completion": "Yes", "label": False}
    (row,) = load([record], tmp_path, tokenizer, "{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    assert text(tokenizer, row.prompt_ids) == "[Hi]"


def test_text_prompts_are_tokenised_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    (row,) = load([{"prompt": "One two", "completion": " three", "label": True}], tmp_path, tokenizer)
    assert text(tokenizer, row.prompt_ids) == "One two"
    assert text(tokenizer, row.completion_ids) == " three</s>"


def test_served_ids_are_used_exactly_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    record = {"prompt": MESSAGES, "completion": "x", "label": True, "prompt_ids": [9, 8], "completion_ids": [7, 6, 5]}
    (row,) = load([record], tmp_path, tokenizer)
    assert (row.prompt_ids, row.completion_ids) == ([9, 8], [7, 6, 5])


def test_a_rows_own_weight_wins_over_the_settings(tmp_path: Path, tokenizer: Any) -> None:
    record = {"prompt": "a", "completion": "b"}
    weights = [{"label": True}, {"label": False}, {"label": True, "weight": 0}, {"label": True, "weight": None}]
    assert [row.weight for row in load([record | w for w in weights], tmp_path, tokenizer)] == [1.5, 0.5, 0.0, 1.5]


def test_rows_of_one_conversation_are_known_by_name_or_by_their_beginning(tmp_path: Path, tokenizer: Any) -> None:
    later = [*MESSAGES, {"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}]
    record = {"completion": "b", "label": True}
    records = [{"prompt": MESSAGES}, {"prompt": later}, {"prompt": "Hi"}, {"prompt": "Hi", "tree": "t"}]
    records += [{"prompt": "Ho", "conversation_id": "t"}]
    first, second, third, fourth, fifth = load([record | r for r in records], tmp_path, tokenizer)
    assert first.conversation == second.conversation != third.conversation
    assert fourth.conversation == fifth.conversation == "t"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": "yes"}, r"rows.jsonl, line 2: label = 'yes': expected true"),
        ({"label": None}, r"line 2: label = None"),
        ({"completion": 7}, r"line 2: completion = 7: expected text"),
        ({"completion": [{"role": "user", "content": "x"}]}, r"line 2: completion = \[.*one assistant message"),
        ({"prompt": []}, r"line 2: prompt = \[\]: expected text, or a list of messages"),
        ({"prompt": ""}, r"line 2: the prompt has no tokens"),
        ({"weight": -1}, r"line 2: weight = -1: expected a finite number"),
        ({"weight": "1"}, r"line 2: weight = '1'"),
        ({"prompt_ids": []}, r"line 2: prompt_ids = \[\]"),
        ({"prompt_ids": [1, -4], "completion_ids": [2]}, r"line 2: prompt_ids = \[1, -4\]"),
    ],
)
def test_a_bad_row_is_refused_with_file_line_value_and_what_was_expected(
    change: dict[str, Any], said: str, tmp_path: Path, tokenizer: Any
) -> None:
    good = {"prompt": "a", "completion": "b", "label": True}
    with pytest.raises(ValueError, match=said):
        load([good, good | change], tmp_path, tokenizer)


def test_messages_without_any_template_say_which_setting_to_use(tmp_path: Path, tokenizer: Any) -> None:
    class Bare:
        chat_template = None

    with pytest.raises(ValueError, match=r"line 1: .*set chat_template"):
        load([{"prompt": MESSAGES, "completion": "b", "label": True}], tmp_path, Bare())


def test_files_that_hold_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_records(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        read_records(tmp_path / "empty.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_records(tmp_path / "broken.jsonl")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="not readable as Parquet"):
        read_records(tmp_path / "broken.parquet")


def test_parquet_holds_the_same_rows_as_jsonl(tmp_path: Path, tokenizer: Any) -> None:
    records = [
        {"prompt": MESSAGES, "completion": "b", "label": True, "prompt_ids": None, "completion_ids": None},
        {"prompt": MESSAGES, "completion": "c", "label": False, "prompt_ids": [4, 5], "completion_ids": [6]},
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "train.parquet")
    from_jsonl = load(records, tmp_path, tokenizer)
    from_folder = [row_of(r, place, tokenizer, None, (1.5, 0.5)) for place, r in read_records(tmp_path)]
    assert [row.completion_ids for row in from_folder] == [row.completion_ids for row in from_jsonl]
    assert [row.conversation for row in from_folder] == [row.conversation for row in from_jsonl]


def test_rows_that_are_too_long_are_dropped_or_cut_at_one_side_and_are_counted() -> None:
    def row(prompt: int, completion: int) -> Row:
        return Row("r", list(range(prompt)), [7] * completion, True, 1.0, "c")

    rows = [row(4, 4), row(9, 4), row(2, 8)]
    kept, counts = fit(rows, 8, "drop")
    assert kept == rows[:1]
    assert counts == {"rows_too_long": 2, "rows_truncated": 0}
    kept, counts = fit(rows, 8, "keep_end")
    assert [r.prompt_ids for r in kept] == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert counts == {"rows_too_long": 1, "rows_truncated": 1}
    kept, counts = fit(rows, 8, "keep_start")
    assert [len(r.completion_ids) for r in kept] == [4, 6]
    assert counts == {"rows_too_long": 1, "rows_truncated": 1}
