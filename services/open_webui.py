"""`thumbwheel open-webui`: Open WebUI keeps its users' ratings on its own server; this reads its export now and then
and votes through the gateway with what is new.

The votes name Open WebUI's message ids, which its connection sends to the gateway as a header (see README.md). How far
the export was read is kept in a file, moved after each batch that is on the gateway's disk. What is sent twice all the
same counts once: a vote's `feedback_id` is made of the rating's id and its last change.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from pydantic import SecretStr

from loop.settings import OpenWebuiSettings

EXPORT = "api/v1/evaluations/feedbacks/all/export"
BATCH = 100  # with the longest comments, still less than the gateway takes at once
WINDOW_S = 3600
TIMEOUT_S = 300.0

log = logging.getLogger(__name__)


class _Data(msgspec.Struct):
    rating: float | str | None = None
    reason: str | None = None
    comment: str | None = None


class _Meta(msgspec.Struct):
    message_id: str | None = None


class Rating(msgspec.Struct):
    """What we read of one entry of the export; it holds the whole chat besides."""

    id: str
    updated_at: int
    user_id: str = ""
    data: _Data | None = None
    meta: _Meta | None = None


class Seen(msgspec.Struct, frozen=True):
    """How far the export was read: to the last change, in seconds; and which changes of the WINDOW_S before it were
    seen, with their seconds: others may still come, committed late or by a server whose clock is behind.
    """

    updated_at: int = 0
    changes: dict[str, int] = {}


def run_open_webui(settings: OpenWebuiSettings, stop: threading.Event, *, once: bool) -> dict[str, int]:
    """Poll until `stop` is set, or once; what is away is waited for. Returns what the last poll came to.

    Raises ValueError where settings are missing, ConnectionError where the only poll failed.
    """
    if settings.url is None or settings.token is None:
        raise ValueError(
            "open_webui.url or open_webui.token is not set; expected Open WebUI's address and an admin's key"
        )
    while True:
        counts: dict[str, int] = {}
        try:
            counts = asyncio.run(poll(settings))
            log.info("ratings read", extra={"action": "ratings_read", **counts})
        except ConnectionError as exc:
            if once:
                raise
            log.warning("%s", exc, extra={"action": "open_webui_waits"})
        if once or stop.wait(settings.poll_s):
            return counts


async def poll(settings: OpenWebuiSettings) -> dict[str, int]:
    """Read the export once and send what is new, oldest first; returns {ratings, new, refused}.

    Raises ConnectionError where Open WebUI or the gateway does not answer as it should; the next poll goes on there.
    """
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(TIMEOUT_S)) as http:
        url = f"{(settings.url or '').rstrip('/')}/{EXPORT}"
        body = await _ask(http, "GET", url, settings.token, 200)
        try:
            ratings = msgspec.json.decode(body, type=list[Rating])
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise ConnectionError(f"{url}: not the export of Open WebUI's ratings: {exc}") from exc
        seen = read_seen(settings.state)
        new = sorted_new(ratings, seen)
        refused = 0
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            sent = [(rating, vote) for rating in batch if (vote := to_vote(rating)) is not None]
            results = await _vote(http, settings, [vote for _, vote in sent]) if sent else []
            if {401, 403}.intersection(results):  # nothing is wrong with the ratings
                raise ConnectionError(
                    "the gateway takes no votes with open_webui.api_key; give one with the scope feedback"
                )
            late = [rating for (rating, _), status in zip(sent, results, strict=True) if status == 429]
            refused += sum(status not in (202, 429) for status in results)
            if done := batch[: batch.index(late[0])] if late else batch:
                seen = advance(seen, done)
                write_seen(settings.state, seen)
            if late:
                raise ConnectionError(f"the gateway takes no more votes of the rater of {late[0].id!r} for now (429)")
    return {"ratings": len(ratings), "new": len(new), "refused": refused}


def sorted_new(ratings: Iterable[Rating], seen: Seen) -> list[Rating]:
    """The ratings that changed since, in the order in which they did. Pure."""
    since = seen.updated_at - WINDOW_S
    new = (rating for rating in ratings if rating.updated_at > since and change_of(rating) not in seen.changes)
    return sorted(new, key=lambda rating: (rating.updated_at, rating.id))


def advance(seen: Seen, batch: Iterable[Rating]) -> Seen:
    """How far the export was read behind the batch. Pure."""
    changes = seen.changes | {change_of(rating): rating.updated_at for rating in batch}
    last = max(changes.values(), default=0)
    return Seen(last, {change: at for change, at in changes.items() if at > last - WINDOW_S})


def change_of(rating: Rating) -> str:
    """What tells one change of a rating from another: Open WebUI's times are whole seconds. Pure."""
    return f"{rating.id}/{rating.updated_at}/{value_of(rating)}"


