"""Packs: prompts and completions laid end to end for one pass through the model, nothing padded, nothing twice.

Tokens that sequences have in common from their first on are computed once: a prompt for its own and its mismatched
completion, a conversation's earlier turns for each later one, a system prompt for all. What is common is found by
comparing tokens, never presumed from the template. Pure index arithmetic; the model is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loop.kto.attention import Range, Segment

Tokens = Sequence[int]


@dataclass(frozen=True)
class Prompted:
    """One prompt and the completions to be scored after it (one at least); none of them is empty."""

    prompt_ids: Tokens
    completions: tuple[Tokens, ...]

    @property
    def tokens(self) -> int:
        """Tokens to compute where only the prompt is shared; a completion's last one is predicted and never read."""
        return len(self.prompt_ids) + sum(len(completion) - 1 for completion in self.completions)


def prompted(prompt_ids: Tokens, completion: Tokens, other: Tokens | None) -> Prompted:
    """A prompt with its own completion and, where there is one, a mismatched one."""
    return Prompted(prompt_ids, (completion,) if other is None else (completion, other))


@dataclass(frozen=True)
class Pack:
    """One pass. T tokens computed, N tokens scored, in S sequences, after P prompts."""

    input_ids: Tensor  # [T]
    position_ids: Tensor  # [T]
    segments: tuple[Segment, ...]
    scored: Tensor  # [N] whose hidden state predicts the target: an index into [given hidden states, then the pack's]
    targets: Tensor  # [N]
    lengths: Tensor  # [S] tokens of each sequence; they sum to N
    prompts: tuple[tuple[Range, ...], ...]  # [P] where each prompt's tokens lie among the T, in their order


def pack(prompted: Sequence[Prompted]) -> Pack:
    """All completions of all prompts in one pass; sequences in the order of prompts, then completions."""
    builder = _Builder()
    sequences = [(item.prompt_ids, completion) for item in prompted for completion in item.completions]
    whole = [np.array([*prompt, *completion[:-1]], dtype=np.int64) for prompt, completion in sequences]
    paths: dict[int, tuple[Range, ...]] = {}
    # The longest first: what begins like it then needs no segment of its own, or a short one.
    for index in sorted(range(len(whole)), key=lambda index: -len(whole[index])):
        paths[index] = builder.place(whole[index])
    prompts = []
    index = 0
    for item in prompted:
        prompts.append(_cut(paths[index], len(item.prompt_ids)))
        for completion in item.completions:
            places = list(chain.from_iterable(range(start, stop) for start, stop in paths[index]))
            builder.score(places[len(item.prompt_ids) - 1 :], completion)
            index += 1
    return builder.build(prompts)


def branch(trunk: Pack, completions: Sequence[tuple[int, Tokens]]) -> Pack:
    """Completions `(prompt, tokens)` that go on from prompts of a pass already made, whose keys and values are kept.

    Hidden states of the trunk's prompt ends, [P, H], come before the pack's own in `scored`.
    """
    builder = _Builder()
    count = len(trunk.prompts)
    for prompt, completion in completions:
        path = trunk.prompts[prompt]
        own = count + builder.size
        builder.add(completion[:-1], sum(stop - start for start, stop in path), path)
        builder.score([prompt, *range(own, own + len(completion) - 1)], completion)
    return builder.build([])


@dataclass(frozen=True)
class Padded:
    """One pass of S sequences side by side, padded at the right to the longest, L: where attention takes no packs."""

    input_ids: Tensor  # [S, L]
    attention_mask: Tensor  # [S, L]
    scored: Tensor  # [N] an index into the hidden states laid end to end, [S · L]
    targets: Tensor  # [N]
    lengths: Tensor  # [S]


