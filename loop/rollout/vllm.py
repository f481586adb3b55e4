"""vLLM's admin API for LoRA adapters: the only module that knows it. One object for each replica, nothing cached."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class EngineError(RuntimeError):
    """The engine cannot be reached or refused; the message names the engine, what was asked and its answer."""


@dataclass(frozen=True)
class Replica:
    """One vLLM server, started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING."""

    url: str
    api_key: str | None = None
    timeout_s: float = 30.0

    def is_healthy(self) -> bool:
        """Whether it answers its health check now."""
        try:
            self._call("GET", "/health", timeout_s=2.0)
        except EngineError:
            return False
        return True

    def models(self) -> set[str]:
        """The names that it serves: the base model and every loaded adapter. Raises EngineError."""
        return {model["id"] for model in self._call("GET", "/v1/models")["data"]}

    def load(self, name: str, path: Path) -> None:
        """Load the adapter in `path` (PEFT's layout, as the engine sees it) as `name`; loaded already is no error."""
        if name not in self.models():
            self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path.absolute())})

    def unload(self, name: str) -> None:
        """Take an adapter out; not loaded is no error."""
        if name in self.models():
            self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def probe(self, name: str) -> None:
        """Have `name` generate one token: an adapter that loads may still fail there. Raises EngineError."""
        answer = self._call("POST", "/v1/completions", {"model": name, "prompt": "Hello", "max_tokens": 1})
        if not answer.get("choices"):
            raise EngineError(f"engine {self.url} answered the probe of {name!r} without a choice: {answer!r:.300}")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = 0) -> Any:
        request = urllib.request.Request(self.url.rstrip("/") + path, method=method)
        request.add_header("Content-Type", "application/json")
        if self.api_key is not None:
            request.add_header("Authorization", f"Bearer {self.api_key}")
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, data, timeout=timeout_s or self.timeout_s) as response:
                text = response.read()
        except urllib.error.HTTPError as exc:
            with exc:
                reason = exc.read().decode(errors="replace")[:500]
            raise EngineError(f"engine {self.url}: {method} {path} {body or ''} answered {exc.code}: {reason}") from exc
        except (OSError, ValueError) as exc:
            raise EngineError(f"engine {self.url}: {method} {path} failed: {exc}; is vLLM running there?") from exc
        return json.loads(text) if text.startswith((b"{", b"[")) else text.decode()
