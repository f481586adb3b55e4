"""Which examples are fit to learn from, and with what label. Pure; every step has a name, which is counted under."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from loop.content import Content, decode_content, pair_digest
from loop.events import IMPLICIT_SOURCES
from loop.settings import SnapshotSettings
from loop.sorted_arrays import find_frequent, run_starts
from loop.store.examples import Example

# In the order in which they are applied; the first eight look at one example alone.
STEPS = {
    "unlabelled": "no vote stands on it, or only votes of no weight",
    "aborted": "the client left, or the engine failed, before the answer was whole",
    "truncated": "the answer ran into the token limit: its missing end is nobody's choice",
    "empty": "neither text nor tokens to learn from",
    "media": "the prompt has images or sound, of which the token ids tell nothing",
    "untokenized": "served token ids are not known and snapshot.allow_untokenized is off",
    "untemplated": "served token ids are not known and the messages are more than text (tool calls)",
    "too_long": "longer than snapshot.max_tokens",
    "exact_duplicates": "the same prompt and answer again: one row is left, with the votes on all of them",
    "disagreement": "votes tie, or (snapshot.disagreement = drop) are not unanimous",
    "max_per_rater": "more training rows of one rater than snapshot.max_per_rater; the newest stay",
    "max_per_prompt": "more training rows of one exact prompt than snapshot.max_per_prompt; the newest stay",
}


class Vote(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One rater's standing vote. `who` tells raters apart; it is the rater's hash where the vote is `named`."""

    who: str
    named: bool
    up: bool
    weight: float
    hlc: int
    thumb: bool = True
    """Whether the rater said it himself: then it goes before what was concluded from what he did."""


class Row(msgspec.Struct, frozen=True, gc=False):
    """An example, or a correction of it, that passed the steps which look at it alone."""

    example: Example
    content: Content
    example_id: str
    votes: list[Vote]
    pair_digest: int
    """Of the prompt and of what is learned as its answer."""
    conversation_id: str
    correction: str | None = None


class Label(msgspec.Struct, frozen=True):
    """What the votes on a row come to."""

    desirable: bool
    weight: float
    """Mean weight of the votes that agree with the label."""
    rater: str | None
    """Who of those that agree voted last; None where nobody is named."""
    hlc: int
    """Stamp of that vote."""
    raters: list[str]
    """Everybody named whose vote counted, for or against."""


class _Cast(msgspec.Struct, gc=False):
    """A vote as the example has it: checked by the contract when it was joined."""

    rater: str
    value: str
    weight: float
    source: str
    hlc: int
    correction: str | None = None


_decode_votes = msgspec.json.Decoder(list[_Cast]).decode


def to_rows(example: Example, settings: SnapshotSettings) -> list[Row | str]:
    """The served answer and the raters' corrections, each as a row or the name of the step that drops it."""
    cast, content = _decode_votes(example.votes_json), decode_content(example.content)
    rows = [_served(example, content, cast, settings)]
    known = None if isinstance(rows[0], str) else content.answer
    for vote in cast:
        if vote.correction is not None and vote.correction.encode() != known:
            rows.append(_corrected(example, content, vote, vote.correction, settings))
    return rows


def _served(example: Example, content: Content, cast: list[_Cast], settings: SnapshotSettings) -> Row | str:
    response_id = example.response_id
    example_id = f"{response_id}/{example.choice_index}"
    votes = []
    for vote in cast:  # a comprehension would be a function of its own, called for each example
        if vote.weight > 0:
            votes.append(_vote(vote, example_id, vote.value == "up"))
    if not votes:
        return "unlabelled"
    if content.unfit is not None:
        return content.unfit
    tokens = content.tokens
    if tokens is None:
        if not settings.allow_untokenized:
            return "untokenized"
        if not (content.prompt_is_text and content.answer_is_text):
            return "untemplated"
    elif settings.max_tokens is not None and tokens > settings.max_tokens:
        return "too_long"
    # Without a conversation an example is one of its own.
    return Row(example, content, example_id, votes, content.pair_digest, example.conversation_id or response_id)


def _corrected(
    example: Example, content: Content, vote: _Cast, correction: str, settings: SnapshotSettings
) -> Row | str:
    """One rater's correction: nobody sampled it, so it has no token ids; desirable, whatever the rater thinks of the
    answer that it corrects.
    """
    if not vote.weight > 0:
        return "unlabelled"
    if not correction.strip():
        return "empty"
    if not settings.allow_untokenized:
        return "untokenized"
    if not content.prompt_is_text:
        return "untemplated"
    response_id = example.response_id
    example_id = f"{response_id}/{example.choice_index}/correction/{vote.rater}"
    digest, votes = pair_digest(content.messages, correction), [_vote(vote, example_id, True)]
    return Row(example, content, example_id, votes, digest, example.conversation_id or response_id, correction)


def _vote(vote: _Cast, example_id: str, up: bool) -> Vote:
    who = vote.rater
    return Vote(who or example_id, who != "", up, vote.weight, vote.hlc, vote.source not in IMPLICIT_SOURCES)


def settle(votes: Sequence[Vote], rule: Literal["drop", "majority"]) -> Label | None:
    """The label that votes come to, the last one of each rater counting, and a thumb
    before what was only concluded; None where they do not come to one.

    A tie is never a label. Weights decide the majority: a vote of weight 0.2 is a fifth of a vote.
    """
    if len(votes) == 1 and votes[0].weight > 0:  # as nearly always; the same as below, sooner
        (vote,) = votes
        named = [vote.who] if vote.named else []
        return Label(vote.up, vote.weight, vote.who if vote.named else None, vote.hlc, named)
    last: dict[str, Vote] = {}
    for vote in votes:
        known = last.get(vote.who)
        # At one stamp a down-vote wins, so that the order of arrival does not decide.
        if known is None or (vote.thumb, vote.hlc, not vote.up) > (known.thumb, known.hlc, not known.up):
            last[vote.who] = vote
    standing = sorted(last.values(), key=lambda vote: (vote.hlc, vote.who))
    up = sum(vote.weight for vote in standing if vote.up)
    down = sum(vote.weight for vote in standing if not vote.up)
    if up == down or (rule == "drop" and up > 0 and down > 0):
        return None
    agreeing = [vote for vote in standing if vote.up == (up > down)]
    named = [vote.who for vote in agreeing if vote.named]
    return Label(
        desirable=up > down,
        weight=sum(vote.weight for vote in agreeing) / len(agreeing),
        rater=named[-1] if named else None,
        raters=sorted(vote.who for vote in standing if vote.named),
        hlc=agreeing[-1].hlc,
    )


def newest_within(
    group: npt.NDArray[np.uint64], hlc: npt.NDArray[np.int64], limit: int | None
) -> npt.NDArray[np.bool_]:
    """Which rows are among the `limit` newest of their group: [n], [n] -> [n]. Group 0 has no limit.

    Among equals the earlier row stays, so rows must come in a canonical order.
    """
    keep = np.ones(len(group), bool)
    if limit is None:
        return keep
    rows = find_frequent(group, limit)
    rows = rows[group[rows] > 0]
    rows = rows[np.lexsort((-hlc[rows], group[rows]))]
    keep[rows] = np.arange(len(rows)) - run_starts(group[rows]) < limit
    return keep
