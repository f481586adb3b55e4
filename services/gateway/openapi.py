"""The public API as an OpenAPI 3.1 document, and a page that shows it, without scripts.

What the gateway itself reads is described to the last bound; what is only passed on is left to the engine, which knows.
A new route is one more entry in `_PATHS`, and a test holds that none is missing.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import version
from typing import Any

import msgspec
from aiohttp import web

from loop.events import ResponseId
from services.gateway.feedback import MAX_ITEMS, VALUES, Vote
from services.gateway.identity import FEEDBACK_TOKEN
from services.gateway.proxy import NO_RESPONSES
from services.gateway.relay import RESPONSE_ID
from services.gateway.tokens import TokenAsk

Schema = dict[str, Any]

_ENGINE_TIMES = "The engine cannot take it now, or too much is open: `Retry-After` says when to try again."
_ERRORS = {
    "400": "The request cannot be read.",
    "401": "No valid API key, or no valid token.",
    "403": "The key or token does not permit this.",
    "404": "No such model, or no such path.",
    "413": "The body is too large.",
    "422": "The request is read, but it is not valid.",
    "429": "Too fast: `Retry-After` says when to try again.",
    "500": "The engine failed; its own error.",
    "502": "The engine's answer could not be read.",
    "503": _ENGINE_TIMES,
}
_ID: Schema = {"type": ["string", "integer", "null"]}
_HEADER_ID: Schema = {"type": "string", "pattern": "^[\\x21-\\x7e]*$"}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Schema) -> Schema:
    return {"content": {"application/json": {"schema": schema}}}


def _errors(*statuses: str) -> Schema:
    # A proxied engine has errors of its own, hence the default.
    said = {status: {"description": _ERRORS[status], **_json(_ref("Error"))} for status in statuses}
    return {**said, "default": {"description": "Another error, the engine's own included.", **_json({})}}


def _header(name: str, what: str, schema: Schema = _HEADER_ID) -> Schema:
    return {"name": name, "in": "header", "description": what, "schema": schema}


def _generation(summary: str, request: str, answer: str) -> Schema:
    streamed: Schema = {"text/event-stream": {}}
    return {
        "summary": summary,
        "description": "Everything that the engine takes beyond what is described here is passed on to it as it is.",
        "tags": ["engine"],
        "parameters": [
            _header("X-Thumbwheel-Conversation-Id", "Keeps a conversation on one adapter."),
            _header("X-Thumbwheel-Message-Id", "The app's own id of the answer, for votes by it."),
            _header("X-Thumbwheel-Store", "`false`: nothing of it is kept.", {"enum": ["true", "false"]}),
            _header("traceparent", "Passed on to the engine and logged (W3C Trace Context)."),
        ],
        "requestBody": {"required": True, **_json(_ref(request))},
        "responses": {
            "200": {
                "description": "The engine's answer, as JSON or, with `stream`, as server-sent events.",
                "headers": {
                    RESPONSE_ID: {"description": "What votes name.", "schema": {"type": "string"}},
                    FEEDBACK_TOKEN: {"description": "Lets a browser vote on it.", "schema": {"type": "string"}},
                },
                "content": {**_json(_ref(answer))["content"], **streamed},
            },
            **_errors("400", "401", "404", "413", "500", "502", "503"),
        },
    }


def _passed_on(summary: str) -> Schema:
    return {
        "summary": summary,
        "description": "Passed on to the engine, with the live adapter in the alias's place; nothing is logged.",
        "tags": ["engine"],
        "requestBody": {"required": True, **_json(_ref("PassedOn"))},
        "responses": {
            "200": {"description": "The engine's answer.", **_json({"type": "object"})},
            **_errors("400", "401", "404", "413", "500", "502", "503"),
        },
    }


def _langfuse(summary: str) -> Schema:
    taken = {status: {"description": "Taken.", **_json({})} for status in ("200", "202", "207")}
    return {
        "summary": summary,
        "description": "As Langfuse's clients send it; its own documentation says what may be in it.",
        "tags": ["langfuse"],
        "responses": {**taken, **_errors("400", "401", "404", "413", "422", "503")},
    }


_MODEL: Schema = {"type": ["string", "null"], "description": "The alias; the base or a served version by its name."}
_METADATA: Schema = {
    "type": ["object", "null"],
    "properties": {
        "message_id": {**_ID, "description": "The app's own id of the answer, for votes by it."},
        "conversation_id": {**_ID, "description": "Keeps a conversation on one adapter."},
    },
}
_WITHHELD: Schema = {
    "const": "withheld",
    "description": "The vote counts; its comment, reasons and correction could not be redacted and are not kept.",
}
_ASK: Schema = {
    "model": _MODEL,
    "metadata": _METADATA,
    "user": {"type": ["string", "null"], "description": "Who asks; kept as a keyed hash."},
    "store": {"type": ["boolean", "null"], "description": "`false`: nothing of it is kept, and no vote counts."},
    "stream": {"type": ["boolean", "null"]},
}
_SCHEMAS: dict[str, Schema] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "integer", "null"]},
                },
            }
        },
    },
    "ChatRequest": {
        "type": "object",
        "required": ["messages"],
        "properties": {**_ASK, "messages": {"type": "array", "items": {"type": "object"}}},
    },
    "CompletionRequest": {
        "type": "object",
        "required": ["prompt"],
        "properties": {**_ASK, "prompt": {"type": ["string", "array"], "items": {}}},
    },
    "Completion": {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices"],
        "properties": {
            "id": {"type": "string"},
            "model": {"type": "string"},
            "created": {"type": "integer"},
            "choices": {"type": "array", "items": {"type": "object"}},
        },
    },
    "PassedOn": {"type": "object", "properties": {"model": _MODEL}},
    "Models": {
        "type": "object",
        "required": ["object", "data"],
        "properties": {
            "object": {"const": "list"},
            "data": {
                "type": "array",
                "items": {"type": "object", "required": ["id"], "properties": {"id": {"type": "string"}}},
            },
        },
    },
    "Token": {
        "type": "object",
        "required": ["token", "response_id", "expires_at"],
        "properties": {
            "token": {"type": "string"},
            "response_id": {"type": "string"},
            "expires_at": {"type": "integer", "description": "Unix time."},
        },
    },
    "Votes": {
        "type": "object",
        "required": ["items"],
        "properties": {
            "items": {
                "type": "array",
                "minItems": 1,
                "maxItems": MAX_ITEMS,
                "items": {},
                "description": "Each a Vote, judged by itself.",
            }
        },
        "additionalProperties": False,
    },
    "Results": {
        "type": "object",
        "required": ["items"],
        "properties": {
            "items": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["status"],
                    "properties": {
                        "status": {"type": "integer"},
                        "feedback_id": {"type": "string"},
                        "text": _WITHHELD,
                    },
                },
            }
        },
    },
    "Accepted": {
        "type": "object",
        "required": ["feedback_id", "status"],
        "properties": {
            "feedback_id": {"type": "string"},
            "status": {"const": "accepted"},
            "response_id": {"type": "string"},
            "message_id": {"type": "string"},
            "text": _WITHHELD,
        },
    },
}
_PATHS: dict[str, Schema] = {
    "/v1/chat/completions": {"post": _generation("A chat completion", "ChatRequest", "Completion")},
    "/v1/completions": {"post": _generation("A completion", "CompletionRequest", "Completion")},
    "/v1/models": {
        "get": {
            "summary": "The models: the alias",
            "tags": ["engine"],
            "responses": {
                "200": {"description": "The models.", **_json(_ref("Models"))},
                **_errors("401", "502", "503"),
            },
        }
    },
    "/v1/embeddings": {"post": _passed_on("Embeddings")},
    "/tokenize": {"post": _passed_on("Token ids of a text")},
    "/detokenize": {"post": _passed_on("The text of token ids")},
    "/v1/feedback": {
        "post": {
            "summary": "A thumb, or up to 1,000 of them",
            "description": "By `response_id`, by the app's own `message_id`, or by the response's token alone. "
            "A rater's last vote wins; a `feedback_id` that is sent twice counts once.",
            "tags": ["feedback"],
            "security": [{"key": []}, {"token": []}, {}],
            "parameters": [
                _header(
                    "Idempotency-Key",
                    "Instead of `feedback_id`.",
                    {"type": "string", "maxLength": 128, "pattern": "^[\\x21-\\x7e]*$"},
                )
            ],
            "requestBody": {"required": True, **_json({"anyOf": [_ref("Vote"), _ref("Votes")]})},
            "responses": {
                "202": {"description": "It is on disk.", **_json(_ref("Accepted"))},
                "207": {"description": "What each vote of several would have got alone.", **_json(_ref("Results"))},
                **_errors("400", "401", "403", "413", "422", "503"),
            },
        }
    },
    "/v1/feedback/tokens": {
        "post": {
            "summary": "A token with which a browser may vote on a response",
            "tags": ["feedback"],
            "requestBody": {"required": True, **_json(_ref("TokenAsk"))},
            "responses": {
                "200": {"description": "The token.", **_json(_ref("Token"))},
                **_errors("401", "403", "413", "422", "429", "503"),
            },
        }
    },
    "/api/public/scores": {
        "post": {
            **_langfuse("A score, or a list of them"),
            "requestBody": {"required": True, **_json({"type": ["object", "array"], "maxItems": MAX_ITEMS})},
        }
    },
    "/api/public/scores/{score_id}": {
        "delete": {
            **_langfuse("A score is taken back"),
            "parameters": [
                {**_header("score_id", "As the score was given.", {"type": "string"}), "in": "path", "required": True}
            ],
        }
    },
    "/api/public/ingestion": {
        "post": {
            **_langfuse("Events; the scores among them are taken"),
            "requestBody": {
                "required": True,
                **_json(
                    {
                        "type": "object",
                        "required": ["batch"],
                        "properties": {"batch": {"type": "array", "maxItems": MAX_ITEMS}},
                    }
                ),
            },
        }
    },
    "/api/public/projects": {"get": _langfuse("The one project, for keys that are good")},
    "/api/public/otel/v1/traces": {
        "post": {
            **_langfuse("Spans, which are dropped"),
            "requestBody": {"required": True, **_json({})},
            "responses": {"200": {"description": "Dropped.", "content": {"*/*": {}}}, **_errors("401", "413")},
        }
    },
    "/thumbs.js": {
        "get": {
            "summary": "Thumbs for a web page",
            "tags": ["feedback"],
            "security": [],
            "responses": {"200": {"description": "A script.", "content": {"text/javascript": {}}}},
        }
    },
    "/healthz": {
        "get": {
            "summary": "The process is there",
            "tags": ["process"],
            "security": [],
            "responses": {"200": {"description": "It is.", **_json({"type": "object"})}},
        }
    },
}


@cache
def openapi() -> Schema:
    """The document."""
    _, read = msgspec.json.schema_components([Vote, TokenAsk], ref_template="#/components/schemas/{name}")
    vote = read["Vote"]
    vote["properties"]["value"] = {"enum": list(VALUES)}
    vote["properties"]["response_id"] = {"anyOf": [msgspec.json.schema(ResponseId), {"type": "null"}]}
    read["TokenAsk"]["properties"]["response_id"] = msgspec.json.schema(ResponseId)
    named = ("response_id", "message_id", "token")
    vote["anyOf"] = [{"properties": {name: {"type": "string", "minLength": 1}}, "required": [name]} for name in named]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Thumbwheel",
            "version": version("thumbwheel"),
            "summary": "The OpenAI API of a vLLM whose adapter learns from thumbs, and the way to send them.",
            "description": NO_RESPONSES,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [
            {"name": "engine", "description": "The OpenAI API, answered by the engine."},
            {"name": "feedback", "description": "Thumbs."},
            {"name": "langfuse", "description": "What Langfuse's clients send."},
            {"name": "process", "description": "For those who run it."},
        ],
        "security": [{"key": []}, {}],
        "paths": _PATHS,
        "components": {
            "schemas": {**_SCHEMAS, **read},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "An API key."},
                "token": {"type": "apiKey", "in": "header", "name": FEEDBACK_TOKEN},
            },
        },
    }


async def document(_: web.Request) -> web.Response:
    """GET /openapi.json"""
    return web.Response(body=msgspec.json.encode(openapi()), content_type="application/json")


async def page(_: web.Request) -> web.Response:
    """GET /docs"""
    headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return web.Response(text=_page(), content_type="text/html", headers=headers)


@cache
def _page() -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # only for who reads it: the gateway starts sooner
    from markupsafe import Markup, escape

    def code(text: str) -> Markup:  # all that the descriptions have of CommonMark
        return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))

    environment = Environment(loader=PackageLoader("services.gateway", "."), autoescape=True, undefined=StrictUndefined)
    environment.filters["code"] = code
    return environment.get_template("openapi.html").render(api=openapi())
