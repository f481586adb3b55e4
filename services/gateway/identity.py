"""Who calls and for what: API keys and the signed feedback tokens. Pure.

A feedback token is `<payload>.<signature>`: base64url of `response_id|rater|expiry_s`, and of its HMAC-SHA256. A
browser may hold it: it only permits a vote on that response, as that rater, until it expires.
"""

from __future__ import annotations

import hmac
import ipaddress
from base64 import b64decode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from loop.keys import ID_CHARS, SCOPES, ApiKey, digest_of

FEEDBACK_TOKEN = "X-Thumbwheel-Feedback-Token"
"""The header that it comes and goes in."""

_EXPECTED = f"send {FEEDBACK_TOKEN} as it came with the response"


class Claim(NamedTuple):
    """What a token permits: votes on a response, as a rater (its keyed hash, or empty)."""

    response_id: str
    rater: str


class Caller(NamedTuple):
    """Who presents a key, and what that key permits."""

    key_id: str
    scopes: frozenset[str]


_EVERYTHING = frozenset[str](SCOPES)
ANYBODY = Caller("", _EVERYTHING)
"""Who calls where there never was a key."""


class KeyRing:
    """The keys that are taken: those of the settings, which permit everything, and those of the store."""

    def __init__(self, configured: Iterable[str], *, is_local: bool) -> None:
        """`is_local`: nobody but this machine can call, so that no key is asked for as long as there never was one."""
        digests = map(digest_of, configured)
        self._configured = {digest: Caller(digest[:ID_CHARS], _EVERYTHING) for digest in digests}
        self._callers = self._configured
        self.is_local = is_local
        self._stored: Sequence[ApiKey] | None = None

    def learn(self, stored: Sequence[ApiKey]) -> None:
        """The store's keys as they are now, the revoked ones among them."""
        valid = {key.digest: Caller(key.key_id, frozenset(key.scopes)) for key in stored if key.revoked_at_ms is None}
        self._callers = valid | self._configured
        self._stored = stored

    @property
    def is_known(self) -> bool:
        """Whether the store's keys were ever learnt."""
        return self._stored is not None

    @property
    def has_any(self) -> bool:
        """Whether there is a key, or was one: taking the last one back must not open the gateway."""
        return bool(self._configured or self._stored)

    def find(self, authorization: str | None) -> Caller | None:
        """Who sends `Authorization: Bearer <key>`, or `Basic` with it as the password."""
        if self.is_local and self.is_known and not self.has_any:
            return ANYBODY
        key = presented_key(authorization or "")
        return self._callers.get(digest_of(key)) if key else None


def presented_key(authorization: str) -> str:
    """The key in the header; empty where there is none. The user's name of `Basic` says nothing."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value
    try:
        return b64decode(value, validate=True).decode().partition(":")[2] if scheme.lower() == "basic" else ""
    except ValueError:  # not Base64, or not text
        return ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class TokenSigner:
    """Makes feedback tokens with one secret; checks them with it and with those that it has replaced."""

    def __init__(self, secret: bytes, previous: Iterable[bytes] = ()) -> None:
        self._keyed, *self._previous = (hmac.new(one, digestmod="sha256") for one in (secret, *previous))

    def sign(self, claim: Claim, expiry_s: int) -> str:
        """A token for the claim; `expiry_s` is Unix time."""
        payload = f"{claim.response_id}|{claim.rater}|{expiry_s}".encode()
        return f"{_encode(payload)}.{_encode(_signature(self._keyed, payload))}"

    def verify(self, token: str, now_s: float) -> Claim:
        """What the token permits. Raises ValueError, which says whether it is malformed, forged or expired."""
        payload_text, _, signature_text = token.partition(".")
        try:
            payload, signature = _decode(payload_text), _decode(signature_text)
            response_id, rater, expiry_s = payload.decode().split("|")
        except ValueError as exc:
            raise ValueError(f"the feedback token is malformed; {_EXPECTED}") from exc
        keyed = (self._keyed, *self._previous)
        if not any(hmac.compare_digest(_signature(one, payload), signature) for one in keyed):
            raise ValueError(f"the feedback token's signature is wrong; {_EXPECTED}")
        if now_s >= int(expiry_s):
            expired_at = datetime.fromtimestamp(int(expiry_s), UTC).isoformat(" ")
            raise ValueError(f"the feedback token expired at {expired_at}")
        return Claim(response_id, rater)


def _signature(keyed: hmac.HMAC, payload: bytes) -> bytes:
    # A copy of the keyed state: `hmac.digest` would give the interpreter's lock away for these few bytes.
    keyed = keyed.copy()
    keyed.update(payload)
    return keyed.digest()


def _encode(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))
