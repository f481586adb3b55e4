"""Log-probs of completion tokens: the one copy that training, reference, gate and `thumbwheel score` share.

The backbone runs over a pack; the model's own head then sees only the hidden states that predict a completion token,
in chunks, so that no `[tokens, vocabulary]` tensor of a whole batch exists, neither forward nor backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from loop.kto.attention import PACKED_ATTENTION, KeysValues, Layout
from loop.kto.pack import Pack, Padded, Prompted, pack, packs_of, pad, padded_runs

LOGITS_AT_A_TIME = 1 << 22  # elements of one chunk of logits: 16 MB in float32
SCORED_TOKENS_AT_A_TIME = 2048  # tokens of one pass without gradient: its activations stay in a CPU's cache
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Prefixes:
    """What a pass leaves behind so that other completions can go on from its prompts; all of it detached."""

    keys_values: dict[int, KeysValues]
    hidden: Tensor  # [P, H] of each prompt's last token


def causal_model(model: nn.Module) -> Any:
    """The Transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_packed(model: nn.Module) -> bool:
    """Whether the model's attention takes packs (`model.load_base` sees to it where it can); else rows are padded."""
    return str(causal_model(model).config._attn_implementation) == PACKED_ATTENTION


def lay_out(model: nn.Module, prompted: Sequence[Prompted]) -> Pack | Padded:
    """The sequences for one pass through this model."""
    return pack(prompted) if is_packed(model) else pad(prompted)


def token_logps(model: nn.Module, batch: Pack | Padded, prefixes: Prefixes | None = None) -> Tensor:
    """log π(token | before) of the scored tokens, [N] float32, with gradient where it is enabled."""
    return _score(model, scored_hidden(model, batch, prefixes), batch.targets)


def token_logps_and_prefixes(model: nn.Module, batch: Pack) -> tuple[Tensor, Prefixes]:
    """`token_logps`, and what `pack.branch` needs to score other completions after the same prompts."""
    kept: dict[int, KeysValues] = {}
    hidden = _hidden(model, batch, None, kept)
    ends = torch.tensor([path[-1][1] - 1 for path in batch.prompts], device=hidden.device)
    scored = hidden.index_select(0, batch.scored.to(hidden.device))
    return _score(model, scored, batch.targets), Prefixes(kept, hidden.detach()[ends])


def scored_hidden(model: nn.Module, batch: Pack | Padded, prefixes: Prefixes | None = None) -> Tensor:
    """[N, H] hidden states that predict the scored tokens."""
    hidden = _hidden(model, batch, prefixes, None)
    return hidden.index_select(0, batch.scored.to(hidden.device))


def sequence_sums(tokens: Tensor, lengths: Tensor) -> Tensor:
    """[N] by token and [S] lengths to the [S] sums by sequence, in float64: what counts are the small differences of
    sums of 1,000 nats.
    """
    lengths = lengths.to(tokens.device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=tokens.device), lengths)
    sums = tokens.new_zeros(len(lengths), dtype=torch.float64)
    return sums.index_add(0, owner, tokens.double())


@torch.no_grad()
def score_all(
    model: nn.Module, prompted: Sequence[Prompted], on_progress: Callable[[int], None] | None = None
) -> list[tuple[Tensor, ...]]:
    """Token log-probs, [length] on the CPU, of every completion of every prompt, without gradient.

    `on_progress` gets the number of prompts done after each pass. LoRA dropout must be off (`model.scoring`).
    """
    results: dict[int, tuple[Tensor, ...]] = {}
    for indices in runs(model, prompted):
        batch = lay_out(model, [prompted[index] for index in indices])
        sequences = iter(torch.split(token_logps(model, batch).cpu(), batch.lengths.tolist()))
        results |= {index: tuple(next(sequences) for _ in prompted[index].completions) for index in indices}
        if on_progress is not None:
            on_progress(len(results))
    return [results[index] for index in range(len(prompted))]


