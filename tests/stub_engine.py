"""An upstream that answers as vLLM 0.32 does, down to the fields and their order, without a model; and with faults.

`python -m tests.stub_engine PORT` serves it alone. The body's field `stub` steers it: `{"chunks": 50, "padding": 0,
"pace_s": 0.02, "fault": "reset" | "garbage" | "stall" | "no_done" | "error" | "500" | "slow"}`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from aiohttp import web

PROMPT_IDS = [2, 277, 3]
CREATED = 1_795_254_438
FINGERPRINT = "vllm-0.32.0-stub"
ADMIN_ROUTES = (
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/metrics", "/version", "/load", "/invocations"),
    *(
        "/scale_elastic_ep",
        "/generative_scoring",
        "/v1/responses",
        "/v1/messages",
        "/kv_event_sources",
    ),
)


class StubEngine:
    """What the stub knows and what it was asked; `left` counts requests whose client went away."""

    def __init__(self, models: set[str] | None = None) -> None:
        self.models = models or {"base"}
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.admin_calls = 0
        self.left = 0
        self.keeps_requests = True


ENGINE = web.AppKey("engine", StubEngine)


def create_stub(engine: StubEngine) -> web.Application:
    """The stub's application; serve it with `handler_cancellation=True`."""
    app = web.Application(client_max_size=1 << 30)
    app[ENGINE] = engine
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/health", health)
    app.router.add_post("/tokenize", tokenize)
    app.router.add_post("/v1/embeddings", embed)
    for path in ADMIN_ROUTES:
        app.router.add_route("*", path, admin)
    app.router.add_route("*", "/{path:.*}", not_found)
    return app


async def health(_: web.Request) -> web.Response:
    return web.Response()


async def admin(request: web.Request) -> web.Response:
    request.app[ENGINE].admin_calls += 1
    return web.Response(text="done")


async def not_found(_: web.Request) -> web.Response:
    return _error(404, "Not Found", "NotFoundError", None)


async def models(request: web.Request) -> web.Response:
    names = sorted(request.app[ENGINE].models)
    data = [{"id": n, "object": "model", "created": CREATED, "owned_by": "vllm", "root": n} for n in names]
    return web.json_response({"object": "list", "data": [entry | {"max_model_len": 512} for entry in data]})


async def tokenize(request: web.Request) -> web.Response:
    body = await request.json()
    request.app[ENGINE].requests.append(body)
    if body["model"] not in request.app[ENGINE].models:
        return _unknown(body["model"])
    return web.json_response({"count": 1, "max_model_len": 512, "tokens": [277], "token_strs": None})


async def embed(request: web.Request) -> web.Response:
    body = await request.json()
    request.app[ENGINE].requests.append(body)
    if not isinstance(body.get("input"), list):
        return _error(400, "Field required", "BadRequestError", "input")
    data = [{"object": "embedding", "index": at, "embedding": [0.5]} for at, _ in enumerate(body["input"])]
    answer = {"object": "list", "data": data, "model": body["model"]}
    return web.Response(text=json.dumps(answer, separators=(",", ":")), content_type="application/json")


async def complete(request: web.Request) -> web.StreamResponse:
    engine = request.app[ENGINE]
    try:
        body = json.loads(await request.read())
    except ValueError:
        return _error(400, "There was an error parsing the body", "Bad Request", None)
    if engine.keeps_requests:
        engine.requests.append(body)
        engine.headers.append(dict(request.headers))
    if body["model"] not in engine.models:
        return _unknown(body["model"])
    is_chat = request.path == "/v1/chat/completions"
    if is_chat and not isinstance(body.get("messages"), list):
        return _error(400, "'int' object is not iterable", "BadRequestError", None)
    fault = body.get("stub", {}).get("fault")
    if fault == "500":
        return _error(500, "EngineCore encountered an issue.", "InternalServerError", None)
    request_id = request.headers.get("X-Request-Id", uuid.uuid4().hex[:16])
    try:
        if fault == "slow" or (fault == "stall" and not body.get("stream")):
            await asyncio.sleep(3600)
        if body.get("stream"):
            return await _stream(request, body, request_id, is_chat, fault)
    except (asyncio.CancelledError, ConnectionError):
        engine.left += 1
        raise
    if fault == "reset":
        return _hang_up(request)
    if fault == "garbage":
        return web.Response(body=b'\x00not json{"model":', content_type="application/json")
    return web.Response(body=_whole(body, request_id, is_chat), content_type="application/json")


