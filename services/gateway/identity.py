"""Who calls and for what: API keys, the raters' keyed hashes and the signed feedback tokens. Pure but for the clock.

A feedback token is `<payload>.<signature>`: base64url of `response_id|rater|expiry_s`, and of its HMAC-SHA256. A
browser may hold it: it only permits a vote on that response, as that rater, until it expires.
"""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from typing import NamedTuple

_HASH_HEX = 32  # 128 bits: no two raters meet by chance


class Claim(NamedTuple):
    """What a valid token permits."""

    response_id: str
    rater: str


def hash_rater(salt: bytes, rater: str) -> str:
    """The keyed hash under which a rater is stored; empty stays empty (the response's one anonymous rater)."""
    return hmac.digest(salt, rater.encode(), "sha256").hex()[:_HASH_HEX] if rater else ""


def is_key_known(keys: Iterable[bytes], authorization: str | None) -> bool:
    """Whether `Authorization: Bearer <key>` holds a known key; takes as long for a wrong one as for the right one."""
    given = (authorization or "").removeprefix("Bearer ").encode()
    known = False
    for key in keys:
        known |= hmac.compare_digest(key, given)
    return known


def sign_token(secret: bytes, response_id: str, rater: str, expiry_s: int) -> str:
    """A token for votes on the response; `expiry_s` is Unix time."""
    payload = f"{response_id}|{rater}|{expiry_s}".encode()
    return f"{_encode(payload)}.{_encode(hmac.digest(secret, payload, 'sha256'))}"


def verify_token(secret: bytes, token: str, now_s: float) -> Claim:
    """What the token permits. Raises ValueError, which says whether it is malformed, forged or expired."""
    payload_text, _, signature_text = token.partition(".")
    try:
        payload, signature = _decode(payload_text), _decode(signature_text)
        response_id, rater, expiry_s = payload.decode().split("|")
    except ValueError as exc:
        raise ValueError("the feedback token is malformed; send the X-Thumbwheel-Feedback-Token as it came") from exc
    if not hmac.compare_digest(hmac.digest(secret, payload, "sha256"), signature):
        raise ValueError("the feedback token's signature is wrong; send the X-Thumbwheel-Feedback-Token as it came")
    if now_s >= int(expiry_s):
        raise ValueError(f"the feedback token expired at {expiry_s} (Unix time)")
    return Claim(response_id, rater)


def _encode(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))
