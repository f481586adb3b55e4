import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loop.kto.batch import reference_logps
from loop.kto.cache import ReferenceCache
from loop.kto.folders import partial_dir
from loop.kto.gradients import Batch, backward
from loop.kto.model import attach_lora, load_adapters, load_base, scoring
from loop.kto.ranks import Ranks
from loop.kto.rows import Row
from loop.kto.score import score_rows
from loop.kto.train import train
from loop.settings import TrainSettings
from tests.kto.conftest import write

SETTINGS = TrainSettings(quantization="none", lora_r=4, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2)


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def data(tmp_path: Path, make_rows: Callable[..., list[Row]]) -> Path:
    return write(make_rows(24, seed=3), tmp_path / "rows.jsonl")


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def assert_same_adapter(found: Path, expected: Path, tolerance: float = 1e-6) -> None:
    wanted = weights(expected)
    for name, tensor in weights(found).items():
        assert torch.allclose(tensor, wanted[name], rtol=0, atol=tolerance), name


def metrics_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_an_adapter_a_manifest_and_its_figures(
    data: Path, model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = train(SETTINGS.model_copy(update={"num_train_epochs": 6}), data, model_dir, out, console=quiet())
    lines = metrics_of(out)
    assert [line["step"] for line in lines] == list(range(1, 37))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"kl", "learning_rate", "grad_norm", "logps/chosen", "logps/rejected"} <= set(lines[0])
    assert result == json.loads((out / "metrics.json").read_text())
    assert {"rows_per_s", "train_s", "peak_rss_mb", "loss", "kl"} <= set(result)
    assert (result["rows"], result["steps"], result["deadline_reached"]) == (24, 36, False)
    card = (out / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {model_dir.name}\nlibrary_name: peft\n")
    assert "24 rated answers, 36 steps" in card
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["beta"] == SETTINGS.beta
    assert len(manifest["data_sha256"]) == 64
    assert not partial_dir(out).exists()
    for name in ("manifest.json", "adapter_config.json", "README.md"):
        assert str(tmp_path) not in (out / name).read_text()
        assert str(model_dir) not in (out / name).read_text()


def test_the_adapter_loads_in_peft_and_scores_there_as_here(
    data: Path, model_dir: Path, tmp_path: Path, make_rows: Callable[..., list[Row]]
) -> None:
    out = tmp_path / "out"
    train(SETTINGS, data, model_dir, out, console=quiet())
    rows = make_rows(5, seed=9)
    ours = score_rows(load_adapters(load_base(model_dir, "none", "float32"), {"candidate": out}), rows, "candidate")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), out)
    for row, score, base in zip(rows, ours.policy, ours.reference, strict=True):
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        with torch.no_grad():
            logps = plain(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert logps[len(row.prompt_ids) - 1 :].sum().item() == pytest.approx(score, rel=1e-5, abs=1e-4)
        assert score != pytest.approx(base, abs=1e-3)


def test_vllm_takes_the_adapters_config(data: Path, model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    out = tmp_path / "out"
    train(SETTINGS, data, model_dir, out, console=quiet())
    code = (
        "import sys; from vllm.lora.peft_helper import PEFTHelper; h = PEFTHelper.from_local_dir(sys.argv[1], None);"
        "print(h.r, h.lora_alpha, type(h.target_modules).__name__, h._validate_features())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["4 32 list []"], done.stderr[-2000:]


# `python -m loop.kto.train`, killed when it has logged so many steps: somebody else might come too late for that.
DYING = """
import os, signal, sys
from loop.kto import progress, train

log, last = progress.Watch.log, int(sys.argv[1])

def log_and_die(watch, metrics):
    log(watch, metrics)
    if metrics["step"] == last:
        os.kill(os.getpid(), signal.SIGKILL)

progress.Watch.log = log_and_die
train.main(sys.argv[2:])
"""


@pytest.mark.parametrize(("dropout", "logged"), [(0.0, 5), (0.2, 12)])  # dropout's generator has to come back too
def test_killed_at_any_step_and_started_again_it_ends_with_the_adapter_of_an_unbroken_run(
    dropout: float, logged: int, data: Path, model_dir: Path, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"lora_dropout": dropout, "num_train_epochs": 4})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    (tmp_path / "settings.json").write_text(settings.model_dump_json())
    command = [sys.executable, "-c", DYING, str(logged), "--settings-json", str(tmp_path / "settings.json")]
    command += ["--data", str(data), "--model", str(model_dir), "--out", str(broken)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    train(settings, data, model_dir, whole, console=quiet())

    assert subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert len((partial_dir(broken) / "metrics.jsonl").read_text().splitlines()) == logged
    assert not broken.exists()

    assert train(settings, data, model_dir, broken, console=quiet())["steps"] == 24
    assert_same_adapter(broken, whole)
    assert [line["step"] for line in metrics_of(broken)] == list(range(1, 25))
    for found, expected in zip(metrics_of(broken), metrics_of(whole), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_gradient_accumulation_is_the_large_batch_z0_included(data: Path, model_dir: Path, tmp_path: Path) -> None:
    for name, rows, parts in (("large", 8, 1), ("parts", 2, 4)):
        update = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts, "num_train_epochs": 2}
        train(SETTINGS.model_copy(update=update), data, model_dir, tmp_path / name, console=quiet())
    for found, expected in zip(metrics_of(tmp_path / "parts"), metrics_of(tmp_path / "large"), strict=True):
        assert found["kl"] == pytest.approx(expected["kl"], abs=1e-4)
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_the_same_inputs_give_the_same_adapter_and_a_finished_run_is_not_run_again(
    data: Path, model_dir: Path, tmp_path: Path
) -> None:
    first = train(SETTINGS, data, model_dir, tmp_path / "a", console=quiet())
    train(SETTINGS, data, model_dir, tmp_path / "b", console=quiet())
    assert_same_adapter(tmp_path / "a", tmp_path / "b", tolerance=0.0)
    assert train(SETTINGS, data, model_dir, tmp_path / "a", console=quiet()) == first
    with pytest.raises(ValueError, match=r"is another run: beta \(0.1 → 0.2\)"):
        train(SETTINGS.model_copy(update={"beta": 0.2}), data, model_dir, tmp_path / "a", console=quiet())


def test_a_folder_that_is_not_an_adapter_is_never_written_to(data: Path, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    with pytest.raises(ValueError, match="exists and is not an adapter"):
        train(SETTINGS, data, model_dir, tmp_path / "mine", console=quiet())
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_nf4_trains_on_this_machine(data: Path, model_dir: Path, tmp_path: Path) -> None:
    result = train(
        SETTINGS.model_copy(update={"quantization": "nf4"}), data, model_dir, tmp_path / "q", console=quiet()
    )
    assert result["steps"] == 6
    assert any(tensor.abs().max() > 0 for name, tensor in weights(tmp_path / "q").items() if "lora_B" in name)


def test_bfloat16_trains_with_a_float32_adapter(data: Path, model_dir: Path, tmp_path: Path) -> None:
    train(SETTINGS.model_copy(update={"dtype": "bfloat16"}), data, model_dir, tmp_path / "b", console=quiet())
    assert {tensor.dtype for tensor in weights(tmp_path / "b").values()} == {torch.float32}


def test_a_deadline_stops_it_in_order_with_what_it_has(
    data: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loop.kto.train as module

    now = iter(range(10_000))  # a clock that ticks a second whenever it is read
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    settings = SETTINGS.model_copy(update={"deadline_s": 6.0})
    result = train(settings, data, model_dir, tmp_path / "late", console=quiet())
    assert result["deadline_reached"]
    assert 0 < result["steps"] < result["steps_planned"]
    assert weights(tmp_path / "late")


def test_a_number_that_runs_away_stops_the_run_and_names_the_rows(
    data: Path, model_dir: Path, tmp_path: Path, make_rows: Callable[..., list[Row]]
) -> None:
    poisoned = AutoModelForCausalLM.from_pretrained(model_dir)
    row = make_rows(24, seed=3)[7]
    token = row.prompt_ids[1]
    with torch.no_grad():
        poisoned.model.embed_tokens.weight[token] = torch.nan
    folder = tmp_path / "poisoned"
    poisoned.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_dir / name).read_bytes())
    with pytest.raises(FloatingPointError, match=r"not finite for rows \[.*'row-7'"):
        train(SETTINGS, data, folder, tmp_path / "out", console=quiet())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "failure",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_halves_the_micro_batch_and_the_step_stays_the_same(
    failure: RuntimeError,
    data: Path,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from loop.kto import batch

    train(SETTINGS, data, model_dir, tmp_path / "enough", console=quiet())
    policy_logps = batch.policy_logps

    def scarce(model: object, rows: list[Row]) -> torch.Tensor:
        if len(rows) > 1:
            raise failure
        return policy_logps(model, rows)  # type: ignore[arg-type]

    def too_much(*_: object) -> None:
        raise failure

    monkeypatch.setattr(batch, "policy_logps", scarce)
    monkeypatch.setattr(batch, "policy_and_mismatched_logps", too_much)
    train(SETTINGS, data, model_dir, tmp_path / "scarce", console=quiet())
    assert [record.args for record in caplog.records if "out of memory" in record.message] == [(2, 4), (1, 4)]
    assert_same_adapter(tmp_path / "scarce", tmp_path / "enough", tolerance=1e-4)


def test_another_error_of_torch_is_not_taken_for_a_lack_of_memory(
    data: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loop.kto import batch

    def broken(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(batch, "policy_and_mismatched_logps", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        train(SETTINGS, data, model_dir, tmp_path / "out", console=quiet())


def test_a_full_disk_leaves_the_last_whole_checkpoint_to_go_on_from(
    data: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loop.kto import artifacts

    out = tmp_path / "out"
    train(SETTINGS, data, model_dir, tmp_path / "whole", console=quiet())
    save = torch.save

    def full_at_step_4(kept: dict[str, Any], path: Path) -> None:
        if kept["state"]["step"] == 4:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(kept, path)

    monkeypatch.setattr(artifacts.torch, "save", full_at_step_4)
    with pytest.raises(OSError, match="No space left"):
        train(SETTINGS, data, model_dir, out, console=quiet())
    monkeypatch.undo()
    assert [path.name for path in partial_dir(out).glob("checkpoint-*")] == ["checkpoint-00000002"]
    train(SETTINGS, data, model_dir, out, console=quiet())
    assert_same_adapter(out, tmp_path / "whole")


def test_apo_zero_needs_no_mismatched_pairs(data: Path, model_dir: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"objective": "apo_zero_unpaired", "num_train_epochs": 6})
    result = train(settings, data, model_dir, tmp_path / "out", console=quiet())
    lines = metrics_of(tmp_path / "out")
    assert (result["reference_computed"], result["kl"]) == (24, 0.0)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "APO-zero" in (tmp_path / "out" / "README.md").read_text()


def test_a_last_row_alone_is_mismatched_with_no_completion_of_its_own_and_leaves_the_mean(
    model_dir: Path, tmp_path: Path, make_rows: Callable[..., list[Row]], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [replace(row, conversation="one" if index < 7 else row.row_id) for index, row in enumerate(make_rows(8))]
    result = train(SETTINGS, write(rows, tmp_path / "rows.jsonl"), model_dir, tmp_path / "out", console=quiet())
    assert 0 < result["rows_without_mismatch"] < 8  # groups of "one" alone have nobody to be mismatched with
    assert f"{result['rows_without_mismatch']} of 8 rows leave z0's mean" in caplog.text


@pytest.mark.parametrize("label", [True, False])
def test_batches_of_one_label_alone_train(
    label: bool, model_dir: Path, tmp_path: Path, make_rows: Callable[..., list[Row]]
) -> None:
    data = write(make_rows(8, label=label), tmp_path / "rows.jsonl")
    settings = SETTINGS.model_copy(update={"num_train_epochs": 8})
    train(settings, data, model_dir, tmp_path / "out", console=quiet())
    lines = metrics_of(tmp_path / "out")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert ("rewards/chosen" in lines[-1], "rewards/rejected" in lines[-1]) == (label, not label)


def test_weights_count_the_same_on_the_fast_path_and_off_it(
    lora_model: Callable[..., Any], make_rows: Callable[..., list[Row]]
) -> None:
    weights_of_rows = (0.0, 2.5, 0.4, 1.0, 0.0, 3.0)
    rows = [replace(row, weight=weight) for row, weight in zip(make_rows(6), weights_of_rows, strict=True)]
    others = [rows[index - 1].completion_ids for index in range(6)]
    gradients = []
    for micro_batch in (6, 2):  # prompts shared with the mismatched pass, and not
        policy = lora_model()
        with scoring(policy, None):
            matched, mismatched, _ = reference_logps(policy, rows, others, ReferenceCache(None, {}), Ranks())
        desirable, weight = torch.tensor([r.desirable for r in rows]), torch.tensor([r.weight for r in rows])
        batch = Batch(rows, others, matched, mismatched, desirable, weight)
        backward(policy, batch, beta=0.1, micro_batch=micro_batch, ranks=Ranks())
        gradients.append([p.grad for p in policy.parameters() if p.requires_grad])
        weightless = Batch(rows, others, matched, mismatched, desirable, torch.zeros(6))
        policy.zero_grad()
        backward(policy, weightless, beta=0.1, micro_batch=micro_batch, ranks=Ranks())
        assert all(not p.grad.any() for p in policy.parameters() if p.requires_grad)
    for fast, slow in zip(*gradients, strict=True):
        assert ((fast - slow).norm() / slow.norm()).item() < 1e-5


def test_class_weights_come_from_the_numbers_of_both_labels_and_are_in_the_log(
    model_dir: Path, tmp_path: Path, make_rows: Callable[..., list[Row]], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [replace(row, desirable=index < 9) for index, row in enumerate(make_rows(12))]
    data = tmp_path / "rows.jsonl"
    fields = ("prompt_ids", "completion_ids")
    with data.open("w") as file:
        for row in rows:
            file.write(json.dumps({name: getattr(row, name) for name in fields} | {"label": row.desirable}) + "\n")
    caplog.set_level("INFO", "loop")
    result = train(SETTINGS, data, model_dir, tmp_path / "out", console=quiet())
    # 9 up, 3 down: λ_U is raised until 9 / (3 λ_U) = 4/3, the nearer end of the paper's range.
    assert "λ_D = 1, λ_U = 2.25" in caplog.text
    assert (result["weight_desirable"], result["weight_undesirable"]) == (9.0, 6.75)
    given = SETTINGS.model_copy(update={"desirable_weight": 1.0, "undesirable_weight": 1.0})
    assert train(given, data, model_dir, tmp_path / "given", console=quiet())["weight_undesirable"] == 3.0


def test_lora_dropout_is_as_the_user_set_it_and_the_bases_is_off(model_dir: Path) -> None:
    settings = SETTINGS.model_copy(update={"lora_dropout": 0.3})
    policy = attach_lora(load_base(model_dir, "none", "float32"), settings)
    rates = {name: m.p for name, m in policy.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert rates
    assert all(rate == (0.3 if "lora_dropout" in name else 0.0) for name, rate in rates.items())


def test_one_conversation_alone_trains_with_z0_at_zero_and_says_so(
    model_dir: Path, tmp_path: Path, make_rows: Callable[..., list[Row]], caplog: pytest.LogCaptureFixture
) -> None:
    data = write(make_rows(8, conversations=1), tmp_path / "rows.jsonl")
    result = train(SETTINGS, data, model_dir, tmp_path / "out", console=quiet())
    assert result["rows_without_mismatch"] == 8
    assert result["kl"] == 0.0
    assert "8 of 8 rows leave z0's mean" in caplog.text


def test_a_mistake_in_the_settings_is_found_before_torch_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys, loop.kto.train, loop.kto.folders, loop.kto.rows, loop.kto.groups;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
