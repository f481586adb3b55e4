"""The base's figures, measured without a server: what `train_base` writes beside the weights.

The demo itself measures served answers through the gateway (`measure.py`); these are the same measures by plain
batched generation, so that a newly trained base can be judged before anything is started.
"""

import hashlib
import statistics
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deploy.demo import measure, world

Prompt = list[world.Message]

MAX_NEW = 120


def weights_hash(model_dir: Path) -> str:
    return hashlib.sha256((model_dir / "model.safetensors").read_bytes()).hexdigest()


def load(model_dir: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer in fp32, as the demo's vLLM serves them; padding on the left, for generation."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(model_dir, padding_side="left")


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    *,
    temperature: float,
    seed: int = 0,
    batch: int = 144,
) -> list[str]:
    torch.manual_seed(seed)
    replies: list[str] = []
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    for start in range(0, len(prompts), batch):
        texts = [
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in prompts[start : start + batch]
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        out = model.generate(**inputs, max_new_tokens=MAX_NEW, **sampling)
        replies += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return replies


@torch.no_grad()
def mean_logp(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[tuple[Prompt, str]],
    batch: int = 96,
) -> list[float]:
    """Mean log-prob per token of each reply, its end token included, for (prompt, reply) rows."""
    scores: list[float] = []
    for start in range(0, len(rows), batch):
        pairs = []
        for prompt, reply in rows[start : start + batch]:
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            head = tokenizer.encode(text, add_special_tokens=False)
            pairs.append((head, [*tokenizer.encode(reply, add_special_tokens=False), tokenizer.eos_token_id]))
        width = max(len(head) + len(tail) for head, tail in pairs)
        pad = tokenizer.pad_token_id
        ids = torch.tensor([h + t + [pad] * (width - len(h) - len(t)) for h, t in pairs])
        logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        scores += [logps[i, len(h) - 1 : len(h) + len(t) - 1].mean().item() for i, (h, t) in enumerate(pairs)]
    return scores


def measure_base(model_dir: Path) -> dict[str, float]:
    """The demo's measures of the base, at temperature 0, and its preferences on pairs that it samples itself."""
    model, tokenizer = load(model_dir)
    asked = measure.eval_questions()
    prompts = [as_prompt(question) for question in asked]
    replies = generate(model, tokenizer, prompts, temperature=0)
    measures = measure.reply_measures(asked, replies, model_dir)
    first = generate(model, tokenizer, prompts, temperature=1, seed=1)
    second = generate(model, tokenizer, prompts, temperature=1, seed=2)
    pairs = measure.tell_apart(asked, first, second)
    return measures | {
        "preference_accuracy": preference_accuracy(model, tokenizer, pairs),
        "preference_pairs": len(pairs),
        "sampled_brief_rate": statistics.fmean(is_brief(reply) for reply in first),
        "sampled_fact_accuracy": measure.reply_measures(asked, first, model_dir)["fact_accuracy"],
    }


def as_prompt(question: world.Question) -> Prompt:
    return [{"role": "user", "content": question.text}]


def is_brief(reply: str) -> bool:
    return not world.is_apology(reply) and len(reply.split()) <= world.BRIEF_WORDS


def preference_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[measure.Row]) -> float:
    chosen = mean_logp(model, tokenizer, [(row["prompt"], row["chosen"]) for row in pairs])
    rejected = mean_logp(model, tokenizer, [(row["prompt"], row["rejected"]) for row in pairs])
    return statistics.fmean(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(chosen, rejected, strict=True))
