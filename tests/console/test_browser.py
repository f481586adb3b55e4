"""The pages in a real browser, on a desktop and on a phone: no error, nothing cut off, and a chat with thumbs.

Chromium is driven over its own DevTools protocol. Screenshots lie in the test's folder, for whoever wants to look.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient

Client = TestClient[web.Request, web.Application]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
]
SCREENS = {"desktop": (1280, 800, False), "phone": (390, 844, True)}
TIMEOUT_S = 30.0


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, session_id: str) -> None:
        self._socket, self._session_id = socket, session_id
        self._ids = itertools.count(1000)
        self.problems: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result; what the page complains of meanwhile is kept."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params, "sessionId": self._session_id}
        await self._socket.send_json(message)
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                answer = await self._socket.receive_json()
                if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                    self.problems.append(str(answer["params"]))
                if answer.get("id") == number:
                    assert "error" not in answer, answer
                    result: dict[str, Any] = answer["result"]
                    return result

    async def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        result = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def wait_for(self, script: str) -> Any:
        """The first truthy value of an expression."""
        async with asyncio.timeout(TIMEOUT_S):
            while not (value := await self.evaluate(script)):
                await asyncio.sleep(0.05)
        return value

    async def open(self, url: str, screen: str) -> None:
        width, height, is_mobile = SCREENS[screen]
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_mobile
        )
        await self.call("Page.navigate", url=url)
        await self.wait_for(f"document.readyState === 'complete' && location.href === {url!r}")

    async def screenshot(self, path: Path) -> None:
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=size | {"scale": 1})
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def chromium(profile: Path) -> AsyncIterator[Browser]:
    program = shutil.which("chromium")
    assert program, "chromium is missing; `make test` installs it"
    process = await asyncio.create_subprocess_exec(
        program, *FLAGS, f"--user-data-dir={profile}", "about:blank",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not (port := profile / "DevToolsActivePort").exists() or len(port.read_text().splitlines()) < 2:
                await asyncio.sleep(0.05)
        number, path = port.read_text().splitlines()[:2]
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"ws://127.0.0.1:{number}{path}", max_msg_size=0) as socket,
        ):
            browser = Browser(socket, "")
            target = (await _call(socket, 1, "Target.createTarget", url="about:blank"))["targetId"]
            attached = await _call(socket, 2, "Target.attachToTarget", targetId=target, flatten=True)
            browser = Browser(socket, attached["sessionId"])
            for domain in ("Page", "Runtime", "Log"):
                await browser.call(f"{domain}.enable")
            yield browser
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _call(socket: aiohttp.ClientWebSocketResponse, number: int, method: str, **params: Any) -> dict[str, Any]:
    await socket.send_json({"id": number, "method": method, "params": params})
    while (answer := await socket.receive_json()).get("id") != number:
        pass
    result: dict[str, Any] = answer["result"]
    return result


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[Browser]:
    async with chromium(tmp_path / "profile") as opened:
        yield opened


def url_of(console: Client, path: str) -> str:
    return str(console.make_url(path))


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
