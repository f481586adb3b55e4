"""API keys: what a caller may do, how a key is made and how it is known again. Pure but for the random bits.

Only a key's SHA-256 is kept. A key is 256 random bits, so nobody guesses his way back from it and a slow hash, which is
for passwords, would buy nothing; and a key that is looked up by its hash tells nothing by the time that it takes.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Literal, get_args

Scope = Literal["chat", "feedback", "admin"]
# chat: the OpenAI API | feedback: votes for any rater, and tokens
# admin: models by name, outside of the arms, and the operator pages
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "tw-"  # so that a scanner for leaked secrets can find one
ID_CHARS = 12


@dataclass(frozen=True)
class ApiKey:
    """What is kept of a key. A revoked one stays, so that its last use can be told from a key that never was."""

    key_id: str
    """The first hex digits of `digest`, to speak of the key by."""
    name: str
    """Whose it is; during a rotation two keys have one name."""
    scopes: tuple[Scope, ...]
    digest: str
    created_at_ms: int
    revoked_at_ms: int | None = None


def new_key(name: str, scopes: tuple[Scope, ...], now_ms: int) -> tuple[ApiKey, str]:
    """A new key, and its text, which is nowhere else."""
    text = PREFIX + secrets.token_urlsafe(32)
    digest = digest_of(text)
    return ApiKey(digest[:ID_CHARS], name, scopes, digest, now_ms), text


def read_scopes(text: str) -> tuple[Scope, ...]:
    """Comma-separated scopes. Raises ValueError."""
    names = text.split(",")
    if unknown := set(names) - set(SCOPES):
        raise ValueError(
            f"scopes {text!r}: {', '.join(sorted(unknown))!r} is none; expected some of {', '.join(SCOPES)}"
        )
    return tuple(scope for scope in SCOPES if scope in names)


def digest_of(key: str) -> str:
    """What a key's text is known by."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