def runs(model: nn.Module, prompted: Sequence[Prompted]) -> Iterator[list[int]]:
    """Indices of `prompted` that make one pass without gradient."""
    if not is_packed(model):
        yield from padded_runs(prompted, SCORED_TOKENS_AT_A_TIME)
        return
    # Sorted, what is shared stands together.
    order = sorted(range(len(prompted)), key=lambda index: list(prompted[index].prompt_ids))
    for run in packs_of([prompted[index] for index in order], SCORED_TOKENS_AT_A_TIME):
        yield [order[place] for place in run]


def _hidden(
    model: nn.Module, batch: Pack | Padded, prefixes: Prefixes | None, kept: dict[int, KeysValues] | None
) -> Tensor:
    """Hidden states after the last norm: [P given + T, H] of a pack, [S · L, H] of padded sequences."""
    causal = causal_model(model)
    if isinstance(batch, Padded):
        padded = getattr(causal, causal.base_model_prefix)(
            input_ids=batch.input_ids.to(causal.device),
            attention_mask=batch.attention_mask.to(causal.device),
            use_cache=False,
        )
        hidden: Tensor = padded.last_hidden_state.flatten(0, 1)
        return hidden
    given = [] if prefixes is None else [prefixes.hidden]
    if batch.segments:
        layout = Layout(batch.segments, None if prefixes is None else prefixes.keys_values, kept)
        output = getattr(causal, causal.base_model_prefix)(
            input_ids=batch.input_ids[None].to(causal.device),
            position_ids=batch.position_ids[None].to(causal.device),
            use_cache=False,
            layout=layout,
        )
        given.append(output.last_hidden_state[0])
    return given[0] if len(given) == 1 else torch.cat(given)


def logits_chunk(causal: Any) -> int:
    """How many positions' logits are made at a time."""
    return max(1, LOGITS_AT_A_TIME // int(causal.config.get_text_config().vocab_size))


def _score(model: nn.Module, scored: Tensor, targets: Tensor) -> Tensor:
    causal = causal_model(model)
    head, chunk = output_head(causal), logits_chunk(causal)
    result: Tensor = _TokenLogps.apply(scored, targets.to(scored.device), head, chunk)  # type: ignore[no-untyped-call]
    return result


class _GivenHidden(nn.Module):
    """Stands where the backbone was, and returns the hidden states that it is handed."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _HiddenOnly:
        return _HiddenOnly(last_hidden_state=inputs_embeds)


class _HiddenOnly(BaseModelOutputWithPast):  # type: ignore[misc]  # Transformers has no types here
    """A backbone's output; what some backbones have besides (router logits, states) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def output_head(causal: Any) -> Head:
    """[C, H] to the [C, vocabulary] logits by the model's own forward, so that its scaling and soft-capping hold.

    A shallow copy of the model, with the same weights, has its backbone replaced by one that returns what it is given.
    """
    head = copy.copy(causal)
    head.__dict__["_modules"] = {**causal._modules, causal.base_model_prefix: _GivenHidden()}
    forward = type(causal).forward  # of the class: quantised models may carry a forward bound to the whole model

    def logits(hidden: Tensor) -> Tensor:
        result: Tensor = forward(head, inputs_embeds=hidden[None], use_cache=False).logits[0]
        return result

    return logits


class _TokenLogps(torch.autograd.Function):
    """[N, H] hidden states and [N] targets to [N] log-probs; the head's weights get no gradient.

    A token's log-prob depends on one hidden state alone, so its derivative is one row, which the forward can compute
    while the chunk's logits are there. The backward then only scales rows: logits are made once and never kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, chunk: int) -> Tensor:
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            states = hidden[part].detach().requires_grad_(slopes is not None)
            with torch.set_grad_enabled(slopes is not None):
                logits = head(states).float()  # [C, V]
                chosen = logits.gather(1, targets[part, None])[:, 0] - logits.logsumexp(1)
            logps[part] = chosen.detach()
            if slopes is not None:
                (slopes[part],) = torch.autograd.grad(chosen, states, torch.ones_like(chosen))
        ctx.slopes = slopes
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.slopes * grad[:, None].to(ctx.slopes.dtype), None, None, None
