"""What in an event is private, and the event without it. Pure: bytes in, bytes out; `redactor.py` runs it in a process
of its own, for this holds the interpreter for milliseconds.

The built-in set finds mail addresses, phone and card numbers and keys. It is blunt on purpose: what looks like one is
taken for one. The ids that an app gives (message, conversation) stay as they are, for votes are found by them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec


class Span(NamedTuple):
    """A private part of a text: where it is and what it is."""

    start: int
    end: int
    kind: str


Recogniser = Callable[[str], Iterable[Span]]

# Possessive quantifiers and starts that no match can begin in the middle of: every pattern is linear in the text.
_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]++@[\w-]++(?:\.[\w-]++)++")
_DIGITS = re.compile(r"(?<![\w-])\d{3,19}(?:[ \u00a0-]\d{3,19}){0,7}(?!\w)")
_PHONE = re.compile(
    r"""(?<![\w.+-])(?:
        (?:\+|00)[ ]?[1-9](?:[ \u00a0().\-/]{0,2}\d){6,13}  # +49 (0)30 123456-7, 0044 20 7946 0958
        | \(?0(?!\d?[.,/-]\d)\d{1,4}\)?(?:[ \u00a0\-/]{0,2}\d){5,10}  # 030/1234567, neither a decimal nor a date
        | (?:1[ .-])?\(?[2-9]\d\d\)?[ .-]{0,2}\d{3}[ .-]\d{4}  # (212) 555-0123
    )(?!\w)""",
    re.VERBOSE,
)
_KEY = re.compile(
    r"""-----BEGIN[ ][A-Z ]{0,30}PRIVATE[ ]KEY-----(?:(?!-----END).){0,16384}(?:-----END[ ][A-Z ]{0,30}KEY-----)?
        | (?<![\w-])(?:sk|pk|rk|tw|hf|gsk|glpat|gh[oprsu]|github_pat|npm|pypi|xox[a-z])[-_][\w-]{16,}+
        | (?<![\w-])(?:AKIA|ASIA)[0-9A-Z]{16}(?!\w)
        | (?<![\w-])AIza[\w-]{35}
        | (?<![\w-])eyJ[\w-]{8,}+\.[\w-]{8,}+\.[\w-]*+
        | (?i:(?<!\w)bearer[ ]{1,4})[\w.~+/-]{16,}+=*+
    """,
    re.VERBOSE | re.DOTALL,
)
# Images and sound cannot be looked into, so not even their hashes stay (`media.py`).
_MEDIA = re.compile(
    r"data:[^,]{0,200};(?:base64|sha256),[\w+/=-]*|sha256:[0-9a-f]{64}|[\w+/-]{1024,}={0,2}", re.ASCII | re.IGNORECASE
)
# Of an event's data: what it is found and ordered by.
_KEPT = frozenset(
    {
        *("response_id", "message_id", "conversation_id", "feedback_id", "rater", "trace", "adapter", "alias"),
        *("started_at_ms", "hlc"),
    }
)


def builtin(text: str) -> Iterator[Span]:
    """Mail addresses, phone and card numbers, keys."""
    if "@" in text:
        yield from (Span(*found.span(), "EMAIL") for found in _EMAIL.finditer(text))
    yield from (Span(*found.span(), "CARD") for found in _DIGITS.finditer(text) if _has_card(found[0]))
    yield from (Span(*found.span(), "PHONE") for found in _PHONE.finditer(text))
    yield from (Span(*found.span(), "KEY") for found in _KEY.finditer(text))


def presidio(config: Path | None) -> Recogniser:
    """Microsoft Presidio's analyzer, by its own YAML file or with its defaults, and the built-in set with it.

    Raises ModuleNotFoundError where the extra `thumbwheel[presidio]` is not installed.
    """
    from presidio_analyzer.analyzer_engine_provider import AnalyzerEngineProvider

    analyzer = AnalyzerEngineProvider(analyzer_engine_conf_file=config).create_engine()
    languages = analyzer.supported_languages

    def recognise(text: str) -> Iterator[Span]:
        yield from builtin(text)
        for language in languages:
            for found in analyzer.analyze(text=text, language=language):
                yield Span(found.start, found.end, found.entity_type)

    return recognise


def redact_event(event: bytes, recognise: Recogniser) -> bytes:
    """The event without what is private. A response that changed loses its token ids, which would give it away, and is
    marked, and so is one whose prompt was sent as token ids, which cannot be looked into; another is returned as it is.
    Raises whatever `recognise` raises.
    """
    envelope = msgspec.json.decode(event)
    data: dict[str, Any] = envelope["data"]
    texts = {name: value for name, value in data.items() if name not in _KEPT and name != "prompt_token_ids"}
    choices = texts.pop("choices", None)
    if choices is not None:
        texts["choices"] = [{**choice, "token_ids": None, "logprobs": None} for choice in choices]
    clean = _redact(texts, recognise)
    is_seen = data.get("messages") is not None or data.get("prompt") is not None
    if clean == texts and (is_seen or data.get("prompt_token_ids") is None):
        return event
    if choices is not None:
        clean |= {"redacted": True}
    envelope["data"] = {name: data[name] for name in data if name in _KEPT} | clean
    return msgspec.json.encode(envelope)


def redact_text(text: str, recognise: Recogniser) -> str:
    """The text with `<KIND>` in the place of what is private; what overlaps is one, named by the first."""
    if _MEDIA.fullmatch(text):
        return "<MEDIA>"
    pieces: list[str] = []
    at = 0
    for span in sorted(recognise(text)):
        if span.start >= at:
            pieces += text[at : span.start], f"<{span.kind}>"
        at = max(at, span.end)
    return "".join([*pieces, text[at:]])


def _redact(value: Any, recognise: Recogniser) -> Any:
    """Every text and number in the value, and names of fields, for arguments may have any. One that is an identifier
    may be a key at most; to take it for a person's would break what it names.
    """
    if isinstance(value, str):
        return redact_text(value, recognise)
    if isinstance(value, dict):
        return {
            redact_text(name, builtin if name.isidentifier() else recognise): _redact_named(name, inner, recognise)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_redact(inner, recognise) for inner in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value):
        text = str(int(value))
        return value if (clean := redact_text(text, recognise)) == text else clean
    return value


def _redact_named(name: str, value: Any, recognise: Recogniser) -> Any:
    """A tool call's arguments are JSON in a text, and stay that."""
    if name == "arguments" and isinstance(value, str):
        try:
            arguments = msgspec.json.decode(value)
        except msgspec.DecodeError:
            return redact_text(value, recognise)
        clean = _redact(arguments, recognise)
        return value if clean == arguments else msgspec.json.encode(clean).decode()
    return _redact(value, recognise)


def _has_card(text: str) -> bool:
    """Whether 13 to 19 of the digits are a card's number by Luhn's check; its code or a date may stand beside."""
    groups = re.split(r"\D", text)
    for first in range(len(groups)):
        number = ""
        for group in groups[first:]:
            number += group
            if 13 <= len(number) <= 19 and number[0] in "23456" and _passes_luhn(number):
                return True
    return False


def _passes_luhn(number: str) -> bool:
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in number[-2::-2])
    return (sum(map(int, number[-1::-2])) + sum(doubled)) % 10 == 0
