"""Ask the running engine to answer held-out prompts, greedily, and say with what log-probs. Knows no torch.

Only generation is asked for: log-probs of a prompt (`prompt_logprobs`, `echo`) can kill an engine that serves LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

TIMEOUT_S = 300.0
CONCURRENT = 8


class ProbeError(RuntimeError):
    """The engine could not be asked, or answered something else; the message says what."""


@dataclass(frozen=True)
class Probe:
    """One greedy answer: its token ids, the end token included where one was, and the log-prob of each."""

    token_ids: list[int]
    logprobs: list[float]
    is_cut: bool
    """Whether it ran into `max_tokens`."""


def generate(
    engine_url: str, model_name: str, prompts: Sequence[Sequence[int]], max_tokens: int, api_key: str | None = None
) -> list[Probe | None]:
    """The answer of `model_name` to each prompt (token ids); None where the engine refuses that prompt (HTTP 400, such
    as one that is too long). Raises ProbeError where it cannot be reached or fails otherwise."""
    ask = partial(_ask, engine_url, model_name, max_tokens, api_key)
    with ThreadPoolExecutor(CONCURRENT) as pool:
        return list(pool.map(ask, prompts))


def _ask(engine_url: str, model_name: str, max_tokens: int, api_key: str | None, prompt: Sequence[int]) -> Probe | None:
    body = {
        "model": model_name,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
    }
    headers = {"content-type": "application/json"}
    if api_key is not None:
        headers["authorization"] = f"Bearer {api_key}"
    request = Request(f"{engine_url.rstrip('/')}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urlopen(request, timeout=TIMEOUT_S) as response:
            return _probe(json.load(response))
    except HTTPError as exc:
        with exc:
            reason = exc.read(500).decode(errors="replace")
        if exc.code == 400:
            return None
        raise ProbeError(f"{engine_url} answered {exc.code} for {model_name}: {reason}") from exc
    except (URLError, OSError, ValueError) as exc:
        raise ProbeError(f"{engine_url} could not be asked for {model_name}: {exc}") from exc


def _probe(answer: Any) -> Probe:
    try:
        choice = answer["choices"][0]
        token_ids, logprobs = list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])
        is_cut = choice["finish_reason"] == "length"
    except (KeyError, IndexError, TypeError) as exc:
        raise ProbeError(f"the engine's answer lacks {exc}: {str(answer)[:300]}") from exc
    if len(token_ids) != len(logprobs) or None in logprobs:
        raise ProbeError(f"the engine gave {len(token_ids)} tokens and {len(logprobs)} log-probs")
    return Probe(token_ids, [float(value) for value in logprobs], is_cut)
