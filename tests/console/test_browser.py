"""The pages in a real browser, on a desktop and on a phone: no error, nothing cut off, and a chat with thumbs.

Screenshots lie in the test's folder, for whoever wants to look.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient

from tests.chromium import SCREENS, Browser, chromium

Client = TestClient[web.Request, web.Application]


@pytest.fixture
async def browser(console: Client, tmp_path: Path) -> AsyncIterator[Browser]:
    """One whose user was asked for the key and gave it; it sends it by itself from then on."""
    async with chromium(tmp_path / "profile") as opened:
        await opened.call("Page.navigate", url=url_of(console, "/").replace("//", "//operator:gateway-key@"))
        await opened.wait_for("document.readyState === 'complete' && document.querySelector('h1, h2') !== null")
        yield opened


def url_of(console: Client, path: str) -> str:
    return str(console.make_url(path))


async def test_a_browser_asks_for_the_key_and_shows_nothing_without_it(console: Client, tmp_path: Path) -> None:
    async with chromium(tmp_path / "profile") as browser:
        # Its word for a question that nobody answered, as nobody is there to do.
        asked = await browser.call("Page.navigate", url=url_of(console, "/"))
        assert asked["errorText"] == "net::ERR_INVALID_AUTH_CREDENTIALS"
        assert await browser.evaluate("document.querySelector('h1, h2')") is None


async def test_every_page_fits_every_screen(console: Client, browser: Browser, tmp_path: Path) -> None:
    text = await (await console.get("/adapters/v000002")).text()
    run = "/runs/" + text.split("/runs/")[1].split('"')[0]
    pages = {
        "overview": "/",
        "runs": "/runs",
        "run": run,
        "adapters": "/adapters",
        "adapter": "/adapters/v000002",
        "playground": "/playground",
        "error": "/runs/none",
    }
    for screen in SCREENS:
        for name, path in pages.items():
            await browser.open(url_of(console, path), screen)
            overflow = await browser.evaluate("document.documentElement.scrollWidth - innerWidth")
            await browser.screenshot(tmp_path / f"{name}-{screen}.png")
            assert overflow <= 0, f"{name} is {overflow} px too wide on a {screen}"
            assert await browser.evaluate("document.querySelector('h1, h2').offsetHeight > 0")
    assert [problem for problem in browser.problems if "runs/none" not in problem] == []


async def test_the_overview_refreshes_itself_in_place(console: Client, browser: Browser) -> None:
    await browser.open(url_of(console, "/"), "desktop")
    await browser.evaluate("document.querySelector('main .big').textContent = 'stale'; 1")
    await browser.evaluate("refresh()")
    assert await browser.evaluate("document.querySelector('main .big').textContent") == "assistant"
    assert browser.problems == []


async def test_a_chat_with_thumbs(console: Client, browser: Browser, seen: list[Any], tmp_path: Path) -> None:
    await browser.open(url_of(console, "/playground"), "desktop")
    say = "document.getElementById('text').value = {0!r}; document.getElementById('ask').requestSubmit(); 1"
    await browser.evaluate(say.format("When is my refund here?"))
    await browser.wait_for("document.querySelectorAll('.thumb').length === 2")
    bodies = "[...document.querySelectorAll('.turn .body')].map((body) => body.textContent)"
    # What the model says is text, never markup.
    assert await browser.evaluate(bodies) == ["When is my refund here?", "Your refund takes <b>5</b> days."]
    assert await browser.evaluate("document.querySelector('.row small').textContent.split(' ·')[0]") == (
        "assistant@v000001"
    )

    click = "document.querySelectorAll('.thumb')[{0}].click(); 1"
    pressed = "[...document.querySelectorAll('.thumb')].map((thumb) => thumb.getAttribute('aria-pressed')).join()"
    for thumb, shown in ((0, "true,false"), (1, "false,true"), (1, "false,false")):  # up, changed to down, taken back
        await browser.evaluate(click.format(thumb))
        await browser.wait_for(f"{pressed} === '{shown}'")
    votes = [body["value"] for path, body, _ in seen if path == "/v1/feedback"]
    assert votes == ["up", "down", "retract"]

    await browser.evaluate(say.format("fail"))
    await browser.wait_for("document.querySelector('.error')?.textContent === 'no engine answers'")
    await browser.evaluate(say.format("And then?"))
    await browser.wait_for("document.querySelectorAll('.thumb').length === 4")
    await browser.screenshot(tmp_path / "chat-desktop.png")
    chats = [body for path, body, _ in seen if path == "/v1/chat/completions"]
    # The whole conversation goes along, without the question that got no answer.
    assert [message["content"] for message in chats[-1]["messages"]] == [
        "When is my refund here?",
        "Your refund takes <b>5</b> days.",
        "And then?",
    ]
    assert len({headers["X-Thumbwheel-Conversation-Id"] for path, _, headers in seen if "chat" in path}) == 1
    assert [problem for problem in browser.problems if "502" not in problem] == []
