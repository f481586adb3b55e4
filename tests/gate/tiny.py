"""A tiny chat model with adapters, customers with a taste, and a stub engine that answers as the model would."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loop.kto.batch import policy_logps
from loop.kto.model import attach_lora, load_base, load_tokenizer
from loop.kto.rows import Row, row_of
from loop.settings import TrainSettings

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WORDS = [*(f"w{index}" for index in range(40)), "sorry", "short", "yes", "no", "red", "blue"]
TRAIN = TrainSettings(lora_r=4, lora_alpha=8.0, quantization="none", max_length=128)
GOOD, BAD = "short yes", "sorry sorry no w1 w2"


def write_base(folder: Path) -> Path:
    """Two layers and some fifty words, random weights, on disk in Transformers' layout."""
    special = ["<unk>", "</s>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    model.save_pretrained(folder)
    return folder


def votes(count: int, seed: int, *, flip: bool = False, raters: int = 45) -> list[dict[str, Any]]:
    """Rated answers: customers like GOOD, not BAD, a tenth of the votes is noise; `flip` turns all over."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        liked = rng.random() < 0.5
        up = liked ^ (rng.random() < 0.1) ^ flip
        rows.append(
            {
                "prompt": [{"role": "user", "content": " ".join(rng.choices(WORDS[:40], k=6))}],
                "completion": GOOD if liked else BAD,
                "label": up,
                "rater": f"rater {rng.randrange(raters)}",
                "conversation_id": f"conversation {number}",
            }
        )
    return rows


def write_votes(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_adapter(base: Path, folder: Path, rated: list[dict[str, Any]], steps: int = 15) -> Path:
    """An adapter on these votes: plain gradient steps towards up-voted and away from down-voted answers."""
    tokenizer = load_tokenizer(base)
    rows: list[Row] = [row_of(r, str(n), tokenizer, None, (1.0, 1.0)) for n, r in enumerate(rated)]
    model: Any = attach_lora(load_base(base, "none", "float32"), TRAIN)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    sign = torch.tensor([1.0 if row.desirable else -1.0 for row in rows])
    with torch.no_grad():
        start = policy_logps(model, rows)
    for _ in range(steps):
        loss = -torch.nn.functional.logsigmoid(sign * (policy_logps(model, rows) - start)).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    model.save_pretrained(folder)
    return folder


@contextmanager
def stub_engine(base: Path, adapters: dict[str, Path | None], *, longest: int = 100) -> Iterator[str]:
    """An HTTP server that generates greedily with Transformers' own attention, one adapter a model name; its URL.

    Prompts of more than `longest` tokens are refused as vLLM refuses them.
    """
    lock = threading.Lock()

    @lru_cache
    def model_of(name: str) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        folder = adapters[name]
        return (model if folder is None else PeftModel.from_pretrained(model, str(folder))).eval()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert (self.path, asked["temperature"], asked["return_token_ids"]) == ("/v1/completions", 0, True)
            assert not {"echo", "prompt_logprobs"} & set(asked), "this kills an engine that serves LoRA"
            if len(asked["prompt"]) > longest:
                self._answer(400, {"error": {"message": "the prompt is too long"}})
            elif asked["model"] not in adapters:
                self._answer(404, {"error": {"message": "no such model"}})
            else:
                with lock:
                    self._answer(200, {"choices": [_greedy(model_of(asked["model"]), asked)]})

        def _answer(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@torch.no_grad()
def _greedy(model: Any, asked: dict[str, Any]) -> dict[str, Any]:
    tokens: list[int] = list(asked["prompt"])
    made: list[int] = []
    logprobs: list[float] = []
    while len(made) < asked["max_tokens"] and 1 not in made:
        distribution = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        made.append(int(distribution.argmax()))
        logprobs.append(float(distribution.max()))
        tokens.append(made[-1])
    reason = "stop" if 1 in made else "length"
    return {"token_ids": made, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}
