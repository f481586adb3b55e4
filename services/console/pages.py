"""The pages that show: overview, runs, adapters. They change nothing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import aiohttp
from aiohttp import web

from loop.nightly import STAGES
from loop.registry import RegistryError, adapter_history, get_adapter, list_adapters
from loop.store.runs import get_run, run_stages
from services.console import figures
from services.console.parts import GATEWAY, SETTINGS, STORE, render

# A report is a file of the gate's with model output in it: it may draw itself, and reach nothing.
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)


async def overview(request: web.Request) -> web.Response:
    """GET /: the loop with what is going on in each of its places."""
    settings, now_ms = request.app[SETTINGS], int(time.time() * 1000)
    seen, is_up = await asyncio.gather(
        asyncio.to_thread(figures.read_overview, request.app[STORE], settings, now_ms), _is_gateway_up(request)
    )
    return render(request, "overview.html", seen=seen, is_gateway_up=is_up, scheduler=settings.scheduler)


async def runs(request: web.Request) -> web.Response:
    """GET /runs"""
    return render(
        request, "runs.html", runs=await asyncio.to_thread(figures.read_runs, request.app[STORE], 100), stages=STAGES
    )


async def run(request: web.Request) -> web.Response:
    """GET /runs/{run_id}: its stages with their times and what each produced."""
    store, run_id = request.app[STORE], request.match_info["run_id"]
    found = await asyncio.to_thread(get_run, store, run_id)
    if found is None:
        raise web.HTTPNotFound(text=f"run {run_id[:80]!r} is not known")
    stages = await asyncio.to_thread(run_stages, store, run_id)
    has_report = report_path(request.app[SETTINGS].scheduler.runs_dir, run_id) is not None
    return render(request, "run.html", seen=figures.RunFigures(found, stages), stages=STAGES, has_report=has_report)


async def report(request: web.Request) -> web.StreamResponse:
    """GET /runs/{run_id}/report.html: the gate's report of a run that the store knows."""
    run_id = request.match_info["run_id"]
    found = await asyncio.to_thread(get_run, request.app[STORE], run_id)
    path = report_path(request.app[SETTINGS].scheduler.runs_dir, run_id) if found else None
    if path is None:
        raise web.HTTPNotFound(text=f"run {run_id[:80]!r} has no report")
    return web.FileResponse(path, headers={"Content-Security-Policy": REPORT_POLICY})


def report_path(runs_dir: Path, run_id: str) -> Path | None:
    """The run's report, where there is one and it lies in the runs' folder, whatever the name and the links say."""
    root = runs_dir.resolve()
    path = (root / run_id / "report.html").resolve()
    return path if path.is_relative_to(root) and path.is_file() else None


async def adapters(request: web.Request) -> web.Response:
    """GET /adapters"""
    return render(request, "adapters.html", adapters=await asyncio.to_thread(list_adapters, request.app[STORE]))


async def adapter(request: web.Request) -> web.Response:
    """GET /adapters/{version}: where it came from, and what became of it."""
    store, version = request.app[STORE], request.match_info["version"]
    try:
        found = await asyncio.to_thread(get_adapter, store, version)
    except RegistryError as exc:
        raise web.HTTPNotFound(text=str(exc)) from exc
    history = await asyncio.to_thread(adapter_history, store, version)
    return render(request, "adapter.html", adapter=found, history=history)


async def _is_gateway_up(request: web.Request) -> bool:
    try:
        async with request.app[GATEWAY].get("healthz", timeout=aiohttp.ClientTimeout(total=1)) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
