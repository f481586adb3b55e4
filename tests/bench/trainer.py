"""Rows a second and memory of this trainer and of TRL's KTOTrainer, on the same rows, pairs and random model.

    python -m tests.bench.trainer [--models small large] [--data single four_turns] [--rows 96] [--repeats 1]

Prints JSON lines: one for each run, each in a process of its own and alternating (TRL, ours with an empty cache, ours
with the cache that this leaves), and one for each model and data with the medians' ratios. Reference work is part of
the seconds; loading is apart. Loss and kl of each step are compared: both trained the same.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import Any

VOCABULARY, BATCH, SIGMA = 4096, 8, 0.6
MEAN_TOKENS = {"single": 200, "four_turns": 150}  # of a turn: a fourth turn's prompt holds the three before it
SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4},  # 5.8 M
    "large": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},  # 27 M
}
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
        print(json.dumps(run_trl(given.folder) if given.run == "trl" else run_thumbwheel(given.folder, given.run)))
        return
    for model in given.models:
        for data in given.data:
            with tempfile.TemporaryDirectory() as folder:
                make_model(Path(folder), model)
                make_rows(Path(folder), data, given.rows)
                what = {"bench": "trainer", "model": model, "data": data, "rows": given.rows}
                compare(Path(folder), what, given.repeats, given.threads)


def compare(folder: Path, what: dict[str, Any], repeats: int, threads: int | None) -> None:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(repeats):
        for name, results in runs.items():
            command = [sys.executable, "-m", "tests.bench.trainer", "--run", name, "--folder", str(folder)]
            command += ["--threads", str(threads)] if threads else []
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            result = json.loads(output.stdout.splitlines()[-1])
            results.append(result)
            shown = {key: value for key, value in result.items() if key not in {"losses", "kls"}}
            print(json.dumps(what | {"trainer": name} | shown), flush=True)

    def median(name: str, key: str) -> float:
        return statistics.median(result[key] for result in runs[name])

    grown = {name: median(name, "peak_rss_mb") - median(name, "loaded_rss_mb") for name in runs}
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


def run_thumbwheel(folder: Path, cache: str) -> dict[str, Any]:
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
        quantization="none",
        max_length=4096,
        cache=folder / "cache",
    )
    loaded: list[float] = []
    load = model.load_base

    def load_and_measure(*arguments: Any) -> Any:
        base = load(*arguments)
        loaded.append(rss_mb())
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
        "loaded_rss_mb": loaded[0],
        "peak_rss_mb": result["peak_rss_mb"],
        "losses": [line["loss"] for line in lines],
        "kls": [line["kl"] for line in lines],
    }


def run_trl(folder: Path) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    started = time.perf_counter()
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    ordered = [rows[index] for index in order_for_trl([row["conversation_id"] for row in rows])]
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    loaded = rss_mb()
    trainer = KTOTrainer(
        model=base,
        args=KTOConfig(
            output_dir=str(folder / "trl"),
            **RATES,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            max_length=None,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
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
        "loaded_rss_mb": loaded,
        "peak_rss_mb": rss_mb(),
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


def make_model(folder: Path, shape: str) -> None:
    """Random weights, and a tokenizer whose words are `t<id>`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape],
        vocab_size=VOCABULARY,
        num_key_value_heads=SHAPES[shape]["num_attention_heads"],
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{index}": index for index in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder / "model")


def make_rows(folder: Path, data: str, count: int) -> None:
    """Turns of lognormal lengths, a third to two thirds of each the user's; in conversations of one turn or of four."""
    turns = 1 if data == "single" else 4
    if count % BATCH:
        raise SystemExit(f"--rows {count}: expected a multiple of {BATCH}, so that both trainers make the same batches")
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for index in range(count):
            if index % turns == 0:
                said: list[int] = []
            tokens = max(8, round(draw.lognormvariate(math.log(MEAN_TOKENS[data]) - SIGMA**2 / 2, SIGMA)))
            ids = [draw.randrange(3, VOCABULARY) for _ in range(tokens)]
            split = round(tokens * draw.uniform(1 / 3, 2 / 3))
            row = {"id": f"row-{index}", "conversation_id": f"talk-{index // turns}", "label": draw.random() < 0.6}
            row |= {"prompt_ids": said + ids[:split], "completion_ids": [*ids[split:], 2]}
            said = said + ids  # as a template that writes no end token between the turns
            file.write(json.dumps(row) + "\n")


def words(ids: list[int]) -> str:
    return " ".join(f"t{index}" for index in ids)


def rss_mb() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
