"""What the console's handlers share: the store, the gateway's client, the templates and how figures are written."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import aiohttp
import jinja2
from aiohttp import web
from sqlalchemy import Engine

from loop.settings import Settings

SETTINGS = web.AppKey("settings", Settings)
STORE = web.AppKey("store", Engine)
GATEWAY = web.AppKey("gateway", aiohttp.ClientSession)
TEMPLATES = web.AppKey("templates", jinja2.Environment)

# What a state or verdict looks like; anything else is neutral.
TONES = {
    **dict.fromkeys(("done", "pass", "live", "up"), "good"),
    **dict.fromkeys(("failed", "fail", "rejected", "rolled_back", "down"), "bad"),
    **dict.fromkeys(("insufficient", "skipped", "canary"), "warn"),
    **dict.fromkeys(("running", "requested", "candidate", "approved"), "busy"),
}


def open_templates(app: web.Application) -> None:
    """Load the templates into the app."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("services.console"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ago": ago,
        "clock": clock,
        "duration": duration,
        "figure": figure,
        "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False, default=str),
        "tone": lambda word: TONES.get(word, "plain"),
        "words": lambda name: str(name).replace("_", " "),
    }
    app[TEMPLATES] = environment


def render(request: web.Request, template: str, *, status: int = 200, **values: Any) -> web.Response:
    """The page of a template."""
    settings = request.app[SETTINGS]
    shared = {"alias": settings.engine.alias, "path": request.path, "now_ms": int(time.time() * 1000)}
    text = request.app[TEMPLATES].get_template(template).render(shared | values)
    return web.Response(text=text, status=status, content_type="text/html")


def ago(at_ms: int, now_ms: int) -> str:
    """How long ago, or in how long, in words."""
    words = duration(abs(now_ms - at_ms) / 1000)
    return f"{words} ago" if at_ms <= now_ms else f"in {words}"


def clock(at_ms: int) -> str:
    """A time in UTC, to the second."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def duration(seconds: float) -> str:
    """A time span in its two largest units."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    for size, unit, smaller, small in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            whole, rest = divmod(int(seconds), size)
            return f"{whole} {unit} {rest // smaller} {small}" if rest >= smaller else f"{whole} {unit}"
    raise AssertionError(seconds)


def figure(value: Any) -> str:
    """A value of a stage's output as it is read best."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1_000 else f"{value:.4g}"
    return "–" if value is None else str(value)