def pad(prompted: Sequence[Prompted]) -> Padded:
    """The same sequences in the same order as `pack`'s, each computed by itself."""
    sequences = [(item.prompt_ids, completion) for item in prompted for completion in item.completions]
    longest = max(len(prompt) + len(completion) - 1 for prompt, completion in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    scored: list[int] = []
    for place, (prompt, completion) in enumerate(sequences):
        tokens = [*prompt, *completion[:-1]]
        ids[place, : len(tokens)] = torch.tensor(tokens)
        mask[place, : len(tokens)] = 1
        first = place * longest + len(prompt) - 1
        scored += range(first, first + len(completion))
    return Padded(
        input_ids=ids,
        attention_mask=mask,
        scored=torch.tensor(scored),
        targets=torch.tensor([token for _, completion in sequences for token in completion]),
        lengths=torch.tensor([len(completion) for _, completion in sequences]),
    )


def padded_runs(prompted: Sequence[Prompted], max_tokens: int) -> Iterator[list[int]]:
    """Indices of `prompted`, shortest first, in runs of at most `max_tokens` positions, padding included, or of one."""
    length = [len(item.prompt_ids) + max(map(len, item.completions)) for item in prompted]
    run: list[int] = []
    sequences = 0
    for index in sorted(range(len(prompted)), key=length.__getitem__):
        sequences += len(prompted[index].completions)
        if run and sequences * length[index] > max_tokens:
            yield run
            run, sequences = [], len(prompted[index].completions)
        run.append(index)
    if run:
        yield run


def packs_of(prompted: Sequence[Prompted], max_tokens: int) -> Iterator[list[int]]:
    """Indices of `prompted`, in order, in runs of at most `max_tokens` computed tokens, or of one that is longer.

    Tokens in common are counted once between neighbours only: sorted by prompt, that is nearly all there are.
    """
    run: list[int] = []
    size = 0
    before = np.empty(0, dtype=np.int64)
    for index, item in enumerate(prompted):
        tokens = np.array([*item.prompt_ids, *item.completions[0][:-1]], dtype=np.int64)
        added = item.tokens - common_prefix(before, tokens)
        if run and size + added > max_tokens:
            yield run
            run, size, added = [], 0, item.tokens
        run.append(index)
        size += added
        before = tokens
    if run:
        yield run


def common_prefix(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length


class _Builder:
    def __init__(self) -> None:
        self.size = 0
        self._placed: list[tuple[NDArray[np.int64], tuple[Range, ...]]] = []
        self._tokens: list[Tokens] = []
        self._positions: list[Tokens] = []
        self._segments: list[Segment] = []
        self._scored: list[Tokens] = []
        self._targets: list[Tokens] = []

    def place(self, tokens: NDArray[np.int64]) -> tuple[Range, ...]:
        """Where the tokens lie: as far as an earlier sequence begins with them there, the rest in a new segment."""
        shared, context = 0, tuple[Range, ...]()
        for other, path in self._placed:
            if (common := common_prefix(tokens, other)) > shared:
                shared, context = common, _cut(path, common)
        start = self.size
        self.add(tokens[shared:].tolist(), shared, context)
        path = context if shared == len(tokens) else (*context, (start, self.size))
        self._placed.append((tokens, path))
        return path

    def add(self, tokens: Tokens, position: int, context: tuple[Range, ...]) -> None:
        """A segment at the pack's end, for tokens that are not there yet."""
        if not tokens:
            return
        self._tokens.append(tokens)
        self._positions.append(range(position, position + len(tokens)))
        self._segments.append(Segment(self.size, self.size + len(tokens), context))
        self.size += len(tokens)

    def score(self, places: Tokens, completion: Tokens) -> None:
        """The hidden states at the places predict the completion's tokens; the first is the prompt's last one."""
        self._scored.append(places[: len(completion)])
        self._targets.append(completion)

    def build(self, prompts: list[tuple[Range, ...]]) -> Pack:
        return Pack(
            input_ids=torch.tensor(list(chain.from_iterable(self._tokens)), dtype=torch.long),
            position_ids=torch.tensor(list(chain.from_iterable(self._positions)), dtype=torch.long),
            segments=tuple(self._segments),
            scored=torch.tensor(list(chain.from_iterable(self._scored)), dtype=torch.long),
            targets=torch.tensor(list(chain.from_iterable(self._targets)), dtype=torch.long),
            lengths=torch.tensor([len(completion) for completion in self._targets], dtype=torch.long),
            prompts=tuple(prompts),
        )


def _cut(path: tuple[Range, ...], length: int) -> tuple[Range, ...]:
    """The path's first `length` tokens."""
    found = []
    for start, stop in path:
        if length <= 0:
            break
        found.append((start, min(stop, start + length)))
        length -= stop - start
    return tuple(found)
