"""What is erased for good, and what that covers: pure. Tombstones are rows (kind, subject) that stay for ever:

- `rater`, a keyed hash: the votes that this person has given.
- `user`, a keyed hash: those votes, and every response that this person asked for.
- `response`, a response_id: the response and the votes on it.
- `message`, a key: the votes by the app's message id under which an erased response was the one that was meant.

The last two also follow from a `user`: so a vote on an erased response stays out, though nothing in it names the user.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from loop.events import EventError, decode_feedback, decode_response
from loop.join import Vote, read_vote

Kind = Literal["rater", "user", "response", "message"]


@dataclass(frozen=True)
class Erased:
    """Tombstones, by kind."""

    raters: frozenset[str] = frozenset()
    users: frozenset[str] = frozenset()
    responses: frozenset[str] = frozenset()
    messages: frozenset[str] = frozenset()

    @classmethod
    def of(cls, rows: Iterable[tuple[str, str]]) -> Erased:
        """From rows (kind, subject)."""
        found: dict[str, set[str]] = {"rater": set(), "user": set(), "response": set(), "message": set()}
        for kind, subject in rows:
            found[kind].add(subject)
        return cls(*(frozenset(found[kind]) for kind in ("rater", "user", "response", "message")))

    def has_response(self, response_id: str, rater: str | None) -> bool:
        """Whether the response is erased; `rater` asked for it."""
        return response_id in self.responses or rater in self.users

    def has_vote(self, vote: Vote) -> bool:
        """Whether the vote is erased."""
        by_message = vote.message_id is not None and vote.key in self.messages
        return by_message or vote.response_id in self.responses or self.has_voter(vote.rater)

    def has_voter(self, rater: str) -> bool:
        """Whether this rater's votes are erased."""
        return rater in self.raters or rater in self.users

    def is_in(self, value: bytes) -> bool:
        """Whether bytes that nobody can decode name an erased person or response."""
        named = (*self.raters, *self.users, *self.responses)
        return any(subject.encode() in value for subject in named)

    def has_event(self, value: bytes) -> bool:
        """Whether a record of the log is erased."""
        try:
            data = decode_response(value).data
            return self.has_response(data.response_id, data.rater)
        except EventError:
            pass
        try:
            return self.has_vote(read_vote(decode_feedback(value)))
        except EventError:
            return self.is_in(value)
