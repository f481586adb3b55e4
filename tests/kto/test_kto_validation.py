import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from loop.kto import state as course
from loop.kto.rows import Row
from loop.kto.sweep import sweep
from loop.kto.train import train
from loop.kto.validation import split
from loop.settings import SettingsError, TrainSettings
from tests.kto.conftest import write

SETTINGS = TrainSettings(
    quantization="none", lora_r=4, per_device_train_batch_size=4, learning_rate=1e-2, validation_share=0.3, eval_steps=2
)


def quiet() -> Console:
    return Console(file=io.StringIO())


def rated(raters: list[int], conversations: list[int]) -> list[Row]:
    pairs = zip(raters, conversations, strict=False)
    return [Row(str(n), [1], [2], True, 1.0, f"talk {c}", f"rater {r}") for n, (r, c) in enumerate(pairs)]


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)), st.floats(0, 0.5))
def test_every_row_is_on_one_side_and_a_conversation_is_never_divided(
    raters: list[int], conversations: list[int], share: float
) -> None:
    rows = rated(raters, conversations)
    train_rows, watched = split(rows, share)
    assert sorted([*train_rows, *watched], key=lambda row: int(row.row_id)) == rows
    assert {row.conversation for row in train_rows}.isdisjoint(row.conversation for row in watched)
    assert split(rows, share) == (train_rows, watched)


def test_raters_stand_on_one_side_in_the_share_that_was_asked_for_and_keep_it_the_next_night() -> None:
    rows = rated([*range(400), *range(400)], list(range(800)))
    train_rows, watched = split(rows, 0.25)
    raters = {row.rater for row in watched}
    assert raters.isdisjoint(row.rater for row in train_rows)
    assert 70 <= len(raters) <= 130
    assert {row.rater for row in split(rows[200:500], 0.25)[1]} <= raters


@pytest.fixture
def data(tmp_path: Path, make_rows: Callable[..., list[Row]]) -> Path:
    return write(make_rows(40, seed=3), tmp_path / "rows.jsonl")


def metrics_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_watched_rows_are_looked_at_and_not_trained_on(data: Path, model_dir: Path, tmp_path: Path) -> None:
    result = train(SETTINGS, data, model_dir, tmp_path / "out", console=quiet())
    assert result["rows"] + result["rows_validation"] == 40
    assert result["rows_validation"] > 4
    looked = [line for line in metrics_of(tmp_path / "out") if "eval_loss" in line]
    assert [line["step"] for line in looked] == [*range(2, result["steps"], 2), result["steps"]]
    assert {"eval_loss", "eval_kl", "eval_kl_to_base", "eval_accuracy", "eval_auc"} <= looked[0].keys()
    assert result["eval_loss"] == looked[-1]["eval_loss"]
    # The watched rows' own labels are not learned: with all of them turned around the adapter is the same.
    records = [json.loads(line) for line in data.read_text().splitlines()]
    watched = {row.conversation for row in split(rows_of(records), SETTINGS.validation_share)[1]}
    for record in records:
        record["label"] ^= record["conversation_id"] in watched
    (tmp_path / "turned.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = SETTINGS.model_copy(update={"desirable_weight": 1.0, "undesirable_weight": 1.0})
    for name in ("rows", "turned"):
        train(settings, tmp_path / f"{name}.jsonl", model_dir, tmp_path / name, console=quiet())
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("rows", "turned")]
    assert adapters[0] == adapters[1]
    ends = [metrics_of(tmp_path / name)[-1] for name in ("rows", "turned")]
    assert ends[0]["eval_accuracy"] + ends[1]["eval_accuracy"] == pytest.approx(1)


def rows_of(records: list[dict[str, Any]]) -> list[Row]:
    return [Row(r["id"], r["prompt_ids"], r["completion_ids"], r["label"], 1.0, r["conversation_id"]) for r in records]


def test_training_stops_when_the_watched_rows_get_worse_and_goes_back_to_the_best(
    data: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.5, 0.4, 0.45, 0.41, 0.3])
    monkeypatch.setattr(
        "loop.kto.validation.Validation.figures", lambda *_: {"eval_loss": next(losses), "eval_kl": 0.0}
    )
    settings = SETTINGS.model_copy(update={"num_train_epochs": 4, "early_stopping_patience": 2})
    seen = {}
    look = course.State.look

    def remember(self: course.State, figures: dict[str, float], policy: Any) -> None:
        look(self, figures, policy)
        seen[self.step] = course.adapter_weights(policy)
        seen[self.step] = {name: weight.clone() for name, weight in seen[self.step].items()}

    monkeypatch.setattr(course.State, "look", remember)
    result = train(settings, data, model_dir, tmp_path / "out", console=quiet())
    assert (result["steps"], result["best_step"], result["eval_loss"]) == (8, 4, 0.4)
    from safetensors.torch import load_file

    published = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(published[name].equal(weight) for name, weight in seen[4].items())
    assert any(not published[name].equal(weight) for name, weight in seen[8].items())


def test_early_stop_without_rows_to_look_at_is_refused(data: Path, model_dir: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"validation_share": 0.0, "early_stopping_patience": 2})
    with pytest.raises(ValueError, match="set validation_share above 0"):
        train(settings, data, model_dir, tmp_path / "out", console=quiet())


def test_a_sweep_trains_each_pair_once_on_the_same_split_and_plots_accuracy_against_kl(
    data: Path, model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    found = sweep(SETTINGS, data, model_dir, out, [0.1, 1.0], [1e-3, 1e-2], console=quiet())
    assert [run["name"] for run in found["runs"]] == [
        f"beta-{beta}-lr-{rate}" for beta in ("0.1", "1") for rate in ("0.001", "0.01")
    ]
    assert found == json.loads((out / "sweep.json").read_text())
    best = next(run for run in found["runs"] if run["name"] == found["best"])
    assert best["eval_accuracy"] == max(run["eval_accuracy"] for run in found["runs"])
    assert len({run["eval_kl_to_base"] for run in found["runs"]}) == 4
    plot = (out / "sweep.svg").read_text()
    assert plot.count("<!-- β ") == 4
    assert "<!-- learning rate 0.001 -->" in plot
    # Reference log-probs do not depend on either: only the first run has computed any.
    metrics = [json.loads((out / run["name"] / "metrics.json").read_text()) for run in found["runs"]]
    computed = [figures["reference_computed"] for figures in metrics]
    assert computed[0] > 0 == sum(computed[1:])
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/adapter_model.safetensors")}
    assert sweep(SETTINGS, data, model_dir, out, [0.1, 1.0], [1e-3, 1e-2], console=quiet()) == found
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("*/adapter_model.safetensors")}


def test_a_sweep_without_both_labels_to_look_at_says_so(
    model_dir: Path, tmp_path: Path, make_rows: Callable[..., list[Row]]
) -> None:
    data = write(make_rows(24, label=True), tmp_path / "rows.jsonl")
    with pytest.raises(SettingsError, match="not of both labels"):
        sweep(SETTINGS, data, model_dir, tmp_path / "sweep", [0.1], [1e-3], console=quiet())


def test_training_does_not_open_the_held_out_file(data: Path, model_dir: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    records = [json.loads(line) for line in data.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(records), snapshot / "train.parquet")
    (snapshot / "held_out.parquet").mkdir()  # which nothing can read
    assert train(SETTINGS, snapshot, model_dir, tmp_path / "out", console=quiet())["steps"] > 0
