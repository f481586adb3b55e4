"""The handlers of the OpenAI API: who answers which request. How the answer goes on is `relay.py`'s."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from loop import metrics
from loop.events import key_of_message_id, random_key, uuid7
from loop.rollout.routing import Arm, Route, adapter_name, pick_arm
from services.gateway.answers import Rename
from services.gateway.asks import Endpoint, read_ask, read_fields, read_model, read_trace
from services.gateway.capture import Exchange
from services.gateway.connection import GarbageError
from services.gateway.engines import AdapterLostError, read_models
from services.gateway.errors import Refusal, read_body
from services.gateway.identity import Caller
from services.gateway.parts import PARTS, Parts
from services.gateway.regenerate import SOURCE, prompt_key
from services.gateway.relay import Relay, relayed_headers

_ID_PREFIX: dict[Endpoint, str] = {"chat": "chatcmpl", "completions": "cmpl"}
_requests = functools.cache(lambda *labels: metrics.gateway_requests.labels(*labels).inc)
_request_seconds = functools.cache(lambda *labels: metrics.gateway_request_seconds.labels(*labels).observe)
NO_RESPONSES = (
    "/v1/responses is not served here: its answers build on earlier ones that only the engine keeps, so what the model "
    "was given could not be logged; use /v1/chat/completions, which has tools, reasoning and streaming as well"
)
_PATH: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions"""
    return await _admitted(request, "chat")


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions"""
    return await _admitted(request, "completions")


async def models(request: web.Request) -> web.Response:
    """GET /v1/models: the alias, described as the engine describes its base model."""
    parts = request.app[PARTS]
    await parts.check_key(request, "chat")
    with parts.admitted("other"), await parts.engines.get("/v1/models") as answer:
        status, body = answer.status, answer.first
    if status != 200:
        return web.Response(body=body, status=status, content_type="application/json")
    try:
        listed = read_models(body)
    except GarbageError as exc:
        raise Refusal(502, f"the engine failed: {exc}", code="engine_failed") from exc
    base = next((entry for entry in listed if entry.get("id") == parts.base_name), {})
    entry = {**base, "id": parts.alias, "object": "model", "owned_by": "thumbwheel", "root": parts.alias}
    return web.Response(body=msgspec.json.encode({"object": "list", "data": [entry]}), content_type="application/json")


async def pass_through(request: web.Request) -> web.StreamResponse:
    """Embeddings, tokenise, detokenise: the alias becomes the live adapter, nothing is logged."""
    parts = request.app[PARTS]
    caller = await parts.check_key(request, "chat")
    with parts.admitted("other") as hold:
        fields = read_fields(await read_body(request, parts.gateway.max_body_bytes, hold))
        shown = read_model(fields)
        await parts.routes.is_known.wait()

        async def attempt(route: Route) -> web.StreamResponse:
            adapter = choose_arm(route, shown, "", caller, parts).adapter
            fields["model"] = msgspec.Raw(msgspec.json.encode(adapter))
            sent = msgspec.json.encode(fields)
            with await parts.engines.post(request.path, sent, read_trace(request.headers), adapter) as answer:
                body = Rename(adapter, shown or parts.alias, strip_token_ids=False).answer(answer.first)
                return web.Response(body=body, status=answer.status, headers=relayed_headers(answer))

        return await _on_route(parts, attempt)


async def not_served(request: web.Request) -> web.Response:
    """Everything else, the engine's admin routes among it, stays unreachable."""
    served = [(await resource.resolve(request))[1] for resource in request.app.router.resources()]
    methods = set[str]().union(*served) - {"*", "OPTIONS"}  # which every path has
    if methods:
        allowed = ", ".join(sorted(methods))
        message = f"{request.path} takes {allowed}, not {request.method[:20]}"
        raise Refusal(405, message, code="method_not_allowed", headers={"Allow": allowed})
    if request.path.startswith("/v1/responses"):
        raise Refusal(404, NO_RESPONSES, code="unknown_url")
    raise Refusal(404, f"{request.method} {request.path[:120]} is not served here", code="unknown_url")


