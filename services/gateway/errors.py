"""Refusals in the form that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import msgspec
from aiohttp import web

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


async def read_body(request: web.Request, max_bytes: int) -> bytes:
    """The request's body. Raises Refusal 413 above `max_bytes`."""
    if (request.content_length or 0) <= max_bytes:
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            body = None
        if body is not None and len(body) <= max_bytes:
            return body
    raise Refusal(413, f"the body is larger than {max_bytes} bytes, which is the most that is taken here")
