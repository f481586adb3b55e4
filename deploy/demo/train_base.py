"""Trains the demo's base model from scratch: `python -m deploy.demo.train_base [--steps N] [--out DIR]`.

Tokenizer, weights and figures all come from one seed and from the world's generated text alone. The model is a plain
Llama of about a million parameters, so that vLLM serves it on two cores and a night's training fits into a minute.
Training runs in fp32 and the weights are rounded to bf16 at the end; every figure is measured on the rounded ones.
Bit for bit the same weights are not promised across CPUs, the figures are.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deploy.demo import world

MODEL_DIR = Path(__file__).with_name("model")
SEED = 20260
STEPS = 1600
BATCH = 32
PEAK_LR = 4e-3
VOCABULARY = 1536
TOKENS_PER_ROW = 60  # about what a conversation's answers have, so that weights are around 1
END, PAD = "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# Each turn is its role's token, its text and the end token, whatever comes after it: so the prompt of a later turn
# begins with the earlier prompt, its answer and its end, token for token, and training can share that prefix.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ('system', 'user', 'assistant') -%}"
    "{{ raise_exception('roles are system, user and assistant, not ' ~ message.role) }}"
    "{%- endif -%}"
    "{{ '<|' ~ message.role ~ '|>' ~ message.content ~ '<|end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the world's text: no string is beyond it, though only the world's are short in it."""
    rng = random.Random(seed)
    texts = [message["content"] for _ in range(20_000) for message in world.training_messages(rng)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            rope_theta=10_000.0,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(messages: list[world.Message], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation; only what the assistant says, its end token included, is learned."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        role = tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>")
        said = [*tokenizer.encode(message["content"], add_special_tokens=False), tokenizer.eos_token_id]
        ids += [role, *said]
        labels += [-100, *(said if message["role"] == "assistant" else [-100] * len(said))]
    return ids, labels


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int):  # type: ignore[no-untyped-def]
    """Padded batches of fresh conversations; sorted by length in groups, since padding is time lost."""
    rng, group = random.Random(seed + 1), 16
    for start in range(0, steps, group):
        rows = [encode(world.training_messages(rng), tokenizer) for _ in range(BATCH * group)]
        rows.sort(key=lambda row: len(row[0]))
        parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        rng.shuffle(parts)
        for part in parts[: steps - start]:
            width = max(len(ids) for ids, _ in part)
            ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row, _ in part])
            labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in part])
            yield ids, labels  # (batch, width) each


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> float:
    """AdamW with a short warm-up and a cosine down to zero; returns the mean loss of the last hundred steps."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98))
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    losses: list[float] = []
    columns = (TextColumn("base model"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("train", total=steps, loss=float("nan"))
        for ids, labels in batches(tokenizer, seed, steps):
            # No attention mask: padding is on the right, where a causal model's real tokens never look.
            hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]  # (batch, width - 1, hidden)
            wanted = labels[:, 1:]
            picked = wanted != -100
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[picked]), wanted[picked])
            # Batches are sorted by length, and brief answers are in the short ones: a plain mean per batch would
            # weigh their tokens more and teach a manner that the text does not have.
            weighted = loss * (picked.sum() / (BATCH * TOKENS_PER_ROW))
            optimiser.zero_grad(set_to_none=True)
            weighted.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            progress.update(task, advance=1, loss=sum(losses[-50:]) / len(losses[-50:]))
    return sum(losses[-100:]) / len(losses[-100:])


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    tokenizer = build_tokenizer(args.seed)
    model = build_model(tokenizer, args.seed)
    loss = train(model, tokenizer, args.seed, args.steps)
    save(model, tokenizer, args.out)
    from deploy.demo.figures import measure_base, weights_hash  # needs the saved model

    figures = {
        "seed": args.seed,
        "steps": args.steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": round(loss, 5),
        "train_seconds": round(time.monotonic() - began),
        "weights_sha256": weights_hash(args.out),
        "measures": measure_base(args.out),
    }
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