def choose_arm(route: Route, model: str | None, subject: str, caller: Caller, parts: Parts) -> Arm:
    """Who answers: the alias goes by the subject's hash; the base or a version that the route names may be asked for
    by name, outside of the arms, with the scope admin. Raises Refusal 403, 404.
    """
    if model is None or model == parts.alias:
        return pick_arm(route, subject, parts.base_name)
    versions = {adapter_name(route.alias, version) for version in (route.live, route.canary) if version is not None}
    if model == parts.base_name or model in versions:
        parts.check_scope(caller, "admin")
        return Arm("direct", model)  # type: ignore[arg-type]  # logged, but no share of the traffic
    raise Refusal(
        404,
        f"the model {model[:120]!r} does not exist; expected {parts.alias!r}",
        param="model",
        code="model_not_found",
    )


async def _admitted(request: web.Request, endpoint: Endpoint) -> web.StreamResponse:
    parts = request.app[PARTS]
    caller = await parts.check_key(request, "chat")
    with parts.admitted(endpoint) as hold:
        return await _generate(request, hold, endpoint, caller, parts)


async def _generate(
    request: web.Request, hold: Callable[[int], None], endpoint: Endpoint, caller: Caller, parts: Parts
) -> web.StreamResponse:
    started_at_ms, started_s = int(time.time() * 1000), time.monotonic()
    body = await read_body(request, parts.gateway.max_body_bytes, hold)
    ask = read_ask(endpoint, request.headers, body, parts.rater_salt)
    parts.limit_rater(ask.rater or "")
    key = key_of_message_id(ask.message_id) if ask.message_id else random_key(parts.random.take)
    uuid = uuid7(started_at_ms, parts.random.take, version=8 if ask.choices > 1 else 7)
    response_id = f"{_ID_PREFIX[endpoint]}-{key}-{uuid}"
    exchange = Exchange(ask, response_id, key, ask.model or parts.alias, started_at_ms, started_s)
    if SOURCE in parts.implicit_weights:
        exchange.prompt_key = prompt_key(ask)
    if not parts.routes.is_known.is_set():
        await parts.routes.is_known.wait()
    status = 499  # what nginx calls a client that has left
    try:
        response = await _ask_engine(request, exchange, caller, parts)
        status = response.status
        return response
    except web.HTTPException as exc:
        status = exc.status
        raise
    finally:
        parts.tally.add(_requests(endpoint, exchange.arm, status))
        parts.tally.add(_request_seconds(endpoint, exchange.arm), time.monotonic() - started_s)


async def _ask_engine(request: web.Request, exchange: Exchange, caller: Caller, parts: Parts) -> web.StreamResponse:
    """Send and relay."""
    ask = exchange.ask
    # vLLM makes the response's id of this header, so that no body is rewritten for it.
    headers = {"X-Request-Id": exchange.response_id.partition("-")[2], **read_trace(request.headers)}
    relay = Relay(request, exchange, parts)

    async def attempt(route: Route) -> web.StreamResponse:
        subject = "" if route.canary is None else ask.conversation_id  # else there is nothing to choose
        arm = choose_arm(route, ask.model, subject, caller, parts)
        exchange.serve_by(arm, route.generation)
        body = ask.upstream_body(arm.adapter)
        with await parts.engines.post(_PATH[ask.endpoint], body, headers, arm.adapter, relay.prepare) as answer:
            return await relay.send(answer)

    return await _on_route(parts, attempt)


async def _on_route(parts: Parts, attempt: Callable[[Route], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """The attempt's answer; where no engine has the route's adapter, the route is read again, and tried once more."""
    try:
        with parts.routes.use() as route:
            return await attempt(route)
    except AdapterLostError:
        metrics.gateway_route_retries.inc()
        await parts.routes.refresh()
    with parts.routes.use() as route:
        return await attempt(route)
