"""The columns that an example has of its event, for examples that are put straight into the store."""

from __future__ import annotations

from typing import Any

from loop.content import content_of, encode_content
from loop.events import Choice, ResponseLogged
from loop.minhash import sketches

NOTHING = ResponseLogged(response_id=f"chatcmpl-{'0' * 16}-{'0' * 36}", choices=[Choice(message={})])


def content_columns(data: ResponseLogged = NOTHING, choice: int = 0) -> dict[str, Any]:
    """Of the response's choice that stands at this place."""
    content = content_of(data, data.choices[choice])
    return {"sketch": sketches([content.asked])[0], "content": encode_content(content)}
