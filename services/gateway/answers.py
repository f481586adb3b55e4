"""What the engine answers: made fit for the app, and read for the log. Pure.

Rewriting works on bytes, because parsing each chunk of each stream would be the gateway's largest cost. It is exact: in
valid JSON a quote inside a string is escaped, so `"model":"…"` and `token_ids":[` can only be keys with their values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from loop.events import Choice

DONE = b"data: [DONE]\n\n"
_MAX_EVENT_BYTES = 4 * 1024 * 1024  # a "chunk" without an end: passed on as it is
_READ_EVERY_BYTES = 32 * 1024  # of a stream kept for the log before they are condensed

_TOKEN_IDS = re.compile(rb'token_ids":\[[0-9, ]*\]')
# A chunk that vLLM only sends because token ids were asked for: no text yet (half a character, held-back stop string).
_CAUSED_BY_US = b'"delta":{},"logprobs":null,"finish_reason":null,"token_ids":'


class _TokenLogprob(msgspec.Struct, gc=False):
    logprob: float


class _Logprobs(msgspec.Struct, gc=False):
    content: list[_TokenLogprob] | None = None
    token_logprobs: list[float | None] | None = None

    def values(self) -> list[float] | None:
        if self.content is not None:
            return [token.logprob for token in self.content]
        found = self.token_logprobs
        return None if found is None or None in found else [value for value in found if value is not None]


class _Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    message: dict[str, Any] | None = None
    delta: _Delta | None = None
    text: str | None = None
    token_ids: list[int] | msgspec.UnsetType | None = msgspec.UNSET
    prompt_token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Answer(msgspec.Struct, gc=False):
    """A whole JSON answer, or one chunk of a stream."""

    choices: list[_Choice] = []
    prompt_token_ids: list[int] | None = None
    error: Any = None


_answer = msgspec.json.Decoder(_Answer)


class Rename:
    """Takes out of an answer what the app did not ask for: the adapter's name, and token ids."""

    def __init__(self, adapter: str, shown: str, *, strip_token_ids: bool) -> None:
        self._old = b'"model":' + msgspec.json.encode(adapter)
        self._new = b'"model":' + msgspec.json.encode(shown)
        self._strip = strip_token_ids

    def answer(self, body: bytes) -> bytes:
        """A JSON answer, or whole events of a stream, as the app would have got them from the engine itself."""
        if self._strip:
            if _CAUSED_BY_US in body:
                body = b"\n\n".join([event for event in body.split(b"\n\n") if _CAUSED_BY_US not in event])
            body = _TOKEN_IDS.sub(b'token_ids":null', body)
        return body if self._old == self._new else body.replace(self._old, self._new)


class Transcript:
    """What was said in one answer, for the log: one object for JSON answers and for streams."""

    def __init__(self) -> None:
        self.prompt_token_ids: list[int] | None = None
        self.has_failed = False
        self._choices: dict[int, _Said] = {}

    def read_body(self, body: bytes) -> None:
        """Take a JSON answer. Raises msgspec.DecodeError."""
        self._take([_answer.decode(body)])

    def read_events(self, events: bytes) -> None:
        """Take whole events of a stream. Raises msgspec.DecodeError."""
        try:
            # JSON has no line breaks of its own, so what is left of each event is one line of JSON.
            answers = _answer.decode_lines(events.removeprefix(b"data: ").replace(b"\n\ndata: ", b"\n"))
        except msgspec.DecodeError:  # comments and other fields may stand between the events, or it is no JSON at all
            answers = [_answer.decode(line[6:]) for line in events.splitlines() if line.startswith(b"data: {")]
        self._take(answers)

    def choices(self) -> list[Choice]:
        """The choices, in the order of their index."""
        return [self._choices[index].choice(index) for index in sorted(self._choices)]

    @property
    def has_finished(self) -> bool:
        """Whether every choice came to its end."""
        return (
            not self.has_failed and bool(self._choices) and all(said.finish_reason for said in self._choices.values())
        )

    def _take(self, answers: Iterable[_Answer]) -> None:
        for answer in answers:
            self.has_failed |= answer.error is not None
            if answer.prompt_token_ids is not None:
                self.prompt_token_ids = answer.prompt_token_ids
            for choice in answer.choices:
                said = self._choices.get(choice.index)
                if said is None:
                    said = self._choices[choice.index] = _Said()
                said.take(choice)
                if choice.prompt_token_ids is not None:
                    self.prompt_token_ids = choice.prompt_token_ids


