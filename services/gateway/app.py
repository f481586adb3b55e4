"""The gateway's process: one route table, the clients opened and closed around it, two ports, an orderly end."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import uvloop
from aiohttp import web
from aiohttp.hdrs import ORIGIN
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.log import server_logger
from aiohttp.typedefs import Handler
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from loop import metrics
from loop.events import HybridClock
from loop.log.embedded import EmbeddedLog
from loop.settings import GatewaySettings, LogSettings, Settings
from services.gateway.engines import Engines
from services.gateway.errors import Refusal
from services.gateway.feedback import feedback
from services.gateway.forward import forwarding
from services.gateway.identity import FEEDBACK_TOKEN, KeyRing, is_loopback
from services.gateway.langfuse import create_scores, delete_score, drop_traces, ingest, projects
from services.gateway.openapi import document, page
from services.gateway.orphans import adopt
from services.gateway.parts import MAX_HEADERS, PARTS, Parts, for_no_engine
from services.gateway.proxy import chat_completions, completions, models, not_served, pass_through
from services.gateway.recent import RECENT, Recent
from services.gateway.redactor import Redactor
from services.gateway.relay import RESPONSE_ID
from services.gateway.routes import RouteWatch
from services.gateway.spool import CLOCK, Spool
from services.gateway.tally import Tally
from services.gateway.tokens import make_token

_CANCEL_S = 1.0  # for handlers that were cancelled at the end of the drain
_PREFLIGHT_AGE_S = "600"
_RECURSION_LIMIT = 700  # a request that is nested deeper is refused: the log's readers have to get deeper than we
_THUMBS = (Path(__file__).parent / "static" / "thumbs.js").read_bytes()


def create_app(settings: Settings) -> web.Application:
    """The public application."""
    server_logger.addFilter(_is_our_fault)
    app = web.Application(client_max_size=settings.gateway.max_body_bytes, middlewares=[_counted])
    app.cleanup_ctx.append(_parts(settings))
    if settings.gateway.cors_origins:
        app.on_response_prepare.append(_allow_origin)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat_completions),
            web.post("/v1/completions", completions),
            web.get("/v1/models", models, allow_head=False),
            web.post("/v1/embeddings", pass_through),
            web.post("/tokenize", pass_through),
            web.post("/detokenize", pass_through),
            web.post("/v1/feedback", for_no_engine(feedback)),
            web.post("/v1/feedback/tokens", for_no_engine(make_token)),
            web.post("/api/public/scores", for_no_engine(create_scores)),
            web.delete("/api/public/scores/{score_id}", delete_score),
            web.post("/api/public/ingestion", for_no_engine(ingest)),
            web.get("/api/public/projects", projects, allow_head=False),
            web.post("/api/public/otel/v1/traces", for_no_engine(drop_traces)),
            web.get("/thumbs.js", thumbs),
            web.get("/openapi.json", document),
            web.get("/docs", page),
            web.get("/healthz", healthz),
            web.options("/{path:.*}", preflight),
            web.route("*", "/{path:.*}", not_served),
        ]
    )
    return app


@web.middleware
async def _counted(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever it is and however far it has come, the end waits for it: a body on its way, a vote, a stream."""
    parts = request.app[PARTS]
    parts.in_progress += 1
    try:
        return await handler(request)
    finally:
        parts.in_progress -= 1


def create_metrics_app(public: web.Application) -> web.Application:
    """/metrics, /healthz and /readyz, for a port that apps do not reach."""

    async def readyz(_: web.Request) -> web.Response:
        parts = public[PARTS]
        needed = {
            "engine": parts.engines.is_up,
            "route": parts.routes.is_known.is_set(),
            "serving": not parts.is_draining,
        }
        # A full disk is told of, but no reason to send the chat away.
        shown = needed | {"spool": not parts.spool.is_failing}
        return web.json_response(shown, status=200 if all(needed.values()) else 503)

    async def exposition(_: web.Request) -> web.Response:
        registry = REGISTRY
        public[PARTS].tally.count()
        if public[PARTS].gateway.process is not None:  # one of several, with metrics in files that they share
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/metrics", exposition), web.get("/healthz", healthz), web.get("/readyz", readyz)])
    return app


async def healthz(_: web.Request) -> web.Response:
    """GET /healthz: the process is there."""
    return web.json_response({"status": "ok"})


async def thumbs(_: web.Request) -> web.Response:
    """GET /thumbs.js: adds thumbs to a web page, which vote with a response's own token."""
    headers = {"Cache-Control": "public, max-age=3600"}
    return web.Response(body=_THUMBS, content_type="text/javascript", charset="utf-8", headers=headers)


async def preflight(request: web.Request) -> web.Response:
    """OPTIONS: what a browser asks before it calls from another origin."""
    origin = request.headers.get(ORIGIN, "")
    if not request.app[PARTS].allows(origin):
        raise Refusal(403, f"origin {origin[:120]!r} may not call; gateway.cors_origins names those that may")
    return web.Response(
        status=204,
        headers={
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", "content-type"),
            "Access-Control-Max-Age": _PREFLIGHT_AGE_S,
        },
    )


