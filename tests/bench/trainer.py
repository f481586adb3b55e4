"""Rows a second and memory of this trainer and of TRL's KTOTrainer, on the same rows, pairs and random model.

    python -m tests.bench.trainer [--models small large] [--data single four_turns] [--rows 96] [--repeats 1]

Prints JSON lines: one for each run, each in a process of its own and alternating (TRL, ours with an empty cache, ours
with the cache that this leaves), and one for each model and data with the medians' ratios. Reference work is part of
the seconds; loading is apart. Loss and kl of each step are compared: both trained the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

BATCH = 8
SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4},  # 5.8 M
    "large": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},  # 27 M
}
TURNS = {"single": 1, "four_turns": 4}
MEAN_TOKENS = {"single": 200, "four_turns": 150}  # of a turn: a fourth turn's prompt holds the three before it


@dataclass(frozen=True)
class Setup:
    """One comparison: the model, the rows, and how both trainers hold the model."""

    shape: dict[str, int]
    turns: int
    mean_tokens: int
    rows: int
    sigma: float = 0.6
    vocabulary: int = 4096
    quantization: Literal["none", "nf4"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False


RATES = {"learning_rate": 2e-4, "lr_scheduler_type": "linear", "seed": 0, "beta": 0.1}
CONTENDERS = ("trl", "cold", "warm")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.trainer", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["small"])
    parser.add_argument("--data", nargs="+", choices=list(MEAN_TOKENS), default=list(MEAN_TOKENS))
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default: torch's own choice")
    parser.add_argument("--run", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        import torch

        if given.threads:
            torch.set_num_threads(given.threads)
        setup = Setup(**json.loads((given.folder / "setup.json").read_text()))
        run = run_trl if given.run == "trl" else run_thumbwheel
        print(json.dumps(run(given.folder, setup, given.run)))
        return
    for model in given.models:
        for data in given.data:
            setup = Setup(SHAPES[model], TURNS[data], MEAN_TOKENS[data], given.rows)
            what = {"bench": "trainer", "model": model, "data": data, "rows": given.rows}
            with tempfile.TemporaryDirectory() as folder:
                compare(Path(folder), setup, what, given.repeats, given.threads)


def compare(folder: Path, setup: Setup, what: dict[str, Any], repeats: int, threads: int | None) -> None:
    """Run all contenders `repeats` times in turns, and print a line for each and one with the medians' ratios."""
    make_model(folder, setup)
    make_rows(folder, setup)
    (folder / "setup.json").write_text(json.dumps(vars(setup)))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(repeats):
        for name, results in runs.items():
            command = [sys.executable, "-m", "tests.bench.trainer", "--run", name, "--folder", str(folder)]
            command += ["--threads", str(threads)] if threads else []
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            result = json.loads(output.stdout.splitlines()[-1])
            results.append(result)
            print(json.dumps(what | {"trainer": name} | result), flush=True)

    def median(name: str, key: str) -> float:
        return statistics.median(result[key] for result in runs[name])

    grown = {name: median(name, "peak_mb") - median(name, "loaded_mb") for name in runs}
    summary = what | {"trl_rows_per_s": round(median("trl", "rows_per_s"), 3)}
    for name in CONTENDERS[1:]:
        summary |= {
            f"{name}_speed_ratio": round(median(name, "rows_per_s") / median("trl", "rows_per_s"), 2),
            f"{name}_cpu_ratio": round(median("trl", "cpu_s") / median(name, "cpu_s"), 2),  # steadier on shared cores
            f"{name}_memory_ratio_above_loading": round(grown[name] / grown["trl"], 3),
        }
        for figure in ("losses", "kls"):
            steps = zip(runs[name][-1][figure], runs["trl"][-1][figure], strict=True)
            summary[f"{name}_max_difference_of_{figure}"] = max(abs(ours - theirs) for ours, theirs in steps)
    print(json.dumps(summary), flush=True)


def run_thumbwheel(folder: Path, setup: Setup, cache: str) -> dict[str, Any]:
    from rich.console import Console

    from loop.kto import model
    from loop.kto.train import train
    from loop.settings import TrainSettings

    if cache == "cold":
        shutil.rmtree(folder / "cache", ignore_errors=True)
    settings = TrainSettings(
        **RATES,
        warmup_ratio=0.0,
        per_device_train_batch_size=BATCH,
        quantization=setup.quantization,
        dtype=setup.dtype,
        gradient_checkpointing=setup.gradient_checkpointing,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        max_length=1 << 16,
        cache=folder / "cache",
    )
    loaded: list[float] = []
    load = model.load_base

    def load_and_measure(*arguments: Any) -> Any:
        base = load(*arguments)
        loaded.append(memory_mb())
        return base

    model.load_base = load_and_measure
    out = folder / f"out-{time.monotonic_ns()}"
    cpu_at_start = time.process_time()
    with (folder / "console").open("w") as console:
        result = train(settings, folder / "rows.jsonl", folder / "model", out, console=Console(file=console))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "rows_per_s": result["rows_per_s"],
        "train_s": result["train_s"],
        "setup_s": result["setup_s"],
        "cpu_s": time.process_time() - cpu_at_start,
        "loaded_mb": loaded[0],
        "peak_mb": memory_mb(),
        "losses": [line["loss"] for line in lines],
        "kls": [line["kl"] for line in lines],
    }


