"""What an app asks for: one generation request, read without being rewritten. Pure.

Every field of the body stays the bytes that the app sent (`msgspec.Raw`): upstream gets them unchanged but for `model`
and `return_token_ids`, and the log gets the messages as they came.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw
from multidict import istr

from loop.events import fitting_id, hash_rater
from services.gateway.errors import UNREADABLE, Refusal

Endpoint = Literal["chat", "completions"]

MAX_FIELDS = 1_000  # of a body; each takes ten times its size in memory
MAX_TRACE_CHARS = 512
# What apps may call their ids in headers: our names, and Open WebUI's (ENABLE_FORWARD_USER_INFO_HEADERS).
_CONVERSATION = istr("X-Thumbwheel-Conversation-Id"), istr("X-OpenWebUI-Chat-Id")
_MESSAGE = istr("X-Thumbwheel-Message-Id"), istr("X-OpenWebUI-Message-Id")
_TASK = istr("X-Thumbwheel-Task"), istr("X-OpenWebUI-Task")
_USER = (istr("X-OpenWebUI-User-Id"),)
_STORE = istr("X-Thumbwheel-Store")
_TRACEPARENT, _TRACESTATE = istr("traceparent"), istr("tracestate")
_TRACE = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(?![^-])")  # then a later version's parts
_HASHED_BYTES = 65_536  # of a first turn; images inside of it may have megabytes
_TRUE = Raw(b"true")
# Everything else in a body is a sampling parameter as far as the log is concerned.
_NOT_PARAMS = frozenset(
    {
        "model",
        "messages",
        "prompt",
        "tools",
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "metadata",
        "stream",
        "stream_options",
        "store",
        "return_token_ids",
    }
)

_fields = msgspec.json.Decoder(Annotated[dict[str, Raw], Meta(max_length=MAX_FIELDS)])
_anything = msgspec.json.Decoder()
_list = msgspec.json.Decoder(list[Raw])
_encode = msgspec.json.Encoder().encode


class _Turn(msgspec.Struct):
    role: str = ""


_turn = msgspec.json.Decoder(_Turn)


@dataclass(slots=True)
class Ask:
    """One request for completions; ids are as the log keeps them."""

    endpoint: Endpoint
    fields: dict[str, Raw]
    model: str | None
    own_conversation_id: str | None
    """The app's."""
    rater: str | None
    message_id: str | None
    wants_token_ids: bool
    is_logged: bool
    """Whether the log has an event of it at all."""
    is_stored: bool
    """Whether that may have what was said; if not, votes find that there was something."""
    size: int
    choices: int = 1
    trace: str | None = None

    @property
    def conversation_id(self) -> str:
        """The app's, else the rater, who stands for all of his, else what the conversation began with."""
        return self.own_conversation_id or self.rater or _first_turn(self.fields)

    @property
    def params(self) -> dict[str, Raw]:
        """How the app wants the answer to be sampled."""
        return {name: value for name, value in self.fields.items() if name not in _NOT_PARAMS}

    @property
    def is_captured(self) -> bool:
        """Whether it may become an example."""
        return self.is_logged and self.is_stored

    def upstream_body(self, adapter: str) -> bytes:
        """The body for the engine: the adapter's name in the model's place, token ids asked for where we log."""
        body = self.fields | {"model": Raw(_encode(adapter))}
        if self.is_captured:
            body["return_token_ids"] = _TRUE
        return _encode(body)


