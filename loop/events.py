"""The wire contract: what gateways (and imports) put on the event log, and what everyone else reads from it.

CloudEvents 1.0 in structured JSON mode. Decoding is strict about types and lenient about extra fields, so that other
producers and newer versions are read; additions need a default. Pure: no I/O, and `now` is passed in.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import io
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, get_args

import msgspec

RESPONSE_TYPE = "thumbwheel.response.logged.v1"
FEEDBACK_TYPE = "thumbwheel.feedback.given.v1"
# (?!\n): Python's $ alone lets a newline behind it pass.
_RESPONSE_ID = re.compile(r"^(?:chatcmpl|cmpl)-([0-9a-f]{16})-[0-9a-f-]{36}$(?!\n)")
KEY, UUID = slice(-53, -37), slice(-36, None)  # where both are in a response_id, whose prefixes differ in length
_MESSAGE_DIGEST = re.compile(r"^sha256:([0-9a-f]{32})$(?!\n)")

FeedbackValue = Literal["up", "down", "retract"]
# What an app or the gateway concludes from what a user does: weak, and behind what the same rater says himself.
IMPLICIT_SOURCES = frozenset({"regenerate", "copy", "edit"})
# What the store keeps in columns is bounded here, so that an event which no store could hold breaks the contract.
# Postgres' text holds every character but NUL. That is said here, and checked in `_checked`: a regular expression for
# each of these strings took a seventh of the time.
_NO_NUL = {"pattern": r"^[^\x00]*$"}
_SAYS_NUL = re.compile(rb"\\u0000").search  # JSON's only form of it; in half of the time that `in` takes
MAX_ID_CHARS = 256
Id = Annotated[str, msgspec.Meta(max_length=MAX_ID_CHARS, extra_json_schema=_NO_NUL)]
ResponseId = Annotated[str, msgspec.Meta(max_length=80, pattern=_RESPONSE_ID.pattern)]
# Checked by `loop.join`, which knows what it must be equal to.
Key = Annotated[str, msgspec.Meta(max_length=16, extra_json_schema={"pattern": r"^[0-9a-f]{16}$"})]
Name = Annotated[str, msgspec.Meta(max_length=160, extra_json_schema=_NO_NUL)]
ShortName = Annotated[str, msgspec.Meta(max_length=64, extra_json_schema=_NO_NUL)]
Arm = Annotated[str, msgspec.Meta(max_length=16, extra_json_schema=_NO_NUL)]
Index = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
Stamp = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Text = Annotated[str, msgspec.Meta(extra_json_schema=_NO_NUL)]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, lt=4_102_444_800_000)]  # until 2100


class EventError(ValueError):
    """An event's bytes break the contract; the message says how. Such an event goes to dead letters."""


