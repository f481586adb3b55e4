"""The playground: chat with the alias as any app would, through the gateway, and vote. The console only passes on, so
that the browser needs neither the gateway's address nor its key.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import aiohttp
import msgspec
from aiohttp import web
from msgspec import Meta

from services.console.parts import GATEWAY, SETTINGS, render

T = TypeVar("T")
PASSED_ON = ("Content-Type", "X-Thumbwheel-Response-Id", "X-Thumbwheel-Feedback-Token")


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str


class Chat(msgspec.Struct, forbid_unknown_fields=True):
    """What the page sends for an answer."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    conversation_id: Annotated[str, Meta(max_length=64, pattern=r"^[\w-]+$")]
    rater: Annotated[str, Meta(max_length=64, pattern=r"^[\w-]+$")]
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    max_tokens: Annotated[int, Meta(ge=1, le=32_768)] = 256


class Thumb(msgspec.Struct, forbid_unknown_fields=True):
    """What the page sends for a vote."""

    value: Literal["up", "down", "retract"]
    token: str


async def page(request: web.Request) -> web.Response:
    """GET /playground"""
    return render(request, "playground.html")


async def chat(request: web.Request) -> web.StreamResponse:
    """POST /playground/chat: the gateway's event stream, as it comes."""
    asked = await _read(request, Chat)
    body = {
        "model": request.app[SETTINGS].engine.alias,
        "messages": msgspec.to_builtins(asked.messages),
        "stream": True,
        "user": asked.rater,
        "temperature": asked.temperature,
        "max_tokens": asked.max_tokens,
    }
    headers = {"X-Thumbwheel-Conversation-Id": asked.conversation_id}
    return await _pass_on(request, "v1/chat/completions", body, headers)


async def feedback(request: web.Request) -> web.StreamResponse:
    """POST /playground/feedback: a vote with the response's own token, as a browser app would give it."""
    thumb = await _read(request, Thumb)
    return await _pass_on(request, "v1/feedback", {"value": thumb.value, "token": thumb.token}, {})


async def _read(request: web.Request, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise web.HTTPBadRequest(text=f"the body is not valid: {exc}") from exc


async def _pass_on(
    request: web.Request, path: str, body: dict[str, object], headers: dict[str, str]
) -> web.StreamResponse:
    response = web.StreamResponse()
    try:
        async with request.app[GATEWAY].post(path, json=body, headers=headers) as upstream:
            response.set_status(upstream.status)
            response.headers.update({name: upstream.headers[name] for name in PASSED_ON if name in upstream.headers})
            await response.prepare(request)
            async for chunk in upstream.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
    except (aiohttp.ClientError, TimeoutError) as exc:
        if response.prepared:
            raise  # too late for a status: the connection ends, and the page sees that
        raise web.HTTPBadGateway(text=f"the gateway does not answer: {exc or type(exc).__name__}") from exc
    return response
