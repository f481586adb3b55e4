"""The OpenAPI document says what the gateway does, and the gateway does what it says."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from services.gateway.openapi import openapi
from tests.chromium import SCREENS, chromium
from tests.gateway.conftest import Gateway, StartGateway

NOT_DESCRIBED = {"/openapi.json", "/docs", "/{path}"}


async def test_every_route_is_described(gateway: Gateway) -> None:
    routes = {
        (route.resource.canonical, route.method.lower())
        for route in gateway.app.router.routes()
        if route.resource is not None and route.resource.canonical not in NOT_DESCRIBED and route.method != "HEAD"
    }
    assert {(path, method) for path, methods in openapi()["paths"].items() for method in methods} == routes


async def test_the_document_is_openapi_3_1(gateway: Gateway) -> None:
    async with gateway.http.get(gateway.url + "/openapi.json") as response:
        document = await response.json()
    assert document["openapi"] == "3.1.0"
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []
    del document["paths"]["/v1/feedback"]["post"]["responses"]["202"]["description"]
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) != []


async def test_the_page_shows_all_of_it_without_scripts(gateway: Gateway) -> None:
    async with gateway.http.get(gateway.url + "/docs") as response:
        page = await response.text()
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert "<script" not in page
    assert "<code>Retry-After</code> says" in page
    assert not re.search(r"(?:src|href)=.https?:", page)
    for path in openapi()["paths"]:
        assert f" {path}</code>" in page
    for name in openapi()["components"]["schemas"]:
        assert f'id="{name}"' in page


async def test_the_page_fits_every_screen(gateway: Gateway, tmp_path: Path) -> None:
    async with chromium(tmp_path / "profile") as browser:
        for screen, (width, _, _) in SCREENS.items():
            await browser.open(gateway.url + "/docs", screen)
            assert await browser.evaluate("innerWidth") == width
            assert await browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.problems == []


async def test_another_method_is_a_405_that_names_the_right_one(gateway: Gateway) -> None:
    for path, allowed in (("/v1/feedback", "POST"), ("/v1/models", "GET")):
        for method in ("PUT", "DELETE", "PATCH"):
            async with gateway.http.request(method, gateway.url + path) as response:
                assert (response.status, response.headers["Allow"]) == (405, allowed)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/resp_1"])
async def test_the_responses_api_is_refused_with_the_reason(gateway: Gateway, path: str) -> None:
    status, body, _ = await gateway.post(path, {"model": "assistant", "input": "hi"})
    assert (status, body["error"]["code"]) == (404, "unknown_url")
    assert "/v1/chat/completions" in body["error"]["message"]


async def schemathesis(url: str, folder: Path, *options: str) -> tuple[int, str]:
    command = ("-m", "schemathesis.cli", "run", url + "/openapi.json", "--seed", "1", "--no-color", *options)
    command += ("--request-timeout", "120", "--suppress-health-check", "too_slow")  # of a busy machine, not of ours
    child = await asyncio.create_subprocess_exec(
        sys.executable, *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await child.communicate()
    assert child.returncode is not None
    return child.returncode, output.decode()


# What a body may be is the engine's to say where a request is passed on, and the stub takes nearly everything.
THE_ENGINES = "negative_data_rejection,positive_data_acceptance"
CASES: dict[str, tuple[str, ...]] = {
    "engine": ("--include-tag", "engine", "--exclude-checks", THE_ENGINES),
    # Of Langfuse's fields only those that make a vote are looked at.
    "langfuse": ("--include-tag", "langfuse", "--exclude-checks", THE_ENGINES),
    "others": ("--exclude-tag", "engine", "--exclude-tag", "langfuse"),
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("key", ["", "k1"])
async def test_schemathesis_passes(start: StartGateway, tmp_path: Path, options: tuple[str, ...], key: str) -> None:
    gateway = await start(api_keys=[key] if key else [])
    options += ("--header", f"Authorization: Bearer {key}") if key else ()
    status, output = await schemathesis(gateway.url, tmp_path, "--checks", "all", "--max-examples", "25", *options)
    assert status == 0, output