class Choice(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One completion of a response; with n > 1 each is an example of its own."""

    message: dict[str, Any]
    """The assistant's message as it was served: role, content, tool_calls, …; for completions content only."""
    index: Index = 0
    token_ids: list[int] | None = None
    """Completion token ids as they were sampled, the end token included where one was; None where unknown."""
    finish_reason: str | None = None
    logprobs: list[float] | None = None
    """Log-prob of each completion token as the engine gave it, where the app asked for them."""


class ResponseLogged(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """One response that an app received, with everything that training needs to see what was served."""

    response_id: ResponseId
    choices: list[Choice]
    messages: list[dict[str, Any]] | None = None
    """The prompt of a chat completion."""
    prompt: str | None = None
    """The prompt of a completion."""
    prompt_token_ids: list[int] | None = None
    endpoint: Literal["chat", "completions"] = "chat"
    alias: str = ""
    """The model name that the app asked for."""
    adapter: Name = ""
    """The engine's model name that served it: `<alias>@<version>`, or the base model's."""
    arm: Arm = "live"
    generation: int = 0
    """Generation of the route that chose the arm."""
    conversation_id: Id | None = None
    rater: ShortName | None = None
    """Keyed hash of the app's user, where the request named one."""
    message_id: Id | None = None
    """The app's own message id, where it gave one."""
    tools: list[dict[str, Any]] | None = None
    params: dict[str, Any] = {}
    """Sampling parameters of the request (temperature, top_p, max_tokens, …)."""
    aborted: bool = False
    """The client left, or the engine failed, before the answer was whole: never trained on."""
    started_at_ms: Milliseconds = 0
    first_token_s: float | None = None
    """Seconds from the request to the first upstream byte of the body."""
    duration_s: float = 0.0
    trace: str | None = None
    """The request's traceparent."""
    redacted: bool = False
    """Private parts were taken out before it was written, and with them all token ids."""
    stored: bool = True
    """False where the app said that it must not be kept: then there is no content, and no vote makes an example."""
    imported: bool = False
    """Not served by us: taken from a file."""
    extra: dict[str, Any] = {}
    """Columns of an imported row that the contract does not name."""


class FeedbackGiven(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """One signal of one rater on one response; a rater's last one wins."""

    feedback_id: Id
    """The caller's idempotency key; copies of one feedback_id count once, at their earliest stamp."""
    value: FeedbackValue
    hlc: Stamp
    """Hybrid logical clock of the gateway that took it: milliseconds << 16 | counter."""
    response_id: ResponseId | None = None
    message_id: Id | None = None
    """The app's own message id, or the form of `message_digest`, instead of a response_id: means the last
    response under it."""
    choice_index: Index = 0
    names_choice: bool = True
    """False where the voter, who knows the app's message id alone, named no choice: then the vote is on the only one,
    and of several on none."""
    rater: ShortName = ""
    """Keyed hash of the rater; empty where the app names none (then the response has one anonymous rater)."""
    weight: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 1.0
    source: ShortName = "explicit"
    comment: str | None = None
    reasons: list[str] = []
    correction: Text | None = None
    """The text that the rater would have wanted: an example of its own, desirable as long as this vote stands."""


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What readers need of the CloudEvents envelope around a ResponseLogged. `partitionkey` is the design's key."""

    id: Id
    type: str
    partitionkey: Key
    time: str
    data: ResponseLogged


class FeedbackEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The same around a FeedbackGiven."""

    id: Id
    type: str
    partitionkey: Key
    time: str
    data: FeedbackGiven


def _is_without_nul(type_: Any) -> bool:
    return getattr(type_, "extra_json_schema", None) == _NO_NUL or any(map(_is_without_nul, get_args(type_)))


_WITHOUT_NUL = {
    struct: [field.name for field in msgspec.structs.fields(struct) if _is_without_nul(field.type)]
    for struct in (ResponseEvent, ResponseLogged, FeedbackEvent, FeedbackGiven)
}
_encoder = msgspec.json.Encoder()
_response_decoder = msgspec.json.Decoder(ResponseEvent)
_envelope_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_feedback_decoder = msgspec.json.Decoder(FeedbackEvent)


def encode(data: ResponseLogged | FeedbackGiven, *, event_id: str, key: str, source: str, now_ms: int) -> bytes:
    """The event's bytes for the log: CloudEvents 1.0, structured JSON."""
    is_response = isinstance(data, ResponseLogged)
    return _encoder.encode(
        {
            "specversion": "1.0",
            "id": event_id,
            "source": source,
            "type": RESPONSE_TYPE if is_response else FEEDBACK_TYPE,
            "subject": data.response_id or data.message_id,
            "time": f"{_second(now_ms // 1000)}.{now_ms % 1000:03d}+00:00",
            "datacontenttype": "application/json",
            "partitionkey": key,
            "data": data,
        }
    )


def without_content(value: bytes) -> bytes:
    """A response's event, with nothing of what was said: its votes make no example; or a vote's, with its thumb alone.
    Raises EventError.
    """
    bare: ResponseLogged | FeedbackGiven
    try:
        vote = decode_feedback(value).data
        bare = msgspec.structs.replace(vote, comment=None, reasons=[], correction=None)
    except EventError:
        data = decode_response(value).data
        nothing: dict[str, Any] = {"messages": None, "prompt": None, "prompt_token_ids": None, "tools": None}
        bare = msgspec.structs.replace(data, choices=[], params={}, extra={}, stored=False, **nothing)
    return _encoder.encode(_envelope_decoder.decode(value) | {"data": bare})


@functools.lru_cache(maxsize=16)
def _second(now_s: int) -> str:
    return datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def decode_response(value: bytes) -> ResponseEvent:
    """A ResponseLogged with its envelope. Raises EventError."""
    event: ResponseEvent = _checked(_response_decoder, RESPONSE_TYPE, value)
    return event


def decode_feedback(value: bytes) -> FeedbackEvent:
    """A FeedbackGiven with its envelope. Raises EventError."""
    event: FeedbackEvent = _checked(_feedback_decoder, FEEDBACK_TYPE, value)
    if event.data.response_id is None and event.data.message_id is None:
        raise EventError("feedback names neither a response_id nor a message_id")
    return event


def _checked(decoder: msgspec.json.Decoder[Any], expected_type: str, value: bytes) -> Any:
    try:
        envelope = decoder.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:  # ValidationError is a DecodeError
        raise EventError(str(exc)) from exc
    if envelope.type != expected_type:
        raise EventError(f"type is {envelope.type!r}, expected {expected_type!r} on this topic")
    if _SAYS_NUL(value):
        for part, at in ((envelope, "$"), (envelope.data, "$.data")):
            if broken := [name for name in _WITHOUT_NUL[type(part)] if "\0" in (getattr(part, name) or "")]:
                raise EventError(f"Expected `str` without NUL - at `{at}.{broken[0]}`")
    return envelope


class RandomBytes:
    """The kernel's random bytes, many at a time: each system call gives the interpreter's lock away."""

    def __init__(self) -> None:
        self._left = io.BytesIO()

    def take(self, count: int) -> bytes:
        """So many of them, none of which were given before."""
        taken = self._left.read(count)
        if len(taken) < count:
            self._left = io.BytesIO(os.urandom(4096))
            taken = self._left.read(count)
        return taken


def random_key(take: Callable[[int], bytes] = os.urandom) -> str:
    """A key for a response whose app gave no message id: 16 random hex digits."""
    return take(8).hex()


def fitting_id(given: str) -> str:
    """An app's own id as events hold it: one that is too long, or has characters that no id has, as the form of its
    `message_digest`.
    """
    if len(given) <= MAX_ID_CHARS and given.isprintable():
        return given
    return f"sha256:{message_digest(given)}"


def message_digest(message_id: str) -> str:
    """What tells message ids apart: the first 32 hex digits of the SHA-256, which some apps' trace ids are. Who has
    nothing but those may write `sha256:<32 hex>` for the id itself.
    """
    if match := _MESSAGE_DIGEST.match(message_id):
        return match.group(1)
    # A header may have bytes that are no text.
    return hashlib.sha256(message_id.encode(errors="surrogatepass")).hexdigest()[:32]


def key_of_message_id(message_id: str) -> str:
    """The key of an app's own message id: the first 16 hex digits of its SHA-256."""
    return message_digest(message_id)[:16]


def key_of_response_id(response_id: str) -> str:
    """The key inside a response_id. Raises ValueError for an id that no gateway minted."""
    match = _RESPONSE_ID.match(response_id)
    if match is None:
        raise ValueError(
            f"response_id {response_id[:120]!r} was not minted by a gateway; expected chatcmpl-<16 hex>-<uuid>"
        )
    return match.group(1)


def has_several_choices(response_id: str) -> bool:
    """Whether the gateway that minted it was asked for several choices: then its UUID is of version 8."""
    return response_id[UUID][14] == "8"


def hash_rater(salt: bytes, rater: str) -> str:
    """The keyed hash under which a rater is stored; empty stays empty (the response's one anonymous rater)."""
    if not rater:
        return ""
    digest = hmac.digest(salt, rater.encode(errors="surrogatepass"), "sha256")
    return digest.hex()[:32]  # 128 bits: no two raters meet by chance


def uuid7(now_ms: int, take: Callable[[int], bytes] = os.urandom, *, version: Literal[7, 8] = 7) -> str:
    """A version 7 UUID (RFC 9562, section 5.7): 48 bits of milliseconds, then random ones; or one of version 8 (section
    5.8), which is free to be the same.
    """
    ms, rand = f"{now_ms & (1 << 48) - 1:012x}", take(10)
    tail = rand[2:].hex()
    return f"{ms[:8]}-{ms[8:]}-{version}{rand[:2].hex()[1:]}-{'89ab'[rand[2] >> 6]}{tail[1:4]}-{tail[4:]}"


class HybridClock:
    """Hybrid logical clock (Kulkarni et al. 2014): never goes back, though the wall clock may.

    `last` is the highest stamp known from before, so that a restart after the clock was set back goes on from it.
    """

    def __init__(self, last: int = 0) -> None:
        self.last = last

    def tick(self, now_ms: int) -> int:
        """The next stamp: milliseconds << 16 | counter, above every earlier one."""
        self.last = max(self.last + 1, now_ms << 16)
        return self.last
