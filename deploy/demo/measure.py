"""What the demo compares before and after a night: served answers to fixed questions, and fixed preference pairs.

The questions belong to the evaluation split, so neither the base nor any customer's chat has seen them. Answers are
asked for through the gateway at temperature 0. The preference pairs are sampled once, from the base, and stay fixed:
before and after are then judged on the same pairs. Nothing here reaches the loop; no answer of it is logged as voted.
"""

import asyncio
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from rich.progress import track
from tokenizers import Tokenizer

from deploy.demo import customers, world

MODEL_DIR = Path(__file__).with_name("model")
EVAL_SEED = 7
EVAL_COUNT = 432
PAIR_COUNT = 720  # questions with two answers each; somewhat over half of the pairs can be told apart
PAIR_SEED = 8
VOTE_SEED = 9
Row = dict[str, Any]


@dataclass(frozen=True)
class Served:
    """Evaluation questions and the answers that were served to them; failed requests are in neither."""

    asked: list[world.Question]
    replies: list[str]
    failures: list[str]


def eval_questions(count: int = EVAL_COUNT) -> list[world.Question]:
    return world.questions(EVAL_SEED, "eval", count)


async def serve(
    base_url: str,
    asked: Sequence[world.Question],
    *,
    model: str,
    api_key: str = "demo",
    quiet: bool = False,
) -> Served:
    """Asks every question once at temperature 0, in a conversation of its own, not streamed."""
    async with customers.open_desk(base_url, api_key=api_key, model=model) as desk:
        tasks = []
        for index, question in enumerate(asked):
            name = f"evaluation-{index:04d}"
            messages: list[world.Message] = [{"role": "user", "content": question.text}]
            ask = desk.ask(messages, rater=name, conversation=name, temperature=0.0)
            tasks.append(asyncio.create_task(ask))
        for task in track(tasks, description="evaluation", disable=quiet):
            await task
        got = [task.result() for task in tasks]
        kept = [(question, reply[0]) for question, reply in zip(asked, got, strict=True) if reply is not None]
        return Served([question for question, _ in kept], [reply for _, reply in kept], desk.tally.failures)


def reply_measures(asked: Sequence[world.Question], replies: Sequence[str], model_dir: Path) -> dict[str, float]:
    """Lengths count the end token, as the engine does; the votes are those of fresh customers, noise included."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    lengths = [len(tokenizer.encode(reply, add_special_tokens=False).ids) + 1 for reply in replies]
    return {
        "median_length_tokens": float(statistics.median(lengths)),
        "apology_rate": statistics.fmean(world.is_apology(reply) for reply in replies),
        "fact_accuracy": statistics.fmean(world.has_fact(r, q.fact) for q, r in zip(asked, replies, strict=True)),
        "thumbs_up_rate": thumbs_up_rate(asked, replies),
    }


def thumbs_up_rate(asked: Sequence[world.Question], replies: Sequence[str], noise: float = 0.1) -> float:
    """The share of thumbs up that one fresh customer each would give; the same customers before and after."""
    ups = 0
    for index, (question, reply) in enumerate(zip(asked, replies, strict=True)):
        likes = customers.customer(VOTE_SEED, index).likes(reply, question.fact)
        ups += likes != (random.Random(f"noise {VOTE_SEED} {index}").random() < noise)
    return ups / len(asked)


async def measure_served(
    base_url: str, *, model: str, api_key: str = "demo", count: int = EVAL_COUNT, quiet: bool = False
) -> tuple[dict[str, float], Served]:
    """The demo's measures of whatever serves this alias now, and the answers that they were taken from."""
    served = await serve(base_url, eval_questions(count), model=model, api_key=api_key, quiet=quiet)
    if not served.replies:
        raise ValueError(f"no evaluation question was answered by {base_url}: {served.failures[:3]}")
    return reply_measures(served.asked, served.replies, MODEL_DIR), served


def tell_apart(asked: Sequence[world.Question], first: Sequence[str], second: Sequence[str]) -> list[Row]:
    """The pairs of answers to one question that the noiseless taste tells apart, the better one as `chosen`."""
    rows: list[Row] = []
    for question, a, b in zip(asked, first, second, strict=True):
        if order := world.prefers(a, b, question.fact):
            chosen, rejected = (a, b) if order > 0 else (b, a)
            prompt = [{"role": "user", "content": question.text}]
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


async def preference_pairs(
    base_url: str, *, model: str, api_key: str = "demo", count: int = PAIR_COUNT, quiet: bool = False
) -> list[Row]:
    """Pairs of served answers, two samples at temperature 1 to each question; ask while the base still serves."""
    limit = asyncio.Semaphore(customers.MAX_CONCURRENCY)

    async def sample(openai: AsyncOpenAI, question: world.Question) -> list[str]:
        async with limit:
            answer = await openai.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question.text}],
                n=2,
                temperature=1.0,
                max_tokens=customers.MAX_TOKENS,
            )
        return [choice.message.content or "" for choice in answer.choices]

    asked = world.questions(PAIR_SEED, "eval", count)
    async with AsyncOpenAI(base_url=base_url, api_key=api_key, timeout=120) as openai:
        tasks = [asyncio.create_task(sample(openai, question)) for question in asked]
        first, second = zip(*[await task for task in track(tasks, "preference pairs", disable=quiet)], strict=True)
    return tell_apart(asked, first, second)


def save_pairs(pairs: Sequence[Row], path: Path) -> None:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def score_pairs(model_dir: Path, adapter_dir: Path | None, pairs: Path) -> float:
    """The share of a file's pairs whose better answer gets the higher log-prob per token, end token included."""
    # Scoring needs torch, asking does not: the import waits until it is needed.
    from loop.kto.score import score_file

    return float(score_file(model_dir, pairs, adapter_dir)["accuracy_mean"])
