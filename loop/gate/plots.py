"""Pictures of the run report, as inline SVG: a strip for each check, matplotlib for distributions and curves."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from loop.gate.bootstrap import F64
from loop.gate.verdict import Check

GREEN, RED, GREY, INK, LINE = "#1a7f52", "#c2362b", "#8a8f98", "#1f2430", "#d9dce2"
UP, DOWN, BLUE = "#2a9d74", "#d9603b", "#3566b8"
COLOURS = {"pass": GREEN, "fail": RED, "insufficient": "#b7791f"}
_WIDTH, _HEIGHT, _MARGIN = 360, 46, 14


def strip(check: Check) -> Markup:
    """A check on its own axis: the value and its interval, the threshold, and the side on which it passes shaded."""
    if check.value is None:
        return Markup("")
    accepted = _accepted(check)
    points = [check.value, check.low, check.high, *(a for a in accepted if a is not None)]
    known = [point for point in points if point is not None]
    if check.threshold is None and min(known) >= 0 and max(known) <= 1:
        known = [0.0, 1.0]  # shares are on one axis, to be compared by eye
    low, high = min(known), max(known)
    pad = (high - low) * 0.18 or max(abs(high), 1.0) * 0.1
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return round(_MARGIN + (value - low) / (high - low) * (_WIDTH - 2 * _MARGIN), 1)

    colour = COLOURS.get(check.verdict, GREY)
    middle = 17
    parts = []
    if check.threshold is not None:
        left, right = (
            (x(low) if accepted[0] is None else x(accepted[0])),
            (x(high) if accepted[1] is None else x(accepted[1])),
        )
        parts.append(f'<rect x="{left}" y="4" width="{max(0.0, right - left):.1f}" height="26" fill="#e6f3ec" rx="2"/>')
        for edge in (edge for edge in accepted if edge is not None):
            parts.append(f'<line x1="{x(edge)}" x2="{x(edge)}" y1="2" y2="32" stroke="{INK}" stroke-dasharray="3 2"/>')
            parts.append(f'<text x="{x(edge)}" y="43" class="tick" text-anchor="middle">{number(edge)}</text>')
    parts.append(f'<line x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{middle}" y2="{middle}" stroke="{LINE}"/>')
    if check.low is not None and check.high is not None:
        a, b = x(check.low), x(check.high)
        parts.append(
            f'<line x1="{a}" x2="{b}" y1="{middle}" y2="{middle}" stroke="{colour}" stroke-width="5" opacity=".45"/>'
        )
        parts += [f'<line x1="{e}" x2="{e}" y1="12" y2="22" stroke="{colour}" stroke-width="2"/>' for e in (a, b)]
    parts.append(f'<circle cx="{x(check.value)}" cy="{middle}" r="5" fill="{colour}"/>')
    label = escape(f"{check.title}: {number(check.value)}, interval {number(check.low)} to {number(check.high)}")
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def number(value: float | None) -> str:
    """A figure as people read it: three significant digits, whole numbers as they are."""
    if value is None:
        return "–"
    text = f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("-", "−")


def rewards(arrays: dict[str, F64], which: str) -> Markup:
    """Histograms of the implicit reward of up-voted and down-voted answers."""
    up = arrays["desirable"] > 0
    values = arrays[which]

    def draw(axes: Any) -> None:
        edges = np.histogram_bin_edges(_clipped(values), bins=36)
        for part, colour, label in ((values[~up], DOWN, "thumbs down"), (values[up], UP, "thumbs up")):
            if len(part):
                axes.hist(_clipped(part, edges), bins=edges, color=colour, alpha=0.6, label=f"{label} ({len(part)})")
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("reward  β (log π − log π_ref)")
        axes.set_ylabel("held-out answers")
        axes.legend(frameon=False)

    return _figure(draw)


def lengths(arrays: dict[str, F64]) -> Markup:
    """Reply lengths of candidate and live on the same prompts."""

    def draw(axes: Any) -> None:
        pairs = (("live", GREY, arrays["live_lengths"]), ("candidate", BLUE, arrays["candidate_lengths"]))
        edges = np.histogram_bin_edges(np.concatenate([values for _, _, values in pairs]), bins=24)
        for name, colour, values in pairs:
            axes.hist(values, bins=edges, color=colour, alpha=0.55, label=f"{name} (median {np.median(values):.0f})")
        axes.set_xlabel("tokens in the reply, temperature 0")
        axes.set_ylabel("probe prompts")
        axes.legend(frameon=False)

    return _figure(draw)


def skew(arrays: dict[str, F64]) -> Markup:
    """Differences between the engine's and the trainer's log-probs, token by token."""

    def draw(axes: Any) -> None:
        axes.hist(np.maximum(arrays["skew"], 1e-8), bins=np.logspace(-8, 1, 46).tolist(), color=BLUE, alpha=0.7)
        axes.set_xscale("log")
        axes.set_xlabel("|engine − trainer|, nats a token")
        axes.set_ylabel("tokens")

    return _figure(draw)


def curves(metrics: Sequence[dict[str, float]], names: dict[str, tuple[str, str]], label: str) -> Markup:
    """Metrics over optimiser steps: {metric: (legend, colour)}; thin line as logged, thick one smoothed."""

    def draw(axes: Any) -> None:
        for name, (legend, colour) in names.items():
            logged = [(line["step"], line[name]) for line in metrics if name in line]
            if not logged:
                continue
            steps, values = np.asarray(logged, dtype=float).T
            width = max(1, len(values) // 20)
            padded = np.concatenate([np.full(width - 1, values[0]), values])
            smooth = np.convolve(padded, np.ones(width) / width, mode="valid")
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth, color=colour, linewidth=1.8, label=legend)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(label)
        axes.legend(frameon=False)

    return _figure(draw)


def _accepted(check: Check) -> tuple[float | None, float | None]:
    """The side of the threshold on which a check passes: (from, to), None for no bound."""
    threshold = check.threshold
    if threshold is None:
        return None, None
    if check.rule.startswith("between"):
        return 1 / threshold, threshold
    return (None, threshold) if "at most" in check.rule else (threshold, None)


def _clipped(values: F64, edges: F64 | None = None) -> F64:
    """Without the farthest half per cent on either side, or within the edges: outliers pile up at the ends."""
    if len(values) == 0:
        return values
    low, high = np.quantile(values, [0.005, 0.995]) if edges is None else (edges[0], edges[-1])
    return np.clip(values, low, high)


def _figure(draw: Callable[[Any], None]) -> Markup:
    """An SVG of 460 × 250 points, text as text; without pyplot, whose figures live until they are closed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "thumbwheel", "font.family": "sans-serif", "font.size": 9.5}
    with rc_context(style):
        figure = Figure(figsize=(5.4, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(LINE)
        axes.tick_params(color=LINE, labelcolor="#5b616e")
        axes.xaxis.label.set_color("#5b616e")
        axes.yaxis.label.set_color("#5b616e")
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    # From the element itself on: an XML declaration has no place inside a page, and ids must not meet other figures'.
    svg = text.getvalue()
    return Markup(re.sub(r"font: ([^;\"]*?)sans-serif", r"font: \1system-ui, sans-serif", svg[svg.index("<svg") :]))
