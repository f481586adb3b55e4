"""Refusals in the form that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from aiohttp import web
from aiohttp.hdrs import CONTENT_ENCODING

_SMALL_BYTES = 64 * 1024  # of a body that is read at once
# What a decoder raises for bytes that are no JSON of ours; the last for what is nested too deep.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(web.HTTPException):
    """A request that is answered with an error; raised by handlers, turned into the response by aiohttp."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int = 0,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status_code = status
        kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
        self.error = {"message": message, "type": kind, "param": param, "code": code}
        super().__init__(
            text=msgspec.json.encode({"error": self.error}).decode(),
            content_type="application/json",
            headers={"Retry-After": str(retry_after_s)} if retry_after_s else headers,
        )


async def read_body(request: web.Request, max_bytes: int, hold: Callable[[int], None] = lambda _: None) -> bytes:
    """The request's body; `hold` is told of its bytes as they come, and may raise. Raises Refusal 413 above
    `max_bytes`, and 400 where it is not encoded as it says.
    """
    length = request.content_length
    if (length or 0) <= max_bytes:
        try:
            if length is not None and length <= _SMALL_BYTES and CONTENT_ENCODING not in request.headers:
                small = await request.read()
                hold(len(small))
                return small
            body = bytearray()  # how large it is turns out
            async for block in request.content.iter_any():
                hold(len(block))
                body += block
                if len(body) > max_bytes:
                    break
            else:
                return bytes(body)
        except web.RequestPayloadError as exc:
            refusal = Refusal(400, "the body is not what its Content-Encoding says", code="invalid_body")
            refusal.force_close()  # nor can be read what comes behind it
            raise refusal from exc
    raise Refusal(413, f"the body is larger than {max_bytes} bytes, which is the most that is taken here")
