"""RMSNorm, SwiGLU and LoRA with their gradients written out: on a CPU faster than the models' own, and with half of the
memory, for less is kept for the backward, and less is made on the way that glibc then finds no good place for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn


class _RmsNorm(torch.autograd.Function):
    """RMSNorm (Zhang & Sennrich 2019); only the input and a number a token are kept.

    y = w · x · r,    r = 1 / sqrt(mean(x²) + ε)
    ∂L/∂x = r · (g − x · r² · mean(g · x)),    g = w · ∂L/∂y
    """

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


class _SwiGlu(torch.autograd.Function):
    """SwiGLU's product (Shazeer 2020); only its two factors are kept.

    y = s · u,    s = g · σ(g)
    ∂L/∂u = s · ∂L/∂y,    ∂L/∂g = u · ∂L/∂y · (σ(g) + s · (1 − σ(g)))
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return of_gate, F.silu(gate).mul_(gradients[0])


class SwiGlu(nn.Module):
    """[..., n] → [..., n]: a Transformers model's MLP with its own projections, under the names that they had."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        product = _SwiGlu.apply(self.gate_proj(x), self.up_proj(x))  # type: ignore[no-untyped-call]
        result: Tensor = self.down_proj(product)
        return result


class _AddLora(torch.autograd.Function):
    """LoRA (Hu et al. 2021): y = y₀ + s · x Aᵀ Bᵀ, added in place."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = x.flatten(0, -2) @ a.t()  # [tokens, r]
        base.view(-1, base.shape[-1]).addmm_(low, b.t(), alpha=scale)
        ctx.mark_dirty(base)
        ctx.save_for_backward(x, a, b, low)
        ctx.scale = scale
        return base

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None]:
        x, a, b, low = ctx.saved_tensors
        g = gradients[0].flatten(0, -2)
        of_low = (g @ b).mul_(ctx.scale)
        of_x = (of_low @ a).view_as(x) if ctx.needs_input_grad[1] else None
        return gradients[0], of_x, of_low.t() @ x.flatten(0, -2), (g.t() @ low).mul_(ctx.scale), None


class _InPlace(LoraVariant):  # type: ignore[misc]  # PEFT has no types here
    """Plain LoRA as one of PEFT's variants, which is how it lets a layer's sum be exchanged (0.21; no stable API)."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        x, scale = module.lora_dropout[active_adapter](x), module.scaling[active_adapter]
        if result.dtype != a.dtype:  # a base in bfloat16 under an adapter in float32
            return result + F.linear(F.linear(x, a), b) * scale  # type: ignore[no-any-return]
        return _AddLora.apply(result, x, a, b, scale)  # type: ignore[no-any-return,no-untyped-call]


class _OneProduct(torch.autograd.Function):
    """LoRA in one product: y = x (W + s · B A)ᵀ + c. For many tokens a sum of weights is less work than one of outputs.

    It is made again for the backward, rather than kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight, a, b = ctx.saved_tensors
        g, flat = gradients[0].flatten(0, -2), x.flatten(0, -2)
        of_x = (g @ torch.addmm(weight, b, a, alpha=ctx.scale)).view_as(x) if ctx.needs_input_grad[0] else None
        of_a = (g @ b).mul_(ctx.scale).t() @ flat
        of_b = (g.t() @ (flat @ a.t())).mul_(ctx.scale)
        return of_x, None, None, of_a, of_b, None


class OneProductLora(lora.Linear):  # type: ignore[misc]  # PEFT has no types here
    """PEFT's LoRA on a linear layer that is not quantised, in one product where that is the same and less work."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base, active = self.get_base_layer(), self.active_adapters
        if self.disable_adapters or self.merged or kwargs or len(active) != 1 or active[0] not in self.lora_A:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        a, b, dropout = self.lora_A[active[0]].weight, self.lora_B[active[0]], self.lora_dropout[active[0]]
        inputs, outputs = base.in_features, base.out_features
        is_less_work = x.numel() // inputs * (inputs + outputs) > 2 * inputs * outputs
        is_plain = b.bias is None and x.dtype == base.weight.dtype == a.dtype
        if not (is_less_work and is_plain) or (isinstance(dropout, nn.Dropout) and dropout.training):
            return super().forward(x)  # type: ignore[no-any-return]
        scale = self.scaling[active[0]]
        return _OneProduct.apply(x, base.weight, base.bias, a, b.weight, scale)  # type: ignore[no-any-return,no-untyped-call]


def speed_up_lora(model: nn.Module) -> None:
    """Let every plain LoRA of the model's linear layers take one product, or add to the base's output in place."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), nn.Linear):
            for name, b in layer.lora_B.items():
                if name not in layer.lora_variant and b.bias is None:
                    layer.lora_variant[name] = _InPlace()
            if type(layer) is lora.Linear and type(layer.get_base_layer()) is nn.Linear:
                layer.__class__ = OneProductLora


@torch.no_grad()
def replace_layers(model: nn.Module) -> None:
    """Put RmsNorm and SwiGlu in the place of every float32 layer of the model that gives the same on a trial."""
    for name, layer in list(model.named_modules()):
        for ours, width in _candidates(layer):
            device = next(ours.parameters()).device
            x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(device)
            if torch.allclose(ours(x), layer(x), rtol=1e-5, atol=1e-6):
                model.set_submodule(name, ours)
                break


def _candidates(layer: Any) -> list[tuple[nn.Module, int]]:
    """What may stand for a layer, and the width of its input."""
    weight = getattr(layer, "weight", None)
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    if type(layer).__name__.endswith("RMSNorm") and eps is not None and weight is not None:
        if weight.dtype != torch.float32:
            return []
        # Gemma keeps the weight as its difference from 1.
        return [(RmsNorm(scale, eps), len(weight)) for scale in (weight, 1 + weight)]
    if type(layer).__name__.endswith("MLP") and all(hasattr(layer, f"{name}_proj") for name in ("gate", "up", "down")):
        projection = layer.up_proj
        if getattr(projection, "compute_dtype", projection.weight.dtype) == torch.float32:  # 4-bit weights have one
            return [(SwiGlu(layer), projection.in_features)]
    return []