def main(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then let open requests end for up to `drain_timeout_s`."""
    # Each stream takes two, and the usual soft limit is 1024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.setrecursionlimit(_RECURSION_LIMIT)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    gateway = settings.gateway
    app = create_app(settings)
    # Handlers go on when their client has left, unless aiohttp is told otherwise.
    public = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=_CANCEL_S,
        # Above our own limits, which answer with an error that clients can read; what is larger is not even buffered.
        max_field_size=2 * gateway.max_header_bytes,
        max_headers=2 * MAX_HEADERS,
    )
    private = web.AppRunner(create_metrics_app(app), access_log=None, shutdown_timeout=_CANCEL_S)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await public.setup()
        await private.setup()
        await _refuse_to_be_open(app[PARTS])
        is_shared = gateway.process is not None
        await web.TCPSite(private, gateway.host, gateway.metrics_port, reuse_port=is_shared).start()
        site = web.TCPSite(public, gateway.host, gateway.port, backlog=1024, reuse_port=is_shared)
        await site.start()
        freezing = asyncio.create_task(_freeze(app[PARTS]))
        await stop.wait()
        freezing.cancel()
        await site.stop()
        await _drain(app[PARTS], gateway.drain_timeout_s)
    finally:
        await public.cleanup()
        await private.cleanup()


async def _refuse_to_be_open(parts: Parts) -> None:
    """Raises ValueError where others than this machine could call without a key, or guess who a rater is."""
    gateway = parts.gateway
    if is_loopback(gateway.host):
        return
    if gateway.rater_salt == GatewaySettings().rater_salt:
        raise ValueError(
            f"gateway.host is {gateway.host!r} but gateway.rater_salt is the default, which everybody knows: raters "
            "could be guessed from their hashes; set it, for instance to what `openssl rand -hex 32` prints"
        )
    if not parts.routes.keys.has_any:  # of the settings, or kept from before
        await parts.routes.is_known.wait()
    if not parts.routes.keys.has_any:
        why = "there is no API key" if parts.routes.keys.is_known else "the store, which has the API keys, is away"
        raise ValueError(
            f"gateway.host is {gateway.host!r} but {why}: without one the gateway binds to loopback only; make "
            "one with `thumbwheel keys add NAME`, or set gateway.api_keys, or gateway.host = '127.0.0.1'"
        )


async def _freeze(parts: Parts) -> None:
    """What was loaded by now stays: the collector need not look through it while streams wait, 40 ms each time."""
    await parts.routes.is_known.wait()  # SQLAlchemy is in memory
    gc.collect()
    gc.freeze()


async def _drain(parts: Parts, timeout_s: float) -> None:
    parts.is_draining = True
    deadline = time.monotonic() + timeout_s
    while parts.in_progress and time.monotonic() < deadline:
        await asyncio.sleep(0.02)


def _parts(settings: Settings) -> Callable[[web.Application], AsyncIterator[None]]:
    async def opened(app: web.Application) -> AsyncIterator[None]:
        gateway = settings.gateway
        log = open_spool(settings.log, gateway.gateway_id)
        journal = log.path.with_name(f"journal-{gateway.gateway_id}")
        # In a spool of our own nobody commits: what is forwarded is dropped, and all that is there waits.
        topics = (settings.log.responses_topic, settings.log.feedback_topic)
        waiting_bytes = partial(log.waiting_bytes, settings.joiner.group, topics)
        redactor = None if gateway.redaction is None else Redactor(gateway.redaction, gateway.presidio_config)
        spool = Spool(log, waiting_bytes, gateway.spool_quota_bytes, journal, gateway.capture_timeout_s, redactor)
        engines = Engines(settings.engine)
        keys = KeyRing((key.get_secret_value() for key in gateway.api_keys), is_local=is_loopback(gateway.host))
        alias, poll_s, tally = settings.engine.alias, gateway.route_poll_s, Tally()
        routes = RouteWatch(alias, gateway.gateway_id, settings.store, log, poll_s, keys, tally)
        clock = HybridClock(int(log.get_meta(CLOCK) or 0))
        recent = Recent(log.path.with_name(RECENT))
        app[PARTS] = Parts(settings, engines, routes, spool, recent, redactor, clock, tally)
        tasks: list[asyncio.Task[object]] = [
            asyncio.create_task(routes.watch()),
            asyncio.create_task(engines.watch()),
        ]
        if not gateway.process:  # the first one of several, for all
            tasks.append(asyncio.create_task(asyncio.to_thread(adopt, log, topics)))
        with forwarding(log, settings.log):
            yield
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await routes.close()
            engines.close()
            await spool.close()
        recent.close()
        log.close()

    return opened


def open_spool(settings: LogSettings, gateway_id: str) -> EmbeddedLog:
    """The spool's file: the embedded log itself, or this gateway's own one beside where that would be."""
    if settings.kind == "embedded":
        return EmbeddedLog(settings.path, settings.partitions, settings.retention_s)
    return EmbeddedLog(settings.path.with_name(f"spool-{gateway_id}.db"), settings.partitions)


def _is_our_fault(record: logging.LogRecord) -> bool:
    """Whether the server's log is to have it. What is no HTTP is answered with a 400 and counted: a traceback for each
    would let a stranger fill the disk, with a header of his that may be somebody's key.
    """
    if record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError):
        return True
    metrics.gateway_refused.labels("bad_http").inc()
    return False


async def _allow_origin(request: web.Request, response: web.StreamResponse) -> None:
    origin = request.headers.get(ORIGIN)
    if origin is not None and request.app[PARTS].allows(origin):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = f"{RESPONSE_ID}, {FEEDBACK_TOKEN}, Retry-After"
        response.headers["Vary"] = "Origin"