def value_of(rating: Rating) -> str:
    """The vote's; a rating that is neither good nor bad takes it back. Pure."""
    value = None if rating.data is None else rating.data.rating
    return {"1": "up", "-1": "down"}.get(str(value).removesuffix(".0"), "retract")


def to_vote(rating: Rating) -> dict[str, Any] | None:
    """The vote; None where the rating is on no message. Pure."""
    if rating.data is None or rating.meta is None or not rating.meta.message_id:
        return None
    vote: dict[str, Any] = {
        "message_id": rating.meta.message_id,
        "value": value_of(rating),
        "feedback_id": f"open-webui/{change_of(rating)}",
        "source": "open-webui",
    }
    if rating.user_id:
        vote["rater"] = rating.user_id
    if rating.data.comment:
        vote["comment"] = rating.data.comment.replace("\0", "")[:5_000]
    if rating.data.reason and rating.data.reason.isprintable():
        vote["reasons"] = [rating.data.reason[:64]]
    return vote


def read_seen(path: Path) -> Seen:
    """What an earlier poll has left; nothing at the first one. Raises ValueError for a file of something else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Seen)
    except FileNotFoundError:
        return Seen()
    except msgspec.DecodeError as exc:
        raise ValueError(f"{path} is not what was left by a poll: {exc}; remove it to read all ratings again") from exc


def write_seen(path: Path, seen: Seen) -> None:
    """Replace the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(path.name + ".new")
    with made.open("wb") as file:
        file.write(msgspec.json.encode(seen))
        file.flush()
        os.fsync(file.fileno())
    made.rename(path)


async def _vote(http: aiohttp.ClientSession, settings: OpenWebuiSettings, votes: list[dict[str, Any]]) -> list[int]:
    """Send the votes; returns the status of each."""
    url = f"{settings.gateway_url.rstrip('/')}/v1/feedback"
    body = await _ask(http, "POST", url, settings.api_key, 207, {"items": votes})
    results = json.loads(body)["items"]
    for vote, result in zip(votes, results, strict=True):
        if result["status"] not in (202, 429):
            extra = {"action": "rating_refused", "feedback_id": vote["feedback_id"]}
            log.warning("a rating was refused: %s", result["error"]["message"], extra=extra)
    return [result["status"] for result in results]


async def _ask(
    http: aiohttp.ClientSession, method: str, url: str, key: SecretStr | None, status: int, body: Any = None
) -> bytes:
    """The body of an answer with this status. Raises ConnectionError for every other."""
    headers = {} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"}
    try:
        async with http.request(method, url, headers=headers, json=body) as response:
            answer = await response.read()
    except (aiohttp.ClientError, TimeoutError) as exc:
        raise ConnectionError(f"{url} does not answer: {exc or type(exc).__name__}") from exc
    if response.status != status:
        said = answer[:200].decode(errors="replace")
        raise ConnectionError(f"{url} answered {response.status}, expected {status}: {said}")
    return answer
