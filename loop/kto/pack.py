"""Packs: prompts and completions laid end to end for one pass through the model, nothing padded, nothing twice.

A prompt is computed once for all completions that are scored after it: its own and the mismatched one. Pure index
arithmetic; the model is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from loop.kto.attention import Segment

Tokens = Sequence[int]


@dataclass(frozen=True)
class Prompted:
    """One prompt and the completions to be scored after it; the prompt has at least one token, as has each of them."""

    prompt_ids: Tokens
    completions: tuple[Tokens, ...]

    @property
    def tokens(self) -> int:
        """Tokens that the model has to compute; a completion's last one is predicted and never read."""
        return len(self.prompt_ids) + sum(len(completion) - 1 for completion in self.completions)


@dataclass(frozen=True)
class Pack:
    """One pass. T tokens computed, N tokens scored, in S sequences, after P prompts."""

    input_ids: Tensor  # [T]
    position_ids: Tensor  # [T]
    segments: tuple[Segment, ...]
    scored: Tensor  # [N] whose hidden state predicts the target: an index into [given hidden states, then the pack's]
    targets: Tensor  # [N]
    lengths: Tensor  # [S] tokens of each sequence; they sum to N
    prompt_spans: tuple[tuple[int, int], ...]  # [P] where each prompt lies among the T tokens


def pack(prompted: Sequence[Prompted]) -> Pack:
    """All completions of all prompts in one pass; sequences in the order of prompts, then completions."""
    builder = _Builder()
    spans = []
    for item in prompted:
        first = item.completions[0] if item.completions else ()
        start = builder.size
        stop = start + len(item.prompt_ids)
        # The prompt and its first completion are one causal run; further completions branch off the prompt.
        builder.add([*item.prompt_ids, *first[:-1]], position=0)
        if first:
            builder.score(stop - 1, stop, first)
        for completion in item.completions[1:]:
            own = builder.size
            builder.add(completion[:-1], position=len(item.prompt_ids), context=((start, stop),))
            builder.score(stop - 1, own, completion)
        spans.append((start, stop))
    return builder.build(spans)


def branch(trunk: Pack, completions: Sequence[tuple[int, Tokens]]) -> Pack:
    """Completions `(prompt, tokens)` that go on from prompts of a pass already made, whose keys and values are kept.

    Hidden states of the trunk's prompt ends, [P, H], come before the pack's own in `scored`.
    """
    builder = _Builder()
    prompts = len(trunk.prompt_spans)
    for prompt, completion in completions:
        start, stop = trunk.prompt_spans[prompt]
        own = prompts + builder.size
        builder.add(completion[:-1], position=stop - start, context=((start, stop),))
        builder.score(prompt, own, completion)
    return builder.build([])


def packs_of(prompted: Sequence[Prompted], max_tokens: int) -> Iterator[list[int]]:
    """Indices of `prompted`, in order, in runs of at most `max_tokens` computed tokens, or of one that is longer."""
    run: list[int] = []
    size = 0
    for index, item in enumerate(prompted):
        if run and size + item.tokens > max_tokens:
            yield run
            run, size = [], 0
        run.append(index)
        size += item.tokens
    if run:
        yield run


class _Builder:
    def __init__(self) -> None:
        self.size = 0
        self._tokens: list[Tokens] = []
        self._positions: list[Tokens] = []
        self._segments: list[Segment] = []
        self._scored: list[int] = []
        self._targets: list[Tokens] = []

    def add(self, tokens: Tokens, *, position: int, context: tuple[tuple[int, int], ...] = ()) -> None:
        if not tokens:
            return
        self._tokens.append(tokens)
        self._positions.append(range(position, position + len(tokens)))
        self._segments.append(Segment(self.size, self.size + len(tokens), context))
        self.size += len(tokens)

    def score(self, prompt_end: int, own: int, completion: Tokens) -> None:
        """The prompt's last hidden state predicts the first token, the completion's own predict the others."""
        self._scored += [prompt_end, *range(own, own + len(completion) - 1)]
        self._targets.append(completion)

    def build(self, spans: list[tuple[int, int]]) -> Pack:
        return Pack(
            input_ids=torch.tensor(list(chain.from_iterable(self._tokens)), dtype=torch.long),
            position_ids=torch.tensor(list(chain.from_iterable(self._positions)), dtype=torch.long),
            segments=tuple(self._segments),
            scored=torch.tensor(self._scored, dtype=torch.long),
            targets=torch.tensor(list(chain.from_iterable(self._targets)), dtype=torch.long),
            lengths=torch.tensor([len(completion) for completion in self._targets], dtype=torch.long),
            prompt_spans=tuple(spans),
        )
