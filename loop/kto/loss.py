"""The KTO objective (Ethayarajh et al. 2024, arXiv 2402.01306): tensors and floats in, loss and metrics out.

Equations (7) and (8) of the paper, with the implied reward r = log π_θ(y|x) − log π_ref(y|x):

    v(x, y) = λ_D · σ(β (r − z0))   where y is desirable
              λ_U · σ(β (z0 − r))   where y is undesirable
    L = E[λ_y − v(x, y)],   z0 = KL(π_θ(y′|x) ‖ π_ref(y′|x)), estimated as max(0, mean of r over mismatched (x, y′))

z0 is a constant in the gradient. β multiplies log-ratios of whole sequences, in nats. With z0 = 0 it is APO-zero for
unpaired rows (D'Oosterlinck et al. 2024, arXiv 2408.06266, as TRL's `apo_zero_unpaired`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_point(policy: Tensor, reference: Tensor) -> Tensor:
    """z0, a scalar ≥ 0 without gradient, from the [M] log-probs of mismatched pairs; 0 where there are none."""
    ratios = (policy - reference).detach()
    return ratios.mean().clamp(min=0) if len(ratios) else ratios.new_zeros(())


def kto_losses(policy: Tensor, reference: Tensor, desirable: Tensor, weight: Tensor, z0: Tensor, beta: float) -> Tensor:
    """λ_y − v(x, y) of each row: [N]. `policy`, `reference`, `weight` (λ_y) are [N] floats, `desirable` [N] bool."""
    margin = (policy - reference) - z0
    return weight * (1 - torch.sigmoid(beta * torch.where(desirable, margin, -margin)))


def kto_metrics(
    policy: Tensor, reference: Tensor, desirable: Tensor, weight: Tensor, z0: Tensor, beta: float
) -> dict[str, float]:
    """The figures of one effective batch under TRL's names; those of a label that the batch lacks are left out."""
    policy = policy.detach()
    metrics = {
        "loss": float(kto_losses(policy, reference, desirable, weight, z0, beta).mean()),
        "kl": float(z0),
    }
    rewards = beta * (policy - reference)
    for name, of_label in (("chosen", desirable), ("rejected", ~desirable)):
        if of_label.any():
            metrics[f"rewards/{name}"] = float(rewards[of_label].mean())
            metrics[f"logps/{name}"] = float(policy[of_label].mean())
    if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics
