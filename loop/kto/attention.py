"""Attention over a pack: many sequences laid end to end in one row of tokens, with no padding.

Every linear layer sees one long row; only attention has to know where a sequence ends. The layout travels as a keyword
argument through the model's forward, so nothing is patched: the function is one more entry in Transformers' table of
attention implementations. It has no entry in the table of masks, so models build none.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

PACKED_ATTENTION = "thumbwheel_packed"
KeysValues = tuple[Tensor, Tensor]  # each [1, key heads, tokens, head size]
Range = tuple[int, int]  # tokens start:stop of a pack


@dataclass(frozen=True)
class Segment:
    """Tokens `start:stop` of a pack: each sees all of `context` and then, causally, its own segment."""

    start: int
    stop: int
    context: tuple[Range, ...] = ()
    """Earlier tokens, in the order of their positions, in this pack or `Layout.given`'s; a range is of one segment."""


@dataclass(frozen=True)
class Layout:
    """Who sees whom in one pass. Segments follow each other without gaps and cover the pack."""

    segments: tuple[Segment, ...]
    given: Mapping[int, KeysValues] | None = None
    """By layer, keys and values of an earlier pass that contexts point into; None: contexts lie in this pack."""
    kept: dict[int, KeysValues] | None = None
    """By layer, where this pass leaves its own keys and values, detached, for a later one."""
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    """Masks made so far; every layer needs the same few."""
    bounds: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    """Where each of some lengths, end to end, begins, and where the last one ends: likewise."""

    def context(
        self, segment: Segment, layer: int, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> list[KeysValues]:
        """Keys and values of a segment's context, range by range; `keys` and `values` are this pass's, by segment."""
        if self.given is not None:
            k, v = self.given[layer]
            return [(k[:, :, start:stop], v[:, :, start:stop]) for start, stop in segment.context]
        found = []
        for start, stop in segment.context:
            index = bisect_right(self.segments, start, key=lambda other: other.start) - 1
            first = self.segments[index].start
            found.append(
                (keys[index][:, :, start - first : stop - first], values[index][:, :, start - first : stop - first])
            )
        return found


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, tokens, head size]
    key: Tensor,  # [1, key heads, tokens, head size]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each segment by itself: [1, tokens, heads, head size]. There is no attention dropout."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if layout.kept is not None:
        layout.kept[layer] = (key.detach(), value.detach())
    # One split and one concatenation: slices of the whole would each pad their gradient to the whole pack.
    lengths = [segment.stop - segment.start for segment in layout.segments]
    queries, keys, values = (torch.split(x, lengths, 2) for x in (query, key, value))
    seen: list[KeysValues] = []
    for segment, k, v in zip(layout.segments, keys, values, strict=True):
        if segment.context:
            before = layout.context(segment, layer, keys, values)
            k, v = torch.cat([*(own for own, _ in before), k], 2), torch.cat([*(own for _, own in before), v], 2)
        seen.append((k, v))
    if softcap is None and has_varlen_kernel(query):
        return _attend_at_once(query, seen, lengths, layout, scaling, sliding_window), None
    outputs = []
    for q, (k, v) in zip(queries, seen, strict=True):
        window = sliding_window if sliding_window is not None and sliding_window < k.shape[2] else None
        outputs.append(_attend(q, k, v, layout, scaling, window, softcap))
    return torch.cat(outputs, 2).transpose(1, 2), None


def has_varlen_kernel(query: Tensor) -> bool:
    """Whether FlashAttention takes it: 16 bits, heads of at most 256, a CUDA device from Ampere on."""
    is_fitting = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256
    return is_fitting and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _attend_at_once(
    query: Tensor,
    seen: Sequence[KeysValues],
    lengths: Sequence[int],
    layout: Layout,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One launch for all segments. Its causal mask, like ours, has each segment's last query at its last key."""
    keys, values = zip(*seen, strict=True)
    key_lengths = [k.shape[2] for k in keys]
    q, k, v = (x[0].transpose(0, 1) for x in (query, torch.cat(keys, 2), torch.cat(values, 2)))
    out = varlen_attn(
        q,
        k,
        v,
        _bounds(layout, lengths, q.device),
        _bounds(layout, key_lengths, q.device),
        max(lengths),
        max(key_lengths),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)  # a pair only where auxiliary outputs are asked for
    return out[None]


def _bounds(layout: Layout, lengths: Sequence[int], device: torch.device) -> Tensor:
    """[segments + 1] int32."""
    of = tuple(lengths)
    if of not in layout.bounds:
        layout.bounds[of] = torch.tensor([0, *accumulate(of)], dtype=torch.int32, device=device)
    return layout.bounds[of]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    is_plain_causal = q.shape[2] == k.shape[2] and window is None
    shared_heads = q.shape[1] != k.shape[1]
    if softcap is None:
        mask = None if is_plain_causal else _mask(layout, q.shape[2], k.shape[2], window, q.device)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_plain_causal, scale=scaling, enable_gqa=shared_heads
        )
    if shared_heads:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * (scaling if scaling is not None else q.shape[3] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap  # Gemma 2 caps scores before it masks them
    scores = scores.masked_fill(~_mask(layout, q.shape[2], k.shape[2], window, q.device), -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _mask(layout: Layout, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool; the last query sits at the last key, and sees `window` keys, itself included."""
    shape = (queries, keys, window)
    if shape not in layout.masks:
        offset = keys - queries
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset)
        layout.masks[shape] = mask if window is None else mask.triu(offset - window + 1)
    return layout.masks[shape]


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
