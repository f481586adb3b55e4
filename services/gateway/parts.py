"""What the handlers share: the open clients, the clock and the secrets of one gateway process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from loop import metrics
from loop.events import HybridClock
from loop.settings import GatewaySettings, Settings
from services.gateway.engines import RETRY_AFTER_S, Engines
from services.gateway.errors import Refusal
from services.gateway.identity import TokenSigner, is_key_known
from services.gateway.recent import Recent
from services.gateway.redactor import Redactor
from services.gateway.routes import RouteWatch
from services.gateway.spool import Spool

_REMEMBERED = 20_000


@dataclass
class Parts:
    """One gateway's parts; `settings` is only read while it is made."""

    settings: Settings
    engines: Engines
    routes: RouteWatch
    spool: Spool
    redactor: Redactor | None
    clock: HybridClock
    is_draining: bool = False
    open_requests: int = 0
    gateway: GatewaySettings = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        self.gateway = settings.gateway
        self.alias, self.base_name = settings.engine.alias, settings.engine.base_name
        self.request_timeout_s = settings.engine.request_timeout_s
        self.responses_topic, self.feedback_topic = settings.log.responses_topic, settings.log.feedback_topic
        self.source = f"thumbwheel/gateway/{settings.gateway.gateway_id}"
        self.rater_salt = settings.gateway.rater_salt.get_secret_value().encode()
        self.api_keys = [key.get_secret_value().encode() for key in settings.gateway.api_keys]
        secret = settings.gateway.token_secret
        # Without a secret, tokens hold until the next start.
        self.signer = TokenSigner(os.urandom(32) if secret is None else secret.get_secret_value().encode())
        self.langfuse = settings.langfuse
        gateway = settings.gateway
        weights = {"regenerate": gateway.regenerate_weight, "copy": gateway.copy_weight, "edit": gateway.edit_weight}
        self.implicit_weights = {source: weight for source, weight in weights.items() if weight is not None}
        # The keys of responses with several choices, the last response to each prompt, what each score was on.
        self.with_choices: Recent[None] = Recent(_REMEMBERED)
        self.answered: Recent[str] = Recent(_REMEMBERED)
        self.scored: Recent[str] = Recent(_REMEMBERED)

    def has_key(self, request: web.Request) -> bool:
        """Whether the caller may do everything: it has a key, or there is none to have."""
        return not self.api_keys or is_key_known(self.api_keys, request.headers.get("Authorization"))

    def check_key(self, request: web.Request) -> None:
        """Raises Refusal 401 for a caller without a key."""
        if not self.has_key(request):
            raise Refusal(401, "no valid API key; send `Authorization: Bearer <key>`", code="invalid_api_key")

    @contextmanager
    def admit(self, endpoint: str) -> Iterator[None]:
        """Room for one request to the engine. Raises Refusal 503 where there is none, its body not read yet."""
        if self.open_requests >= self.gateway.max_open_requests:
            metrics.gateway_requests.labels(endpoint, "", "503").inc()
            message = f"{self.open_requests} requests are open, which is the most that is taken here; try again"
            raise Refusal(503, message, code="overloaded", retry_after_s=RETRY_AFTER_S)
        self.open_requests += 1
        try:
            yield
        finally:
            self.open_requests -= 1

    def stamp(self) -> int:
        """The next stamp of the hybrid clock."""
        return self.clock.tick(int(time.time() * 1000))


PARTS = web.AppKey("parts", Parts)