def read_ask(endpoint: Endpoint, headers: Mapping[str, str], body: bytes, rater_salt: bytes) -> Ask:
    """The request. Raises Refusal 400 where it cannot be routed; what else is wrong with it is the engine's to say."""
    fields = read_fields(body)
    metadata = _value(fields, "metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    user = _value(fields, "user") or _value(fields, "safety_identifier") or _header(headers, _USER)
    rater = hash_rater(rater_salt, user) if isinstance(user, str) else ""
    is_task = bool(_header(headers, _TASK) or metadata.get("task"))  # a title, tags: nobody sees it, nobody votes on it
    choices = _value(fields, "n")
    # What is neither a yes nor a no was meant to say something, and is safer taken for a no.
    is_stored = headers.get(_STORE, "true").lower() == "true" and _value(fields, "store") in (None, True)
    return Ask(
        endpoint=endpoint,
        fields=fields,
        model=read_model(fields),
        own_conversation_id=_id(_header(headers, _CONVERSATION) or metadata.get("conversation_id")),
        rater=rater or None,
        message_id=_id(_header(headers, _MESSAGE) or metadata.get("message_id")),
        wants_token_ids=bool(_value(fields, "return_token_ids")),
        is_logged=not is_task and _is_capturable(fields),
        is_stored=is_stored,
        size=len(body),
        choices=1 if choices is None else _whole(choices),
        trace=_logged_trace(headers),
    )


def read_trace(headers: Mapping[str, str]) -> dict[str, str]:
    """The W3C trace context, to be passed on; what cannot be one is left out, as that standard says."""
    if _TRACEPARENT not in headers:
        return {}
    return {
        name: value
        for name in (_TRACEPARENT, _TRACESTATE)
        if (value := headers.get(name)) and len(value) <= MAX_TRACE_CHARS and value.isascii() and value.isprintable()
    }


def _logged_trace(headers: Mapping[str, str]) -> str | None:
    """The part of the context that is logged: numbers only, for nobody redacts it."""
    found = _TRACE.match(headers.get(_TRACEPARENT, ""))
    return None if found is None else found[0]


def read_fields(body: bytes) -> dict[str, Raw]:
    """The body's fields, their values untouched. Raises Refusal 400."""
    try:
        fields: dict[str, Raw] = _fields.decode(body)
    except UNREADABLE as exc:
        message = f"the body is not a JSON object of at most {MAX_FIELDS} fields: {exc}"
        raise Refusal(400, message, code="invalid_json") from exc
    return fields


def read_model(fields: Mapping[str, Raw]) -> str | None:
    """The model's name; None where none was given. Raises Refusal 400."""
    model = _value(fields, "model")
    if model is None or isinstance(model, str):
        return model
    raise Refusal(400, f"model is {str(model)[:80]}; expected a string", param="model")


def _whole(number: Any) -> int:
    """The number as vLLM reads it, from text and from 2.0 too; 1 for what it refuses."""
    try:
        return msgspec.convert(number, int, strict=False)
    except msgspec.ValidationError:
        return 1


def _value(fields: Mapping[str, Raw], name: str) -> Any:
    """A small field's value; None where it is absent or broken."""
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return _anything.decode(raw)
    except UNREADABLE:
        return None


def _header(headers: Mapping[str, str], names: Iterable[str]) -> str | None:
    """The first of the headers that says something; an app's placeholder that it did not fill in says nothing."""
    for name in names:
        if (value := headers.get(name)) and "{{" not in value:
            return value
    return None


def _id(value: Any) -> str | None:
    """An app's own id, whatever it looks like: no chat fails for it."""
    return fitting_id(str(value)) if isinstance(value, str | int) and value != "" else None


def _first_turn(fields: Mapping[str, Raw]) -> str:
    """A conversation's name where the app gives none: the hash of everything up to the first user message, which each
    later request of the conversation begins with.
    """
    turn = hashlib.sha256()
    try:
        for message in _list.decode(fields["messages"]):
            turn.update(bytes(message)[:_HASHED_BYTES])
            if _turn.decode(message).role == "user":
                break
    except (KeyError, *UNREADABLE):
        turn.update(bytes(fields.get("prompt", b""))[:_HASHED_BYTES])
    return turn.hexdigest()[:32]


def _is_capturable(fields: Mapping[str, Raw]) -> bool:
    """Whether one prompt has one answer that can be an example. With `echo` vLLM leaves the prompt's text out as soon
    as token ids are asked for, so such requests are left alone.
    """
    if _value(fields, "echo"):
        return False
    if "prompt" not in fields:
        return True
    prompt = _value(fields, "prompt")
    if not isinstance(prompt, list):
        return True
    return len(prompt) == 1 or all(isinstance(token, int) for token in prompt)
