"""The trainer's comparison on a CUDA machine: `python -m tests.bench.trainer_cuda [--models 1b] [--tokens 1024]`.

Random Llamas of 1 B and 8 B parameters, NF4 and bfloat16, rows of 1,024 and 4,096 tokens, with gradient checkpointing;
memory is the device's. The rival is TRL at its best there: it scores completion tokens only, and has Liger's kernels
where `liger_kernel` is installed (the first line says). Figures are not to be compared with the CPU's.

Where there is no CUDA device it says so and runs its smallest shapes on the CPU, only to show that it runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from tests.bench.trainer import SHAPES, TURNS, Setup, compare, has_liger

MODELS = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
VOCABULARY = 128_256


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.trainer_cuda", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096], help="of a whole row, on average")
    parser.add_argument("--data", nargs="+", choices=list(TURNS), default=list(TURNS))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    what: dict[str, object] = {"bench": "trainer_cuda", "rows": given.rows, "liger": has_liger()}
    shapes, tokens, vocabulary = {name: MODELS[name] for name in given.models}, given.tokens, VOCABULARY
    if torch.cuda.is_available():
        what["device"] = torch.cuda.get_device_name()
    else:
        what["device"] = "cpu"
        print(json.dumps(what | {"note": "no CUDA device: small shapes on the CPU, which say nothing of a GPU"}))
        shapes, tokens, vocabulary = {"small": SHAPES["small"]}, [128], 4096
    for model, shape in shapes.items():
        for length in tokens:
            for data in given.data:
                # A conversation's last row holds all turns before it: on average its rows have 2.5 turns.
                turn = round(length / (1 + (TURNS[data] - 1) / 2))
                setup = Setup(
                    shape,
                    TURNS[data],
                    turn,
                    given.rows,
                    sigma=0.2,
                    vocabulary=vocabulary,
                    quantization="nf4",
                    dtype="bfloat16",
                    gradient_checkpointing=True,
                )
                with tempfile.TemporaryDirectory() as folder:
                    compare(
                        Path(folder),
                        setup,
                        what | {"model": model, "data": data, "tokens": length},
                        given.repeats,
                        None,
                    )


if __name__ == "__main__":
    main()
