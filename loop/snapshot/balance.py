"""Class weights: λ_D and λ_U from how much evidence of either label there is. Pure."""

from __future__ import annotations

from typing import Literal

# "λ_D·n_D / (λ_U·n_U) ∈ [1, 4/3]": Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization",
# arXiv 2402.01306, on class imbalance among the hyperparameters of the loss.
LOWEST_RATIO, HIGHEST_RATIO = 1.0, 4.0 / 3.0

Weight = float | Literal["balance"]


def class_weights(desirable: float, undesirable: float, weight_d: Weight, weight_u: Weight) -> tuple[float, float]:
    """(λ_D, λ_U) for `desirable` and `undesirable` rows (counts, or sums of the votes' weights).

    Where both are "balance", the rarer class is raised until the ratio reaches the nearer end of the range and the
    other one stays at 1, as in the paper; classes that are in range are left alone. Where one is given, the other is
    chosen for it. Where one class is empty or weighs nothing no ratio exists, and "balance" means 1.
    """
    given_d, given_u = weight_d != "balance", weight_u != "balance"
    lambda_d = 1.0 if weight_d == "balance" else weight_d
    lambda_u = 1.0 if weight_u == "balance" else weight_u
    if lambda_d * desirable <= 0 or lambda_u * undesirable <= 0:
        return lambda_d, lambda_u
    ratio = lambda_d * desirable / (lambda_u * undesirable)
    wanted = min(max(ratio, LOWEST_RATIO), HIGHEST_RATIO)
    if not given_d and (ratio < wanted or given_u):
        lambda_d *= wanted / ratio
    elif not given_u:
        lambda_u *= ratio / wanted
    return lambda_d, lambda_u
