"""The same batch through TRL's KTOTrainer: the outside proof that this trains KTO and nothing else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from loop.kto.batch import policy_and_mismatched_logps, reference_logps
from loop.kto.cache import ReferenceCache
from loop.kto.gradients import Batch, backward
from loop.kto.groups import mismatch
from loop.kto.loss import kto_losses, reference_point
from loop.kto.model import scoring
from loop.kto.ranks import Ranks
from loop.kto.rows import Row


@pytest.mark.parametrize(
    ("label", "weights"),
    [
        (None, (1.0, 1.0)),  # mixed
        (True, (1.0, 1.0)),  # all desirable
        (False, (1.0, 1.0)),  # all undesirable
        (None, (1.7, 0.6)),  # mixed, λ_D and λ_U other than 1
        (False, (1.7, 0.6)),
    ],
)
@pytest.mark.parametrize("drift", [1.0, -1.0])  # z0 above 0, and z0 clamped at 0 in one of the two
@pytest.mark.filterwarnings("ignore::DeprecationWarning:trl", "ignore::FutureWarning:trl")
def test_loss_and_every_lora_gradient_are_trls(
    label: bool | None,
    weights: tuple[float, float],
    drift: float,
    lora_model: Callable[..., Any],
    make_rows: Callable[..., list[Row]],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    rows = [replace(row, weight=weights[0] if row.desirable else weights[1]) for row in make_rows(8, label=label)]
    assert label is not None or len({row.desirable for row in rows}) == 2
    others = [rows[other].completion_ids for other in mismatch([row.conversation for row in rows]) if other is not None]
    rival, ours = lora_model("llama", "sdpa"), lora_model("llama", "thumbwheel_packed")
    # TRL takes the adapter that it finds as the reference, so it has to find B = 0, which is ours: the base alone.
    _multiply_b(rival, 0.0)

    trainer = KTOTrainer(
        model=rival,
        args=_trl_settings(tmp_path, weights),
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * 8),
        processing_class=tokenizer,
    )
    rival.load_state_dict(ours.state_dict(), strict=False)
    _multiply_b(rival, drift)
    _multiply_b(ours, drift)
    examples = [
        {
            "prompt_ids": row.prompt_ids,
            "completion_ids": row.completion_ids,
            "KL_completion_ids": other,  # the same pairs: each row's completion is the one before (see groups.mismatch)
            "label": row.desirable,
        }
        for row, other in zip(rows, others, strict=True)
    ]
    trl_loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    trl_loss.backward()

    with scoring(ours, None):
        matched, mismatched, _ = reference_logps(ours, rows, others, ReferenceCache(None, {}), Ranks())
    policy, policy_others = policy_and_mismatched_logps(ours, rows, others)
    z0 = reference_point(policy_others, mismatched)
    desirable, weight = torch.tensor([r.desirable for r in rows]), torch.tensor([r.weight for r in rows])
    loss = kto_losses(policy, matched, desirable, weight, z0, beta=0.1).mean()
    loss.backward()

    assert z0.item() == pytest.approx(trainer._metrics["train"]["kl"][0], rel=1e-4, abs=1e-5)
    assert loss.item() == pytest.approx(trl_loss.item(), abs=1e-6)
    expected = {name: p.grad for name, p in rival.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert ((gradient - expected[name]).norm() / expected[name].norm()).item() < 1e-5, name


@pytest.mark.filterwarnings("ignore::DeprecationWarning:trl", "ignore::FutureWarning:trl")
def test_apo_zero_is_trls(
    lora_model: Callable[..., Any], make_rows: Callable[..., list[Row]], tokenizer: Any, tmp_path: Path
) -> None:
    rows = [replace(row, weight=1.7 if row.desirable else 0.6) for row in make_rows(8)]
    rival, ours = lora_model("llama", "sdpa"), lora_model("llama", "thumbwheel_packed")
    _multiply_b(rival, 0.0)
    settings = _trl_settings(tmp_path, (1.7, 0.6))
    settings.loss_type = "apo_zero_unpaired"
    trainer = KTOTrainer(
        model=rival,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * 8),
        processing_class=tokenizer,
    )
    rival.load_state_dict(ours.state_dict(), strict=False)
    fields = ("prompt_ids", "completion_ids")
    examples = [{name: getattr(row, name) for name in fields} | {"label": row.desirable} for row in rows]
    trl_loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    trl_loss.backward()

    none: list[None] = [None] * len(rows)
    with scoring(ours, None):
        matched, mismatched, _ = reference_logps(ours, rows, none, ReferenceCache(None, {}), Ranks())
    step = Batch(
        rows,
        none,
        matched,
        mismatched,
        torch.tensor([row.desirable for row in rows]),
        torch.tensor([row.weight for row in rows]),
    )
    logps, z0 = backward(ours, step, beta=0.1, micro_batch=8, ranks=Ranks())
    assert z0 == 0
    loss = kto_losses(logps, matched, step.desirable, step.weight, z0, beta=0.1).mean()
    assert loss.item() == pytest.approx(trl_loss.item(), abs=1e-6)
    expected = {name: p.grad for name, p in rival.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert ((parameter.grad - expected[name]).norm() / expected[name].norm()).item() < 1e-5, name


def _multiply_b(model: Any, factor: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.mul_(factor)


def _trl_settings(folder: Path, weights: tuple[float, float]) -> KTOConfig:
    return KTOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        beta=0.1,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
    )
