"""Which examples are fit to learn from, and with what label. Pure; every step has a name, which is counted under."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from loop.events import IMPLICIT_SOURCES
from loop.settings import SnapshotSettings
from loop.snapshot.prompts import message_text
from loop.snapshot.sorted_arrays import run_sizes, run_starts

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


class Vote(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One rater's standing vote. `who` tells raters apart; it is the rater's hash where the vote is `named`."""

    who: str
    named: bool
    up: bool
    weight: float
    hlc: int
    thumb: bool = True
    """Whether the rater said it himself: then it goes before what was concluded from what he did."""


class Row(msgspec.Struct, frozen=True):
    """An example that passed the steps which look at it alone."""

    example_id: str
    messages: tuple[tuple[str, str], ...]
    """The prompt as (role, text)."""
    answer: str
    prompt_ids: bytes | None
    """Decimal numbers with commas between them, as they were logged."""
    completion_ids: bytes | None
    votes: list[Vote]
    conversation_id: str
    adapter: str


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


# What curation reads of an event and of an example's votes. Both were checked by the contract when they were joined;
# token ids stay text, for a number of each would take longer than all the rest.


_NULL = msgspec.Raw(b"null")


class _Message(msgspec.Struct, gc=False):
    role: Any = "user"
    content: Any = None
    tool_calls: Any = None


class _Choice(msgspec.Struct, gc=False):
    message: _Message
    index: int = 0
    token_ids: msgspec.Raw = _NULL
    finish_reason: str | None = None


class _Response(msgspec.Struct, gc=False):
    choices: list[_Choice]
    messages: list[_Message] | None = None
    prompt: str | None = None
    prompt_token_ids: msgspec.Raw = _NULL
    aborted: bool = False


class _Event(msgspec.Struct, gc=False):
    data: _Response


class _Cast(msgspec.Struct, gc=False):
    rater: str
    value: str
    weight: float
    source: str
    hlc: int
    correction: str | None = None


_TO_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_TOO_LARGE = b"0" * 10
_decode_event = msgspec.json.Decoder(_Event).decode
_decode_votes = msgspec.json.Decoder(list[_Cast]).decode


def to_rows(example: Example, settings: SnapshotSettings) -> list[Row | str]:
    """The served answer and the raters' corrections, each as a row or the name of the step that drops it."""
    body, cast = _decode_event(example.event).data, _decode_votes(example.votes_json)
    served = _served(example, body, cast, settings)
    known = None if isinstance(served, str) else served.answer
    corrected = [
        _corrected(example, body, vote, vote.correction, settings)
        for vote in cast
        if vote.correction is not None and vote.correction != known
    ]
    return [served, *corrected]


def _served(example: Example, body: _Response, cast: list[_Cast], settings: SnapshotSettings) -> Row | str:
    example_id = f"{example.response_id}/{example.choice_index}"
    choice = body.choices[0] if body.choices else None
    if choice is not None and choice.index != example.choice_index:
        choice = next((c for c in body.choices if c.index == example.choice_index), None)
    votes = [_vote(vote, example_id, vote.value == "up") for vote in cast if vote.weight > 0]
    if not votes:
        return "unlabelled"
    if body.aborted or (choice is not None and choice.finish_reason in ("abort", "error")):
        return "aborted"
    if choice is not None and choice.finish_reason == "length":
        return "truncated"
    answer = None if choice is None else message_text(choice.message.content)
    completion_ids = None if choice is None else _ids(choice.token_ids)
    if choice is None or not (answer or completion_ids):
        return "empty"
    prompt_ids = _ids(body.prompt_token_ids)
    if prompt_ids is None or completion_ids is None:
        prompt_ids = completion_ids = None
        if not settings.allow_untokenized:
            return "untokenized"
    prompt = _prompt(body)
    if prompt_ids is None and not all(map(_is_text, [*prompt, choice.message])):
        return "untemplated"
    if settings.max_tokens is not None:
        tokens = sum(ids.count(b",") + 1 for ids in (prompt_ids, completion_ids) if ids is not None)
        if tokens > settings.max_tokens:
            return "too_long"
    return Row(
        example_id=example_id,
        messages=_texts(prompt),
        answer=answer or "",
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        votes=votes,
        # Without a conversation an example is one of its own.
        conversation_id=example.conversation_id or example.response_id,
        adapter=example.adapter,
    )


def _corrected(
    example: Example, body: _Response, vote: _Cast, correction: str, settings: SnapshotSettings
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
    prompt = _prompt(body)
    if (body.messages is None and body.prompt is None) or not all(map(_is_text, prompt)):
        return "untemplated"
    example_id = f"{example.response_id}/{example.choice_index}/correction/{vote.rater}"
    return Row(
        example_id=example_id,
        messages=_texts(prompt),
        answer=correction,
        prompt_ids=None,
        completion_ids=None,
        votes=[_vote(vote, example_id, True)],
        conversation_id=example.conversation_id or example.response_id,
        adapter=example.adapter,
    )


def _vote(vote: _Cast, example_id: str, up: bool) -> Vote:
    who = vote.rater
    return Vote(who or example_id, who != "", up, vote.weight, vote.hlc, vote.source not in IMPLICIT_SOURCES)


def _ids(raw: msgspec.Raw) -> bytes | None:
    """What is between the brackets of a list; None where there is no list, nothing in it, or what no vocabulary has."""
    text = b"" if raw == _NULL else bytes(raw).strip(b"[] \t\r\n")
    if b"-" in text or _TOO_LARGE in text.translate(_TO_ZEROS):
        return None
    return text or None


def _prompt(body: _Response) -> list[_Message]:
    return body.messages if body.messages is not None else [_Message(content=body.prompt or "")]


def _texts(messages: list[_Message]) -> tuple[tuple[str, str], ...]:
    return tuple([(str(message.role), message_text(message.content) or "") for message in messages])


def _is_text(message: _Message) -> bool:
    return message_text(message.content) is not None and not message.tool_calls


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
    order = np.argsort(group, kind="stable")
    # Only the rows of groups that are too large must be put in order.
    rows = order[(run_sizes(group[order]) > limit) & (group[order] > 0)]
    rows = rows[np.lexsort((-hlc[rows], group[rows]))]
    keep[rows] = np.arange(len(rows)) - run_starts(group[rows]) < limit
    return keep
