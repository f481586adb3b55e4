"""Who calls and for what: API keys, the raters' keyed hashes and the signed feedback tokens. Pure but for the clock.

A feedback token is `<payload>.<signature>`: base64url of `response_id|rater|expiry_s`, and of its HMAC-SHA256. A
browser may hold it: it only permits a vote on that response, as that rater, until it expires.
"""

from __future__ import annotations

import hmac
from base64 import b64decode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from typing import NamedTuple

_EXPECTED = "send X-Thumbwheel-Feedback-Token as it came with the response"


class Claim(NamedTuple):
    """What a token permits: votes on a response, as a rater (its keyed hash, or empty)."""

    response_id: str
    rater: str


def is_key_known(keys: Iterable[bytes], authorization: str | None) -> bool:
    """Whether `Authorization: Bearer <key>`, or `Basic` with it as the password, holds a known key; takes as long for a
    wrong one as for the right one.
    """
    given = presented_key(authorization or "")
    known = False
    for key in keys:
        known |= hmac.compare_digest(key, given)
    return known


def presented_key(authorization: str) -> bytes:
    """The key in the header; empty where there is none. The user's name of `Basic` says nothing."""
    scheme, _, value = authorization.partition(" ")
    if scheme == "Bearer":
        return value.encode(errors="surrogateescape")  # as aiohttp decodes headers
    try:
        return b64decode(value, validate=True).partition(b":")[2] if scheme.lower() == "basic" else b""
    except ValueError:  # not Base64
        return b""


class TokenSigner:
    """Makes and checks feedback tokens with one secret."""

    def __init__(self, secret: bytes) -> None:
        self._keyed = hmac.new(secret, digestmod="sha256")

    def sign(self, claim: Claim, expiry_s: int) -> str:
        """A token for the claim; `expiry_s` is Unix time."""
        payload = f"{claim.response_id}|{claim.rater}|{expiry_s}".encode()
        return f"{_encode(payload)}.{_encode(self._signature(payload))}"

    def verify(self, token: str, now_s: float) -> Claim:
        """What the token permits. Raises ValueError, which says whether it is malformed, forged or expired."""
        payload_text, _, signature_text = token.partition(".")
        try:
            payload, signature = _decode(payload_text), _decode(signature_text)
            response_id, rater, expiry_s = payload.decode().split("|")
        except ValueError as exc:
            raise ValueError(f"the feedback token is malformed; {_EXPECTED}") from exc
        if not hmac.compare_digest(self._signature(payload), signature):
            raise ValueError(f"the feedback token's signature is wrong; {_EXPECTED}")
        if now_s >= int(expiry_s):
            raise ValueError(f"the feedback token expired at {expiry_s} (Unix time)")
        return Claim(response_id, rater)

    def _signature(self, payload: bytes) -> bytes:
        # A copy of the keyed state: `hmac.digest` would give the interpreter's lock away for these few bytes.
        keyed = self._keyed.copy()
        keyed.update(payload)
        return keyed.digest()


def _encode(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))
