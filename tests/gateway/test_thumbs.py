"""The snippet for web pages, in a real browser, on a page of another origin than the gateway's."""

from __future__ import annotations

import time
from pathlib import Path

from aiohttp import web

from services.gateway.identity import Claim
from tests.chromium import chromium
from tests.gateway.conftest import Gateway, StartGateway, serve

RESPONSE_ID = "chatcmpl-0123456789abcdef-01890000-0000-7000-8000-000000000000"
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Chat</title><link rel="icon" href="data:,">
<p>Your refund takes five days.</p><div id="now" data-feedback-token="{token}"></div>
<p>And this one was long ago.</p><div id="late"></div>
<script src="{gateway}/thumbs.js"></script>"""
PRESSED = "[...document.querySelectorAll('#now button')].map((one) => one.getAttribute('aria-pressed')).join()"


async def test_the_snippet_is_small_and_needs_no_key(start: StartGateway) -> None:
    gateway = await start(api_keys=["k1"])
    async with gateway.http.get(gateway.url + "/thumbs.js") as response:
        assert (response.status, response.content_type) == (200, "text/javascript")
        assert 0 < len(await response.read()) < 2048
        assert response.headers["Cache-Control"] == "public, max-age=3600"


async def test_thumbs_on_another_origins_page_vote_with_the_responses_token(
    start: StartGateway, tmp_path: Path
) -> None:
    async def page(_: web.Request) -> web.Response:
        token = token_for(gateway, 60)
        return web.Response(text=PAGE.format(token=token, gateway=gateway.url), content_type="text/html")

    app = web.Application()
    app.router.add_get("/", page)
    runner, origin = await serve(app)
    gateway = await start(api_keys=["k1"], cors_origins=[origin])
    async with chromium(tmp_path / "profile") as browser:
        await browser.open(origin + "/", "phone")
        click = "document.querySelectorAll('#now button')[{0}].click(); 1"
        for button, shown in ((0, "true,false"), (1, "false,true"), (1, "false,false"), (0, "true,false")):
            await browser.evaluate(click.format(button))
            await browser.wait_for(f"{PRESSED} === '{shown}'")
        names = "[...document.querySelectorAll('#now button')].map((one) => one.ariaLabel).join()"
        assert await browser.evaluate(names) == "thumb up,thumb down"
        assert browser.problems == []

        await browser.evaluate(f"thumbs(document.getElementById('late'), '{token_for(gateway, -60)}'); 1")
        await browser.evaluate("document.querySelector('#late button').click(); 1")
        said = "document.querySelector('#late [role=status]').textContent"
        assert "the feedback token expired" in await browser.wait_for(said)
        assert await browser.evaluate("document.querySelector('#late button').disabled") is False
        await browser.screenshot(tmp_path / "thumbs.png")
    await runner.cleanup()
    found = gateway.feedback()
    assert [given.value for given in found] == ["up", "down", "retract", "up"]
    assert {(given.response_id, given.rater) for given in found} == {(RESPONSE_ID, "ann")}
    # The page names each click, so that who overhears a vote and sends it again changes nothing.
    assert all(given.feedback_id.startswith(f"{RESPONSE_ID}/ann/1") for given in found)
    assert len({given.feedback_id for given in found}) == len(found)


def token_for(gateway: Gateway, seconds: int) -> str:
    return gateway.parts.signer.sign(Claim(RESPONSE_ID, "ann"), int(time.time()) + seconds)
