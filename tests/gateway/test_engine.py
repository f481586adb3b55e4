"""The gateway in front of the real vLLM: what the stub only claims."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from services.gateway.proxy import not_served
from tests.conftest import DEMO_MODEL, RealEngine
from tests.gateway.conftest import Gateway, StartGateway, install_beside, until
from tests.ports import free_port

pytestmark = pytest.mark.engine
OPENAI_NODE = "openai@7.57.0"
LITELLM = ("litellm==1.106.2", "fastuuid==0.14.0")
MESSAGES: Any = [{"role": "user", "content": "Where is my order?"}]

ALLOWED = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/embeddings", "/tokenize", "/detokenize"}


@pytest.fixture
async def through(start: StartGateway, engine: RealEngine) -> Gateway:
    return await start(engine={"urls": [engine.url], "base_name": engine.base_name})


@pytest.fixture
async def clients(through: Gateway, engine: RealEngine) -> AsyncIterator[tuple[openai.AsyncOpenAI, openai.AsyncOpenAI]]:
    async with (
        openai.AsyncOpenAI(base_url=engine.url + "/v1", api_key="none") as direct,
        openai.AsyncOpenAI(base_url=through.url + "/v1", api_key="none") as proxied,
    ):
        yield direct, proxied


def said(chunks: list[dict[str, Any]]) -> dict[str | int, Any]:
    """What must not differ between two calls for the same; texts joined, for vLLM cuts a stream as its load has it."""
    found: dict[str | int, Any] = {"fields": sorted({name for chunk in chunks for name in chunk})}
    for chunk in chunks:
        found["usage"] = chunk["usage"] or found.get("usage")
        for choice in chunk["choices"]:
            message = choice.get("message") or choice.get("delta") or {"content": choice["text"]}
            seen = found.setdefault(choice["index"], {"content": "", "logprobs": [], "finish_reason": None, "ids": []})
            seen["content"] += message["content"] or ""
            logprobs = choice["logprobs"] or {}
            seen["logprobs"] += [token["logprob"] for token in logprobs.get("content") or ()]
            seen["logprobs"] += logprobs.get("token_logprobs") or ()  # of a completion
            seen["finish_reason"] = choice["finish_reason"] or seen["finish_reason"]
            seen["ids"] += choice.get("token_ids") or ()
    return found


async def said_by_both(
    clients: tuple[openai.AsyncOpenAI, openai.AsyncOpenAI],
    engine: RealEngine,
    create: Callable[[openai.AsyncOpenAI], Callable[..., Any]],
    **ask: Any,
) -> list[dict[str | int, Any]]:
    """What the engine says, asked directly and through the gateway."""
    found: list[dict[str | int, Any]] = []
    for client, model in zip(clients, (engine.base_name, "assistant"), strict=True):
        # vLLM takes no n > 1 at temperature 0
        answer = await create(client)(model=model, max_tokens=24, extra_body={"top_k": 1}, **ask)
        chunks = [chunk async for chunk in answer] if "stream" in ask else [answer]
        found.append(said([chunk.model_dump() for chunk in chunks]))
    return found


PARCEL: Any = {"type": "object", "properties": {"kind": {"enum": ["parcel", "letter"]}}, "required": ["kind"]}
SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "order", "schema": PARCEL}}


@pytest.mark.parametrize("ask", [{}, {"n": 2, "logprobs": True}, {"stop": ["e"]}, {"response_format": SCHEMA}])
@pytest.mark.parametrize("stream", [{}, {"stream": True, "stream_options": {"include_usage": True}}])
async def test_vllm_answers_the_same_through_the_gateway(
    clients: tuple[openai.AsyncOpenAI, openai.AsyncOpenAI],
    through: Gateway,
    engine: RealEngine,
    ask: dict[str, Any],
    stream: dict[str, Any],
) -> None:
    answers = await said_by_both(
        clients, engine, lambda client: client.chat.completions.create, messages=MESSAGES, **ask, **stream
    )
    assert answers[0] == answers[1]
    assert len(answers[0][0]["content"]) > 0
    assert answers[0][0]["ids"] == []
    (logged,) = through.responses()
    assert len(logged.choices) == ask.get("n", 1)
    assert logged.prompt_token_ids
    for choice in logged.choices:
        assert choice.token_ids
        assert choice.message["content"] is not None
        assert len(choice.logprobs or choice.token_ids) == len(choice.token_ids)
    assert not logged.aborted


@pytest.mark.parametrize("ask", [{}, {"n": 2, "logprobs": 2}, {"stop": ["e"]}, {"echo": True}, {"suffix": None}])
@pytest.mark.parametrize("stream", [{}, {"stream": True, "stream_options": {"include_usage": True}}])
async def test_vllm_completes_the_same_through_the_gateway(
    clients: tuple[openai.AsyncOpenAI, openai.AsyncOpenAI],
    through: Gateway,
    engine: RealEngine,
    ask: dict[str, Any],
    stream: dict[str, Any],
) -> None:
    answers = await said_by_both(
        clients, engine, lambda client: client.completions.create, prompt="Where is my order?", **ask, **stream
    )
    assert answers[0] == answers[1]
    assert len(answers[0][0]["content"]) > 0
    if "echo" in ask:  # no example: the answer has the prompt in it
        assert through.responses() == []
        return
    (logged,) = through.responses()
    assert logged.prompt == "Where is my order?"
    assert logged.prompt_token_ids
    assert [choice.message["content"] for choice in logged.choices] == [
        answers[1][index]["content"] for index in range(ask.get("n", 1))
    ]
    assert all(choice.token_ids for choice in logged.choices)


BAD: dict[str, dict[str, Any]] = {
    "a value that cannot be": {"temperature": -1},
    "a prompt that is too long": {"messages": [{"role": "user", "content": "order " * 2000}]},
    "no messages": {"messages": 5},
    "a broken schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}
    },
    "a tool that is none": {"tools": [{"type": "function"}]},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("stream", [False, True])
async def test_vllms_own_errors_come_with_their_status_and_body(
    through: Gateway, engine: RealEngine, bad: dict[str, Any], stream: bool
) -> None:
    ask = {"messages": MESSAGES, "max_tokens": 4, "stream": stream} | bad
    path = "/v1/chat/completions"
    async with (
        through.http.post(engine.url + path, json=ask | {"model": engine.base_name}) as direct,
        through.http.post(through.url + path, json=ask | {"model": "assistant"}) as proxied,
    ):
        bodies = [(await answer.text()).replace(engine.base_name, "assistant") for answer in (direct, proxied)]
        assert (proxied.status, proxied.content_type, bodies[1]) == (direct.status, direct.content_type, bodies[0])
        assert 400 <= direct.status < 500 or (stream and 'data: {"error":' in bodies[0])
    assert all(logged.aborted for logged in through.responses())


async def test_vllm_tokenizes_and_back_through_the_gateway(through: Gateway, engine: RealEngine) -> None:
    async def both(path: str, **body: Any) -> Any:
        status, found, _ = await through.post(path, {"model": "assistant"} | body)
        async with through.http.post(engine.url + path, json={"model": engine.base_name} | body) as direct:
            assert (status, found) == (direct.status, await direct.json())
        return found

    tokens = (await both("/tokenize", prompt="Where is my order?", add_special_tokens=False))["tokens"]
    assert (await both("/detokenize", tokens=tokens))["prompt"] == "Where is my order?"
    assert "tokens" in await both("/tokenize", messages=MESSAGES)
    await both("/v1/embeddings", input="x")  # which this model has none of: the engine says so


async def test_vllm_embeds_through_the_gateway(start: StartGateway, tmp_path: Path) -> None:
    embeds = ("--runner", "pooling", "--convert", "embed")
    engine = RealEngine(f"http://127.0.0.1:{free_port()}", "base", DEMO_MODEL, tmp_path / "vllm.log", embeds)
    try:
        await asyncio.to_thread(engine.start)
        through = await start(engine={"urls": [engine.url], "base_name": "base"})
        found = []
        for url, model in ((engine.url, "base"), (through.url, "assistant")):
            async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none") as client:
                answer = await client.embeddings.create(model=model, input=["Where is my order?", "Hello"])
            assert answer.model == model
            found.append(([one.embedding for one in answer.data], answer.usage, answer.object))
        assert found[0] == found[1]
        assert len(found[0][0]) == 2
    finally:
        await asyncio.to_thread(engine.stop)


async def test_vllm_takes_the_minted_id(through: Gateway) -> None:
    for path, fields in (("/v1/chat/completions", {"messages": MESSAGES}), ("/v1/completions", {"prompt": "Hello"})):
        _, body, response = await through.post(path, {"model": "assistant", "max_tokens": 2} | fields)
        assert body["id"] == response.headers["X-Thumbwheel-Response-Id"]


async def test_vllm_stops_when_the_client_has_left(through: Gateway, engine: RealEngine) -> None:
    # Many answers at once: on a busy machine a single one may have ended before its first chunk is read here.
    ask = {"model": "assistant", "messages": MESSAGES, "max_tokens": 400, "stream": True, "ignore_eos": True, "n": 32}
    async with aiohttp.ClientSession() as http, asyncio.timeout(240):

        async def figure(name: str) -> float:
            async with http.get(engine.url + "/metrics") as metrics:
                lines = (await metrics.text()).splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))

        before = await figure("generation_tokens_total")
        async with through.http.post(through.url + "/v1/chat/completions", json=ask) as response:
            await response.content.readany()
            response.close()
        while await figure("num_requests_running") > 0:
            await asyncio.sleep(0.02)
        assert await figure("generation_tokens_total") - before < 0.5 * 32 * 400
    await until(lambda: bool(through.responses()))
    assert through.responses()[0].aborted


async def test_every_other_route_of_the_engine_is_refused(through: Gateway, engine: RealEngine) -> None:
    async with through.http.get(engine.url + "/openapi.json") as response:
        paths = (await response.json())["paths"]
    table = through.app.router
    served = {resource.canonical for resource in table.resources()}
    # Routes that the engine leaves out of its own document.
    hidden = (
        "/health",
        "/ping",
        "/metrics",
        "/version",
        "/load",
        "/server_info",
        "/sleep",
        "/reset_prefix_cache",
        "/redoc",
    )
    paths |= {path: ["get", "post"] for path in hidden}
    assert served & paths.keys() <= ALLOWED  # of them, embeddings are there for models that embed only
    refused = [path for path in paths if path not in served]
    assert {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"} <= set(refused)
    for path in refused:
        for method in paths[path]:
            async with through.http.request(method, through.url + path.replace("{", "").replace("}", "")) as response:
                assert response.status == 404, path
    assert not_served in {route.handler for route in table.routes()}


# --- real clients ----------------------------------------------------------------------------------------------------

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "find_order",
            "parameters": {
                "type": "object",
                "properties": {"kind": {"type": "string", "enum": ["parcel", "letter"]}},
                "required": ["kind"],
                "additionalProperties": False,
            },
        },
    }
]


def called(answer: Any) -> tuple[Any, ...]:
    message = answer.choices[0].message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return message.content, calls, answer.choices[0].finish_reason, answer.usage.prompt_tokens


async def test_openai_for_python_works_sync_async_and_with_tools(through: Gateway, engine: RealEngine) -> None:
    ask: Any = {"model": "assistant", "messages": MESSAGES, "max_tokens": 16, "temperature": 0}

    def synchronous() -> tuple[str | None, str]:
        with openai.OpenAI(base_url=through.url + "/v1", api_key="none") as client:
            whole = client.chat.completions.create(**ask)
            stream = client.chat.completions.create(**ask, stream=True)
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
            return whole.choices[0].message.content, streamed

    whole, streamed = await asyncio.to_thread(synchronous)
    assert whole == streamed != ""
    async with openai.AsyncOpenAI(base_url=through.url + "/v1", api_key="none") as client:
        assert (await client.chat.completions.create(**ask)).choices[0].message.content == whole
        # The tiny model need not call it, but what it says must be what it says without us in between.
        async with openai.AsyncOpenAI(base_url=engine.url + "/v1", api_key="none") as direct:
            for choice in ("auto", "required"):
                tools: Any = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 48}
                one = await direct.chat.completions.create(**(ask | tools | {"model": engine.base_name}))
                other = await client.chat.completions.create(**(ask | tools))
                assert called(one) == called(other)
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**(ask | {"temperature": -1}))
        assert "temperature" in refused.value.message
    logged = through.responses()[-1]
    assert logged.tools == TOOLS
    assert logged.choices[0].token_ids


async def test_langchains_chat_openai_works(through: Gateway) -> None:
    model = ChatOpenAI(
        model="assistant",
        base_url=through.url + "/v1",
        api_key=SecretStr("none"),
        max_completion_tokens=16,
        temperature=0,
    )
    whole = await model.ainvoke("Where is my order?")
    streamed = "".join([chunk.text async for chunk in model.astream("Where is my order?")])
    assert whole.text == streamed != ""
    assert whole.response_metadata["id"] == through.responses()[0].response_id


async def output_of(*command: str | Path, cwd: Path) -> Any:
    """What the program prints, as JSON."""
    child = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await child.communicate()
    assert child.returncode == 0, errors.decode()
    return json.loads(output)


async def test_openai_for_node_works(through: Gateway, tmp_path: Path) -> None:
    script = shutil.copy(Path(__file__).with_name("openai_node.mjs"), tmp_path)
    quiet = ("--no-audit", "--no-fund", "--no-save", "--json", "--fetch-retries=8")
    npm = ("npm", "install", "--prefix", tmp_path, *quiet, OPENAI_NODE)
    await output_of(*npm, cwd=tmp_path)
    found = await output_of("node", script, through.url, cwd=tmp_path)
    assert found["whole"] == found["streamed"] != ""
    assert found["id"] == found["response_id"] == through.responses()[0].response_id
    assert found["models"] == ["assistant"]
    assert found["refused"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found"}


async def test_the_litellm_client_works(through: Gateway, tmp_path: Path) -> None:
    await install_beside(tmp_path, "--no-deps", *LITELLM)
    script = Path(__file__).with_name("litellm_client.py")
    found = await output_of("env", f"PYTHONPATH={tmp_path}", sys.executable, script, through.url, cwd=tmp_path)
    assert found["whole"] == found["streamed"] != ""
    assert found["id"] == through.responses()[0].response_id
