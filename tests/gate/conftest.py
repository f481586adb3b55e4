"""One tiny base and two adapters for all of the gate's tests: trained on honest votes, and on flipped ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.gate.tiny import train_adapter, votes, write_base, write_votes


@dataclass(frozen=True)
class World:
    base: Path
    honest: Path
    flipped: Path
    held_out: Path
    """400 honest votes of 45 raters that neither adapter has seen."""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    # Threads that wait for each other on a busy machine take a hundred times as long as one alone does on tiny tensors.
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("gate")
    base = write_base(folder / "base")
    return World(
        base=base,
        honest=train_adapter(base, folder / "honest", votes(48, seed=1)),
        flipped=train_adapter(base, folder / "flipped", votes(48, seed=1, flip=True)),
        held_out=write_votes(folder / "held_out.jsonl", votes(400, seed=2)),
    )
