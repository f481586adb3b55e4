"""The operator pages' process: one route table, the store and the gateway's client opened and closed around it.

Who may open them is `access.py`'s. Knows the store and the gateway; never the engine, never torch.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from aiohttp import web
from sqlalchemy.exc import SQLAlchemyError

from loop.settings import Settings
from loop.store import open_store
from services.console import pages, playground
from services.console.access import Handler, guard, open_keys
from services.console.parts import GATEWAY, SETTINGS, STORE, open_templates, render
from services.waiting import when_there

log = logging.getLogger("thumbwheel.console")

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def create_app(settings: Settings) -> web.Application:
    """The pages, over the settings' store and gateway."""
    app = web.Application(middlewares=[guard, explain_errors])
    app[SETTINGS] = settings
    open_templates(app)
    app.cleanup_ctx.append(_open_parts)
    app.on_response_prepare.append(_add_headers)
    app.add_routes(
        [
            web.get("/", pages.overview),
            web.get("/runs", pages.runs),
            web.get("/runs/{run_id:[\\w.-]+}", pages.run),
            web.get("/runs/{run_id:[\\w.-]+}/report.html", pages.report),
            web.get("/adapters", pages.adapters),
            web.get("/adapters/{version:\\w+}", pages.adapter),
            web.get("/playground", playground.page),
            web.post("/playground/chat", playground.chat),
            web.post("/playground/feedback", playground.feedback),
            web.get("/healthz", healthz),
            web.static("/static", Path(__file__).parent / "static"),
        ]
    )
    return app


def main(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT."""
    console = settings.console
    web.run_app(create_app(settings), host=console.host, port=console.port, access_log=None, handler_cancellation=True)


async def healthz(_: web.Request) -> web.Response:
    """GET /healthz: the process is there."""
    return web.json_response({"status": "ok"})


async def _open_parts(app: web.Application) -> AsyncIterator[None]:
    settings = app[SETTINGS]
    stop = threading.Event()
    try:
        store = await asyncio.to_thread(when_there, lambda: open_store(settings.store), stop, _say)
    finally:
        stop.set()  # cancelled while it waits
    assert store is not None
    app[STORE] = store
    await open_keys(app)
    keys = settings.gateway.api_keys
    gateway = settings.gateway
    host = (
        "127.0.0.1"
        if gateway.host in {"0.0.0.0", "::"}
        else f"[{gateway.host}]"
        if ":" in gateway.host
        else gateway.host
    )
    app[GATEWAY] = aiohttp.ClientSession(
        base_url=(settings.console.gateway_url or f"http://{host}:{gateway.port}").rstrip("/") + "/",
        headers={"Authorization": f"Bearer {keys[0].get_secret_value()}"} if keys else {},
        timeout=aiohttp.ClientTimeout(total=settings.engine.request_timeout_s, sock_connect=5),
    )
    yield
    await app[GATEWAY].close()
    app[STORE].dispose()


def _say(exc: Exception) -> None:
    log.warning("waiting for the store: %s", exc, extra={"action": "console_waits"})


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)


@web.middleware
async def explain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A page instead of a traceback where the store cannot be read or something is not there."""
    try:
        return await handler(request)
    except web.HTTPNotFound as exc:
        return render(request, "error.html", status=404, title="Not found", text=exc.text or "")
    except SQLAlchemyError as exc:
        return render(
            request, "error.html", status=503, title="The store does not answer", text=str(exc).split("\n")[0]
        )
