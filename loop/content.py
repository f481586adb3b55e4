"""What a snapshot needs to know of a response's choice, made once, when the choice becomes an example. Pure.

An example is read every night for as long as it is in the window, its votes change now and then, and what was served
never does. So no night decodes an event.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import Any

import msgspec

from loop.events import Choice, ResponseLogged

MIN_WORDS = 4
_WORD = re.compile(r"\w+")
_IDENTIFIER = re.compile(r"\d{4,}")
_ASCII_IDENTIFIER = re.compile(rb"\d{4,}")
_DIGITS = b"0123456789"
# Of ASCII text: what is in a word, in lower case; anything else is a space.
_ASCII_WORDS = bytes(ord(char.lower()) if char.isascii() and _WORD.match(char) else 32 for char in map(chr, range(256)))

Messages = tuple[tuple[str, str], ...]
"""(role, text) of each."""


class Content(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A prompt and its answer, and what decisions take of them. As MessagePack it stands in the store.

    What there is several of stands one behind the other, with the sizes in bytes beside it: so columns of many are made
    without a look into any. Texts are UTF-8, sizes and token ids int32, little-endian.
    """

    unfit: str | None
    """The step of the snapshot's curation that the choice falls at, whatever its votes and the settings."""
    prompt_is_text: bool
    answer_is_text: bool
    """Whether a chat template makes the same of it as the engine's did: there are no images and no tool calls."""
    asked: bytes
    """See `asked_words`."""
    prompt_digest: int
    pair_digest: int
    """64 bits, signed, of the prompt's messages, and of these and the answer."""
    roles: bytes
    role_sizes: bytes
    texts: bytes
    text_sizes: bytes
    answer: bytes
    prompt_ids: bytes | None
    """None where the ids of the prompt or of the answer are not known. So `completion_ids`."""
    completion_ids: bytes | None

    @property
    def messages(self) -> Messages:
        """The prompt's."""
        return tuple(zip(_parted(self.roles, self.role_sizes), _parted(self.texts, self.text_sizes), strict=True))

    @property
    def tokens(self) -> int | None:
        """Of prompt and answer; None where the ids are not known."""
        if self.prompt_ids is None or self.completion_ids is None:
            return None
        return (len(self.prompt_ids) + len(self.completion_ids)) // 4


_encode = msgspec.msgpack.Encoder().encode
encode_content: Callable[[Content], bytes] = _encode
decode_content = msgspec.msgpack.Decoder(Content).decode


def content_of(data: ResponseLogged, choice: Choice) -> Content:
    """The content of one of the response's choices."""
    given = data.messages if data.messages is not None else [{"content": data.prompt or ""}]
    messages = tuple([(str(m.get("role", "user")), message_text(m.get("content")) or "") for m in given])
    answer = message_text(choice.message.get("content")) or ""
    prompt_ids, completion_ids = _packed(data.prompt_token_ids), _packed(choice.token_ids)
    unfit = None
    if data.aborted or choice.finish_reason in ("abort", "error"):
        unfit = "aborted"
    elif choice.finish_reason == "length":
        unfit = "truncated"
    elif not (answer or completion_ids):
        unfit = "empty"
    elif any(map(_has_media, given)):
        unfit = "media"
    if prompt_ids is None or completion_ids is None:
        prompt_ids = completion_ids = None
    roles, texts = (
        [part.encode() for part in parts] for parts in (zip(*messages, strict=True) if messages else ((), ()))
    )
    return Content(
        unfit=unfit,
        prompt_is_text=(data.messages is not None or data.prompt is not None) and all(map(_is_text, given)),
        answer_is_text=_is_text(choice.message),
        asked=asked_words(messages),
        prompt_digest=prompt_digest(messages),
        pair_digest=pair_digest(messages, answer),
        roles=b"".join(roles),
        role_sizes=_sizes(roles),
        texts=b"".join(texts),
        text_sizes=_sizes(texts),
        answer=answer.encode(),
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
    )


def prompt_digest(messages: Messages) -> int:
    """64 bits of the messages, signed."""
    return _digest(_encode(messages))


def pair_digest(messages: Messages, answer: str) -> int:
    """64 bits of the messages and an answer to them, signed."""
    return _digest(_encode((messages, answer)))


def _sizes(parts: list[bytes]) -> bytes:
    return array("i", map(len, parts)).tobytes()


def _parted(joined: bytes, sizes: bytes) -> list[str]:
    ends = list(accumulate(array("i", sizes)))
    return [joined[begin:end].decode() for begin, end in pairwise([0, *ends])]


def _digest(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True)


def _packed(ids: list[int] | None) -> bytes | None:
    """Token ids as int32; None where there are none, or what no vocabulary has."""
    if not ids or min(ids) < 0:
        return None
    try:
        return array("i", ids).tobytes()
    except OverflowError:
        return None


# --- texts ------------------------------------------------------------------------------------------------------------


def message_text(content: Any) -> str | None:
    """A message's text: its content, or the text parts of a multimodal one; None where it has other parts."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    return None


def _is_text(message: Mapping[str, Any]) -> bool:
    return message_text(message.get("content")) is not None and not message.get("tool_calls")


def _has_media(message: Mapping[str, Any]) -> bool:
    """Whether there is more to the prompt than tokens say."""
    content = message.get("content")
    return content is not None and message_text(content) is None


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
