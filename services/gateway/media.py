"""Images, sound and files that stand inside of messages: the log gets a hash in their place. Pure.

An image has megabytes where a turn has kilobytes, and nothing is learned from it: the record would hold up a partition,
or be over the broker's limit. The hash tells whether two were the same.
"""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Any

import msgspec

from services.gateway.errors import UNREADABLE

# What vLLM takes for text (`TEXT_PART_TYPES` of its chat_utils).
_TEXT_TYPES = {"text", "input_text", "output_text", "refusal", "thinking"}
_BASE64 = re.compile(r"[\w+/-]{1024}", re.ASCII)  # no address and no sentence has so many of its characters in a row
_DATA_URL = re.compile(r"(data:[^,]{0,200};)base64,", re.IGNORECASE)


class _Message(msgspec.Struct):
    content: msgspec.Raw = msgspec.Raw(b"")


_contents = msgspec.json.Decoder(list[_Message])
_messages = msgspec.json.Decoder(list[dict[str, Any]])


def without_media(messages: msgspec.Raw | None) -> msgspec.Raw | None:
    """The messages with `data:image/png;sha256,<hex>` for a data URL and `sha256:<hex>` for other base64, in any part
    that is not text; as they are where there is none. The hash is of the characters of the base64.
    """
    if messages is None:
        return None
    try:
        if not any(bytes(message.content)[:1] == b"[" for message in _contents.decode(messages)):
            return messages
        decoded = _messages.decode(messages)
        hashed = [
            message | {"content": [_hash_part(part) for part in content]}
            if isinstance(content := message.get("content"), list)
            else message
            for message in decoded
        ]
    except UNREADABLE:  # the engine's to judge
        return messages
    return messages if hashed == decoded else msgspec.Raw(msgspec.json.encode(hashed))


def _hash_part(part: Any) -> Any:
    return part if isinstance(part, dict) and part.get("type") in _TEXT_TYPES else _hash(part)


def _hash(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _hash(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_hash(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if head := _DATA_URL.match(value):
        return f"{head[1]}sha256,{_digest(value[head.end() :])}"
    is_base64 = _BASE64.match(value) is not None and len(value.split(None, 1)) == 1
    return f"sha256:{_digest(value)}" if is_base64 else value


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()
