"""RMSNorm (Zhang & Sennrich 2019) with its gradient written out: on a CPU a fifth of the time of the models' own, and
half of the memory, for only the input and a number a token are kept for the backward.

    y = w · x · r,    r = 1 / sqrt(mean(x²) + ε)
    ∂L/∂x = r · (g − x · r² · mean(g · x)),    g = w · ∂L/∂y
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        r = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        y: Tensor = (x * r).mul_(weight)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, r = ctx.saved_tensors
        g = gradients[0] * weight
        mean = (g * x).sum(-1, keepdim=True).mul_(r**3 / x.shape[-1])
        return g.mul_(r).addcmul_(x, mean, value=-1), None, None


class RmsNorm(nn.Module):
    """[..., n] → [..., n] in float32, for a frozen weight [n]."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RmsNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return,no-untyped-call]


@torch.no_grad()
def replace_norms(model: nn.Module) -> None:
    """Put RmsNorm in the place of every float32 RMSNorm of the model that gives the same on a trial."""
    trials = torch.Generator().manual_seed(0)
    for name, norm in list(model.named_modules()):
        weight = getattr(norm, "weight", None)
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if (
            not type(norm).__name__.endswith("RMSNorm")
            or eps is None
            or weight is None
            or weight.dtype != torch.float32
        ):
            continue
        x = torch.randn(4, len(weight), generator=trials).to(weight.device)
        for scale in (weight, 1 + weight):  # Gemma keeps the weight as its difference from 1
            ours = RmsNorm(scale, eps)
            if torch.allclose(ours(x), norm(x), rtol=1e-5, atol=1e-6):
                model.set_submodule(name, ours)
                break
