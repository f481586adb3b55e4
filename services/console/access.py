"""Who may open the pages: operators with an API key of the scope admin, and no script of another site.

As at the gateway, no key is asked for as long as there never was one, and then only this machine can reach the pages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from aiohttp import web
from sqlalchemy.exc import SQLAlchemyError

from loop.store.keys import read_keys
from services.console.parts import SETTINGS, STORE
from services.gateway.identity import KeyRing, is_loopback

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

KEYS = web.AppKey("keys", KeyRing)
# A browser asks its user by itself, and sends the key with whatever the page fetches.
_ASK = {"WWW-Authenticate": 'Basic realm="Thumbwheel: the password is an API key", charset="UTF-8"'}
_HOW = "`thumbwheel keys add NAME --scopes admin` makes one"


async def open_keys(app: web.Application) -> None:
    """Learn the keys. Raises ValueError where others than this machine could open the pages without one."""
    settings = app[SETTINGS]
    configured = (key.get_secret_value() for key in settings.gateway.api_keys)
    keys = app[KEYS] = KeyRing(configured, is_local=is_loopback(settings.console.host))
    keys.learn(await asyncio.to_thread(read_keys, app[STORE]))
    if not (keys.is_local or keys.has_any):
        raise ValueError(
            f"console.host is {settings.console.host!r} but there is no API key: without one the pages bind to "
            f"loopback only; {_HOW}, or set gateway.api_keys, or console.host = '127.0.0.1'"
        )


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse who has no key, and what another site's page may have sent: a foreign Host on loopback (DNS rebinding), a
    cross-site POST.
    """
    if is_loopback(request.app[SETTINGS].console.host) and not is_loopback(request.url.host or ""):
        raise web.HTTPForbidden(text=f"host {request.host[:120]!r} is not this machine; open the pages by localhost")
    if request.method == "POST":
        site = request.headers.get("Sec-Fetch-Site", "same-origin")
        if site != "same-origin" or request.content_type != "application/json":
            raise web.HTTPForbidden(text="only these pages may post here, as application/json")
    if request.path != "/healthz":
        await _check_key(request)
    return await handler(request)


async def _check_key(request: web.Request) -> None:
    keys = request.app[KEYS]
    with suppress(SQLAlchemyError):  # then those that were learnt last are good, as at the gateway
        keys.learn(await asyncio.to_thread(read_keys, request.app[STORE]))
    caller = keys.find(request.headers.get("Authorization"))
    if caller is None:
        text = f"an API key with the scope admin is needed, as the password or as a bearer token; {_HOW}"
        raise web.HTTPUnauthorized(text=text, headers=_ASK)
    if "admin" not in caller.scopes:
        text = f"API key {caller.key_id} has not the scope admin; {_HOW}"
        raise web.HTTPForbidden(text=text)