class _Said:
    """One choice as it comes together."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self._message: dict[str, Any] = {}
        self._content: list[str] = []
        self._asides: dict[str, str] = {}
        self._tool_calls: dict[int, dict[str, Any]] = {}
        self._token_ids: list[int] | None = None
        self._logprobs: list[float] | None = None
        self._has_all_ids = True

    def take(self, choice: _Choice) -> None:
        delta = choice.delta
        if delta is not None:
            if delta.content is not None:
                self._content.append(delta.content)
            if delta.content is None or delta.role or delta.tool_calls or delta.reasoning:
                self._take_rare(delta)
        elif choice.message is not None:
            self._message = {name: value for name, value in choice.message.items() if value is not None}
            self._message.setdefault("content", None)
        elif choice.text is not None:
            self._content.append(choice.text)
        if choice.token_ids is None:  # the engine keeps ids to itself where reasoning is hidden: none, rather than some
            self._has_all_ids = False
        elif choice.token_ids is not msgspec.UNSET:
            if self._token_ids is None:
                self._token_ids = choice.token_ids
            else:
                self._token_ids += choice.token_ids
        if choice.logprobs is not None and (values := choice.logprobs.values()) is not None:
            self._logprobs = (self._logprobs or []) + values
        self.finish_reason = choice.finish_reason or self.finish_reason

    def _take_rare(self, delta: _Delta) -> None:
        if delta.role is not None:
            self._message["role"] = delta.role
        for name in ("reasoning", "reasoning_content", "refusal"):
            if (text := getattr(delta, name)) is not None:
                self._asides[name] = self._asides.get(name, "") + text
        for part in delta.tool_calls or ():
            call = self._tool_calls.setdefault(part.get("index", 0), {"function": {"name": "", "arguments": ""}})
            call.update({name: part[name] for name in ("id", "type") if part.get(name)})
            for name, text in (part.get("function") or {}).items():
                call["function"][name] = call["function"].get(name, "") + (text or "")

    def choice(self, index: int) -> Choice:
        message = self._message | self._asides
        if self._content:
            message["content"] = "".join(self._content)
        if self._tool_calls:
            message["tool_calls"] = [self._tool_calls[at] for at in sorted(self._tool_calls)]
            message["content"] = message.get("content") or None
        return Choice(
            message=message,
            index=index,
            token_ids=self._token_ids if self._has_all_ids else None,
            finish_reason=self.finish_reason,
            logprobs=self._logprobs,
        )


class EventStream:
    """One stream of server-sent events on its way through: `feed` gives what the app gets at once, a tee keeps what was
    said. `[DONE]` is held back: it goes out once the response is in the spool.
    """

    def __init__(self, rename: Rename, transcript: Transcript | None) -> None:
        self.is_done = False
        self.transcript = transcript
        self.kept_bytes = 0
        self._rename = rename
        self._pending = b""
        self._kept: list[bytes] = []
        self._error: msgspec.DecodeError | UnicodeDecodeError | None = None

    def feed(self, block: bytes) -> bytes:
        """What of `block` (any cut of the stream) can be sent now: events as soon as they are whole."""
        if self._pending:
            block = self._pending + block
            self._pending = b""
        if not block.endswith(b"\n\n"):
            end = block.rfind(b"\n\n") + 2
            if end == 1:
                end = 0 if len(block) < _MAX_EVENT_BYTES else len(block)
            block, self._pending = block[:end], block[end:]
        if block.endswith(DONE):
            self.is_done = True
            block = block[: -len(DONE)]
        if self.transcript is not None and self._error is None:
            self._kept.append(block)
            self.kept_bytes += len(block)
            if self.kept_bytes > _READ_EVERY_BYTES:
                self._read()
        return self._rename.answer(block)

    def rest(self) -> bytes:
        """What is left at the stream's end: an event that was cut off, or the held-back `[DONE]`."""
        return self._pending + (DONE if self.is_done else b"")

    def finish(self) -> Transcript:
        """What was said in all. Raises msgspec.DecodeError or UnicodeDecodeError where it was no stream of ours."""
        assert self.transcript is not None
        self._read()
        if self._error is not None:
            raise self._error
        return self.transcript

    def _read(self) -> None:
        """Condense what the tee has kept."""
        kept, self._kept, self.kept_bytes = b"".join(self._kept), [], 0
        if self.transcript is None or self._error is not None:
            return
        try:
            self.transcript.read_events(kept)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            self._error = exc
