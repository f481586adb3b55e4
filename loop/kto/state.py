"""How far a run has come: what a checkpoint holds besides the adapter and the optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor


@dataclass
class State:
    """Counted in optimiser steps; plain values and tensors only, as checkpoints keep it."""

    step: int = 0
    rows: int = 0
    train_s: float = 0.0
    totals: dict[str, float] = field(default_factory=dict)
    looked: dict[str, float] = field(default_factory=dict)
    """Figures of the last look at the validation rows."""
    best: dict[str, Any] = field(default_factory=dict)
    """Of the look with the lowest loss: `step`, `figures` and `weights`."""
    worse: int = 0
    """Looks since then."""

    @property
    def rows_per_s(self) -> float:
        """Rows trained on, a second."""
        return self.rows / self.train_s if self.train_s else 0.0

    def count(self, metrics: Mapping[str, float], rows: int, train_s: float) -> None:
        """One more step, of `rows` rows; `train_s` is of the whole run so far."""
        self.step, self.rows, self.train_s = self.step + 1, self.rows + rows, train_s
        self.totals = {name: self.totals.get(name, 0.0) + metrics[name] for name in ("loss", "kl")}

    def look(self, figures: Mapping[str, float], policy: PeftModel) -> None:
        """What the validation rows say of the policy as it is now."""
        self.looked = dict(figures)
        if not self.best or figures["eval_loss"] < self.best["figures"]["eval_loss"]:
            kept = {name: weight.clone() for name, weight in adapter_weights(policy).items()}
            self.best, self.worse = {"step": self.step, "figures": self.looked, "weights": kept}, 0
        else:
            self.worse += 1

    def has_stopped_improving(self, patience: int) -> bool:
        """Whether `patience` looks in a row have found no lower validation loss; never with a patience of 0."""
        return 0 < patience <= self.worse

    def go_back_to_best(self, policy: PeftModel) -> None:
        """Put the best look's adapter into the policy."""
        set_peft_model_state_dict(policy, self.best["weights"])
        self.looked = self.best["figures"]

    def figures(self) -> dict[str, float]:
        """Means over the run, and the validation rows' last word."""
        found = {name: total / self.step for name, total in self.totals.items()} | self.looked
        found |= {"steps": self.step, "rows_per_s": self.rows_per_s, "train_s": self.train_s}
        return found | ({"best_step": self.best["step"]} if self.best else {})


def adapter_weights(policy: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT's names, on the CPU."""
    state = get_peft_model_state_dict(policy, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
