"""Which adapter serves a request: pure, the same for every gateway, so that a conversation stays on one adapter."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

ArmName = Literal["live", "canary"]


@dataclass(frozen=True)
class Route:
    """Which adapters serve an alias. A version of None is the base model; each change makes a new generation."""

    alias: str
    generation: int = 0
    live: str | None = None
    canary: str | None = None
    canary_share: float = 0.0
    since_ms: int = 0


@dataclass(frozen=True)
class Arm:
    """A share of the traffic and the engine's model name that serves it."""

    name: ArmName
    adapter: str


def adapter_name(alias: str, version: str) -> str:
    """The name under which the engine serves a version; never reused, for vLLM's prefix cache is keyed by it."""
    return f"{alias}@{version}"


def pick_arm(route: Route, subject: str, base_name: str) -> Arm:
    """The arm of a conversation (or user): a hash of `subject` decides, so that it does not change while the share
    stands, and who was on the canary at a small share is still there at a larger one.
    """
    canary = route.canary is not None and _position(route, subject) < route.canary_share
    version = route.canary if canary else route.live
    return Arm("canary" if canary else "live", base_name if version is None else adapter_name(route.alias, version))


def _position(route: Route, subject: str) -> float:
    """Where a subject stands in [0, 1): new for each canary, or the same people would test every night."""
    digest = hashlib.sha256(f"{route.alias}\0{route.canary}\0{subject}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
