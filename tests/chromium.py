"""A headless Chromium, driven over its own DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

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
TIMEOUT_S = 120.0


class BrowserError(Exception):
    """A command that the browser refuses."""


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
                    if "error" in answer:
                        raise BrowserError(answer)
                    result: dict[str, Any] = answer["result"]
                    return result

    async def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        result = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def wait_for(self, script: str) -> Any:
        """The first truthy value of an expression; on a page that is just being left there is none to ask."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                with suppress(BrowserError):
                    if value := await self.evaluate(script):
                        return value
                await asyncio.sleep(0.05)

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
