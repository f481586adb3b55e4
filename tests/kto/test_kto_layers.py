"""Our RMSNorm and SwiGLU against the models' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn

from loop.kto.layers import (
    OneProductLora,
    RmsNorm,
    SwiGlu,
    _AddLora,
    _InPlace,
    _OneProduct,
    _RmsNorm,
    _SwiGlu,
    replace_layers,
    speed_up_lora,
)
from loop.kto.model import prepare


def test_the_gradients_are_those_of_the_functions() -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: _RmsNorm.apply(x, weight, 1e-6), (x,))
    assert torch.autograd.gradcheck(_SwiGlu.apply, (x, y))
    assert torch.equal(_SwiGlu.apply(x, y), nn.functional.silu(x) * y)
    a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 8), (8, 2)))
    # What it adds to is overwritten, so each call gets a copy.
    assert torch.autograd.gradcheck(lambda y, x, a, b: _AddLora.apply(y.clone(), x, a, b, 0.7), (y, x, a, b))
    base = torch.randn(8, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, a, b: _OneProduct.apply(x, base, weight, a, b, 0.7), (x, a, b))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "granite"])
def test_a_model_with_our_layers_is_the_same_model(kind: str, make_model: Callable[..., Any]) -> None:
    theirs, ours = make_model(kind), make_model(kind)
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            if "norm" in name:  # they begin as 0 or 1
                nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    names = [type(module).__name__ for module in theirs.modules()]
    replace_layers(ours)
    kinds = [type(module) for module in ours.modules()]
    assert kinds.count(RmsNorm) == sum(name.endswith("RMSNorm") for name in names) > 0
    gated = 0 if kind.startswith("gemma") else sum(name.endswith("MLP") for name in names)  # Gemma's gate is a GELU
    assert kinds.count(SwiGlu) == gated
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ids = torch.arange(20).view(2, 10)
    out: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for model in (theirs, ours):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        out.append(model(inputs_embeds=embedded).logits)
        gradients += torch.autograd.grad(out[-1].square().sum(), embedded)
    assert torch.allclose(out[0], out[1], rtol=1e-4, atol=1e-5)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_layers_are_tried_out_in_training_mode(make_model: Callable[..., Any]) -> None:
    """In evaluation mode, bitsandbytes gives 4-bit weights another form on CPUs with AVX-512 BF16, for good."""
    model = make_model("llama").eval()
    modes: list[bool] = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda layer, _: modes.append(layer.training))
    prepare(model)
    assert set(modes) == {True}


def test_a_layer_that_is_another_function_stays() -> None:
    class ShiftedRMSNorm(nn.Module):
        weight = torch.ones(8)
        eps = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.norm() + 1

    model = nn.Sequential(ShiftedRMSNorm(), nn.RMSNorm(8, dtype=torch.bfloat16, eps=1e-6))
    replace_layers(model)
    assert not any(isinstance(module, RmsNorm) for module in model)


@pytest.mark.parametrize(
    ("tokens", "dropout", "takes_one_product"), [(15, 0.0, False), (300, 0.5, False), (300, 0.0, True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linear", [nn.Linear, Linear4bit])
def test_lora_made_faster_is_the_same_lora(
    linear: type[nn.Linear],
    dtype: torch.dtype,
    tokens: int,
    dropout: float,
    takes_one_product: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    products: list[None] = []
    apply = _OneProduct.apply
    monkeypatch.setattr(_OneProduct, "apply", lambda *given: (products.append(None), apply(*given))[1])
    x = torch.randn(3, tokens // 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    for is_ours in (False, True):
        torch.manual_seed(0)
        base = nn.Sequential(linear(64, 64, bias=False), linear(64, 64, bias=False)).to(dtype).to("cpu")
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["0", "1"], init_lora_weights=False)
        model: Any = get_peft_model(base, config)  # type: ignore[arg-type]
        if is_ours:
            speed_up_lora(model)
        layers = list(model.modules())
        assert any(isinstance(v, _InPlace) for m in layers for v in getattr(m, "lora_variant", {}).values()) is is_ours
        assert any(isinstance(m, OneProductLora) for m in layers) is (is_ours and linear is nn.Linear)
        torch.manual_seed(2)  # of the dropout
        inputs = x.clone().requires_grad_()
        out = model(inputs)
        out.float().square().sum().backward()
        with model.disable_adapter(), torch.no_grad():
            found.append([out, inputs.grad, *(p.grad for p in model.parameters() if p.requires_grad), model(x)])
    assert len(products) == (2 if takes_one_product and linear is nn.Linear and dtype == torch.float32 else 0)
    for theirs, ours in zip(*found, strict=True):
        assert theirs.float().norm() > 0
        assert (theirs.float() - ours.float()).norm() <= 1e-5 * theirs.float().norm()
