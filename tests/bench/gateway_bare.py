"""The least that an aiohttp proxy can do, as a yardstick: `python -m tests.bench.gateway_bare UPSTREAM PORT`."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import aiohttp
import uvloop
from aiohttp import web

SESSION = web.AppKey("session", aiohttp.ClientSession)


def create_app(upstream_url: str) -> web.Application:
    async def opened(app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as app[SESSION]:
            yield

    async def proxy(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {"Content-Type": "application/json"}
        async with request.app[SESSION].post(upstream_url + request.path, data=body, headers=headers) as upstream:
            if upstream.content_type != "text/event-stream":
                return web.Response(body=await upstream.read(), content_type=upstream.content_type)
            response = web.StreamResponse(headers={"Content-Type": upstream.headers["Content-Type"]})
            await response.prepare(request)
            async for block in upstream.content.iter_any():
                await response.write(block)
            return response

    async def healthz(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application(client_max_size=1 << 30)
    app.cleanup_ctx.append(opened)
    app.router.add_post("/v1/chat/completions", proxy)
    app.router.add_get("/healthz", healthz)
    return app


if __name__ == "__main__":
    web.run_app(
        create_app(sys.argv[1]),
        host="127.0.0.1",
        port=int(sys.argv[2]),
        access_log=None,
        print=None,
        loop=uvloop.new_event_loop(),
    )
