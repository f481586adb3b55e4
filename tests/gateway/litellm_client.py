"""What the LiteLLM client gets through the gateway: `python litellm_client.py URL`, in an environment that has it."""

from __future__ import annotations

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the network for prices

import litellm  # type: ignore[import-not-found]

ASK = {
    "model": "openai/assistant",
    "api_base": sys.argv[1] + "/v1",
    "api_key": "none",
    "messages": [{"role": "user", "content": "Where is my order?"}],
    "max_tokens": 16,
    "temperature": 0,
}
whole = litellm.completion(**ASK)
chunks = litellm.completion(**ASK, stream=True)
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
print(json.dumps({"whole": whole.choices[0].message.content, "streamed": streamed, "id": whole.id}))
