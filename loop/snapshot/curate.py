"""Which examples are fit to learn from, and with what label. Pure; every step has a name, which is counted under."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from loop.events import IMPLICIT_SOURCES, ResponseLogged
from loop.settings import SnapshotSettings
from loop.snapshot.prompts import message_text

if TYPE_CHECKING:
    from loop.store.examples import Example

# In the order in which they are applied; the first seven look at one example alone.
STEPS = {
    "unlabelled": "no vote stands on it, or only votes of no weight",
    "aborted": "the client left, or the engine failed, before the answer was whole",
    "truncated": "the answer ran into the token limit: its missing end is nobody's choice",
    "empty": "neither text nor tokens to learn from",
    "untokenized": "served token ids are not known and snapshot.allow_untokenized is off",
    "untemplated": "served token ids are not known and the messages are more than text (tool calls, images)",
    "too_long": "longer than snapshot.max_tokens",
    "exact_duplicates": "the same prompt and answer again: one row is left, with the votes on all of them",
    "disagreement": "votes tie, or (snapshot.disagreement = drop) are not unanimous",
    "max_per_rater": "more training rows of one rater than snapshot.max_per_rater; the newest stay",
    "max_per_prompt": "more training rows of one exact prompt than snapshot.max_per_prompt; the newest stay",
}


class Vote(msgspec.Struct, frozen=True, array_like=True):
    """One rater's standing vote. `who` tells raters apart; it is the rater's hash where the vote is `named`."""

    who: str
    named: bool
    up: bool
    weight: float
    hlc: int
    thumb: bool = True
    """Whether the rater said it himself: then it goes before what was concluded from what he did."""


class Row(msgspec.Struct, frozen=True, array_like=True):
    """An example that passed the steps which look at it alone."""

    example_id: str
    messages: list[tuple[str, str]]
    """The prompt as (role, text)."""
    answer: str
    prompt_ids: list[int] | None
    completion_ids: list[int] | None
    votes: list[Vote]
    conversation_id: str
    adapter: str


@dataclass(frozen=True)
class Label:
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


def to_rows(example: Example, settings: SnapshotSettings) -> Iterator[Row | str]:
    """The served answer and the raters' corrections, each as a row or the name of the step that drops it."""
    served = _served(example, settings)
    yield served
    known = None if isinstance(served, str) else served.answer
    for vote in example.votes:
        if vote.get("correction") not in (None, known):
            yield _corrected(example, vote, settings)


def _served(example: Example, settings: SnapshotSettings) -> Row | str:
    body, example_id = example.body, f"{example.response_id}/{example.choice_index}"
    choice = next((c for c in body.choices if c.index == example.choice_index), None)
    votes = [_vote(vote, example_id, is_up=vote["value"] == "up") for vote in example.votes if vote["weight"] > 0]
    if not votes:
        return "unlabelled"
    if body.aborted or (choice is not None and choice.finish_reason in ("abort", "error")):
        return "aborted"
    if choice is not None and choice.finish_reason == "length":
        return "truncated"
    answer = None if choice is None else message_text(choice.message.get("content"))
    if choice is None or not (answer or choice.token_ids):
        return "empty"
    served = bool(body.prompt_token_ids and choice.token_ids)
    if not served and not settings.allow_untokenized:
        return "untokenized"
    prompt = _prompt(body)
    if not served and not all(map(_is_text, [*prompt, choice.message])):
        return "untemplated"
    tokens = len(body.prompt_token_ids or ()) + len(choice.token_ids or ()) if served else 0
    if settings.max_tokens is not None and tokens > settings.max_tokens:
        return "too_long"
    return Row(
        example_id=example_id,
        messages=_texts(prompt),
        answer=answer or "",
        prompt_ids=body.prompt_token_ids if served else None,
        completion_ids=choice.token_ids if served else None,
        votes=votes,
        # Without a conversation an example is one of its own.
        conversation_id=example.conversation_id or example.response_id,
        adapter=example.adapter,
    )


def _corrected(example: Example, vote: dict[str, Any], settings: SnapshotSettings) -> Row | str:
    """One rater's correction: nobody sampled it, so it has no token ids; desirable, whatever the rater thinks of the
    answer that it corrects.
    """
    body, text = example.body, vote["correction"]
    if not vote["weight"] > 0:
        return "unlabelled"
    if not text.strip():
        return "empty"
    if not settings.allow_untokenized:
        return "untokenized"
    prompt = _prompt(body)
    if (body.messages is None and body.prompt is None) or not all(map(_is_text, prompt)):
        return "untemplated"
    example_id = f"{example.response_id}/{example.choice_index}/correction/{vote['rater']}"
    return Row(
        example_id=example_id,
        messages=_texts(prompt),
        answer=text,
        prompt_ids=None,
        completion_ids=None,
        votes=[_vote(vote, example_id, is_up=True)],
        conversation_id=example.conversation_id or example.response_id,
        adapter=example.adapter,
    )


def _vote(vote: dict[str, Any], example_id: str, *, is_up: bool) -> Vote:
    who, is_thumb = vote["rater"], vote["source"] not in IMPLICIT_SOURCES
    return Vote(who or example_id, bool(who), is_up, float(vote["weight"]), int(vote["hlc"]), is_thumb)


def _prompt(body: ResponseLogged) -> list[dict[str, Any]]:
    return body.messages if body.messages is not None else [{"role": "user", "content": body.prompt or ""}]


def _texts(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(str(m.get("role", "user")), message_text(m.get("content")) or "") for m in messages]


def _is_text(message: dict[str, Any]) -> bool:
    return message_text(message.get("content")) is not None and not message.get("tool_calls")


def settle(votes: Iterable[Vote], rule: Literal["drop", "majority"]) -> Label | None:
    """The label that votes come to, the last one of each rater counting, and a thumb
    before what was only concluded; None where they do not come to one.

    A tie is never a label. Weights decide the majority: a vote of weight 0.2 is a fifth of a vote.
    """
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
    if limit is None:
        return np.ones(len(group), bool)
    order = np.lexsort((-hlc, group))
    grouped = group[order]
    at = np.arange(len(group))
    first = (
        np.maximum.accumulate(np.where(np.concatenate([[True], grouped[1:] != grouped[:-1]]), at, 0)) if len(at) else at
    )
    keep = np.empty(len(group), bool)
    keep[order] = (at - first < limit) | (grouped == 0)
    return keep