def run_trl(folder: Path, setup: Setup, _: str) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import KTOConfig, KTOTrainer

    dtype = getattr(torch, setup.dtype)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": 0 if torch.cuda.is_available() else "cpu"}}
    if setup.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )

    started = time.perf_counter()
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    ordered = [rows[index] for index in order_for_trl([row["conversation_id"] for row in rows])]
    base = AutoModelForCausalLM.from_pretrained(folder / "model", **options)
    loaded = memory_mb()
    trainer = KTOTrainer(
        model=base,
        args=KTOConfig(
            output_dir=str(folder / "trl"),
            **RATES,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            max_length=None,
            logging_steps=1,
            bf16=setup.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            use_liger_kernel=has_liger(),
            gradient_checkpointing=setup.gradient_checkpointing,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt": words(r["prompt_ids"]),
                    "completion": " " + words(r["completion_ids"][:-1]),
                    "label": r["label"],
                }
                for r in ordered
            ]
        ),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )
    for row, prepared in zip(ordered, trainer.train_dataset, strict=True):
        assert prepared["prompt_ids"] == row["prompt_ids"]
        assert prepared["completion_ids"] == row["completion_ids"]
    setup_s, cpu_at_start = time.perf_counter() - started, time.process_time()
    trainer.train()
    train_s = time.perf_counter() - started - setup_s
    history = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "rows_per_s": len(rows) / train_s,
        "train_s": train_s,
        "setup_s": setup_s,
        "cpu_s": time.process_time() - cpu_at_start,
        "loaded_mb": loaded,
        "peak_mb": memory_mb(),
        "losses": [line["loss"] for line in history],
        "kls": [line["kl"] for line in history],
    }


def order_for_trl(conversations: list[str]) -> list[int]:
    """Our batches, each in an order in which every row's y′ is the completion of the row before it, as TRL takes it."""
    from loop.kto.groups import make_batches, make_groups, number_groups

    groups = make_groups(conversations, number_groups(conversations, BATCH, RATES["seed"]))
    ordered: list[int] = []
    for batch in make_batches(groups, BATCH, RATES["seed"]):
        following = dict(zip(batch.mismatched, batch.rows, strict=True))
        row = batch.rows[0]
        for _ in batch.rows:
            ordered.append(row)
            row = following[row]
        assert len(batch.rows) == BATCH
    assert sorted(ordered) == list(range(len(conversations)))
    return ordered


def has_liger() -> bool:
    """Whether TRL can have its fused kernels: they need CUDA, and a package that is not among ours."""
    import torch

    return torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None


def make_model(folder: Path, setup: Setup) -> None:
    """Random weights, and a tokenizer whose words are `t<id>`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        **{"num_key_value_heads": setup.shape["num_attention_heads"]} | setup.shape,
        vocab_size=setup.vocabulary,
        max_position_embeddings=1 << 16,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        LlamaForCausalLM(config).to(getattr(torch, setup.dtype)).save_pretrained(folder / "model")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{index}": index for index in range(3, setup.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder / "model")


def make_rows(folder: Path, setup: Setup) -> None:
    """Turns of lognormal lengths, a third to two thirds of each the user's; in conversations of `setup.turns`."""
    if setup.rows % BATCH:
        raise SystemExit(
            f"--rows {setup.rows}: expected a multiple of {BATCH}, for both trainers to make equal batches"
        )
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for index in range(setup.rows):
            if index % setup.turns == 0:
                said: list[int] = []
            middle = math.log(setup.mean_tokens) - setup.sigma**2 / 2
            tokens = max(8, round(draw.lognormvariate(middle, setup.sigma)))
            ids = [draw.randrange(3, setup.vocabulary) for _ in range(tokens)]
            split = round(tokens * draw.uniform(1 / 3, 2 / 3))
            row = {"id": f"row-{index}", "conversation_id": f"talk-{index // setup.turns}"}
            row |= {"label": draw.random() < 0.6}
            row |= {"prompt_ids": said + ids[:split], "completion_ids": [*ids[split:], 2]}
            said = said + ids  # as a template that writes no end token between the turns
            file.write(json.dumps(row) + "\n")


def words(ids: list[int]) -> str:
    return " ".join(f"t{index}" for index in ids)


def memory_mb() -> float:
    """The most memory that this process has had, in MiB: of the CUDA device where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
