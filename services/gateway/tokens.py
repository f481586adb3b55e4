"""POST /v1/feedback/tokens: the app's server makes a token with which a browser may vote as one rater on a response."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from loop.events import hash_rater, key_of_response_id
from services.gateway.errors import UNREADABLE, Refusal, read_body
from services.gateway.feedback import MAX_BYTES, Id, answer
from services.gateway.identity import Claim
from services.gateway.parts import HOLD, PARTS


class TokenAsk(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body, as the app's server sends it."""

    response_id: Id
    rater: Id | None = None
    """Who may vote with it; without one, the response's one anonymous rater."""
    ttl_s: Annotated[float, Meta(ge=1, multiple_of=1)] | None = None  # in JSON 1.0 is an integer
    """Seconds for which it is good, at most gateway.token_ttl_s, which is also the default."""


_ask = msgspec.json.Decoder(TokenAsk)


async def make_token(request: web.Request) -> web.Response:
    """POST /v1/feedback/tokens"""
    parts = request.app[PARTS]
    await parts.check_key(request, "feedback")
    body = await read_body(request, MAX_BYTES, request[HOLD])
    try:
        ask = _ask.decode(body)
        key_of_response_id(ask.response_id)
    except (ValueError, *UNREADABLE) as exc:
        raise Refusal(422, f"no token can be made: {exc}", code="invalid_token_request") from exc
    longest_s = parts.gateway.token_ttl_s
    expires_at = int(time.time()) + int(min(ask.ttl_s or longest_s, longest_s))
    claim = Claim(ask.response_id, hash_rater(parts.rater_salt, ask.rater or ""))
    token = parts.signer.sign(claim, expires_at)
    return answer(200, {"token": token, "response_id": ask.response_id, "expires_at": expires_at})