def _hang_up(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


def _unknown(model: str) -> web.Response:
    return _error(404, f"The model `{model}` does not exist. Valid aliases: base.", "NotFoundError", "model")


def _error(code: int, message: str, kind: str, param: str | None) -> web.Response:
    return web.json_response({"error": {"message": message, "type": kind, "param": param, "code": code}}, status=code)


async def _stream(
    request: web.Request, body: dict[str, Any], request_id: str, is_chat: bool, fault: str | None
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    pace_s = body.get("stub", {}).get("pace_s", 0)
    chunks = _chunks(json.dumps({key: body[key] for key in body if key not in ("messages", "prompt")}), is_chat)
    for at, chunk in enumerate(chunks):
        if (
            pace_s
        ):  # for each token, whether something can be said of it or not; its headers vLLM sends before the first
            await asyncio.sleep(pace_s)
        if chunk:
            await response.write(chunk.replace(b"$ID$", request_id.encode()))
        if at == 3 and fault == "reset":
            return _cut(request, response)
        if at == 3 and fault == "garbage":
            await response.write(b"data: {not json\n\n\xff\xfe")
        if at == 3 and fault == "stall":
            await asyncio.sleep(3600)
        if at == 3 and fault == "error":
            await response.write(
                b'data: {"error":{"message":"out of luck","type":"InternalServerError","code":500}}\n\n'
            )
            break
    if fault != "no_done":
        await response.write(b"data: [DONE]\n\n")
    return response


def _cut(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return response


def _logprob(word: str, is_chat: bool) -> dict[str, Any]:
    if is_chat:
        token = {"token": word, "logprob": -0.5, "bytes": list(word.encode()), "top_logprobs": []}
        return {"content": [token]}
    return {"text_offset": [0], "token_logprobs": [-0.5], "tokens": [word], "top_logprobs": [{word: -0.5}]}


def _words(body: dict[str, Any]) -> list[str]:
    stub = body.get("stub", {})
    return [f" word{n}" + "x" * stub.get("padding", 0) for n in range(stub.get("chunks", 8))]


@lru_cache(maxsize=256)
def _chunks(body_text: str, is_chat: bool) -> tuple[bytes, ...]:
    body = json.loads(body_text)
    return tuple(_dump(chunk, body, is_chat) for chunk in _chunk_bodies(body, is_chat))


def _dump(chunk: dict[str, Any] | None, body: dict[str, Any], is_chat: bool) -> bytes:
    if chunk is None:
        return b""
    prefix, kind = ("chatcmpl", "chat.completion.chunk") if is_chat else ("cmpl", "text_completion")
    head = {"id": f"{prefix}-$ID$", "object": kind, "created": CREATED, "model": body["model"]}
    text = json.dumps(head | chunk, separators=(",", ":"), ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def _chunk_bodies(body: dict[str, Any], is_chat: bool) -> Iterator[dict[str, Any] | None]:
    """The stream's chunks; None for a token that makes none."""
    with_ids = bool(body.get("return_token_ids"))
    n = int(body.get("n", 1))
    prompt_ids = PROMPT_IDS if with_ids else None
    if is_chat:
        for index in range(n):
            role = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
            first = {"prompt_token_ids": prompt_ids, "prompt_text": None}
            yield {"choices": [role | {"finish_reason": None}], **first}
    deltas = list(_deltas(body, is_chat))
    for at, (delta, word) in enumerate(deltas):
        is_last = at == len(deltas) - 1
        for index in range(n):
            if not delta and not with_ids and not is_last:
                yield None  # vLLM leaves a chunk without text out, but where token ids were asked for
                continue
            logprobs = _logprob(word, is_chat) if body.get("logprobs") and delta else None
            choice: dict[str, Any] = {"index": index, **({"delta": delta} if is_chat else delta), "logprobs": logprobs}
            choice["finish_reason"] = ("tool_calls" if body.get("tools") else "stop") if is_last else None
            if is_last or not is_chat:
                choice["stop_reason"] = None
            if not is_chat:
                choice["prompt_token_ids"] = prompt_ids if at == 0 else None
            choice["token_ids"] = [at + 10 * index] if with_ids else None
            yield {"choices": [choice]} | ({"system_fingerprint": FINGERPRINT} if is_last else {})
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {"choices": [], "usage": {"prompt_tokens": 3, "total_tokens": 11, "completion_tokens": 8}}


def _deltas(body: dict[str, Any], is_chat: bool) -> Iterator[tuple[dict[str, Any], str]]:
    if not is_chat:
        yield from (({"text": word}, word) for word in _words(body))
        return
    if body.get("tools"):
        call = {"id": "call-1", "type": "function", "index": 0, "function": {"name": "look_up", "arguments": ""}}
        yield {"tool_calls": [call]}, ""
        for part in ('{"order', '": 12', "}"):
            yield {"tool_calls": [{"index": 0, "function": {"arguments": part}}]}, part
        yield {}, ""
        return
    for at, word in enumerate(_words(body)):
        if at % 8 == 2:
            yield {}, ""  # half a character
        yield {"content": word}, word


def _whole(body: dict[str, Any], request_id: str, is_chat: bool) -> bytes:
    with_ids = bool(body.get("return_token_ids"))
    text = "".join(_words(body))
    deltas = list(_deltas(body, is_chat))
    choices = []
    for index in range(int(body.get("n", 1))):
        ids = [at + 10 * index for at in range(len(deltas))] if with_ids else None
        logprobs = _logprob(text, is_chat) if body.get("logprobs") else None
        tail = {"stop_reason": None, "token_ids": ids}
        if is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "reasoning": None}
            if body.get("tools"):
                function = {"name": "look_up", "arguments": '{"order": 12}'}
                message["content"] = None
                message["tool_calls"] = [{"id": "call-1", "type": "function", "function": function}]
            finish = "tool_calls" if body.get("tools") else "stop"
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish} | tail)
        else:
            tail["prompt_token_ids"] = PROMPT_IDS if with_ids else None
            choices.append({"index": index, "text": text, "logprobs": logprobs, "finish_reason": "stop"} | tail)
    prefix, kind = ("chatcmpl", "chat.completion") if is_chat else ("cmpl", "text_completion")
    answer = {"id": f"{prefix}-{request_id}", "object": kind, "created": CREATED, "model": body["model"]}
    answer |= {"choices": choices, "system_fingerprint": FINGERPRINT}
    answer["usage"] = {"prompt_tokens": 3, "total_tokens": 11, "completion_tokens": 8}
    if is_chat:
        answer |= {"prompt_token_ids": PROMPT_IDS if with_ids else None, "prompt_text": None}
    return json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode()


def main(port: int) -> None:
    """Serve the stub alone, for benchmarks and for other processes' tests."""
    import uvloop

    engine = StubEngine({"base", "assistant"})
    engine.keeps_requests = False
    web.run_app(
        create_stub(engine),
        host="127.0.0.1",
        port=port,
        access_log=None,
        handler_cancellation=True,
        print=lambda *_: None,
        loop=uvloop.new_event_loop(),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
