"""Prompts as texts: what of a message is text, what a prompt is compared on, and its words. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MIN_WORDS = 4
_WORD = re.compile(r"\w+")
_IDENTIFIER = re.compile(r"\d{4,}")
_ASCII_IDENTIFIER = re.compile(rb"\d{4,}")
_DIGITS = b"0123456789"
# Of ASCII text: what is in a word, in lower case; anything else is a space.
_ASCII_WORDS = bytes(ord(char.lower()) if char.isascii() and _WORD.match(char) else 32 for char in map(chr, range(256)))


def message_text(content: Any) -> str | None:
    """A message's text: its content, or the text parts of a multimodal one; None where it has other parts."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    return None


def asked_words(messages: Sequence[tuple[str, str]]) -> bytes:
    """What a prompt of (role, text) is clustered on: the words of its last user turn, with those of the turns before it
    while that has under MIN_WORDS of them.

    Not the whole prompt: a later turn's prompt contains earlier answers, and every prompt of an app the same system
    message, which would make prompts alike, or unlike, that ask the same. And not "yes" or "thanks" alone, which would
    tie conversations together that have nothing in common. That earlier turns of a held-out conversation do not reach
    training is what the conversation, a unit of its own, is for.
    """
    turns: list[bytes] = []
    count = 0
    for role, text in reversed(messages):
        if role == "user" and (words := normal_words(text)):
            turns.insert(0, words)
            count += words.count(b" ") + 1 if text.isascii() else len(_WORD.findall(text))
            if count >= MIN_WORDS:
                break
    return b" ".join(turns)


def normal_words(text: str) -> bytes:
    """Words without case and punctuation, with single spaces between, as UTF-8. Numbers of four digits and more count
    as one: an order number or a date does not make another question of it, while in "12 times 7" the numbers are what
    is asked."""
    if not text.isascii():
        return " ".join(_WORD.findall(_IDENTIFIER.sub("0000", text.casefold()))).encode()
    # The same, in a fifth of the time.
    words = text.encode().translate(_ASCII_WORDS)
    if len(words.translate(None, _DIGITS)) < len(words):
        words = _ASCII_IDENTIFIER.sub(b"0000", words)
    while b"  " in words:
        words = words.replace(b"  ", b" ")
    return words.strip()
